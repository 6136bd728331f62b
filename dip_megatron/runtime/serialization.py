"""Serializes nested data, such as a microbatch, into one tensor of bytes to send to another rank.

Tensors of any dtype are copied as they are in memory; everything around them (dicts, lists, tuples, dataclasses,
strings, numbers, None) is pickled. The result is called a parcel: a head with the pickled part, followed by the
tensors.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import torch

_ALIGNED = 16
"""Alignment of tensors in a parcel, in bytes, so that views of any dtype can be made where they arrive."""


class SerializationError(ValueError):
    """Part of the data can't be serialized; the message says where it is and what it is."""


def serialized_bytes(data: Any) -> int:
    """Return the size of a parcel of ``data`` in bytes. Raises SerializationError as :func:`pack` does."""
    head, tensors = _taken_apart(data)
    return _places(head, tensors)[-1]


def tensors_of(data: Any) -> list[torch.Tensor]:
    """Return all tensors in ``data``. Raises SerializationError as :func:`pack` does."""
    return _taken_apart(data)[1]


def pack(data: Any, pinned: bool = False) -> torch.Tensor:
    """Serialize ``data`` into a parcel on the host.

    Args:
        data: Nested data.
        pinned: Whether to allocate the parcel in pinned memory. Copies from a GPU may then still be in progress on its
            current stream when this returns.

    Raises:
        SerializationError: If part of the data can't be serialized; the message has its path.
    """
    head, tensors = _taken_apart(data)
    places = _places(head, tensors)
    parcel = torch.empty(places[-1], dtype=torch.uint8, pin_memory=pinned)
    parcel[:8].view(torch.int64)[0] = len(head)
    parcel[8 : 8 + len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=False):
        if tensor.numel():
            room = parcel[place : place + tensor.numel() * tensor.element_size()].view(tensor.dtype)
            room.view(tensor.shape).copy_(tensor, non_blocking=True)
    return parcel


def unpack(parcel: torch.Tensor, device: torch.device | None = None) -> Any:
    """Deserialize a parcel. Tensors that were on the host share the parcel's memory; those that were on an accelerator
    are copied to ``device`` on its current stream."""
    size = int(parcel[:8].view(torch.int64)[0])
    head = parcel[8 : 8 + size].numpy().tobytes()
    return _Unpickler(io.BytesIO(head), parcel, _aligned(8 + size), device).load()


def _taken_apart(data: Any) -> tuple[bytes, list[torch.Tensor]]:
    tensors: list[torch.Tensor] = []
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, tensors).dump(data)
    except Exception as error:
        raise SerializationError(f"{_culprit(data, 'microbatch')} can't be sent to another rank: {error}") from error
    return buffer.getvalue(), tensors


def _places(head: bytes, tensors: list[torch.Tensor]) -> list[int]:
    """Return where each tensor begins in the parcel, and where the last one ends, in bytes."""
    places = [_aligned(8 + len(head))]
    for tensor in tensors:
        places.append(_aligned(places[-1] + tensor.numel() * tensor.element_size()))
    return places


def _aligned(place: int) -> int:
    return -(-place // _ALIGNED) * _ALIGNED


class _Pickler(pickle.Pickler):
    """Collects the tensors in the data instead of pickling them."""

    def __init__(self, buffer: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        if value.layout != torch.strided:
            raise SerializationError(f"a tensor of layout {value.layout}")
        if value.is_quantized or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise SerializationError(f"a tensor of type {type(value).__name__}")
        self._tensors.append(value.detach())
        return tuple(value.shape), value.dtype, value.device.type != "cpu"


class _Unpickler(pickle.Unpickler):
    """Reads the tensors from the bytes behind the head, in the order in which they were collected."""

    def __init__(self, head: io.BytesIO, parcel: torch.Tensor, place: int, device: torch.device | None):
        super().__init__(head)
        self._parcel, self._place, self._device = parcel, place, device

    def persistent_load(self, pid: Any) -> torch.Tensor:
        shape, dtype, accelerated = pid
        size = math.prod(shape) * dtype.itemsize
        tensor = self._parcel[self._place : self._place + size].view(dtype).view(shape)
        self._place = _aligned(self._place + size)
        if not accelerated or self._device is None:
            return tensor
        there = tensor.to(self._device, non_blocking=True)
        if there.is_cuda:
            # The computation on the default stream will use it, and then free it.
            there.record_stream(torch.cuda.default_stream(there.device))
        return there


def _culprit(data: Any, path: str) -> str:
    """Return the path and type of the innermost object that can't be pickled."""
    inner: list[tuple[str, Any]] = []
    if isinstance(data, dict):
        inner = [(f"{path}[{key!r}]", value) for key, value in data.items()]
    elif isinstance(data, list | tuple):
        inner = [(f"{path}[{i}]", value) for i, value in enumerate(data)]
    elif hasattr(data, "__dict__"):
        inner = [(f"{path}.{name}", value) for name, value in vars(data).items()]
    for place, value in inner:
        try:
            _Pickler(io.BytesIO(), []).dump(value)
        except Exception:
            return _culprit(value, place)
    return f"{path} ({type(data).__name__})"
