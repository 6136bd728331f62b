"""Numbers rung in one process arrive in another, all of them, in order, with what was written before they rang."""

from __future__ import annotations

import socket

import pytest

from dip_megatron.runtime.shared_counters import receive_counters, send_counters
from tests.forked import context
from tests.patience import LONG

MOST = 3


def test_numbers_arrive_in_order_and_none_twice():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        rung = send_counters(ours, b"head", 2, MOST)
        head, heard = receive_counters(theirs, 4, 2, MOST)
        assert head == b"head"
        for a, b in zip(rung, heard, strict=True):
            assert b.take() is None
            for round_ in range(5):
                sent = [10 * round_ + i for i in range(MOST)]
                for number in sent:
                    a.ring(number)
                assert [b.take() for _ in range(MOST + 1)] == [*sent, None]
        rung[0].ring(2**64 - 1)
        assert heard[1].take() is None
        assert heard[0].take() == 2**64 - 1
        for bell in (*rung, *heard):
            bell.close()


def _answer(connection: socket.socket, count: int) -> None:
    _, (heard, rung) = receive_counters(connection, 1, 2, MOST)
    for _ in range(count):
        while (number := heard.take()) is None:
            pass
        rung.ring(number + 1)


def test_two_processes():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    other = context().Process(target=_answer, args=(theirs, 2000))  # no fork of this process, which has threads
    other.start()
    with ours, theirs:
        rung, heard = send_counters(ours, b"x", 2, MOST)
        under_way, sent = 0, 0
        answers: list[int] = []
        while len(answers) < 2000:
            if under_way < MOST and sent < 2000:
                rung.ring(sent)
                sent, under_way = sent + 1, under_way + 1
            if (number := heard.take()) is not None:
                answers.append(number)
                under_way -= 1
        assert answers == list(range(1, 2001))
    other.join(LONG)
    assert other.exitcode == 0


def test_a_peer_that_has_gone_sends_no_bells():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.close()
    with theirs, pytest.raises(ConnectionError):
        receive_counters(theirs, 4, 2, MOST)
