"""Which tensors get a gradient: what the shapes of a family say, and what trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.core import ModalityModule, OperationGraph, Unit
from dip_megatron.describe.workload import Clip, Microbatch
from dip_megatron.families.shared.shapes import DIFFUSION, LANGUAGE, T2vShapes
from dip_megatron.planner.maker import payloads

LOADS = (Microbatch(clips=(Clip(5, 4, 32, 32),)),)
SHAPES = T2vShapes(24, 32, (4, 8, 8), (1, 2, 2), "float32")
ENCODER, TRANSFORMER = ModalityModule(LANGUAGE, ((1, 1),)), ModalityModule(DIFFUSION, ((1, 1),), (LANGUAGE,))
UNITS = (Unit(0, LANGUAGE, 0, downstream=(1,)), Unit(1, DIFFUSION, 0))


@pytest.mark.parametrize(
    ("encoder", "within", "condition"),
    [((), True, True), (((False, True),), True, True), (((False, False),), False, False)],
    ids=["all train", "the projector trains", "a frozen encoder"],
)
def test_the_condition_of_a_frozen_encoder_gets_no_gradient(encoder, within, condition):
    """Nor on its way through the transformer, which trains and hands it on."""
    second = np.ones((1, 2, 2))
    graph = OperationGraph(
        ranks=2,
        modules=(replace(ENCODER, trainable=encoder), TRANSFORMER),
        units=UNITS,
        forward=second,
        backward=second,
        weight=second,
        fused=2 * second,
        activation=second,
        deferred_activation=second,
        transfer=np.zeros(2),
        static_bytes=np.zeros(2),
        memory_limit=np.full(2, np.inf),
    )
    found = {
        row: {t.name: t.differentiable for t in payload} for row, payload in payloads(graph, LOADS, SHAPES).items()
    }
    assert found[0, 0] == {"hidden": within}
    assert found[0, 1] == {"condition": condition}
    assert found[1, 1] == {"hidden": True, "condition": condition, "timestep": True, "modulation": True}
