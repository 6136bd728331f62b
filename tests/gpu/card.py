"""What one process does on one device, on a GPU or, so that nothing but the card is untried, on the host:
``python -m tests.gpu.card equal|held DEVICE DTYPE IMPLEMENTATION STRATEGY... `` prints one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch

from dip_megatron.core.strategies import strategy_names
from tests.patience import APART
from tests.runtime import gpt_case
from tests.runtime.gpt_case import GptCase

WIDE = (256, 512)  # hidden size and tokens of a sample: what is offloaded must be larger than what stays
NARROW = (32, 16)


def begin(device: str) -> None:
    """One rank of its own; collectives over one rank, which Megatron runs all the same."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )  # fmt: skip
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    from tests.runtime.llava_case import initialize

    initialize(1)


def arguments(case: GptCase, dtype: torch.dtype, implementation: str, hidden: int, tokens: int) -> dict[str, Any]:
    """Of Megatron's GPTModel."""
    kwargs = gpt_case.gpt_kwargs(case, 1)
    config = kwargs["config"]
    config.hidden_size, config.ffn_hidden_size, config.kv_channels = hidden, 4 * hidden, hidden // 4
    config.params_dtype = config.pipeline_dtype = dtype
    config.bf16 = dtype == torch.bfloat16
    kwargs["max_sequence_length"] = tokens
    if implementation == "te":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        kwargs["transformer_layer_spec"] = get_gpt_layer_with_transformer_engine_spec()
    return kwargs


def placed(chunks: list[torch.nn.Module], device: str, dtype: torch.dtype) -> list[torch.nn.Module]:
    """With the same weights whatever the partition, on the device, wrapped as Megatron's training wraps them."""
    from tests.runtime.split_case import with_ddp

    gpt_case.seed_chunks(chunks)
    chunks = with_ddp([chunk.to(device=device, dtype=dtype) for chunk in chunks], overlap=False)
    gpt_case.finalize(chunks)
    return chunks


def items(case: GptCase, tokens: int, device: str) -> list[dict[str, torch.Tensor]]:
    """A microbatch each."""
    gpt_case.LENGTH = tokens
    return [{name: t.to(device) for name, t in item.items()} for item in gpt_case.batches(case)]


def reference(kwargs: dict[str, Any], data: list[Any], device: str, dtype: torch.dtype) -> Any:
    """Losses and gradients under Megatron's own schedule of one stage."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    chunks = placed([GPTModel(**kwargs, pre_process=True, post_process=True)], device, dtype)
    losses = get_forward_backward_func()(
        forward_step_func=gpt_case.forward_step, data_iterator=iter(data), model=chunks, num_microbatches=len(data),
        seq_length=gpt_case.LENGTH, micro_batch_size=1, decoder_seq_length=gpt_case.LENGTH, forward_only=False,
    )  # fmt: skip
    return losses, gradients(chunks)


def planned(kwargs: dict[str, Any], data: list[Any], device: str, dtype: torch.dtype, case: GptCase, drawn: Any) -> Any:
    """The same under a plan, and how many W it had."""
    from dip_megatron.core import Kind
    from dip_megatron.families.gpt.program import GptProgram
    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.planner.delivery import PlanDelivery
    from dip_megatron.planner.service import PlannerService
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor
    from tests.processes import transport
    from tests.runtime.dip_case import DrawnGraphs
    from tests.runtime.split_case import DrawnMaker

    program = GptProgram(kwargs, {"language": case.layers}, rank=0, micro_batch_size=1)
    chunks = program.build_chunks()
    for number, layer in enumerate(layer for chunk in chunks for layer in chunk.decoder.layers):
        layer.layer_number = number + 1  # weights and gradients are named by it; one rank has no stages to count by
    chunks = placed(chunks, device, dtype)
    clock = Clock(torch.device(device))
    maker = DrawnMaker(DrawnGraphs(program.modules, 1, drawn.seed), program.shapes, drawn)
    delivery = PlanDelivery(GlooExchange([0], APART), PlannerService(maker, workers=0))
    seen: list[Kind] = []
    step = DipForwardBackward(
        program, Executor(0, transport(1, 0), clock), delivery, clock,
        on_iteration=lambda report, plan, spans: seen.extend(s.operation.kind for s in spans),
    )  # fmt: skip
    losses = step(ScheduleCall(
        forward_step_func=gpt_case.forward_step, data_iterator=iter(data), model=chunks, num_microbatches=len(data),
        forward_only=False,
    ))  # fmt: skip
    delivery.close()
    return losses, gradients(chunks), seen.count(Kind.W)


def gradients(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """By names that don't know of chunks."""
    from tests.runtime.llava_case import gradients as named

    return {name: g.float().cpu() for name, g in named(chunks).items()}


def equal(device: str, dtype: torch.dtype, implementation: str, strategies: list[str]) -> dict[str, Any]:
    """Per strategy: the largest differences of losses (to the loss) and of gradients (to the largest element of each),
    and the number of W."""
    from tests.runtime.split_case import Drawn

    hidden, tokens = WIDE if device == "cuda" else NARROW
    case = GptCase(4, layers=((2,), (2,)))
    kwargs, data = arguments(case, dtype, implementation, hidden, tokens), items(case, tokens, device)
    losses, expected = reference(kwargs, data, device, dtype)
    found = {}
    for name in strategies:
        drawn = Drawn(3, 0.8, strategy_names() if name == "all" else (name,))
        ours, got, weights = planned(kwargs, data, device, dtype, case, drawn)
        assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
        by_loss = [
            float((a["lm loss"] - b["lm loss"]).abs()[0] / a["lm loss"][0]) for a, b in zip(losses, ours, strict=True)
        ]
        by_gradient = [float((got[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected]
        found[name] = {"loss": max(by_loss), "gradient": max(by_gradient), "weights": weights}
    return found


def held(device: str, dtype: torch.dtype, implementation: str, strategies: list[str]) -> dict[str, Any]:
    """Per strategy and stage: bytes held from F to B and from B to W, expected and measured, and those of one hidden
    state of the stage."""
    from dip_megatron.core.strategies import parse_strategy
    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.describe.cost.chunks import CostModel
    from dip_megatron.describe.cost.sizes import unit_sizes
    from dip_megatron.describe.model import Parallel
    from tests.runtime import accounting

    sizes = accounting.Sizes()
    if device == "cuda":
        sizes = replace(sizes, hidden=256, ffn=640, text=1000, image=128)
    texts = [name if name == "none" else f"{name}:{sizes.layers}" for name in strategies]
    load, measured, _ = accounting.measure(0, 1, sizes, texts, device)
    pricer = CostModel(accounting.describe(0, 1, sizes, Parallel(1, 1, 1, False, False)), load_cluster("cpu"))
    found: dict[str, Any] = {}
    for name, text in zip(strategies, texts, strict=True):
        rows = [strategy_names().index(s) for s in parse_strategy(text, sizes.layers)]
        for module, segment in accounting.PLACES:
            units = unit_sizes(pricer.model.module(module), [load], [(0, 0, sizes.images if module == "vision" else 1)])
            layer = pricer.layer(module, units)
            other = pricer.stem(module, units) if segment == 0 else pricer.head(module, units)
            got = measured[text, module, segment]
            found[f"{name} {module}.{segment}"] = {
                "activation": [float(layer.activation[rows, 0].sum() + other.activation[0]), got.activation],
                "deferred_activation": [
                    float(layer.deferred_activation[rows, 0].sum() + other.deferred_activation[0]),
                    got.deferred_activation,
                ],
                "hidden_state": 4.0 * sizes.hidden * float(units.tokens[0]),
            }
    return found


def main(what: str, device: str, dtype: str, implementation: str, *strategies: str) -> None:
    """See the module."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    begin(device)
    function = {"equal": equal, "held": held}[what]
    print(json.dumps(function(device, getattr(torch, dtype), implementation, list(strategies))))


if __name__ == "__main__":
    main(*sys.argv[1:])
