"""Mixtures of experts in segments: losses, every gradient and the routers' counts as under Megatron's own schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dip_megatron.compat.releases import version_numbers
from dip_megatron.core import Kind
from dip_megatron.core.strategies import known_strategies, strategy_names
from dip_megatron.planner.exchange_agreement import ExchangeReport
from tests.collectives import disagreement, reductions_before, stuck
from tests.processes import Team
from tests.runtime import coupled_llava_case, means_case
from tests.runtime.equal import assert_gradients_equal, assert_losses_equal
from tests.runtime.experts_case import ExpertsCase, Ranks, dips, dips_together, megatrons, own_loop
from tests.runtime.llava_case import Case
from tests.runtime.split_case import Drawn

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 1e-3}
SHARED = {
    "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.05,
    "moe_shared_expert_intermediate_size": 24, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}  # fmt: skip
PADDED = AUX | {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
SEGMENTS = ((1, 1), (0, 2))
"""Of four layers in two segments; a chunk without any."""
EVERYTHING = Drawn(3, 0.6, strategy_names())


def merged(answers):
    """Losses of the last stage, gradients and counts of all ranks; what several hold must agree."""
    losses: list[Any] = []
    grads: dict[Any, Any] = {}
    buffers: dict[Any, Any] = {}
    for own, more, counts, *_ in answers:
        losses += own
        for found, known in ((more, grads), (counts, buffers)):
            for name, value in found.items():
                if name in known:
                    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(known[name]), rtol=0, atol=0)
                known[name] = value
    return losses, grads, buffers


def assert_equal(theirs, ours):
    (their_losses, their_grads, their_counts), (our_losses, our_grads, our_counts) = theirs, ours
    assert_losses_equal(their_losses, our_losses, "lm loss")
    assert not [name for name, grad in their_grads.items() if not grad.abs().max() > 0]
    assert_gradients_equal(their_grads, our_grads, floor=0.0)
    assert our_counts == their_counts


@pytest.fixture(scope="module")
def pair():
    processes = Team(2)
    yield processes
    processes.close()


@pytest.mark.parametrize(
    "case",
    [ExpertsCase(3, options=AUX), ExpertsCase(3, experts=(1, 0, 1, 1), options=SHARED), ExpertsCase(3, options=PADDED)],
    ids=["aux loss", "shared experts and bias", "padded to capacity"],
)
def test_a_pipeline_equals_megatrons(pair, case):
    ranks = Ranks(pp=2)
    theirs = merged(pair.run(megatrons, ranks, case))
    assert_equal(theirs, merged(pair.run(dips, ranks, case, Drawn(1, 0.0))))
    ours = pair.run(dips, ranks, replace(case, layers=SEGMENTS), EVERYTHING)
    assert Kind.W in {kind for answer in ours for kind in answer[3]}
    assert_equal(theirs, merged(ours))


@pytest.mark.parametrize("case", [ExpertsCase(3, mtp=2, experts=(0, 0, 0, 0)), ExpertsCase(3, mtp=1, options=SHARED)])
def test_multi_token_prediction_equals_megatrons(pair, case):
    """With the head on the last chunk; its copy of the embedding gets the sum of both copies' gradients."""
    ranks = Ranks(pp=2)
    theirs = merged(pair.run(megatrons, ranks, case))
    assert any(name.startswith("mtp") for name, _ in theirs[1])
    assert_equal(theirs, merged(pair.run(dips, ranks, replace(case, layers=SEGMENTS), EVERYTHING)))


def test_frozen_experts_count_their_tokens_as_megatrons_do(pair):
    """Nothing trains in the first layer or before it, whose stage has no backward; its bias follows its tokens."""
    ranks = Ranks(pp=2)
    case = ExpertsCase(3, experts=(1, 0, 1, 1), options=SHARED, frozen=r"^embedding|layers\.0\.")
    theirs = merged(pair.run(megatrons, ranks, case))
    assert any(name.startswith("decoder.layers.0") and any(bias) for name, bias in theirs[2].items())
    answers = pair.run(dips, ranks, replace(case, layers=((1, 1), (1, 1))), Drawn(1, 0.0))
    assert_equal(theirs, merged(answers))


@pytest.fixture(scope="module")
def four():
    """Experts spread over, or doubled on, the two tensor-parallel ranks of each stage."""
    teams: dict[Ranks, Team] = {}
    yield lambda ranks: teams.setdefault(ranks, Team(4))
    for processes in teams.values():
        processes.close()


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(Ranks(pp=2, tp=2, ep=2), AUX), (Ranks(pp=2, tp=2, ep=2), SHARED), (Ranks(pp=2, tp=2), AUX)],
    ids=["EP 2, aux loss", "EP 2, shared experts and bias", "experts on each tensor-parallel rank"],
)
def test_expert_groups_within_a_replica_equal_megatrons(four, ranks, options):
    """With reductions over expert-data-parallel groups that overlap, backwards in two and layers recomputed."""
    if ranks.ep == 1 and version_numbers() < (0, 17):
        pytest.skip("under its own schedule, too, this release leaves ranks with other gradients of the same experts")
    case = ExpertsCase(3, options=options, overlap=True, mtp=ranks.ep - 1)
    team = four(ranks)
    theirs = merged(team.run(megatrons, ranks, case))
    assert_equal(theirs, merged(team.run(dips, ranks, replace(case, layers=SEGMENTS), EVERYTHING)))


def test_a_strategy_says_whether_it_exchanges_tokens_again(four):
    """What plans of replicas that share experts must agree on is what each strategy's backward does."""
    ranks, case = Ranks(pp=2, tp=2, ep=2), ExpertsCase(1, options=AUX)
    exchanges = {
        s: [
            [name for name, _ in answer[4]].count("all_to_all_single")
            for answer in four(ranks).run(dips, ranks, case, Drawn(1, 0.0, (s.name,)))
        ]
        for s in known_strategies()
    }
    kept = exchanges[known_strategies()[0]]
    assert all(kept)
    again = {s.name for s, counts in exchanges.items() if all(a > b for a, b in zip(counts, kept, strict=True))}
    assert again == {s.name for s in known_strategies() if s.exchanges_again}
    assert all(counts == kept for s, counts in exchanges.items() if s.name not in again)


LENGTHS = (16, 6, 12, 8, 14)


@pytest.mark.parametrize(
    "case",
    [
        ExpertsCase(4, options=AUX, lengths=LENGTHS, overlap=True),
        ExpertsCase(4, experts=(0, 0, 1, 1), options=SHARED, lengths=LENGTHS, mtp=1),
    ],
    ids=["aux loss", "shared experts, bias and multi-token prediction"],
)
def test_replicas_that_share_experts_equal_megatrons(four, case):
    """DP 2 x PP 2 with EP 2 across the replicas, on batches of other lengths: plans made together, with and without
    layers that are recomputed, and in Megatron's interleaved order, where the first chunk to be done is reduced between
    backwards of others."""
    ranks = Ranks(pp=2, ep=2)
    theirs = merged(four(ranks).run(megatrons, ranks, case))
    for seed, room, schedule in ((1, None, "dynamic"), (2, 0.28, "dynamic"), (1, None, "static")):
        answers = four(ranks).run(dips_together, ranks, replace(case, layers=SEGMENTS), seed, room, schedule)
        assert_equal(theirs, merged(answers))
        logs = [answer[4] for answer in answers]
        assert any(name == "all_to_all_single" for log in logs for name, _ in log)
        assert disagreement(logs) == stuck(logs) == ""
        if case.overlap and schedule == "static":
            assert all(reductions_before(log, "all_to_all_single") for log in logs[2:])  # those of the second stage
        recomputed = {kind for answer in answers for kind in answer[3] if isinstance(kind, str) and kind != "none"}
        assert bool(recomputed) == (room is not None) or case.mtp


GLOBAL = AUX | {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.5}


@pytest.mark.parametrize(
    ("ranks", "together"),
    [(Ranks(pp=2), False), (Ranks(pp=2, ep=2), True), (Ranks(pp=2), True)],
    ids=["one replica", "two that share experts", "two that share nothing else"],
)
def test_experts_balanced_over_an_iteration_equal_megatrons(pair, four, ranks, together):
    """Its loss takes the mean of tokens per expert over the microbatches so far, of all replicas: here in the order of
    the plan. Given these means, Megatron's own schedule has the same gradients; left alone, others."""
    case = ExpertsCase(4, options=GLOBAL, lengths=LENGTHS, mtp=1)
    team, segments = four(ranks) if together else pair, replace(case, layers=SEGMENTS)
    how = (dips_together, ranks, segments, 2, 0.28) if together else (dips, ranks, segments, EVERYTHING)
    answers, calls = zip(*team.run(means_case.recording, *how), strict=True)
    replicas = [means_case.of_replica(calls[r :: len(calls) // ranks.pp]) for r in range(len(calls) // ranks.pp)]
    means_case.check_means(replicas, case.microbatches)
    assert_equal(merged(team.run(means_case.megatrons, ranks, case, replicas)), merged(answers))
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal(merged(team.run(megatrons, ranks, case)), merged(answers))


def test_a_loop_of_ones_own_joins_replicas_by_what_its_models_config_says(four):
    """They share nothing but the loss over all of their tokens."""
    ranks, case = Ranks(pp=2), ExpertsCase(4, options=GLOBAL, lengths=LENGTHS)
    team = four(ranks)
    answers, calls = zip(*team.run(means_case.recording, own_loop, ranks, replace(case, layers=SEGMENTS)), strict=True)
    assert {answer[3] for answer in answers} == {2}
    replicas = [means_case.of_replica(calls[r::2]) for r in range(2)]
    means_case.check_means(replicas, case.microbatches)
    assert_equal(merged(team.run(means_case.megatrons, ranks, case, replicas)), merged(answers))


LLAVA = Case((7, 0, 1, 5, 3, 2), vision=((1, 1), (1, 0)), language=((1, 1), (1, 1)))
"""Three microbatches for each of two replicas."""


@pytest.mark.parametrize(
    "freeze", [(), ("vision_model",), ("vision_model", "vision_projection")], ids=["trained", "ViT", "ViT, projector"]
)
def test_replicas_with_encoders_of_their_own_equal_megatrons(pair_of_replicas, four, freeze):
    """Experts in the language model alone, which two replicas share; a frozen encoder has no backward to plan."""
    case = replace(LLAVA, freeze=freeze)
    theirs = merged(pair_of_replicas.run(coupled_llava_case.megatrons, case))
    answers = four(Ranks(pp=2, ep=2)).run(coupled_llava_case.dips, case, 1)
    assert_equal(theirs, merged(answers))
    logs = [answer[4] for answer in answers]
    assert disagreement(logs) == stuck(logs) == ""


def test_replicas_that_share_experts_exchange_for_alike_slots(pair_of_replicas, four):
    """Whoever trains which microbatch: the same losses, and the same gradients of all together."""
    case = replace(LLAVA, images=(7, 6, 7, 0, 1, 0))
    theirs = merged(pair_of_replicas.run(coupled_llava_case.megatrons, case))
    answers = four(Ranks(pp=2, ep=2)).run(coupled_llava_case.dips, case, 1, True)
    reports = [report for answer in answers for report in answer[3] if isinstance(report, ExchangeReport)]
    assert {(report.moved > 0, report.reason) for report in reports} == {(True, "")}
    losses, grads, counts = merged(answers)
    ordered = [sorted(side, key=lambda report: report["lm loss"][0].item()) for side in (theirs[0], losses)]
    assert_equal((ordered[0], *theirs[1:]), (ordered[1], grads, counts))


@pytest.fixture(scope="module")
def pair_of_replicas():
    processes = Team(2)
    yield processes
    processes.close()
