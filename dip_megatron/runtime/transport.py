"""Asynchronous point-to-point messages, in one ordered stream per (neighbour, direction, kind of payload).

Each channel of a plan has its own process group. Nothing then relies on tags, which NCCL ignores, and a late gradient
doesn't delay an activation. Within a channel, sends and receives are started in the order of the plan.

NCCL connects the two ends of a channel with its first message, and each host then waits for the other. Within a plan a
rank may post a receive and still have to compute and send something before its peer sends, so that two hosts could wait
for each other. Therefore all channels of a plan are opened before it runs.
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
    """A transfer failed or timed out; the message names the channel and the peer's global rank."""


class Transfer(Protocol):
    """A send or receive in progress."""

    def wait(self) -> Tensors:
        """Return the tensors once they may be used. Raises TransportError."""
        ...

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        ...


class Transport(Protocol):
    """Carries payloads between the pipeline ranks of one replica."""

    @property
    def sees_arrivals(self) -> bool:
        """Whether ``done`` of a receive tells that the message has arrived before anyone waits for it."""
        ...

    def open(self, channels: Iterable[Channel]) -> None:
        """Connect this rank's ends of ``channels`` unless they are connected already. Waits for the other ends, so all
        ranks of a plan must call it with their channels of that plan."""
        ...

    def send(self, channel: Channel, tensors: Tensors) -> Transfer:
        """Start to send. The tensors must not be modified before the transfer is done."""
        ...

    def receive(self, channel: Channel, payload: Payload) -> Transfer:
        """Start to receive into new buffers with the payload's shapes and dtypes."""
        ...


def ring_channels(ranks: int, replicated: bool = False) -> list[Channel]:
    """Return all channels that a plan over ``ranks`` pipeline ranks can use: to both neighbours in the ring, for both
    kinds of payload.

    Reversed segments run against the ring, so each kind travels in both directions. With ``replicated`` modules every
    rank also sends its encoder outputs to the first rank and receives gradients from it.
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
"""Most thread blocks that NCCL may use for a message: enough for one link, and few enough that all messages that may
wait at once (:func:`blocks_of_messages`) leave most of the device to the computation they wait for."""
_BLOCKS_AT_ONCE = 64


def blocks_of_messages(channels: Iterable[Channel]) -> int:
    """Return how many thread blocks a message may use if one message waits on each of ``channels``. An NCCL block
    occupies about one multiprocessor, of which a device has roughly a hundred."""
    ends = Counter(rank for channel in channels for rank in (channel.source, channel.target))
    return max(1, min(BLOCKS, _BLOCKS_AT_ONCE // max(ends.values(), default=1)))


@dataclass
class _Works:
    """The ``torch.distributed`` works of one message's tensors."""

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
                    # NCCL's wait only orders streams, and NCCL's watchdog bounds it. Gloo's wait blocks.
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
    """Point-to-point messages of ``torch.distributed``: NCCL for tensors on a GPU, gloo for tensors on the CPU."""

    sees_arrivals = False

    def __init__(
        self, global_ranks: list[int], rank: int, device: torch.device, timeout_seconds: float, replicated: bool = False
    ):
        """Create the transport of one pipeline rank.

        Args:
            global_ranks: Global rank of each pipeline rank.
            rank: This process's pipeline rank.
            device: Device of the tensors.
            timeout_seconds: Bound on every wait.
            replicated: Whether the model has replicated modules; see :func:`ring_channels`.
        """
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
        """See Transport. All ranks open their channels in the same order, so that two of them always are at the same
        one."""
        for channel in sorted(set(channels) - self._groups.keys()):
            peer = self._peers[channel]
            try:
                self._groups[channel] = local_group(
                    [self._global_rank, peer], "nccl" if self._device.type == "cuda" else "gloo", self._timeout,
                    self._device, self._blocks,
                )  # fmt: skip
            except RuntimeError as error:
                raise TransportError(f"channel {channel} with global rank {peer}: {_first_line(error)}") from error
            # NCCL connects the ends with the first message in a direction.
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
            # Empty tensors are not sent. Both ends know their shapes from the plan.
            works = [operation(t, peer, group=self._groups[channel]) for t in tensors.values() if t.numel()]
        except RuntimeError as error:
            raise TransportError(f"channel {channel} with global rank {peer}: {_first_line(error)}") from error
        return _Works(tensors, works, channel, peer, self._timeout, self._device.type == "cuda")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
