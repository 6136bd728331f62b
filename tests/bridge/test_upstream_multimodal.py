"""Megatron-LM's ``examples/multimodal/train.py`` with a data set of Energon's, without DIP and under it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from examples.llava_digits.runs import RunFailed
from tests.bridge.conversations import write_conversations, write_tokenizer
from tests.marks import on_cpu_ranks
from tests.megatron.training import Log, read
from tests.patience import LONG
from tests.upstream.runs import HERE, run_script, script_flags

CHECKOUT = os.environ.get("DIP_MEGATRON_CHECKOUT")
pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason="set DIP_MEGATRON_CHECKOUT to a Megatron-LM working tree"),
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the example needs torchvision"),
    on_cpu_ranks,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # each run imports all of the example's packages anew
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(folder / "data")
    write_tokenizer(folder / "tokenizer")
    return folder


SAVED, KILLED, ITERATIONS = 2, 4, 6
BF16 = 1e-4
"""Of losses: gradients are added up in another order, after which some weights are rounded otherwise."""
LAYERS = "modules: {vision: {layers: [[1, 3]]}, language: {layers: [[1, 0], [1, 2]]}}\n"


def trained(files: Path, out: Path, way: str, *flags: str, ranks: int) -> Log:
    """A run, from its logs; its checkpoints and states of the data loader are below ``out`` with ``--save``."""
    example = Path(str(CHECKOUT)).resolve() / "examples" / "multimodal"
    given = ("--data-path", str(files / "data"), "--tokenizer-model", str(files / "tokenizer"),
             "--prompt-path", str(example / "manual_prompts.json"), "--train-iters", str(ITERATIONS))  # fmt: skip
    run_script(way, example / "train.py", out, *given, *flags, ranks=ranks, tree=example.parents[1])
    return read(out, ranks)


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Without dip_megatron, on one rank, from the first iteration to the last."""
    return trained(files, tmp_path_factory.mktemp("whole"), "absent", ranks=1)


def test_dip_trains_as_one_rank_without_it(files: Path, whole: Log, tmp_path: Path) -> None:
    found = trained(files, tmp_path / "dip", "run", "--dip-schedule", "dynamic", ranks=2)
    assert sorted(found.losses) == list(range(1, ITERATIONS + 1))
    assert found.losses == pytest.approx(whole.losses, rel=BF16)
    assert found.norms == pytest.approx(whole.norms, rel=20 * BF16)


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_killed_and_restored_it_trains_as_one_that_never_was(
    files: Path, whole: Log, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although DIP has read ahead when it saves, the loader's state is that of the last sample trained on."""
    config = tmp_path / "dip.yaml"
    config.write_text(LAYERS)
    flags = ("--dip-schedule", "dynamic", "--dip-config", str(config), "--ckpt-format", kind,
             "--save", str(tmp_path / "saved"), "--save-interval", str(SAVED),
             "--dataloader-save", str(tmp_path / "states"))  # fmt: skip
    monkeypatch.setenv("LAUNCH_KILL", str(KILLED))
    with pytest.raises(RunFailed, match="a rank ended with code"):
        trained(files, tmp_path / "killed", "run", *flags, ranks=2)
    monkeypatch.delenv("LAUNCH_KILL")
    before = read(tmp_path / "killed", 2)
    assert sorted(before.losses) == list(range(1, KILLED))
    assert before.losses == pytest.approx({i: whole.losses[i] for i in before.losses}, rel=BF16)

    restored = trained(files, tmp_path / "restored", "run", *flags, "--load", str(tmp_path / "saved"), ranks=2)
    assert "restored dataset state from" in restored.text[0]
    assert sorted(restored.losses) == list(range(SAVED + 1, ITERATIONS + 1))
    assert restored.losses[SAVED + 1] == pytest.approx(before.losses[SAVED + 1], rel=1e-6)
    expected = {i: whole.losses[i] for i in restored.losses}
    expected[SAVED + 2] = (expected[SAVED + 1] + expected[SAVED + 2]) / 2  # Megatron's log, after a start from files
    assert restored.losses == pytest.approx(expected, rel=BF16)
    assert restored.norms == pytest.approx({i: whole.norms[i] for i in restored.norms}, rel=20 * BF16)
    # Other samples would show.
    assert min(abs(a - b) for a, b in combinations(whole.losses.values(), 2)) > 10 * BF16 * max(whole.losses.values())


def test_an_estimate_on_its_own_data(files: Path, tmp_path: Path) -> None:
    example = Path(str(CHECKOUT)).resolve() / "examples" / "multimodal"
    flags = ("--data-path", str(files / "data"), "--tokenizer-model", str(files / "tokenizer"),
             "--prompt-path", str(example / "manual_prompts.json"), "--pipeline-model-parallel-size", "2")  # fmt: skip
    script = [str(HERE / "launch.py"), "tree", str(example / "train.py")]  # mended, as above
    command = [sys.executable, "-m", "dip_megatron.cli", "estimate", "--iterations", "1", "--budget", "0.05", "--json"]
    places = os.pathsep.join([str(example.parents[1]), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *script, *script_flags("multimodal"), *flags], env=os.environ | {"PYTHONPATH": places},
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "vision 4 layers" in done.stderr
    told = json.loads(done.stdout[done.stdout.index("\n{") :])["estimate"]  # behind what make says
    assert told["outcomes"]["dip"]["seconds"] <= told["outcomes"]["today"]["seconds"]
