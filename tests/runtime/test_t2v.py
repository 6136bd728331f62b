"""Text to video: losses and gradients of Megatron's own run, whatever the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind
from dip_megatron.core.strategies import strategy_names
from dip_megatron.describe.model import LatentEmbedding, Parallel
from tests.drawn import settings_of_ranks
from tests.processes import ProcessFailure, Team, team
from tests.runtime.equal import assert_gradients_equal, assert_losses_equal, merged
from tests.runtime.split_case import Drawn
from tests.runtime.t2v_case import LONG, LOSSES, SHORT, TALL, WIDE, T2vCase, dip_run, reference

MIXED = ((SHORT, LONG, WIDE), (TALL,), (WIDE, SHORT, TALL, LONG, SHORT))


def check(case: T2vCase, world: int, drawn: Drawn | None = None):
    """Equality with Megatron's PP1 run; what each rank ran."""
    answers = team(world).run(dip_run, case, drawn or Drawn())
    losses, grads = merged([a[:2] for a in answers])
    assert_equal(case, team(1).run(reference, case)[0], losses[0], grads)
    return [a[2] for a in answers]


def assert_equal(case, theirs, losses, grads):
    their_losses, their_grads, _ = theirs
    assert len(losses) == len(case.clips)
    assert_losses_equal(their_losses, losses)
    assert_gradients_equal(their_grads, grads)


@settings_of_ranks(10)
@given(
    clips=st.lists(
        st.lists(st.sampled_from([SHORT, LONG, WIDE, TALL]), min_size=1, max_size=5).map(tuple), min_size=1, max_size=3
    ).map(tuple),
    sizes=st.tuples(st.sampled_from([None, 1, 2, 3]), st.sampled_from([None, 1, 2])),
    segments=st.booleans(),
    freeze=st.sampled_from([(), (), ("text_encoder",), ("text_encoder", "text_projection")]),
    strategies=st.sets(st.sampled_from(strategy_names()), min_size=1).map(sorted).map(tuple),
    recompute=st.booleans(),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 1000),
)
def test_two_ranks_equal_one(clips, sizes, segments, freeze, strategies, recompute, loss, seed):
    language, diffusion = (((1, 1), (1, 0)), ((1, 1), (2, 1))) if segments else (((1, 2),), ((2, 1),))
    case = T2vCase(
        clips, language, diffusion, dict(zip(("language", "diffusion"), sizes, strict=True)), freeze, recompute, loss
    )
    check(case, 2, Drawn(seed, 0.6, ("none",) if recompute else strategies))


def test_four_ranks_equal_one():
    case = T2vCase(MIXED, ((1, 0, 1, 1),), ((1, 1, 1, 1), (1, 0, 1, 1)), {"language": 2, "diffusion": 2})
    check(case, 4, Drawn(5, 0.6, strategy_names()))


def test_a_frozen_text_encoder_has_no_backward():
    case = T2vCase(MIXED, freeze=("text_encoder", "text_projection"))
    for rank in check(case, 2, Drawn(1, 1.0)):
        assert {kind for module, kind in rank if module == "language"} == {Kind.F}
        assert {kind for module, kind in rank if module == "diffusion"} == {Kind.F, Kind.B, Kind.W}


def test_a_projector_alone_trains():
    case = T2vCase(MIXED, freeze=("text_encoder",))
    first, last = check(case, 2, Drawn(1, 1.0))
    assert {kind for module, kind in first if module == "language"} == {Kind.F}
    assert {kind for module, kind in last if module == "language"} == {Kind.F, Kind.B, Kind.W}


@pytest.mark.parametrize("trains", ["coin 1", "coin 2", "text_projection", r"diffusion.*layers\.1\.", "embedding"])
def test_what_a_script_froze_later(trains):
    check(T2vCase(MIXED, ((1, 1), (1, 0)), ((1, 1), (0, 1)), trains=trains), 2, Drawn(2, 0.6, strategy_names()))


def test_tensor_parallel_ranks_equal_one():
    """Each of two ranks has its shards of the weights, and their gradients."""
    case, pair = T2vCase(MIXED), Team(2)
    try:
        (losses, grads, splits), (_, others, _) = pair.run(reference, replace(case, tensor_parallel=2))
    finally:
        pair.close()
    assert any(split is not None for split in splits.values())
    for name, split in splits.items():
        if split is None:
            torch.testing.assert_close(grads[name], others[name], rtol=0, atol=1e-6 * float(grads[name].abs().max()))
        else:
            grads[name] = torch.cat([grads[name], others[name]], dim=split)
    assert_equal(case, team(1).run(reference, case)[0], losses, grads)


def test_evaluation():
    case = T2vCase(MIXED)
    losses = team(2).run(dip_run, case, Drawn(), True)[-1][0][0]
    assert_losses_equal(team(1).run(reference, case)[0][0], losses)


def described(rank, world):
    """Parameters of the planner's view and of the model, and the same for the patches of each clip."""
    from dip_megatron.families.describe import describe_t2v
    from dip_megatron.families.t2v.program import T2vProgram, TextToVideoModel
    from dip_megatron.runtime.protocol import MicrobatchInputs
    from tests.runtime.llava_case import initialize
    from tests.runtime.t2v_case import arguments, batches

    initialize(world)
    case = T2vCase(MIXED)
    view = describe_t2v(arguments(case, 1), {}, Parallel(1, 1, 1, False, False))
    left_out = ("bias", "final_layernorm.weight")  # and position tables
    real = sum(
        p.numel()
        for name, p in TextToVideoModel(**arguments(case, 1)).named_parameters()
        if not name.endswith(left_out) and "positions" not in name
    )
    lines = {"language": ((2,),), "diffusion": ((2,),)}
    program, stem = T2vProgram(arguments(case, 1), lines, rank=0), view.module("diffusion").stem
    assert isinstance(stem, LatentEmbedding)
    counted, patches = [], []
    for item in batches(case):
        counted += [
            (clip.text_tokens, clip.latent_tokens(stem.compression, stem.patch))
            for clip in program.load(MicrobatchInputs(program.bind(**item))).clips
        ]
        patches += [(n, x[0].numel() // 4) for n, x in zip(item["prompt_lengths"], item["latents"], strict=True)]
    return view.parameters, real, counted, patches


def test_the_planner_sees_the_model_as_it_is():
    said, real, counted, patches = team(1).run(described)[0]
    assert said == real
    assert counted == patches


def with_pipeline(rank, world):
    from dip_megatron.families.t2v.program import TextToVideoModel
    from tests.runtime.llava_case import initialize
    from tests.runtime.t2v_case import arguments

    initialize(world)
    TextToVideoModel(**arguments(T2vCase(MIXED), 2))


def test_a_pipeline_without_dip_is_refused():
    with pytest.raises(ProcessFailure, match=r"has no pipeline of its own: .* run it through DIP"):
        team(1).run(with_pipeline)
