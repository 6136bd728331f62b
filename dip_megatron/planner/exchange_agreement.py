"""What replicas tell one another before microbatches change places, and what follows from it: pure, the same for all.

Every replica's first rank quotes its coming microbatches. From all quotes each works out the same proposal; then they
tell each other the proposal's hash and how much time each has left, and from these whether anybody moves at all.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.graph import Floats
from .balance import GOAL, Assignment, Mode, Places, Work, assign, lines
from .coupled_balance import CoupledWork, assign_coupled
from .resample import Resampling, SampleWork, resample

LEAST_GAIN = 0.005
"""Share of the job's time that an exchange has to gain, or nobody moves anything."""
ROUND_SECONDS = 0.002
BYTE_SECONDS = 1e-9
"""What a round of an exchange costs, and a byte on the busiest replica, until it has been measured."""

DATA_ENDED = "the data of a replica has ended"
TOO_LITTLE = "there is too little to gain"
TOO_LATE = "the numbers of a replica came late"
TOO_DEAR = "moving microbatches would take longer than it gains"
UNEQUAL = "replicas that share experts have unequally many microbatches"
TOO_LARGE = "a microbatch that would have to move is too large"
DIFFERENT = "replicas came to different assignments"


@dataclass(frozen=True, eq=False)
class SampleQuote:
    """The samples of one replica's coming microbatches, one after the other: ``seconds`` and ``held`` ``[S, P]`` that
    their microbatch is worth more with than without them, ``tokens`` and ``sizes`` (bytes to send) ``[S]``, and
    ``counts`` ``[M]``, how many each microbatch has. ``length``: the most tokens that the loop packs."""

    seconds: Floats
    held: Floats
    tokens: Places
    sizes: Places
    counts: Places
    length: int


@dataclass(frozen=True, eq=False)
class Quote:
    """One replica's coming microbatches: ``seconds`` and ``held`` (bytes of activations) ``[M, P]``, and ``sizes``
    ``[M]``, the bytes to send if one moves. ``slowness``: what its exchanges took over what was expected of them.
    ``meeting`` ``[M, P]``: of the seconds, those in which it waits for replicas that share its experts. ``samples``:
    what the microbatches are made of, where samples may move, too."""

    seconds: Floats
    held: Floats
    sizes: NDArray[np.int64]
    slowness: float = 1.0
    meeting: Floats | None = None
    samples: SampleQuote | None = None


class Move(NamedTuple):
    """Microbatch (or sample) ``number``, counted over all replicas, in their order, goes from ``source`` to
    ``target``."""

    number: int
    source: int
    target: int


@dataclass(frozen=True, eq=False)
class SampleMoves:
    """Samples change microbatches, once these are where they shall be trained. ``before`` and ``after`` ``[S]``: the
    microbatch of each sample; ``replica`` ``[M]``: who trains each microbatch."""

    before: Places
    after: Places
    replica: Places

    @property
    def moved(self) -> NDArray[np.bool_]:
        """Which samples do, ``[S]``."""
        return np.asarray(self.before != self.after)

    def digest(self) -> str:
        """Equal for equal moves."""
        return hashlib.sha256(self.after.astype(np.int64).tobytes()).hexdigest()

    def rounds(self) -> list[list[Move]]:
        """As those of :class:`Proposal`, of samples. One that comes back to its replica, into another microbatch, isn't
        among them."""
        source, target = self.replica[self.before], self.replica[self.after]
        return rounds([Move(int(s), int(source[s]), int(target[s])) for s in np.flatnonzero(source != target)])

    def split(self, replica: int) -> dict[int, list[int]]:
        """Numbers of the samples of each microbatch that a replica has to take apart, as they are before."""
        return {m: [int(s) for s in np.flatnonzero(self.before == m)] for m in self._touched(replica)}

    def packed(self, replica: int) -> dict[int, list[int]]:
        """The same afterwards: those that stay keep their order, and those that come take the places of those that
        leave."""
        order = lines(self.before, self.after, len(self.replica))
        return {m: order[m] for m in self._touched(replica)}

    def _touched(self, replica: int) -> list[int]:
        touched = np.union1d(self.before[self.moved], self.after[self.moved])
        return [int(m) for m in touched if self.replica[m] == replica]


@dataclass(frozen=True, eq=False)
class Proposal:
    """What is going to happen: an assignment, or None and the ``reason`` why nobody moves. ``before`` and ``after``:
    the slowest replica's seconds over the mean, as they are and as proposed. ``counts``: how many microbatches each
    replica has. ``gain_seconds``: what the job's iteration is expected to gain; ``nominal_seconds``: what moving takes
    where it has not been measured, ``slowness`` times as long where it has."""

    assignment: Assignment | None
    counts: tuple[int, ...]
    before: float = 1.0
    after: float = 1.0
    reason: str = ""
    gain_seconds: float = 0.0
    nominal_seconds: float = 0.0
    slowness: float = 1.0
    samples: SampleMoves | None = None

    def declined(self, reason: str) -> Proposal:
        """The same, with nobody moving."""
        return replace(self, assignment=None, samples=None, after=self.before, reason=reason, gain_seconds=0.0)

    def digest(self) -> str:
        """Equal for equal proposals. Hosts whose processors add up in other orders may differ in the last bits of what
        is gained, and would then decide differently whether it pays."""
        if self.assignment is None:
            return self.reason
        worth = [number.hex() for number in (self.gain_seconds, self.nominal_seconds, self.slowness)]
        return " ".join([self.assignment.digest(), "" if self.samples is None else self.samples.digest(), *worth])

    @property
    def _owner(self) -> Places:
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def line(self, replica: int) -> list[int] | None:
        """Numbers of the microbatches that a replica trains, in its order; None if nobody moves."""
        if self.assignment is None:
            return None
        return lines(self._owner, self.assignment.replica, len(self.counts))[replica]

    def rounds(self) -> list[list[Move]]:
        """The moves, in an order in which a replica sends at most one microbatch a round, and receives at most one."""
        if self.assignment is None:
            return []
        owner, to = self._owner, self.assignment.replica
        return rounds([Move(int(m), int(owner[m]), int(to[m])) for m in np.flatnonzero(owner != to)])


class Answer(NamedTuple):
    """What each replica says to a proposal: the hash of its own, and the seconds it has ``left`` until its running
    iteration is over (0 if none runs); ``late``: there were some, and waiting for the quotes of others took them."""

    digest: str
    left: float
    late: bool

    def pack(self) -> bytes:
        """For :meth:`unpack`."""
        return pickle.dumps(tuple(self))

    @staticmethod
    def unpack(data: bytes) -> Answer:
        """Inverse of :meth:`pack`."""
        return Answer(*pickle.loads(data))


@dataclass(frozen=True)
class ExchangeReport:
    """One exchange. ``before`` and ``after``: the slowest replica's predicted seconds over the mean. ``moved``:
    microbatches that changed replicas, in all; ``sent_bytes``: by this rank; ``seconds``: the exchange took here,
    waiting for others included; ``stall_seconds``: of these, training waited. ``reason``: why nobody moved anything,
    or empty. ``declined``: exchanges since the start of the run in which nobody did. ``samples``: that changed
    microbatches, in all."""

    before: float
    after: float
    moved: int
    sent_bytes: int
    seconds: float
    reason: str = ""
    stall_seconds: float = 0.0
    declined: int = 0
    samples: int = 0


def propose(
    quotes: Sequence[Quote | None], mode: Mode = "swap", largest: float = np.inf, group: int = 1
) -> Proposal:  # fmt: skip
    """From everybody's quotes, in the order of replicas (None: its data has ended). Microbatches of more than
    ``largest`` bytes stay where they are. ``group`` replicas after one another share experts: what those of a group
    train should be alike, slot by slot, rather than the same in all."""
    given = [quote for quote in quotes if quote is not None]
    if len(given) < len(quotes):
        return Proposal(None, (), reason=DATA_ENDED)
    counts = tuple(len(quote.seconds) for quote in given)
    sizes = np.concatenate([quote.sizes for quote in given])
    owner = np.repeat(np.arange(len(given)), counts)
    found: Assignment
    again: tuple[SampleMoves, Resampling] | None = None
    if group > 1:
        if len(set(counts)) > 1:
            return Proposal(None, counts, reason=UNEQUAL)
        seconds, meeting = np.concatenate([q.seconds for q in given]), np.concatenate([_meeting(q) for q in given])
        found = assign_coupled(CoupledWork(meeting, np.maximum(seconds - meeting, 0.0), owner, len(given), group))
        if (found.moved & (sizes > largest)).any():
            return Proposal(None, counts, reason=TOO_LARGE)
    else:
        held = np.concatenate([quote.held for quote in given])
        work = Work(np.concatenate([q.seconds for q in given]), held, owner, len(given), sizes > largest)
        found = assigned = assign(work, mode)
        again = _resampled([quote.samples for quote in given], work, assigned, largest)
    after = found.after if again is None else again[1].after
    proposal = Proposal(
        found, counts, _spread(found.before), _spread(after), "", float(found.before.max() - after.max())
    )  # fmt: skip
    moved = found.moved.any() or again is not None
    if not moved or proposal.gain_seconds < LEAST_GAIN * found.before.max():
        return proposal.declined(TOO_LITTLE)
    sent = _sent(owner, found.replica, sizes, len(given))
    number = len(proposal.rounds())
    if again is not None:
        proposal = replace(proposal, samples=again[0])
        moves, bytes_of = again[0], np.concatenate([quote.samples.sizes for quote in given if quote.samples])
        sent += _sent(moves.replica[moves.before], moves.replica[moves.after], bytes_of, len(given))
        number += len(moves.rounds())
    return replace(
        proposal, gain_seconds=_rounded(proposal.gain_seconds),
        nominal_seconds=_rounded(ROUND_SECONDS * number + BYTE_SECONDS * sent),
        slowness=max(quote.slowness for quote in given),
    )  # fmt: skip


def _rounded(seconds: float) -> float:
    """To six digits, which all hosts agree on but for once in a blue moon."""
    return float(f"{seconds:.5e}")


def _sent(before: Places, after: Places, sizes: Places, replicas: int) -> float:
    """Bytes on the busiest replica, one way."""
    moved = before != after
    return float(max(np.bincount(end[moved], sizes[moved], replicas).max() for end in (before, after)))


def _resampled(
    quotes: Sequence[SampleQuote | None], work: Work, found: Assignment, largest: float
) -> tuple[SampleMoves, Resampling] | None:
    """What moving samples adds to an exchange of whole microbatches: nothing where those end together already, or a
    replica can't take its own apart."""
    given = [quote for quote in quotes if quote is not None]
    if len(given) < len(quotes) or found.after.max(initial=0.0) <= GOAL * found.after.mean():
        return None
    counts = np.concatenate([quote.counts for quote in given])
    microbatch = np.repeat(np.arange(len(counts)), counts)
    tokens, sizes = (np.concatenate([getattr(q, name) for q in given]) for name in ("tokens", "sizes"))
    length = min(quote.length for quote in given)
    room = length - np.bincount(microbatch, tokens, len(counts)).astype(np.int64)
    samples = SampleWork(
        np.concatenate([quote.seconds for quote in given]), np.concatenate([quote.held for quote in given]),
        tokens, microbatch, (sizes > largest) | (counts[microbatch] < 2), room,
    )  # fmt: skip
    again = resample(samples, work, found.replica)
    if again.after.max() > found.after.max() * (1 - LEAST_GAIN):
        return None
    return SampleMoves(microbatch, again.microbatch, found.replica), again


def _meeting(quote: Quote) -> Floats:
    return np.zeros_like(quote.seconds) if quote.meeting is None else quote.meeting


def settle(proposal: Proposal, answers: Sequence[Answer]) -> Proposal:
    """The proposal, unless replicas came to different ones, or it would cost more than it gains: what of the exchange
    the replica with the least time left can't do while it trains, all wait for."""
    if len({answer.digest for answer in answers}) > 1:
        return proposal.declined(DIFFERENT)
    if proposal.assignment is None:
        return proposal
    waited = proposal.nominal_seconds * proposal.slowness - min(answer.left for answer in answers)
    if waited > proposal.gain_seconds:
        return proposal.declined(TOO_LATE if any(answer.late for answer in answers) else TOO_DEAR)
    return proposal


def rounds(moves: Sequence[Move]) -> list[list[Move]]:
    """Each round takes the first moves, in their order, of which no two share a source or a target."""
    left, out = list(moves), []
    while left:
        sources: set[int] = set()
        targets: set[int] = set()
        chosen, rest = [], []
        for move in left:
            if move.source in sources or move.target in targets:
                rest.append(move)
            else:
                chosen.append(move)
                sources.add(move.source)
                targets.add(move.target)
        out.append(chosen)
        left = rest
    return out


def _spread(seconds: Floats) -> float:
    """Slowest over mean."""
    return float(seconds.max() / seconds.mean()) if seconds.max(initial=0.0) > 0 else 1.0
