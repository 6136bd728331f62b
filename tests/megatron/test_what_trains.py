"""What trains, under the real training loop: described wrongly, chosen after the model was built, and changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.llava_digits.runs import RunFailed
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import Log, run

pytestmark = [on_cpu_ranks, needs_megatron_training]
PROJECTOR_AND_LANGUAGE = r"vision_projection|language_model"


def assert_equal(ours: Log, theirs: Log) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.norms == pytest.approx(theirs.norms, abs=2e-3)  # printed with three digits
    assert len(set(theirs.norms.values())) == len(theirs.norms)


def test_a_description_that_calls_frozen_what_trains_is_refused(tmp_path: Path) -> None:
    """All backward stages of the ViT used to be left out without a word."""
    with pytest.raises(RunFailed):
        run(tmp_path, options={"described": {"freeze_vision_model": True}})
    text = [(tmp_path / f"run.rank{rank}.log").read_text() for rank in range(2)]
    # All ranks refuse, but the first to end has the other ended, which may not have come to say so.
    words = "dip: vision, segment 0 on pipeline rank 0: the description of the model calls its stem frozen"
    assert any(words in lines and "--dip-schedule off trains without a plan" in lines for lines in text)
    assert not any("iteration        1/" in lines for lines in text)


def test_a_script_that_freezes_after_get_model_is_followed(tmp_path: Path) -> None:
    """Overlapped reductions over two replicas, each with plans of its own."""
    options = {"trains": {"0": PROJECTOR_AND_LANGUAGE}}
    theirs = run(tmp_path / "megatron", dip=False, options=options)
    trace = tmp_path / "trace"
    ours = run(tmp_path / "dip", "--overlap-grad-reduce", "--dip-trace-dir", str(trace), ranks=4, options=options)
    assert_equal(ours, theirs)
    said = "[dip] vision: nothing of its stem and layers trains in the model as built; plans follow the model"
    assert said in "".join(ours.text)
    events = json.loads((trace / "trace.json").read_text())["traceEvents"]
    vision = [e["name"].split()[0] for e in events if e.get("cat", "").startswith("vision,") and e["pid"] == 0]
    assert set(vision) == {"F"}


def test_what_a_script_changes_between_iterations_is_followed(tmp_path: Path) -> None:
    """The ViT rests in iterations 2 and 3."""
    options = {"trains": {"2": PROJECTOR_AND_LANGUAGE, "4": ""}}
    theirs = run(tmp_path / "megatron", dip=False, options=options, iterations=5)
    ours = run(tmp_path / "dip", options=options, iterations=5)
    assert_equal(ours, theirs)
    assert "".join(ours.text).count("[dip] what trains has changed; plans follow it from this iteration on") == 2
