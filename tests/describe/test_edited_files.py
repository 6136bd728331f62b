"""Files with random edits are used or refused in one line; and what such edits found once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dip_megatron.core.files import format_plan, parse_plan
from dip_megatron.core.simulate import idle_share
from dip_megatron.describe.files import ConfigurationError, resolve
from dip_megatron.describe.model import ModelError, Packing, Parallel, load_model
from dip_megatron.describe.workload import Sample, WorkloadError, load_workload, pack_documents
from dip_megatron.planner.facade import DoesNotFitError
from dip_megatron.schedulers.dip.engine import search
from tests.core.test_files import plan_of
from tests.edited_files import main


def test_some_edits_of_every_kind_of_file():
    done = CliRunner().invoke(main, ["--count", "2", "--seed", "7"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("24 edited files")


@pytest.mark.parametrize(("number", "said"), [(".inf", "finite number"), ("1e30", "less than or equal to")])
@pytest.mark.parametrize("sound", ["mean_images: 2.5", "mean: 816"])
def test_a_mix_that_could_not_be_drawn_is_refused(tmp_path: Path, sound: str, number: str, said: str):
    text = resolve("workloads", "vlm-mix").read_text(encoding="utf-8")
    assert sound in text
    file = tmp_path / "mix.yaml"
    file.write_text(text.replace(sound, f"{sound.split(':')[0]}: {number}"), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=said):
        load_workload(file, load_model("vlm-s"), 1, 2)


@pytest.mark.parametrize("size", ["tp", "pp", "dp", "cp", "ep"])
def test_more_ranks_than_there_are_anywhere_are_refused(tmp_path: Path, size: str):
    with pytest.raises(ModelError, match=f"parallel.{size}: {2**63} ranks"):
        Parallel(**{size: 2**63})  # type: ignore[arg-type]
    # As drawn edits found it: the search for a partition of as many stages never ended.
    file = tmp_path / "model.yaml"
    text = resolve("models", "t2v-s").read_text(encoding="utf-8")
    assert "pp: 4" in text
    file.write_text(text.replace("pp: 4", f"pp: {2**63}"), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="at most"):
        load_model(file)


def test_a_model_of_more_bytes_than_an_integer_holds_does_not_fit():
    """As drawn edits found it: 2**80 words wrapped around to plenty of room."""
    graph = replace(plan_of(215, ranks=2).graph, static_bytes=np.full(2, 2.0**95), memory_limit=np.full(2, 8e10))
    with pytest.raises(DoesNotFitError, match=f"short of {2.0**95 / 2**30:.3f} GiB"):
        search(graph, budget_seconds=0.1)


def test_documents_too_short_for_a_microbatch_end_its_drawing():
    packing = Packing(max_tokens=10**7)
    with pytest.raises(WorkloadError, match="draw longer documents"):
        next(pack_documents(itertools.repeat(Sample(1)), packing))


def test_a_plan_without_idle_time_can_be_read_again():
    plan = plan_of(215, ranks=1)  # its sums come out 2e-16 above its time
    assert plan.predicted.bubble_ratio == 0.0
    assert parse_plan(format_plan(plan)).digest() == plan.digest()


@pytest.mark.parametrize(("busy", "share"), [(3.0, 0.25), (4.0, 0.0), (4.000000000000001, 0.0), (0.0, 1.0)])
def test_idle_share(busy: float, share: float):
    assert idle_share(busy, 4.0) == share
    assert idle_share(busy, 0.0) == 0.0
