"""Nested data as bytes: what a microbatch holds, packed on one rank and unpacked on another.

Tensors of any dtype travel as they lie in memory, everything around them (dicts, lists, tuples, dataclasses, strings,
numbers, None) pickled.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

_SIZE = 8


class ParcelError(ValueError):
    """Something in the data can't travel; the message says where it is and what it is."""


def pack(data: Any) -> bytes:
    """``data`` as bytes; tensors are copied to the host. Raises ParcelError naming the path of what can't travel."""
    tensors: list[torch.Tensor] = []
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, tensors).dump(data)
    except Exception as error:
        raise ParcelError(f"{_culprit(data, 'microbatch')} can't be sent to another rank: {error}") from error
    head = buffer.getvalue()
    parts = [len(head).to_bytes(_SIZE, "little"), head]
    parts += [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t.numel()]
    return b"".join(parts)


def unpack(data: bytes, device: torch.device | None = None) -> Any:
    """Inverse of :func:`pack`; tensors that were on an accelerator come to ``device``."""
    size = int.from_bytes(data[:_SIZE], "little")
    return _Unpickler(io.BytesIO(data[_SIZE : _SIZE + size]), data, _SIZE + size, device).load()


class _Pickler(pickle.Pickler):
    """Puts tensors aside, in the order they come."""

    def __init__(self, buffer: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        if value.layout != torch.strided:
            raise ParcelError(f"a tensor of layout {value.layout}")
        kept = value.detach().to("cpu").contiguous()
        self._tensors.append(kept)
        return tuple(kept.shape), kept.dtype, value.device.type != "cpu"


class _Unpickler(pickle.Unpickler):
    """Cuts tensors from the bytes behind, in the order they were put there."""

    def __init__(self, buffer: io.BytesIO, data: bytes, place: int, device: torch.device | None):
        super().__init__(buffer)
        self._data, self._place, self._device = data, place, device

    def persistent_load(self, pid: Any) -> torch.Tensor:
        shape, dtype, accelerated = pid
        count = 1
        for length in shape:
            count *= length
        tensor = torch.empty(shape, dtype=dtype)
        if count:
            size = count * tensor.element_size()
            raw = torch.frombuffer(bytearray(self._data[self._place : self._place + size]), dtype=torch.uint8)
            tensor = raw.view(dtype).reshape(shape)
            self._place += size
        return tensor.to(self._device) if accelerated and self._device is not None else tensor


def _culprit(data: Any, path: str) -> str:
    """Path and type of the innermost thing that can't be packed by itself."""
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
