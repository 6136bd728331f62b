"""Transport for ranks that share a GPU or a host's memory, through buffers that both processes map.

A channel has a few slots. The sender copies a message into a free slot and passes the slot's number to the receiver
through a shared counter. The receiver copies the message out and passes the number back. Numbers are passed when copies
have been *issued* to the device, not when they have completed: interprocess events order them on the device, so that no
host waits for a copy. A host only blocks in ``wait``, until its peer has issued its copy: it polls the counter and
sleeps in between. The handles with which a peer maps a slot (once for each slot) are sent over a Unix socket, which
also shows when the peer has exited.

There are no background threads: every call advances all channels, as MPI libraries do. Sends never block (without a
free slot they are queued), so a plan that has passed the verifier can't deadlock here.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Channel, Payload
from ..core.protocols import Exchange
from .shared_counters import SharedCounter, receive_counters, send_counters
from .sharing import CudaCopies, Handle, HostCopies, Mark, slot_size, slot_size_of
from .transport import Tensors, Transfer, TransportError, ring_channels

SLOTS = 4
"""Messages of one channel that may be in transit at once. More only cost memory: receivers empty a slot as soon as
their receive is posted, and plans post receives when the sender starts to compute."""

PAUSE = 5e-5
"""Seconds of sleep between two polls of a counter. The system typically sleeps about twice as long."""
LONG_WAIT, LONG_PAUSE = 0.1, 5e-4
"""After ``LONG_WAIT`` seconds of waiting, the sleeps are ``LONG_PAUSE`` seconds."""

_LENGTH = struct.Struct("<I")
_HEADER = struct.Struct("<II?")


class IpcTransport:
    """See :class:`dip_megatron.runtime.transport.Transport`. All ranks must be on one host, and on one GPU if
    ``device`` is a GPU."""

    def __init__(
        self,
        ranks: int,
        rank: int,
        device: torch.device,
        exchange: Exchange,
        timeout_seconds: float,
        slots: int = SLOTS,
        replicated: bool = False,
    ):
        """Connect this rank to its neighbours. All pipeline ranks construct it at the same time.

        Args:
            ranks: Number of pipeline ranks.
            rank: This process's pipeline rank.
            device: Device of the tensors.
            exchange: Gathers data among the pipeline's ranks.
            timeout_seconds: Bound on every wait for a peer.
            slots: Slots of each channel.
            replicated: Whether the model has modules that are replicated on every rank.

        Raises:
            TransportError: If a peer can't be reached.
        """
        self.sees_arrivals = device.type != "cuda"  # On a GPU the host runs ahead of the copies.
        self._rank = rank
        self._timeout = timeout_seconds
        self._device = device
        connected = _connect(ring_channels(ranks, replicated), rank, exchange, timeout_seconds, slots)

        # Each link has its own copy stream, so that a copy that waits for a peer delays no other channel.
        def copies() -> CudaCopies | HostCopies:
            return CudaCopies(device) if device.type == "cuda" else HostCopies()

        self._outgoing = {c: _Outgoing(w, copies(), slots) for c, w in connected.items() if c.source == rank}
        self._incoming = {c: _Incoming(w, copies()) for c, w in connected.items() if c.target == rank}

    def open(self, channels: Iterable[Channel]) -> None:
        """Do nothing: all channels were connected on construction."""

    def send(self, channel: Channel, tensors: Tensors) -> Transfer:
        """See Transport."""
        present = {name: t for name, t in tensors.items() if t.numel()}
        link = self._outgoing[channel]
        send = _Send(present, link.copies.computed(), self, link)
        if present:
            link.pending.append(send)
            self.progress()
        else:
            send.mark = send.computed  # Both ends know from the plan that there is nothing to send.
        return send

    def receive(self, channel: Channel, payload: Payload) -> Transfer:
        """See Transport."""
        present = tuple(spec for spec in payload if 0 not in spec.shape)
        link = self._incoming[channel]
        receive = _Receive(payload, present, self, link, self._device)
        if present:
            link.posted.append(receive)
        else:
            receive.tensors = {}
        self.progress()
        return receive

    def progress(self) -> None:
        """Process what peers have sent, and start every copy that can start."""
        for outgoing in self._outgoing.values():
            if outgoing.pending:
                outgoing.advance()
        for incoming in self._incoming.values():
            if incoming.posted:
                incoming.advance()

    def block(self, until: Callable[[], bool], link: _Link, what: str) -> None:
        """Call :meth:`progress` until ``until()`` holds. Raises TransportError after the timeout, or if the peer has
        exited."""
        channel, began = link.channel, time.monotonic()
        peer = channel.source if channel.target == self._rank else channel.target
        self.progress()
        while not until():
            gone = link.peer_has_gone()
            self.progress()  # The peer may have sent something before it exited.
            if until():
                return
            if gone:
                raise TransportError(f"channel {channel} with pipeline rank {peer}: the peer has gone; {what}")
            waited = time.monotonic() - began
            if waited >= self._timeout:
                raise TransportError(
                    f"channel {channel} with pipeline rank {peer}: {what} for {self._timeout:.0f} s; see where that "
                    "rank stands, or raise timeout_seconds"
                )
            time.sleep(PAUSE if waited < LONG_WAIT else LONG_PAUSE)
            self.progress()

    def close(self) -> None:
        """Release buffers, sockets and counters. No transfer may be in progress."""
        for link in (*self._outgoing.values(), *self._incoming.values()):
            link.copies.close()
            link.close()
        self._outgoing, self._incoming = {}, {}


@dataclass(eq=False)
class _Send:
    tensors: Tensors | None
    computed: Mark
    transport: IpcTransport
    link: _Link
    mark: Mark | None = None

    def wait(self) -> Tensors:
        self.transport.block(lambda: self.mark is not None, self.link, "no slot came back")
        assert self.mark is not None
        self.link.copies.hand_over({}, self.mark)
        return {}

    def done(self) -> bool:
        if self.mark is None:
            self.transport.progress()
        return self.mark is not None and self.mark.done()


@dataclass(eq=False)
class _Receive:
    payload: Payload
    present: Payload
    transport: IpcTransport
    link: _Link
    device: torch.device
    tensors: Tensors | None = None
    mark: Mark | None = None

    def wait(self) -> Tensors:
        if self.tensors is None:
            self.transport.block(lambda: self.tensors is not None, self.link, "nothing came")
        assert self.tensors is not None
        if self.mark is not None:
            self.link.copies.hand_over(self.tensors, self.mark)
        if self.present == self.payload:
            return self.tensors
        return {
            spec.name: self.tensors[spec.name]
            if spec.name in self.tensors
            else torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in self.payload
        }

    def done(self) -> bool:
        if self.tensors is None:
            self.transport.progress()
        return self.tensors is not None and (self.mark is None or self.mark.done())


@dataclass
class _Wire:
    """The connection between the two ends of a channel: a counter in each direction, and a socket."""

    channel: Channel
    socket: socket.socket
    heard: SharedCounter
    rung: SharedCounter


class _Link(ABC):
    """One end of a channel. Slot numbers are passed through counters, shifted left by one bit.

    If the lowest bit is set, the socket carries handles of that slot: a length and a pickled tuple, from a process of
    the same run. One of the handles may be a file descriptor, which is sent along with the length.
    """

    def __init__(self, wire: _Wire, copies: CudaCopies | HostCopies):
        self.channel = wire.channel
        self.copies = copies
        self._wire = wire

    def peer_has_gone(self) -> bool:
        """Whether the peer has closed its end. It may have sent something before."""
        try:
            return not self._wire.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close this end; the peer can see that."""
        for part in (self._wire.heard, self._wire.rung, self._wire.socket):
            part.close()

    def take(self) -> bool:
        """Process the number of one slot, if one has arrived, and return whether it had."""
        number = self._wire.heard.take()
        if number is None:
            return False
        self.taken(number >> 1, *(self._news() if number & 1 else ()))
        return True

    def tell(self, slot: int, *news: Handle | None) -> None:
        """Pass the number of a slot to the peer, with handles if there are any. Raises TransportError if there are and
        the peer has exited."""
        known = all(part is None for part in news)
        if not known:
            data = pickle.dumps(news)
            head = _LENGTH.pack(len(data))
            files = [part for part in news if isinstance(part, int)]
            try:
                if files:
                    socket.send_fds(self._wire.socket, [head], files)
                    head = b""
                self._wire.socket.sendall(head + data)
            except OSError as error:
                raise TransportError(f"channel {self.channel}: the peer has gone ({error})") from error
            finally:
                for descriptor in files:
                    os.close(descriptor)
        self._wire.rung.ring(slot << 1 | (not known))

    def _news(self) -> tuple[Handle | None, ...]:
        try:
            head, files, _, _ = socket.recv_fds(self._wire.socket, _LENGTH.size, 1, socket.MSG_WAITALL)
            news = pickle.loads(self._exactly(_LENGTH.unpack(head)[0]))
        except (OSError, struct.error) as error:
            raise TransportError(f"channel {self.channel}: the peer has gone ({error})") from error
        return tuple(files.pop() if isinstance(part, int) else part for part in news)

    def _exactly(self, size: int) -> bytes:
        data = self._wire.socket.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise ConnectionError("in the middle of a message")
        return data

    @abstractmethod
    def taken(self, slot: int, *news: Handle | None) -> None:
        """Handle the arrival of a slot number, with the handles that came with it."""


@dataclass
class _Slot:
    """The sender's side of a slot. The sender raises ``ready``, the receiver raises ``free``."""

    ready: Any
    ready_handle: bytes
    free: Any = None
    buffer: torch.Tensor | None = None


class _Outgoing(_Link):
    def __init__(self, wire: _Wire, copies: CudaCopies | HostCopies, slots: int):
        super().__init__(wire, copies)
        self.pending: deque[_Send] = deque()
        self._slots: list[_Slot] = []
        self._most = slots
        self._free: deque[int] = deque()

    def taken(self, slot: int, free_handle: bytes | None = None) -> None:  # type: ignore[override]
        if free_handle is not None:
            self._slots[slot].free = self.copies.open_signal(free_handle)
        self._free.append(slot)

    def advance(self) -> None:
        """Start every send for which there is a slot."""
        while self.take():
            pass
        while self.pending:
            if not self._free:
                if len(self._slots) == self._most:
                    return
                self._slots.append(_Slot(*self.copies.new_signal()))
                self._free.append(len(self._slots) - 1)
            self._begin(self.pending.popleft(), self._free.popleft())

    def _begin(self, send: _Send, index: int) -> None:
        assert send.tensors is not None
        slot, handle, ready_handle = self._slots[index], None, None
        size = slot_size(send.tensors)
        if slot.buffer is None:
            ready_handle = slot.ready_handle
        if slot.buffer is None or slot.buffer.numel() < size:
            # Allocate more than needed, so that slots soon fit units of all sizes.
            slot.buffer, handle = self.copies.allocate(size + size // 8)
        if slot.free is not None:
            self.copies.await_signal(slot.free)
        send.mark = self.copies.store(slot.buffer, send.tensors, send.computed)
        send.tensors = None
        self.copies.raise_signal(slot.ready)
        self.tell(index, handle, ready_handle)


class _Incoming(_Link):
    def __init__(self, wire: _Wire, copies: CudaCopies | HostCopies):
        super().__init__(wire, copies)
        self.posted: deque[_Receive] = deque()
        self._arrived: deque[int] = deque()
        self._buffers: dict[int, torch.Tensor] = {}
        self._ready: dict[int, Any] = {}
        self._freed: dict[int, Any] = {}

    def taken(  # type: ignore[override]
        self, slot: int, handle: Handle | None = None, ready_handle: bytes | None = None
    ) -> None:
        if handle is not None:
            self.copies.let_go(self._buffers, slot)
            self._buffers[slot] = self.copies.open(handle)
        if ready_handle is not None:
            self._ready[slot] = self.copies.open_signal(ready_handle)
        self._arrived.append(slot)

    def advance(self) -> None:
        """Start every posted receive whose message has arrived."""
        while self.posted and (self._arrived or self.take()):
            receive, slot = self.posted.popleft(), self._arrived.popleft()
            size = slot_size_of(receive.present)
            if size > self._buffers[slot].numel():
                raise TransportError(
                    f"channel {self.channel}: a message of {size} bytes is expected, the sender's slot has "
                    f"{self._buffers[slot].numel()}; the ranks' plans differ"
                )
            self.copies.await_signal(self._ready[slot])
            receive.tensors, receive.mark = self.copies.load(receive.present, self._buffers[slot])
            handle = None
            if slot not in self._freed:
                self._freed[slot], handle = self.copies.new_signal()
            self.copies.raise_signal(self._freed[slot])
            with suppress(TransportError):  # A sender that has exited normally needs no slot back.
                self.tell(slot, handle)


def _connect(
    channels: Sequence[Channel], rank: int, exchange: Exchange, timeout_seconds: float, slots: int
) -> dict[Channel, _Wire]:
    """Connect those of these channels that end at this rank. The socket is in a directory that only this user can
    access."""
    mine = [c for c in channels if rank in (c.source, c.target)]
    wires: dict[Channel, _Wire] = {}
    with tempfile.TemporaryDirectory(prefix="dip-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(folder, "inbox")
        listener.bind(path)
        listener.listen(len(mine))
        listener.settimeout(timeout_seconds)
        paths = [p.decode() for p in exchange.gather(path.encode())]
        try:
            for channel in mine:
                if channel.source == rank:
                    connection = socket.socket(socket.AF_UNIX)
                    connection.settimeout(timeout_seconds)
                    connection.connect(paths[channel.target])
                    head = _HEADER.pack(channel.source, channel.target, channel.gradient)
                    filled, freed = send_counters(connection, head, 2, slots)
                    wires[channel] = _Wire(channel, connection, freed, filled)
            for _ in range(len(mine) - len(wires)):
                connection, _ = listener.accept()
                connection.settimeout(timeout_seconds)
                head, (filled, freed) = receive_counters(connection, _HEADER.size, 2, slots)
                channel = Channel(*_HEADER.unpack(head))
                wires[channel] = _Wire(channel, connection, filled, freed)
        except (OSError, struct.error) as error:
            raise TransportError(f"pipeline rank {rank} can't reach its neighbours on this host: {error}") from error
    for wire in wires.values():
        wire.socket.settimeout(None)  # From here on, data is on the socket before the counter announces it.
    return wires
