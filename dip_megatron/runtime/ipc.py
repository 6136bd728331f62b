"""Transport for ranks that share a GPU (or a host's memory): mailboxes that both ends map.

A channel has a few slots. The sender copies a message into a free slot and rings the slot's number; the receiver
copies it out and rings back that the slot is free. Bells ring when copies have been *given* to the device, not when
they have ended: the device orders them by interprocess events, so that neither host waits for it. A host only blocks in
``wait``, until its peer has given its copy: it looks at the bell, and sleeps in between. What a peer needs to map a
slot (once for each) travels over a Unix socket, whose end also tells that the peer has gone.

Nothing happens in the background: every call moves all channels along, as MPI libraries do. Sends never block (without
a free slot they queue up), so that a plan that passed the verifier can't hang here.
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
"""Messages of one channel that may be under way at once. More only cost memory: receivers empty a slot as soon as their
receive is posted, and plans post receives when the sender begins to compute."""

PAUSE = 5e-5
"""Seconds between two looks at a bell. What the system makes of it is about twice as long."""
LONG_WAIT, LONG_PAUSE = 0.1, 5e-4
"""After so many seconds of waiting, the pauses are longer."""

_LENGTH = struct.Struct("<I")
_HEADER = struct.Struct("<II?")


class IpcTransport:
    """See :class:`dip_megatron.runtime.transport.Transport`. All ranks must be on one host, and on one GPU if
    ``device`` is one."""

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
        """All pipeline ranks construct it at the same time. ``timeout_seconds`` bounds every wait for a peer. Raises
        TransportError if a peer can't be reached."""
        self.sees_arrivals = device.type != "cuda"  # on a GPU the host is ahead of the copies
        self._rank = rank
        self._timeout = timeout_seconds
        self._device = device
        connected = _connect(ring_channels(ranks, replicated), rank, exchange, timeout_seconds, slots)

        # Each link copies on a stream of its own: a copy that waits for a peer holds up no other channel.
        def copies() -> CudaCopies | HostCopies:
            return CudaCopies(device) if device.type == "cuda" else HostCopies()

        self._outgoing = {c: _Outgoing(w, copies(), slots) for c, w in connected.items() if c.source == rank}
        self._incoming = {c: _Incoming(w, copies()) for c, w in connected.items() if c.target == rank}

    def open(self, channels: Iterable[Channel]) -> None:
        """Nothing is left to do: all were connected when this was made."""

    def send(self, channel: Channel, tensors: Tensors) -> Transfer:
        """See Transport."""
        present = {name: t for name, t in tensors.items() if t.numel()}
        link = self._outgoing[channel]
        send = _Send(present, link.copies.computed(), self, link)
        if present:
            link.pending.append(send)
            self.progress()
        else:
            send.mark = send.computed  # both ends know from the plan that there is nothing to send
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
        """Take in what peers have sent, and begin every copy that can begin."""
        for outgoing in self._outgoing.values():
            if outgoing.pending:
                outgoing.advance()
        for incoming in self._incoming.values():
            if incoming.posted:
                incoming.advance()

    def block(self, until: Callable[[], bool], link: _Link, what: str) -> None:
        """Progress until a condition holds. Raises TransportError after the timeout, or when the peer has gone."""
        channel, began = link.channel, time.monotonic()
        peer = channel.source if channel.target == self._rank else channel.target
        self.progress()
        while not until():
            gone = link.peer_has_gone()
            self.progress()  # what it has sent before it went is there
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
        """Release buffers, sockets and bells; call it when no transfer is under way any more."""
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
    """What connects the two ends of a channel: bells in both directions, and a socket."""

    channel: Channel
    socket: socket.socket
    heard: SharedCounter
    rung: SharedCounter


class _Link(ABC):
    """One end of a channel. Numbers of slots travel by bell; with the lowest bit set, news of the slot are on the
    socket: a length and a pickled tuple, from a process of this very run. Of the news one may be a file, whose
    descriptor goes along with the length."""

    def __init__(self, wire: _Wire, copies: CudaCopies | HostCopies):
        self.channel = wire.channel
        self.copies = copies
        self._wire = wire

    def peer_has_gone(self) -> bool:
        """Whether the other end is closed. It may have sent something before."""
        try:
            return not self._wire.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End this end; the other one sees that it has gone."""
        for part in (self._wire.heard, self._wire.rung, self._wire.socket):
            part.close()

    def take(self) -> bool:
        """Take in the number of a slot, if one has arrived."""
        number = self._wire.heard.take()
        if number is None:
            return False
        self.taken(number >> 1, *(self._news() if number & 1 else ()))
        return True

    def tell(self, slot: int, *news: Handle | None) -> None:
        """Ring the number of a slot. Raises TransportError if there are news of it and the peer has gone."""
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
        """The number of a slot has arrived."""


@dataclass
class _Slot:
    """The sender's side of a slot. ``ready`` is raised by the sender, ``free`` by the receiver."""

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
        """Begin every send for which there is a slot."""
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
            # Room to grow, so that units of varying size soon find every slot large enough.
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
        """Begin every posted receive whose message is there."""
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
            with suppress(TransportError):  # a sender that has ended in order needs no slot back
                self.tell(slot, handle)


def _connect(
    channels: Sequence[Channel], rank: int, exchange: Exchange, timeout_seconds: float, slots: int
) -> dict[Channel, _Wire]:
    """Those of these channels that are this rank's, connected. The directory of the socket's path is this user's
    alone."""
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
        wire.socket.settimeout(None)  # what is read from here on has been sent before its bell rang
    return wires
