"""Megatron-Core's MIMO models: losses and gradients of the class under Megatron's schedule, whatever the plan."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.compat.mimo import mimo
from dip_megatron.core import Kind
from dip_megatron.core.strategies import strategy_names
from dip_megatron.describe.model import Parallel
from examples.llava_digits.runs import train
from tests.drawn import settings_of_ranks
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.processes import ProcessFailure, team
from tests.runtime import mimo_case
from tests.runtime.equal import assert_gradients_equal, assert_losses_equal
from tests.runtime.llava_case import initialize
from tests.runtime.mimo_case import Held, MimoCase, batches, blueprint, dip_run, mimo_config, model_of, reference
from tests.runtime.split_case import Drawn

pytestmark = pytest.mark.skipif(mimo() is None, reason="stages of MIMO models came with megatron-core 0.19")
MIXED = (Held(2, 1), Held(0, 2, frames=6), Held(3), Held(text=17), Held(1, 3, frames=2, samples=2))
SEVERAL: dict[str, Any] = {
    "images": ((1, 0), (1, 1)), "sound": ((0, 1), (1, 0)), "language": ((1, 0), (0, 1))
}  # fmt: skip
WHOLE: dict[str, Any] = {"images": ((3, 3),), "sound": ((2, 2),), "language": ((1, 1),)}


def check(case: MimoCase, world: int, drawn: Drawn) -> list[Any]:
    """Equality with Megatron's PP1 run; what each rank ran."""
    answers = team(world).run(dip_run, case, drawn)
    losses = answers[-1][0]
    grads = {name: grad for rank in answers for name, grad in rank[1].items()}  # copies have the same
    theirs, their_grads = team(1).run(reference, case)[0]
    assert len(losses[0]) == len(case.held)
    assert_losses_equal(theirs, losses[0])
    assert_gradients_equal(their_grads, grads)
    return [a[2] for a in answers]


@settings_of_ranks(8)
@given(
    held=st.lists(
        st.builds(
            Held, st.sampled_from([0, 0, 1, 4]), st.integers(0, 2), st.integers(1, 5), st.integers(1, 9),
            st.sampled_from([1, 1, 2]),
        ),
        min_size=1, max_size=4,
    ).map(tuple),
    cut=st.sampled_from([{}, SEVERAL, WHOLE]),
    hears=st.booleans(),
    unit_size=st.sampled_from([None, 1, 2]),
    vision=st.sampled_from(["clip", "siglip", "internvit"]),
    projected=st.booleans(),
    recompute=st.booleans(),
    strategies=st.sets(st.sampled_from(strategy_names()), min_size=1).map(sorted).map(tuple),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_two_ranks_equal_one(held, cut, hears, unit_size, vision, projected, recompute, strategies, seed):
    case = MimoCase(held, unit_size=unit_size, vision=vision, projected=projected, recompute=recompute)
    case = replace(case, **cut)
    case = case if hears else replace(case, sound=None)
    check(case, 2, Drawn(seed, 0.6, ("none",) if recompute else strategies))


@pytest.mark.parametrize("trains", ["coin 1", "^language", r"input_projections", r"^modality_submodules\.images"])
def test_what_a_script_froze(trains):
    ran = check(replace(MimoCase(MIXED, trains=trains), **SEVERAL), 2, Drawn(2, 0.6, strategy_names()))
    if trains == "^language":
        assert {kind for rank in ran for module, kind in rank if module != "language"} == {Kind.F}


def test_tied_embeddings_are_on_the_first_and_the_last_rank():
    case = replace(MimoCase(MIXED, tied=True), **SEVERAL)
    answers = team(2).run(dip_run, case, Drawn(3))
    ours = [rank[1] for rank in answers]
    theirs = team(1).run(reference, case)[0][1][mimo_case.EMBEDDING]
    # The tests' finalizing adds nothing up, as Megatron's does.
    torch.testing.assert_close(ours[0][mimo_case.EMBEDDING] + ours[1][mimo_case.OUTPUT], theirs, rtol=0, atol=1e-9)


def test_evaluation():
    case = MimoCase(MIXED)
    losses = team(2).run(dip_run, case, Drawn(), True)[-1][0][0]
    for ours, theirs in zip(losses, team(1).run(reference, case)[0][0], strict=True):
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-6, atol=1e-6)


def described(rank: int, world: int) -> Any:
    """Parameters of the planner's view and of the model, and the counts of each microbatch."""
    initialize(world)
    from dip_megatron.runtime.protocol import MicrobatchInputs

    case = MimoCase(MIXED)
    family, asked = blueprint(case, 1)
    view = family.describe(asked, Parallel(1, 1, 1, False, False))
    left_out = ("bias", "final_layernorm.weight", "ln_pre.weight", "class_token", "position_embeddings.weight")
    real = sum(p.numel() for name, p in model_of(case, 1).named_parameters() if not name.endswith(left_out))
    layers = {name: ((depth,),) for name, depth in case.depths.items()}
    program = family.program(asked, layers, rank=0, micro_batch_size=1)
    return view.parameters, real, [program.load(MicrobatchInputs(program.bind(**b))) for b in batches(case)]


def test_the_planner_sees_the_model_and_its_batches_as_they_are():
    said, real, loads = team(1).run(described)[0]
    stem = 16 * mimo_case.MELS  # of sound, which its entry doesn't describe
    assert said == real - stem
    assert [load.images for load in loads] == [(5, 5), (), (5, 5, 5), (), (5, 5)]
    assert [load.audios for load in loads] == [(4,), (6, 6), (), (), (2,) * 6]
    assert [load.text_tokens for load in loads] == [8, 8, 8, 17, 16]


def refused(rank: int, world: int, what: str) -> None:
    initialize(world)
    from dip_megatron.families.known import known_families
    from dip_megatron.megatron.build import record_blueprint
    from dip_megatron.runtime.protocol import MicrobatchInputs

    case = MimoCase(MIXED)
    asked = mimo_config(case, 1)
    seen = asked.modality_submodules_spec["images"].submodules["encoders"]
    if what == "two encoders":
        seen["other"] = seen["vit"]
    if what == "encoder":
        seen["vit"].module = torch.nn.Identity
    if what == "grids":
        asked.module_to_grid_map = {"images": None, "language": None}
    if what == "language":
        asked.language_model_spec.module = torch.nn.Identity
    if what == "token":
        del asked.special_token_ids["sound"]
    if what == "shared":
        seen["vit"].params["transformer_config"].sequence_parallel = True
    from megatron.core.models.mimo import MimoModel

    family, blueprint = record_blueprint(known_families(), MimoModel, asked)
    layers = {name: ((depth,),) for name, depth in case.depths.items()}
    program = family.program(blueprint, layers, rank=0, micro_batch_size=1)
    item = batches(case)[0]
    pixels = item["modality_inputs"]["images"]["vit"]
    if what == "size":
        pixels["x"] = pixels["x"][..., :4]
    if what == "places":
        pixels["x"] = pixels["x"][1:]
    if what == "mask":
        pixels["attention_mask"] = torch.ones(1, 1, 5, 5)
    if what == "name":
        item["modality_inputs"]["images"] = {"clip": pixels}
    program.load(MicrobatchInputs(program.bind(**item)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("two encoders", "modality images has 2 encoders.*make each a modality of its own"),
        ("encoder", "doesn't know how a Identity is cut, only CLIPViTModel.*give it an entry"),
        ("grids", "DIP places encoders itself; leave out module_to_grid_map"),
        ("language", "whose language model is a GPTModel, not a Identity"),
        ("token", r"modality sound has no token; give it one \(special_token_ids\)"),
        ("shared", "an encoder's sequence_parallel or context_parallel_size is set"),
        ("size", r"pictures of \(8, 4\) pixels, the encoder takes \(8, 8\)"),
        ("places", "the microbatch has 10 images tokens for 1 instances that become 5"),
        ("mask", "can't cut a CLIPViTModel's attention_mask between pictures"),
        ("name", "the microbatch has clip for modality images, not vit"),
    ],
)
def test_what_cannot_be_is_refused(what, message):
    with pytest.raises(ProcessFailure, match=message):
        team(1).run(refused, what)


@on_cpu_ranks
@needs_megatron_training
def test_dip_trains_with_megatrons_losses(tmp_path):
    """A pretrain script under Megatron's loop: two ranks through ``dip run``, one without a pipeline, and one that goes
    on from where the two stopped."""
    script = Path(__file__).with_name("pretrain_mimo.py")

    def pretrain(name: str, ranks: int, *flags: str) -> dict[int, float]:
        launcher = ["-m", "dip_megatron.cli", "run"] if ranks > 1 else []
        command = [sys.executable, *launcher, str(script), "--pipeline-model-parallel-size", str(ranks), *flags]
        return train(name, command, tmp_path, lambda *_: None, ranks, forked).losses

    saved = str(tmp_path / "saved")
    ours = pretrain(
        "dip", 2, "--dip-schedule", "dynamic", "--save", saved, "--save-interval", "3", "--exit-interval", "3"
    )
    theirs = pretrain("whole", 1)
    assert sorted(ours) == [1, 2, 3]
    assert ours | {4: theirs[4]} == pytest.approx(theirs, rel=1e-5)
    assert pretrain("resumed", 1, "--load", saved) == pytest.approx({4: theirs[4]}, rel=1e-5)
    log = (tmp_path / "dip.rank1.log").read_text()
    assert "[dip] iteration 3" in log
    assert "can't defer weight gradients" not in log
