"""An LLM as text encoder: GPT layers over packed prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from ...runtime.groups import local_group
from ..shared.packing import pack
from ..shared.sdpa import with_sdpa


def text_layer_spec(transformer_engine: bool = False) -> ModuleSpec:
    """A GPT layer for packed prompts: Megatron's local one with torch's attention, or Transformer Engine's."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec()
    return with_sdpa(get_gpt_layer_local_spec())


class TextEncoder(MegatronModule):
    """The layers of an LLM that one chunk holds: token table on the first, last norm on the last. Parameters are named
    as in Megatron's GPTModel."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        vocabulary: int,
        *,
        first: bool = True,
        last: bool = True,
        rotary_base: int = 10000,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        self.embedding = None
        if first:
            # Positions are rotary, so nothing depends on the longest possible prompt.
            self.embedding = LanguageModelEmbedding(config, vocabulary, 0, position_embedding_type="rope")
        self.rotary_pos_emb = RotaryEmbedding(
            config.kv_channels, 1.0, rotary_base=rotary_base, use_cpu_initialization=config.use_cpu_initialization
        )
        self.decoder = TransformerBlock(
            config, layer_spec, pre_process=True, post_process=last, vp_stage=vp_stage, pg_collection=pg_collection
        )

    def forward(
        self, lengths: Sequence[int], tokens: torch.Tensor | None = None, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Prompts of these ``lengths`` one after the other: ``tokens`` ``[t]`` on the first chunk, else hidden states
        ``[t, 1, h]``; returns hidden states ``[t, 1, h]``."""
        if self.embedding is not None:
            assert tokens is not None
            hidden = self.embedding(tokens.unsqueeze(0), None)
        assert hidden is not None
        packed = pack(lengths, hidden.device)
        return self.decoder(
            hidden, attention_mask=None, rotary_pos_emb=self.rotary_pos_emb(max(lengths), packed_seq=True),
            packed_seq_params=packed,
        )  # fmt: skip


def unshared(config: TransformerConfig, pg_collection: Any) -> tuple[TransformerConfig, Any]:
    """Config and process groups of a module that each context-parallel rank runs whole."""
    own, groups = copy.copy(config), copy.copy(pg_collection)
    own.context_parallel_size = 1
    groups.cp = local_group([dist.get_rank()], "gloo", timedelta(seconds=60))
    return own, groups
