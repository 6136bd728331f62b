"""Seconds and bytes of a module's parts: one transformer layer, its stem, its head, for every size of unit at once.

Backward is split as the runtime splits it: ``backward`` gives the input gradient (and recomputes what the memory
strategy dropped), ``weight`` the weight gradients. A fused backward takes exactly their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ...core.graph import Floats
from ...core.strategies import LayerFacts, LayerStrategy
from ..model import (
    AudioEmbedding,
    FeatureEmbedding,
    LanguageHead,
    LatentEmbedding,
    LatentHead,
    LayerKind,
    ModuleShape,
    Parallel,
    PatchEmbedding,
    Projector,
    TokenEmbedding,
    TransformerLayer,
)
from .linear_attention import delta_net_cost
from .mlp import experts_cost, mlp_cost
from .operators import Operators
from .sizes import Sizes

_USUAL = LayerKind()


@dataclass(frozen=True, eq=False)
class PartCost:
    """One part of a module, arrays ``[U]``: seconds of forward, input gradient and weight gradient; bytes of
    activations kept for the backward, and of what the weight gradient still needs after the input gradient
    (``deferred_activation``)."""

    forward: Floats
    backward: Floats
    weight: Floats
    activation: Floats
    deferred_activation: Floats

    @staticmethod
    def nothing(units: int) -> PartCost:
        return PartCost(*(np.zeros(units) for _ in range(5)))

    def plus(self, times: int, *others: PartCost) -> PartCost:
        """This and so many times the others."""
        return PartCost(
            *(getattr(self, f.name) + times * sum(getattr(o, f.name) for o in others) for f in fields(self))
        )


@dataclass(frozen=True, eq=False)
class LayerCost:
    """One transformer layer under each memory strategy: ``forward``, ``backward``, ``weight``, ``activation``,
    ``deferred_activation`` ``[strategies, U]`` in the cost model's order. ``weight`` is that of a W of its own: at once
    with the input gradient it takes as long as without a strategy."""

    forward: Floats
    backward: Floats
    weight: Floats
    activation: Floats
    deferred_activation: Floats


@dataclass(frozen=True, eq=False)
class LayerFormula:
    """One layer that keeps all its activations: its ``cost``; per part that can be recomputed (activation function,
    attention core, MLP or experts, ``[3, U]``) the seconds of its forward (``recompute``) and the bytes that this saves
    (``dropped``); bytes ``[U]`` of the layer's input and, of what weight gradients need, of the inputs of linears."""

    cost: PartCost
    recompute: Floats
    dropped: Floats
    layer_input: Floats
    weight_inputs: Floats


def layer_cost(
    layer: TransformerLayer, parallel: Parallel, operators: Operators, sizes: Sizes, kind: LayerKind = _USUAL
) -> LayerFormula:
    """One layer of a kind, for ``sizes`` of one context-parallel rank."""
    e, tp = operators.cluster.element_bytes, parallel.tp
    shard = tp if parallel.sequence_parallel else 1
    tokens, pairs = sizes.tokens, sizes.pairs if kind.full_attention else sizes.window_pairs
    hidden = layer.hidden
    width = layer.query_width / tp
    kv_width = max(layer.kv_groups / tp, 1) * layer.head_dim
    whole, local = e * hidden * tokens, e * hidden * tokens / shard

    def exchange(times: float) -> Floats:
        """Tensor-parallel traffic in the unit of one gather of the hidden states."""
        return times * operators.gather(whole)

    def gathering(products: Floats) -> Floats:
        """Weight gradients of a block whose input has been gathered before and whose output is scattered after it. Of
        both gathers one runs behind products, as long as these are."""
        return np.maximum(products + exchange(1), exchange(2) if parallel.sequence_parallel else 0.0)

    def linear(inner: float, columns: float, rows: Floats = tokens) -> tuple[Floats, Floats]:
        return operators.matmul(rows, inner, columns), operators.matmul(rows, inner, columns, accumulate=True)

    def attend(q: Floats, inner: float, kv: Floats, kv_inner: float, pair: Floats, causal: bool) -> tuple[Floats, ...]:
        """Forward, core forward, backward, weight, kept bytes, core bytes, linear-gradient bytes of one attention."""
        gates = width if layer.output_gate and q is kv else 0.0
        if q is kv:
            project, project_weight = linear(inner, width + gates + 2 * kv_width)
        else:
            (a, aw), (b, bw) = linear(inner, width), linear(kv_inner, 2 * kv_width, kv)
            project, project_weight = a + b, aw + bw
        out, out_weight = linear(width, hidden)
        core = operators.attention(pair, q, width, kv_width, causal)
        core_back = operators.attention_backward(pair, q, width, kv_width, causal)
        core_bytes = 4.0 * layer.heads / tp * q
        if not operators.cluster.fused_attention:
            scores = 3.0 * e * layer.heads / tp * pair
            core, core_back = core + operators.memory(scores), core_back + operators.memory(2 * scores)
            # The probabilities (dropout is taken to be off), and a byte for the mask.
            core_bytes = (e * layer.heads / tp + causal) * pair
        kept = e * ((2 * width + 2 * gates) * q + 2 * kv_width * kv)  # a gate, and the output before it
        deferred_activation = e * (
            (2 * width + gates) * q + 2 * kv_width * kv
        )  # the output's input, and the gradients of q, its gate, k and v
        gated = operators.memory(3 * e * gates * q)
        return (
            project + core + gated + out,
            core,
            project + core_back + 2 * gated + out,
            project_weight + out_weight,
            kept,
            core_bytes,
            deferred_activation,
        )

    rope = operators.memory(2 * e * (width + kv_width) * tokens) if layer.causal else 0.0
    norm_and_residual = operators.memory(5 * local)
    modulate = operators.memory(3 * local) if layer.adaln != "none" else 0.0
    one = norm_and_residual + modulate

    if layer.linear_attention is not None and not kind.full_attention:
        rope = 0.0
        core, core_bytes = np.zeros_like(tokens), np.zeros_like(tokens)
        net = layer.linear_attention
        forward, backward, weight, kept, deferred_activation = delta_net_cost(
            net, hidden, tp, parallel.cp, operators, tokens
        )
        weight_inputs = e * net.value_width / tp * tokens
    else:
        forward, core, backward, weight, kept, core_bytes, deferred_activation = attend(
            tokens, hidden, tokens, hidden, pairs, layer.causal
        )
        weight_inputs = e * width * tokens
        if parallel.cp > 1:
            # The core gathers keys and values of whole sequences and keeps them; their gradients are scattered back.
            gathered = 2 * e * kv_width * tokens * parallel.cp
            moved = operators.gather(gathered, parallel.cp, parallel.tp)
            forward, core, backward, core_bytes = forward + moved, core + moved, backward + moved, core_bytes + gathered
    # Layer input and normalised input of the attention; the modulated one and the gated output too if there is adaLN.
    extra = 2 if layer.adaln != "none" else 0
    forward, backward = forward + one + rope + exchange(2), backward + 2 * one + rope + exchange(2)
    weight, activation = gathering(weight), kept + core_bytes + (2 + extra) * local
    # Input of the projection and gradient of the output, this rank's parts of them.
    deferred_activation, weight_inputs = deferred_activation + 2 * local, weight_inputs + local
    if layer.cross_attention:
        c_forward, c_core, c_backward, c_weight, c_kept, c_bytes, c_deferred = attend(
            tokens, hidden, sizes.condition, layer.cross_attention, sizes.cross_pairs, False
        )
        forward, backward = forward + c_forward + one + exchange(2), backward + c_backward + 2 * one + exchange(2)
        weight, core = weight + gathering(c_weight), core + c_core
        activation, core_bytes = activation + c_kept + c_bytes + 2 * local, core_bytes + c_bytes
        deferred_activation = deferred_activation + c_deferred + 2 * local
        weight_inputs = weight_inputs + e * width * tokens + local  # what it attends to is shared by all layers

    if kind.experts:
        mlp = experts_cost(layer, parallel, operators, tokens)
    else:
        mlp = mlp_cost(layer, layer.ffn, parallel, operators, tokens)
    forward, backward = forward + mlp.forward + one, backward + mlp.backward + 2 * one
    weight = weight + mlp.weight
    activation = activation + mlp.kept + (2 + extra) * local
    deferred_activation, weight_inputs = deferred_activation + mlp.deferred, weight_inputs + mlp.weight_inputs
    if layer.adaln == "block":
        modulation, modulation_weight = linear(hidden, 6 * hidden / tp, np.minimum(tokens, 1.0))
        forward, backward, weight = forward + modulation, backward + modulation, weight + modulation_weight
    cost = PartCost(forward, backward, weight, activation, deferred_activation)
    recompute = np.stack([mlp.activate, core, mlp.forward])
    return LayerFormula(cost, recompute, np.stack([mlp.activated, core_bytes, mlp.kept]), local, weight_inputs)


def with_strategies(operators: Operators, layer: LayerFormula, strategies: Sequence[LayerStrategy]) -> LayerCost:
    """A layer's cost under each of ``strategies``, from what :func:`layer_cost` gives.

    Recomputing runs the part's forward again at the start of the input gradient. Offloading copies the layer's
    activations out behind its forward and back behind its backward; the reads and writes of the copy take memory
    bandwidth from the layer. Inputs of weight gradients that wait in host memory go there behind the input gradient,
    while activations come the other way, and come back behind W.
    """
    cost, recompute, dropped, inputs = layer.cost, layer.recompute, layer.dropped, layer.weight_inputs
    bandwidth = operators.cluster.memory_bandwidth
    facts = LayerFacts(
        forward=cost.forward,
        backward=cost.backward,
        activation=cost.activation,
        layer_input=layer.layer_input,
        recompute_activation=recompute[0],
        recompute_attention=recompute[1],
        recompute_mlp=recompute[2],
        saved_by_activation=dropped[0],
        saved_by_attention=dropped[1],
        saved_by_mlp=dropped[2],
        copy=operators.to_host(cost.activation),
        traffic=cost.activation / bandwidth,
    )
    forward, backward, activation = zip(*(s.price(facts) for s in strategies), strict=True)
    hosted = np.array([s.hosts_weight_inputs for s in strategies])[:, None]
    fetched = np.maximum(cost.weight, operators.to_host(inputs)) + 2 * inputs / bandwidth
    return LayerCost(
        np.stack(forward), np.stack(backward), np.where(hosted & (cost.weight > 0), fetched, cost.weight),
        np.stack(activation), np.where(hosted, cost.deferred_activation - inputs, cost.deferred_activation),
    )  # fmt: skip


def stem_cost(module: ModuleShape, parallel: Parallel, operators: Operators, sizes: Sizes) -> PartCost:
    """The module's stem. A patch embedding is replicated over tensor-parallel ranks, a token table is split."""
    e, hidden = operators.cluster.element_bytes, module.layer.hidden
    shard = parallel.tp if parallel.sequence_parallel else 1
    tokens, stem = sizes.tokens, module.stem
    local = e * hidden * tokens / shard
    if isinstance(stem, PatchEmbedding):
        inner = stem.patch**2 * stem.channels * stem.temporal
    elif isinstance(stem, AudioEmbedding):
        inner = 3 * (2 * stem.mels + hidden)  # the first convolution runs at twice the rate of tokens
    elif isinstance(stem, FeatureEmbedding):
        inner = stem.features
    elif isinstance(stem, LatentEmbedding):
        inner = stem.channels * stem.patch[0] * stem.patch[1] * stem.patch[2]
    elif isinstance(stem, TokenEmbedding):
        whole = e * hidden * tokens
        moved = operators.memory(2 * whole)
        traffic = operators.gather(whole) * (1 if parallel.sequence_parallel else 2)
        return PartCost(moved + traffic, np.zeros_like(tokens), 2 * moved + traffic, 8 * tokens, 8 * tokens + local)
    else:
        return PartCost.nothing(len(sizes))
    linear, weight = operators.matmul(tokens, inner, hidden), operators.matmul(tokens, inner, hidden, accumulate=True)
    pixels = e * inner * tokens
    return PartCost(linear + operators.memory(2 * local), np.zeros_like(tokens), weight, pixels, pixels + local)


def head_cost(module: ModuleShape, parallel: Parallel, operators: Operators, sizes: Sizes) -> PartCost:
    """The module's head, with its loss if it has one; the last norm is counted with it, and multi-token prediction,
    which keeps all its activations."""
    cost = _head_cost(module, parallel, operators, sizes)
    if not module.mtp:
        return cost
    hidden, tokens = module.layer.hidden, sizes.tokens
    local = operators.cluster.element_bytes * hidden * tokens / (parallel.tp if parallel.sequence_parallel else 1)
    linear, weight = _linear(operators, tokens, 2 * hidden, hidden / parallel.tp)
    norms = operators.memory(4 * local)
    joined = PartCost(norms + linear, 2 * norms + linear, weight, 4 * local, 3 * local)
    layer = layer_cost(module.layer, parallel, operators, sizes, module.kind(module.layers - 1)).cost
    embedded = stem_cost(module, parallel, operators, sizes)
    return cost.plus(module.mtp, embedded, joined, layer, cost)


def _head_cost(module: ModuleShape, parallel: Parallel, operators: Operators, sizes: Sizes) -> PartCost:
    e, tp, hidden = operators.cluster.element_bytes, parallel.tp, module.layer.hidden
    shard = tp if parallel.sequence_parallel else 1
    tokens, head = sizes.tokens, module.head
    whole, local = e * hidden * tokens, e * hidden * tokens / shard
    norm = operators.memory(2 * local)
    if isinstance(head, Projector):
        rows = sizes.outputs
        a, aw = _linear(operators, rows, hidden * head.reduction, head.inner / tp)
        b, bw = _linear(operators, rows, head.inner / tp, head.output)
        out = e * head.output * rows
        traffic = operators.gather(whole) + operators.gather(out)
        inside = 2 * e * head.inner / tp * rows
        act = operators.memory(inside)
        return PartCost(
            norm + a + b + act + traffic, 2 * norm + a + b + 1.5 * act + traffic, aw + bw + operators.gather(whole),
            2 * local + inside, local + inside + out / shard,
        )  # fmt: skip
    if isinstance(head, LanguageHead):
        vocabulary = head.vocabulary / tp
        linear, weight = _linear(operators, tokens, hidden, vocabulary)
        # Logits in float32 are read and written by maximum, exponential, sum and gradient; the softmax is kept.
        softmax = 4 * vocabulary * tokens
        loss = operators.memory(4 * softmax) + operators.all_reduce(12 * tokens)
        traffic = operators.gather(whole)
        return PartCost(
            norm + linear + loss + traffic, 2 * norm + linear + operators.memory(2 * softmax) + traffic,
            weight + traffic, 2 * local + softmax, local + e * vocabulary * tokens,
        )  # fmt: skip
    if isinstance(head, LatentHead):
        columns = head.channels * head.patch[0] * head.patch[1] * head.patch[2]
        linear, weight = _linear(operators, tokens / shard, hidden, columns)
        return PartCost(2 * norm + linear, 4 * norm + linear, weight, 3 * local, local + e * columns * tokens / shard)
    return PartCost.nothing(len(sizes))


def _linear(operators: Operators, rows: Floats, inner: float, columns: float) -> tuple[Floats, Floats]:
    return operators.matmul(rows, inner, columns), operators.matmul(rows, inner, columns, accumulate=True)
