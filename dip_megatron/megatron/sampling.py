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
from ..families.family import ModelFamily
from ..runtime.protocol import StageProgram
from .adapters.layout import GivenLayout
from .adapters.loop import TrainingLoop
from .build import ChunkList, record_blueprint
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
    ):
        """``wanted`` microbatches are read; ``described`` gets the model before any data is there (none is read if
        it raises :class:`SampleTaken`), ``progress`` is called after each."""
        self._loop = loop
        self._families = families
        self._wanted, self._described, self._progress = wanted, described, progress
        self._sample: Sample | None = None
        self._program: StageProgram | None = None
        self._own: torch.nn.Module | None = None

    def close(self) -> None:
        """Nothing to end."""

    def segmented(self, provider: Callable[..., Any]) -> Callable[..., ChunkList]:
        """A model provider that describes the model, builds what reading needs of it (no layer), and gives Megatron a
        placeholder."""

        def build(*args: Any, **kwargs: Any) -> ChunkList:
            if self._sample is not None:
                raise ConfigurationError("the script builds a second model; an estimate knows of one")
            family, blueprint = record_blueprint(self._families, provider, *args, **kwargs)
            loop = self._loop
            model = family.describe(blueprint, loop.parallel)
            self._sample = Sample(model, family.workload, loop.num_microbatches, loop.parallel.dp, loop.layout)
            self._described(self._sample)
            chunks = _everything_last(model)
            configs = [c for name, c in blueprint.kwargs.items() if name == "config" or name.endswith("_config")]
            for config in configs:
                config.perform_initialization = False  # memory that nobody writes to is never taken
            self._program = family.program(blueprint, chunks, rank=0, micro_batch_size=loop.micro_batch_size)
            built = self._program.build_chunks()
            self._own = _Placeholder(built[-1].config)
            return ChunkList([self._own])

        return build

    def owns(self, model: Any) -> bool:
        """Whether the schedule is called with the placeholder, wrapped as Megatron wraps chunks."""
        chunk = model[0] if isinstance(model, list) else model
        while chunk is not None and chunk is not self._own:
            chunk = getattr(chunk, "module", None)
        return chunk is not None

    def run(self, **arguments: Any) -> Any:
        """Read, and leave the script. Raises SampleTaken."""
        assert self._sample is not None
        assert self._program is not None
        iterator, model = arguments["data_iterator"], arguments["model"]
        chunk = model[0] if isinstance(model, list) else model
        items = RawItems(iterator[0] if isinstance(iterator, list) else iterator)
        try:
            while len(self._sample.microbatches) < self._wanted:
                inputs = capture_microbatch(arguments["forward_step_func"], items, chunk, self._program)
                self._sample.microbatches.append(self._program.load(inputs))
                self._progress()
        except StopIteration:
            self._sample.trouble = "its data ended there"
        except ValueError as error:
            self._sample.trouble = str(error)
        raise SampleTaken(self._sample)


def _everything_last(model: MultimodalModel) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Layers of a program that reads and never runs: rank 0 has none of its own."""
    ranks = model.parallel.pp
    return {m.name: ((*(0,) * (ranks - 1), m.layers),) for m in model.modules}


class _Placeholder(torch.nn.Module):
    """What Megatron wraps and gives an optimizer."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.vp_stage = None
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def set_input_tensor(self, _: Any) -> None:
        """As pipeline stages have it."""
