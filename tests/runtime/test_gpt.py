"""A text-only GPT in segments: equality with Megatron's own runs of it, its interleaved schedule among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dip_megatron.core.strategies import strategy_names
from dip_megatron.runtime.protocol import MicrobatchInputs
from tests.drawn import settings
from tests.processes import team
from tests.runtime.equal import assert_gradients_equal, assert_losses_equal
from tests.runtime.gpt_case import GptCase, gpt_kwargs, megatrons
from tests.runtime.split_case import Drawn, Wrap, split_run

DDP = Wrap(ddp=True)


def merged(answers, case):
    """Losses of the last rank; gradients of all ranks, whose copies of a tied table must agree."""
    grads: dict[str, Any] = {}
    for _, own in answers:
        for name, grad in own.items():
            tied = case.tied and name == "output_layer.weight"
            key = "embedding.word_embeddings.weight" if tied else name
            if key in grads:
                torch.testing.assert_close(grad, grads[key], rtol=0, atol=0)
            grads[key] = grad
    return answers[-1][0], grads


def assert_equal(theirs, ours, count):
    (their_losses, their_grads), (our_losses, our_grads) = theirs, ours
    assert len(our_losses) == count
    assert_losses_equal(their_losses, our_losses, "lm loss")
    assert all(grad.abs().max() > 0 or "linear_qkv.bias" in name for name, grad in their_grads.items())
    assert_gradients_equal(their_grads, our_grads)


def reference(case, world=1, virtual=False):
    return merged(team(world).run(megatrons, case, virtual), case)


def ours(case, world, drawn, wrap=DDP):
    return merged([(losses[0], grads) for losses, grads, _ in team(world).run(split_run, case, drawn, wrap)], case)


@settings(
    max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
)  # fmt: skip
@given(
    case=st.builds(
        GptCase,
        microbatches=st.integers(1, 5),
        layers=st.sampled_from([((1, 2),), ((2, 0), (1, 1)), ((1, 1), (1, 1), (1, 1))]),
        micro_batch_size=st.integers(1, 2),
        tied=st.booleans(),
        rotary=st.booleans(),
        recompute=st.booleans(),
        per_token_loss=st.booleans(),
    ),
    strategies=st.sets(st.sampled_from(strategy_names()), min_size=1).map(sorted).map(tuple),
    wrap=st.sampled_from([DDP, Wrap(ddp=True, overlap=True), Wrap(ddp=True, overlap=True, fused=True)]),
    seed=st.integers(0, 1000),
)
def test_two_ranks_equal_one(case, strategies, wrap, seed):
    """Any order, any backwards in two, any memory strategies of any layers."""
    assert_equal(reference(case), ours(case, 2, Drawn(seed, 0.6, strategies), wrap), case.microbatches)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_megatrons_interleaved_schedule(tied):
    case = GptCase(4, ((1, 1), (1, 1)), tied=tied)
    theirs = reference(case, 2, virtual=True)
    assert_equal(theirs, ours(case, 2, Drawn(3, 0.6, ("none", "full"))), 4)
    assert_equal(theirs, reference(case), 4)


def test_equals_megatrons_1f1b():
    case = GptCase(3, ((2, 1),), tied=True, rotary=True)
    even = GptCase(3, ((2, 2),), tied=True, rotary=True)
    assert_equal(reference(even, 2), ours(GptCase(3, ((1, 1), (1, 1)), tied=True, rotary=True), 2, Drawn(1, 1.0)), 3)
    assert_equal(reference(case), ours(case, 2, Drawn(1, 1.0)), 3)


def test_four_ranks_equal_one():
    case = GptCase(3, ((1, 0, 1, 1), (1, 1, 1, 0)), tied=True)
    assert_equal(reference(case), ours(case, 4, Drawn(2, 0.6, strategy_names())), 3)


def test_as_many_samples_a_microbatch_as_come():
    case = GptCase(4, ((1, 1), (1, 1)), micro_batch_size=2, rows=(3, 1, 2, 1))
    assert_equal(reference(case), ours(case, 2, Drawn(4, 0.6)), 4)


def test_packed_sequences():
    """Attention within each sample on every stage, and samples as the planner prices them."""
    case = GptCase(3, ((1, 1), (1, 1)), rotary=True, packed=True)
    assert_equal(reference(case), ours(case, 2, Drawn(5, 0.6)), 3)


def refusals(rank, world):
    """What GptProgram says to models and calls that it can't run."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from dip_megatron.families.gpt.program import GptProgram

    def said(make):
        try:
            make()
        except ValueError as error:
            return str(error)
        return ""

    kwargs, layers = gpt_kwargs(GptCase(1), 2), {"language": ((1, 1),)}
    program = GptProgram(kwargs, layers, rank=0)
    shared = GptProgram(kwargs | {"config": replace(kwargs["config"], context_parallel_size=2)}, layers, rank=0)
    ids = torch.zeros(2, 3, dtype=torch.long)
    return [
        said(lambda: GptProgram(kwargs, {"language": ((1, 2),)}, rank=0)),
        said(lambda: GptProgram(kwargs | {"transformer_layer_spec": TransformerBlockSubmodules()}, layers, rank=0)),
        said(lambda: GptProgram(kwargs | {"config": replace(kwargs["config"], mtp_num_layers=1)}, layers, rank=0)),
        said(lambda: shared.bind(ids, ids, None, packed_seq_params=object())),
        said(lambda: program.load(MicrobatchInputs(program.bind(None, None, None)))),
    ]


def test_what_it_cannot_run_is_refused_with_a_reason():
    reasons = ["3 layers", "list 0 of 2 layers", "no mtp_block_spec", "packed", "no tokens"]
    for reason, text in zip(reasons, team(1).run(refusals)[0], strict=True):
        assert reason in text
