"""What the executor needs to know of a model: the one interface to implement for a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..core import ModalityModule, Operation, Payload, Unit
from .layer_context import LayerContext

if TYPE_CHECKING:  # a name for types alone: the runtime runs nothing of planning
    from ..describe.workload import Microbatch

Tensors = dict[str, torch.Tensor]


@dataclass
class MicrobatchInputs:
    """One microbatch as the pretrain script hands it to its model: the arguments of ``model(...)`` by name, and the raw
    items its ``forward_step`` took from the data iterator (to be replayed where the loss is computed; None on a rank
    without an iterator, which gets its data from another tensor-parallel rank)."""

    arguments: dict[str, Any]
    items: list[Any] | None = field(default_factory=list)


class SamplePacking(Protocol):
    """How a loop packs samples (documents, clips) into microbatches, for ``resample``: whoever packs them says how to
    take a microbatch apart and how to pack samples anew. Methods are called on every rank, in a thread beside training,
    and only move data: they call no other rank, draw no random numbers, and change nothing they are given."""

    @property
    def length(self) -> int:
        """The most tokens of a microbatch."""
        ...

    def split(self, microbatch: MicrobatchInputs) -> Sequence[Any]:
        """Its samples, in their order: as many on all ranks that have the microbatch. They travel as microbatches do:
        tensors, and what Python can pickle, nested in any way."""
        ...

    def tokens(self, sample: Any) -> int:
        """How many of a microbatch's tokens it takes."""
        ...

    def pack(self, samples: Sequence[Any]) -> MicrobatchInputs:
        """A microbatch of these samples, one at least: the arguments of ``model(...)`` by name as ``forward_step``
        would give them, and the items that ``forward_step`` would take for it from the data iterator. Padding, masks
        and positions are made anew: what a sample's loss is must not depend on the samples beside it."""
        ...


class Inputs(list[Tensors]):
    """The payloads of a stage's incoming messages. ``units`` are those they come from, in the same order: the stage's
    own where it isn't the first of its module. ``unit`` is the stage's; without one it is the whole microbatch."""

    def __init__(self, payloads: Iterable[Tensors] = (), unit: Unit | None = None, units: Sequence[Unit] = ()):
        super().__init__(payloads)
        self.unit = unit
        self.units = tuple(units)

    def of(self, module: str, name: str) -> torch.Tensor | None:
        """The tensors called ``name`` that come from units of ``module``, one after the other along their first
        dimension; None if there are none."""
        found = [payload[name] for payload, unit in zip(self, self.units, strict=True) if unit.module == module]
        if len(found) < 2:
            return found[0] if found else None
        return torch.cat(found)


class Shapes(Protocol):
    """Payload shapes by content, without the model: a small picklable object, used in planner workers."""

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """What one stage of ``unit`` sends on: within its module, or (``leaves_module``) to the modules it feeds."""
        ...


class OperationShapes(Protocol):
    """:class:`Shapes` of chunks whose stages of one virtual microbatch send different things: asked stage by stage."""

    def operation_payload(self, stage: Operation, unit: Unit, load: Microbatch) -> Payload:
        """What the forward of ``stage``, one of ``unit``, sends on."""
        ...


class RunnableChunks(Protocol):
    """A rank's chunks as the executor runs them. ``modules`` come in an order in which every module stands after its
    upstream ones. Chunks are in the order (module, segment); the loss belongs to the last segment of the last module.
    """

    @property
    def modules(self) -> tuple[ModalityModule, ...]: ...

    @property
    def mode(self) -> LayerContext:
        """What the chunks' layers look up while a stage runs; set by the ``install`` functions of
        :mod:`.deferred_linear` and :mod:`.layer_memory`."""
        ...

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of the script's ``model(...)`` call, by name."""
        ...

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage's forward, for every stage but the one with the loss. ``inputs`` are the payloads of the stage's
        incoming messages, in the order of the units that feed it (empty where nothing does). The result may hold
        tensors of ``inputs`` again, for the stages after it: their gradients add up."""
        ...

    def final(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> Any:
        """The last stage's forward: what the script's ``model(...)`` returns to its ``forward_step``; of the instances
        of ``inputs.unit`` alone where the last module works on parts of a microbatch."""
        ...

    def loss_share(self, unit: Unit, arguments: Mapping[str, Any]) -> float:
        """What part of a microbatch's mean loss a unit of the last module makes. Asked only where a microbatch has
        several of them, for loss functions that Megatron averages over each microbatch."""
        ...


class ModelProgram(RunnableChunks, Protocol):
    """A model cut into chunks: how to build them, what a batch holds, and how to run one stage. The loss belongs to the
    last rank, unless the program has a ``loss_rank`` that says otherwise."""

    @property
    def shapes(self) -> Shapes | OperationShapes: ...

    @property
    def supports_split(self) -> bool:
        """Whether the layers of this rank's chunks can leave their weight gradients to W. Plans split no backward
        unless those of all ranks can; one that does would still be right, but most of W's time would pass in B."""
        ...

    def build_chunks(self) -> list[torch.nn.Module]:
        """This rank's chunks, in the order (module, segment)."""
        ...

    def shared(self, inputs: MicrobatchInputs) -> Any:
        """What of a microbatch on the first rank all stages need, though a loop may give ranks in the middle of the
        pipeline no batch: something small that can be pickled, or None."""
        ...

    def complete(self, inputs: MicrobatchInputs, shared: Any) -> None:
        """Add to a microbatch of this rank what the first rank shares of it, where the loop has not given it."""
        ...

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """What it holds, for the planner. Raises ValueError for a batch the model can't take."""
        ...
