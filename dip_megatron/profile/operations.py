"""Seconds and bytes of stages, measured on the layers that will train, run as the executor runs them.

For the costs file every part of a LLaVA (stem, layers, head of both modules) becomes a stage of its own on one rank:
forward, input gradients, weight gradients apart; its layers under every memory strategy.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Kind, Operation, Payload, Unit
from ..core.strategies import known_strategies, offloads
from ..describe.cost import Costs, LayerRun, Table
from ..describe.cost.calibration import QUANTITIES, STRATEGY_QUANTITIES
from ..describe.model import ModulePartition, MultimodalModel
from ..describe.model.partition import MODEL
from ..describe.workload import Microbatch
from ..families.llava.mixed import MixedLlavaProgram
from ..families.shared.shapes import LANGUAGE, VISION
from ..runtime.deferred import Slot, WeightGradients, start
from ..runtime.offload import OffloadedActivations
from ..runtime.protocol import Inputs, MicrobatchInputs, ModelProgram
from ..testing.synthetic import draw_batch, draw_weights, wrap
from .timing import measure

LAYERS = 4
PARTS: tuple[tuple[str, str], ...] = (
    (VISION, "stem"), (VISION, "layer"), (VISION, "head"), (LANGUAGE, "stem"), (LANGUAGE, "layer"), (LANGUAGE, "head"),
)  # fmt: skip


@dataclass(frozen=True)
class PartSample:
    """One part at one size: tokens of its module, seconds of F, B and W, and (on a GPU) bytes held after F and B; of a
    layer, under one memory strategy."""

    module: str
    part: str
    tokens: float
    forward: float
    backward: float
    weight: float
    activation: float | None = None
    deferred_activation: float | None = None
    strategy: str = "none"


def profile_llava(
    arguments: dict[str, Any],
    model: MultimodalModel,
    device: torch.device,
    *,
    images: Sequence[int],
    tokens: Sequence[int],
    repeats: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[PartSample]:
    """Measure every part of the model whose LLaVAModel ``arguments`` these are, with each number of ``images`` for the
    ViT's, and each of ``tokens`` (a sequence's positions, images included) for the LLM's."""
    layers = min(LAYERS, *(m.layers for m in model.modules))
    kwargs = dict(arguments)
    for name in (VISION, LANGUAGE):
        config = copy.copy(kwargs[f"{name}_transformer_config"])
        config.num_layers = layers
        kwargs[f"{name}_transformer_config"] = config
    stages = [
        [LayerRun(module, layers if part == "layer" else 0, stem=part == "stem", head=part == "head")]
        for module, part in PARTS
    ]
    program = MixedLlavaProgram(kwargs, ModulePartition.of_stages(stages, 1), rank=0)
    bare = program.build_chunks()
    chunks = wrap(bare, device)
    draw_weights(bare, 0)
    samples = []
    image_tokens = model.packing.image_tokens
    for k, (module, part) in enumerate(PARTS):
        sizes: Sequence[tuple[int, Microbatch]]
        if module == VISION:
            reduction = model.module(VISION).reduction
            sizes = [(n * image_tokens * reduction, Microbatch(image_tokens, (image_tokens,) * n)) for n in images]
        else:
            counts = [t // (2 * image_tokens) for t in tokens]
            sizes = [
                (t, Microbatch(t - n * image_tokens, (image_tokens,) * n)) for t, n in zip(tokens, counts, strict=True)
            ]
        for size, microbatch in sizes:
            progress(f"{module} {part}, {size} tokens")
            arguments = _arguments(draw_batch(microbatch, kwargs, device, 0))
            share = layers if part == "layer" else 1
            names = [s.name for s in known_strategies() if not s.instead_of]  # those cost what they stand for does
            for strategy in names if part == "layer" else ("none",):
                stage = OperationRun(
                    program, chunks[k], Operation(Kind.F, MODEL, k, 0, 0), MicrobatchInputs(arguments),
                    _before(program, k, microbatch), device, final=k == len(PARTS) - 1,
                    strategies=() if strategy == "none" else (strategy,) * layers,
                )  # fmt: skip
                steps = [stage.forward, stage.backward, stage.weight]
                forward, backward, weight = (s / share for s in measure(steps, device, repeats=repeats))
                activation, deferred_activation = (None if b is None else b / share for b in stage.bytes_held())
                samples.append(
                    PartSample(
                        module=module,
                        part=part,
                        tokens=float(size),
                        forward=forward,
                        backward=backward,
                        weight=weight,
                        activation=activation,
                        deferred_activation=deferred_activation,
                        strategy=strategy,
                    )
                )
    return samples


def _before(program: MixedLlavaProgram, segment: int, microbatch: Microbatch) -> Payload:
    """What the part before hands over."""
    if segment == 0:
        return ()
    return program.shapes.operation_payload(Operation(Kind.F, MODEL, segment - 1, 0, 0), Unit(0, MODEL, 0), microbatch)


def _arguments(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    names = {"tokens": "input_ids", "position_ids": "position_ids", "labels": "labels", "loss_mask": "loss_mask"}
    arguments: dict[str, Any] = {target: batch[source] for source, target in names.items()}
    return arguments | {"images": batch["images"], "attention_mask": None}


def costs_of(samples: Sequence[Sequence[PartSample]], device: str, **fixed: Any) -> Costs:
    """A costs file's content: the median over several ranks' measurements of the same parts and sizes."""
    tables = []
    for module, part, strategy in dict.fromkeys((s.module, s.part, s.strategy) for s in samples[0]):
        mine = [sorted((s for s in line if (s.module, s.part, s.strategy) == (module, part, strategy)),
                       key=lambda s: s.tokens) for line in samples]  # fmt: skip
        sizes = tuple(s.tokens for s in mine[0])
        for quantity in QUANTITIES if strategy == "none" else STRATEGY_QUANTITIES:
            values = [[getattr(line[i], quantity) for line in mine] for i in range(len(sizes))]
            if any(v is None for line in values for v in line):
                continue
            middle = tuple(max(float(statistics.median(line)), 0.0) for line in values)
            tables.append(Table(module, part, quantity, sizes, middle, strategy))  # type: ignore[arg-type]
    return Costs(tables=tuple(tables), device=device, **fixed)


@dataclass(frozen=True)
class OperationSeconds:
    """One stage: seconds of its F, of B and W apart, and of BW."""

    forward: float
    backward: float
    weight: float
    fused: float


def profile_operation(
    program: ModelProgram, chunk: torch.nn.Module, operation: Operation, inputs: MicrobatchInputs, payload: Payload,
    device: torch.device, *, final: bool, repeats: int = 5,
) -> OperationSeconds:  # fmt: skip
    """Measure a whole stage of a rank's chunk. ``payload`` is what it receives, empty where nothing comes before;
    ``final``: it has the loss."""
    split = OperationRun(program, chunk, operation, inputs, payload, device, final=final)
    whole = OperationRun(program, chunk, operation, inputs, payload, device, final=final, split=False)
    forward, backward, weight = measure([split.forward, split.backward, split.weight], device, repeats=repeats)
    _, fused = measure([whole.forward, whole.backward], device, repeats=repeats)
    return OperationSeconds(forward, backward, weight, fused)


class OperationRun:
    """One stage with inputs of one size: its F, B (or BW) and W, to be called in this order, again and again."""

    def __init__(
        self, program: ModelProgram, chunk: torch.nn.Module, operation: Operation, inputs: MicrobatchInputs,
        payload: Payload, device: torch.device, *, final: bool, split: bool = True, strategies: tuple[str, ...] = (),
    ):  # fmt: skip
        """``strategies``: the memory strategy of each layer, empty for none; the rest as in
        :func:`profile_operation`."""
        self._program, self._chunk, self._key, self._inputs = program, chunk, operation, inputs
        self._payload, self._device, self._final = payload, device, final
        self._weights = WeightGradients() if split else None
        self._strategies = strategies
        self._offloaded: OffloadedActivations | None = None
        self._output: torch.Tensor | None = None
        self._slots: list[Slot] = []

    def forward(self) -> None:
        received = {}
        for spec in self._payload:
            tensor = torch.ones(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
            received[spec.name], slot = start(tensor)
            self._slots.append(slot)
            del tensor
        inputs = [received] if received else []
        del received
        mode = self._program.mode
        self._offloaded = mode.offload() if offloads(self._strategies) else None
        with mode.stage(self._weights, self._strategies, self._offloaded):
            if self._final:
                losses = self._program.final(self._chunk, Inputs(inputs), self._inputs.arguments)
                self._output = (losses[0] if isinstance(losses, tuple) else losses).float().sum()
            else:
                unit = Unit(self._key.unit, self._key.module, 0)
                outputs = self._program.forward(self._chunk, self._key, unit, Inputs(inputs), self._inputs)
                (self._output,) = outputs.values()

    def backward(self) -> None:
        assert self._output is not None
        if self._offloaded is not None:
            self._offloaded.prefetch()
        gradient = None if self._final else torch.ones_like(self._output)
        with self._program.mode.stage(self._weights):
            torch.autograd.backward([self._output], None if gradient is None else [gradient])
        self._output = self._offloaded = None
        while self._slots:
            self._slots.pop().take()

    def weight(self) -> None:
        """W; nothing is left for it after a BW."""
        if self._weights is not None:
            self._weights.compute()

    def bytes_held(self) -> tuple[float | None, float | None]:
        """What the stage keeps on a GPU between F and B, its input included and its output not; and between B and W."""
        if self._device.type != "cuda":
            return None, None
        before = torch.cuda.memory_allocated(self._device)
        self.forward()
        assert self._output is not None
        own = 0 if self._final else self._output.numel() * self._output.element_size()
        held = torch.cuda.memory_allocated(self._device) - before - own
        self.backward()
        left = torch.cuda.memory_allocated(self._device) - before
        self.weight()
        return float(max(held, 0)), float(max(left, 0))
