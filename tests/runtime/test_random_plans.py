"""A thousand random plans end, and compute what the dependencies say, whatever the network may do to them."""

from __future__ import annotations

import pytest

from tests.processes import team
from tests.runtime.delayed_case import run_plans


@pytest.mark.parametrize(("world", "count"), [(2, 700), (4, 300)])
def test_results_are_those_of_the_plain_order(tmp_path, world, count):
    wrong = team(world).run(run_plans, str(tmp_path), list(range(1000 * world, 1000 * world + count)))
    assert wrong == [[]] * world
