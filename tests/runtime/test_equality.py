"""Equality with Megatron's own schedules: the first test of everything that runs.

The reference is Megatron's real code: its PP1 run, and its 1F1B with the ViT on the first stage.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.drawn import settings
from tests.processes import team
from tests.runtime.dip_case import dip_run
from tests.runtime.equal import assert_gradients_equal, assert_losses_equal, merged
from tests.runtime.llava_case import Case, batch, llava_kwargs, reference


def assert_equal(case, theirs, ours, iteration=0):
    (their_losses, their_grads), (our_losses, our_grads) = theirs, ours
    our_losses = our_losses[iteration]
    assert len(our_losses) == len(case.images)
    assert_losses_equal(their_losses, our_losses, "lm loss")
    assert_gradients_equal(their_grads, our_grads)


def check(case: Case, world: int, seed: int = 0) -> None:
    theirs = merged(team(1).run(reference, case))
    ours = merged(team(world).run(dip_run, case, seed))
    assert_equal(case, theirs, ours)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    images=st.lists(st.sampled_from([0, 0, 1, 2, 3, 7]), min_size=1, max_size=5).map(tuple),
    unit_size=st.integers(1, 4),
    recompute=st.booleans(),
    per_token_loss=st.booleans(),
    segments=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_two_ranks_equal_one(images, unit_size, recompute, per_token_loss, segments, seed):
    case = Case(
        images, unit_size=unit_size, recompute=recompute, per_token_loss=per_token_loss,
        vision=((1, 1), (1, 1)) if segments else ((1, 2),), language=((1, 1), (2, 1)) if segments else ((2, 1),),
    )  # fmt: skip
    check(case, 2, seed)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 0, 5, 1, 2, 0), vision=((1, 1, 0, 1),), language=((1, 1, 1, 1),), unit_size=2),
        Case((0,), vision=((1, 1, 1, 1),), language=((1, 1, 1, 1), (1, 1, 1, 1))),
        Case((4, 2, 1), vision=((1, 1, 1, 1), (1, 1, 1, 1)), language=((1, 1, 1, 1),), micro_batch_size=2),
        Case((1, 2, 0), language=((1, 1, 1, 1),), vision=((1, 1, 1, 1),), micro_batch_size=2, rows=(3, 1, 2)),
    ],
    ids=[
        "uneven layers, chunk without layers",
        "one text-only microbatch",
        "two samples a microbatch",
        "as many samples as come",
    ],
)
def test_four_ranks_equal_one(case):
    check(case, 4)


@pytest.mark.parametrize(
    "freeze",
    [("vision_model",), ("language_model",), ("vision_model", "language_model"), ("vision_model", "vision_projection")],
)
def test_frozen_modules(freeze):
    check(Case((2, 0, 3), freeze=freeze), 2)


def test_packed_sequences():
    """packed_seq_params reach every stage of the language model, and its samples the planner."""
    check(Case((2, 0, 3), language=((1, 1), (1, 1)), packed=True), 2)


@pytest.mark.parametrize("packed", [False, True])
def test_ranks_in_the_middle_that_get_no_batch(packed):
    """Iterators on the first and the last rank, pixels on the first; attention within packed samples everywhere."""
    check(Case((2, 0, 3), vision=((1, 1, 0, 1), (1, 1, 1, 1)), language=((1, 1, 1, 1),), packed=packed, sparse=True), 4)


def test_outputs_that_stay_allocated():
    check(Case((2, 1, 0), deallocate=False), 2)


def test_equals_upstream_pipeline():
    """Megatron's own 1F1B on two ranks; its ViT stands on the first stage and its sequences are padded."""
    case = Case((2, 0, 3, 1, 4), vision=((1, 1),), language=((1, 1),))
    theirs = merged(team(2).run(reference, case))
    ours = merged(team(2).run(dip_run, case))
    assert_equal(case, theirs, ours)


def test_iterations_read_ahead_lose_no_batch():
    """Each of several iterations sees its own batches, although each next one is read and planned before."""
    case = Case((2, 0, 1))
    answers = team(2).run(dip_run, case, 0, 3)
    losses = answers[-1][0]
    for iteration in range(3):
        again = team(1).run(reference, case, iteration)[0][0]
        for a, b in zip(again, losses[iteration], strict=True):
            torch.testing.assert_close(b["lm loss"], a["lm loss"], rtol=1e-6, atol=1e-6)


def test_tile_tags():
    """Of the tiles of one image a microbatch, or of none, as Megatron knows them; embedded where the embedding is."""
    case = Case((3, 0, 1, 5), vision=((1, 1), (1, 1)), language=((0, 1), (1, 1)), tagged=True)
    check(case, 2)


def refused(rank: int, world: int) -> list[str]:
    from dip_megatron.families.llava.program import LlavaProgram
    from dip_megatron.runtime.protocol import MicrobatchInputs

    case = Case((2,), tagged=True)
    layers = {"vision": case.vision, "language": case.language}
    kwargs, hybrid = llava_kwargs(case, 1), llava_kwargs(case, 1)
    hybrid["language_transformer_config"].language_model_type = "nemotron5-hybrid-8b"
    program = LlavaProgram(kwargs, layers, rank=0)
    item = batch(0, 2, 1)
    several = program.bind(item["images"], item["tokens"], None, None, num_image_tiles=torch.tensor([1, 1]))
    said = []
    for call in (lambda: program.load(MicrobatchInputs(several)), lambda: LlavaProgram(hybrid, layers, rank=0)):
        with pytest.raises(ValueError) as error:  # noqa: PT011  what it says is compared below
            call()
        said.append(str(error.value))
    return said


def test_what_it_cannot_run_is_refused_with_a_reason():
    """Megatron's model knows tile tags for one image a batch."""
    (said,) = team(1).run(refused)
    assert said == [
        "Megatron's LLaVAModel knows tile tags for one image a microbatch, with num_image_tiles; this one has 2: leave "
        "the tags out, or give one image",
        "DIP can't segment hybrid (Mamba) language models; use --dip-schedule off",
    ]
