"""Prices under context parallelism: shares of what has the loss, encoders whole, keys and values gathered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dip_megatron.core.strategies import strategy_names
from dip_megatron.describe.cost import Cluster, CostModel, LayerRun, whole_sizes
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import Clip, Microbatch

IDEAL = Cluster("ideal", 1e15, 80e9, 1e30, 1e30, 1e30, 1e30, 8, 0, 0, 0, 0, 2, True, ())
NONE = strategy_names().index("none")


@pytest.mark.parametrize(
    ("name", "encoder", "last", "batch"),
    [
        ("vlm-s", "vision", "language", Microbatch(8000 - 8 * 169, (169,) * 8, sequences=(5000, 3000))),
        ("t2v-s", "language", "diffusion", Microbatch(clips=(Clip(100, 16, 512, 512), Clip(60, 32, 256, 512)))),
    ],
)
def test_what_has_the_loss_is_shared(name, encoder, last, batch):
    """On hardware that is slow in nothing but products, two ranks take half as long each, and send half as much."""
    one = load_model(name).with_parallel(tp=1)
    prices = {}
    for cp in (1, 2):
        model = one.with_parallel(cp=cp)
        pricer = CostModel(model, IDEAL)
        prices[cp] = {
            m.name: (
                pricer.layer(m.name, whole_sizes(m, [batch])).forward[NONE, 0],
                pricer.head(m.name, whole_sizes(m, [batch])).forward[0],
                pricer.message_bytes(m, whole_sizes(m, [batch]))[0],
            )
            for m in model.modules
        }
    assert prices[2][encoder] == prices[1][encoder]
    layer, head, message = (b / a for a, b in zip(prices[1][last], prices[2][last], strict=True))
    condition = one.module(last).layer.cross_attention > 0  # each rank reads all of it
    assert layer == pytest.approx(0.5, rel=0.1 if condition else 1e-9)
    assert head == pytest.approx(0.5)
    assert message == pytest.approx(0.5, rel=0.1 if condition else 1e-9)


def test_keys_and_values_are_gathered_and_kept():
    """Over ranks tp apart: within a node as long as all of a stage's stand in one."""
    shape = load_model("vlm-s").module("language")
    sizes = whole_sizes(shape, [Microbatch(8192, sequences=(8192,))])
    slow = replace(IDEAL, node_bandwidth=1e9, network_bandwidth=1e8)

    def price(tp: int, cp: int, cluster: Cluster = slow) -> tuple[float, float]:
        pricer = CostModel(load_model("vlm-s").with_parallel(tp=tp, cp=cp, sequence_parallel=False), cluster)
        layer = pricer.layer("language", sizes)
        return layer.forward[NONE, 0], layer.activation[NONE, 0]

    # 8192 tokens of 8 groups of 128, keys and values, two bytes: a rank gets the other half.
    moved = 2 * 8192 * 8 * 128 * 2
    assert price(1, 2)[0] - price(1, 2, IDEAL)[0] == pytest.approx(moved / 2 / 1e9, rel=1e-6)
    within = price(4, 2)[0] - price(4, 2, replace(slow, network_bandwidth=1.0))[0]
    beyond = price(8, 2, replace(slow, network_bandwidth=1.0))[0] - price(8, 2)[0]
    assert within == 0.0
    assert beyond > 0.0  # sixteen ranks stand on two nodes
    assert price(1, 2)[1] == pytest.approx(price(1, 1)[1] / 2 + moved)


def test_the_optimizer_is_sharded_over_them_too():
    model = load_model("vlm-s")
    sizes = {m.name: whole_sizes(m, [Microbatch(8, (169,), sequences=(177,))]) for m in model.modules}

    def optimizer(cp: int) -> float:
        pricer = CostModel(model.with_parallel(cp=cp), IDEAL)
        run = (LayerRun("language", 32, stem=True, head=True),)
        return pricer.static([[run]], sizes)[0].optimizer

    assert optimizer(2) == optimizer(1) / 2
