"""Replicas that share experts: which ranks they are, and where they meet. See ``docs/experts.md``."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..compat.experts import BaseMoELayer
from ..core import ModalityModule
from ..core.experts import ExpertLayers
from ..core.protocols import Exchange
from ..describe.files import ConfigurationError
from ..families.shared.layer_memory import transformer_layers
from ..planner.delivery import CoupledReplicas
from .exchange import GlooExchange
from .ranks import replica_ranks


@dataclass(frozen=True)
class CoupledRanks:
    """Where replicas that share experts stand among all of their ranks: ``replicas[r]`` are the places of replica r's
    ranks, the first of which has its loads; this rank is of ``replica``."""

    replicas: tuple[tuple[int, ...], ...]
    replica: int


def coupled_ranks(every: bool = False) -> tuple[list[int], CoupledRanks]:
    """Global ranks of all replicas that share experts with this rank's, directly or through others, or of ``every``
    one, and where each replica's stand among them. All ranks of the job call it together. Raises ConfigurationError
    where replicas that share experts are no equal blocks."""
    replica = tuple(replica_ranks())
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if every:
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    experts = dist.get_process_group_ranks(group)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (replica, tuple(experts)))
    return joined(told, dist.get_rank())


def joined(told: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], rank: int) -> tuple[list[int], CoupledRanks]:
    """The same from what each rank tells: its replica's ranks, and those of its group of experts."""
    group = set(told[rank][0])
    while True:
        more = {other for member in group for shared in told[member][1] for other in told[shared][0]}
        if more <= group:
            break
        group |= more
    ranks = sorted(group)
    replicas = sorted({told[member][0] for member in ranks})
    sizes = {len(replica) for replica in replicas}
    if len(sizes) > 1:
        raise ConfigurationError(f"replicas that share experts have {sorted(sizes)} ranks; they must have equally many")
    places = tuple(tuple(ranks.index(member) for member in replica) for replica in replicas)
    return ranks, CoupledRanks(places, replicas.index(told[rank][0]))


def coupled_exchanges(
    ranks: Sequence[int], coupled: CoupledRanks, timeout_seconds: float
) -> tuple[GlooExchange, CoupledReplicas]:
    """What plans are delivered through (see :class:`..planner.delivery.PlanDelivery`): among the ranks of this rank's
    replica, and among the first ranks of all; all ``ranks`` that are ``coupled`` call it together."""
    replicas = [[ranks[place] for place in places] for places in coupled.replicas]
    own = GlooExchange(replicas[coupled.replica], timeout_seconds)
    firsts = GlooExchange([replica[0] for replica in replicas], timeout_seconds) if own.rank == 0 else None
    return own, CoupledReplicas(len(replicas), coupled.replica, firsts)


def experts_of(
    chunks: Sequence[torch.nn.Module], modules: Sequence[ModalityModule], exchange: Exchange, coupled: CoupledRanks
) -> ExpertLayers:
    """Where the replicas meet: the layers with experts of the chunks as built. Raises ConfigurationError, on all ranks,
    if replicas differ in them, or have experts where plans don't look for any."""
    places = [(m.name, k) for m in modules for k in range(m.segments)]
    mine = {place: _flags(chunk) for place, chunk in zip(places, chunks, strict=True)}
    fault = next((f"{m}.{k}" for (m, k), (flags, any_) in mine.items() if any_ and not any(flags)), "")
    rank = parallel_state.get_pipeline_model_parallel_rank()
    told = [pickle.loads(data) for data in exchange.gather(pickle.dumps((rank, mine, fault)))]
    faults = [where for _, _, where in told if where]
    if faults:
        raise ConfigurationError(
            f"{faults[0]}: experts beside layers without any (multi-token prediction) can't be shared by replicas; "
            "give the last chunk a layer with experts, or use --dip-schedule off"
        )
    found = [{told[place][0]: told[place][1] for place in replica} for replica in coupled.replicas]
    if any(other != found[0] for other in found):
        raise ConfigurationError("replicas that share experts have them in other layers; build the same model on all")
    layers = {
        m.name: [[found[0][r][m.name, k][0] for r in range(len(m.layers[0]))] for k in range(m.segments)]
        for m in modules
        if any(any(found[0][r][m.name, k][0]) for r in range(len(m.layers[0])) for k in range(m.segments))
    }
    return ExpertLayers.of(layers)


def meet_in_backwards(chunks: Sequence[torch.nn.Module]) -> None:
    """Let each layer with experts have its backward in training, whatever a microbatch holds: with a frozen language
    model, one of text alone has nothing that trains before such a layer. The other replicas, whose images have an
    encoder or a projector that trains, would wait for its part of the exchanges, or take a later one for it."""
    for layer in (layer for chunk in chunks for layer in transformer_layers(chunk)):
        if isinstance(layer.mlp, BaseMoELayer):
            layer.register_forward_pre_hook(_with_gradient, with_kwargs=True)


def _with_gradient(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of a layer, of which the hidden states take a gradient."""
    named = "hidden_states" in kwargs
    hidden = kwargs["hidden_states"] if named else args[0]
    if hidden.requires_grad or not torch.is_grad_enabled():
        return None
    hidden = hidden.detach().requires_grad_()
    return (args, kwargs | {"hidden_states": hidden}) if named else ((hidden, *args[1:]), kwargs)


def _flags(chunk: torch.nn.Module) -> tuple[list[bool], bool]:
    """Of each layer, whether it has experts; and whether anything in the chunk does. A rehearsal's chunk, which has no
    layers, says so itself."""
    if isinstance(told := getattr(chunk, "layers_with_experts", None), tuple):
        return list(told), any(told)
    flags = [isinstance(layer.mlp, BaseMoELayer) for layer in transformer_layers(chunk)]
    return flags, any(isinstance(module, BaseMoELayer) for module in chunk.modules())
