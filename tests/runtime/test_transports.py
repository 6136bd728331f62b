"""Every transport carries any traffic unharmed, in order, and never waits for ever."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dip_megatron.core import Channel
from dip_megatron.runtime.ipc import _Incoming
from dip_megatron.runtime.sharing import HostCopies
from dip_megatron.runtime.transport_choice import Place, place_of, transport_kind
from tests.drawn import settings
from tests.processes import team
from tests.runtime.transport_case import burst, departure, silence, traffic

DEVICE_KINDS = ["ipc", "staging"]


@pytest.mark.parametrize("kind", ["gloo", "ipc", "staging"])
@pytest.mark.parametrize("world", [2, 4])
def test_traffic_arrives_unharmed(kind, world):
    # Ranks of a pair are neighbours on both sides, with one channel per direction and kind; of four, the third also
    # sends to the first what it has encoded, and has gradients from there.
    channels = 2 * world * (1 if world == 2 else 2) + (2 if world == 4 else 0)
    answers = team(world).run(traffic, kind, 6, 0)
    assert sum(answers) > channels * 6 / 2


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(1, 10_000), count=st.integers(1, 12), slots=st.integers(1, 3))
def test_any_order_and_few_slots(seed, count, slots):
    team(3).run(traffic, "ipc", count, seed, slots)


def test_a_sender_never_overwrites_and_never_blocks():
    sender, receiver = team(2).run(burst, 7, 3)
    assert sender == [True] * 3 + [False] * 4
    assert receiver == [True] * 7


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_a_silent_peer_is_named_in_time(kind):
    message = team(2).run(silence, kind)[0]
    seconds, text = message.split(" ", 1)
    assert float(seconds) >= 2  # and not the hour that all else may take
    assert "channel 1->0 activations" in text
    assert "rank 1" in text


def test_a_peer_that_has_gone_is_noticed_at_once():
    assert "has gone" in team(2).run(departure)[0]


@pytest.mark.parametrize(
    ("places", "kind"),
    [
        ([Place("a", ""), Place("a", "")], "ipc"),
        ([Place("a", ""), Place("b", "")], "gloo"),
        ([Place("a", "g0"), Place("a", "g1"), Place("b", "g0")], "nccl"),
        ([Place("a", "g0")] * 4, "ipc"),
        ([Place("a", "g0"), Place("a", "g0"), Place("a", "g1")], "staging"),
        ([Place("a", "g0"), Place("b", "g0")], "nccl"),
        ([Place("a", "g0"), Place("b", "g0", blocking=True)], "staging"),
    ],
)
def test_choice(places, kind):
    assert transport_kind(places)[0] == kind


def test_shared_buffers_go_where_there_is_room(tmp_path, monkeypatch):
    full, roomy = tmp_path / "full", tmp_path / "roomy"
    full.mkdir()
    roomy.mkdir()
    reserve = os.posix_fallocate

    def limited(descriptor, offset, size):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    copies = HostCopies((str(full), str(roomy)))
    buffer, handle = copies.allocate(5000)
    assert buffer.numel() == 5000
    assert isinstance(handle, int)
    assert Path(os.readlink(f"/proc/self/fd/{handle}")).parent == roomy
    assert os.fstat(handle).st_blocks * 512 >= 5000
    with pytest.raises(OSError, match="no room for 5000 bytes"):
        HostCopies((str(full),)).allocate(5000)
    # Whoever is killed from here on leaves nothing behind, though nobody has mapped the buffer yet.
    assert not [*full.iterdir(), *roomy.iterdir()]
    again = copies.open(handle)
    buffer.fill_(7)
    assert again.tolist() == [7] * 5000
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_no_nccl_in_torch():
    assert transport_kind([Place("a", "g0"), Place("a", "g1")], nccl=False)[0] == "staging"


def test_a_system_without_shared_counters():
    assert transport_kind([Place("a", "")] * 2, shared=False)[0] == "gloo"
    assert transport_kind([Place("a", "g0")] * 2, shared=False)[0] == "staging"


def test_two_processes_of_one_host_are_at_one_place():
    assert place_of(torch.device("cpu")) == place_of(torch.device("cpu"))


def test_a_slots_old_buffer_is_let_go_behind_the_copies_from_it():
    """By the copies' own means, not with the last reference to it: torch would wait for the computation then, and tell
    the sender that the memory is free."""
    log = []

    class Copies(HostCopies):
        def open(self, handle):
            log.append("open")
            return torch.zeros(int(handle), dtype=torch.uint8)

        def let_go(self, buffers, slot):
            log.append(f"let go of {sorted(buffers)}, {slot}")
            super().let_go(buffers, slot)

    wire: Any = SimpleNamespace(channel=Channel(0, 1, False), heard=SimpleNamespace(take=lambda: None))
    link = _Incoming(wire, Copies())
    link.taken(0, b"512", b"")
    link.taken(1, b"512", b"")
    link.taken(0, b"1024")
    assert log == ["let go of [], 0", "open", "let go of [0], 1", "open", "let go of [0, 1], 0", "open"]
    assert link._buffers[0].numel() == 1024
