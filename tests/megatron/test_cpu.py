"""The CPU platform, seen from Megatron-Core, in processes of its own: it replaces functions of torch."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import alone
from tests.processes import Team, team

if torch.cuda.is_available():
    pytest.skip("the CPU platform is inactive where CUDA is available", allow_module_level=True)


def test_devices_and_random_states_are_the_hosts(tmp_path: Path) -> None:
    alone(
        """
        import torch
        from dip_megatron.megatron.cpu import install_cpu_platform

        assert install_cpu_platform() and install_cpu_platform()
        assert not torch.cuda.is_available()
        for device in ("cuda", "cuda:0", torch.device("cuda", 1), 0, torch.cuda.current_device()):
            assert torch.zeros(2, device=device).device.type == "cpu"
            assert torch.ones(2).to(device).device.type == "cpu"
            assert torch.nn.Linear(2, 2).to(device).weight.device.type == "cpu"
        assert torch.tensor([1.0], device="cuda", pin_memory=True).cuda().type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(2).to("cuda", torch.float16).dtype == torch.float16
        assert torch.ones(2).type(torch.int32).dtype == torch.int32
        assert torch.zeros(2, device="meta").device.type == "meta"

        torch.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(4, device="cuda")
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(4))

        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            event = torch.cuda.current_stream().record_event()
        later = torch.cuda.Event(enable_timing=True)
        later.record()
        torch.cuda.synchronize()
        assert event.elapsed_time(later) >= 0.0
        """,
        tmp_path / "log",
    )


def test_gathers_of_parameters_that_end_together_leave_memory_as_it_is(tmp_path: Path) -> None:
    """Two threads of one group wrote to one string: of twelve processes eleven died of it here."""
    alone(
        """
        import torch
        import torch.distributed as dist
        from dip_megatron.megatron.cpu import install_cpu_platform

        install_cpu_platform()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for _ in range(2000):
            gathers = []
            for part in torch.ones(64, 1):
                with dist._coalescing_manager(async_ops=True) as gather:
                    dist.all_gather_into_tensor(torch.empty(1), part)
                gathers.append(gather)
            for gather in gathers:
                gather.wait()
        """,
        tmp_path / "log",
    )


def test_megatrons_random_tracker_keeps_streams_apart(tmp_path: Path) -> None:
    alone(
        """
        import torch
        from dip_megatron.megatron.cpu import install_cpu_platform

        install_cpu_platform()
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        tracker = CudaRNGStatesTracker()
        tracker.add("a", 1)
        tracker.add("b", 2)
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        with tracker.fork("a"):
            a = torch.rand(2)
        with tracker.fork("b"):
            b = torch.rand(2)
        assert torch.equal(torch.rand(2), expected), "a fork disturbed the default stream"
        assert not torch.equal(a, b)
        with tracker.fork("a"):
            assert not torch.equal(torch.rand(2), a), "a stream must go on where it stopped"
        assert torch.equal(torch.manual_seed(1) and torch.rand(2), a)
        """,
        tmp_path / "log",
    )


def _train(
    rank: int, world: int, pipeline: int, recompute: bool = False, bf16: bool = False
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a few steps of Megatron's LLaVA under Megatron's schedule, DDP and optimizer."""
    from dip_megatron.megatron.cpu import install_cpu_platform

    assert install_cpu_platform()
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(1, pipeline)
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    dtype = torch.bfloat16 if bf16 else torch.float32

    def config(layers: int, stages: int, **more: Any) -> TransformerConfig:
        recompute_flags: dict[str, Any] = (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
            if recompute
            else {}
        )
        return TransformerConfig(
            num_layers=layers, hidden_size=32, num_attention_heads=4, pipeline_model_parallel_size=stages,
            pipeline_dtype=dtype, params_dtype=dtype, bf16=bf16, gradient_accumulation_fusion=False,
            masked_softmax_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False,
            persist_layer_norm=False, hidden_dropout=0.1, attention_dropout=0.1, **recompute_flags, **more,
        )  # fmt: skip

    language, vision, projection = config(4, pipeline), config(2, 1), config(2, 1)
    vision.vision_model_type = "clip"  # type: ignore[attr-defined]
    spec = decoder_model_with_local_default_spec(None, False)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    length = 24
    mlp = spec.submodules.mlp
    model: Any = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=spec,
        language_vocab_size=32,
        language_max_sequence_length=length,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=getattr(mlp, "submodules", None) or mlp.keywords["submodules"],
        pre_process=first,
        post_process=last,
        add_encoder=first,
        img_h=8,
        img_w=8,
        patch_dim=4,
    )
    model.model_type = ModelType.encoder_or_decoder  # asked for by 0.16's schedules
    if bf16:
        model = Float16Module(language, model)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=bf16)
    chunk = DistributedDataParallel(language, ddp, model)
    chunk.broadcast_params()
    language.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=3e-3, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=bf16, clip_grad=1.0
        ),
        [chunk],
    )
    language.grad_scale_func = optimizer.scale_loss

    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    batch = {
        "images": torch.rand(3, 3, 8, 8, generator=generator),
        "tokens": torch.randint(0, 32, (1, 12), generator=generator),
    }
    batch["tokens"][0, [0, 4, 8]] = -200

    def forward_step(_: Any, module: Any) -> Any:
        tokens = batch["tokens"]
        output, mask = module(
            batch["images"].to(dtype),
            tokens,
            torch.arange(12).unsqueeze(0),
            None,
            tokens.roll(-1, 1).clamp(min=0),
            torch.ones(1, 12),
            num_image_tiles=torch.ones(3, dtype=torch.int),
        )

        def loss_func(loss: torch.Tensor) -> Any:
            total, count = (loss * mask).sum(), mask.sum().int()
            return total, count, {"loss": torch.stack([total.detach(), count.float()])}

        return output, loss_func

    losses, norms = [], []
    for _ in range(6):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=None, model=[chunk], num_microbatches=2, seq_length=length,
            micro_batch_size=1, decoder_seq_length=length, forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
        losses.append(float(reduced[0]["loss"][0] / reduced[0]["loss"][1]) if reduced else 0.0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return losses, norms


def train(world: int, pipeline: int, **options: bool) -> tuple[list[float], list[float]]:
    """What the last rank saw. The processes are none that other tests use: they are told how to divide themselves."""
    fresh = Team(world)
    try:
        return fresh.run(partial(_train, **options), pipeline)[-1]
    finally:
        fresh.close()


def test_recomputation_repeats_dropout() -> None:
    plain, again = train(1, 1), train(1, 1, recompute=True)
    assert plain[0] == pytest.approx(again[0], rel=1e-5)
    assert plain[1] == pytest.approx(again[1], rel=1e-4)


def test_llava_trains_under_megatrons_pipeline_schedule() -> None:
    losses, norms = train(2, 2)
    assert losses[-1] < 0.8 * losses[0]
    assert all(norm > 0 for norm in norms)


def test_llava_trains_in_bf16_with_the_distributed_optimizer() -> None:
    losses, _ = train(2, 1, bf16=True)
    assert losses[-1] < 0.8 * losses[0]


def _groups(rank: int, world: int) -> tuple[int, int, list[float], bool]:
    """How many threads wait for gloo before and after making some groups; sums over each; whether torch knows them."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from dip_megatron.megatron.cpu import install_cpu_platform

    def threads() -> int:
        return sum((task / "comm").read_text().strip() == "gloo_tcp_loop" for task in Path("/proc/self/task").iterdir())

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    install_cpu_platform()
    groups = [dist.new_group([0, 1]), dist.group.WORLD]
    before = threads()
    groups += [dist.new_group(backend="gloo", timeout=timedelta(seconds=30)) for _ in range(5)]
    sums = []
    for group in groups:
        value = torch.tensor([1.0 + rank])
        dist.all_reduce(value, group=group)
        sums.append(float(value))
    known = all(
        isinstance(group._get_backend(torch.device("cpu")), distributed_c10d.ProcessGroupGloo) for group in groups
    )
    return before, threads(), sums, known


def test_groups_share_the_thread_that_waits_for_them() -> None:
    for before, after, sums, known in team(2).run(_groups):
        assert before == after > 0
        assert sums == [3.0] * 7
        assert known
