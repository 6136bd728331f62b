"""Checkpoints between schedules, partitions and pipeline sizes: who resumes goes on as the run that wrote them."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import ModulePartition, Partition
from examples.llava_digits import runs
from examples.llava_digits.runs import SCRIPT, RunFailed
from tests.forked import forked

from .training import Log, read

if torch.cuda.is_available():
    pytest.skip("the runs below are laid out for CPU ranks", allow_module_level=True)
if importlib.util.find_spec("megatron.training") is None:
    pytest.skip("needs megatron.training", allow_module_level=True)

from dip_megatron.megatron.checkpoints import Checkpoint

SMALL = (
    *shlex.split((SCRIPT.parent / "tiny.args").read_text(), comments=True),
    "--vision-num-layers", "4", "--global-batch-size", "4", "--train-iters", "5", "--lr-warmup-iters", "1",
    "--eval-iters", "1", "--weights-by-name", "--num-workers", "0",
)  # fmt: skip
SHARDED_OPTIMIZER = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
TWO_SEGMENTS = {"vision": [[1, 1], [1, 1]], "language": [[1, 1], [1, 1]]}
UNEVEN = {"vision": [[3, 1]], "language": [[1, 0], [1, 2]]}
FOUR_RANKS = {"vision": [[1, 1, 1, 1]], "language": [[0, 1, 1, 2]]}


def train(folder: Path, name: str, ranks: int, *flags: str, hooks: bool = True) -> Log:
    """Train on ``ranks`` processes; ``hooks`` as ``dip run`` installs them. Raises RunFailed.

    The second iteration has no loss here: Megatron's line for it says the mean of the run's first two.
    """
    launcher = ["-m", "dip_megatron.cli", "run"] if hooks else []
    command = [sys.executable, *launcher, str(SCRIPT), *SMALL, *flags]
    runs.train(name, command, folder, lambda *_: None, ranks, forked)
    log = read(folder, ranks, name)
    second = min(log.losses) + 1
    return replace(log, losses={i: loss for i, loss in log.losses.items() if i != second})


def pipeline(ranks: int) -> tuple[str, ...]:
    return ("--pipeline-model-parallel-size", str(ranks))


def dip(folder: Path, layers: dict[str, list[list[int]]] | None, mode: str = "dynamic") -> tuple[str, ...]:
    if layers is None:
        return ("--dip-schedule", mode)
    config = folder / "dip.yaml"
    config.write_text("modules:\n" + "".join(f"  {name}: {{layers: {value}}}\n" for name, value in layers.items()))
    return ("--dip-schedule", mode, "--dip-config", str(config))


def saved(folder: Path) -> tuple[str, ...]:
    return ("--save", str(folder), "--save-interval", "2")


def resumed(folder: Path) -> tuple[str, ...]:
    """From the second of five iterations."""
    return ("--load", str(folder), "--ckpt-step", "2")


def tensors(folder: Path) -> dict[str, Any]:
    """Names of what a checkpoint holds, with the global shapes of tensors."""
    entries = FileSystemReader(folder / "iter_0000002").read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if hasattr(entry, "size")}


@pytest.fixture(scope="module")
def written_by_dip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """A checkpoint of two ranks with two segments of each module, and what the run that wrote it did."""
    folder = tmp_path_factory.mktemp("dip")
    run = train(folder, "dip", 2, *pipeline(2), *dip(folder, TWO_SEGMENTS, "static"), *saved(folder / "saved"))
    assert sorted(run.norms) == [1, 2, 3, 4, 5]
    return folder / "saved", run


@pytest.fixture(scope="module")
def written_by_megatron(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """A checkpoint of Megatron's own pipeline of two ranks, with distributed optimizer."""
    folder = tmp_path_factory.mktemp("megatron")
    run = train(
        folder, "megatron", 2, *pipeline(2), *SHARDED_OPTIMIZER, *saved(folder / "saved"), hooks=False
    )  # fmt: skip
    assert sorted(run.norms) == [1, 2, 3, 4, 5]
    return folder / "saved", run


def assert_same_from_the_third(resumed: Log, whole: Log) -> None:
    """A wrong optimizer state, step or learning rate shows in the third iteration's update, so from the fourth on."""
    assert resumed.losses == pytest.approx({i: whole.losses[i] for i in (3, 5)}, rel=1e-5)
    assert resumed.norms == pytest.approx({i: whole.norms[i] for i in (3, 4, 5)}, abs=2e-3)


def test_megatron_goes_on_on_one_rank(written_by_dip: tuple[Path, Log], tmp_path: Path) -> None:
    """Without the hooks, as in an environment that has no DIP."""
    checkpoint, whole = written_by_dip
    assert_same_from_the_third(train(tmp_path, "one", 1, *resumed(checkpoint), hooks=False), whole)


def test_dip_goes_on_under_another_partition_of_four_ranks(written_by_dip: tuple[Path, Log], tmp_path: Path) -> None:
    checkpoint, whole = written_by_dip
    run = train(tmp_path, "four", 4, *pipeline(4), *dip(tmp_path, FOUR_RANKS), *resumed(checkpoint))
    assert_same_from_the_third(run, whole)
    log = (tmp_path / "four.rank0.log").read_text()
    assert "was written with vision layers [[1, 1], [1, 1]]" in log
    assert "this run has vision layers [[1, 1, 1, 1]]" in log


def test_dip_keeps_the_partition_of_the_checkpoint(written_by_dip: tuple[Path, Log], tmp_path: Path) -> None:
    """Without a configured partition; the order of work is the same then, and so are the losses to the last digit."""
    checkpoint, whole = written_by_dip
    run = train(tmp_path, "same", 2, *pipeline(2), *dip(tmp_path, None, "static"), *resumed(checkpoint))
    assert run.losses == {i: whole.losses[i] for i in (3, 5)}
    assert run.norms == {i: whole.norms[i] for i in (3, 4, 5)}
    assert "going on with the checkpoint's partition" in (tmp_path / "same.rank0.log").read_text()


def test_dip_goes_on_from_megatrons_pipeline(written_by_megatron: tuple[Path, Log], tmp_path: Path) -> None:
    checkpoint, whole = written_by_megatron
    run = train(tmp_path, "dip", 2, *pipeline(2), *SHARDED_OPTIMIZER, *dip(tmp_path, UNEVEN), *resumed(checkpoint))
    assert_same_from_the_third(run, whole)


def test_dip_goes_on_with_an_optimizer_that_is_sharded_as_megatron_does_by_default(tmp_path: Path) -> None:
    """Under the partition that wrote it: without --dist-ckpt-optim-fully-reshardable each stage's state is its own.
    With torch's Adam, which CPU ranks have, Megatron itself goes on from the fourth iteration with another step."""
    flags = (*pipeline(2), "--use-distributed-optimizer", *dip(tmp_path, TWO_SEGMENTS))
    whole = train(tmp_path, "whole", 2, *flags, *saved(tmp_path / "saved"))
    run = train(tmp_path, "resumed", 2, *flags, *resumed(tmp_path / "saved"))
    assert run.losses[3] == pytest.approx(whole.losses[3], rel=1e-5)
    assert run.norms[3] == pytest.approx(whole.norms[3], abs=2e-3)


def test_the_comparison_sees_a_lost_optimizer_state(written_by_dip: tuple[Path, Log], tmp_path: Path) -> None:
    """The very same run but for Adam's moments: what the tests above compare must differ."""
    checkpoint, whole = written_by_dip
    lost = train(tmp_path, "lost", 2, *pipeline(2), *dip(tmp_path, None), *resumed(checkpoint), "--no-load-optim")
    assert lost.losses[3] == pytest.approx(whole.losses[3], rel=1e-5)
    assert lost.losses[5] != pytest.approx(whole.losses[5], rel=1e-3)


def test_checkpoints_hold_the_same_tensors(
    written_by_dip: tuple[Path, Log], written_by_megatron: tuple[Path, Log]
) -> None:
    """Names and shapes tell nothing of chunks; layers are one dimension of their tensors."""
    ours, theirs = tensors(written_by_dip[0]), tensors(written_by_megatron[0])
    assert {n: s for n, s in ours.items() if not n.startswith("optimizer.")} == {
        n: s for n, s in theirs.items() if not n.startswith("optimizer.")
    }
    assert ours["vision_model.decoder.layers.mlp.linear_fc1.weight"][0] == 4
    assert {n for n in ours if n.startswith("optimizer.state.exp_avg.")} == {
        n for n in theirs if n.startswith("optimizer.state.exp_avg.")
    }


def test_frozen_vision_has_no_optimizer_state(tmp_path: Path) -> None:
    frozen = ("--freeze-vision-model",)
    run = train(
        tmp_path, "dip", 2, *frozen, *pipeline(2), *dip(tmp_path, TWO_SEGMENTS), *saved(tmp_path / "saved")
    )  # fmt: skip
    names = tensors(tmp_path / "saved")
    states = {n for n in names if n.startswith("optimizer.state.exp_avg.")}
    assert any(n.startswith("vision_model.") for n in names)
    assert any("vision_projection" in n for n in states)
    assert not any("vision_model." in n for n in states)
    assert_same_from_the_third(train(tmp_path, "one", 1, *frozen, *resumed(tmp_path / "saved"), hooks=False), run)


def test_checkpoints_by_rank_that_are_not_of_dip_are_refused_until_converted(tmp_path: Path) -> None:
    """By Megatron's own conversion, as the refusal says."""
    older, ours = ("--ckpt-format", "torch"), (*pipeline(2), *dip(tmp_path, TWO_SEGMENTS))
    plain = train(tmp_path, "plain", 2, *pipeline(2), *saved(tmp_path / "saved"), *older, hooks=False)
    with pytest.raises(RunFailed, match=r"is no distributed checkpoint, and not one of DIP's"):
        train(tmp_path, "dip", 2, *ours, *resumed(tmp_path / "saved"), *older)
    conversion = ("--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", str(tmp_path / "converted"))
    command = [sys.executable, str(SCRIPT), *SMALL, *pipeline(2), *resumed(tmp_path / "saved"), *older, *conversion]
    runs.train("convert", command, tmp_path, lambda *_: None, 2, forked)
    assert_same_from_the_third(train(tmp_path, "dip", 2, *ours, *resumed(tmp_path / "converted" / "torch_dist")), plain)


def partition(layers: dict[str, list[list[int]]]) -> Partition:
    return Partition(tuple(ModulePartition(n, tuple(map(tuple, lines))) for n, lines in layers.items()))


@pytest.mark.parametrize("written", [None, partition(UNEVEN)])
def test_optimizer_state_bound_to_chunks_loads_into_no_others(written: Partition | None) -> None:
    checkpoint = Checkpoint("saved", written, resumes=True, bound=True)
    with pytest.raises(ConfigurationError, match="--dist-ckpt-optim-fully-reshardable"):
        checkpoint.compare(partition(TWO_SEGMENTS))
    assert Checkpoint("saved", partition(UNEVEN), resumes=True, bound=True).compare(partition(UNEVEN)) is None
