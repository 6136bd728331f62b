"""Point-to-point transport: asynchronous, one ordered stream per (neighbour, direction, kind of payload).

Every channel of a plan has a process group of its own, so that nothing relies on tags (NCCL ignores them) and a slow
gradient never holds up an activation. Within a channel, sends and receives are begun in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
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
                        f"channel {self.channel} with global rank {self.peer}: {str(error).splitlines()[0]}"
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
        ``replicated`` see :func:`ring_channels`. Both ends of every channel must construct their transports at the same
        time."""
        self._timeout = timedelta(seconds=timeout_seconds)
        self._device = device
        self._peers = {channel: global_ranks[channel.target if channel.source == rank else channel.source]
                       for channel in ring_channels(len(global_ranks), replicated)}  # fmt: skip
        self._groups: dict[Channel, Any] = {}
        for channel in self._peers:
            if rank in (channel.source, channel.target):
                self._groups[channel] = local_group(
                    [global_ranks[channel.source], global_ranks[channel.target]],
                    "nccl" if device.type == "cuda" else "gloo",
                    self._timeout,
                )

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
            raise TransportError(f"channel {channel} with global rank {peer}: {str(error).splitlines()[0]}") from error
        return _Works(tensors, works, channel, peer, self._timeout, self._device.type == "cuda")
