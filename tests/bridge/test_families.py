"""Each family's tiny model: DIP's losses and gradients are those of the class under Megatron's own schedules, its
logits those of Hugging Face's model, and weights go in and out bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dip_megatron.core.strategies import strategy_names
from tests.bridge import equality, loop
from tests.bridge.equality import Case, together
from tests.bridge.loop import Run
from tests.bridge.tiny import TINY
from tests.bridge.tiny_model import Tiny
from tests.drawn import DEEP
from tests.processes import Team, team

SEED = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp(name)
        TINY[name].save(made)
        return made

    return folder


def partitions(tiny: Tiny) -> dict[str, dict[str, Any]]:
    """One segment, several with chunks of no layers among them, and encoders whole on every rank."""
    rest, half = tiny.vision_layers - 2, tiny.language_layers // 2
    cuts: dict[str, dict[str, Any]] = {
        "one": {"vision": ((1, tiny.vision_layers - 1),), "language": ((half, half),)},
        "several": {"vision": ((0, 2), (rest, 0)), "language": ((0, 1), (1, tiny.language_layers - 2))},
    }
    if tiny.name.startswith("qwen3-5"):  # multi-token prediction on a chunk without layers of its own
        cuts["one"]["language"] = ((tiny.language_layers, 0),)
    cuts["replicated"] = {"vision": ((tiny.vision_layers,) * 2,), "language": ((1, 1), (0, tiny.language_layers - 2))}
    if tiny.audio_layers:
        cuts["replicated"]["audio"] = ((tiny.audio_layers,) * 2,)
        cuts["one"]["audio"] = ((1, tiny.audio_layers - 1),)
        cuts["several"]["audio"] = ((1, 0), (1, tiny.audio_layers - 2))
    return cuts


@pytest.fixture(scope="module")
def alone(folders: Any) -> Any:
    @cache
    def found(name: str, frozen: tuple[str, ...] = ()) -> Any:
        case = Case(name, folders(name), {}, seed=SEED, frozen=frozen)
        return team(1).run(equality.megatrons, case)[0]

    return found


OUTPUT = "language_model.output_layer.weight"
"""A tied head has a copy of its own where the pipeline ends."""


def assert_equal(found: Any, expected: Any, output: str = OUTPUT) -> None:
    """Losses and every gradient; ``output`` is what the class calls its head's weight."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=3e-6)
    assert found[1].keys() - {output} == expected[1].keys() - {output}
    for name, gradient in expected[1].items():
        off = float((found[1][name] - gradient).abs().max())
        assert off <= 2e-5 * max(float(gradient.abs().max()), 1e-4), f"{name}: {off} of {gradient.abs().max()}"


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("cut", ["one", "several", "replicated"])
def test_segments_train_as_the_class_does(name: str, cut: str, folders: Any, alone: Any) -> None:
    """In several segments also under every memory strategy."""
    unit, strategies = (2, strategy_names()) if cut == "several" else (1, ("none",))
    case = Case(name, folders(name), partitions(TINY[name])[cut], unit_size=unit, seed=SEED, strategies=strategies)
    ranks = team(2).run(equality.dips, case)
    assert_equal((ranks[-1][0], together([r[1] for r in ranks])), alone(name))
    saved = load_file(folders(name) / "model.safetensors")
    for exported in (r[2] for r in ranks):
        assert saved.keys() <= exported.keys()
        for key, weight in saved.items():
            assert torch.equal(exported[key], weight), key


SHARED = [
    pytest.param("qwen3-vl", {}, id="qwen3-vl"),
    pytest.param("qwen3-vl", {"packed": True}, id="qwen3-vl packed"),
    pytest.param("kimi-k2-5", {}, id="kimi-k2-5"),
    pytest.param("qwen3-omni", {}, id="qwen3-omni"),
    pytest.param("qwen3-5-vl", {"given": {"mtp_num_layers": None}}, id="qwen3-5-vl"),
]
if DEEP:
    SHARED += [pytest.param(name, {}, id=name) for name in ("ministral3-vl", "qwen2-5-omni")]
    SHARED += [pytest.param("qwen3-vl-moe", {"packed": True}, id="qwen3-vl-moe packed")]
    linear = {"mtp_num_layers": None, "deterministic_mode": False}  # Megatron's own rule takes no packed samples
    SHARED += [pytest.param("qwen3-5-vl", {"packed": True, "given": linear}, id="qwen3-5-vl packed")]


@pytest.fixture(scope="module")
def four() -> Any:
    made = Team(4)
    yield made
    made.close()


@pytest.mark.parametrize(("name", "given"), SHARED)
def test_context_parallel_ranks_train_as_one(name: str, given: dict[str, Any], folders: Any, four: Team) -> None:
    """Two stages of two ranks that share each sequence, deepstack features, packed samples and the states of gated
    delta nets too."""
    cut = partitions(TINY[name])["several"]
    case = Case(name, folders(name), cut, unit_size=2, seed=SEED, by_token=True, **given)
    alone = team(1).run(equality.megatrons, case)[0]
    ranks = four.run(equality.dips, replace(case, context=2))
    shares = torch.stack([torch.stack(r[0]) for r in ranks if r[0]])
    assert len(shares) == 2
    torch.testing.assert_close(shares.sum(dim=0), torch.stack(alone[0]), rtol=1e-6, atol=1e-5)
    for r in (0, 1):  # each rank of both stages
        assert_equal(([], together([ranks[r][1], ranks[2 + r][1]])), ([], alone[1]))


@pytest.mark.skipif(not DEEP, reason="only in a deep run")
def test_what_context_parallel_ranks_predict_is_what_the_class_does(folders: Any, four: Team) -> None:
    """Megatron counts the tokens of the loss of multi-token prediction on each rank: two have not what one has."""
    cut = partitions(TINY["qwen3-5-vl"])["several"]
    case = Case("qwen3-5-vl", folders("qwen3-5-vl"), cut, seed=SEED, by_token=True, context=2)
    found, expected = four.run(equality.dips, case), four.run(equality.megatrons, case)
    for r in (0, 1):
        ours, theirs = ((ranks[2 + r][0], together([ranks[r][1], ranks[2 + r][1]])) for ranks in (found, expected))
        torch.testing.assert_close(torch.stack(ours[0]), torch.stack(theirs[0]), rtol=1e-6, atol=1e-5)
        assert_equal(([], ours[1]), ([], theirs[1]))
    (alone,) = team(1).run(equality.megatrons, replace(case, context=1))
    with pytest.raises(AssertionError):
        assert_equal(([], ours[1]), ([], alone[1]))


FROZEN = [
    pytest.param("qwen3-vl", ("vision_model",), id="vision_model"),
    pytest.param("qwen3-vl", ("vision_model", "vision_projection"), id="vision_model vision_projection"),
    pytest.param("qwen3-vl", ("language_model",), id="language_model"),
    pytest.param("gemma3-vl", ("vision_model", "language_model"), id="vision_model language_model"),
    pytest.param("qwen3-5-vl", ("vision_projection",), id="vision_projection"),
    pytest.param("kimi-k2-5", ("vision_model",), id="kimi-k2-5 vision_model"),
    pytest.param(
        "qwen3-5-vl-moe", ("vision_model", "language_model"), id="qwen3-5-vl-moe vision_model language_model"
    ),  # as recipes of pretraining have it
]


@pytest.mark.parametrize("cut", ["several", "replicated"])
@pytest.mark.parametrize(("name", "frozen"), FROZEN)
def test_frozen_parts_stay_so(name: str, frozen: tuple[str, ...], cut: str, folders: Any, alone: Any) -> None:
    """What is left to train has the class's gradients, under every memory strategy."""
    layers = partitions(TINY[name])[cut]
    strategies = ("none", "full", "selective", "mlp")
    case = Case(name, folders(name), layers, seed=SEED, frozen=frozen, strategies=strategies)
    ranks = team(2).run(equality.dips, case)
    assert_equal((ranks[-1][0], together([r[1] for r in ranks])), alone(name, frozen))


@pytest.mark.parametrize("name", TINY)
def test_megatrons_two_stages_train_so_too(name: str, folders: Any, alone: Any) -> None:
    ranks = team(2).run(equality.megatrons, Case(name, folders(name), {}, seed=SEED))
    assert_equal((ranks[-1][0], together([r[1] for r in ranks])), alone(name))


COPIED = ("qwen3-vl", "qwen2-5-omni")
"""Of which encoders also stand on both ranks in Bridge's loop, as those of Qwen2.5-VL do in test_training: the steps of
these give pixels to ranks in other ways."""


@pytest.mark.parametrize("name", [name for name in TINY if not name.endswith("-tied")])
def test_bridges_finetune_gives_the_same_under_dip(name: str, folders: Any) -> None:
    """From the saved folder, on two ranks, without DIP and with it: losses, norms of gradients, weights. A loss that
    balances experts over the whole batch, as Bridge asks of Qwen3.5-VL, goes by the order of microbatches, which is
    the loop's own under a static schedule."""
    balance, schedule = ("global_aux_loss", "static") if name == "qwen3-5-vl-moe" else ("", "dynamic")

    def run(dip: dict[str, Any] | None) -> list[dict[str, Any]]:
        ranks = Team(2)  # of their own: Bridge initialises a process once
        how = Run(tiny=name, pipeline=2, finetunes=True, dip=dip, balance=balance)
        try:
            return ranks.run(loop.trained, folders(name), how)
        finally:
            ranks.close()

    several = partitions(TINY[name])["several"]
    cuts = [{module: {"layers": layers} for module, layers in several.items()}]
    if name in COPIED:
        whole = {module: {"placement": "replicated", "unit_size": 1} for module in several if module != "language"}
        cuts.append({**whole, "language": {"layers": several["language"]}})
    off = run(None)
    for modules in cuts:
        under = run({"schedule": schedule, "modules": modules, "planner_workers": 0})
        assert len(under[1]["losses"]) == 3
        torch.testing.assert_close(under[1]["losses"], off[1]["losses"], rtol=0, atol=3e-6)
        torch.testing.assert_close(under[1]["norms"], off[1]["norms"], rtol=3e-5, atol=0)
        assert under[0]["weights"].keys() == off[0]["weights"].keys()
        for key, weight in off[0]["weights"].items():
            torch.testing.assert_close(under[0]["weights"][key], weight, rtol=0, atol=1e-5)


IN_SHARES: dict[str, dict[str, Any]] = {
    "kimi-k2-5": {"experts": 2}, "ministral3-vl": {}, "qwen2-5-omni": {}, "qwen3-omni": {}, "qwen3-5-vl": {},
}  # fmt: skip
PROJECTION = {"frozen": ("language_model", "vision_model")}


@pytest.mark.parametrize(
    ("name", "shared", "bridges"),
    [
        ("qwen3-vl-moe", {"experts": 2}, {"experts": 2}),
        ("qwen3-vl-moe", {"experts": 2, **PROJECTION}, PROJECTION),
        ("glm-4-5v", {"experts": 2}, {"experts": 2}),
        ("kimi-k2-5", {"experts": 2}, {"experts": 2}),
        ("qwen3-omni", {"experts": 2}, {"experts": 2}),
        ("qwen3-5-vl-moe", {"experts": 2}, {"experts": 2}),
        ("qwen3-5-vl-moe", {"experts": 2, "tensor": 2}, {"experts": 2, "tensor": 2}),
        ("qwen3-vl", {"context": 2}, {"context": 2}),
        ("qwen3-vl", {"context": 2, "packed": True}, {"context": 2, "packed": True}),
        ("qwen2-5-vl", {"tensor": 2}, {"tensor": 2}),
        *[(name, {"context": 2, **more}, {"context": 2, **more}) for name, more in IN_SHARES.items() if DEEP],
    ],
    ids=[
        "experts", "frozen experts", "glm-4-5v", "kimi-k2-5", "qwen3-omni", "qwen3-5-vl-moe", "qwen3-5-vl-moe matrices",
        "sequences", "packed", "images", *[f"sequences of {name}" for name in IN_SHARES if DEEP],
    ],
)  # fmt: skip
def test_two_ranks_of_a_stage_that_share_train_as_under_bridge(
    name: str, shared: dict[str, Any], bridges: dict[str, Any], folders: Any
) -> None:
    """Two replicas of two stages spread the experts of each layer over both: plans are made for them together. Or one
    replica's two ranks of each stage share every sequence, or each sample of a row; or, tensor-parallel, the images.
    Frozen experts of a microbatch without images are compared with those of replicas that share none: Bridge's own
    schedule leaves their backward out, and with it their part of the other replica's."""

    def run(dip: dict[str, Any] | None, how: dict[str, Any]) -> list[dict[str, Any]]:
        ranks = Team(4)
        try:
            return ranks.run(loop.trained, folders(name), Run(tiny=name, pipeline=2, finetunes=True, dip=dip, **how))
        finally:
            ranks.close()

    modules = {module: {"layers": layers} for module, layers in partitions(TINY[name])["several"].items()}
    off, under = run(None, bridges), run({"schedule": "dynamic", "modules": modules, "planner_workers": 0}, shared)
    assert len(under[-1]["losses"]) == 3
    torch.testing.assert_close(under[-1]["losses"], off[-1]["losses"], rtol=0, atol=3e-6)
    torch.testing.assert_close(under[-1]["norms"], off[-1]["norms"], rtol=3e-5, atol=0)
    for key, weight in off[0]["weights"].items():
        torch.testing.assert_close(under[0]["weights"][key], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_hugging_face(name: str, folders: Any) -> None:
    tiny = TINY[name]
    case = Case(name, folders(name), partitions(tiny)["several"], seed=SEED)
    ours = team(2).run(equality.dips, case, True)[-1]
    (theirs,) = team(1).run(equality.hugging_face, case)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tiny.tolerance)
