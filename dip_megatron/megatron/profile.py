"""Seconds and bytes of a LLaVA's parts, measured on the layers that will train: for the costs file.

Every part (stem, layers, head of both modules) becomes a stage of its own on one rank and runs as the executor runs it:
forward, input gradients, weight gradients apart.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..cost import Costs, LayerRun, Table
from ..model import MultimodalModel
from ..models.mixed_llava import MODEL, MixedLlavaProgram
from ..models.protocol import MicrobatchInputs
from ..models.shapes import LANGUAGE, VISION
from ..profile.timing import measure
from ..runtime.deferred import Slot, WeightGradients, start
from ..schedule import Kind, StageKey, Unit
from ..workload import Microbatch
from .synthetic import draw_batch, draw_weights, llava_parts, wrap

LAYERS = 4
PARTS: tuple[tuple[str, str], ...] = (
    (VISION, "stem"), (VISION, "layer"), (VISION, "head"), (LANGUAGE, "stem"), (LANGUAGE, "layer"), (LANGUAGE, "head"),
)  # fmt: skip


@dataclass(frozen=True)
class PartSample:
    """One part at one size: tokens of its module, seconds of F, B and W, and (on a GPU) bytes held after F and B."""

    module: str
    part: str
    tokens: float
    forward: float
    backward: float
    weight: float
    activation: float | None = None
    hold: float | None = None


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
    program = MixedLlavaProgram(kwargs, stages, rank=0, ranks=1)
    bare = program.build_chunks()
    chunks = wrap(bare, device)
    draw_weights(llava_parts(bare), 0)
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
            stage = _PartRun(program, chunks, k, draw_batch(microbatch, kwargs, device, 0), microbatch)
            share = layers if part == "layer" else 1
            seconds = [s / share for s in measure(stage.steps, device, repeats=repeats)]
            held = [None if b is None else b / share for b in stage.bytes_held()]
            samples.append(PartSample(module, part, float(size), *seconds, *held))
    return samples


def costs_of(samples: Sequence[Sequence[PartSample]], device: str, **fixed: Any) -> Costs:
    """A costs file's content: the median over several ranks' measurements of the same parts and sizes."""
    tables = []
    for module, part in PARTS:
        mine = [sorted((s for s in line if (s.module, s.part) == (module, part)), key=lambda s: s.tokens)
                for line in samples]  # fmt: skip
        sizes = tuple(s.tokens for s in mine[0])
        for quantity in ("forward", "backward", "weight", "activation", "hold"):
            values = [[getattr(line[i], quantity) for line in mine] for i in range(len(sizes))]
            if any(v is None for line in values for v in line):
                continue
            middle = tuple(max(float(statistics.median(line)), 0.0) for line in values)
            tables.append(Table(module, part, quantity, sizes, middle))  # type: ignore[arg-type]
    return Costs(tables=tuple(tables), device=device, **fixed)


class _PartRun:
    """One stage with inputs of one size; ``steps`` are its F, B and W, to be run in this order."""

    def __init__(
        self, program: MixedLlavaProgram, chunks: Sequence[torch.nn.Module], segment: int,
        batch: dict[str, torch.Tensor], microbatch: Microbatch,
    ):  # fmt: skip
        self._program, self._chunk, self._segment = program, chunks[segment], segment
        self._final = segment == len(chunks) - 1
        names = {"tokens": "input_ids", "position_ids": "position_ids", "labels": "labels", "loss_mask": "loss_mask"}
        self._arguments = {target: batch[source] for source, target in names.items()}
        self._arguments |= {"images": batch["images"], "attention_mask": None}
        self._device = batch["tokens"].device
        self._shape = None
        if segment > 0:
            module, part = PARTS[segment - 1]
            self._shape = program._after(module, part == "head", len(microbatch.images), microbatch.tokens)
        self._weights = WeightGradients()
        self._output: torch.Tensor | None = None
        self._slot: Slot | None = None
        self.steps = [self.forward, self.backward, self._weights.compute]

    def forward(self) -> None:
        program = self._program
        inputs = []
        if self._shape is not None:
            dtype = getattr(torch, program.shapes.dtype)
            hidden, self._slot = start(torch.ones(self._shape, dtype=dtype, device=self._device))
            inputs = [{"hidden": hidden}]
            del hidden
        with program.mode.stage(self._weights):
            if self._final:
                losses, _ = program.final(self._chunk, inputs, self._arguments)
                self._output = losses.float().sum()
            else:
                key = StageKey(Kind.F, MODEL, self._segment, 0, 0)
                microbatch = MicrobatchInputs(self._arguments)
                self._output = program.forward(self._chunk, key, Unit(0, MODEL, 0), inputs, microbatch)["hidden"]

    def backward(self) -> None:
        assert self._output is not None
        gradient = None if self._final else torch.ones_like(self._output)
        with self._program.mode.stage(self._weights):
            torch.autograd.backward([self._output], None if gradient is None else [gradient])
        self._output = None
        if self._slot is not None:
            self._slot.take()

    def bytes_held(self) -> tuple[float | None, float | None]:
        """What the stage keeps between F and B, its input included and its output not; and between B and W."""
        if self._device.type != "cuda":
            return None, None
        before = torch.cuda.memory_allocated(self._device)
        self.forward()
        assert self._output is not None
        own = 0 if self._final else self._output.numel() * self._output.element_size()
        held = torch.cuda.memory_allocated(self._device) - before - own
        self.backward()
        left = torch.cuda.memory_allocated(self._device) - before
        self._weights.compute()
        return float(max(held, 0)), float(max(left, 0))
