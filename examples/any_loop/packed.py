"""A training loop of one's own that packs documents into microbatches, and tells DIP how: replicas exchange documents.

    torchrun --nproc-per-node 4 examples/any_loop/packed.py                        # Megatron-Core's own schedule
    DIP_SCHEDULE=dynamic DIP_BALANCE=swap DIP_RESAMPLE=true torchrun --nproc-per-node 4 examples/any_loop/packed.py

Both print the same losses and gradient norms (docs/balance.md). Two pipeline ranks a replica; every second replica
reads documents twice as long. A document attends to itself alone, and losses are weighted by tokens, so that it doesn't
matter which documents share a microbatch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from train import LENGTH, VOCABULARY, provide  # type: ignore[import-not-found]  # installs DIP's hook

import dip_megatron
from dip_megatron import MicrobatchInputs, draw_by_name, install_cpu_platform

from megatron.core import parallel_state, tensor_parallel  # isort: skip
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

STAGES, MICROBATCHES = 2, 3
Item = dict[str, torch.Tensor]


def packed(documents: Sequence[Item]) -> Item:
    """One microbatch: tokens and labels ``[1, length]`` of all, and the ``lengths`` of each."""
    item = {name: torch.cat([document[name] for document in documents])[None] for name in ("tokens", "labels")}
    return item | {"lengths": torch.tensor([len(document["tokens"]) for document in documents])}


def arguments(item: Item) -> dict[str, torch.Tensor]:
    """What the model is called with: positions and attention begin anew with every document."""
    lengths = item["lengths"]
    number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.cat([torch.arange(int(length)) for length in lengths])
    hidden = (number[:, None] != number) | (place[:, None] < place)
    given = {"input_ids": item["tokens"], "position_ids": place[None], "attention_mask": hidden[None, None]}
    return {name: given[name].to(torch.cuda.current_device()) for name in given} | {
        "labels": item["labels"].to(torch.cuda.current_device())
    }


class DocumentPacking:
    """How microbatches are made of documents: a ``dip_megatron.SamplePacking``."""

    length = LENGTH

    def split(self, microbatch: MicrobatchInputs) -> list[Item]:
        item = (microbatch.items or [])[0]
        parts = [item[name][0].split(item["lengths"].tolist()) for name in ("tokens", "labels")]
        return [{"tokens": tokens, "labels": labels} for tokens, labels in zip(*parts, strict=True)]

    def tokens(self, sample: Item) -> int:
        return len(sample["tokens"])

    def pack(self, samples: Sequence[Item]) -> MicrobatchInputs:
        item = packed(samples)
        return MicrobatchInputs(arguments(item), [item])


def microbatches(replica: int) -> Iterator[Item]:
    """Two to four documents each; those of odd replicas are twice as long."""
    generator = torch.Generator().manual_seed(replica)
    while True:
        documents = []
        for _ in range(int(torch.randint(2, 5, (), generator=generator))):
            length = int(torch.randint(3, 9, (), generator=generator)) * (1 + replica % 2)
            ids = torch.randint(0, VOCABULARY, (length + 1,), generator=generator)
            documents.append({"tokens": ids[:-1], "labels": ids[1:]})
        yield packed(documents)


def loss_func(losses: torch.Tensor) -> Any:
    """Losses ``[1, length]`` added up and their number, to train on; both to report."""
    total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, {"loss": torch.stack([total.detach().clone(), count.float()])}


def forward_step(data_iterator: Any, model: Any) -> Any:
    """One microbatch, as Megatron-Core's schedules want it."""
    return model(**arguments(next(data_iterator))), loss_func


def main() -> None:
    """Train, and print loss, tokens and the gradients' norm of every iteration on the last ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4)
    options = parser.parse_args()
    iteration = 0
    dist.init_process_group("gloo" if install_cpu_platform() else "nccl")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES)
    tensor_parallel.model_parallel_cuda_manual_seed(1)

    stages = dip_megatron.build_model(
        provide, micro_batch_size=1, num_microbatches=MICROBATCHES, read_ahead=True, log_interval=1,
        another_follows=lambda: iteration + 1 < options.iterations, weights_by_tokens=True, samples=DocumentPacking(),
    )  # fmt: skip
    draw_by_name(stages, 1, lambda name, parameter: 0.05 if parameter.dim() > 1 else None)
    for stage in stages:
        stage.config.calculate_per_token_loss = True
    settings = DistributedDataParallelConfig(overlap_grad_reduce=False)
    chunks = [DistributedDataParallel(stage.config, settings, stage) for stage in stages]
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads

    data = microbatches(parallel_state.get_data_parallel_rank())
    for iteration in range(options.iterations):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=data, model=chunks, num_microbatches=MICROBATCHES,
            seq_length=LENGTH, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        step(chunks, losses, iteration)


def step(chunks: list[Any], losses: list[dict[str, torch.Tensor]], iteration: int) -> None:
    """Plain gradient descent, and a line on the last ranks."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    norm = sum((p.main_grad.double() ** 2).sum() for p in parameters)
    dist.all_reduce(norm, group=parallel_state.get_pipeline_model_parallel_group())
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.main_grad
    if losses:
        total = torch.stack([loss["loss"] for loss in losses]).sum(dim=0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        print(
            f"iteration {iteration}: loss {float(total[0] / total[1]):.9f}, gradient norm {float(norm) ** 0.5:.9f}, "
            f"{int(total[1])} tokens", flush=True
        )  # fmt: skip


if __name__ == "__main__":
    main()
