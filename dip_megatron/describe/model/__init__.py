"""Descriptions of large multimodal models: modality modules, their graph, and how they are cut."""

from .ends import (
    AudioEmbedding,
    FeatureEmbedding,
    Head,
    LanguageHead,
    LatentEmbedding,
    LatentHead,
    Nothing,
    PatchEmbedding,
    Projector,
    Stem,
    TokenEmbedding,
)
from .experts import Experts, LayerKind
from .faults import ModelError
from .linear_attention import GatedDeltaNet
from .modules import (
    EVERY_PART,
    ContextParallel,
    ModuleShape,
    MultimodalModel,
    Packing,
    TensorParallel,
    TransformerLayer,
)
from .parallel import Parallel
from .partition import Chunk, LayerRun, ModulePartition, Partition, even_partition, spread
from .schema import load_model
from .training import ChunkTraining, PartTraining, Training, TrainingMismatchError

__all__ = [
    "EVERY_PART",
    "AudioEmbedding",
    "Chunk",
    "ChunkTraining",
    "ContextParallel",
    "Experts",
    "FeatureEmbedding",
    "GatedDeltaNet",
    "Head",
    "LanguageHead",
    "LatentEmbedding",
    "LatentHead",
    "LayerKind",
    "LayerRun",
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
    "TensorParallel",
    "TokenEmbedding",
    "Training",
    "TrainingMismatchError",
    "TransformerLayer",
    "even_partition",
    "load_model",
    "spread",
]
