"""Every kind of call of the schedule: the same as Megatron-Core's own, or one line before any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.marks import on_cpu_ranks
from tests.megatron.call_case import MICROBATCHES, calls, nested, refusals, replaced_afterwards, unfinished
from tests.processes import ProcessFailure, Team

RANKS = 2
pytestmark = on_cpu_ranks


@pytest.fixture(scope="module")
def processes() -> Iterator[Team]:
    """Of their own: DIP is installed in them."""
    team = Team(RANKS)
    yield team
    team.close()


def test_each_call_gives_what_megatrons_own_schedule_does(processes: Team) -> None:
    expected = processes.run(calls, False)
    ours = processes.run(calls, True)
    for own, theirs in zip(ours, expected, strict=True):
        assert own.keys() == theirs.keys()
        for name in own:
            torch.testing.assert_close(own[name], theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    last: dict[str, Any] = ours[-1]
    assert len(last["two values"]["losses"]) == MICROBATCHES
    assert [len(last[f"an evaluation of {n} microbatches"]) for n in ("fewer", "more")] == [2, 9]
    assert [logits.dim() for logits in last["inference"]] == [3, 3, 3]
    assert ours[0]["inference"] == []


def test_what_cannot_be_followed_is_refused_before_a_step_and_costs_none(processes: Team) -> None:
    for said in processes.run(refusals):
        assert "in another order, or with one of them twice" in said["order"]
        assert "in another order, or with one of them twice" in said["twice"]
        assert "called with 1 chunks, of which DIP built 1; it has built 2" in said["part"]
        assert "called with 2 chunks, of which DIP built 1; it has built 2" in said["mixed"]
        assert f"of which {MICROBATCHES} microbatches have been read ahead" in said["shared by two models"]
        assert "read_ahead: false" in said["shared by two models"]
        assert not any("\n" in line for line in said.values())


def test_a_loop_whose_functions_have_not_reached_the_chunks_stops(processes: Team) -> None:
    for line in processes.run(unfinished):
        assert "finalize_model_grads_func" in line
        assert "--dip-schedule off" in line


@pytest.mark.parametrize(
    ("own", "words"),
    [(True, "is called while it runs"), (False, "the schedule of another model is called from within")],
)
def test_nested_calls_stop(own: bool, words: str) -> None:
    with pytest.raises(ProcessFailure, match=words):
        Team(RANKS).run(nested, own)


def test_a_schedule_that_another_package_puts_in_dips_place_runs_none_of_its_chunks() -> None:
    with pytest.raises(ProcessFailure, match=r"is run without DIP's schedule: .* or from another package"):
        Team(RANKS).run(replaced_afterwards)
