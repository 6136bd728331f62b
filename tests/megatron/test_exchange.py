"""Replicas that exchange drawn microbatches train as under Megatron-Core's own schedule: DP 2 x PP 2, DP 4 x PP 1."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.drawn import settings
from tests.marks import on_cpu_ranks
from tests.megatron.exchange_case import ITERATIONS, MICROBATCHES, Job, slow_cluster, trains
from tests.processes import Team

pytestmark = on_cpu_ranks


@pytest.fixture(scope="module", params=[1, 2], ids=["DP 4 x PP 1", "DP 2 x PP 2"])
def replicas(request: pytest.FixtureRequest) -> Iterator[tuple[int, Team]]:
    """Pipeline ranks of a replica, and processes whose parallel state is laid out so."""
    team = Team(4)
    yield request.param, team
    team.close()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clusters") / "slow.yaml"
    path.write_text(slow_cluster())
    return str(path)


@pytest.fixture(scope="module")
def moves() -> Iterator[list[bool]]:
    """Whether anything moved, example by example: in some draws no exchange makes the slowest replica faster."""
    found: list[bool] = []
    yield found
    assert sum(found) >= 0.9 * len(found)


@pytest.mark.parametrize("by_tokens", [False, True], ids=["means", "weighted by tokens"])
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(sharded=st.booleans(), mode=st.sampled_from(["swap", "free"]), seed=st.integers(0, 1000))
def test_losses_gradients_and_samples_stay_what_they_were(
    replicas: tuple[int, Team], slow: str, moves: list[bool], by_tokens: bool, sharded: bool, mode: str, seed: int
) -> None:
    """With and without a distributed optimizer whose reductions overlap; a loop's random states, too."""
    stages, team = replicas
    job = Job(stages, by_tokens, sharded, seed)
    plain = team.run(trains, job, "", slow)
    ours = team.run(trains, job, mode if by_tokens else "swap", slow)
    for with_it, without in zip(ours, plain, strict=True):
        assert with_it.losses == pytest.approx(without.losses, rel=1e-5)
        assert with_it.norms == pytest.approx(without.norms, rel=1e-5)
        assert with_it.lengths == without.lengths
        assert with_it.random == without.random
    assert len(ours[0].moved) == ITERATIONS - 1  # what is read first stays where it is
    moves.append(any(ours[0].moved))
    if mode == "swap" or not by_tokens:
        assert ours[-1].counts == [MICROBATCHES] * ITERATIONS
