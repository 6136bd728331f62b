"""Megatron-Core's LLaVAModel from the inside."""

from __future__ import annotations

from typing import Any

from megatron.core.models.multimodal.llava_model import IGNORE_INDEX, LLaVAModel
from torch.nn.functional import pad

from .names import Name, Topic

_MODEL = "megatron.core.models.multimodal.llava_model:LLaVAModel"
TOPIC = Topic(
    "LLaVA in segments",
    "megatron-core",
    "0.16.1, 0.19.2",
    "Megatron's LLaVAModel can't be trained under DIP",
    (
        Name("megatron.core.models.multimodal.llava_model:IGNORE_INDEX"),
        Name(
            _MODEL,
            has=("_language_is_pipeline_parallel", "sequence_parallel_lm", "tensor_model_parallel_size_lm",
                 "encoder_hidden_state", "img_seq_len", "vision_model", "vision_projection", "language_model"),
        ),
        Name(
            f"{_MODEL}._process_embedding_token_parallel",
            ("combined_embeddings", "new_labels", "new_loss_mask", "packed_seq_params"),
        ),
        Name(
            "megatron.core.models.vision.clip_vit_model:CLIPViTModel",
            has=("conv1", "position_embeddings", "decoder", "ln_post", "seq_length"),
        ),
    ),
)  # fmt: skip


class UnpaddedLLaVA(LLaVAModel):
    """A LLaVAModel that pads no sequence to the longest possible one, as Megatron does in pipelines, but, with sequence
    parallelism, to a length that divides."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # Shapes travel in the plan, so nothing needs Megatron's padding.
        self._language_is_pipeline_parallel = False

    def _process_embedding_token_parallel(
        self, combined_embeddings: Any, new_labels: Any, new_loss_mask: Any, packed_seq_params: Any
    ) -> Any:
        # Sequence parallelism wants lengths that divide. Upstream refuses others, or pads on the first stage only.
        if self.sequence_parallel_lm:
            size = self.tensor_model_parallel_size_lm
            if combined_embeddings is not None:  # [s, b, h]
                combined_embeddings = pad(combined_embeddings, (0, 0, 0, 0, 0, -combined_embeddings.shape[0] % size))
            if new_labels is not None:
                new_labels = pad(new_labels, (0, -new_labels.shape[1] % size), value=IGNORE_INDEX)
                new_loss_mask = pad(new_loss_mask, (0, -new_loss_mask.shape[1] % size))
        return super()._process_embedding_token_parallel(
            combined_embeddings, new_labels, new_loss_mask, packed_seq_params
        )


def forget_input(model: LLaVAModel) -> None:
    """Let go of what ``set_input_tensor`` gave a model: Megatron's modules hold it until they get the next."""
    model.encoder_hidden_state = None
    for part in (model.vision_model, model.language_model):
        if part is not None:
            part.decoder.input_tensor = None
