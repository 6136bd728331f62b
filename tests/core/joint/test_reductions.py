"""Starts of reductions in joint plans: behind all gradients of all replicas, and never in a ring of waits, whatever
other groups of replicas do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, ModalityModule, OperationGraph, Plan, Reduce, Unit
from dip_megatron.core.codes import first_reduction
from dip_megatron.core.errors import CouplingError
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.files import PlanFileError, format_plan, parse_plan
from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.order import Schedule
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.reductions import starts_reductions
from dip_megatron.core.verify import PlanError, verify, verify_replica
from tests.core.joint.drawn_sets import BW, B, Drawn, F, W, drawn_set
from tests.core.joint.machine import Machine
from tests.core.joint.test_verify import verdict
from tests.drawn import settings

seeds = st.integers(0, 2**32 - 1)


def planned(drawn: Drawn) -> PlanSet:
    return make_plan_set(drawn.graphs, drawn.schedules, drawn.experts, lower_bound=0.0)


def with_codes(joint: PlanSet, g: int, p: int, codes: list[int]) -> PlanSet:
    plan = joint.plans[g]
    lines = tuple(np.array(codes, dtype=np.int32) if q == p else line for q, line in enumerate(plan.codes))
    return PlanSet(tuple(replace(plan, codes=lines) if h == g else x for h, x in enumerate(joint.plans)))


# -- any group, beside any other ---------------------------------------------------------------------------------------
@settings(100, deadline=None)
@given(seeds, seeds)
def test_groups_that_plan_apart_end_together(seed, other):
    """Each of two sets passes by itself; together they run although reductions, which are of all replicas, keep every
    rank from what follows."""
    drawn = drawn_set(seed)
    one, two = planned(drawn), planned(drawn_set(other, like=drawn))
    for joint in (one, two):
        assert verdict(joint) is None
        assert Machine(joint.plans, joint.experts, in_order=True).run() == "ends"
    if starts_reductions(one.plans[0]) and starts_reductions(two.plans[0]):
        both = Machine((*one.plans, *two.plans), one.experts, size=len(one.plans))
        assert both.run() == "ends"


def shifted(joint: PlanSet, seed: int) -> PlanSet:
    """Some reductions elsewhere: those of a rank from one on, or that one alone, on one replica anywhere, or on all
    before the same one of what they do together."""
    rng = np.random.default_rng(seed)
    p, first = int(rng.integers(joint.plans[0].graph.ranks)), [first_reduction(plan.graph) for plan in joint.plans]
    count = int((joint.plans[0].codes[p] >= first[0]).sum())
    if not count:
        return joint
    number, place = int(rng.integers(count)), float(rng.random())
    several, everywhere = rng.random() < 0.7, rng.random() < 0.6
    for g in range(len(joint.plans)) if everywhere else [int(rng.integers(len(joint.plans)))]:
        graph = joint.plans[g].graph
        line, rows, meets = joint.plans[g].codes[p].tolist(), graph.virtual_microbatches, joint.experts.meets(graph)
        taken = [i for i, c in enumerate(line) if c >= first[g]][number : None if several else number + 1]
        codes = [line[i] for i in taken]
        line = [c for i, c in enumerate(line) if i not in taken]
        reductions = [i for i, c in enumerate(line) if c >= first[g]]
        behind = reductions[number - 1] + 1 if number and several else 0  # those that stay come first
        places = [
            i for i, c in enumerate(line)
            if i >= behind and (c >= first[g] or (c < 4 * rows and c // rows != W and meets[c % rows, p]))
        ] if everywhere else list(range(behind, len(line)))  # fmt: skip
        at = [*places, len(line)][int(place * (len(places) + 1))]
        joint = with_codes(joint, g, p, [*line[:at], *codes, *line[at:]])
    return joint


@settings(200, deadline=None)
@given(seeds, seeds)
def test_the_verifier_says_what_a_run_would(seed, fault):
    joint = shifted(planned(drawn_set(seed)), fault)
    assert (verdict(joint) is None) == (Machine(joint.plans, joint.experts, in_order=True).run() == "ends")


def test_drawn_faults_are_of_every_kind():
    found = Counter(verdict(shifted(planned(drawn_set(seed)), seed)) for seed in range(200))
    assert min(found[kind] for kind in (None, "plan", "cycle")) >= 10, found


# -- by name -----------------------------------------------------------------------------------------------------------
MODULES = (ModalityModule("text", ((1, 1),)), ModalityModule("image", ((1, 1),), ("text",)))
"""Texts alone: what makes images of them waits for no gradient."""


def plan_of(rank0: list[tuple[int, int]], rank1: list[tuple[int, int]]) -> tuple[OperationGraph, Schedule]:
    """Of two microbatches; each rank's (kind, microbatch)."""
    shape = (1, 2, 2)
    graph = OperationGraph(
        ranks=2, modules=MODULES, units=tuple(Unit(m, "text", m) for m in range(2)), forward=np.ones(shape),
        backward=np.ones(shape), weight=np.ones(shape), fused=2 * np.ones(shape), activation=np.ones(shape),
        deferred_activation=np.zeros(shape), transfer=np.zeros(2), static_bytes=np.zeros(2),
        memory_limit=np.full(2, np.inf),
    )  # fmt: skip
    orders = tuple(np.array([k * 2 + m for k, m in line], dtype=np.int32) for line in (rank0, rank1))
    return graph, Schedule(orders, np.zeros((2, 2), dtype=np.int8))


def two(*replicas: tuple[OperationGraph, Schedule]) -> PlanSet:
    graphs, schedules = zip(*replicas, strict=True)
    return planned(Drawn(graphs, schedules, ExpertLayers.every(MODULES, ["text"])))


TURNS = [(F, 0), (BW, 0), (F, 1), (BW, 1)]


def lines(joint: PlanSet, g: int = 0) -> list[list[str]]:
    """Of replica ``g``, what its ranks do but for messages."""
    return [[str(a) for a in line if not hasattr(a, "message")] for line in joint.plans[g].actions]


def moved(joint: PlanSet, text: str, before: str, replicas: tuple[int, ...] = (0, 1)) -> PlanSet:
    """With the reduction ``text`` before an action, or at the end."""
    for g in replicas:
        p = int(text[-1])
        actions, line = [str(a) for a in joint.plans[g].actions[p]], joint.plans[g].codes[p].tolist()
        code = line.pop(actions.index(text))
        actions.remove(text)
        line.insert(actions.index(before) if before else len(line), code)
        joint = with_codes(joint, g, p, line)
    return joint


def test_a_reduction_starts_when_all_replicas_have_all_gradients_of_its_chunk():
    """The second replica leaves a weight gradient to the end, so that its first one's last backward isn't enough; and
    nothing of what makes images has any."""
    split = [(F, 0), (B, 0), (F, 1), (BW, 1), (W, 0)]
    joint = two(plan_of(TURNS, TURNS), plan_of(TURNS, split))
    start = ["reduce image.0@1"]
    assert lines(joint)[1] == [*start, *(f"{k}:text.0#{m}@1" for k, m in named(TURNS)), "reduce text.0@1"]
    assert lines(joint, 1)[1] == [*start, *(f"{k}:text.0#{m}@1" for k, m in named(split)), "reduce text.0@1"]
    alone = two(plan_of(TURNS, TURNS), plan_of(TURNS, TURNS))
    assert lines(alone)[0][-2:] == ["BW:text.0#1@0", "reduce text.0@0"]


def named(line: list[tuple[int, int]]) -> list[tuple[str, int]]:
    return [(Kind(k).name, m) for k, m in line]


def condition_of(joint: PlanSet) -> tuple[str, str]:
    with pytest.raises(CouplingError) as caught:
        verify(*joint.plans)
    return caught.value.condition, str(caught.value)


def test_a_reduction_before_a_gradient_is_caught_by_name():
    joint = moved(two(*[plan_of(TURNS, TURNS)] * 2), "reduce text.0@1", "BW:text.0#1@1", (1,))
    condition, message = condition_of(joint)
    assert condition == "plan"
    assert message.startswith("replica 1: rank 1, action")
    assert "(reduce text.0@1): starts before BW:text.0#1@1 has added its gradient" in message


def test_a_reduction_at_another_place_of_one_replica_is_caught_by_name():
    joint = moved(two(*[plan_of(TURNS, TURNS)] * 2), "reduce image.0@1", "BW:text.0#0@1", (1,))
    assert condition_of(joint) == (
        "reduction",
        "pipeline rank 1, event 0: replica 0 runs [reduce image.0@1] where replica 1 runs F:text.0#0@1: ranks would "
        "come to their collectives in two orders and hang",
    )


def test_a_ring_of_groups_is_caught_in_the_set_that_closes_it():
    """On rank 0 one group reduces before the forwards that rank 1 needs before it does. By itself it ends. A group that
    reduces on rank 1 first, and on rank 0 behind what needs that, would wait for it, and it for that group."""
    whole = two(*[plan_of(TURNS, TURNS)] * 2)
    one = moved(whole, "reduce image.0@1", "BW:text.0#0@1")
    other = moved(whole, "reduce image.0@0", "BW:text.0#0@0")
    assert Machine(one.plans, one.experts).run() == Machine(other.plans, other.experts).run() == "ends"
    assert Machine((*one.plans, *other.plans), one.experts, size=2).run() == "hangs"
    verify(*other.plans)
    condition, message = condition_of(one)
    assert condition == "cycle"
    assert message == (
        "each plan ends alone, all together don't: replica 0, rank 0 at reduce image.0@0 waits for replica 0, rank 1 "
        "at wait_irecv F:text.0#0@0>F:text.0#0@1, which waits for replica 0, rank 0 at reduce image.0@0"
    )


def test_what_one_plan_lacks_is_named():
    whole = two(*[plan_of(TURNS, TURNS)] * 2).plans[0]
    first = first_reduction(whole.graph)

    def fault(line: list[int], plan: Plan = whole) -> str:
        with pytest.raises(PlanError) as caught:
            verify_replica(replace(plan, codes=(np.array(line, dtype=np.int32), plan.codes[1])))
        return str(caught.value)

    line = whole.codes[0].tolist()
    assert fault([c for c in line if c != first]) == "rank 0: never starts reduce text.0@0"
    assert "(reduce text.0@0): is started twice" in fault([*line, first])
    swapped = [{first: first + 1, first + 1: first}.get(c, c) for c in line]
    assert fault(swapped).endswith("(reduce text.0@0): reduce image.0@0 comes before it, in the order of all replicas")
    assert fault(line, replace(whole, coupled=None)).endswith(
        "(reduce image.0@0): only plans of replicas that run together say where reductions start"
    )
    without = replace(whole, codes=tuple(line[line < first] for line in whole.codes))
    verify_replica(without)  # they start at the end
    assert whole.coupled is not None
    with pytest.raises(CouplingError, match=r"replica 0 runs .* where replica 1") as caught:
        verify(whole, replace(without, coupled=replace(whole.coupled, replica=1)))
    assert caught.value.condition == "reduction"


def test_reductions_travel_in_files():
    plan = two(*[plan_of(TURNS, TURNS)] * 2).plans[0]
    line = format_plan(plan)
    assert '"reduce image.0@0"' in line
    assert parse_plan(line).digest() == plan.digest()
    assert sum(isinstance(a, Reduce) for a in parse_plan(line).actions[1]) == 2
    for text, reason in (
        ("reduce sound.0@0", "actions: rank 0, action 0: reduce sound.0@0: the model has no such chunk"),
        ("reduce image.0@1", "actions: rank 0, action 0 .*: is rank 1's"),
        ("reduce image", r"actions\[0\]\[0\]: not a chunk: 'image'"),
    ):
        with pytest.raises(PlanFileError, match=reason):
            parse_plan(line.replace("reduce image.0@0", text))
