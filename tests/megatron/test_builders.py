"""A model that Megatron's own builder builds from a config (0.19 and newer), with only what its wheel brings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.llava_digits.runs import Run
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.upstream.runs import HERE, run_script

pytestmark = [on_cpu_ranks, needs_megatron_training]
SCRIPT = HERE / "pretrain_tiny_gpt.py"


def dumped(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What all ranks of a run have dumped, by kind and name."""
    found: dict[str, dict[str, torch.Tensor]] = {"params": {}, "wgrads": {}}
    for kind, tensors in found.items():
        for file in sorted((folder / kind / "iter_0000002").iterdir()):
            chunks = torch.load(file)
            assert list(chunks) == ["model_chunk0"]
            tensors |= chunks["model_chunk0"]
    return found


def test_dumps_have_the_names_of_the_whole_model(tmp_path: Path) -> None:
    """Of parameters and their gradients, of two chunks a rank: the same as on one rank without DIP."""
    config = tmp_path / "dip.yaml"
    config.write_text("modules:\n  language:\n    layers: [[1, 1], [1, 1]]\n")
    dumps = ("--save-wgrads-interval", "2", "--save-params-interval", "2", "--save-interval", "100", "--save")
    run_script("absent", SCRIPT, tmp_path / "one", *dumps, str(tmp_path / "one"), ranks=1, start=forked)
    flags = ("--dip-schedule", "dynamic", "--dip-config", str(config), *dumps, str(tmp_path / "two"))
    run_script("run", SCRIPT, tmp_path / "two", *flags, ranks=2, start=forked)
    torch.testing.assert_close(dumped(tmp_path / "two"), dumped(tmp_path / "one"), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_script("absent", SCRIPT, tmp_path_factory.mktemp("whole"), "--bf16", ranks=1, start=forked)


@pytest.mark.parametrize("layers", ["[[2, 2]]", "[[1, 1], [1, 1]]"])
def test_a_built_model_trains_in_segments(whole: Run, tmp_path: Path, layers: str) -> None:
    """In bf16, because the wrapper for mixed precision has to know how many chunks there are."""
    config = tmp_path / "dip.yaml"
    config.write_text(f"modules:\n  language:\n    layers: {layers}\n")
    flags = ("--bf16", "--dip-schedule", "dynamic", "--dip-config", str(config))
    run = run_script("run", SCRIPT, tmp_path, *flags, ranks=2, start=forked)
    assert sorted(run.losses) == [1, 2, 3, 4]
    assert run.losses == pytest.approx(whole.losses, rel=2e-3)
    assert run.losses[1] == pytest.approx(whole.losses[1], rel=1e-5)
