"""A loop that no adapter knows, as ``docs/any-loop.md`` tells: the losses and gradients of its own schedule."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dip_megatron.describe.files import resolve
from examples.llava_digits.runs import RunFailed, train
from tests.forked import forked
from tests.marks import on_cpu_ranks

pytestmark = on_cpu_ranks
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "any_loop" / "train.py"
PACKED = SCRIPT.with_name("packed.py")
_LINE = re.compile(r"iteration (\d+): loss ([\d.]+), gradient norm ([\d.]+)")


def trained(
    folder: Path, environment: Mapping[str, str], *flags: str, ranks: int = 2, monkeypatch: pytest.MonkeyPatch,
    script: Path = SCRIPT,
) -> tuple[list[float], str]:  # fmt: skip
    """Losses and gradient norms by iteration, and what all ranks wrote."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder.mkdir(parents=True, exist_ok=True)
    train("run", [sys.executable, str(script), *flags], folder, lambda *_: None, ranks, forked)
    texts = [(folder / f"run.rank{rank}.log").read_text() for rank in range(ranks)]
    numbers = [float(x) for line in _LINE.findall(texts[-1]) for x in line[1:]]
    assert len(numbers) == 8
    numbers += map(float, re.findall(r"evaluated: ([\d.]+)", texts[-1]))
    return numbers, "\n".join(texts)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Megatron-Core's own schedule."""
    with pytest.MonkeyPatch.context() as patch:
        return trained(tmp_path_factory.mktemp("plain"), {}, monkeypatch=patch)[0]


@pytest.mark.parametrize(
    ("environment", "flags", "ranks"),
    [
        ({"DIP_SCHEDULE": "dynamic"}, ("--read-ahead",), 2),
        ({"DIP_SCHEDULE": "static", "DIP_MODULES": "{language: {layers: [[1, 0], [1, 2]]}}"}, (), 2),
        ({"DIP_SCHEDULE": "dynamic", "DIP_PLANNER_WORKERS": "0"}, ("--prefetched",), 4),
    ],
    ids=["read ahead", "two segments", "an iterator of each iteration's own"],
)
def test_losses_and_gradients_are_those_of_its_own_schedule(
    plain: list[float], environment: Mapping[str, str], flags: tuple[str, ...], ranks: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    numbers, text = trained(tmp_path, environment, *flags, ranks=ranks, monkeypatch=monkeypatch)
    assert numbers == pytest.approx(plain, rel=1e-5)
    assert "[dip] language: layers" in text or "static" in environment.values()
    assert "a model that DIP didn't build" not in text
    last = re.findall(r"\[dip\] iteration 4: .*", text)[-1]
    assert (" at the call | " in last) == ("--read-ahead" not in flags)


def test_evaluations_between_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the training's own iterator, which nobody may have read ahead."""
    theirs, _ = trained(tmp_path / "plain", {}, "--evaluate", monkeypatch=monkeypatch)
    asked = {"DIP_SCHEDULE": "dynamic"}
    ours, _ = trained(tmp_path / "dip", asked, "--evaluate", monkeypatch=monkeypatch)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(ours) == 12
    with pytest.raises(RunFailed, match="training and evaluation share a data iterator"):
        trained(tmp_path / "ahead", asked, "--evaluate", "--read-ahead", monkeypatch=monkeypatch)


def test_a_loop_that_builds_its_own_model_is_told_what_to_call(plain: list[float], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    numbers, text = trained(tmp_path, {"DIP_SCHEDULE": "dynamic"}, "--own-model", monkeypatch=monkeypatch)
    assert numbers == plain
    assert text.count("build it with dip_megatron.build_model (docs/any-loop.md)") == 1


def test_chunks_run_by_anything_but_dip_stop_before_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match="that DIP built is run without DIP's schedule"):
        trained(tmp_path, {"DIP_SCHEDULE": "dynamic"}, "--by-hand", monkeypatch=monkeypatch)


def test_documents_that_change_microbatches_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of two stages, of which one reads longer documents; losses are weighted by tokens."""
    theirs, before = trained(tmp_path / "plain", {}, ranks=4, monkeypatch=monkeypatch, script=PACKED)
    # On devices a thousand times as slow, so that no host is too busy for an exchange to be worth its while.
    slow = tmp_path / "slow.yaml"
    slow.write_text(resolve("clusters", "cpu").read_text(encoding="utf-8").replace("tflops: 0.085", "tflops: 0.000085"))
    asked = {
        "DIP_SCHEDULE": "dynamic", "DIP_BALANCE": "swap", "DIP_RESAMPLE": "true", "DIP_SEARCH_BUDGET": "0.05",
        "DIP_TRACE_DIR": str(tmp_path / "trace"), "DIP_CLUSTER": str(slow), "DIP_RECALIBRATE": "false",
    }  # fmt: skip
    ours, after = trained(tmp_path / "dip", asked, ranks=4, monkeypatch=monkeypatch, script=PACKED)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert re.findall(r"(\d+) tokens", after) == re.findall(r"(\d+) tokens", before)
    lines = [json.loads(line) for line in (tmp_path / "trace" / "iterations.jsonl").read_text().splitlines()]
    found = [line["exchange"] for line in lines]
    assert found[0] is None
    resampled = [e for e in found[1:] if e["samples"]]
    assert resampled
    assert all(e["after"] < 1.1 < e["before"] for e in resampled)
    assert re.search(r"slowest replica .* samples moved", after)


@pytest.mark.parametrize(("page", "script"), [("any-loop.md", SCRIPT), ("balance.md", PACKED)])
def test_the_walkthrough_shows_the_script(page: str, script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)
    lines = {line.strip() for line in source.splitlines()}
    assert blocks
    for block in blocks:
        assert not [line for line in block.splitlines() if line.strip() not in lines]
