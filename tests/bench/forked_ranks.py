"""Benchmarks run in the tests' own process, their ranks forked: importing Megatron takes longer than what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import click
import pytest
from click.testing import CliRunner

from benchmarks.shared import ranks
from tests.forked import Forked


def run_script(main: click.Command, arguments: Sequence[str], folder: Path) -> str:
    """All that a benchmark and its first rank print; the ranks start in place of ``python`` and their command."""
    prints = folder / "prints.log"

    def start(command: Sequence[str], environment: Mapping[str, str], out: TextIO | None, error: TextIO) -> Forked:
        log = prints if out is None else Path(error.name)
        log.touch()
        return Forked(command, environment, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "start", start)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        done = CliRunner().invoke(main, list(arguments))
    printed = done.output + prints.read_text()
    assert done.exit_code == 0, printed[-3000:] + repr(done.exception)
    return printed
