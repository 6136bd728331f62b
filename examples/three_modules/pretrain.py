"""Train a small model of three modules to say what pictures show and what melodies play, with Megatron's own loop.

    torchrun --nproc-per-node 2 examples/three_modules/pretrain.py --dip-config examples/three_modules/dip.yaml

An ordinary Megatron pretrain script but for one line, the call of ``dip_megatron.install``, which tells DIP about a
model that it doesn't know. ``tiny.args`` holds the flags of a model that learns on two CPU cores; they come first, so
that flags of the command line override them. With ``--pipeline-model-parallel-size 1`` it runs under Megatron's own
schedule.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dip_megatron import CPU_FLAGS, install_cpu_platform

ON_CPU = install_cpu_platform()  # does nothing where CUDA is available

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.training import get_args, pretrain, training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import (  # noqa: E402
    core_transformer_config_from_args,
    parse_and_validate_args,
)

import dip_megatron  # noqa: E402
from dip_megatron import draw_by_name  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from three_modules.documents import INPUTS, VOCABULARY, Documents, split_scans  # noqa: E402
from three_modules.family import FAMILY  # noqa: E402
from three_modules.model import Settings, ThreeModuleModel  # noqa: E402
from three_modules.shapes import AUDIO, LANGUAGE, VISION  # noqa: E402

dip_megatron.install(families=[FAMILY])

WIDTHS = {VISION: 64, AUDIO: 48}


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
    vp_stage: int | None = None,
) -> ThreeModuleModel:
    """The whole model; a pipeline's stages are DIP's business."""
    args = get_args()
    language = config or core_transformer_config_from_args(args)
    configs = {name: encoder_config(language, width) for name, width in WIDTHS.items()} | {LANGUAGE: language}
    settings = Settings(
        configs, INPUTS, args.padded_vocab_size, args.seq_length, args.transformer_impl == "transformer_engine"
    )
    return ThreeModuleModel(settings, pg_collection=pg_collection)


def encoder_config(language: TransformerConfig, width: int) -> TransformerConfig:
    """The language model's numerics and number of layers, a width of its own."""
    config = copy.deepcopy(language)
    config.hidden_size, config.ffn_hidden_size = width, 4 * width
    config.num_query_groups = config.num_attention_heads
    config.kv_channels = width // config.num_attention_heads
    return config


def datasets_provider(sizes: tuple[int, int, int]) -> tuple[Documents, ...]:
    """Documents over disjoint scans, as many as Megatron asks for."""
    splits = (Split.train, Split.valid, Split.test)
    return tuple(
        Documents(scans, split, size, seed=get_args().seed)
        for scans, split, size in zip(split_scans(), splits, sizes, strict=True)
    )


# Every rank reads the same items for itself: nothing has to be broadcast, and every pipeline rank knows the batch.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed over the words that are asked for, their number, and both to report."""
    total, count = (losses.float() * mask).sum(), mask.sum()
    return total, count.to(torch.int), {"lm loss": torch.stack([total.detach().clone(), count])}


def forward_step(
    data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One document through the model, or through this rank's stage of it."""
    item = next(data_iterator)  # collated as a batch of one
    losses = model(
        item["tokens"].cuda(non_blocking=True),
        item["labels"].cuda(non_blocking=True),
        [image.squeeze(0).cuda(non_blocking=True) for image in item["images"]],
        [clip.squeeze(0).cuda(non_blocking=True) for clip in item["clips"]],
    )
    return losses, partial(loss_func, item["mask"].cuda(non_blocking=True))


def draw_weights_by_name() -> None:
    """Let Megatron's ``get_model`` return models whose initial weights don't depend on the pipeline."""
    get_model = training.get_model

    def deviation(name: str, parameter: torch.nn.Parameter) -> float | None:
        return None if "norm" in name or name.endswith("bias") else get_args().init_method_std

    def get_model_and_draw(*arguments: Any, **keywords: Any) -> list[torch.nn.Module]:
        models: list[torch.nn.Module] = get_model(*arguments, **keywords)
        draw_by_name(models, get_args().seed, deviation)
        return models

    training.get_model = get_model_and_draw


if __name__ == "__main__":
    defaults = shlex.split((HERE / "tiny.args").read_text(), comments=True)
    sys.argv[1:1] = [*(CPU_FLAGS if ON_CPU else ()), *defaults]  # first, so that the command line has the last word
    arguments = parse_and_validate_args(
        args_defaults={"tokenizer_type": "NullTokenizer", "vocab_size": VOCABULARY - 1, "num_workers": 0}
    )
    draw_weights_by_name()
    pretrain(
        pretrain_cfg_container_from_args(arguments),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
        get_embedding_ranks=lambda ranks: [ranks[0]],
        get_position_embedding_ranks=lambda ranks: [ranks[0]],
    )
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
