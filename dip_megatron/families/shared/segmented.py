"""What every program of a Megatron-Core model in segments has in common."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from ...compat.layer_specs import spec_of_chunk
from ...core import Unit
from ...runtime.layer_context import LayerContext
from ...runtime.protocol import MicrobatchInputs
from . import deferred_linear, layer_memory

Chunk = TypeVar("Chunk", bound=torch.nn.Module)


class ModelPart(MegatronModule):
    """A model, or what of it one chunk holds, with the attributes that Megatron reads of every stage of a pipeline."""

    def __init__(
        self,
        config: Any,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ):
        """``pre_process``: the part begins the module with the loss; ``post_process``: it computes the loss.
        ``vp_stage`` is the chunk's segment."""
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = False
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Part of Megatron's interface of pipeline stages; inputs come as arguments here."""


class SegmentedProgram:
    """One rank's share of a model: ``layers[module][segment][rank]``, and what its chunks follow while they run. Of a
    replicated module every rank has all layers, ``((n, ..., n),)``; a program that can build it says ``replicates``."""

    replicates = False

    def __init__(self, layers: Mapping[str, tuple[tuple[int, ...], ...]], rank: int):
        self.layers = dict(layers)
        self.rank = rank
        self.ranks = len(next(iter(self.layers.values()))[0])
        self.mode = LayerContext()
        self._whole: set[str] = set()
        self._supports_split = False

    @property
    def supports_split(self) -> bool:
        """Whether W can compute the weight gradients of this rank's chunks, once they are built."""
        return self._supports_split

    def loss_share(self, unit: Unit, arguments: Mapping[str, Any]) -> float:
        """All of it: a last module that doesn't say otherwise works on whole microbatches."""
        return 1.0

    def shared(self, inputs: MicrobatchInputs) -> Any:
        """Nothing, for a model whose stages in the middle need no batch."""
        return None

    def complete(self, inputs: MicrobatchInputs, shared: Any) -> None:
        """Nothing to add."""

    def check_layers(self, module: str, count: int) -> None:
        """Raises ValueError unless the partition gives ``module`` its ``count`` layers, on all ranks' chunks."""
        if self.replicates and self.ranks > 1 and self.layers[module] == ((count,) * self.ranks,):
            self._whole.add(module)
            return
        total = sum(sum(line) for line in self.layers[module])
        if total != count:
            raise ValueError(f"partition gives {module} {total} layers, the model has {count}")
        if any(len(line) != self.ranks for line in self.layers[module]):
            raise ValueError(f"partition of {module} must list {self.ranks} ranks per segment")

    def is_whole(self, module: str) -> bool:
        """Whether a module, whose layers have been checked, stands whole on every rank."""
        return module in self._whole

    def places(self, module: str) -> Iterator[tuple[int, bool, bool]]:
        """This rank's chunks of ``module``: the segment of each, and whether the module begins and ends with it."""
        if self.is_whole(module):
            yield 0, True, True
            return
        last = (len(self.layers[module]) - 1, self.ranks - 1)
        for segment in range(last[0] + 1):
            yield segment, segment == self.rank == 0, (segment, self.rank) == last

    def chunk_spec(self, spec: Any, module: str, segment: int) -> Any:
        """Of a spec that lists a module's layers, those of this rank's chunk; any other spec as it is. Raises
        ValueError if it lists another number of layers than the model has."""
        lines = self.layers[module]
        first = sum(map(sum, lines[:segment])) + sum(lines[segment][: self.rank])
        return spec_of_chunk(spec, first, lines[segment][self.rank], sum(map(sum, lines)))

    def finish(self, chunks: list[Chunk], config: Any) -> list[torch.nn.Module]:
        """Let the rank's chunks, in their order, follow the mode and stand where Megatron's wrappers look.

        ``config`` is that of the module with the loss.
        """
        for index, chunk in enumerate(chunks):
            # Megatron's wrappers look at the chunk's place among all of them, its inner model at its segment.
            own: Any = copy.copy(config)
            own.virtual_pipeline_model_parallel_size = len(chunks)
            own.pipeline_model_parallel_layout = None
            chunk.config, chunk.vp_stage = own, index  # type: ignore[assignment]
            deferred_linear.install(chunk, self.mode)
            layer_memory.install(chunk, self.mode)
        self._supports_split = not any(deferred_linear.undeferrable(chunk) for chunk in chunks)
        return list(chunks)


def bound(
    signature: inspect.Signature, args: Any, kwargs: Any, unsupported: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Arguments of a method of this ``signature`` by name, without ``self`` and those left out.

    Raises ValueError if one of ``unsupported`` (name: what it is) is set.
    """
    arguments = dict(signature.bind(None, *args, **kwargs).arguments)
    del arguments["self"]
    for name, what in (unsupported or {}).items():
        if arguments.get(name) is not None:
            raise ValueError(f"DIP can't run {what} ({name} is set); use --dip-schedule off")
    return arguments


def unwrapped(chunk: torch.nn.Module, kind: type[Chunk]) -> Chunk:
    """The model of class ``kind`` inside Megatron's wrappers."""
    while not isinstance(chunk, kind):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def dtype_name(config: Any) -> str:
    """The dtype of what travels between stages, as payloads name it."""
    return str(config.pipeline_dtype or config.params_dtype).removeprefix("torch.")
