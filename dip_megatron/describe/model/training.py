"""What trains of a model as it was built: the truth that plans follow, whatever a description says.

Reports come from the ranks that hold the chunks (:mod:`dip_megatron.runtime.trained`); here is what they mean together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...core import ModalityModule, OperationGraph
from .modules import EVERY_PART, ModuleShape, MultimodalModel, TrainablePart


class TrainingMismatchError(ValueError):
    """Ranks, or a description and the model, disagree on what trains; the message says who says what and what to do."""


@dataclass(frozen=True)
class PartTraining:
    """A chunk's stem, layers or head: how many of its ``parameters`` (elements on this rank) are ``trained``, and the
    name of a trained matrix if there is one, adapters left out. Vectors (norms, biases) have gradients, too, but say
    little: a final norm may stand before or in what a description calls the head."""

    trained: int = 0
    parameters: int = 0
    matrix: str = ""

    @property
    def share(self) -> float:
        """Of the parameters that train; 1 if there are none."""
        return self.trained / self.parameters if self.parameters else 1.0


@dataclass(frozen=True)
class ChunkTraining:
    """One chunk. On a chunk that is a module's first and last, what stands before its layers is the stem."""

    stem: PartTraining = PartTraining()
    layers: PartTraining = PartTraining()
    head: PartTraining = PartTraining()

    @property
    def trains(self) -> bool:
        """Whether the chunk has weight gradients."""
        return bool(self.stem.trained or self.layers.trained or self.head.trained)

    @property
    def parts(self) -> dict[TrainablePart, PartTraining]:
        """By the names that descriptions use."""
        return {"stem": self.stem, "layers": self.layers, "head": self.head}

    def of_shape(self, shape: ModuleShape) -> ModuleShape:
        """``shape``, of which this chunk's parts train as they do here."""
        trainable = tuple(name for name, part in self.parts.items() if part.trained)
        shares = (self.stem.share, self.layers.share, self.head.share)
        return replace(shape, trainable=trainable, trained_share=shares)


Report = tuple[ChunkTraining, ...]
"""A rank's chunks in the order (module, segment)."""


@dataclass(frozen=True)
class Training:
    """``chunks[module][segment][rank]`` of all modules, by name in the model's order; ``replicated`` are the names of
    those that stand whole on every rank."""

    chunks: tuple[tuple[str, tuple[tuple[ChunkTraining, ...], ...]], ...]
    replicated: frozenset[str] = frozenset()

    @staticmethod
    def of(modules: Sequence[ModalityModule], reports: Sequence[tuple[int, Report]]) -> Training:
        """From the reports of a replica's ranks, each with its pipeline rank. Raises TrainingMismatchError if two ranks
        that hold shards of the same chunk disagree."""
        mine: dict[int, Report] = {}
        places = [(m.name, k) for m in modules for k in range(m.segments)]
        for rank, report in reports:
            first = mine.setdefault(rank, report)
            check_alike(places, rank, first, report, "tensor-parallel ranks")
        ranks = sorted(mine)
        line = {place: tuple(mine[r][i] for r in ranks) for i, place in enumerate(places)}
        return Training(
            tuple((m.name, tuple(line[m.name, k] for k in range(m.segments))) for m in modules),
            frozenset(m.name for m in modules if m.replicated),
        )

    def of_module(self, name: str) -> tuple[tuple[ChunkTraining, ...], ...]:
        """``[segment][rank]``. Raises KeyError for a module that the model doesn't have."""
        return dict(self.chunks)[name]

    def trainable(self, module: str) -> tuple[tuple[bool, ...], ...]:
        """As :attr:`ModalityModule.trainable`: empty if every chunk trains."""
        flags = tuple(tuple(chunk.trains for chunk in line) for line in self.of_module(module))
        return () if all(map(all, flags)) else flags

    def on(self, graph: OperationGraph) -> OperationGraph:
        """``graph``, whose stages have backwards and weight gradients where the model's have."""
        modules = tuple(replace(m, trainable=self.trainable(m.name)) for m in graph.modules)
        return graph if modules == graph.modules else replace(graph, modules=modules)

    def missing_in(self, graph: OperationGraph) -> str | None:
        """A chunk that trains and of which ``graph`` has no weight gradients, in words; None if there is none."""
        for m in graph.modules:
            for segment, rank, chunk in self._of(m.name):
                if chunk.trains and not m.trains(segment, rank):
                    return _place(m.name, segment, rank)
        return None

    def against(self, model: MultimodalModel) -> list[str]:
        """What the description ``model`` calls trained and isn't, a sentence each: plans follow the model as built.

        Raises TrainingMismatchError where it is the other way round: a part that the description calls frozen has
        matrices that train.
        """
        sentences = []
        for shape in model.modules:
            built: dict[str, list[PartTraining]] = {part: [] for part in EVERY_PART}
            alone = len(self._of(shape.name)) == 1 or shape.name in self.replicated
            for segment, rank, chunk in self._of(shape.name):
                for part, training in chunk.parts.items():
                    built[part].append(training)
                    allowed = set(shape.trainable)
                    if alone and {"stem", "head"} & allowed:
                        allowed |= {"stem", "head"}  # in one chunk that is all of the module they are hard to tell
                    if training.matrix and part not in allowed:
                        raise TrainingMismatchError(
                            f"{_place(shape.name, segment, rank)}: the description of the model calls its {part} "
                            f"frozen, but in the model as built {training.matrix} requires a gradient. "
                            f"Freeze it where the model is built (the script's freeze call, or build_chunks of the "
                            f"model's family), or let the family's describe() name {part!r} in trainable; "
                            "--dip-schedule off trains without a plan"
                        )
            idle = [
                part
                for part in shape.trainable
                if any(p.parameters for p in built[part]) and not any(p.trained for p in built[part])
            ]
            if idle:
                sentences.append(
                    f"{shape.name}: nothing of its {' and '.join(idle)} trains in the model as built; plans follow the "
                    "model, layers were spread for its description"
                )
        return sentences

    def _of(self, module: str) -> list[tuple[int, int, ChunkTraining]]:
        lines = self.of_module(module)
        return [(k, r, chunk) for k, line in enumerate(lines) for r, chunk in enumerate(line)]


def check_alike(places: Sequence[tuple[str, int]], rank: int, first: Report, other: Report, who: str) -> None:
    """Raises TrainingMismatchError if two reports of pipeline rank ``rank`` differ in what trains; ``who`` they are."""
    for (module, segment), a, b in zip(places, first, other, strict=True):
        for part in EVERY_PART:
            one, two = a.parts[part], b.parts[part]
            if (one.trained, one.matrix) != (two.trained, two.matrix):
                raise TrainingMismatchError(
                    f"{_place(module, segment, rank)}: {who} disagree on what trains of its {part}: {one.trained} "
                    f"elements on one, {two.trained} on another; freeze the same parameters on all ranks"
                )


def check_replicas(modules: Sequence[ModalityModule], reports: Sequence[tuple[int, int, Report]]) -> None:
    """``reports`` of all ranks: pipeline rank, tensor-parallel rank, chunks. Raises TrainingMismatchError if replicas
    differ: their gradients would be averaged with nothing."""
    places = [(m.name, k) for m in modules for k in range(m.segments)]
    first: dict[tuple[int, int], Report] = {}
    for pipeline, tensor, report in reports:
        check_alike(places, pipeline, first.setdefault((pipeline, tensor), report), report, "data-parallel replicas")


def _place(module: str, segment: int, rank: int) -> str:
    return f"{module}, segment {segment} on pipeline rank {rank}"
