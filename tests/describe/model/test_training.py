"""What trains of a model as built: reports of ranks put together, compared with a description, and priced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.core import ModalityModule
from dip_megatron.describe.cost import CostModel, load_cluster, priced_graph
from dip_megatron.describe.model import (
    EVERY_PART,
    ChunkTraining,
    MultimodalModel,
    Partition,
    PartTraining,
    Training,
    TrainingMismatchError,
    even_partition,
    load_model,
)
from dip_megatron.describe.model.modules import TrainablePart
from dip_megatron.describe.model.training import check_replicas
from dip_megatron.describe.workload import Microbatch

CLUSTER = load_cluster("h100")
MODEL = load_model("vlm-s")
BATCH = (Microbatch(4000, (169,) * 12), Microbatch(8000), Microbatch(3000, (169,) * 20))
PARTITION = even_partition(MODEL, {"vision": 2, "language": 1}, {"vision": 12})


def built(model: MultimodalModel, partition: Partition, share: float = 1.0) -> Training:
    """What a model that is as described would report, ``share`` of the parameters of trained layers being trained."""
    lines = []
    for shape, part in zip(model.modules, partition.modules, strict=True):
        last = (part.segments - 1, partition.ranks - 1)

        def chunk(k: int, r: int, shape=shape, part=part, last=last) -> ChunkTraining:
            held = {"stem": (k, r) == (0, 0), "layers": part.layers[k][r] > 0, "head": (k, r) == last}
            shares = {"stem": 1.0, "layers": share, "head": 1.0}
            parts = {}
            for name in EVERY_PART:
                trained = name in shape.trainable and held[name]
                count = int(1000 * shares[name]) if trained else 0
                parts[name] = PartTraining(count, 1000 * held[name], f"a.{name}" if trained else "")
            return ChunkTraining(**parts)

        lines.append(
            (shape.name, tuple(tuple(chunk(k, r) for r in range(partition.ranks)) for k in range(part.segments)))
        )
    return Training(tuple(lines))


def trained(**parts: tuple[TrainablePart, ...]) -> MultimodalModel:
    return replace(MODEL, modules=tuple(replace(m, trainable=parts.get(m.name, m.trainable)) for m in MODEL.modules))


FROZEN = [{}, {"vision": ()}, {"vision": ("head",)}, {"language": ()}, {"vision": ("head",), "language": ()}]


@pytest.mark.parametrize("parts", FROZEN)
def test_a_model_as_described_is_priced_as_described(parts: dict) -> None:
    """Whether a graph is told what trains by a description or by the model, every number of it is the same."""
    model = trained(**parts)
    described = priced_graph(CostModel(model, CLUSTER), PARTITION, BATCH)
    followed = priced_graph(CostModel(MODEL, CLUSTER), PARTITION, BATCH, training=built(model, PARTITION))
    assert followed.modules == described.modules
    assert followed.strategies == described.strategies
    for name in (
        "forward",
        "backward",
        "weight",
        "fused",
        "activation",
        "deferred_activation",
        "transfer",
        "static_bytes",
    ):
        np.testing.assert_array_equal(getattr(followed, name), getattr(described, name), err_msg=name)


def test_adapters_cost_little() -> None:
    """A frozen base with a hundredth of its parameters beside it: backwards as before, W and state of a hundredth."""
    whole = priced_graph(CostModel(MODEL, CLUSTER), PARTITION, BATCH)
    adapters = priced_graph(
        CostModel(MODEL, CLUSTER), PARTITION, BATCH, training=built(trained(), PARTITION, share=0.01)
    )
    np.testing.assert_array_equal(adapters.backward, whole.backward)
    inner = [s for s in range(whole.virtual_microbatches) if whole.units[int(whole.unit_of[s])].module == "language"]
    np.testing.assert_allclose(adapters.weight[:, inner, 1], 0.01 * whole.weight[:, inner, 1])
    assert adapters.has_weight.all()
    assert (adapters.static_bytes < 0.6 * whole.static_bytes).all()


def test_a_description_says_less_than_the_model_is_refused() -> None:
    """The case in which all backward stages of the ViT used to be left out without a word."""
    with pytest.raises(TrainingMismatchError) as refusal:
        built(MODEL, PARTITION).against(trained(vision=()))
    message = str(refusal.value)
    assert message.startswith(
        "vision, segment 0 on pipeline rank 0: the description of the model calls its stem frozen, but in the model as "
        "built a.stem requires a gradient. "
    )
    assert "\n" not in message
    assert "--dip-schedule off" in message


def test_what_a_script_has_frozen_is_followed_and_told() -> None:
    assert built(MODEL, PARTITION).against(MODEL) == []
    (sentence,) = built(trained(vision=("head",)), PARTITION).against(MODEL)
    assert sentence.startswith("vision: nothing of its stem and layers trains in the model as built; plans follow")


def test_norms_don_t_contradict_a_description() -> None:
    """A ViT's last norm stands where its head does; a description of frozen heads doesn't mean it."""
    truth = built(trained(vision=("stem", "layers")), PARTITION)
    name, lines = truth.chunks[0]
    norm = replace(lines[-1][-1], head=PartTraining(10, 1000))
    truth = replace(truth, chunks=((name, (*lines[:-1], (*lines[-1][:-1], norm))), truth.chunks[1]))
    assert truth.against(trained(vision=("stem", "layers"))) == []


MODULES = (ModalityModule("vision", ((1, 1),)), ModalityModule("language", ((1, 1), (1, 1)), ("vision",)))
FREE = ChunkTraining(layers=PartTraining(5, 5, "w"))
STILL = ChunkTraining(layers=PartTraining(0, 5))


def test_reports_of_ranks_become_one() -> None:
    reports = [(1, (STILL, FREE, STILL)), (0, (FREE, FREE, FREE)), (1, (STILL, FREE, STILL))]
    training = Training.of(MODULES, reports)
    assert training.trainable("vision") == ((True, False),)
    assert training.trainable("language") == ((True, True), (True, False))


def test_tensor_parallel_ranks_must_agree() -> None:
    reports = [(0, (FREE, FREE, FREE)), (0, (FREE, STILL, FREE))]
    expected = r"language, segment 0 on pipeline rank 0: tensor-parallel ranks disagree .* layers: 5 elements"
    with pytest.raises(TrainingMismatchError, match=expected):
        Training.of(MODULES, reports)


def test_replicas_must_agree() -> None:
    same, other = (FREE, FREE, FREE), (FREE, FREE, STILL)
    check_replicas(MODULES, [(0, 0, same), (1, 0, other), (0, 0, same), (1, 0, other)])
    with pytest.raises(TrainingMismatchError, match="segment 1 on pipeline rank 1: data-parallel replicas disagree"):
        check_replicas(MODULES, [(0, 0, same), (1, 0, same), (0, 0, same), (1, 0, other)])
