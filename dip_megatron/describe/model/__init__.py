"""Descriptions of large multimodal models: modality modules, their graph, and how they are cut."""

from .experts import Experts, LayerKind
from .modules import (
    EVERY_PART,
    AudioEmbedding,
    FeatureEmbedding,
    Head,
    LanguageHead,
    LatentEmbedding,
    LatentHead,
    ModelError,
    ModuleShape,
    MultimodalModel,
    Nothing,
    Packing,
    Parallel,
    PatchEmbedding,
    Projector,
    Stem,
    TokenEmbedding,
    TransformerLayer,
)
from .partition import ModulePartition, Partition, even_partition, spread
from .schema import load_model
from .training import ChunkTraining, PartTraining, Training, TrainingMismatchError

__all__ = [
    "EVERY_PART",
    "AudioEmbedding",
    "ChunkTraining",
    "Experts",
    "FeatureEmbedding",
    "Head",
    "LanguageHead",
    "LatentEmbedding",
    "LatentHead",
    "LayerKind",
    "ModelError",
    "ModulePartition",
    "ModuleShape",
    "MultimodalModel",
    "Nothing",
    "Packing",
    "Parallel",
    "PartTraining",
    "Partition",
    "PatchEmbedding",
    "Projector",
    "Stem",
    "TokenEmbedding",
    "Training",
    "TrainingMismatchError",
    "TransformerLayer",
    "even_partition",
    "load_model",
    "spread",
]
