"""Transport for ranks that share a GPU (or a host's memory): mailboxes that both ends map.

A channel has a few slots. The sender copies a message into a free slot and sends a token over a Unix socket; the
receiver copies it out and sends the slot back. Tokens travel when copies have been *given* to the device, not when they
have ended: the device orders them by interprocess events, so that neither host waits for it. A host only blocks in
``wait``, on the socket, until its peer has given its copy; then it sleeps.

Nothing happens in the background: every call moves all channels along, as MPI libraries do. Sends never block (without
a free slot they queue up), so that a plan that passed the verifier can't hang here.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Channel, Payload
from ..core.protocols import Exchange
from .sharing import CudaCopies, HostCopies, Mark, layout_of, layout_of_payload, offsets
from .transport import Tensors, Transfer, TransportError, ring_channels

SLOTS = 4
"""Messages of one channel that may be under way at once. More only cost memory: receivers empty a slot as soon as their
receive is posted, and plans post receives when the sender begins to compute."""

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
    ):
        """All pipeline ranks construct it at the same time. ``timeout_seconds`` bounds every wait for a peer. Raises
        TransportError if a peer can't be reached."""
        self.sees_arrivals = device.type != "cuda"  # on a GPU the host is ahead of the copies
        self._rank = rank
        self._timeout = timeout_seconds
        self._device = device
        self._poll = select.poll()
        self._links: dict[int, _Link] = {}
        sockets = _connect(ranks, rank, exchange, timeout_seconds)

        # Each link copies on a stream of its own: a copy that waits for a peer holds up no other channel.
        def copies() -> CudaCopies | HostCopies:
            return CudaCopies(device) if device.type == "cuda" else HostCopies()

        self._outgoing = {c: _Outgoing(c, s, copies(), slots) for c, s in sockets.items() if c.source == rank}
        self._incoming = {c: _Incoming(c, s, copies()) for c, s in sockets.items() if c.target == rank}
        for link in (*self._outgoing.values(), *self._incoming.values()):
            self._links[link.socket.fileno()] = link
            self._poll.register(link.socket, select.POLLIN)

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
        self._read(0.0)

    def block(self, until: Callable[[], bool], link: _Link, what: str) -> None:
        """Progress until a condition holds. Raises TransportError after the timeout, or when the peer has gone."""
        deadline = time.monotonic() + self._timeout
        channel = link.channel
        peer = channel.source if channel.target == self._rank else channel.target
        self.progress()
        while not until():
            if link.closed:
                raise TransportError(f"channel {channel} with pipeline rank {peer}: the peer has gone; {what}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransportError(
                    f"channel {channel} with pipeline rank {peer}: {what} for {self._timeout:.0f} s; see where that "
                    "rank stands, or raise timeout_seconds"
                )
            self._read(left)

    def close(self) -> None:
        """Release buffers and sockets; call it when no transfer is under way any more."""
        for link in self._links.values():
            link.copies.close()
            link.socket.close()
        self._links, self._poll = {}, select.poll()

    def _read(self, seconds: float) -> None:
        for descriptor, _ in self._poll.poll(seconds * 1000.0):
            link = self._links[descriptor]
            link.read()
            if link.closed:
                self._poll.unregister(descriptor)
        for outgoing in self._outgoing.values():
            outgoing.advance()
        for incoming in self._incoming.values():
            incoming.advance()


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
        self.transport.block(lambda: self.tensors is not None, self.link, "nothing came")
        assert self.tensors is not None
        if self.mark is not None:
            self.link.copies.hand_over(self.tensors, self.mark)
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


class _Link(ABC):
    """One end of a channel's socket: frames of a length and a pickled tuple, from a process of this very run."""

    def __init__(self, channel: Channel, connection: socket.socket, copies: CudaCopies | HostCopies):
        self.channel = channel
        self.socket = connection
        self.closed = False
        self.copies = copies
        self._bytes = bytearray()

    def read(self) -> None:
        """Take in what has arrived; the socket must be readable."""
        try:
            data = self.socket.recv(1 << 16)
        except (ConnectionError, OSError):
            data = b""
        if not data:
            self.closed = True
            return
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._bytes)[0]
            if len(self._bytes) < end:
                break
            self.take(*pickle.loads(self._bytes[_LENGTH.size : end]))
            del self._bytes[:end]

    def write(self, *token: Any) -> None:
        """Send a token. Raises TransportError if the peer has gone."""
        data = pickle.dumps(token)
        try:
            self.socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            self.closed = True
            raise TransportError(f"channel {self.channel}: the peer has gone ({error})") from error

    @abstractmethod
    def take(self, *token: Any) -> None:
        """A token has arrived."""


@dataclass
class _Slot:
    """The sender's side of a slot. ``ready`` is raised by the sender, ``free`` by the receiver."""

    ready: Any
    ready_handle: bytes
    free: Any = None
    buffer: torch.Tensor | None = None


class _Outgoing(_Link):
    def __init__(self, channel: Channel, connection: socket.socket, copies: CudaCopies | HostCopies, slots: int):
        super().__init__(channel, connection, copies)
        self.pending: deque[_Send] = deque()
        self._slots: list[_Slot] = []
        self._most = slots
        self._free: deque[int] = deque()

    def take(self, slot: int, free_handle: bytes | None) -> None:  # type: ignore[override]
        if free_handle is not None:
            self._slots[slot].free = self.copies.open_signal(free_handle)
        self._free.append(slot)

    def advance(self) -> None:
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
        size = offsets(layout_of(send.tensors))[1]
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
        self.write(index, handle, ready_handle)


class _Incoming(_Link):
    def __init__(self, channel: Channel, connection: socket.socket, copies: CudaCopies | HostCopies):
        super().__init__(channel, connection, copies)
        self.posted: deque[_Receive] = deque()
        self._arrived: deque[int] = deque()
        self._buffers: dict[int, torch.Tensor] = {}
        self._ready: dict[int, Any] = {}
        self._freed: dict[int, Any] = {}

    def take(self, slot: int, handle: bytes | None, ready_handle: bytes | None) -> None:  # type: ignore[override]
        if handle is not None:
            self._buffers[slot] = self.copies.open(handle)
        if ready_handle is not None:
            self._ready[slot] = self.copies.open_signal(ready_handle)
        self._arrived.append(slot)

    def advance(self) -> None:
        while self.posted and self._arrived:
            receive, slot = self.posted.popleft(), self._arrived.popleft()
            size = offsets(layout_of_payload(receive.present))[1]
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
                self.write(slot, handle)


def _connect(ranks: int, rank: int, exchange: Exchange, timeout_seconds: float) -> dict[Channel, socket.socket]:
    """One connected socket per channel of this rank. The directory of the socket's path is this user's alone."""
    mine = [c for c in ring_channels(ranks) if rank in (c.source, c.target)]
    sockets: dict[Channel, socket.socket] = {}
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
                    connection.sendall(_HEADER.pack(channel.source, channel.target, channel.gradient))
                    sockets[channel] = connection
            for _ in range(len(mine) - len(sockets)):
                connection, _ = listener.accept()
                connection.settimeout(timeout_seconds)
                header = connection.recv(_HEADER.size, socket.MSG_WAITALL)
                sockets[Channel(*_HEADER.unpack(header))] = connection
        except (OSError, struct.error) as error:
            raise TransportError(f"pipeline rank {rank} can't reach its neighbours on this host: {error}") from error
    return sockets
