"""A training loop of one's own on Megatron-Core, without ``megatron.training``: DIP schedules it if it is asked to.

    torchrun --nproc-per-node 2 examples/any_loop/train.py                         # Megatron-Core's own schedule
    DIP_SCHEDULE=dynamic torchrun --nproc-per-node 2 examples/any_loop/train.py    # under plans

Both print the same losses and gradient norms (docs/any-loop.md). Without a GPU, ranks compute on the CPU over gloo.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import dip_megatron
from dip_megatron.families.shared.weights import draw_by_name
from dip_megatron.megatron.cpu import install_cpu_platform

install_cpu_platform()  # does nothing where there is a GPU

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

dip_megatron.install()

VOCABULARY, LENGTH, MICROBATCHES = 256, 64, 6


def provide(pre_process: bool, post_process: bool) -> GPTModel:
    """One pipeline stage of the model."""
    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, persist_layer_norm=False, gradient_accumulation_fusion=False,
        variable_seq_lengths=True, moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    return GPTModel(
        config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, pre_process=pre_process, post_process=post_process
    )


def microbatches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Tokens and labels ``[1, length]``, of lengths that differ from microbatch to microbatch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        length = int(torch.randint(8, LENGTH, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (1, length + 1), generator=generator)
        yield {"tokens": ids[:, :-1], "labels": ids[:, 1:]}


def loss_func(losses: torch.Tensor) -> Any:
    """The mean of losses per token ``[1, length]``, to train on and to report."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def forward_step(data_iterator: Any, model: Any) -> Any:
    """One microbatch, as Megatron-Core's schedules want it."""
    item = {name: tensor.to(torch.cuda.current_device()) for name, tensor in next(data_iterator).items()}
    positions = torch.arange(item["tokens"].shape[1], device=item["tokens"].device).unsqueeze(0)
    return model(item["tokens"], positions, None, labels=item["labels"]), loss_func


def main() -> None:
    """Train, and print the loss and the gradients' norm of every iteration on the last rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--prefetched", action="store_true", help="draw an iteration's microbatches before it begins")
    parser.add_argument("--read-ahead", action="store_true", help="let DIP read the next microbatches meanwhile")
    parser.add_argument("--evaluate", action="store_true", help="after each iteration, on the same data")
    parser.add_argument("--own-model", action="store_true", help="build the model without DIP")
    parser.add_argument("--by-hand", action="store_true", help="call a stage without the schedule (DIP refuses)")
    options = parser.parse_args()
    iteration = 0
    dist.init_process_group("gloo" if install_cpu_platform() else "nccl")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)

    stages = dip_megatron.build_model(
        provide, micro_batch_size=1, num_microbatches=MICROBATCHES, read_ahead=options.read_ahead,
        another_follows=lambda: iteration + 1 < options.iterations, log_interval=options.iterations,
    )  # fmt: skip
    if options.own_model:
        stages = [provide(parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())]
    if options.by_hand:
        forward_step(microbatches(0), stages[0])
    draw_by_name(stages, 1, lambda name, parameter: 0.05 if parameter.dim() > 1 else None)
    settings = DistributedDataParallelConfig(overlap_grad_reduce=False)
    chunks = [DistributedDataParallel(stage.config, settings, stage) for stage in stages]
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads

    data = microbatches(seed=dist.get_rank(parallel_state.get_data_parallel_group()))
    for iteration in range(options.iterations):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        drawn = iter([next(data) for _ in range(MICROBATCHES)]) if options.prefetched else data
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=drawn, model=chunks, num_microbatches=MICROBATCHES,
            seq_length=LENGTH, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        step(chunks, losses, iteration)
        if options.evaluate:
            evaluated = get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=data, model=chunks, num_microbatches=2,
                seq_length=LENGTH, micro_batch_size=1, forward_only=True,
            )  # fmt: skip
            if evaluated:
                print(f"evaluated: {sum(float(loss['loss']) for loss in evaluated) / 2:.9f}", flush=True)


def step(chunks: list[Any], losses: list[dict[str, torch.Tensor]], iteration: int) -> None:
    """Plain gradient descent, and a line on the last rank."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    norm = sum((p.main_grad.double() ** 2).sum() for p in parameters)
    dist.all_reduce(norm, group=parallel_state.get_pipeline_model_parallel_group())
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.main_grad
    if losses:
        mean = sum(float(loss["loss"]) for loss in losses) / len(losses)
        print(f"iteration {iteration}: loss {mean:.9f}, gradient norm {float(norm) ** 0.5:.9f}", flush=True)


if __name__ == "__main__":
    main()
