"""Hosts of a test's own: namespaces of this machine with a network card each, joined by a switch."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def missing() -> str | None:
    """Why hosts can't be made here; None if they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    name = f"dip-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode != 0:
        return "this system makes no network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class Host:
    """``address`` as the others reach it, on its card ``eth0``."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command begins with to run there: its own network, name and shared memory, as a machine has them."""
        name = f'hostname {self.namespace} && exec "$@"'
        return ("ip", "netns", "exec", self.namespace, "unshare", "--uts", "--ipc", "sh", "-c", name, "sh")

    def unplug(self) -> None:
        """Nothing comes or goes any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def delay(self, milliseconds: float, loss: float) -> bool:
        """What it sends comes later, and of ``loss`` percent only again; False where the kernel can't do that."""
        rule = ["tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", f"{milliseconds}ms", "loss", f"{loss}%"]
        done = subprocess.run(["ip", "netns", "exec", self.namespace, *rule], capture_output=True, check=False)
        return done.returncode == 0


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Hosts that reach each other, gone with the block."""
    tag = uuid.uuid4().hex[:6]
    switch = f"dip{tag}s"
    made = [Host(f"dip{tag}h{i}", f"10.77.0.{i + 1}") for i in range(count)]
    try:
        for name in (switch, *(host.namespace for host in made)):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for i, host in enumerate(made):
            port = f"port{i}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield made
    finally:
        for name in (switch, *(host.namespace for host in made)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
