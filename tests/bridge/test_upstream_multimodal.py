"""Megatron-LM's ``examples/multimodal/train.py`` with a data set of Energon's, without DIP and under it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from scripts.upstream.runs import run_script
from tests.bridge.conversations import write_conversations, write_tokenizer
from tests.megatron.training import Log, read

CHECKOUT = os.environ.get("DIP_MEGATRON_CHECKOUT")
pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason="set DIP_MEGATRON_CHECKOUT to a Megatron-LM working tree"),
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the example needs torchvision"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs below are laid out for CPU ranks"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(folder / "data")
    write_tokenizer(folder / "tokenizer")
    return folder


def trained(files: Path, out: Path, way: str, *flags: str, ranks: int) -> Log:
    """A run of five iterations, from its logs."""
    example = Path(str(CHECKOUT)).resolve() / "examples" / "multimodal"
    given = ("--data-path", str(files / "data"), "--tokenizer-model", str(files / "tokenizer"),
             "--prompt-path", str(example / "manual_prompts.json"))  # fmt: skip
    run_script(way, example / "train.py", out, *given, *flags, ranks=ranks, tree=example.parents[1])
    return read(out, ranks)


def test_dip_trains_as_one_rank_without_it(files: Path, tmp_path: Path) -> None:
    whole = trained(files, tmp_path / "whole", "absent", ranks=1)
    found = trained(files, tmp_path / "dip", "run", "--dip-schedule", "dynamic", ranks=2)
    assert sorted(found.losses) == [1, 2, 3, 4, 5]
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    assert found.norms == pytest.approx(whole.norms, rel=1e-3)
