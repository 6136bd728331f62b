"""Model YAML files: validated with pydantic at the border, then turned into the dataclasses of ``modules``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from ..files import ConfigurationError, read_yaml, resolve
from .ends import (
    AudioEmbedding,
    FeatureEmbedding,
    LanguageHead,
    LatentEmbedding,
    LatentHead,
    Nothing,
    PatchEmbedding,
    Projector,
    TokenEmbedding,
)
from .experts import Experts
from .faults import ModelError
from .linear_attention import GatedDeltaNet
from .modules import (
    EVERY_PART,
    ContextParallel,
    ModuleShape,
    MultimodalModel,
    Packing,
    TensorParallel,
    TrainablePart,
    TransformerLayer,
)
from .parallel import Parallel

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]
Triple = tuple[PositiveInt, PositiveInt, PositiveInt]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def values(self) -> dict[str, Any]:
        """The fields as keyword arguments of the dataclass, ``kind`` left out."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}


class _Experts(_Strict):
    count: PositiveInt
    active: PositiveInt
    ffn: PositiveInt
    shared_ffn: int = Field(default=0, ge=0)
    dense_first: int = Field(default=0, ge=0)
    pattern: tuple[bool, ...] = (True,)
    imbalance: float = Field(default=1.15, ge=1.0)


class _GatedDeltaNet(_Strict):
    kind: Literal["gated_delta_net"]
    key_heads: PositiveInt
    value_heads: PositiveInt
    key_dim: PositiveInt = 128
    value_dim: PositiveInt = 128
    convolution: PositiveInt = 4
    chunk: PositiveInt = 64


class _Layer(_Strict):
    hidden: PositiveInt
    ffn: PositiveInt
    heads: PositiveInt
    kv_groups: PositiveInt
    head_dim: int = Field(default=0, ge=0)
    gated: bool = False
    causal: bool = False
    cross_attention: int = Field(default=0, ge=0)
    adaln: Literal["none", "single", "block"] = "none"
    window: int = Field(default=0, ge=0)
    full_attention_every: int = Field(default=0, ge=0)
    experts: _Experts | None = None
    linear_attention: _GatedDeltaNet | None = None
    output_gate: bool = False

    def shape(self) -> TransformerLayer:
        """As the dataclass. Raises ModelError."""
        values = self.values()
        try:
            experts = None if self.experts is None else Experts(**self.experts.values())
        except ValueError as error:
            raise ModelError(f"layer.experts.{error}") from error
        linear = None if self.linear_attention is None else GatedDeltaNet(**self.linear_attention.values())
        return TransformerLayer(**values | {"experts": experts, "linear_attention": linear})


class _PatchEmbedding(_Strict):
    kind: Literal["patch_embedding"]
    patch: PositiveInt
    channels: PositiveInt = 3
    temporal: PositiveInt = 1


class _AudioEmbedding(_Strict):
    kind: Literal["audio_embedding"]
    mels: PositiveInt = 128


class _FeatureEmbedding(_Strict):
    kind: Literal["feature_embedding"]
    features: PositiveInt


class _TokenEmbedding(_Strict):
    kind: Literal["token_embedding"]
    vocabulary: PositiveInt


class _LatentEmbedding(_Strict):
    kind: Literal["latent_embedding"]
    channels: PositiveInt = 16
    patch: Triple = (1, 2, 2)
    compression: Triple = (8, 8, 8)
    shared_modulation: bool = True


class _Projector(_Strict):
    kind: Literal["projector"]
    output: PositiveInt
    inner: PositiveInt
    reduction: PositiveInt = 1


class _LanguageHead(_Strict):
    kind: Literal["language_head"]
    vocabulary: PositiveInt
    tied: bool = False


class _LatentHead(_Strict):
    kind: Literal["latent_head"]
    channels: PositiveInt = 16
    patch: Triple = (1, 2, 2)


class _Nothing(_Strict):
    kind: Literal["none"] = "none"


_STEMS = {
    _PatchEmbedding: PatchEmbedding, _AudioEmbedding: AudioEmbedding, _FeatureEmbedding: FeatureEmbedding,
    _TokenEmbedding: TokenEmbedding,
    _LatentEmbedding: LatentEmbedding, _Nothing: Nothing,
}  # fmt: skip
_HEADS = {_Projector: Projector, _LanguageHead: LanguageHead, _LatentHead: LatentHead, _Nothing: Nothing}


class _Module(_Strict):
    input: Name
    layers: PositiveInt
    layer: _Layer
    stem: Annotated[
        _PatchEmbedding | _AudioEmbedding | _FeatureEmbedding | _TokenEmbedding | _LatentEmbedding | _Nothing,
        Field(discriminator="kind"),
    ] = _Nothing()
    head: Annotated[_Projector | _LanguageHead | _LatentHead | _Nothing, Field(discriminator="kind")] = _Nothing()
    upstream: tuple[Name, ...] = ()
    trainable: tuple[TrainablePart, ...] = EVERY_PART
    taps: tuple[int, ...] = ()
    mtp: int = Field(default=0, ge=0)
    carried: PositiveInt = 1
    tensor_parallel: TensorParallel = "split"
    context_parallel: ContextParallel = "whole"


class _Parallel(_Strict):
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt = 1
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    cp: PositiveInt = 1
    ep: PositiveInt = 1
    etp: int = Field(default=0, ge=0)


class _Packing(_Strict):
    max_tokens: PositiveInt = 8192
    max_images: PositiveInt = 48
    image_tokens: PositiveInt = 169
    max_clips: PositiveInt = 8
    max_seconds: PositiveFloat = 16.0
    fps: PositiveInt = 16


class _Model(_Strict):
    name: Name
    modules: Annotated[dict[Name, _Module], Field(min_length=1)]
    parallel: _Parallel = _Parallel()
    packing: _Packing = _Packing()


def load_model(name_or_path: str | Path) -> MultimodalModel:
    """A model by shipped name (``vlm-s``) or from a YAML file. Raises ConfigurationError: file, place and reason on one
    line."""
    path = resolve("models", name_or_path)
    data = read_yaml(path, _Model)
    try:
        modules = tuple(
            ModuleShape(
                name=name,
                input=m.input,
                layers=m.layers,
                layer=m.layer.shape(),
                stem=_STEMS[type(m.stem)](**m.stem.values()),
                head=_HEADS[type(m.head)](**m.head.values()),
                upstream=m.upstream,
                trainable=m.trainable,
                taps=m.taps,
                mtp=m.mtp,
                carried=m.carried,
                tensor_parallel=m.tensor_parallel,
                context_parallel=m.context_parallel,
            )
            for name, m in data.modules.items()
        )
        return MultimodalModel(data.name, modules, Parallel(**data.parallel.values()), Packing(**data.packing.values()))
    except ModelError as error:
        raise ConfigurationError(f"{path}: {error}") from error
