"""Tiny models trained by Megatron-Bridge's own loop."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import dip_megatron
from tests.bridge.tiny import TINY
from tests.bridge.tiny_model import SEQUENCE, VOCABULARY, Tiny, packed_row
from tests.runtime.llava_case import gradients

GLOBAL_BATCH = 4


def save_text_model(folder: Path) -> None:
    """Write a Qwen2, text only, with random weights as a Hugging Face folder."""
    import transformers

    torch.manual_seed(7)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, dtype=torch.float32,
        architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).float().save_pretrained(folder)


class Samples(torch.utils.data.Dataset):
    """Random tokens with what a family's tiny model sees among them."""

    def __init__(self, size: int, tiny: Tiny, packed: bool = False):
        self._size, self._tiny, self._packed = size, tiny, packed
        self._shown = tiny.contents(5, 2 * GLOBAL_BATCH)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._tiny.arguments(self._shown[index % len(self._shown)], index)

    def collate_fn(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs

        def joined(name: str) -> torch.Tensor:
            return torch.cat([sample[name] for sample in samples if name in sample])

        if self._packed:
            samples = [packed_row(samples, cut=(3, 2))]
        batch: dict[str, Any] = {"tokens": joined("input_ids"), "attention_mask": None, "position_ids": None}
        if self._packed:
            batch |= {name: samples[0].pop(name) for name in tuple(samples[0]) if "seqlen" in name}
            del samples[0]["total_tokens"]
        given = {name for sample in samples for name, value in sample.items() if value is not None} - {"input_ids"}
        visual = given & {field.name for field in fields(GenericVisualInputs)}
        batch |= {name: joined(name) for name in given - visual}
        inputs = {name: joined(name) for name in visual}
        return {**batch, "visual_inputs": GenericVisualInputs(**inputs) if inputs else None}


class Loader:
    """A replica's microbatches of some samples, over and over; knows its place, as Energon's does, and what it hands
    out to be saved is its own, and goes on."""

    def __init__(self, samples: Samples, size: int):
        self._samples, self._size = samples, size
        self._state = {"position": 0}

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        index = self._state["position"] * parallel_state.get_data_parallel_world_size()
        self._state["position"] += 1
        index += parallel_state.get_data_parallel_rank()
        return self._samples.collate_fn([self._samples[index % self._size]])

    def save_state(self) -> dict[str, int]:
        return self._state

    def restore_state(self, state: dict[str, int]) -> None:
        self._state = state


@dataclass(frozen=True)
class Run:
    """How to train. Experts are spread over ``experts`` ranks, matrices over ``tensor``, sequences over ``context``;
    ``virtual`` are virtual
    stages a rank, ``None`` Megatron's schedule without them; ``dip`` are DIP's settings, None to train without it;
    ``frozen`` are parts of the model, ``evaluates`` after the second iteration."""

    pipeline: int = 1
    replicas: int = 1
    sharded: bool = False
    """whether replicas share out the optimizer, with reductions and gathers that overlap"""
    keeps_place: bool = False
    """whether data come from a loader whose state checkpoints hold"""
    experts: int = 1
    context: int = 1
    packed: bool = False
    """whether Bridge packs two samples into each row"""
    tensor: int = 1
    virtual: int | None = None
    iterations: int = 3
    micro_batch_size: int = 1
    dip: dict[str, Any] | None = None
    frozen: tuple[str, ...] = ()
    evaluates: bool = False
    bf16: bool = False
    ends: int | None = None
    """the iteration after which it ends, as if its time were over"""
    save: Path | None = None
    load: Path | None = None
    from_iteration: int | None = None
    """which to load; None: the last one"""
    export: Path | None = None
    """where to write what was trained, as a Hugging Face folder"""
    finetunes: bool = False
    text: bool = False
    """whether the folder has a model of text alone"""
    tiny: str = "qwen2-5-vl"
    balance: str = ""
    """of experts, if it isn't that of the tiny model"""
    adapters: tuple[str, ...] = ()
    """what LoRA adapts; nothing else trains then"""


def lora(targets: tuple[str, ...]) -> Any:
    """Bridge's, its adapters drawn by name: Bridge draws them in the order in which a rank builds them, and leaves
    half of them zero, which hides mistakes."""
    from megatron.bridge.peft.lora import LoRA

    class DrawnLora(LoRA):
        def __call__(self, model: Any, training: bool = True) -> Any:
            model = super().__call__(model, training)
            dip_megatron.draw_by_name(model, 5, lambda name, parameter: 0.05 if parameter.requires_grad else None)
            return model

    return DrawnLora(target_modules=list(targets), dim=4, alpha=8)


def configuration(folder: Path, run: Run) -> Any:
    """Bridge's configuration of a training from the folder's weights."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.training import config as bridge

    @dataclass(kw_only=True)
    class SamplesProvider(DatasetProvider):
        seq_length: int
        skip_getting_attention_mask_from_dataset: bool = True
        enable_in_batch_packing: bool = run.packed

        def build_datasets(self, context: Any) -> Any:
            counts = (context.train_samples, context.valid_samples, context.test_samples)
            if run.keeps_place:
                sizes = (context.train_samples, GLOBAL_BATCH, GLOBAL_BATCH)
                return tuple(
                    Loader(Samples(n, TINY[run.tiny]), n) if some else None
                    for n, some in zip(sizes, counts, strict=True)
                )
            return tuple(Samples(n, TINY[run.tiny], run.packed) if n else None for n in counts)

    model = AutoBridge.from_hf_pretrained(folder, dtype=torch.float32, trust_remote_code=True).to_megatron_provider(
        load_weights=not run.finetunes
    )
    if not run.text:
        TINY[run.tiny].change(model)
    if run.balance:
        model.moe_router_load_balancing_type = run.balance
    model.params_dtype = model.autocast_dtype = model.pipeline_dtype = torch.float32
    model.bf16 = model.gradient_accumulation_fusion = False
    samples = 2 if run.packed else 1  # a row
    model.seq_length = samples * SEQUENCE
    for part in ("language_model", "vision_model", "vision_projection"):  # some providers freeze some
        setattr(model, f"freeze_{part}", part in run.frozen)
    model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size = run.pipeline, run.virtual
    model.expert_model_parallel_size, model.context_parallel_size = run.experts, run.context
    model.tensor_model_parallel_size, model.sequence_parallel = run.tensor, run.tensor > 1
    if run.virtual is not None:
        # gloo pairs messages in the order they are sent, which batched exchanges of two ranks in a ring don't keep.
        model.overlap_p2p_comm, model.batch_p2p_comm = True, False
    container = bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(
            train_iters=run.iterations, global_batch_size=samples * GLOBAL_BATCH,
            micro_batch_size=samples * run.micro_batch_size, exit_interval=run.ends,
        ),
        validation=bridge.ValidationConfig(eval_interval=2 if run.evaluates else None, eval_iters=int(run.evaluates)),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-3, weight_decay=0.0, clip_grad=1.0, bf16=run.bf16, fp16=False,
            use_distributed_optimizer=run.sharded,
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=0, lr_decay_iters=10, override_opt_param_scheduler=True,
            start_weight_decay=0.0,
            end_weight_decay=0.0, weight_decay_incr_style="constant",
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=run.sharded, overlap_grad_reduce=run.sharded, overlap_param_gather=run.sharded
        ),
        dataset=SamplesProvider(
            seq_length=samples * SEQUENCE, dataloader_type="external" if run.keeps_place else "single", num_workers=0,
            pin_memory=False,
        ),
        logger=bridge.LoggerConfig(log_interval=1, tensorboard_dir=None),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
        checkpoint=bridge.CheckpointConfig(
            save=run.save and str(run.save), save_interval=2 if run.save else None, load=run.load and str(run.load),
            ckpt_step=run.from_iteration,
            pretrained_checkpoint=str(folder) if run.finetunes else None, hf_trust_remote_code=True,
            dist_ckpt_optim_fully_reshardable=run.sharded,
        ),
        rng=bridge.RNGConfig(seed=1234),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
        mixed_precision="bf16_mixed" if run.bf16 else None,
    )  # fmt: skip
    container.dip = run.dip
    container.peft = lora(run.adapters) if run.adapters else None
    return container


def trained(rank: int, world: int, folder: Path, run: Run) -> dict[str, Any]:
    """Train on this rank. ``losses`` of the iterations and ``evaluated`` ones, on the last stage; ``norms`` of the
    gradients; ``gradients`` of this rank's parameters in the first iteration; ``weights`` as exported to Hugging Face's
    names, on the first rank; ``operations`` in floating point, as Bridge's log counts them."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain

    name = "megatron.bridge.training.gpt_step" if run.text else TINY[run.tiny].step
    step: Any = importlib.import_module("megatron.bridge.training.vlm_step" if run.packed else name)
    dip_megatron.install()
    result: dict[str, Any] = {"losses": [], "norms": [], "evaluated": [], "weights": {}, "gradients": {}}

    class Record(Callback):
        def on_train_step_end(self, context: Any) -> None:
            if not result["norms"]:
                result["gradients"] = gradients(context.model)
            result["norms"].append(float(context.grad_norm))
            if context.loss_dict:
                result["losses"].append(float(context.loss_dict["lm loss"]))

        def on_eval_end(self, context: Any) -> None:
            result["evaluated"] += [float(loss) for loss in (context.total_loss_dict or {}).values()]

        def on_train_end(self, context: Any) -> None:
            result["operations"] = context.state.train_state.floating_point_operations_so_far
            if run.adapters:  # Bridge has no names to export those of Hugging Face's linears by
                return
            bridge = AutoBridge.from_hf_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
            exported = bridge.export_hf_weights(
                context.model, cpu=True, show_progress=False, weight_dtype=torch.float32
            )  # fmt: skip
            weights = dict(exported)
            if rank == 0:
                result["weights"] = weights
            if run.export is not None:
                AutoBridge.from_hf_pretrained(folder).save_hf_pretrained(context.model, run.export, show_progress=False)

    train = finetune if run.finetunes else pretrain
    try:
        train(configuration(folder, run), step.forward_step, callbacks=[Record()])
    except SystemExit as end:
        if end.code or run.ends is None:
            raise
    return result
