"""Static stages over both modalities give what Megatron's own run of the model gives, under every static order."""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes import team
from tests.runtime.llava_case import Case, reference
from tests.runtime.mixed_case import mixed_run
from tests.runtime.test_equality import assert_equal

IMAGES = (2, 0, 3, 1)


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
