"""Megatron-Energon's loader under DIP, which reads ahead: killed and restored, a run goes on at the very sample."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from examples.llava_digits.runs import RunFailed
from tests.bridge.energon_digits import write_documents
from tests.marks import on_cpu_ranks
from tests.megatron import training

pytestmark = on_cpu_ranks
SCRIPT = Path(__file__).with_name("energon_digits.py")
ITERATIONS, SAVED, KILLED = 6, 2, 4
CONFIG = "modules: {vision: {layers: [[1, 1]]}, language: {layers: [[1, 0], [1, 2]]}}\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many documents as five iterations train on, so that a run begins them anew."""
    from megatron.core.datasets.utils import Split

    from examples.llava_digits.documents import PackedDigitDocuments, split_images

    made = tmp_path_factory.mktemp("energon") / "data"
    images, *_ = split_images()
    write_documents(made, PackedDigitDocuments(
        images, Split.train, 20, sequence_length=192, image_tokens=9, side=24, seed=1234,
    ))  # fmt: skip
    return made


@pytest.fixture
def trained(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the script with the options of this test and flags beside the usual ones."""
    monkeypatch.setattr(training, "SCRIPT", SCRIPT)
    config = tmp_path / "dip.yaml"
    config.write_text(CONFIG)
    states = tmp_path / "states"

    def run(name: str, *flags: str, dip: bool = True, workers: int = 0, **options: Any) -> training.Log:
        given = {"data": str(data), "states": str(states / name), "workers": workers, **options}
        monkeypatch.setenv("DIP_ENERGON", json.dumps(given))
        own = ("--dip-config", str(config)) if dip else ()
        external = ("--dataloader-type", "external", *flags)
        return training.run(tmp_path / name, *external, *own, iterations=ITERATIONS, dip=dip)

    return run


def test_a_killed_run_goes_on_at_the_very_sample(trained: Any, tmp_path: Path) -> None:
    saving = ("--save", str(tmp_path / "saved"), "--save-interval", str(SAVED))
    whole = trained("whole")
    with pytest.raises(RunFailed, match=r"a rank ended with code"):
        trained("run", *saving, kill=KILLED)
    killed = training.read(tmp_path / "run", 2)
    assert max(killed.losses) < KILLED  # one iteration is lost that was trained on, and one that was read ahead
    os.rename(tmp_path / "run", tmp_path / "killed")
    restored = trained("run", *saving, "--load", str(tmp_path / "saved"))

    assert sorted(restored.losses) == list(range(SAVED + 1, ITERATIONS + 1))
    expected = {i: whole.losses[i] for i in restored.losses}
    expected[SAVED + 2] = (expected[SAVED + 1] + expected[SAVED + 2]) / 2  # Megatron's log, after a start from files
    assert restored.losses == pytest.approx(expected, rel=1e-5)
    assert restored.norms == pytest.approx({i: whole.norms[i] for i in restored.norms}, abs=2e-3)  # three digits
    seen = [[s["index"] for s in log.samples[-1]] for log in (whole, killed, restored)]
    assert sorted(seen[2]) == sorted(seen[0][4 * SAVED :])
    assert len(set(seen[0])) > 4 * SAVED  # shuffled, and not the same samples again and again
