"""What a team would gain: each way to train the same batches, and which can't."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import ModelError, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.estimate import Estimate, estimate, todays_choice
from dip_megatron.schedulers.entry import Effort

MODEL = load_model("vlm-s").with_parallel(pp=4, dp=3)
LANGUAGE = MODEL.modules[-1]
LOTS = [batch.microbatches for batch in load_workload("vlm-mix", MODEL, iterations=6, microbatches=8)]
EFFORT = Effort(evaluations=200, deterministic=True)


@pytest.fixture(scope="module")
def found() -> Estimate:
    return estimate(
        MODEL, load_cluster("h100"), None, LOTS[:3], [LOTS[3:]], todays_choice(MODEL, 8), EFFORT,
        memory_limit=300e9, partition_seconds=1.0,
    )  # fmt: skip


def test_every_way_is_over_its_bound_and_dip_is_ahead(found: Estimate) -> None:
    assert list(found.outcomes) == ["today", "megatron", "dip", "balanced"]
    assert not found.refused
    for outcome in found.outcomes.values():
        assert outcome.fits
        assert outcome.seconds >= outcome.bound * (1 - 1e-9)
        assert outcome.job_seconds >= outcome.seconds
        assert 0 <= outcome.bubble_ratio < 1
    today, megatron, dip, balanced = found.outcomes.values()
    assert dip.job_seconds < megatron.job_seconds <= today.job_seconds
    assert balanced.straggling < dip.straggling
    assert found.gain == pytest.approx(today.job_seconds / dip.job_seconds)
    assert found.gain is not None
    assert found.gain_between is not None
    assert found.gain_between[0] <= found.gain <= found.gain_between[1]


def test_today_is_as_megatron_lays_a_model_out() -> None:
    even = todays_choice(MODEL, 8)
    assert even.schedule == "megatron-1f1b"
    assert even.modules[0].layers_of("vision") == ((MODEL.modules[0].layers, 0, 0, 0),)
    assert even.modules[0].layers_of(LANGUAGE.name) == ((LANGUAGE.layers // 4,) * 4,)
    layers = ((0, 6, 6, 5), (4, 4, 4, 3))
    assert sum(map(sum, layers)) == LANGUAGE.layers
    given = todays_choice(MODEL, 8, layers)
    assert given.schedule == "megatron-interleaved"
    assert given.modules[0].layers_of(LANGUAGE.name) == layers


def test_a_layout_that_megatron_has_not_is_told() -> None:
    with pytest.raises(ModelError, match="can't be spread evenly over 3 stages"):
        todays_choice(MODEL.with_parallel(pp=3), 8)
    found = estimate(
        MODEL.with_parallel(dp=1), load_cluster("h100"), None, LOTS[:1], [LOTS[3:4]], "no such layout",
        replace(EFFORT, evaluations=20), memory_limit=300e9, partition_seconds=0.2,
    )  # fmt: skip
    assert found.refused["today"] == "no such layout"
    assert (found.gain, found.gain_between) == (None, None)
    assert list(found.outcomes) == ["megatron", "dip"]  # one replica has nobody to exchange with
