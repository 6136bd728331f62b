"""The joint verifier passes a set of plans exactly when all replicas end together with gradients of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, ModalityModule, OperationGraph, Plan, Unit
from dip_megatron.core.errors import CouplingError
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.order import Schedule
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.verify import verify, verify_replica
from tests.core.joint.drawn_sets import BW, B, Drawn, F, W, drawn_set, plans_of, with_fault, with_order
from tests.core.joint.machine import Machine
from tests.drawn import settings

seeds = st.integers(0, 2**32 - 1)


def verdict(joint: PlanSet) -> str | None:
    """The condition that the joint verifier finds broken."""
    try:
        verify(*joint.plans)
    except CouplingError as error:
        return error.condition
    return None


@settings(100, deadline=None)
@given(seeds)
def test_a_set_that_ran_passes(seed):
    joint = plans_of(drawn_set(seed))
    assert joint is not None
    assert Machine(joint.plans, joint.experts).run() == "ends"
    assert verdict(joint) is None


@settings(200, deadline=None)
@given(seeds, seeds)
def test_the_verifier_says_what_a_run_would(seed, fault):
    """10,000 drawn sets in a deep run. What one plan lacks by itself is :func:`verify_replica`'s business."""
    joint = plans_of(with_fault(drawn_set(seed), fault))
    if joint is None:
        return
    found = verdict(joint)
    if found == "plan":
        assert any(faulty(plan) for plan in joint.plans)
        return
    assert (Machine(joint.plans, joint.experts).run() == "ends") == (found is None)


def faulty(plan: Plan) -> bool:
    try:
        verify_replica(plan)
    except ValueError:
        return True
    return False


def test_drawn_faults_are_of_every_kind():
    """The property above would say little if the faults it draws were all alike."""
    found: dict[str | None, int] = {}
    for seed in range(150):
        joint = plans_of(with_fault(drawn_set(seed), seed))
        if joint is not None:
            what = verdict(joint)
            found[what] = found.get(what, 0) + 1
    assert set(found) >= {None, "order", "recompute", "pairing", "cycle"}, found
    assert found[None] >= 15, found


# -- the wrong cases by name: two replicas of two microbatches --------------------------------------------------------
def two_replicas(orders: list[list[list[tuple[int, int]]]], names: list[list[list[str]]] | None = None) -> PlanSet:
    """Plans of a model of one module with a chunk a rank, or two where rows have (segment) pairs; ``orders[g][p]`` are
    (kind, microbatch)."""
    ranks = len(orders[0])
    modules = (ModalityModule("text", ((1,) * ranks,)),)
    graphs, schedules = [], []
    for g, lines in enumerate(orders):
        count = 1 + max(m for _, m in lines[0])
        shape = (1, count, ranks)
        texts = names[g] if names else [["none"] * ranks] * count
        graphs.append(
            OperationGraph(
                ranks=ranks, modules=modules, units=tuple(Unit(m, "text", m) for m in range(count)),
                forward=np.ones(shape), backward=np.ones(shape), weight=np.ones(shape), fused=2 * np.ones(shape),
                activation=np.ones(shape), deferred_activation=np.zeros(shape), transfer=np.zeros(count),
                static_bytes=np.zeros(ranks), memory_limit=np.full(ranks, np.inf),
                strategies=tuple(tuple((n,) for n in line) for line in texts),
            )
        )  # fmt: skip
        coded = tuple(np.array([k * count + m for k, m in line], dtype=np.int32) for line in lines)
        schedules.append(Schedule(coded, np.zeros((count, ranks), dtype=np.int8)))
    joint = plans_of(Drawn(tuple(graphs), tuple(schedules), ExpertLayers.every(modules, ["text"])))
    assert joint is not None
    return joint


def message_of(joint: PlanSet) -> tuple[str, str]:
    with pytest.raises(CouplingError) as caught:
        verify(*joint.plans)
    assert Machine(joint.plans, joint.experts).run() != "ends"
    return caught.value.condition, str(caught.value)


def test_another_order_is_caught_by_name():
    one = [[(F, 0), (F, 1), (BW, 0), (BW, 1)]]
    other = [[(F, 0), (BW, 0), (F, 1), (BW, 1)]]
    condition, message = message_of(two_replicas([one, other]))
    assert condition == "order"
    assert "pipeline rank 0, event 1: replica 0 runs F:text.0#1@0 where replica 1 runs BW:text.0#0@0" in message


def test_another_recompute_is_caught_by_name():
    line = [[(F, 0), (BW, 0)]]
    condition, message = message_of(two_replicas([line, line], [[["none"]], [["full:1"]]]))
    assert condition == "recompute"
    assert "event 1: replica 0 runs BW:text.0#0@0 where replica 1 runs BW:text.0#0@0" in message
    assert "'none' and 'full:1'" in message


@pytest.mark.parametrize("other", ["offload:1", "activation:1", "none"])
def test_what_repeats_no_collective_is_free(other):
    line = [[(F, 0), (BW, 0)]]
    verify(*two_replicas([line, line], [[["selective:1"]], [[other]]]).plans)


def test_another_pairing_is_caught_by_name():
    one = [[(F, 0), (F, 1), (BW, 0), (BW, 1)]]
    other = [[(F, 0), (F, 1), (BW, 1), (BW, 0)]]
    condition, message = message_of(two_replicas([one, other]))
    assert condition == "pairing"
    assert "event 2: replica 0 runs BW:text.0#0@0 where replica 1 runs BW:text.0#1@0" in message


def test_which_microbatches_meet_and_what_is_split_is_free():
    one = [[(F, 0), (F, 1), (BW, 0), (BW, 1)]]
    other = [[(F, 1), (F, 0), (B, 1), (W, 1), (B, 0), (W, 0)]]
    verify(*two_replicas([one, other]).plans)


def test_a_backward_that_only_one_replica_has_is_caught():
    frozen = two_replicas([[[(F, 0), (BW, 0)]], [[(F, 0), (BW, 0)]]])
    graph = frozen.plans[1].graph
    still = replace(graph, modules=(replace(graph.modules[0], trainable=((False,),)),))
    drawn = Drawn(
        (frozen.plans[0].graph, still),
        (frozen.plans[0].schedule, Schedule((np.array([0], dtype=np.int32),), np.zeros((1, 1), dtype=np.int8))),
        frozen.experts,
    )
    joint = plans_of(drawn)
    assert joint is not None
    condition, message = message_of(joint)
    assert condition == "order"
    assert "replica 0 runs BW:text.0#0@0 where replica 1 has ended" in message


def test_a_cycle_of_plans_that_end_alone_is_caught_by_name():
    """Vision stages have no experts, text stages have."""
    modules = (ModalityModule("vision", ((1, 1),)), ModalityModule("text", ((1, 1),), ("vision",)))
    units = (
        Unit(0, "vision", 0, 0, 1, (1,)), Unit(1, "text", 0),
        Unit(2, "vision", 1, 0, 1, (3,)), Unit(3, "text", 1),
    )  # fmt: skip
    shape = (1, 4, 2)
    graph = OperationGraph(
        ranks=2, modules=modules, units=units, forward=np.ones(shape), backward=np.ones(shape), weight=np.ones(shape),
        fused=2 * np.ones(shape), activation=np.ones(shape), deferred_activation=np.zeros(shape),
        transfer=np.zeros(4), static_bytes=np.zeros(2), memory_limit=np.full(2, np.inf),
    )  # fmt: skip
    experts = ExpertLayers.every(modules, ["text"])
    text, vision = {0: 1, 1: 3}, {0: 0, 1: 2}

    def orders(first: list[int], second: list[int], turns: list[int]) -> Schedule:
        """``first`` and ``second``: forwards of the ranks; ``turns``: text microbatches of rank 1 as they run there."""
        back = [[text[1], text[0]], [text[m] for m in turns]]
        lines = [
            forwards + [BW * 4 + s for s in (*texts, vision[0], vision[1])]
            for forwards, texts in zip((first, second), back, strict=True)
        ]
        return Schedule(tuple(np.array(o, dtype=np.int32) for o in lines), np.zeros((4, 2), dtype=np.int8))

    # On rank 1, replica 0 runs text of its second microbatch first: it needs the second event of rank 0. Replica 1 has
    # the first event of rank 1 before the vision stage that its second event of rank 0 needs.
    one = orders([0, 2, 1, 3], [0, 2, 3, 1], [1, 0])
    other = orders([0, 2, 1, 3], [0, 1, 2, 3], [0, 1])
    drawn = Drawn((graph, graph), (one, other), experts)
    joint = plans_of(drawn)
    assert joint is not None
    condition, message = message_of(joint)
    assert condition == "cycle", message
    assert message.startswith("each plan ends alone, all together don't: replica")
    assert "waits for" in message


def test_sets_that_do_not_fit_together_are_refused():
    line = [[(F, 0), (BW, 0)]]
    joint = two_replicas([line, line])
    for plans, reason in (
        ((), "has none"),
        (joint.plans[:1], "says it is replica 0's of 2"),
        (joint.plans[::-1], "says it is replica 1's of 2"),
        ((joint.plans[0], replace(joint.plans[1], coupled=None)), "doesn't say which replicas it is coupled with"),
        ((joint.plans[0], two_replicas([line * 2, line * 2]).plans[1]), "experts in other layers"),
    ):
        with pytest.raises(CouplingError, match=reason) as caught:
            verify(*plans)
        assert caught.value.condition == "size"
    with pytest.raises(CouplingError, match=r"2 pipeline ranks, replica 0 has 1"):
        verify(joint.plans[0], two_replicas([line * 2, line * 2]).plans[1], experts=joint.experts)
    with pytest.raises(CouplingError, match="expert layers of 'audio': the model has text"):
        verify(*joint.plans, experts=ExpertLayers.of({"audio": [[[True]]]}))


def test_a_plan_that_fails_alone_is_named_with_its_replica():
    line = [[(F, 0), (BW, 0)]]
    joint = two_replicas([line, line])
    broken = Drawn((joint.plans[0].graph, joint.plans[1].graph), tuple(p.schedule for p in joint.plans), joint.experts)
    broken = with_order(broken, 1, 0, [0])
    plans = plans_of(broken)
    assert plans is not None
    with pytest.raises(CouplingError, match=r"replica 1: rank 0: B:text.0#0@0 is missing") as caught:
        verify(*plans.plans)
    assert caught.value.condition == "plan"


def test_digests_tell_sets_apart():
    line = [[(F, 0), (BW, 0)]]
    one, other = two_replicas([line, line]), two_replicas([line, [[(F, 0), (B, 0), (W, 0)]]])
    assert one.digest() != other.digest()
    assert one.plans[0].digest() != one.plans[1].digest()
    assert one.plans[0].digest() != replace(one.plans[0], coupled=None).digest()
    assert one.digest() == two_replicas([line, line]).digest()
    assert Kind.F == F
