"""Keeps activations of single layers in host memory between their forward and their backward.

What autograd saves inside an offloaded layer is copied to pinned host memory on a side stream after the layer's
forward, and copied back before the layer's backward: the last layer during the operation before its backward, each
other layer when the layer after it starts its backward. Without a GPU these are plain copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..compat.tensors import storage_id, version

_LEAST_BYTES = {"cuda": 1 << 16, "cpu": 1 << 10}
"""Tensors below this size, in bytes, stay on the device: copying them would cost more than they occupy."""


class HostCopy:
    """A storage, or one tensor's part of a large storage, in host memory. ``uses`` counts how often it will still be
    read."""

    __slots__ = ("device", "event", "host", "on_device", "uses")

    def __init__(self, source: torch.Tensor, stream: Any, uses: int = 0):
        """Start copying ``source`` to the host on the side stream ``stream``; None copies at once (no GPU)."""
        self.device = source.device
        self.event: Any = None
        self.on_device: torch.Tensor | None = None
        self.uses = uses
        if stream is None:
            self.host = source.clone()
            return
        self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            self.host.copy_(source, non_blocking=True)
        source.record_stream(stream)  # The allocator reuses its memory only after the copy; the host needn't wait.

    def fetch(self, stream: Any) -> None:
        """Start copying back to the device."""
        if self.on_device is not None:
            return
        if stream is None:
            self.on_device = self.host.clone()
            return
        # The buffer is allocated on the computing stream, so the copy must not start before that stream gets here.
        self.on_device = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.on_device.copy_(self.host, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        self.on_device.record_stream(stream)

    def take(self, stream: Any) -> torch.Tensor:
        """Return the tensor on its device, for one of its uses."""
        self.fetch(stream)
        tensor = self.on_device
        assert tensor is not None
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)
        self.uses -= 1
        if self.uses <= 0:
            self.on_device = self.event = None
        return tensor


class _Saved:
    """What autograd keeps in place of an offloaded tensor."""

    __slots__ = ("copy", "layer", "offset", "shape", "strides")

    def __init__(self, copy: HostCopy, layer: int, shape: torch.Size, strides: tuple[int, ...], offset: int):
        self.copy, self.layer, self.shape, self.strides, self.offset = copy, layer, shape, strides, offset


class OffloadedActivations:
    """The offloaded layers of one (unit, segment), from its forward to the end of its backward."""

    def __init__(self, stream: Any = None):
        """Create an empty store whose copies run on the side stream ``stream``; None without a GPU."""
        self.stream = stream
        self.shared: set[int] = set()
        """Ids of storages that offloaded layers use but don't own, such as parameters."""
        self._layers: dict[int, list[HostCopy]] = {}
        self._kept: set[int] = set()
        self._whole: set[int] = set()

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(c.host.untyped_storage().nbytes() for copies in self._layers.values() for c in copies)

    @contextmanager
    def layer(self, index: int, keep: Iterable[torch.Tensor]) -> Iterator[None]:
        """Within this context, move what autograd saves for a layer to host memory.

        Args:
            index: Index of the layer in its chunk.
            keep: Tensors to leave on the device: parameters, and inputs that all layers share.
        """
        kept = self._kept = {storage_id(t.untyped_storage()) for t in keep}
        self.shared |= kept
        known: dict[tuple[int, ...], tuple[StorageWeakRef, HostCopy]] = {}
        copies: list[HostCopy] = []
        self._layers[index] = copies
        copied: set[int] = set()
        self._whole = copied

        def pack(tensor: torch.Tensor) -> Any:
            storage = tensor.untyped_storage()
            place, size = storage_id(storage), tensor.numel() * tensor.element_size()
            if place in kept or size < _LEAST_BYTES.get(tensor.device.type, 0) or tensor.layout != torch.strided:
                return tensor
            # Views that share a storage (q, k and v) are copied once; a small part of a large storage is copied alone.
            whole = 4 * size >= storage.nbytes() and storage.nbytes() % tensor.element_size() == 0
            key = (place, version(tensor), tensor.element_size())
            if not whole:
                key = (*key, tensor.storage_offset(), *tensor.shape, *tensor.stride())
            found = known.get(key)
            # The storage may have been freed and its address reused by another tensor.
            if found is None or found[0].expired():
                source = tensor.detach()
                if whole:
                    source = source.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
                found = known[key] = (StorageWeakRef(storage), HostCopy(source, self.stream))
                copies.append(found[1])
                if whole:
                    copied.add(place)
            found[1].uses += 1
            if whole:
                return _Saved(found[1], index, tensor.shape, tensor.stride(), tensor.storage_offset())
            return _Saved(found[1], index, tensor.shape, (), 0)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def keep(self, tensor: torch.Tensor) -> None:
        """Leave a tensor of the current layer on the device, because the code that saves it drops and recomputes it
        anyway."""
        self._kept.add(storage_id(tensor.untyped_storage()))

    def release(self, tensor: torch.Tensor) -> None:
        """Free the storage of a tensor of the current layer if all of it has been copied. Nothing may read it before it
        is copied back.

        Needed because autograd holds the inputs of a checkpoint, leaves of a separate graph, even if hooks save them
        elsewhere.
        """
        if storage_id(tensor.untyped_storage()) in self._whole:
            tensor.untyped_storage().resize_(0)

    def prefetch(self) -> None:
        """Start copying back the last layer, whose backward runs first."""
        if self._layers:
            for copy in self._layers[max(self._layers)]:
                copy.fetch(self.stream)

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if self._layers.pop(saved.layer, None) is not None:
            # This is the layer's first tensor: start copying back the layer before it, which is needed next.
            self.prefetch()
        tensor = saved.copy.take(self.stream)
        return tensor.as_strided(saved.shape, saved.strides, saved.offset) if saved.strides else tensor
