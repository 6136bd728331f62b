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


def state_bytes(model: MultimodalModel, cluster: Cluster, parameters: float, trained: float) -> StaticBytes:
    """Parameters, float32 main gradients and Adam's state of ``parameters`` weights split over tp, of which a share
    ``trained`` isn't frozen: those that are keep their values only. Mixed precision keeps a float32 copy and two
    moments (12 bytes each), single precision the moments alone (8); the distributed optimizer shards them over the
    data-parallel ranks."""
    count = parameters / model.parallel.tp
    learned = count * trained
    state = learned * (12 if cluster.element_bytes == 2 else 8)
    if model.parallel.distributed_optimizer:
        state /= model.parallel.dp
    return StaticBytes(count * cluster.element_bytes, learned * 4, state)


def run_bytes(
    model: MultimodalModel, cluster: Cluster, module: ModuleShape, layers: int, stem: bool, head: bool, taps: int = 0
) -> StaticBytes:
    """State of ``layers`` layers of a module, with its stem and its head where asked for, and with so many taps."""
    hidden = module.layer.hidden
    parts = (
        (module.layer.parameters * layers, module.share("layers")),
        (module.stem.parameters(hidden) * stem, module.share("stem")),
        (module.head.parameters(hidden) * (head + taps), module.share("head")),
    )
    total = StaticBytes()
    for parameters, trained in parts:
        total = total.plus(state_bytes(model, cluster, parameters, trained))
    return total
