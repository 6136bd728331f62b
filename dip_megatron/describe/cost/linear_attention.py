"""Seconds and bytes of linear attention in a layer."""

from __future__ import annotations

from ...core.graph import Floats
from ..model import GatedDeltaNet
from .operators import Operators


def delta_net_cost(
    net: GatedDeltaNet, hidden: int, tp: int, cp: int, operators: Operators, tokens: Floats
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Seconds ``[U]`` of forward, input gradient and weight gradient of a gated delta net whose heads are split over
    ``tp`` ranks, on a rank's share of sequences that ``cp`` ranks have together, without norms and what tensor-parallel
    ranks send around it; bytes ``[U]`` kept for the backward, and for the weight gradient,
    beside its input.

    The backward makes what chunks need again and takes two products for each of the forward's: three times as much.
    """
    e, heads = operators.cluster.element_bytes, net.value_heads / tp
    keys, values = net.key_width / tp, net.value_width / tp
    mixed = 2 * keys + values
    inward = mixed + values + 2 * heads
    project, project_weight = (operators.matmul(tokens, hidden, inward, accumulate=a) for a in (False, True))
    out, out_weight = (operators.matmul(tokens, values, hidden, accumulate=a) for a in (False, True))
    core, core_back = (
        operators.delta_rule(tokens, heads, net.key_dim, net.value_dim, net.chunk, passes) for passes in (1.0, 3.0)
    )
    convolve = operators.memory(2 * e * mixed * tokens)
    gate = operators.memory(3 * e * values * tokens)
    # Ranks exchange shares of sequences for some heads of whole ones, and back.
    exchanged = sum(operators.gather(e * width * tokens, cp, tp) for width in (inward, values))
    # Before and after the convolution, the gate, outputs before and after it; what tokens of a chunk are to each other.
    kept = (e * (2 * mixed + 3 * values + net.chunk * heads) + 8 * heads) * tokens
    return (
        project + convolve + core + gate + out + exchanged,
        project + 2 * convolve + core_back + 2 * gate + out + exchanged,
        project_weight + out_weight, kept, e * (inward + values) * tokens,
    )  # fmt: skip
