"""Context parallelism in segments: losses and every gradient as without it, whatever the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dip_megatron.core import Kind
from dip_megatron.core.strategies import strategy_names
from tests.processes import Team, team
from tests.runtime import context_case, experts_case, llava_case, t2v_case, test_experts
from tests.runtime.equal import assert_gradients_equal
from tests.runtime.experts_case import ExpertsCase, Ranks
from tests.runtime.llava_case import Case
from tests.runtime.split_case import Drawn
from tests.runtime.t2v_case import LONG, SHORT, TALL, WIDE, T2vCase

DRAWN = Drawn(3, 0.6, strategy_names())


@pytest.fixture(scope="module")
def four():
    """Two stages of two context-parallel ranks, for models with groups of experts apart from those without."""
    teams: dict[object, Team] = {}
    yield lambda kind: teams.setdefault(kind, Team(4))
    for processes in teams.values():
        processes.close()


def reports(answers):
    """Of the last stage's two ranks, each of which has a share of every microbatch's tokens."""
    first, second = (answer[0] for answer in answers if answer[0])
    name = next(iter(first[0]))
    return [a[name] + b[name] for a, b in zip(first, second, strict=True)]


def assert_equal(theirs, answers):
    their_losses, their_grads = theirs[:2]
    name = next(iter(their_losses[0]))
    for a, b in zip(their_losses, reports(answers), strict=True):
        torch.testing.assert_close(b, a[name], rtol=1e-6, atol=1e-6)
    seen: dict[str, int] = {}
    for _, grads, *_ in answers:
        assert_gradients_equal({name: their_grads[name] for name in grads}, grads)
        for name in grads:
            seen[name] = seen.get(name, 0) + 1
    assert seen == dict.fromkeys(their_grads, 2)  # on both ranks of its stage
    assert Kind.W in {kind for answer in answers for kind in answer[2]}
    assert any("all_gather" in name and len(who) == 2 for answer in answers for name, who in answer[3])


VISION, LANGUAGE = ((1, 1), (0, 1)), ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("case", "encoded"),
    [
        (Case((3, 0, 2), VISION, LANGUAGE, text=13, rotary=True, per_token_loss=True, unit_size=3), [3, 2]),
        (Case((2, 1), text=10, micro_batch_size=2, per_token_loss=True, unit_size=1), [6, 6]),
        (Case((3, 0, 2), VISION, LANGUAGE, packed=4, rotary=True, per_token_loss=True, unit_size=2), None),
    ],
    ids=["a length that doesn't divide", "two samples", "packed samples"],
)
def test_llava_equals_one_rank(four, case, encoded):
    """Each rank encodes a share of a unit's images: of three two and one, of one it or, for nobody, the same."""
    theirs = team(1).run(llava_case.reference, case)[0]
    answers = four("dense").run(context_case.llava, replace(case, context=2), DRAWN)
    assert_equal(theirs, answers)
    if encoded is not None:
        assert [answer[4] for answer in answers[:2]] == encoded


CLIPS = ((SHORT, LONG, WIDE), (TALL,), (WIDE, SHORT, TALL, LONG, SHORT))
VIDEO = T2vCase(CLIPS, ((1, 1), (1, 0)), ((1, 1), (2, 1)), {"language": 2, "diffusion": 2})


def test_text_to_video_equals_one_rank(four):
    """Clips of 4 to 12 patches, which two ranks can't share evenly, in parts of microbatches."""
    theirs = team(1).run(t2v_case.reference, VIDEO)[0]
    assert_equal(theirs, four("dense").run(context_case.t2v, VIDEO, DRAWN))


def test_velocities_of_whole_clips(four):
    answers = four("dense").run(context_case.t2v, replace(VIDEO, unit_size={}), Drawn(1, 0.0), True)
    expected = team(1).run(context_case.velocities, VIDEO)[0]
    for found in (answer[0] for answer in answers if answer[0]):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours["velocities"], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [Ranks(pp=2, cp=2), Ranks(pp=2, cp=2, ep=2)], ids=["EP 1", "EP 2"])
def test_experts_over_context_parallel_ranks_equal_megatrons(four, ranks):
    """A group of experts that is the context-parallel ranks of one stage couples no replicas."""
    options = test_experts.AUX | {"calculate_per_token_loss": True}
    case = ExpertsCase(3, options=options, lengths=(16, 8, 12))
    processes = four(ranks)
    theirs = test_experts.merged(processes.run(experts_case.megatrons, ranks, case))
    ours = processes.run(experts_case.dips, ranks, replace(case, layers=test_experts.SEGMENTS), DRAWN)
    test_experts.assert_equal(theirs, test_experts.merged(ours))
