"""Memory that several processes map, and the order of copies into and out of it.

There are two kinds with the same interface: buffers on a GPU, exported by CUDA IPC and ordered by interprocess events
on a separate stream; and buffers in host memory, where every copy has completed when its call returns.
"""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..core import Payload

ALIGNMENT = 512
"""Alignment of tensors in a slot, in bytes; more than any copy kernel requires."""

Layout = Sequence[tuple[torch.dtype, tuple[int, ...]]]
Handle = bytes | int
"""With this another process maps a buffer. It is either bytes or a file descriptor. A descriptor is sent over a Unix
socket and belongs to whoever holds it: the sender closes it after sending, and :meth:`HostCopies.open` closes it."""


class Mark(Protocol):
    """A point in the order of the copies."""

    def done(self) -> bool:
        """Whether all copies before this point have completed."""
        ...


def room(size: int) -> int:
    """Return the bytes of a slot that a tensor of ``size`` bytes occupies, including padding."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def slot_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of a slot that holds these tensors."""
    return sum(room(tensor.nbytes) for tensor in tensors.values())


def slot_size_of(payload: Payload) -> int:
    """Return the bytes of a slot that holds tensors with these specifications."""
    return sum(room(math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize) for spec in payload)


def parts(buffer: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """Return the tensors of a slot as views of ``buffer``."""
    views, start = [], 0
    for dtype, shape in layout:
        size = math.prod(shape) * dtype.itemsize
        views.append(buffer[start : start + size].view(dtype).view(shape))
        start += room(size)
    return views


class _Done:
    def done(self) -> bool:
        return True


_DONE = _Done()


class HostCopies:
    """Shared host memory. A copy has completed when its call returns, so no signals are needed.

    Bytes are moved without torch. Between two operations, when the operation's data fills the caches, the four torch
    calls that make a view and copy it take longer than the copy.

    Buffers are unlinked files: nothing is left of them when the processes end or are killed.
    """

    def __init__(self, folders: Sequence[str] = ("/dev/shm", tempfile.gettempdir())) -> None:
        """Use the first of ``folders`` with enough room for the files of buffers."""
        self._folders = [folder for folder in folders if os.path.isdir(folder)]

    def allocate(self, size: int) -> tuple[torch.Tensor, Handle]:
        """Return a shared uint8 buffer of ``size`` bytes, and the handle with which another process maps it."""
        descriptor = self._reserve(size)
        return _mapped(descriptor, size), descriptor

    def _reserve(self, size: int) -> int:
        """Create a file whose bytes are allocated. Containers often limit /dev/shm to 64 MB, and writing to a mapped
        page that can't be allocated kills the process. Raises OSError if no folder has room."""
        for folder in self._folders:
            descriptor, path = tempfile.mkstemp(prefix="dip-", dir=folder)
            os.unlink(path)
            try:
                os.posix_fallocate(descriptor, 0, size)
                return descriptor
            except OSError as error:
                os.close(descriptor)
                if folder == self._folders[-1]:
                    raise OSError(error.errno, f"{error.strerror}: no room for {size} bytes that ranks of "
                                  "one host share", folder) from error  # fmt: skip
        raise FileNotFoundError(
            "no folder for what ranks of one host share: /dev/shm and the temporary one are missing"
        )

    def open(self, handle: Handle) -> torch.Tensor:
        """Map another process's buffer."""
        assert isinstance(handle, int)
        try:
            return _mapped(handle, os.fstat(handle).st_size)
        finally:
            os.close(handle)

    def let_go(self, buffers: dict[int, torch.Tensor], slot: int) -> None:
        """Remove the buffer ``slot`` from ``buffers``, if present, once copies from it have completed, so that the
        process that allocated it may free it."""
        buffers.pop(slot, None)

    def new_signal(self) -> tuple[Any, bytes]:
        """Return a signal that this process raises, and the handle with which another process opens it."""
        return None, b""

    def open_signal(self, handle: bytes) -> Any:
        return None

    def raise_signal(self, signal: Any) -> None:
        """Raise the signal once all copies issued so far have completed."""

    def await_signal(self, signal: Any) -> None:
        """Make later copies wait for the last time the signal was raised. The host doesn't wait."""

    def computed(self) -> Mark:
        """Return a mark behind all work that has been issued to the computation so far."""
        return _DONE

    def store(self, buffer: torch.Tensor, tensors: Mapping[str, torch.Tensor], computed: Mark) -> Mark:
        """Copy ``tensors`` into ``buffer`` once ``computed`` is done. They may be freed as soon as this returns."""
        place = buffer.data_ptr()
        for tensor in tensors.values():
            # The bytes of a lazily negated or conjugated view differ from its values.
            dense = tensor.clone() if tensor.is_neg() or tensor.is_conj() else tensor.contiguous()
            size = dense.nbytes
            ctypes.memmove(place, dense.data_ptr(), size)
            place += room(size)
        return _DONE

    def load(self, payload: Payload, buffer: torch.Tensor) -> tuple[dict[str, torch.Tensor], Mark]:
        """Copy tensors with the specifications of ``payload`` from ``buffer`` into new tensors."""
        place, found = buffer.data_ptr(), {}
        for spec in payload:
            tensor = found[spec.name] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
            size = tensor.nbytes
            ctypes.memmove(tensor.data_ptr(), place, size)
            place += room(size)
        return found, _DONE

    def hand_over(self, tensors: Mapping[str, torch.Tensor], mark: Mark) -> None:
        """Make the computation wait for ``mark``, after which it may use ``tensors``. The host doesn't wait."""

    def close(self) -> None:
        """Do nothing: all copies have completed."""


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)


class _EventMark:
    def __init__(self, event: Any):
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())


class CudaCopies:
    """Buffers on one GPU, exported by CUDA IPC. Copies run on a separate stream of higher priority than the
    computation.

    The methods are those of :class:`HostCopies`. Signals are interprocess events, recorded on the copies' stream.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    def allocate(self, size: int) -> tuple[torch.Tensor, Handle]:
        from torch.multiprocessing.reductions import reduce_tensor

        # Only the copy stream writes the buffer. torch frees it once no other process maps it any more.
        with torch.cuda.stream(self._stream):
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return buffer, pickle.dumps(reduce_tensor(buffer))

    def open(self, handle: Handle) -> torch.Tensor:
        assert isinstance(handle, bytes)
        rebuild, arguments = pickle.loads(handle)
        with torch.cuda.stream(self._stream):
            buffer: torch.Tensor = rebuild(*arguments)
        return buffer

    def let_go(self, buffers: dict[int, torch.Tensor], slot: int) -> None:
        # torch waits for the current stream before it tells the other process that the memory is free.
        with torch.cuda.stream(self._stream):
            buffers.pop(slot, None)

    def new_signal(self) -> tuple[Any, bytes]:
        event = torch.cuda.Event(enable_timing=False, interprocess=True)
        with torch.cuda.device(self._device):
            event.record(self._stream)  # Creates the event on this device.
        return event, bytes(event.ipc_handle())

    def open_signal(self, handle: bytes) -> Any:
        return torch.cuda.Event.from_ipc_handle(self._device, handle)

    def raise_signal(self, signal: Any) -> None:
        signal.record(self._stream)

    def await_signal(self, signal: Any) -> None:
        self._stream.wait_event(signal)

    def computed(self) -> Mark:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return _EventMark(event)

    def store(self, buffer: torch.Tensor, tensors: Mapping[str, torch.Tensor], computed: Mark) -> Mark:
        assert isinstance(computed, _EventMark)
        self._stream.wait_event(computed.event)
        with torch.cuda.stream(self._stream):
            layout = [(t.dtype, tuple(t.shape)) for t in tensors.values()]
            for view, tensor in zip(parts(buffer, layout), tensors.values(), strict=True):
                view.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
        return self._mark()

    def load(self, payload: Payload, buffer: torch.Tensor) -> tuple[dict[str, torch.Tensor], Mark]:
        # New tensors come from the copy stream's memory pool. Blocks of the computation's pool may still be in use by
        # kernels issued earlier, and waiting for those would remove the overlap.
        with torch.cuda.stream(self._stream):
            views = parts(buffer, [(getattr(torch, spec.dtype), spec.shape) for spec in payload])
            tensors = {spec.name: view.clone() for spec, view in zip(payload, views, strict=True)}
        return tensors, self._mark()

    def hand_over(self, tensors: Mapping[str, torch.Tensor], mark: Mark) -> None:
        assert isinstance(mark, _EventMark)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(mark.event)
        for tensor in tensors.values():
            tensor.record_stream(stream)

    def close(self) -> None:
        """Wait for the last copies, because peers may still be reading the buffers."""
        self._stream.synchronize()

    def _mark(self) -> _EventMark:
        event = torch.cuda.Event()
        event.record(self._stream)
        return _EventMark(event)
