"""A tiny Qwen2.5-VL of Megatron-Bridge in verl's own Megatron engine, as one rank of a run: ``python -m
tests.bridge.verl_engine FOLDER OUT RUNS``. Runs come as JSON; what each did is saved in ``OUT``, by run and rank.

What is verl's: the engine with its model, its optimizer, batches of any number of samples a microbatch, the forward
step, the processing of logits and losses. ``DIP_VERL_CHECKOUT`` is its working tree, ``DIP_VERL_PACKAGES`` a folder
with what it imports. It runs on accelerators alone: a platform of its own kind stands in for one.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import tests.bridge.preloaded  # installs the CPU platform

# isort: split
sys.path.insert(0, os.environ["DIP_VERL_CHECKOUT"])
sys.path.insert(1, os.environ.get("DIP_VERL_PACKAGES", os.environ["DIP_VERL_CHECKOUT"]))
os.environ["VERL_PLATFORM"] = "host"

import tests.bridge.verl_host  # noqa: F401  before verl looks for an accelerator

# isort: split
from megatron.core import tensor_parallel
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
from verl.workers.engine.megatron import transformer_impl
from verl.workers.utils.losses import sft_loss

import dip_megatron
from tests.bridge.tiny import TINY
from tests.runtime.llava_case import gradients

SAMPLES = 8
transformer_impl.MegatronCheckpointManager = lambda **_: None  # checkpoints are untried


def samples(step: int, tokens: int) -> TensorDict:
    """As verl's data come: sequences of several lengths with no padding, and what some of them see. A microbatch takes
    as many as have so many tokens."""
    tiny, shown = TINY["qwen2-5-vl"], TINY["qwen2-5-vl"].contents(5 + step, SAMPLES)
    found = [tiny.arguments(content, 10 * step + index) for index, content in enumerate(shown)]
    ids = [given["input_ids"][0, : 96 - 9 * (index % 3)] for index, given in enumerate(found)]
    seen = [{name: v for name, v in given.items() if "pixel" in name or "grid" in name} for given in found]
    masks = [(row < 120).long() for row in ids]
    data = tensordict_utils.get_tensordict(
        {
            "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
            "loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
            "temperature": torch.ones(SAMPLES),
            "multi_modal_inputs": seen,
        },
        {"use_dynamic_bsz": True, "max_token_len_per_gpu": tokens, "calculate_entropy": False},
    )
    return data


def trained(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms, the first step's gradients, log probabilities of an inference, and exported weights."""
    for name in [name for name in os.environ if name.startswith("DIP_") and not name.startswith("DIP_VERL")]:
        del os.environ[name]
    os.environ.update(run.get("dip", {}))
    model = HFModelConfig(path=str(folder), load_tokenizer=False, use_remove_padding=False)
    object.__setattr__(model, "tokenizer", SimpleNamespace(pad_token_id=0))
    engine_config = McoreEngineConfig(
        pipeline_model_parallel_size=int(os.environ["WORLD_SIZE"]), use_remove_padding=False, param_offload=False,
        grad_offload=False, optimizer_offload=False, sequence_parallel=False,
        virtual_pipeline_model_parallel_size=run.get("virtual"),
        override_transformer_config={
            "attention_backend": "auto", "masked_softmax_fusion": False, "bias_dropout_fusion": False,
            "bias_activation_fusion": False, "gradient_accumulation_fusion": False, "use_cpu_initialization": True,
            "mrope_section": [2, 3, 3], "persist_layer_norm": False,
        },
    )  # fmt: skip
    object.__setattr__(engine_config, "dtype", "float32")  # verl allows halves alone, whose noise hides mistakes
    optimizer = McoreOptimizerConfig(lr=1e-3, lr_decay_steps=10, lr_warmup_steps=0, weight_decay=0.0)
    engine = transformer_impl.MegatronEngineWithLMHead(model, engine_config, optimizer, CheckpointConfig())
    tensor_parallel.model_parallel_cuda_manual_seed(7)  # as verl does where there is a GPU
    engine.initialize()
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}, "chunks": len(engine.module)}
    loss = partial(sft_loss, None)
    with engine.train_mode():
        for step in range(3):
            done = engine.train_batch(samples(step, 200 - 40 * step), loss)
            if step == 0:
                found["gradients"] = gradients(engine.module)
            if done:
                found["losses"].append(done["loss"])
                found["norms"].append(float(done["metrics"]["grad_norm"]))
    with engine.eval_mode():
        inferred = engine.infer_batch(samples(9, 160))
        if inferred:
            found["inferred"] = [row.detach().clone() for row in inferred["model_output"]["log_probs"].unbind()]
    exported, _ = engine.get_per_tensor_param()
    return found | {"weights": {name: tensor.clone() for name, tensor in exported}}


def main(folder: str, out: str, runs: str) -> None:
    dip_megatron.install()
    torch.distributed.init_process_group("gloo")
    rank = os.environ["RANK"]
    for name, run in json.loads(runs).items():
        torch.save(trained(Path(folder), run), Path(out) / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
