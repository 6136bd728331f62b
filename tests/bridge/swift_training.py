"""Tiny models of mcore-bridge trained by ms-swift's own trainer, as one rank of some: ``python -m
tests.bridge.swift_training FOLDERS OUT RUNS``. Runs come as JSON; what each did is saved in ``OUT``, by run and rank.
A run may also be one iteration of :mod:`.equality`, as the same processes can do it.

What is ms-swift's: arguments, model, weights from the folder, data loader, steps, optimizer, logs, safetensors. Samples
come encoded: its templates need a published tokenizer. It and mcore-bridge load before the CPU platform does, which
replaces factories that they compile. Nothing here installs DIP: the wheel's start-up file does, where ``DIP_SCHEDULE``
is set as the process starts."""

from __future__ import annotations

import json
import os
import re
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

site.addsitedir(str(Path(__file__).parents[2]))  # as Python does with the folder of installed packages
sys.path.insert(0, str(Path(__file__).parent / "stand_in"))  # before Megatron looks for Transformer Engine

import torch

# isort: split
import swift.megatron.trainers.trainer as trainers
from swift.megatron.arguments import MegatronSftArguments
from swift.megatron.callbacks.base import MegatronCallback

# isort: split
import tests.preloaded  # noqa: F401  installs the CPU platform

# isort: split
from megatron.core import parallel_state

from dip_megatron.compat import topics_of
from dip_megatron.compat.names import fault
from tests.bridge import equality
from tests.bridge.tiny import TINY
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.bridge.tiny_model import IMAGE, VIDEO

MICROBATCHES = 4
KINDS = {
    "qwen2-5-vl": ("qwen2_5_vl", "qwen2_5_vl"),
    "qwen2-vl": ("qwen2_vl", "qwen2_vl"),
    "internvl": ("internvl", "internvl_hf"),
    "kimi-vl": ("kimi_vl", "kimi_vl"),
    "internvl-chat": ("internvl_chat", "internvl2_5"),
    "mcore-qwen3-vl": ("qwen3_vl", "qwen3_vl"),
    "mcore-glm-4-1v": ("glm4v", "glm4v"),
    "mcore-qwen3-5": ("qwen3_5", "qwen3_5"),
    "mcore-qwen3-vl-moe": ("qwen3_vl_moe", "qwen3_vl"),
    "mcore-qwen3-5-moe": ("qwen3_5_moe", "qwen3_5"),
    "mcore-glm-4-5v": ("glm4v_moe", "glm4_5v"),
    "internvl-moe": ("internvl", "internvl_hf"),
    "mcore-qwen3-5-mtp": ("qwen3_5", "qwen3_5"),
}
"""What ms-swift calls each model, and its template."""


class Samples(torch.utils.data.Dataset[Any]):
    """Encoded as ms-swift's templates do: tokens of several lengths, pictures and videos, positions by Hugging Face's
    model."""

    def __init__(self, name: str, size: int):
        tiny = (TINY | MCORE_TINY)[name]
        index_of = getattr(getattr(tiny.made(), "model", None), "get_rope_index", None)
        self._samples = []
        for index, shown in enumerate(tiny.contents(5, size)):
            given = tiny.arguments(shown, index)
            ids = given["input_ids"][:, : 96 - 8 * (index % 3)]
            kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
            positions = torch.arange(ids.shape[1])[None]
            if index_of is not None:
                grids = [given.get(f"{kind}_grid_thw") for kind in ("image", "video")]
                positions, _ = index_of(ids, kinds, *grids)
            labels = ids.masked_fill(kinds > 0, -100)
            labels[:, 0] = -100
            seen = {name: value for name, value in given.items() if "pixel" in name or "grid" in name}
            self._samples.append({"input_ids": ids, "labels": labels, "position_ids": positions, **seen})

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples[index]


class Encoded:
    """What the trainer asks of a template, for samples that are encoded already."""

    padding_free = True
    processor = None
    use_chat_template = True

    def __init__(self, config: Any):
        self.config = config

    @staticmethod
    def data_collator(samples: list[dict[str, Any]], padding_to: int | None = None) -> dict[str, Any]:
        """Packed into one row."""
        found: dict[str, Any] = {}
        for name in {name for sample in samples for name in sample}:
            values = [sample[name] for sample in samples if name in sample]
            found[name] = torch.cat(values, dim=0 if "pixel" in name or "grid" in name else -1)
        found["text_position_ids"] = torch.cat([torch.arange(s["input_ids"].shape[1])[None] for s in samples], dim=-1)
        return found


def named(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters by the names they have in the whole model, of which this is a stage or a chunk."""
    language = model._modules.get("language_model")
    layers = [] if language is None else list(language.decoder.layers)
    before = layers[0].layer_number - 1 if layers else 0
    for name, parameter in model.named_parameters():
        yield re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) + before), name), parameter


class Record(MegatronCallback):
    """Losses, gradients' norms, and the first iteration's gradients by name."""

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.found: dict[str, Any] = {"losses": [], "norms": [], "evaluated": [], "gradients": {}}

    def on_step_end(self) -> None:
        if self.state.iteration == 1:
            self.found["gradients"] = {
                name: parameter.main_grad.clone()
                for model in self.trainer.unwrapped_models
                for name, parameter in named(model)
                if parameter.requires_grad
            }

    def on_log(self, logs: dict[str, Any]) -> None:
        if "eval_loss" in logs:
            self.found["evaluated"].append(logs["eval_loss"])
        elif "grad_norm" in logs:
            self.found["norms"].append(float(logs["grad_norm"]))
            self.found["losses"] += [logs["loss"]] if "loss" in logs else []


def trained(folder: Path, out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """One training; ``run`` are arguments of ms-swift's, and under ``dip`` the variables of DIP's. It has a stage on
    every rank, or so many ``stages``, and replicas of these."""
    given = dict(run)
    environ, name, adapters = given.pop("dip", {}), given.pop("tiny"), given.pop("adapters", None)
    stages = given.pop("stages", int(os.environ["WORLD_SIZE"]))
    replicas = int(os.environ["WORLD_SIZE"]) // stages // given.get("context_parallel_size", 1)
    kind, template = KINDS[name]
    for variable in [variable for variable in os.environ if variable.startswith("DIP_")]:
        del os.environ[variable]
    os.environ.update(environ)
    args = MegatronSftArguments(
        model=str(folder), model_type=kind, template=template, dataset=["none"], output_dir=str(out),
        add_version=False, max_length=96, check_model=False, torch_dtype="float32", bf16=False, fp16=False,
        ddp_backend="gloo",
        pipeline_model_parallel_size=stages, use_distributed_optimizer=False, train_iters=3,
        global_batch_size=MICROBATCHES * replicas * given.get("micro_batch_size", 1), lr=1e-3, min_lr=1e-3,
        weight_decay=0.0, lr_decay_style="constant", logging_steps=1, save_steps=100, no_save_optim=True,
        no_save_rng=True, report_to=[],
        dataloader_num_workers=0, dataloader_pin_memory=False, attention_backend="auto", masked_softmax_fusion=False,
        bias_dropout_fusion=False, bias_activation_fusion=False, cross_entropy_loss_fusion=False,
        vit_gradient_checkpointing=False, train_dataloader_shuffle=False, **given,
    )  # fmt: skip
    args.save_args(args.output_dir)
    if adapters is not None:  # of another run; what the encoded samples' template lacks would have described them
        args.adapters = [str(out.parent / adapters / "checkpoint-3")]
    from transformers import AutoConfig

    trainer = trainers.MegatronTrainer(args, Encoded(AutoConfig.from_pretrained(folder, trust_remote_code=True)))
    record = Record(trainer)
    trainer.callbacks.append(record)
    size = 2 * args.global_batch_size
    trainer.train(Samples(name, size), Samples(name, size) if args.eval_iters > 0 else None)
    # Processes that have trained before go on with their groups.
    assert parallel_state.get_context_parallel_world_size() == args.context_parallel_size
    assert parallel_state.get_expert_model_parallel_world_size() == args.expert_model_parallel_size
    adapts = args.tuner_type == "lora"
    if adapts:  # which goes into the saved folder
        assert trainer.unwrapped_models[0].peft_config["default"].r == args.lora_rank
    exported = dict(trainer.bridge.export_weights(trainer.unwrapped_models, "cpu", peft_format=adapts))
    return record.found | {"weights": exported, "saved": trainer.state.last_model_checkpoint}


def compared(folder: Path, run: dict[str, Any]) -> Any:
    """What a function of :mod:`.equality` gives for a case, on this rank; ``alone``, on it as on the only one."""
    given = dict(run["case"])
    layers = {module: tuple(map(tuple, lines)) for module, lines in given.pop("layers", {}).items()}
    case = equality.Case(folder=folder, layers=layers, seed=3, **given)
    if parallel_state.model_parallel_is_initialized():  # by a training
        parallel_state.destroy_model_parallel()
    rank, world = (0, 1) if run.get("alone") else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        return getattr(equality, run["function"])(rank, world, case, *run.get("more", ()))
    finally:
        parallel_state.destroy_model_parallel()


def faults() -> list[str]:
    """Of the names that DIP leans on in ms-swift and mcore-bridge."""
    found = [fault(name) for file in ("ms_swift", "mcore_bridge") for topic in topics_of(file) for name in topic.names]
    assert found
    return [line for line in found if line is not None]


def main(folder: str, out: str, runs: str) -> None:
    assert faults() == []
    rank = os.environ["RANK"]
    for name, run in json.loads(runs).items():
        tiny = run["case"]["tiny"] if "case" in run else run["tiny"]
        own = Path(folder) / tiny
        found = compared(own, run) if "case" in run else trained(own, Path(out) / name, run)
        torch.save(found, Path(out) / f"{name}-{rank}.pt")
        print(f"done: {name}", flush=True)  # a sign of life


if __name__ == "__main__":
    main(*sys.argv[1:])
