"""Point-to-point transport: asynchronous, one ordered stream per (neighbour, direction, kind of payload).

Every channel of a plan has a process group of its own, so that nothing relies on tags (NCCL ignores them) and a slow
gradient never holds up an activation. Within a channel, sends and receives are begun in the order of the plan.

NCCL makes a channel's connection with its first message, and there each end's host waits for the other one. Within a
plan, where a rank posts a receive and has a stage to compute and to send before its peer sends, two hosts would wait
for each other. So all channels of a plan are opened before it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..core import Channel, Payload
from .groups import local_group

Tensors = dict[str, torch.Tensor]


class TransportError(RuntimeError):
    """A transfer that failed or did not end in time; the message names the channel and the peer's global rank."""


class Transfer(Protocol):
    """One begun end of a message."""

    def wait(self) -> Tensors:
        """The tensors, once they may be used. Raises TransportError."""
        ...

    def done(self) -> bool:
        """Whether ``wait`` is known to return at once."""
        ...


class Transport(Protocol):
    """How payloads travel between the pipeline ranks of one replica."""

    @property
    def sees_arrivals(self) -> bool:
        """Whether ``done`` of a receive says when the message is there, before anyone waits for it."""
        ...

    def open(self, channels: Iterable[Channel]) -> None:
        """Connect this rank's ends of ``channels``, if they aren't yet, before messages travel there. Waits for the
        other ends: all ranks of a plan come here with their channels of it."""
        ...

    def send(self, channel: Channel, tensors: Tensors) -> Transfer:
        """Begin to send; the tensors must not be written to before the transfer is done."""
        ...

    def receive(self, channel: Channel, payload: Payload) -> Transfer:
        """Begin to receive into buffers of the payload's shapes and dtypes."""
        ...


def ring_channels(ranks: int, replicated: bool = False) -> list[Channel]:
    """All channels a plan over ``ranks`` ranks can use: both neighbours of the ring, both kinds of payload.

    Reversed segments run against the ring, so each kind travels both ways. With ``replicated`` modules every rank also
    sends what it has encoded to the first, and has gradients from there.
    """
    channels = set()
    for r in range(ranks):
        for gradient in (False, True):
            for peer in ((r + 1) % ranks, (r - 1) % ranks):
                if peer != r:
                    channels.add(Channel(r, peer, gradient))
    if replicated:
        channels |= {c for r in range(1, ranks) for c in (Channel(r, 0, False), Channel(0, r, True))}
    return sorted(channels)


BLOCKS = 8
"""Most blocks of threads that NCCL may use for a message: enough for a link, few enough that all that may wait at once
(:func:`blocks_of_messages`) leave most of a device to what they wait for."""
_BLOCKS_AT_ONCE = 64


def blocks_of_messages(channels: Iterable[Channel]) -> int:
    """How many blocks of threads a message may use where each of ``channels`` has one that waits. A block of NCCL's
    takes about all of a multiprocessor, of which a device has some hundred."""
    ends = Counter(rank for channel in channels for rank in (channel.source, channel.target))
    return max(1, min(BLOCKS, _BLOCKS_AT_ONCE // max(ends.values(), default=1)))


@dataclass
class _Works:
    """Works of one message's tensors."""

    tensors: Tensors
    works: list[Any]
    channel: Channel
    peer: int
    timeout: timedelta
    on_device: bool
    finished: bool = False

    def wait(self) -> Tensors:
        if not self.finished:
            for work in self.works:
                try:
                    # NCCL's wait only orders streams; its own watchdog bounds it. Gloo's blocks, so it is bounded here.
                    work.wait() if self.on_device else work.wait(self.timeout)
                except RuntimeError as error:
                    raise TransportError(
                        f"channel {self.channel} with global rank {self.peer}: {_first_line(error)}"
                    ) from error
            self.finished = True
        return self.tensors

    def done(self) -> bool:
        return self.finished or (self.on_device and all(work.is_completed() for work in self.works))


class DistributedTransport:
    """``torch.distributed`` point-to-point: NCCL for tensors on a GPU, gloo for tensors on the CPU."""

    sees_arrivals = False

    def __init__(
        self, global_ranks: list[int], rank: int, device: torch.device, timeout_seconds: float, replicated: bool = False
    ):
        """``global_ranks[p]`` is the global rank of pipeline rank p; ``rank`` is this process's pipeline rank;
        ``replicated`` see :func:`ring_channels`."""
        self._timeout = timedelta(seconds=timeout_seconds)
        self._device = device
        self._rank = rank
        channels = ring_channels(len(global_ranks), replicated)
        self._peers = {channel: global_ranks[channel.target if channel.source == rank else channel.source]
                       for channel in channels if rank in (channel.source, channel.target)}  # fmt: skip
        self._global_rank = global_ranks[rank]
        self._blocks = blocks_of_messages(channels)
        self._groups: dict[Channel, Any] = {}

    def open(self, channels: Iterable[Channel]) -> None:
        """See Transport. All ranks open theirs in one order, so that some two of them always are at the same one."""
        for channel in sorted(set(channels) - self._groups.keys()):
            peer = self._peers[channel]
            try:
                self._groups[channel] = local_group(
                    [self._global_rank, peer], "nccl" if self._device.type == "cuda" else "gloo", self._timeout,
                    self._device, self._blocks,
                )  # fmt: skip
            except RuntimeError as error:
                raise TransportError(f"channel {channel} with global rank {peer}: {_first_line(error)}") from error
            # NCCL connects the ends of a direction with the first message.
            begin = dist.isend if channel.source == self._rank else dist.irecv
            self._begin(begin, channel, {"": torch.zeros(1, device=self._device)}).wait()

    def send(self, channel: Channel, tensors: Tensors) -> Transfer:
        return self._begin(dist.isend, channel, {k: t.contiguous() for k, t in tensors.items()})

    def receive(self, channel: Channel, payload: Payload) -> Transfer:
        buffers = {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
            for spec in payload
        }
        return self._begin(dist.irecv, channel, buffers)

    def _begin(self, operation: Callable[..., Any], channel: Channel, tensors: Tensors) -> Transfer:
        peer = self._peers[channel]
        try:
            # Zero elements are not sent: both ends know from the plan that there is nothing to send.
            works = [operation(t, peer, group=self._groups[channel]) for t in tensors.values() if t.numel()]
        except RuntimeError as error:
            raise TransportError(f"channel {channel} with global rank {peer}: {_first_line(error)}") from error
        return _Works(tensors, works, channel, peer, self._timeout, self._device.type == "cuda")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
