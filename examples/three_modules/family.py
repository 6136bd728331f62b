"""The three modules for DIP: what they are for the planner, how a batch is counted, how their stages run.

``docs/add-a-model.md`` walks through this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from dip_megatron import (
    EVERY_PART,
    Blueprint,
    Inputs,
    LanguageHead,
    Layers,
    Microbatch,
    MicrobatchInputs,
    ModalityModule,
    ModelFamily,
    ModuleShape,
    MultimodalModel,
    Operation,
    Packing,
    Parallel,
    PatchEmbedding,
    Projector,
    SegmentedProgram,
    Tensors,
    TokenEmbedding,
    Unit,
    bound,
    dtype_name,
    layer_shape,
    segment_config,
)

from .model import PLACEHOLDER, Part, Settings, ThreeModuleModel
from .shapes import AUDIO, LANGUAGE, VISION, ThreeModuleShapes

INSTANCES = {VISION: "images", AUDIO: "clips"}
"""The argument of ``ThreeModuleModel.forward`` that each encoder reads."""


def describe(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
    """The planner's view: shapes of layers, stems and heads, and which module waits for which."""
    settings: Settings = blueprint.kwargs["settings"]
    language, frozen = settings.configs[LANGUAGE], _frozen(blueprint)

    def encoder(name: str, counted: Literal["images", "audios"]) -> ModuleShape:
        config, read = settings.configs[name], settings.inputs[name]
        return ModuleShape(
            name, counted, config.num_layers, layer_shape(config, causal=False),
            stem=PatchEmbedding(patch=1, channels=read.values),
            head=Projector(language.hidden_size, language.hidden_size, read.reduction),
            trainable=("head",) if name in frozen else EVERY_PART,
        )  # fmt: skip

    decoder = ModuleShape(
        LANGUAGE, "text", language.num_layers, layer_shape(language, causal=True),
        stem=TokenEmbedding(settings.vocabulary), head=LanguageHead(settings.vocabulary), upstream=(VISION, AUDIO),
    )  # fmt: skip
    modules = encoder(VISION, "images"), encoder(AUDIO, "audios"), decoder
    return MultimodalModel("three-modules", modules, parallel, Packing(max_tokens=settings.sequence_length))


class ThreeModuleProgram(SegmentedProgram):
    """Stages of a ThreeModuleModel: the encoders work on some images or clips at a time, the language model on whole
    microbatches."""

    def __init__(self, settings: Settings, layers: Layers, *, rank: int, frozen: Sequence[str] = ()):
        """``layers[module][segment][rank]``. Raises ValueError for settings that can't be segmented."""
        super().__init__(layers, rank)
        settings.check()
        self.settings, self.frozen = settings, frozen
        for name, config in settings.configs.items():
            self.check_layers(name, config.num_layers)
        encoders = [ModalityModule(name, layers[name]) for name in (VISION, AUDIO)]
        self.modules = (*encoders, ModalityModule(LANGUAGE, layers[LANGUAGE], upstream=(VISION, AUDIO)))
        self.shapes = ThreeModuleShapes(
            {name: config.hidden_size for name, config in settings.configs.items()},
            {name: read.reduction for name, read in settings.inputs.items()},
            dtype_name(settings.configs[LANGUAGE]),
        )

    def build_chunks(self) -> list[torch.nn.Module]:
        """One chunk for each segment of each module, in the order of ``modules``."""
        configs = {
            name: segment_config(config, self.layers[name], self.rank) for name, config in self.settings.configs.items()
        }
        settings = replace(self.settings, configs=configs)
        chunks = [
            Part(settings, (module.name,), first=first, last=last, vp_stage=segment)
            for module in self.modules
            for segment, first, last in self.places(module.name)
        ]
        for chunk in chunks:
            chunk.freeze(self.frozen)
        return self.finish(chunks, configs[LANGUAGE])

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of ``ThreeModuleModel.forward`` by name."""
        return bound(_SIGNATURE, args, kwargs)

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """Counts of a microbatch: the tokens of each image and clip, and of the text around them."""
        tokens: torch.Tensor = inputs.arguments["tokens"]
        counts: dict[str, tuple[int, ...]] = {}
        for name, read in self.settings.inputs.items():
            counts[name] = tuple(read.tokens(instance) for instance in inputs.arguments[INSTANCES[name]])
            places = int((tokens == PLACEHOLDER[name]).sum())
            if places != sum(counts[name]):
                raise ValueError(
                    f"{INSTANCES[name]}: they become {sum(counts[name])} tokens, the sequence has {places} places for "
                    f"them (token {PLACEHOLDER[name]})"
                )
        text = tokens.numel() - sum(map(sum, counts.values()))
        return Microbatch(text, images=counts[VISION], audios=counts[AUDIO])

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage: of an encoder on the images or clips of ``unit``, or of the language model."""
        if stage.module == LANGUAGE:
            return {"hidden": self._language(chunk, inputs, microbatch.arguments)}
        instances = microbatch.arguments[INSTANCES[stage.module]][unit.first : unit.first + unit.count]
        return {"hidden": chunk(stage.module, instances, inputs.of(stage.module, "hidden"))}

    def final(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The loss of each position, as ThreeModuleModel returns it."""
        return self._language(chunk, inputs, arguments)

    def _language(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> torch.Tensor:
        embeddings = {name: inputs.of(name, "hidden") for name in INSTANCES}
        given = {name: embedded for name, embedded in embeddings.items() if embedded is not None}
        output: torch.Tensor = chunk(
            LANGUAGE, arguments["tokens"], arguments["labels"], given, inputs.of(LANGUAGE, "hidden")
        )
        return output


_SIGNATURE = inspect.signature(ThreeModuleModel.forward)


def _frozen(blueprint: Blueprint) -> tuple[str, ...]:
    return tuple(blueprint.calls.get("freeze", {}).get("encoders", ()))


def _program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> ThreeModuleProgram:
    if micro_batch_size != 1:
        raise ValueError(f"--micro-batch-size {micro_batch_size}: must be 1, a microbatch is one sequence")
    return ThreeModuleProgram(blueprint.kwargs["settings"], layers, rank=rank, frozen=_frozen(blueprint))


FAMILY = ModelFamily(
    name="three-modules",
    model_class=ThreeModuleModel,
    describe=describe,
    program=_program,
    workload="vision-audio-mix",
    recorded_methods=("freeze",),
)
