"""mcore-bridge: how its models are built, and its weights' way in from Hugging Face's files and out again."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from .names import Name, Topic

KIMI_FEATURES = "_extract_image_features"
"""The method of Kimi-VL's wrapper that calls its encoder and its projector, as the code in the model's folder does."""
_ADAPTERS = "base_model.model."
"""Before the names of weights in a folder of adapters."""
_BRIDGE = "mcore_bridge.bridge.gpt_bridge:GPTBridge"
TOPIC = Topic(
    "models of mcore-bridge",
    "mcore-bridge",
    "1.6.5",
    "models of mcore-bridge (ms-swift) can't be trained under DIP",
    (
        Name("mcore_bridge.model:MultimodalGPTModel", has=("visual", "language_model", "language_model_cls")),
        Name("mcore_bridge.model.mm_gpts.qwen:Qwen2_5VL_Vit", has=("visual", "hf_config", "get_inputs_embeds")),
        Name("mcore_bridge.model.mm_gpts.qwen:Qwen2VL_Vit", has=("visual", "hf_config", "get_inputs_embeds")),
        Name(
            "transformers.models.qwen2_vl.modeling_qwen2_vl:Qwen2VisionTransformerPretrainedModel",
            has=("patch_embed", "blocks", "merger"),
        ),
        Name("mcore_bridge.model.mm_gpts.qwen3_vl:Qwen3VL_Vit", has=("visual", "hf_config", "get_inputs_embeds")),
        Name(
            "transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionModel",
            has=("patch_embed", "pos_embed", "blocks", "merger", "deepstack_merger_list"),
        ),
        Name("mcore_bridge.model.mm_gpts.glm:Glm4vVit", has=("visual", "hf_config", "get_inputs_embeds")),
        Name(
            "transformers.models.glm4v_moe.modeling_glm4v_moe:Glm4vMoeVisionModel",
            has=(
                "patch_embed",
                "post_conv_layernorm",
                "embeddings",
                "blocks",
                "post_layernorm",
                "downsample",
                "merger",
            ),
        ),
        Name("mcore_bridge.model.mm_gpts.qwen3_5:Qwen3_5Vit", has=("visual", "hf_config", "get_inputs_embeds")),
        Name(
            "transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5VisionModel",
            has=("patch_embed", "pos_embed", "blocks", "merger"),
        ),
        Name(
            "mcore_bridge.model.mm_gpts.internvl:InternvlHfVit",
            has=("module_mapping", "get_inputs_embeds", "get_image_features"),
        ),
        Name(
            "mcore_bridge.model.mm_gpts.internvl:InternvlVit",
            has=("module_mapping", "get_inputs_embeds", "extract_feature"),
        ),
        Name(
            "mcore_bridge.model.mm_gpts.kimi_vl:KimiVLVit", has=("module_mapping", "get_inputs_embeds", KIMI_FEATURES)
        ),
        Name(f"mcore_bridge.model.mm_gpts.kimi_vl:KimiVLVit.{KIMI_FEATURES}", ("pixel_values", "image_grid_hws")),
        Name("transformers.models.internvl.modeling_internvl:InternVLVisionModel", has=("embeddings", "encoder")),
        Name("transformers.models.internvl.modeling_internvl:InternVLVisionLayer", has=("attention", "mlp")),
        Name("mcore_bridge.model.register:ModelLoader.build_model", ("pre_process", "post_process", "vp_stage")),
        Name(f"{_BRIDGE}", has=("module_mapping",)),
        Name(f"{_BRIDGE}.load_weights", ("mg_models", "hf_model_dir", "peft_format")),
        Name(f"{_BRIDGE}.export_weights", ("mg_models", "*", "peft_format", "converter")),
        Name(f"{_BRIDGE}._set_module", ("mg_module", "hf_state_dict", "hf_prefix", "to_mcore")),
        Name(f"{_BRIDGE}._convert_hf_state_dict", ("hf_state_dict", "to_mcore")),
        Name(f"{_BRIDGE}._add_prefix", ("state_dict", "prefix")),
        Name(f"{_BRIDGE}._remove_prefix", ("state_dict", "prefix")),
        Name("mcore_bridge.utils:SafetensorLazyLoader", ("hf_model_dir", "peft_format")),
        Name("mcore_bridge.utils:unwrap_model", ("models",)),
    ),
)


class _Stage:
    """A chunk of the language model, as a virtual stage that has no encoder."""

    visual = None

    def __init__(self, chunk: Any, segment: int):
        self.config, self.language_model, self.vp_stage = chunk.config, chunk.language_model, segment


def kimi_features(visual: Any, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """What that makes of pictures: embeddings ``[tokens, language hidden]`` of all of them."""
    embeddings: torch.Tensor = visual._extract_image_features(pixels, grids)
    return embeddings


@contextmanager
def by_class(module: torch.nn.Module) -> Iterator[None]:
    """Within, a ``forward`` of the module's own is found by way of its class, where mcore-bridge wraps it in another
    for the time of a call."""
    own, kind = module.__dict__.pop("forward", None), type(module)
    if own is None:
        yield
        return
    before = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if self is module else before(self, *args, **kwargs)

    kind.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.forward = before  # type: ignore[method-assign]
        module.__dict__["forward"] = own


def cut_models(models: Any) -> list[Any] | None:
    """The models inside what a loop hands to mcore-bridge, if some are an encoder's chunks; None if none is."""
    utils = importlib.import_module("mcore_bridge.utils")
    found = list(utils.unwrap_model(models if isinstance(models, (list, tuple)) else [models]))
    return found if any(_is_encoder(model) for model in found) else None


def load_into_chunks(
    load: Callable[..., Any], bridge: Any, models: Sequence[Any], folder: str, *given: Any, **rest: Any
) -> None:
    """``load``, mcore-bridge's own ``load_weights``, for chunks of encoders and of the language model.

    Its pipeline has a whole encoder on the first stage; here each chunk takes what it has of it from the files."""
    stages = _stages(models)
    with _virtual_stages(len(stages)):
        load(bridge, stages, folder, *given, **rest)
    utils = importlib.import_module("mcore_bridge.utils")
    asked = inspect.signature(load).bind(bridge, models, folder, *given, **rest).arguments
    adapters = asked.get("peft_format", False)
    with torch.no_grad(), utils.SafetensorLazyLoader(folder, peft_format=adapters) as files:
        state = bridge._remove_prefix(files.get_state_dict(), _ADAPTERS if adapters else "")
        state = bridge._convert_hf_state_dict(state, True)
        for prefix, part in _parts(bridge):
            for model in filter(_is_encoder, models):
                bridge._set_module(_within(model, part), state, prefix, True)


def export_of_chunks(
    export: Callable[..., Any], bridge: Any, models: Sequence[Any], *given: Any, **rest: Any
) -> Iterator[tuple[str, Any]]:
    """``export``, mcore-bridge's own ``export_weights``, of chunks: names and tensors of the language model, then of
    what each pipeline rank has of the encoder. To be drawn on all ranks."""
    yield from export(bridge, _stages(models), *given, **rest)
    asked = inspect.signature(export).bind(bridge, models, *given, **rest).arguments
    convert, before = asked.get("converter"), _ADAPTERS if asked.get("peft_format", False) else ""
    ranks = parallel_state.get_pipeline_model_parallel_world_size()
    for prefix, part in _parts(bridge):
        held = _Held([_within(model, part) for model in models if _is_encoder(model)])
        for rank in range(ranks):
            own = held if rank == parallel_state.get_pipeline_model_parallel_rank() else None
            with torch.no_grad():
                found = bridge._convert_hf_state_dict(bridge._set_module(own, {}, prefix, False), False)
            for name, tensor in bridge._add_prefix(found, before).items():
                pair = (name, tensor) if convert is None or tensor is None else convert(name, tensor)
                if pair is not None:
                    yield pair


class _Held:
    """What several chunks hold of one module, as of one."""

    def __init__(self, modules: Sequence[torch.nn.Module]):
        self._modules = modules

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor for module in self._modules for name, tensor in module.state_dict().items()}


def _is_encoder(model: Any) -> bool:
    """Whether it is a chunk without a language model of its own (of one that is tied it may show another's)."""
    return hasattr(model, "visual") and "language_model" not in getattr(model, "_modules", {"language_model": None})


def _stages(models: Sequence[Any]) -> list[_Stage]:
    return [_Stage(model, segment) for segment, model in enumerate(m for m in models if not _is_encoder(m))]


def _parts(bridge: Any) -> list[tuple[str, str]]:
    """Prefix of an encoder's weights in the files, and its name within the wrapper."""
    return [(f"{prefix}.", name) for prefix, name in bridge.module_mapping.items()]


def _within(model: Any, part: str) -> Any:
    return model.visual.get_submodule(part)


@contextmanager
def _virtual_stages(count: int) -> Iterator[None]:
    """Within, Megatron counts so many virtual stages a rank."""
    before = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(count if count > 1 else None)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(before)
