"""Small models that benchmarks build and train: a GPT, and a LLaVA whose ViT feeds it."""

from __future__ import annotations

from dip_megatron.describe.model import (
    LanguageHead,
    ModuleShape,
    MultimodalModel,
    Packing,
    Parallel,
    PatchEmbedding,
    Projector,
    TokenEmbedding,
    TransformerLayer,
)


def language_model(
    layers: int, layer: TransformerLayer, vocabulary: int, upstream: tuple[str, ...] = ()
) -> ModuleShape:
    """A language model of equal layers, with an embedding and a head."""
    return ModuleShape(
        "language", "text", layers, layer, TokenEmbedding(vocabulary), LanguageHead(vocabulary), upstream
    )


def gpt(language: ModuleShape, ranks: int, packing: Packing, name: str = "gpt") -> MultimodalModel:
    """A language model alone, on a pipeline of so many ranks."""
    return MultimodalModel(name, (language,), pipeline(ranks), packing)


def llava(
    layers: int, layer: TransformerLayer, patch: int, projection: int, language: ModuleShape, ranks: int,
    packing: Packing, name: str = "llava",
) -> MultimodalModel:  # fmt: skip
    """A ViT and the language model that it feeds. ``projection`` is the projector's hidden size; it makes one token of
    four patches."""
    projector = Projector(language.layer.hidden, projection, 4)
    vision = ModuleShape("vision", "images", layers, layer, PatchEmbedding(patch), projector)
    return MultimodalModel(name, (vision, language), pipeline(ranks), packing)


def pipeline(ranks: int) -> Parallel:
    """One pipeline, with neither sequence parallelism nor a distributed optimizer."""
    return Parallel(pp=ranks, sequence_parallel=False, distributed_optimizer=False)
