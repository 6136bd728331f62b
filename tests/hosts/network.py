"""Hosts of a test's own: namespaces of this machine with a network card each, on a wire that delays and loses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_TUN, _SET_NAME, _BARE_PACKETS = "/dev/net/tun", 0x400454CA, 0x1001  # TUNSETIFF, IFF_TUN | IFF_NO_PI
_NETWORKS = Path("/var/run/netns")


def missing() -> str | None:
    """Why hosts can't be made here; None if they can."""
    if not hasattr(os, "setns"):
        return "ranks enter network namespaces by os.setns, which Python has since 3.12"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    try:
        with hosts(1, Links()):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this system makes no network namespaces with TUN devices: {error}"


class Links(NamedTuple):
    """What every packet meets: seconds of delay and, drawn, of jitter; which share of packets is lost."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    seed: int = 1


class Packets(NamedTuple):
    """What a wire has seen."""

    carried: int
    lost: int


@dataclass(frozen=True)
class Wire:
    """The wire of all hosts: see ``relay.py``."""

    relay: subprocess.Popen[str]

    def packets(self) -> Packets:
        return self._ask("count")

    def cut(self, address: str) -> None:
        """Nothing of that host comes or goes any more, and nobody is told."""
        self._ask(f"cut {address}")

    def _ask(self, line: str) -> Packets:
        assert self.relay.stdin is not None
        assert self.relay.stdout is not None
        self.relay.stdin.write(line + "\n")
        self.relay.stdin.flush()
        return Packets(**json.loads(self.relay.stdout.readline()))


@dataclass(frozen=True)
class Host:
    """``address`` as the others reach it, on its card ``eth0``."""

    name: str
    address: str

    def enter(self) -> None:
        """Move this process, while it has one thread, to the host: network, name and shared memory of its own."""
        with (_NETWORKS / self.name).open() as network:
            os.setns(network.fileno(), os.CLONE_NEWNET)
        os.unshare(os.CLONE_NEWUTS | os.CLONE_NEWIPC)
        socket.sethostname(self.name)

    def round_trip(self, other: str, times: int = 20) -> float:
        """Seconds, at least, until a packet has gone to the host of an address and its answer has come back."""
        program = f"""
import socket, time
def refused():
    begin = time.monotonic()
    with socket.socket() as tried:
        tried.connect_ex(("{other}", 9))
    return time.monotonic() - begin
print(min(refused() for _ in range({times})))
"""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-IS", "-c", program]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@contextmanager
def hosts(count: int, links: Links) -> Iterator[tuple[list[Host], Wire]]:
    """Hosts that reach each other over a wire of such links, gone with the block."""
    tag = uuid.uuid4().hex[:6]
    made = [Host(f"dip{tag}h{i}", f"10.77.0.{i + 1}") for i in range(count)]
    cards: dict[str, int] = {}
    relay: subprocess.Popen[str] | None = None
    try:
        for host in made:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
            cards[host.address] = os.open(_TUN, os.O_RDWR)
            fcntl.ioctl(cards[host.address], _SET_NAME, struct.pack("16sH22x", host.name.encode(), _BARE_PACKETS))
            _ip("link", "set", host.name, "netns", host.name, "name", "eth0")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
        settings = {"cards": cards, **links._asdict()}
        relay = subprocess.Popen(
            [sys.executable, "-IS", str(Path(__file__).with_name("relay.py")), json.dumps(settings)],
            pass_fds=list(cards.values()), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        yield made, Wire(relay)
    finally:
        if relay is not None:
            relay.communicate()
        for card in cards.values():
            os.close(card)
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
