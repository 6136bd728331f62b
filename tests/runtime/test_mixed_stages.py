"""Static stages over all modalities give what Megatron's own run of the model gives, under every static order."""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes import team
from tests.runtime import gpt_case, t2v_case, test_gpt, test_t2v
from tests.runtime.gpt_case import GptCase
from tests.runtime.llava_case import Case, reference
from tests.runtime.mixed_case import mixed_run
from tests.runtime.t2v_case import LONG, SHORT, TALL, WIDE, T2vCase
from tests.runtime.test_equality import assert_equal

IMAGES = (2, 0, 3, 1)
CLIPS = ((SHORT, LONG, WIDE), (TALL,), (WIDE, SHORT), (LONG,))


def merged(answers):
    losses = next(a[0] for a in answers if a[0][0])
    grads: dict[str, Any] = {}
    for _, own in answers:
        for name, grad in own.items():
            grads[name] = grads.get(name, 0) + grad
    return losses, grads


def check(world, order, cuts, transport="gloo"):
    layers = [sum(c[i] for c in cuts) for i in (0, 1)]
    case = Case(IMAGES, vision=((layers[0],),), language=((layers[1],),), deallocate=True)
    theirs = merged([(lambda a: ([a[0]], a[1]))(a) for a in team(1).run(reference, case)])
    ours = merged(team(world).run(mixed_run, case, cuts, order, transport))
    assert_equal(case, (theirs[0][0], theirs[1]), ours)


@pytest.mark.parametrize("transport", ["gloo", "ipc", "staging"])
@pytest.mark.parametrize(
    ("order", "cuts"),
    [
        ("1f1b", [(2, 1), (0, 1)]),
        ("zb-h1", [(2, 0), (0, 2)]),
        ("interleaved", [(1, 0), (1, 0), (0, 1), (0, 2)]),
        ("zb-v", [(1, 0), (1, 1), (0, 1), (0, 1)]),
    ],
)
def test_two_ranks(order, cuts, transport):
    check(2, order, cuts, transport)


@pytest.mark.parametrize(
    ("order", "cuts"),
    [
        ("1f1b", [(2, 0), (1, 0), (1, 1), (0, 2)]),
        ("interleaved", [(1, 0), (1, 0), (1, 0), (1, 1), (0, 1), (0, 1), (0, 1), (0, 1)]),
    ],
)
def test_four_ranks(order, cuts):
    check(4, order, cuts)


def check_clips(world, order, cuts, **options):
    text, diffusion = (((sum(cut[i] for cut in cuts),),) for i in (0, 1))
    case = T2vCase(CLIPS, text, diffusion, **options)
    losses, grads = merged(team(world).run(mixed_run, case, cuts, order))
    test_t2v.assert_equal(case, team(1).run(t2v_case.reference, case)[0], losses[0], grads)


@pytest.mark.parametrize(
    ("world", "order", "cuts"),
    [
        (2, "1f1b", [(2, 1), (0, 1)]),
        (2, "zb-h1", [(2, 0), (0, 2)]),
        (2, "interleaved", [(1, 0), (1, 0), (0, 1), (0, 2)]),
        (2, "zb-v", [(1, 0), (1, 1), (0, 1), (0, 1)]),
        (4, "1f1b", [(2, 0), (1, 0), (1, 1), (0, 2)]),
    ],
)
def test_text_to_video(world, order, cuts):
    check_clips(world, order, cuts)


@pytest.mark.parametrize("loss", ["sum and count", "mean"])
def test_other_losses_of_clips(loss):
    check_clips(2, "zb-v", [(1, 0), (1, 1), (0, 1), (0, 1)], loss=loss)


@pytest.mark.parametrize(
    "options",
    [
        {"freeze": ("text_encoder",)}, {"freeze": ("text_encoder", "text_projection")}, {"trains": "coin 1"},
        {"trains": "embedding"}, {"trains": r"diffusion.*layers\.1\."},
    ],
)  # fmt: skip
def test_text_to_video_of_which_parts_train(options):
    """What a stage hands on unchanged has a gradient only where something before it trains."""
    check_clips(2, "zb-v", [(1, 0), (1, 1), (0, 1), (0, 1)], **options)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"micro_batch_size": 2, "per_token_loss": True}])
def test_a_gpt_in_a_v(world, options):
    case = GptCase(5, ((1,) * (2 * world),), **options)
    losses, grads = merged(team(world).run(mixed_run, case, [(1,)] * (2 * world), "zb-v"))
    theirs = team(1).run(gpt_case.megatrons, case, False)
    test_gpt.assert_equal(test_gpt.merged(theirs, case), (losses[0], grads), 5)
