"""Pretrain a GPT on mock data with nothing but an installed megatron-core 0.19 or newer, whose wheel has no scripts.

The model is built as upstream's ``pretrain_gpt.py`` builds it: from a config, by Megatron's own builder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def datasets_provider(sizes: list[int]) -> Any:
    """Mock documents of integers that count up, for training, validation and test."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, split=args.split, tokenizer=get_tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
    """Summed loss, number of tokens, and both for the log."""
    mask = loss_mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach().clone(), tokens.float()])}


def forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
    """Losses per token of one microbatch, ``[b, s]``, and what sums them up."""
    batch = {name: tensor.cuda() for name, tensor in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    arguments = parse_and_validate_args()
    settings = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(settings, datasets_provider, ModelType.encoder_or_decoder, forward_step)
