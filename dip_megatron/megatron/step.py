"""Megatron's own pieces of a step, called by the executor's stages.

Everything about losses, scales, timers, autocast, ranges and pseudo-deallocation is Megatron's code, looked up when it
is called; only the order of calls is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import make_viewless_tensor, nvtx_range_pop, nvtx_range_push

from ..runtime.deferred import WeightGradients
from ..runtime.stages import ReplayIterator
from ..runtime.transport import Tensors
from .rerun import counted_as


class MegatronStep:
    """One iteration's step functions (see :class:`runtime.stages.StepFunctions`)."""

    def __init__(
        self,
        config: Any,
        forward_step_func: Callable[..., Any],
        *,
        num_microbatches: int,
        context_parallel_size: int,
        collect_non_loss_data: bool,
    ):
        """``config`` is ``model[0]``'s, which Megatron's train loop fills with timers and functions."""
        self._data: dict[int, list[Any]] = {}
        self.total_num_tokens: torch.Tensor | None = None
        self._config = config
        self._forward_step_func = forward_step_func
        self._num_microbatches = num_microbatches
        self._context_parallel_size = context_parallel_size
        self._collect_non_loss_data = collect_non_loss_data

    def forward(self, chunk: torch.nn.Module, compute: Callable[[], Tensors]) -> Tensors:
        """A stage before the last."""
        with self._range("forward-compute"):
            self._start_timer("forward-compute")
            with self._autocast():
                # Pseudo-deallocation frees storage, so an output must not be a view of something else.
                outputs = {
                    name: make_viewless_tensor(t, requires_grad=t.requires_grad, keep_graph=True)
                    for name, t in compute().items()
                }
            # Also sets the scales of auxiliary losses (MoE, MTP), and stops the timer.
            self._calculate_loss(chunk, next(iter(outputs.values())), None, is_last_stage=False)
        return outputs

    @property
    def forward_data_store(self) -> list[Any]:
        """What the loss functions reported, in the order of microbatches whatever order the plan ran them in."""
        return [item for microbatch in sorted(self._data) for item in self._data[microbatch]]

    def loss(self, chunk: torch.nn.Module, model: Any, items: list[Any] | None, microbatch: int) -> torch.Tensor:
        """The last stage, through the script's forward_step and loss function."""
        with self._range("forward-compute"):
            self._start_timer("forward-compute")
            iterator = None if items is None else ReplayIterator(items)
            with self._autocast():
                output, loss_func = self._forward_step_func(iterator, model)
            with counted_as(microbatch, self._num_microbatches):
                output, num_tokens = self._calculate_loss(
                    chunk, output, loss_func, is_last_stage=True, store=self._data.setdefault(microbatch, [])
                )
        if self.total_num_tokens is None:
            # A loss function may return a plain number where nothing is to be trained.
            device = output.device if isinstance(output, torch.Tensor) else num_tokens.device
            self.total_num_tokens = torch.zeros([], dtype=torch.int, device=device)
        self.total_num_tokens += num_tokens.to(self.total_num_tokens.device)
        return output

    def backward(self, outputs: list[torch.Tensor], gradients: list[torch.Tensor] | None) -> None:
        """As Megatron's backward_step, for any number of outputs."""
        config = self._config
        with self._range("backward-compute"), self._timed("backward-compute"):
            if gradients is None and config.grad_scale_func is not None:
                outputs = [config.grad_scale_func(outputs[0])]
            if not outputs[0].requires_grad:
                return
            if config.deallocate_pipeline_outputs and len(outputs) == 1:
                schedules.custom_backward(outputs[0], gradients[0] if gradients else None)
            else:
                torch.autograd.backward(outputs, grad_tensors=gradients)

    def weight(self, gradients: WeightGradients) -> None:
        """The second half of a backward in two; in the log it counts with the first."""
        with self._range("backward-weight"), self._timed("backward-compute"):
            gradients.compute()

    def release(self, outputs: list[torch.Tensor]) -> None:
        """Megatron's pseudo-deallocation; its custom_backward takes one output, so only then."""
        if len(outputs) == 1 and outputs[0].requires_grad:
            schedules.deallocate_output_tensor(outputs[0], self._config.deallocate_pipeline_outputs)

    def _calculate_loss(
        self,
        chunk: torch.nn.Module,
        output: Any,
        loss_func: Callable[..., Any] | None,
        *,
        is_last_stage: bool,
        store: list[Any] | None = None,
    ) -> tuple[Any, torch.Tensor]:
        result = schedules.forward_step_calc_loss(
            chunk, output, loss_func, self._config, None, self._collect_non_loss_data, self._num_microbatches,
            store, self._context_parallel_size, is_last_stage,
        )  # fmt: skip
        return result[0], result[1]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._config.enable_autocast:
            return torch.autocast("cuda", dtype=self._config.autocast_dtype)
        return contextlib.nullcontext()

    def _start_timer(self, name: str) -> None:
        if self._config.timers is not None:
            self._config.timers(name, log_level=2).start()

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._start_timer(name)
        try:
            yield
        finally:
            if self._config.timers is not None:
                self._config.timers(name).stop()

    @contextlib.contextmanager
    def _range(self, name: str) -> Iterator[None]:
        nvtx_range_push(suffix=name)
        try:
            yield
        finally:
            nvtx_range_pop(suffix=name)
