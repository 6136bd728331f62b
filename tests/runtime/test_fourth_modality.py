"""A modality from outside the package trains on ranks as Megatron trains the whole model."""

from __future__ import annotations

import pytest

from dip_megatron.core import Kind
from dip_megatron.core.strategies import strategy_names
from tests.examples.three_modules_case import LONG, SHORT, SMALL, WIDE, Held, ThreeModuleCase, reference
from tests.processes import team
from tests.runtime.equal import assert_gradients_equal, assert_losses_equal, merged
from tests.runtime.points_case import points_run
from tests.runtime.split_case import Drawn

HELD = (Held((SMALL, WIDE), (SHORT, LONG, SHORT), 5), Held((), (LONG,), 3), Held((SMALL,), (), 4))


@pytest.mark.parametrize("each", [1, 2, None])
def test_two_ranks_equal_one(each):
    segments = ((1, 1), (1, 1))
    case = ThreeModuleCase(
        HELD, audio=segments, language=segments, unit_size={"vision": 1, "audio": each, "language": None}
    )
    answers = team(2).run(points_run, case, Drawn(4, 0.6, strategy_names()))
    losses, grads = merged([a[:2] for a in answers])
    their_losses, their_grads = team(1).run(reference, case)[0]
    assert_losses_equal(their_losses, losses[0])
    assert_gradients_equal(their_grads, grads)
    clouds = {1: 4, 2: 3, None: 2}[each]
    for rank in answers:
        assert rank[2].count(("audio", Kind.F)) == 2 * clouds
