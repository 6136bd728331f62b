"""A tiny Qwen2.5-VL: as a Hugging Face folder, with data, and trained by Megatron-Bridge's own loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IMAGE, VIDEO, START, END, VOCABULARY = 120, 121, 122, 123, 128
SEQUENCE, PATCH, GLOBAL_BATCH = 64, 14, 4
GRIDS = ((4, 4), (8, 12), (4, 8))
"""Heights and widths of the images, in patches; four patches are one token of the language model."""


def save_tiny(folder: Path) -> None:
    """Write a Qwen2.5-VL with random weights as a Hugging Face folder."""
    import transformers

    torch.manual_seed(7)
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": PATCH, "window_size": 56, "fullatt_block_indexes": [1, 3], "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, dtype=torch.float32,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )  # fmt: skip
    transformers.Qwen2_5_VLForConditionalGeneration(config).float().save_pretrained(folder)


class Images(torch.utils.data.Dataset):
    """Random tokens with one image, whose size differs from sample to sample."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        height, width = GRIDS[index % len(GRIDS)]
        tokens = torch.randint(3, 110, (SEQUENCE + 1,), generator=generator)
        end = 5 + height * width // 4
        tokens[4], tokens[5:end], tokens[end] = START, IMAGE, END
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": (tokens[1:] != IMAGE).float(),
            "position_ids": torch.arange(SEQUENCE),
            "pixel_values": torch.randn(height * width, 3 * 2 * PATCH * PATCH, generator=generator),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }

    @staticmethod
    def collate_fn(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs

        batch: dict[str, Any] = {
            name: torch.stack([sample[name] for sample in samples])
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
        images = {name: torch.cat([s[name] for s in samples]) for name in ("pixel_values", "image_grid_thw")}
        return {**batch, "attention_mask": None, "visual_inputs": GenericVisualInputs(**images)}


@dataclass(frozen=True)
class Run:
    """How to train; ``virtual`` are virtual stages a rank, ``None`` Megatron's schedule without them."""

    pipeline: int = 1
    virtual: int | None = None
    iterations: int = 3


def configuration(folder: Path, run: Run) -> Any:
    """Bridge's configuration of a training from the folder's weights."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.training import config as bridge

    @dataclass(kw_only=True)
    class ImagesProvider(DatasetProvider):
        seq_length: int
        skip_getting_attention_mask_from_dataset: bool = True

        def build_datasets(self, context: Any) -> Any:
            counts = (context.train_samples, context.valid_samples, context.test_samples)
            return tuple(Images(n) if n else None for n in counts)

    model = AutoBridge.from_hf_pretrained(folder, dtype=torch.float32).to_megatron_provider()
    model.mrope_section = [2, 3, 3]  # Bridge's provider keeps the section of the published models
    model.params_dtype = model.autocast_dtype = model.pipeline_dtype = torch.float32
    model.bf16 = model.gradient_accumulation_fusion = False
    model.seq_length = SEQUENCE
    model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size = run.pipeline, run.virtual
    if run.virtual is not None:
        # gloo pairs messages in the order they are sent, which batched exchanges of two ranks in a ring don't keep.
        model.overlap_p2p_comm, model.batch_p2p_comm = True, False
    return bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(
            train_iters=run.iterations, global_batch_size=GLOBAL_BATCH, micro_batch_size=1
        ),
        validation=bridge.ValidationConfig(eval_interval=None, eval_iters=0),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-3, weight_decay=0.0, clip_grad=1.0, bf16=False, fp16=False,
            use_distributed_optimizer=False,
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=0, lr_decay_iters=run.iterations, start_weight_decay=0.0,
            end_weight_decay=0.0, weight_decay_incr_style="constant",
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False
        ),
        dataset=ImagesProvider(seq_length=SEQUENCE, dataloader_type="single", num_workers=0, pin_memory=False),
        logger=bridge.LoggerConfig(log_interval=1, tensorboard_dir=None),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
        checkpoint=bridge.CheckpointConfig(),
        rng=bridge.RNGConfig(seed=1234),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
        mixed_precision=None,
    )  # fmt: skip


def trained(rank: int, world: int, folder: Path, run: Run) -> dict[str, Any]:
    """Train on this rank. ``losses`` of the iterations, on the last stage; ``norms`` of the gradients; ``weights`` as
    exported to Hugging Face's names, on the first rank."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.vlm_step import forward_step

    result: dict[str, Any] = {"losses": [], "norms": [], "weights": {}}

    class Record(Callback):
        def on_train_step_end(self, context: Any) -> None:
            result["norms"].append(float(context.grad_norm))
            if context.loss_dict:
                result["losses"].append(float(context.loss_dict["lm loss"]))

        def on_train_end(self, context: Any) -> None:
            bridge = AutoBridge.from_hf_pretrained(folder, dtype=torch.float32)
            weights = dict(bridge.export_hf_weights(context.model, cpu=True, show_progress=False))
            if rank == 0:
                result["weights"] = weights

    pretrain(configuration(folder, run), forward_step, callbacks=[Record()])
    return result
