"""Ports that are held for ranks that start."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from dip_megatron.ports import held_port


@pytest.mark.parametrize("libuv", [True, False])
def test_a_store_listens_on_a_held_port_and_nobody_else_gets_it(libuv: bool) -> None:
    with held_port() as port, held_port() as another:
        assert port != another
        with socket.socket() as outgoing, pytest.raises(OSError, match="in use"):
            outgoing.bind(("127.0.0.1", port))
        store = dist.TCPStore("127.0.0.1", port, 1, True, timeout=timedelta(seconds=30), use_libuv=libuv)
        store.set("rank", "0")
        assert store.get("rank") == b"0"


def test_a_port_is_free_again_behind_the_block() -> None:
    """Unless somebody else has taken it since, who takes not all of them."""

    def free_again() -> bool:
        with held_port() as port:
            pass
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
                server.listen()
            except OSError:
                return False
        return True

    assert any(free_again() for _ in range(5))
