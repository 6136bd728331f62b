"""Floating-point operations a model needs: what model FLOPs utilisation is counted by."""

from __future__ import annotations

from collections.abc import Sequence

from dip_megatron.describe.cost import whole_sizes
from dip_megatron.describe.model import LanguageHead, LatentHead, MultimodalModel, Projector
from dip_megatron.describe.workload import Microbatch


def model_flops(model: MultimodalModel, microbatches: Sequence[Microbatch]) -> float:
    """Forward and backward of all microbatches on one replica, nothing recomputed, causal attention counted half.

    Matmuls: 2 FLOPs forward and 4 backward per weight and token. Attention: 4 forward and 8 backward per pair and
    channel. Embedding look-ups, norms and activation functions are left out, as is usual.
    """
    total = 0.0
    for module in model.modules:
        layer = module.layer
        sizes = whole_sizes(module, microbatches)
        tokens = float(sizes.tokens.sum())
        width = layer.query_width
        condition = float(sizes.condition.sum())
        per_layer = 0.0
        mlp = layer.hidden * layer.ffn * (3 if layer.gated else 2)
        full = layer.hidden * ((3 if layer.output_gate else 2) * width + 2 * layer.kv_width)
        for number in range(module.layers):
            linear = layer.linear_attention
            if linear is not None and not module.full_attention(number):
                core = linear.value_heads * 6 * linear.key_dim * linear.value_dim  # products with the state
                total += (6 * (linear.parameters(layer.hidden) + mlp) + 3 * core) * tokens
                continue
            pairs = sizes.pairs if module.full_attention(number) else sizes.window_pairs
            total += 3 * 4 * width * float(pairs.sum()) * (0.5 if layer.causal else 1.0)
            total += 6 * (full + mlp) * tokens
        if layer.cross_attention:
            per_layer += 6 * (
                2 * layer.hidden * width * tokens + 2 * layer.cross_attention * layer.kv_width * condition
            )
            per_layer += 3 * 4 * width * float(sizes.cross_pairs.sum())
        total += module.layers * per_layer
        if isinstance(module.head, Projector):
            mergers = 1 + len(module.taps)
            total += 6 * mergers * module.head.parameters(layer.hidden) * float(sizes.outputs.sum())
        elif isinstance(module.head, LanguageHead | LatentHead):
            depths = module.mtp * (full + mlp + 2 * layer.hidden**2)
            total += 6 * ((1 + module.mtp) * module.head.parameters(layer.hidden) + depths) * tokens
    return total


def utilisation(model: MultimodalModel, microbatches: Sequence[Microbatch], seconds: float, peak: float) -> float:
    """MFU: model FLOPs over what a replica's GPUs (``peak`` FLOPs a second each) could do in ``seconds``."""
    return model_flops(model, microbatches) / (seconds * peak * model.parallel.tp * model.parallel.pp)
