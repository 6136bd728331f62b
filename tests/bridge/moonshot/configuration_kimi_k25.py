"""See the package."""

from typing import ClassVar

from transformers import DeepseekV3Config, PretrainedConfig


class KimiK25VisionConfig(PretrainedConfig):
    """Of the encoder and of the projector behind it."""

    model_type = "kimi_k25_vision"

    def __init__(
        self, patch_size=14, init_pos_emb_height=64, init_pos_emb_width=64, init_pos_emb_time=4,
        pos_emb_type="divided_fixed", vt_num_attention_heads=16, vt_num_hidden_layers=27, vt_hidden_size=1152,
        vt_intermediate_size=4304, merge_kernel_size=(2, 2), video_attn_type="spatial_temporal",
        merge_type="sd2_tpool", mm_projector_type="patchmerger", mm_hidden_size=1152, projector_hidden_act="gelu",
        projector_ln_eps=1e-5, text_hidden_size=7168, **kwargs,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)


class KimiK25Config(PretrainedConfig):
    """Of the whole model."""

    model_type = "kimi_k25"
    sub_configs: ClassVar = {"text_config": DeepseekV3Config, "vision_config": KimiK25VisionConfig}

    def __init__(self, text_config=None, vision_config=None, media_placeholder_token_id=163605, pad_token_id=163839,
                 ignore_index=-100, **kwargs):  # fmt: skip
        given = text_config or {}
        self.text_config = DeepseekV3Config(**given) if isinstance(given, dict) else given
        seen = vision_config or {}
        self.vision_config = KimiK25VisionConfig(**seen) if isinstance(seen, dict) else seen
        self.media_placeholder_token_id, self.ignore_index = media_placeholder_token_id, ignore_index
        super().__init__(pad_token_id=pad_token_id, **kwargs)
