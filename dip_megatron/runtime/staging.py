"""Transport through host memory: gloo between processes, with pinned buffers. Slow, but works everywhere.

It serves GPU ranks that can use neither NCCL (because two of them share a device) nor shared device memory. Each
channel has its own process group and thread. The thread waits for copies and for gloo, so that the caller doesn't wait
before ``wait``.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..core import Channel, Payload
from .groups import local_group
from .transport import Tensors, Transfer, TransportError, ring_channels


class StagingTransport:
    """See :class:`dip_megatron.runtime.transport.Transport`."""

    sees_arrivals = False

    def __init__(
        self, global_ranks: list[int], rank: int, device: torch.device, timeout_seconds: float, replicated: bool = False
    ):
        """Take the arguments of :class:`DistributedTransport`. All pipeline ranks construct it at the same time."""
        self._timeout = timeout_seconds
        self._links: dict[Channel, _Link] = {}
        for channel in ring_channels(len(global_ranks), replicated):
            if rank in (channel.source, channel.target):
                peer = global_ranks[channel.target if channel.source == rank else channel.source]
                group = local_group([global_ranks[rank], peer], "gloo", timedelta(seconds=timeout_seconds))
                self._links[channel] = _Link(channel, group, peer, device, timeout_seconds)

    def open(self, channels: Iterable[Channel]) -> None:
        """Do nothing: all channels were connected on construction."""

    def send(self, channel: Channel, tensors: Tensors) -> Transfer:
        """See Transport."""
        link = self._links[channel]
        present = {name: t for name, t in tensors.items() if t.numel()}
        return _Staged(link, link.thread.submit(link.send, present, link.computed()))

    def receive(self, channel: Channel, payload: Payload) -> Transfer:
        """See Transport."""
        link = self._links[channel]
        return _Staged(link, link.thread.submit(link.receive, payload))

    def close(self) -> None:
        """End the threads. No transfer may be in progress."""
        for link in self._links.values():
            link.thread.shutdown(wait=False, cancel_futures=True)


class _Link:
    """One end of a channel. ``send`` and ``receive`` run in its thread, in the order of the plan."""

    def __init__(self, channel: Channel, group: Any, peer: int, device: torch.device, timeout_seconds: float):
        self.channel, self.peer, self.timeout = channel, peer, timeout_seconds
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"dip-{channel.source}-{channel.target}")
        self._group = group
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def computed(self) -> Any:
        """Return an event behind all work issued to the computation so far; None on the CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def send(self, tensors: Tensors, computed: Any) -> tuple[Tensors, Any]:
        host = [t.contiguous() for t in tensors.values()] if self._stream is None else self._to_host(tensors, computed)
        for tensor in host:
            dist.isend(tensor, self.peer, group=self._group).wait(timedelta(seconds=self.timeout))
        return {}, None

    def receive(self, payload: Payload) -> tuple[Tensors, Any]:
        pinned = self._stream is not None
        host = {s.name: torch.empty(s.shape, dtype=getattr(torch, s.dtype), pin_memory=pinned) for s in payload}
        for tensor in host.values():
            if tensor.numel():
                dist.irecv(tensor, self.peer, group=self._group).wait(timedelta(seconds=self.timeout))
        if self._stream is None:
            return host, None
        with torch.cuda.stream(self._stream):
            tensors = {name: t.to(self._device, non_blocking=True) for name, t in host.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        return tensors, event

    def _to_host(self, tensors: Tensors, computed: Any) -> list[torch.Tensor]:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            host = []
            for tensor in tensors.values():
                host.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
                host[-1].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        event.synchronize()
        return host

    def hand_over(self, tensors: Tensors, event: Any) -> None:
        """Make the computation wait for the copies to the device. The host doesn't wait."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors.values():
            tensor.record_stream(stream)


@dataclass(eq=False)
class _Staged:
    link: _Link
    future: Future[tuple[Tensors, Any]]

    def wait(self) -> Tensors:
        try:
            tensors, event = self.future.result(self.link.timeout)
        except (RuntimeError, WaitTimeout) as error:
            reason = (str(error).splitlines() or ["no end in sight"])[0]
            raise TransportError(
                f"channel {self.link.channel} with global rank {self.link.peer}: {reason or type(error).__name__}"
            ) from error
        if event is not None:
            self.link.hand_over(tensors, event)
        return tensors

    def done(self) -> bool:
        return self.future.done()
