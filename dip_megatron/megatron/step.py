"""Megatron's own pieces of a step, called by the executor's stages.

Everything about losses, scales, timers, autocast and ranges is Megatron's code, looked up when it is called; only the
order of calls is ours. Its pseudo-deallocation of outputs isn't needed: a stage's graph is entered without them (see
:func:`runtime.deferred.leave`), so that they are free once they are sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..compat.losses import calculate_loss, profiled
from ..compat.token_counts import TokenCounts
from ..runtime.chunk_runner import LossPart, ReplayIterator
from ..runtime.deferred import WeightGradients
from ..runtime.transport import Tensors
from .rerun import counted_as


class MegatronStep:
    """One iteration's step functions (see :class:`runtime.chunk_runner.StepFunctions`)."""

    def __init__(
        self,
        config: Any,
        forward_step_func: Callable[..., Any],
        *,
        num_microbatches: int,
        context_parallel_size: int,
        collect_non_loss_data: bool,
        averaged_over: int | None = None,
        counts: TokenCounts | None = None,
    ):
        """``config`` is ``model[0]``'s, which Megatron's train loop fills with timers and functions. A mean loss of a
        microbatch is divided by ``averaged_over``: the loop's number of microbatches, of which replicas may run more or
        fewer (None: these), so that all weigh the same. ``counts`` are the loop's (None: Megatron's)."""
        self._data: dict[int, list[tuple[LossPart, Any]]] = {}
        self.total_num_tokens: torch.Tensor | None = None
        self._config = config
        self._forward_step_func = forward_step_func
        self._num_microbatches = num_microbatches
        self._averaged_over = averaged_over or num_microbatches
        self._counts = counts or TokenCounts()
        self._context_parallel_size = context_parallel_size
        self._collect_non_loss_data = collect_non_loss_data

    def forward(self, chunk: torch.nn.Module, compute: Callable[[], Tensors]) -> Tensors:
        """A stage before the last."""
        with profiled("forward-compute"):
            self._start_timer("forward-compute")
            with self._autocast():
                outputs = compute()
            # Also sets the scales of auxiliary losses (MoE, MTP), and stops the timer.
            self._calculate_loss(chunk, next(iter(outputs.values())), None, is_last_stage=False)
        return outputs

    @property
    def forward_data_store(self) -> list[Any]:
        """What the loss functions reported, in the order of microbatches whatever order the plan ran them in."""
        return [item for microbatch in sorted(self._data) for item in _whole(self._data[microbatch])]

    def loss(
        self, chunk: torch.nn.Module, model: Any, items: list[Any] | None, microbatch: int, part: LossPart
    ) -> torch.Tensor:
        """The last stage, through the script's forward_step and loss function."""
        values = 0

        def observed(*args: Any, **kwargs: Any) -> Any:
            nonlocal values
            result = loss_func(*args, **kwargs)
            values = len(result) if isinstance(result, tuple) else 0
            return result

        store: list[Any] = []
        with profiled("forward-compute"):
            self._start_timer("forward-compute")
            iterator = None if items is None else ReplayIterator(items)
            with self._autocast(), self._counts.set_aside():  # counted when it was read
                output, loss_func = self._forward_step_func(iterator, model)
            with counted_as(microbatch, self._num_microbatches):
                output, num_tokens = self._calculate_loss(
                    chunk, output, None if loss_func is None else observed, is_last_stage=True, store=store
                )
        self._data.setdefault(microbatch, []).extend((part, item) for item in store)
        if part.share != 1.0 and not (values == 3 and self._config.calculate_per_token_loss):
            # Megatron averages over what it is given: here a part of the microbatch.
            output = output * part.share
        if self.total_num_tokens is None:
            # A loss function may return a plain number where nothing is to be trained.
            device = output.device if isinstance(output, torch.Tensor) else num_tokens.device
            self.total_num_tokens = torch.zeros([], dtype=torch.int, device=device)
        self.total_num_tokens += num_tokens.to(self.total_num_tokens.device)
        return output

    def backward(self, outputs: list[torch.Tensor], gradients: list[torch.Tensor] | None) -> None:
        """As Megatron's backward_step, for any number of outputs."""
        config = self._config
        with profiled("backward-compute"), self._timed("backward-compute"):
            if gradients is None and config.grad_scale_func is not None:
                outputs = [config.grad_scale_func(outputs[0])]
            if not outputs[0].requires_grad:
                return
            torch.autograd.backward(outputs, grad_tensors=gradients)

    def weight(self, gradients: WeightGradients) -> None:
        """The second half of a backward in two; in the log it counts with the first."""
        with profiled("backward-weight"), self._timed("backward-compute"):
            gradients.compute()

    def _calculate_loss(
        self,
        chunk: torch.nn.Module,
        output: Any,
        loss_func: Callable[..., Any] | None,
        *,
        is_last_stage: bool,
        store: list[Any] | None = None,
    ) -> tuple[Any, torch.Tensor]:
        return calculate_loss(
            chunk, output, loss_func, self._config, None, self._collect_non_loss_data, self._averaged_over,
            store, self._context_parallel_size, is_last_stage,
        )  # fmt: skip

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


def _whole(parts: list[tuple[LossPart, Any]]) -> list[Any]:
    """What a microbatch's loss function reported, as if it had been called once for all of it: sums with their counts
    (two elements) add up, means (one) are weighted by their share. Raises ValueError for anything else."""
    if len(parts) < 2 or not all(isinstance(report, dict) for _, report in parts):
        return [report for _, report in sorted(parts, key=lambda item: item[0].first)]
    whole = {}
    for name, first in parts[0][1].items():
        if not isinstance(first, torch.Tensor) or first.numel() > 2:
            raise ValueError(
                f"the loss function reports {name!r} as {first!r}; where a microbatch's loss is computed in parts it "
                "must be a tensor of one element (a mean) or two (a sum and its count)"
            )
        mean = first.numel() == 1
        whole[name] = sum(report[name] * part.share if mean else report[name] for part, report in parts)
    return [whole]
