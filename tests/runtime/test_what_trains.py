"""Whatever trains of a model, plans follow the model as built: losses and gradients of Megatron's own run of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind
from dip_megatron.core.strategies import strategy_names
from tests.drawn import settings_of_ranks
from tests.processes import ProcessFailure, team
from tests.runtime.equal import assert_gradients_equal, merged
from tests.runtime.gpt_case import GptCase
from tests.runtime.llava_case import Case
from tests.runtime.split_case import Drawn
from tests.runtime.trained_case import ALL, Trained, dip_run, reference

IMAGES = Case((2, 0, 3), vision=((1, 1), (1, 1)), language=((1, 1), (1, 1)))
PROJECTOR, LANGUAGE, ADAPTERS = r"^vision_projection", r"^language_model", r"adapter_"
SPLIT = Drawn(3, 0.7, strategy_names())


def check(trained: Trained, world: int = 2, drawn: Drawn = SPLIT):
    """Equality in every iteration; what each rank ran and sent in each, ``[rank][iteration]``."""
    theirs = team(1).run(reference, trained)[0]
    answers = team(world).run(dip_run, trained, drawn)
    for i, (their_losses, their_grads) in enumerate(theirs):
        losses, grads = merged([answer[i][:2] for answer in answers])
        assert len(losses) == len(their_losses)
        for ours, other in zip(losses, their_losses, strict=True):
            assert float(ours["lm loss"][0]) == pytest.approx(float(other["lm loss"][0]), rel=1e-6)
        assert_gradients_equal(their_grads, grads, where=f"iteration {i}, ")
    return answers


def kinds(answers, module: str, iteration: int = 0):
    """Kinds of the module's operations on any rank; where gradients were sent to."""
    ran = {kind for answer in answers for m, kind in answer[iteration][2] if m == module}
    return ran, {m for answer in answers for m in answer[iteration][3]}


def test_everything_frozen_but_the_projector():
    """It stands on the last rank's last vision chunk: before it nothing has a backward, the language model no W."""
    answers = check(Trained(IMAGES, (PROJECTOR,)))
    first, last = ([kind for m, kind in answer[0][2] if m == "vision"] for answer in answers)
    assert set(first) == {Kind.F}
    assert {Kind.F} < set(last)
    assert Kind.W not in kinds(answers, "language")[0]


def test_no_gradient_goes_to_a_frozen_encoder():
    answers = check(Trained(IMAGES, (LANGUAGE,)))
    vision, sent = kinds(answers, "vision")
    assert vision == {Kind.F}
    assert sent == {"language"}


@pytest.mark.parametrize("adapters", ["megatron", "torch", "other"])
@pytest.mark.parametrize("case", [IMAGES, GptCase(3, ((1, 1), (1, 1)))], ids=["llava", "gpt"])
def test_adapters_alone_train(case, adapters):
    """Two low-rank matrices beside each frozen linear of the attentions. W computes theirs if they are linears of
    Megatron's or of torch's; others get their gradients in B, and training would split no backward."""
    answers = check(Trained(case, (ADAPTERS,), adapters))
    assert Kind.W in kinds(answers, "language")[0]
    assert all(answer[0][4] for answer in answers) == (adapters != "other")


def test_layers_of_one_chunk_alone_train():
    """Of a module's chunks, each has a backward from the first trained one on, and weight gradients where it trains."""
    answers = check(Trained(GptCase(3, ((1, 1), (1, 1))), (r"layers\.2\.mlp",)), drawn=Drawn(1, 1.0))
    first, last = ([kind for _, kind in answer[0][2]] for answer in answers)
    assert [first.count(kind) for kind in (Kind.F, Kind.B, Kind.BW, Kind.W)] == [6, 3, 0, 3]
    assert [last.count(kind) for kind in (Kind.F, Kind.B, Kind.W)] == [6, 3, 0]


@settings_of_ranks(12)
@given(
    coin=st.integers(0, 1000),
    case=st.sampled_from([IMAGES, Case((0, 2), ((0, 1),), ((1, 2),)), GptCase(3, ((1, 2), (1, 0)), tied=False)]),
    strategies=st.sets(st.sampled_from(strategy_names()), min_size=1).map(sorted).map(tuple),
    adapters=st.sampled_from(["", "megatron", "torch"]),
    ddp=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_parameters_may_be_frozen(coin, case, strategies, adapters, ddp, seed):
    check(Trained(case, (f"{'module ' if ddp else ''}coin {coin}",), adapters, ddp), drawn=Drawn(seed, 0.6, strategies))


def test_what_trains_may_change_between_iterations():
    """As where a script thaws one module after the other, or freezes some again: the plan of the next iteration, made
    while this one ran, is then for another model and is made anew."""
    steps = (PROJECTOR, LANGUAGE, ALL, ALL, "^nothing$", PROJECTOR, r"^vision_model.*layers\.0\.")
    answers = check(Trained(IMAGES, steps))
    vision = [kinds(answers, "vision", i)[0] for i in range(len(steps))]
    assert vision[1] == vision[4] == {Kind.F}
    assert all(ran > {Kind.F} for i, ran in enumerate(vision) if i not in (1, 4))


def test_a_plan_that_leaves_out_what_trains_is_refused():
    """From wherever it comes: before its first action, on all ranks."""
    missing = "vision, segment 0 on pipeline rank 0 trains in the model as built, but the plan for iteration 1 has no"
    with pytest.raises(ProcessFailure, match=missing) as failure:
        team(2).run(dip_run, Trained(IMAGES, stubborn=True), SPLIT)
    assert str(failure.value).count(missing) == 2
    team(2).run(dip_run, Trained(IMAGES, (LANGUAGE,), stubborn=True), SPLIT)


def test_four_ranks():
    case = Case((3, 0, 2), vision=((1, 1, 0, 1),), language=((1, 1, 1, 1),))
    check(Trained(case, (PROJECTOR, "coin 7")), 4)
