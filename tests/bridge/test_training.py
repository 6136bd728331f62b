"""Megatron-Bridge's own loop on CPU ranks, with DIP off: what DIP is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.bridge.qwen25_vl import Run, save_tiny, trained
from tests.processes import Team


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen")
    save_tiny(made)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return run(folder, Run())[0]


def run(folder: Path, how: Run) -> list[dict[str, Any]]:
    """What each rank of a training of its own processes returns: Bridge initialises a process once."""
    ranks = Team(how.pipeline)
    try:
        return ranks.run(trained, folder, how)
    finally:
        ranks.close()


@pytest.mark.parametrize("virtual", [None, 2])
def test_stages_train_as_one_rank(folder: Path, alone: dict[str, Any], virtual: int | None) -> None:
    first, last = run(folder, Run(pipeline=2, virtual=virtual))

    assert len(last["losses"]) == 3
    torch.testing.assert_close(last["losses"], alone["losses"], rtol=0, atol=2e-6)
    torch.testing.assert_close(last["norms"], alone["norms"], rtol=1e-5, atol=0)
    assert first["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-5)


def test_training_moves_all_weights_of_the_folder(folder: Path, alone: dict[str, Any]) -> None:
    start = load_file(folder / "model.safetensors")

    assert alone["weights"].keys() == start.keys()
    assert [name for name in start if torch.equal(start[name], alone["weights"][name])] == []
