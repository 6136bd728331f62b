"""Drawn sets of joint plans run on four ranks: they end, their collectives come in one order, reductions among them,
and losses and gradients are those of Megatron's own schedule."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from dip_megatron.core.strategies import strategy_names
from tests.collectives import disagreement, reductions_before, stuck
from tests.drawn import DEEP, FACTOR
from tests.processes import Team, team
from tests.runtime.equal import TOLERANCE
from tests.runtime.joint_sets_case import BLOCK, CUTS, megatrons, run_sets

COUNT = 22 * FACTOR


@pytest.mark.hypothesis
def test_drawn_sets_end_and_equal_megatrons(tmp_path):
    """1,100 in a deep run, drawn anew."""
    file = tmp_path / "parts.pt"
    (everything,) = team(1).run(megatrons, file)
    first = random.SystemRandom().randrange(2**31) if DEEP else 0
    ran: set[str] = set()
    early = 0
    compared: dict[int, set[str]] = defaultdict(set)
    four = Team(4)
    try:
        for begin in range(first, first + COUNT, BLOCK):
            seeds = list(range(begin, min(begin + BLOCK, first + COUNT)))
            answers = four.run(run_sets, file, seeds, TOLERANCE, timeout=1800.0)
            assert [fault for answer in answers for fault in answer[0]] == []
            for seed, logs in zip(seeds, zip(*(answer[1] for answer in answers), strict=True), strict=True):
                assert disagreement(logs) == stuck(logs) == "", f"set {seed}"
                early += sum(reductions_before(log, "all_to_all_single") for log in logs)
                assert any(name == "all_to_all_single" for log in logs for name, _ in log), f"set {seed}"
            for *_, kinds, names in answers:
                ran |= kinds
                for cut, own in names.items():
                    compared[cut] |= own
    finally:
        four.close()
    assert ran >= {"F", "B", "W", "BW", *strategy_names()}
    assert early > 0
    assert len(compared) == len(CUTS)
    for cut, names in compared.items():
        assert names == {name for name in everything if not name.startswith(CUTS[cut].freeze)}
