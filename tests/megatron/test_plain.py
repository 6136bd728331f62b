"""Chunks of no model family: Megatron's schedules through our executor, on real processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.patience import APART
from tests.processes import ProcessFailure, team
from tests.runtime.llava_case import initialize

RANKS, LENGTH, BATCH, HIDDEN = 2, 3, 2, 8
MICROBATCHES = 6


class Chunk(torch.nn.Module):
    """One stage: a linear layer; the first one embeds what it is given, the last returns a loss per element."""

    def __init__(self, stage: int, config: Any):
        super().__init__()
        self.stage, self.config, self.given = stage, config, None
        self.vp_stage, self.model_type = stage // RANKS, "chunk"  # Megatron's schedules read them
        self.layer = torch.nn.Linear(HIDDEN, HIDDEN)
        generator = torch.Generator().manual_seed(stage)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        self.given = tensors[0]

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        hidden = data if self.stage == 0 else self.given
        return torch.tanh(self.layer(hidden))


def forward_step(data_iterator: Iterator[torch.Tensor], model: Any) -> Any:
    output = model(next(data_iterator))

    def loss_func(tensor: torch.Tensor) -> Any:
        loss = (tensor.float() ** 2).sum()
        return loss, torch.tensor(LENGTH * BATCH, dtype=torch.int), {"loss": loss.detach().clone()}

    return output, loss_func


def run(rank: int, world: int, schedule: str, segments: int, microbatches: int, forward_only: bool) -> Any:
    """Losses, gradients of this rank's stages, and the number of tokens that finalizing was given."""
    initialize(world)
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.pipeline_parallel import schedules

    from dip_megatron.testing.plain import PlainForwardBackward

    finalized: list[Any] = []
    config = ModelParallelConfig(
        pipeline_model_parallel_size=world, pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=segments if segments > 1 else None,
        overlap_p2p_comm=segments > 1, batch_p2p_comm=False, deallocate_pipeline_outputs=False,
    )  # fmt: skip
    # Megatron's schedules read them, whatever the kind of config.
    config.hidden_size, config.calculate_per_token_loss = HIDDEN, True
    config.fine_grained_activation_offloading = False
    config.finalize_model_grads_func = lambda model, tokens, **_: finalized.append(int(tokens))
    parallel_state.set_virtual_pipeline_model_parallel_world_size(segments if segments > 1 else None)
    chunks = [Chunk(v * world + rank, config) for v in range(segments)]
    data = [torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(microbatches)]
    functions = {
        "megatron": getattr(schedules, f"forward_backward_pipelining_with{'' if segments > 1 else 'out'}_interleaving"),
        "dip": PlainForwardBackward(APART),
    }
    losses = functions[schedule](
        forward_step_func=forward_step, data_iterator=[iter(data) for _ in chunks], model=chunks,
        num_microbatches=microbatches, seq_length=LENGTH, micro_batch_size=BATCH, forward_only=forward_only,
    )  # fmt: skip
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    gradients = {f"{c.stage}.{name}": p.grad for c in chunks for name, p in c.named_parameters()}
    return [entry["loss"] for entry in losses], gradients, finalized


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_losses_and_gradients_are_those_of_megatrons_schedule(segments: int) -> None:
    expected = team(RANKS).run(run, "megatron", segments, MICROBATCHES, False)
    ours = team(RANKS).run(run, "dip", segments, MICROBATCHES, False)
    assert len(ours[-1][0]) == MICROBATCHES
    for own, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(own[0], theirs[0], rtol=0, atol=0)
        assert len(own[1]) == 2 * segments
        torch.testing.assert_close(own[1], theirs[1], rtol=1e-6, atol=1e-7)
        assert own[2] == theirs[2]


@pytest.mark.parametrize("segments", [1, 2])
def test_evaluation_gives_losses_and_no_gradients(segments: int) -> None:
    expected = team(RANKS).run(run, "megatron", segments, MICROBATCHES, True)
    ours = team(RANKS).run(run, "dip", segments, MICROBATCHES, True)
    for own, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(own[0], theirs[0], rtol=0, atol=0)
        assert all(gradient is None for gradient in own[1].values())


def test_a_microbatch_count_that_megatron_refuses_is_refused() -> None:
    with pytest.raises(ProcessFailure, match="RuntimeError: 5 microbatches in groups of 2 on 2 pipeline ranks"):
        team(RANKS).run(run, "dip", 2, 5, False)
