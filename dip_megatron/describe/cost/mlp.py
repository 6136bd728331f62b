"""Seconds and bytes of what follows attention in a layer: an MLP, or a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from ...core.graph import Floats
from ..model import Parallel, TransformerLayer
from .operators import Operators


@dataclass(frozen=True, eq=False)
class MlpCost:
    """Arrays ``[U]``: seconds of forward, input gradient, weight gradient and activation function; bytes kept for the
    backward beside the input, of them those that only the activation function made, bytes kept for the weight
    gradient, and of them the inputs of linears."""

    forward: Floats
    backward: Floats
    weight: Floats
    activate: Floats
    kept: Floats
    activated: Floats
    deferred: Floats
    weight_inputs: Floats

    def plus(self, other: MlpCost) -> MlpCost:
        """One after the other."""
        return MlpCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def mlp_cost(layer: TransformerLayer, width: int, parallel: Parallel, operators: Operators, tokens: Floats) -> MlpCost:
    """An MLP of inner ``width``, split over the tensor-parallel ranks, for ``tokens`` tokens."""
    e, tp, hidden = operators.cluster.element_bytes, parallel.tp, layer.hidden
    whole = e * hidden * tokens
    local = whole / (tp if parallel.sequence_parallel else 1)
    ffn = width / tp
    fc1 = ffn * (2 if layer.gated else 1)
    up, down = operators.matmul(tokens, hidden, fc1), operators.matmul(tokens, ffn, hidden)
    weight = operators.matmul(tokens, hidden, fc1, accumulate=True)
    weight = weight + operators.matmul(tokens, ffn, hidden, accumulate=True) + operators.gather(whole)
    if parallel.sequence_parallel:  # two are gathered, one of them behind products
        weight = np.maximum(weight, 2 * operators.gather(whole))
    act = operators.memory(e * (fc1 + ffn) * tokens)
    traffic = 2 * operators.gather(whole)
    inner = e * (fc1 + ffn) * tokens
    # W needs the first linear's input and the second's output gradient, of both this rank's part.
    return MlpCost(
        up + down + act + traffic, up + down + 1.5 * act + traffic, weight, act, inner, e * ffn * tokens,
        inner + 2 * local, local + e * ffn * tokens,
    )  # fmt: skip


def experts_cost(layer: TransformerLayer, parallel: Parallel, operators: Operators, tokens: Floats) -> MlpCost:
    """A mixture of experts on the rank whose experts get the most, where each rank of the group has ``tokens`` tokens
    (its share of them under sequence parallelism).

    Router; tokens sorted by expert; the host's wait for how many there are; exchanged; experts as one grouped product;
    exchanged back, sorted and summed. The backward repeats the exchanges and not the wait. The router's weight gradient
    is part of the backward, as it is in training.
    """
    x = layer.experts
    assert x is not None
    c, e, hidden = operators.cluster, operators.cluster.element_bytes, layer.hidden
    own = tokens / (parallel.tp if parallel.sequence_parallel else 1)
    sent = own * x.active
    rows = sent * parallel.expert_tp * x.imbalance
    groups = x.count / parallel.ep
    ffn = x.ffn / parallel.expert_tp
    fc1 = ffn * (2 if layer.gated else 1)

    router = operators.matmul(own, hidden, x.count)
    scores = operators.memory(24 * x.count * own)  # in float32: written, read to choose and to weigh, a mask
    permute = operators.memory(2 * e * hidden * sent)
    sort = operators.memory(2 * e * hidden * rows) if groups > 1 else np.zeros_like(tokens)
    exchange = operators.exchange(e * hidden * sent * x.imbalance, parallel.ep)
    exchange = exchange + operators.gather(e * hidden * rows, parallel.expert_tp)
    move = 2 * (permute + sort + exchange)
    counted = np.where(tokens > 0, c.host_wait + c.node_latency * (parallel.ep * parallel.expert_tp > 1), 0.0)
    up = operators.grouped_matmul(rows, hidden, fc1, groups)
    down = operators.grouped_matmul(rows, ffn, hidden, groups)
    weight = operators.grouped_matmul(rows, hidden, fc1, groups, accumulate=True)
    weight = weight + operators.grouped_matmul(rows, ffn, hidden, groups, accumulate=True)
    act = operators.memory(e * (fc1 + ffn) * rows)
    inner = e * (fc1 + ffn) * rows
    routed = MlpCost(
        router + scores + counted + move + up + down + act,
        2 * router + scores + move + up + down + 1.5 * act,
        weight, act, inner + e * hidden * rows + 9 * x.count * own, e * ffn * rows, inner + 2 * e * hidden * rows,
        e * (hidden + ffn) * rows,
    )  # fmt: skip
    return routed.plus(mlp_cost(layer, x.shared_ffn, parallel, operators, tokens)) if x.shared_ffn else routed
