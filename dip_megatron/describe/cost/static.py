"""Bytes that a rank holds all the time: parameters, gradients, optimizer state, and buffers no stage owns."""

from __future__ import annotations

from dataclasses import dataclass

from ..model import ModuleShape, MultimodalModel
from .hardware import Cluster


@dataclass(frozen=True)
class StaticBytes:
    """Bytes of one rank. ``workspace``: the activations of the largest layer while it is recomputed or brought back,
    and what the output head needs for a moment; ``inbox``: receives posted ahead of their use."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    workspace: float = 0.0
    inbox: float = 0.0

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.workspace + self.inbox

    def plus(self, other: StaticBytes) -> StaticBytes:
        """Two parts on one rank: everything adds up, but they take turns in the workspace."""
        return StaticBytes(
            self.parameters + other.parameters,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            max(self.workspace, other.workspace),
            max(self.inbox, other.inbox),
        )


INBOX_MESSAGES = 8
"""Receives that are posted ahead, in the order of their senders, at most."""


def state_bytes(
    model: MultimodalModel, cluster: Cluster, parameters: float, trained: float, *, experts: bool = False,
    split: bool = True,
) -> StaticBytes:  # fmt: skip
    """Parameters, float32 main gradients and Adam's state of ``parameters`` weights, ``split`` over tp or not, of
    which a share ``trained`` isn't frozen: those that are keep their values only. Mixed precision keeps a float32 copy
    and two moments (12 bytes each), single precision the moments alone (8); the distributed optimizer shards them over
    the data-parallel ranks, context-parallel ones among them. ``experts`` are split over ep and etp, their optimizer's
    state over the ranks that hold the same ones."""
    parallel = model.parallel
    count = parameters / (parallel.ep * parallel.expert_tp if experts else parallel.tp if split else 1)
    learned = count * trained
    state = learned * (12 if cluster.element_bytes == 2 else 8)
    if parallel.distributed_optimizer:
        state /= parallel.expert_dp if experts else parallel.dp * parallel.cp
    return StaticBytes(count * cluster.element_bytes, learned * 4, state)


def run_bytes(
    model: MultimodalModel, cluster: Cluster, module: ModuleShape, layers: range, stem: bool, heads: int
) -> StaticBytes:
    """State of those layers of a module, with its stem where asked for, and so many heads, of taps too."""
    hidden = module.layer.hidden
    own, experts = (sum(counts) for counts in zip((0, 0), *map(module.layer_parameters, layers), strict=True))
    behind, spread = module.head_parameters
    copied = module.stem.parameters(hidden) if module.mtp and not stem else 0  # of the embedding, for later tokens
    parts = (
        (own, module.share("layers")),
        (module.stem.parameters(hidden) * stem, module.share("stem")),
        ((behind + copied) * heads, module.share("head")),
    )
    total = state_bytes(model, cluster, experts, module.share("layers"), experts=True)
    total = total.plus(state_bytes(model, cluster, spread * heads, module.share("head"), experts=True))
    for parameters, trained in parts:
        total = total.plus(
            state_bytes(model, cluster, parameters, trained, split=module.tensor_parallel == "split")
        )  # fmt: skip
    return total
