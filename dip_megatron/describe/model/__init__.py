"""Descriptions of large multimodal models: modality modules, their graph, and how they are cut."""

from .modules import (
    EVERY_PART,
    AudioEmbedding,
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
    "Head",
    "LanguageHead",
    "LatentEmbedding",
    "LatentHead",
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
