"""ROLL's own training step of its Megatron strategy on chunks of a GPT that DIP builds, as one rank of a run: ``python
-m tests.bridge.roll_step OUT``; what it did is saved in ``OUT``, by rank. With the folder of one of Hugging Face's
multimodal models, ``OUT FOLDER FROZEN PACKED REPLICAS TENSOR``, it trains that, which the strategy's own ``initialize``
builds: DIP is hooked in there, and asked for by the environment alone.

What is ROLL's: batches, packing of sequences into microbatches as many as come, the forward step, unpacking, log
probabilities, the step itself. ``DIP_ROLL_CHECKOUT`` is its working tree, ``DIP_ROLL_PACKAGES`` a folder with what it
imports; packages of its rollout and its tracing that a step doesn't use are stood in for. The strategy is made without
its constructor, which wants Ray's workers.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import tests.bridge.preloaded

# isort: split
sys.path.insert(0, os.environ["DIP_ROLL_CHECKOUT"])
sys.path.insert(1, str(Path(os.environ["DIP_ROLL_CHECKOUT"]) / "mcore_adapter" / "src"))
sys.path.insert(2, os.environ.get("DIP_ROLL_PACKAGES", os.environ["DIP_ROLL_CHECKOUT"]))

import tests.bridge.roll_stand_ins  # noqa: F401  before ROLL looks for what they stand for

# isort: split
from mcore_adapter import TrainingArguments
from mcore_adapter.models.model_factory import VirtualModels
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from roll.configs.worker_config import SequencePackingConfig
from roll.distributed.scheduler.protocol import DataProto
from roll.distributed.strategy import megatron_strategy
from roll.distributed.strategy.megatron_strategy import MegatronTrainStrategy
from roll.models import model_providers

import dip_megatron
from tests.bridge.tiny_model import IMAGE, SEQUENCE
from tests.bridge.tiny_roll import ROLL_TINY
from tests.runtime.llava_case import gradients, seed_parameters
from tests.runtime.packed_attention import with_packed_attention

LENGTH, SAMPLES, VOCABULARY = 48, 10, 64


def provide(pre_process: bool, post_process: bool) -> GPTModel:
    """A stage of the model."""
    config = TransformerConfig(
        num_layers=4, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, persist_layer_norm=False, gradient_accumulation_fusion=False,
        variable_seq_lengths=True, moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    return GPTModel(
        config, with_packed_attention(get_gpt_layer_local_spec()), VOCABULARY, LENGTH, pre_process=pre_process,
        post_process=post_process, position_embedding_type="rope",
    )  # fmt: skip


def strategy_of(stages: list[torch.nn.Module]) -> Any:
    """ROLL's strategy of an actor, as after its ``initialize``."""
    settings = DistributedDataParallelConfig(overlap_grad_reduce=False)
    chunks = [DistributedDataParallel(stage.config, settings, stage) for stage in stages]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    made: Any = object.__new__(MegatronTrainStrategy)
    made.model = object.__new__(VirtualModels)
    made.model.models, made.model.config = chunks, chunks[0].config
    made.models_unwrapped = [SimpleNamespace(get_batch_on_this_cp_rank=lambda batch, dim3_keys: batch)]
    made.forward_backward_func = get_forward_backward_func()
    made.is_multimodal = made.enable_router_replay = False
    made.use_sequence_packing, made.seq_length = True, LENGTH
    made.megatron_train_args = SimpleNamespace(cross_entropy_loss_fusion=False)
    made.worker = SimpleNamespace(rank_info=SimpleNamespace(tp_size=1, cp_size=1))
    made.worker_config = SimpleNamespace(
        name="actor", apply_loss_scale=True, use_dynamic_batching_in_train=False,
        strategy_args=SimpleNamespace(strategy_config={}),
        training_args=SimpleNamespace(per_device_train_batch_size=1),
        sequence_packing_args=SequencePackingConfig(algorithm="load_balance", max_packed_sequence_length_train=96),
    )  # fmt: skip
    made.optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=1.0), chunks)
    made.scheduler = SimpleNamespace(step=lambda: None)
    made.load_states = made.offload_states = lambda **_: None  # between a GPU and its host
    return made


def batch(step: int) -> Any:
    """Samples of one to three times 16 tokens, of which the last half are the response."""
    generator = torch.Generator().manual_seed(step)
    lengths = 16 * torch.randint(1, 4, (SAMPLES,), generator=generator)[:, None]
    places = torch.arange(LENGTH)[None]
    ids = torch.randint(1, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    tensors = {
        "input_ids": ids * (places < lengths), "attention_mask": (places < lengths).long(),
        "response_mask": ((places < lengths) & (places >= lengths // 2)).long(),
    }  # fmt: skip
    known = {"loss_mask_keys": ["response_mask"], "is_offload_optimizer_states_in_train_step": False}
    return DataProto.from_single_dict(tensors, meta_info=known)


def loss(strategy: Any, data: Any, logits: torch.Tensor) -> Any:
    """Of one sample, as ROLL's workers have them: log probabilities of its response, over the batch's tokens."""
    own = logits.clone()  # which ROLL changes in place, unless they are halves
    found = strategy.op_compute_log_probs(own, data.batch["input_ids"], data.batch["attention_mask"])
    mean = -(found * data.batch["response_mask"][:, 1:]).sum() / data.meta_info["batch_num_tokens"]["response_mask"]
    return mean, {"actor/loss@sum": mean.detach().item()}


def multimodal(folder: str, frozen: bool, packed: bool, replicas: int, tensor: int) -> Any:
    """ROLL's strategy of an actor of the folder's model, by its own ``initialize``. Two samples a microbatch, a row
    each or packed; experts are spread over the ``replicas``, ``tensor`` ranks share each stage. Layers are recomputed
    without DIP, and with several replicas reductions of gradients start within backwards."""
    for name, stand_in in (
        ("default_tokenizer_provider", lambda **_: None), ("clear_memory", lambda **_: None),
        ("default_processor_provider", lambda **_: SimpleNamespace(save_pretrained=lambda folder: None)),
        ("get_megatron_optimizer", get_megatron_optimizer), ("bind_megatron_offload_states_func", lambda **_: None),
    ):  # fmt: skip
        setattr(megatron_strategy, name, stand_in)
    megatron_strategy.current_platform.get_rng_state = torch.get_rng_state  # of a device, elsewhere
    megatron_strategy.current_platform.set_rng_state = torch.set_rng_state
    model_providers.download_model = lambda path: path  # which asks Ray whether it is here
    made: Any = object.__new__(MegatronTrainStrategy)
    model = SimpleNamespace(
        model_name_or_path=folder, moe_aux_loss_coef=None, lora_target=None,
        freeze_module_prefix=["vision_model"] if frozen else None,
    )  # fmt: skip
    training = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=SAMPLES // 2, max_steps=9)
    made.worker = SimpleNamespace(
        pipeline_config=SimpleNamespace(sequence_length=SEQUENCE, max_grad_norm=1.0),
        rank_info=SimpleNamespace(),
    )
    made.worker_config = SimpleNamespace(
        name="actor", model_args=model, training_args=training, apply_loss_scale=True, use_sequence_packing=packed,
        use_dynamic_batching_in_train=False, use_dynamic_batching_in_infer=False, logits_in_fp32=True,
        strategy_args=SimpleNamespace(strategy_config={}), checkpoint_config={"async_upload": False},
        sequence_packing_args=SequencePackingConfig(
            algorithm="load_balance", max_packed_sequence_length_train=2 * SEQUENCE,
            max_packed_sequence_length_forward=2 * SEQUENCE,
        ),
    )  # fmt: skip
    made.megatron_train_args = TrainingArguments(
        output_dir="trained", learning_rate=1e-3, expert_model_parallel_size=replicas,
        pipeline_model_parallel_size=int(os.environ["WORLD_SIZE"]) // (replicas * tensor),
        weight_decay=0.0, lr_scheduler_type="constant", max_steps=9, seed=1, ddp_backend="gloo", use_cpu=True,
        tensor_model_parallel_size=tensor, expert_tensor_parallel_size=tensor, sequence_parallel=tensor > 1,
        recompute_granularity="full", overlap_grad_reduce=replicas > 1,
        per_device_train_batch_size=2, gradient_accumulation_steps=SAMPLES // 2, max_grad_norm=1.0, report_to=[],
        save_hf_model=True, use_distributed_optimizer=replicas == 1, moe_token_dispatcher_type="alltoall",
        lr_scheduler_kwargs={},
        additional_configs={"masked_softmax_fusion": False, "bias_dropout_fusion": False,
                            "gradient_accumulation_fusion": False, "moe_permute_fusion": False},
    )  # fmt: skip
    made.use_sequence_packing, made.enable_router_replay, made._validate_access_integrity = packed, False, True
    made.checkpoint_manager = SimpleNamespace(upload=lambda **_: None)
    made.initialize(model_providers.default_actor_model_provider)
    made.worker.rank_info.is_pipeline_last_stage = parallel_state.is_pipeline_last_stage()
    made.load_states = made.offload_states = lambda **_: None  # between a GPU and its host
    return made


def shown(folder: str, step: int) -> Any:
    """Samples with pictures and videos of several sizes, and of text alone, padded behind their ends; the tokens after
    the last picture are the response. Replicas have others."""
    step += 20 * parallel_state.get_data_parallel_rank()
    tiny = ROLL_TINY[Path(folder).name]
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("input_ids", "attention_mask", "response_mask")}
    seen = []
    for i, content in enumerate(tiny.contents(step, SAMPLES)):
        given = tiny.arguments(content, 100 * step + i)
        ids, places = given["input_ids"], torch.arange(SEQUENCE)[None]
        begins = int((ids >= IMAGE).long().mul(places).max()) + 1
        ends = begins + 4 + (13 * i + step) % (SEQUENCE - begins - 4)
        rows["input_ids"].append(ids * (places < ends))
        rows["attention_mask"].append((places < ends).long())
        rows["response_mask"].append(((places >= begins) & (places < ends)).long())
        seen.append({n: t for n, t in given.items() if n.startswith(("pixel_values", "image_grid", "video_grid"))})
    tensors: dict[str, Any] = {name: torch.cat(parts) for name, parts in rows.items()}
    tensors["multi_modal_inputs"] = np.array(seen, dtype=object)
    known = {
        "loss_mask_keys": ["response_mask"], "is_offload_optimizer_states_in_train_step": False, "micro_batch_size": 2,
    }  # fmt: skip
    return DataProto.from_single_dict(tensors, meta_info=known)


def log_probs(strategy: Any, data: Any, logits: torch.Tensor) -> Any:
    """As ROLL's workers ask for them before they train."""
    found = strategy.op_compute_log_probs(logits.clone(), data.batch["input_ids"], data.batch["attention_mask"])
    return found.sum() * 0, {"log_probs": found.clone().detach()}


def main(
    out: str, folder: str = "", frozen: str = "", packed: str = "", replicas: str = "1", tensor: str = "1"
) -> None:
    found: dict[str, Any] = {"metrics": []}
    if folder:
        strategy = multimodal(folder, bool(frozen), bool(packed), int(replicas), int(tensor))
        found["log_probs"] = strategy.forward_step(shown(folder, 9), partial(log_probs, strategy))
    else:
        dip_megatron.install()
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=int(os.environ["WORLD_SIZE"]))
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        stages = dip_megatron.build_model(provide, micro_batch_size=1, num_microbatches=4)
        seed_parameters(stages)
        strategy = strategy_of(stages)
    found["chunks"] = len(strategy.model.models)
    step = strategy.optimizer.step

    def noted() -> Any:
        found.setdefault("gradients", gradients(strategy.model.models))
        return step()

    strategy.optimizer.step = noted
    for number in range(3):
        data = shown(folder, number) if folder else batch(number)
        metrics = strategy.train_step(data, partial(loss, strategy))
        found["metrics"].append({name: torch.as_tensor(value).double() for name, value in metrics.items()})
    if folder and replicas == "1":  # ROLL's own way out of experts wants Transformer Engine's grouped linears
        kept(strategy, Path(out) / "saved")
    torch.save(found, Path(out) / f"{os.environ['RANK']}.pt")


def kept(strategy: Any, folder: Path) -> None:
    """Save all, by ROLL's own code, then spoil it, and load it again."""
    before = [parameter.detach().clone() for parameter in strategy.model.parameters()]
    strategy.save_checkpoint(str(folder), 3, "3")
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.zero_()
        strategy.load_checkpoint(str(folder))  # of single precision, the optimizer has no copies to load into
    for parameter, value in zip(strategy.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


if __name__ == "__main__":
    main(*sys.argv[1:])
