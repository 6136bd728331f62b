"""Workload files: JSON lines, one global batch of one data-parallel replica a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...core.json_lines import load_line
from .batch import Clip, GlobalBatch, Microbatch, WorkloadError

_CLIP_FIELDS = ("text_tokens", "frames", "height", "width")
_LISTS = ("images", "audios", "sequences")


def read_workload(path: str | Path) -> tuple[GlobalBatch, ...]:
    """All iterations of a workload file; blank lines are skipped.

    Raises WorkloadError ``FILE:LINE: field: reason`` at the first fault: nothing is guessed or converted.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: file: {getattr(error, 'strerror', None) or error}") from error
    batches = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            batches.append(parse_batch(line))
        except WorkloadError as error:
            raise WorkloadError(f"{path}:{number}: {error}") from error
    if not batches:
        raise WorkloadError(f"{path}:1: microbatches: the file holds no batch")
    return tuple(batches)


def write_workload(path: str | Path, batches: Iterable[GlobalBatch]) -> None:
    """Write batches so that :func:`read_workload` gives exactly them back."""
    Path(path).write_text("".join(format_batch(b) + "\n" for b in batches), encoding="utf-8")


def format_batch(batch: GlobalBatch) -> str:
    """One line of a workload file; fields that hold nothing are left out."""
    microbatches: list[dict[str, Any]] = []
    for m in batch.microbatches:
        if m.clips:
            microbatches.append({"clips": [{f: getattr(c, f) for f in _CLIP_FIELDS} for c in m.clips]})
        else:
            lists: dict[str, Any] = {name: list(getattr(m, name)) for name in _LISTS if getattr(m, name)}
            if m.others:
                lists["others"] = {kind: list(tokens) for kind, tokens in dict(m.others).items()}
            microbatches.append({"text_tokens": m.text_tokens, **lists})
    return json.dumps({"microbatches": microbatches})


def parse_batch(line: str) -> GlobalBatch:
    """Inverse of :func:`format_batch`. Raises WorkloadError ``field: reason``."""
    data = load_line(line, WorkloadError)
    _mapping("line", data, ("microbatches",))
    items = data.get("microbatches")
    if not isinstance(items, list) or not items:
        raise WorkloadError("microbatches: expected a list of at least one microbatch")
    return GlobalBatch(tuple(_microbatch(f"microbatches[{i}]", item) for i, item in enumerate(items)))


def _microbatch(place: str, data: Any) -> Microbatch:
    _mapping(place, data, ("text_tokens", "clips", *_LISTS, "others"))
    lists = {name: _integers(f"{place}.{name}", data.get(name, [])) for name in _LISTS}
    others = data.get("others", {})
    if not isinstance(others, dict):
        raise WorkloadError(f"{place}.others: expected an object of lists by kind, got {type(others).__name__}")
    clips = data.get("clips", [])
    if not isinstance(clips, list):
        raise WorkloadError(f"{place}.clips: expected a list, got {type(clips).__name__}")
    try:
        return Microbatch(
            text_tokens=_integer(f"{place}.text_tokens", data.get("text_tokens", 0)),
            images=lists["images"],
            audios=lists["audios"],
            clips=tuple(_clip(f"{place}.clips[{i}]", clip) for i, clip in enumerate(clips)),
            sequences=lists["sequences"],
            others={kind: _integers(f"{place}.others.{kind}", tokens) for kind, tokens in others.items()},
        )
    except WorkloadError as error:
        text = str(error)
        raise WorkloadError(text if text.startswith(place) else f"{place}.{text}") from error


def _clip(place: str, data: Any) -> Clip:
    _mapping(place, data, _CLIP_FIELDS)
    for name in _CLIP_FIELDS:
        if name not in data:
            raise WorkloadError(f"{place}.{name}: missing")
    return Clip(**{name: _integer(f"{place}.{name}", data[name]) for name in _CLIP_FIELDS})


def _mapping(place: str, data: Any, known: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise WorkloadError(f"{place}: expected an object, got {type(data).__name__}")
    for key in data:
        if key not in known:
            raise WorkloadError(f"{place}.{key}: unknown field; known: {', '.join(known)}")


def _integers(place: str, data: Any) -> tuple[int, ...]:
    if not isinstance(data, list):
        raise WorkloadError(f"{place}: expected a list of integers, got {type(data).__name__}")
    return tuple(_integer(f"{place}[{i}]", value) for i, value in enumerate(data))


def _integer(place: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise WorkloadError(f"{place}: expected an integer, got {json.dumps(value)}")
    if abs(value) > 2**40:
        raise WorkloadError(f"{place}: {value} is out of range")
    return value
