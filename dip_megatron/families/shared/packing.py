"""Sequences of different lengths one after the other in one tensor, each attending to itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ...runtime.protocol import MicrobatchInputs


@dataclass
class PackedLengths(PackedSeqParams):
    """Megatron's parameters of packed sequences (``thd``), with the lengths also on the host, so that a loop over them
    waits for no device. ``cross`` packs the same queries with what a second attention reads. Where context-parallel
    ranks share the sequences, queries are those of this rank, keys whole sequences."""

    lengths_q: tuple[int, ...] = ()
    lengths_kv: tuple[int, ...] = ()
    cross: PackedLengths | None = None


def pack(
    lengths: Sequence[int], device: torch.device, condition: Sequence[int] | None = None,
    here: Sequence[int] | None = None,
) -> PackedLengths:  # fmt: skip
    """Sequences of these lengths; with ``condition`` also its lengths, sequence by sequence, for cross attention;
    ``here``: how many rows of each a context-parallel rank has (None: all)."""
    own = tuple(lengths) if here is None else tuple(here)
    packed = _packed(own, tuple(lengths), device)
    if condition is not None:
        packed.cross = _packed(own, tuple(condition), device)
    return packed


def _packed(queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> PackedLengths:
    # From pinned memory: else the host would wait until the device has done all it was given.
    pinned = device.type == "cuda"
    ends = [
        torch.tensor([0, *accumulate(x)], dtype=torch.int32, pin_memory=pinned).to(device, non_blocking=True)
        for x in (queries, keys)
    ]
    return PackedLengths(
        qkv_format="thd", cu_seqlens_q=ends[0], cu_seqlens_kv=ends[1], max_seqlen_q=max(queries),
        max_seqlen_kv=max(keys), lengths_q=queries, lengths_kv=keys,
    )  # fmt: skip


def lengths_of(packed: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the packed queries, and of the keys and values that each sees."""
    if isinstance(packed, PackedLengths):
        return packed.lengths_q, packed.lengths_kv
    ends = packed.cu_seqlens_q, packed.cu_seqlens_kv
    queries, keys = (tuple((e[1:] - e[:-1]).tolist()) for e in ends)
    return queries, keys


def shares_of(packed: Any, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each packed sequence, how many rows a context-parallel rank has, what stands behind the sequence included, and
    how long the whole one is. Raises ValueError for a sequence that can't be shared."""
    if isinstance(packed, PackedLengths):
        return packed.lengths_q, packed.lengths_kv
    lengths = lengths_of(packed)[1]
    bounds = packed.cu_seqlens_q_padded
    padded = lengths if bounds is None else tuple(bounds.diff().tolist())
    if any(n % (2 * ranks) for n in padded):
        raise ValueError(
            f"packed sequences of {padded} tokens can't be shared by {ranks} context-parallel ranks; pad each to a "
            f"multiple of {2 * ranks} (cu_seqlens_q_padded)"
        )
    return tuple(n // ranks for n in padded), lengths


def packed_lengths(parameters: Any, total: int) -> tuple[int, ...]:
    """Lengths of the samples packed into one sequence of ``total`` positions, padding between and after them included.

    Raises ValueError if ``parameters`` (Megatron's PackedSeqParams) say otherwise.
    """
    bounds = _bounds(parameters)
    lengths = [int(n) for n in bounds.diff() if n > 0]
    rest = total - sum(lengths)
    if rest < 0:
        raise ValueError(f"packed_seq_params end at position {sum(lengths)}, the packed sequence has {total} positions")
    return (*lengths, rest) if rest else tuple(lengths)


def fills(parameters: Any, total: int) -> bool:
    """Whether the samples' last position, padding included, is the last of ``total``."""
    return int(_bounds(parameters)[-1]) == total


def _bounds(parameters: Any) -> torch.Tensor:
    padded: torch.Tensor | None = parameters.cu_seqlens_q_padded
    bounds: torch.Tensor = parameters.cu_seqlens_q
    return bounds if padded is None else padded


def shared_ends(inputs: MicrobatchInputs) -> Any:
    """Of a microbatch, where samples begin and end in its packed sequence, for ranks without a batch; None if it isn't
    packed."""
    packed = inputs.arguments.get("packed_seq_params")
    return None if packed is None else _moved(packed, torch.device("cpu"))


def complete_ends(inputs: MicrobatchInputs, shared: Any) -> None:
    """On a rank without a batch, attention within each packed sample as everywhere else; ``shared`` is what
    :func:`shared_ends` found on the first rank."""
    if shared is not None and inputs.arguments.get("input_ids") is None:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        inputs.arguments["packed_seq_params"] = _moved(shared, device)


def _moved(packed: PackedSeqParams, device: torch.device) -> PackedSeqParams:
    """A copy with its tensors on ``device``, and without process groups."""
    values = {field.name: getattr(packed, field.name) for field in fields(PackedSeqParams) if field.init}
    plain = {name: value for name, value in values.items() if isinstance(value, (torch.Tensor, int, str))}
    return PackedSeqParams(
        **{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in plain.items()}
    )  # fmt: skip
