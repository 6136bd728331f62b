"""What a script trains, and on what, found without training: in place of a run under DIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from ..config import DipConfig
from ..describe.files import ConfigurationError
from ..describe.model import MultimodalModel
from ..describe.workload import Microbatch
from ..families.family import Blueprint, Layers, ModelFamily
from ..runtime.protocol import MicrobatchInputs, ModelProgram
from .adapters.layout import GivenLayout
from .adapters.loop import TrainingLoop
from .build import ChunkList, record_blueprint
from .call import ScheduleCall
from .experts import joined_by_balance
from .lookahead import RawItems, capture_microbatch


@dataclass
class Sample:
    """What a script asks for. ``microbatches``: of one replica, as its loader gives them, ``each`` of them an
    iteration's. ``workload`` names the published mix nearest to its data; ``trouble``: why reading ended early."""

    model: MultimodalModel
    workload: str
    each: int
    replicas: int
    layout: GivenLayout | None
    microbatches: list[Microbatch] = field(default_factory=list)
    trouble: str = ""


@dataclass(frozen=True)
class Reading:
    """What was read, to be run here: ``inputs`` of the sample's microbatches, the loop's ``forward_step``, and
    ``program(layers)`` of all of the model on one rank."""

    sample: Sample
    inputs: list[MicrobatchInputs]
    forward_step: Callable[..., Any]
    program: Callable[[Layers], ModelProgram]


class SampleTaken(BaseException):
    """Leaves the script once enough of its data is known. No Exception, so that no script takes it for its own."""

    def __init__(self, sample: Sample):
        super().__init__("the sample is taken")
        self.sample = sample


class SamplingSession:
    """Stands where a :class:`.session.DipSession` would: builds a chunk that holds next to nothing, and reads
    microbatches when the schedule is called."""

    def __init__(
        self,
        loop: TrainingLoop,
        config: DipConfig,
        families: Sequence[ModelFamily],
        *,
        wanted: int,
        described: Callable[[Sample], None] = lambda _: None,
        progress: Callable[[], None] = lambda: None,
        then: Callable[[Reading], None] | None = None,
    ):
        """``wanted`` microbatches are read; ``described`` gets the model before any data is there (none is read if
        it raises :class:`SampleTaken`), ``progress`` is called after each, ``then`` with all of them."""
        self._loop = loop
        self._families = families
        self._wanted, self._described, self._progress, self._then = wanted, described, progress, then
        self._sample: Sample | None = None
        self._program: ModelProgram | None = None
        self._own: torch.nn.Module | None = None
        self._made: tuple[ModelFamily, Blueprint] | None = None

    def close(self) -> None:
        """Nothing to end."""

    def segmented(self, provider: Callable[..., Any]) -> Callable[..., ChunkList]:
        """A model provider that describes the model, builds what reading needs of it (no layer), and gives Megatron a
        placeholder."""

        def build(*args: Any, **kwargs: Any) -> ChunkList:
            if self._sample is not None:
                raise ConfigurationError("the script builds a second model; an estimate knows of one")
            family, blueprint = self._made = record_blueprint(self._families, provider, *args, **kwargs)
            settings = self._loop.settings
            parallel = joined_by_balance(blueprint.kwargs.values(), settings.parallel)
            model = family.describe(blueprint, parallel)
            self._sample = Sample(model, family.workload, settings.num_microbatches, parallel.dp, settings.layout)
            self._described(self._sample)
            chunks = _everything_last(model)
            configs = [c for name, c in blueprint.kwargs.items() if name == "config" or name.endswith("_config")]
            before = [config.perform_initialization for config in configs]
            for config in configs:
                config.perform_initialization = False  # memory that nobody writes to is never taken
            self._program = family.program(blueprint, chunks, rank=0, micro_batch_size=settings.micro_batch_size)
            built = self._program.build_chunks()
            for config, initialize in zip(configs, before, strict=True):
                config.perform_initialization = initialize
            self._own = _Placeholder(built[-1])
            return ChunkList([self._own])

        return build

    def owns(self, model: Any) -> bool:
        """Whether the schedule is called with the placeholder, wrapped as Megatron wraps chunks."""
        chunk = model[0] if isinstance(model, list) else model
        while chunk is not None and chunk is not self._own:
            chunk = getattr(chunk, "module", None)
        return chunk is not None

    def run(self, call: ScheduleCall) -> Any:
        """Read, and leave the script. Raises SampleTaken."""
        assert self._sample is not None
        assert self._program is not None
        assert call.iterator is not None, "the first rank reads data"
        items, step, kept = RawItems(call.iterator), call.forward_step_func, []
        try:
            while len(self._sample.microbatches) < self._wanted:
                inputs = capture_microbatch(step, items, call.chunks[0], self._program)
                self._sample.microbatches.append(self._program.load(inputs))
                if self._then is not None:
                    kept.append(inputs)
                self._progress()
        except StopIteration:
            self._sample.trouble = "its data ended there"
        except ValueError as error:
            self._sample.trouble = str(error)
        if self._then is not None:
            self._then(Reading(self._sample, kept, step, self._whole))
        raise SampleTaken(self._sample)

    def _whole(self, layers: Layers) -> ModelProgram:
        """All of the model on one rank, cut as told."""
        assert self._made is not None
        family, blueprint = self._made
        return family.program(blueprint, layers, rank=0, micro_batch_size=self._loop.settings.micro_batch_size)


def _everything_last(model: MultimodalModel) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Layers of a program that reads and never runs: rank 0 has none of its own."""
    ranks = model.parallel.pp
    return {m.name: ((*(0,) * (ranks - 1), m.layers),) for m in model.modules}


class _Placeholder(torch.nn.Module):
    """What Megatron wraps and gives an optimizer. A script's forward_step may read what the ``chunk`` knows."""

    def __init__(self, chunk: torch.nn.Module):
        super().__init__()
        self.__dict__["_chunk"] = chunk  # no submodule
        self.config = chunk.config
        self.vp_stage = None
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_chunk"], name)

    def set_input_tensor(self, _: Any) -> None:
        """As pipeline stages have it."""
