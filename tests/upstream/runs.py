"""Training runs of Megatron's own scripts, as the checks of patches and the tests start them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dip_megatron.megatron.cpu import CPU_FLAGS
from examples.llava_digits.runs import Run, Start, started, train

HERE = Path(__file__).resolve().parent


def script_flags(kind: str) -> list[str]:
    """The flags of a tiny model of ``kind`` (``gpt`` or ``vlm``, on Megatron's mock data, or ``multimodal``) on CPU
    ranks."""
    names = ("multimodal",) if kind == "multimodal" else (kind, "common")
    flags = [*(word for name in names for word in (HERE / f"{name}.args").read_text().split()), *CPU_FLAGS]
    return [*flags, "--mock-data"] if kind == "gpt" else flags


def run_script(
    way: str, script: Path, out: Path, *flags: str, ranks: int, tree: Path | None = None, name: str = "run",
    pipeline: int | None = None, start: Start = started,
) -> Run:  # fmt: skip
    """Train ``script`` in one of :mod:`launch`'s ways on ``ranks`` ranks, in pipelines of so many (None: all of them),
    logging below ``out``; ``start`` starts them.

    ``tree`` holds the ``megatron`` to use, if it isn't the script's folder or what is installed. Raises RunFailed.
    """
    kind = "multimodal" if script.name == "train.py" else "vlm" if "vlm" in script.name else "gpt"
    command = [sys.executable, str(HERE / "launch.py"), way, str(script), *script_flags(kind), *flags]
    out.mkdir(parents=True, exist_ok=True)
    with _path(() if tree is None else (str(tree),)):
        command += ["--pipeline-model-parallel-size", str(pipeline or ranks)]
        return train(name, command, out, lambda *_: None, ranks, start)


@contextlib.contextmanager
def _path(entries: Sequence[str]) -> Iterator[None]:
    """Put entries on processes' import path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*entries, *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
