"""The interface between the executor and a model: what a new model has to implement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..core import ModalityModule, Operation, Payload, Unit
from .layer_context import LayerContext

if TYPE_CHECKING:  # The runtime must not import planning code when it runs.
    from ..describe.workload import Microbatch

Tensors = dict[str, torch.Tensor]


@dataclass
class MicrobatchInputs:
    """One microbatch as the training script passes it to its model.

    Attributes:
        arguments: The arguments of the ``model(...)`` call, by name.
        items: The raw items that ``forward_step`` took from the data iterator. They are replayed where the loss is
            computed. None on a rank without a data iterator, which receives its data from another tensor-parallel rank.
    """

    arguments: dict[str, Any]
    items: list[Any] | None = field(default_factory=list)


class SamplePacking(Protocol):
    """How a training loop packs samples (documents, clips) into microbatches; needed for ``resample``.

    The methods are called on every rank, in a thread beside training. They only move data: they must not communicate,
    draw random numbers or modify their arguments.
    """

    @property
    def length(self) -> int:
        """Maximum length of a microbatch, in tokens."""
        ...

    def split(self, microbatch: MicrobatchInputs) -> Sequence[Any]:
        """Split a microbatch into its samples, in their order. All ranks that hold the microbatch must return equally
        many. A sample may be any nesting of tensors and picklable objects."""
        ...

    def tokens(self, sample: Any) -> int:
        """Return how many tokens ``sample`` occupies in a microbatch."""
        ...

    def pack(self, samples: Sequence[Any]) -> MicrobatchInputs:
        """Pack one or more samples into a microbatch.

        Padding, masks and positions are computed anew: the loss of a sample must not depend on the samples beside it.

        Returns:
            The arguments of ``model(...)`` that ``forward_step`` would pass for this microbatch, and the items that it
            would take from the data iterator.
        """
        ...


class Inputs(list[Tensors]):
    """The payloads of an operation's incoming messages.

    Attributes:
        unit: The unit that is processed; None for a whole microbatch.
        units: The units that sent the payloads, in the same order. In every segment but a module's first this is the
            unit itself.
    """

    def __init__(self, payloads: Iterable[Tensors] = (), unit: Unit | None = None, units: Sequence[Unit] = ()):
        super().__init__(payloads)
        self.unit = unit
        self.units = tuple(units)

    def of(self, module: str, name: str) -> torch.Tensor | None:
        """Concatenate, along the first dimension, the tensors called ``name`` that units of ``module`` sent; None if
        there are none."""
        found = [payload[name] for payload, unit in zip(self, self.units, strict=True) if unit.module == module]
        if len(found) < 2:
            return found[0] if found else None
        return torch.cat(found)


class Shapes(Protocol):
    """Computes payload shapes from a microbatch's description, without the model. It must be small and picklable,
    because it is sent to the planner's worker processes."""

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """Return the tensors that a unit's forward sends within its module or, if ``leaves_module``, to the modules it
        feeds."""
        ...


class OperationShapes(Protocol):
    """As :class:`Shapes`, for chunks of which one virtual microbatch sends different tensors from different ranks."""

    def operation_payload(self, stage: Operation, unit: Unit, load: Microbatch) -> Payload:
        """Return the tensors that the forward ``stage`` of ``unit`` sends."""
        ...


class RunnableChunks(Protocol):
    """The chunks of a rank, as the executor runs them. ``modules`` are ordered so that every module follows those that
    feed it; chunks are ordered by (module, segment). The last segment of the last module computes the loss."""

    @property
    def modules(self) -> tuple[ModalityModule, ...]: ...

    @property
    def mode(self) -> LayerContext:
        """The context that the chunks' layers read while an operation runs. The ``install`` functions of
        ``families.shared.deferred_linear`` and ``families.shared.layer_memory`` connect them."""
        ...

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the script's ``model(...)`` call by name."""
        ...

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """Run one forward, except the one that computes the loss.

        Args:
            chunk: The chunk to run.
            stage: The forward to run.
            unit: The unit to process.
            inputs: Payloads of the incoming messages, in the order of the units that sent them; empty if there are
                none.
            microbatch: The microbatch of the unit.

        Returns:
            The output tensors by name. Tensors of ``inputs`` may be among them, to be passed on; their gradients are
            summed.
        """
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
    """A model cut into chunks: how to build them, what a batch contains, and how to run an operation. The last rank
    computes the loss unless the program has a ``loss_rank``."""

    @property
    def shapes(self) -> Shapes | OperationShapes: ...

    @property
    def supports_split(self) -> bool:
        """Whether the layers of this rank's chunks can defer weight gradients to W. Plans split backwards only if this
        holds on all ranks. A split would be correct otherwise too, but most of W's time would be spent in B."""
        ...

    def build_chunks(self) -> list[torch.nn.Module]:
        """Build this rank's chunks, in the order (module, segment)."""
        ...

    def shared(self, inputs: MicrobatchInputs) -> Any:
        """Return what all ranks need of a microbatch that the first rank holds: a small picklable object, or None. A
        loop may give ranks in the middle of the pipeline no batch."""
        ...

    def complete(self, inputs: MicrobatchInputs, shared: Any) -> None:
        """Add to this rank's microbatch what the first rank shares of it, if the loop hasn't provided it."""
        ...

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """Describe a microbatch for the planner. Raises ValueError if the model can't process it."""
        ...
