"""Small models of every family with batches to match, as a loop builds them: large enough that an operation takes
milliseconds on one core."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.models import gpt, language_model, llava
from dip_megatron.describe.model import MultimodalModel, Packing, TransformerLayer
from dip_megatron.describe.workload import Microbatch
from dip_megatron.families.family import ModelFamily

MICROBATCHES = 6
SEQUENCE = 512
IMAGES = (0, 5, 2, 7, 1, 4)
"""Pictures of a LLaVA's microbatches, of 36 tokens each."""
CLIPS = (((24, 1, 8, 8), (16, 2, 8, 8)), ((40, 4, 8, 8),), ((8, 1, 8, 8), (24, 2, 8, 16), (32, 1, 16, 16)))
"""Tokens of the prompt; frames, height and width of the latents."""


@dataclass(frozen=True)
class Built:
    """What a loop has: a provider of Megatron's kind, its forward step, a rank's batches (``shows`` where it gets
    pictures, too), and the families that DIP is to look for beside those it knows."""

    provide: Callable[..., torch.nn.Module]
    forward_step: Callable[..., Any]
    batches: Callable[[bool], list[Any]]
    families: Sequence[ModelFamily] = ()


@dataclass(frozen=True)
class Case:
    """A model to measure. ``schedules`` to measure it under, ``build(folder, ranks)`` makes it on a rank of so many;
    ``prepare(folder)`` writes what that needs; ``segments`` and ``unit`` (instances of encoders) cut it."""

    name: str
    build: Callable[[Path, int], Built]
    schedules: tuple[str, ...] = ("off", "static", "dynamic")
    bridge: bool = False
    prepare: Callable[[Path], None] = lambda folder: None
    segments: int = 2
    unit: int | None = 2


def draw(parts: Sequence[torch.nn.Module]) -> None:
    """The same weights however a model is cut."""
    from dip_megatron import draw_by_name

    draw_by_name(parts, 1, lambda _, parameter: 0.05 if parameter.dim() > 1 else None)
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.dim() < 2:
                torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)


def _layer(causal: bool, gated: bool = False) -> TransformerLayer:
    return TransformerLayer(256, 1024, 4, 4, causal=causal, gated=gated)


def _gpt_model(ranks: int, gated: bool = False) -> MultimodalModel:
    return gpt(language_model(8, _layer(True, gated), 1024), ranks, Packing(max_tokens=SEQUENCE))


def _llava_model(ranks: int) -> MultimodalModel:
    language = language_model(4, _layer(True), 1024, ("vision",))
    return llava(8, _layer(False), 8, 1024, language, ranks, Packing(max_tokens=SEQUENCE, image_tokens=36))


def _varying(config: Any) -> Any:
    """Microbatches of several lengths, under Megatron's own schedule, too."""
    config.variable_seq_lengths = True
    config.deallocate_pipeline_outputs = True
    return config


def _llava(folder: Path, ranks: int) -> Built:
    from megatron.core.models.multimodal.llava_model import LLaVAModel

    from dip_megatron.testing.synthetic import draw_batch, forward_step, llava_arguments

    model = _llava_model(ranks)
    arguments = llava_arguments(model, torch.float32)
    _varying(arguments["language_transformer_config"])
    arguments["vision_transformer_config"].pipeline_model_parallel_size = 1  # whole on the first stage
    loads = [Microbatch(SEQUENCE - 36 * n, (36,) * n) for n in IMAGES]

    def provide(pre_process: bool, post_process: bool) -> torch.nn.Module:
        return LLaVAModel(
            **arguments, pre_process=pre_process, post_process=post_process, add_encoder=pre_process, add_decoder=True
        )

    def batches(shows: bool) -> list[Any]:
        return [draw_batch(load, arguments, torch.device("cpu"), i) for i, load in enumerate(loads)]

    return Built(provide, forward_step, batches)


def _gpt(folder: Path, ranks: int, **experts: Any) -> Built:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from dip_megatron import with_sdpa
    from dip_megatron.testing.synthetic import draw_text, gpt_arguments, gpt_forward_step

    arguments = gpt_arguments(_gpt_model(ranks, gated=bool(experts)), torch.float32)
    arguments["config"] = _varying(replace(arguments["config"], **experts))
    if experts:
        spec = get_gpt_layer_local_spec(num_experts=experts["num_moe_experts"], normalization="RMSNorm")
        arguments["transformer_layer_spec"] = with_sdpa(spec)

    def provide(pre_process: bool, post_process: bool) -> torch.nn.Module:
        return GPTModel(**arguments, pre_process=pre_process, post_process=post_process)

    lengths = [SEQUENCE // 2, SEQUENCE, 3 * SEQUENCE // 4] * (MICROBATCHES // 3)
    return Built(
        provide, gpt_forward_step,
        lambda shows: [draw_text(n, arguments, torch.device("cpu"), i) for i, n in enumerate(lengths)],
    )  # fmt: skip


def _experts(folder: Path, ranks: int) -> Built:
    return _gpt(
        folder, ranks, num_moe_experts=4, moe_ffn_hidden_size=512, moe_router_topk=2, moe_layer_freq=1,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, moe_token_dispatcher_type="alltoall",
    )  # fmt: skip


def _t2v(folder: Path, ranks: int) -> Built:
    from functools import partial

    from dip_megatron.families.t2v.program import TextToVideoModel
    from tests.runtime import t2v_case

    case = t2v_case.T2vCase(CLIPS * (MICROBATCHES // len(CLIPS)), ((4,),), ((6,),))
    arguments = t2v_case.arguments(case, ranks)
    for name, heads in (("text_config", 16), ("diffusion_config", 16)):
        config = arguments[name]
        config.hidden_size, config.ffn_hidden_size, config.num_attention_heads = 256, 1024, heads
        config.num_query_groups, config.kv_channels = heads, 16
        config.params_dtype = config.pipeline_dtype = torch.float32
    arguments["largest_grid"] = (4, 16, 16)

    def provide(pre_process: bool, post_process: bool) -> torch.nn.Module:
        return TextToVideoModel(**arguments)

    return Built(
        provide, partial(t2v_case.forward_step, case.loss), lambda shows: t2v_case.batches(case)
    )  # fmt: skip


# -- Megatron-Bridge's classes ----------------------------------------------------------------------------------------
_TIMES = {"vision_config": 8, "audio_config": 8}
_WIDTHS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_heads", "num_key_value_heads", "d_model",
    "encoder_ffn_dim", "encoder_attention_heads", "moe_intermediate_size", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip
_TEXT = 4


def enlarged(config: dict[str, Any], times: int = _TEXT) -> dict[str, Any]:
    """A Hugging Face configuration whose networks are so many times as wide, of heads as wide as before."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found[name] = enlarged(value, _TIMES.get(name, _TEXT))
        elif name in _WIDTHS:
            found[name] = value * times
        elif name in ("out_hidden_size", "output_dim"):
            found[name] = value * _TEXT
        else:
            found[name] = value
    return found


def _write(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        from tests.bridge.tiny import TINY

        TINY[name].save(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(enlarged(json.loads(file.read_text()))))

    return prepare


def _of_bridge(name: str) -> Callable[[Path, int], Built]:
    def build(folder: Path, ranks: int) -> Built:
        from dip_megatron.families.multimodal.bridge_models import BRIDGE_FAMILIES
        from tests.bridge import equality, tiny, tiny_model

        tiny_model.SEQUENCE = SEQUENCE
        equality.MICROBATCHES = MICROBATCHES
        small = tiny.TINY[name]
        if small.sizes[0] == (1, 4, 4) and len(small.sizes) > 1:
            tiny.TINY[name] = replace(small, sizes=((1, 16, 16), (1, 8, 16), (1, 8, 8)))
        case = equality.Case(name, folder, {})
        _, provider = equality.provider_of(case, ranks)
        provider.variable_seq_lengths = True

        def batches(shows: bool) -> list[Any]:
            return equality.batches(case, 0 if shows else 1)

        return Built(provider.provide, _bridge_step, batches, BRIDGE_FAMILIES)

    return build


def _bridge_step(data_iterator: Iterator[Any], model: Any) -> Any:
    from tests.bridge.equality import forward_step

    return forward_step(data_iterator, model)


BRIDGE = ("qwen2-5-vl", "qwen3-vl", "qwen3-5-vl", "gemma3-vl", "glm-4-5v", "qwen2-5-omni", "ministral3-vl")
CASES = {
    case.name: case
    for case in (
        Case("llava", _llava, ("off", "static", "dynamic", "zb-h1", "zb-v")),
        Case("gpt", _gpt, ("off", "megatron-interleaved", "dynamic", "zb-h1", "zb-v")),
        Case("experts", _experts),
        Case("t2v", _t2v, ("static", "dynamic", "megatron-1f1b")),
        *(Case(name, _of_bridge(name), bridge=True, prepare=_write(name)) for name in BRIDGE),
    )
}
