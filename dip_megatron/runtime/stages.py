"""Runs stages of a model's chunks with autograd, using Megatron's own step functions where it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..models.protocol import MicrobatchInputs, StageProgram
from ..schedule import Kind, StageKey, Unit
from .transport import Tensors


class StepFunctions(Protocol):
    """Megatron's parts of a step; see :mod:`dip_megatron.megatron.step`."""

    def forward(self, chunk: torch.nn.Module, compute: Callable[[], Tensors]) -> Tensors:
        """Run a stage that is not the last one, with Megatron's timers, autocast and loss scales around it."""
        ...

    def loss(self, chunk: torch.nn.Module, model: Any, items: list[Any], microbatch: int) -> torch.Tensor:
        """Run the script's forward_step with ``model`` on a microbatch's raw items; the scaled loss."""
        ...

    def backward(self, outputs: list[torch.Tensor], gradients: list[torch.Tensor] | None) -> None:
        """Autograd's backward; ``gradients`` is None for the loss."""
        ...

    def release(self, outputs: list[torch.Tensor]) -> None:
        """Drop the storage of outputs that were sent, if Megatron is told to."""
        ...


class ModelStandIn:
    """What a script's forward_step sees as its model: it calls it once, and may read attributes of the real chunk."""

    def __init__(self, chunk: torch.nn.Module, call: Callable[..., Any]):
        self._chunk = chunk
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chunk, name)


@dataclass
class _Saved:
    """What a stage's backward needs."""

    inputs: list[Tensors]
    outputs: Tensors
    is_loss: bool = False


@dataclass
class IterationState:
    """One iteration's microbatches and saved activations."""

    microbatches: list[MicrobatchInputs]
    forward_only: bool
    saved: dict[tuple[int, int], _Saved] = field(default_factory=dict)
    remaining: dict[tuple[str, int], int] = field(default_factory=dict)


class ModelStages:
    """The executor's stage runner for one rank's chunks of a program's model."""

    def __init__(
        self,
        program: StageProgram,
        chunks: list[torch.nn.Module],
        step: StepFunctions,
        state: IterationState,
        *,
        last_rank: int,
        on_chunk_done: Callable[[int], None] = lambda _: None,
    ):
        """``chunks`` are wrapped (DDP, Float16Module) and in the program's order; ``on_chunk_done(index)`` is called
        after a chunk's last backward of the iteration, for each chunk counted in ``state.remaining``."""
        self._program = program
        self._step = step
        self._state = state
        self._on_chunk_done = on_chunk_done
        places = [(m.name, k) for m in program.modules for k in range(m.segments)]
        self._index = {place: i for i, place in enumerate(places)}
        self._chunks = chunks
        final = program.modules[-1]
        self._final = (final.name, final.segments - 1, last_rank)

    def forward(self, key: StageKey, unit: Unit, strategy: str, inputs: list[Tensors]) -> Tensors:
        chunk = self._chunks[self._index[key.module, key.segment]]
        microbatch = self._state.microbatches[unit.microbatch]
        train = not self._state.forward_only
        leaves = [
            {name: t.detach().requires_grad_(train and t.is_floating_point()) for name, t in payload.items()}
            for payload in inputs
        ]
        if (key.module, key.segment, key.rank) == self._final:
            model = ModelStandIn(chunk, lambda *a, **k: self._program.final(chunk, leaves, self._program.bind(*a, **k)))
            outputs = {"loss": self._step.loss(chunk, model, microbatch.items, unit.microbatch)}
            if train:
                self._state.saved[key.unit, key.segment] = _Saved(leaves, outputs, is_loss=True)
            return {}
        outputs = self._step.forward(chunk, lambda: self._program.forward(chunk, key, unit, leaves, microbatch))
        if train:
            self._state.saved[key.unit, key.segment] = _Saved(leaves, outputs)
        return outputs

    def sent(self, key: StageKey, unit: Unit) -> None:
        saved = self._state.saved.get((key.unit, key.segment))
        if saved is not None and not saved.is_loss:
            self._step.release(list(saved.outputs.values()))

    def backward(self, key: StageKey, unit: Unit, strategy: str, gradients: list[Tensors]) -> list[Tensors]:
        saved = self._state.saved.pop((key.unit, key.segment))
        if saved.is_loss:
            self._step.backward([saved.outputs["loss"]], None)
        else:
            names = [name for name, t in saved.outputs.items() if t.requires_grad]
            if names:
                # A stage that feeds several others gets the sum of what they send back.
                total = [
                    g[0] if len(g) == 1 else torch.stack(g).sum(0)
                    for g in ([payload[name] for payload in gradients] for name in names)
                ]
                self._step.backward([saved.outputs[name] for name in names], total)
        results = [
            {name: t.grad if t.grad is not None else torch.zeros_like(t) for name, t in payload.items()
             if t.requires_grad}
            for payload in saved.inputs
        ]  # fmt: skip
        if key.kind == Kind.BW:
            self._chunk_progress(key)
        return results

    def weight(self, key: StageKey, unit: Unit, strategy: str) -> None:
        raise RuntimeError(f"{key}: this model's layers can't defer weight gradients; plan with split backward off")

    def _chunk_progress(self, key: StageKey) -> None:
        place = (key.module, key.segment)
        self._state.remaining[place] -= 1
        if not self._state.remaining[place]:
            self._on_chunk_done(self._index[place])


class ReplayIterator:
    """Yields a microbatch's raw items again, for the forward_step that computes its loss."""

    def __init__(self, items: list[Any]):
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._items)
