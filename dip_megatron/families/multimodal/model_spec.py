"""What DIP must know of a model whose encoders it cuts at their call: one page a family.

The model keeps its class. A chunk of an encoder is a model of that class with some of the encoder's layers in it; a
chunk of the language model is one without encoders, on whose first chunk the encoder's name leads to what the stages
before have made. :mod:`.program` does the rest.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar

import torch

from ...compat.bridge_building import NoLanguageModel
from ...describe.model import (
    ContextParallel,
    LanguageHead,
    ModuleShape,
    MultimodalModel,
    Packing,
    Parallel,
    Projector,
    TensorParallel,
    TokenEmbedding,
)
from ..describe import configured_experts, layer_shape, trainable_parts
from ..shared.cut import CutPoints, found
from ..shared.packing import fills, packed_lengths
from ..shared.shapes import LANGUAGE, VISION
from .shapes import HiddenShape

Arguments = Mapping[str, Any]
"""Of the model's forward, by name."""


class Encoder(ABC):
    """One encoder of a family. ``called`` is what the model's forward calls, ``kind`` what of a microbatch it reads,
    ``depth`` the setting of the model's config that gives its number of layers, dotted, ``values`` the arguments of the
    model's forward with what it encodes."""

    name: str = VISION
    kind: str = "images"
    called: str = "visual"
    depth: ClassVar[str] = "vision_config.depth"
    values: ClassVar[tuple[str, ...]] = ("pixel_values",)
    splits: ClassVar[bool] = False
    """Whether its matrices are split over tensor-parallel ranks, as those of Megatron's modules are."""
    gathers_before: ClassVar[str] = ""
    """Where it doesn't, and ranks encode a share of the instances each: the module, dotted, before which what they have
    made is gathered, instance by instance; ``""``: what leaves the encoder is, token by token."""

    @abstractmethod
    def points(self, config: Any) -> CutPoints:
        """Where it is cut, by names within the model. What taps make goes to the language model's layers, see
        :meth:`ModelSpec.add_tap`."""

    @abstractmethod
    def hidden(self, config: Any) -> HiddenShape:
        """Hidden states between its layers."""

    @abstractmethod
    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        """It in the planner's words."""

    @abstractmethod
    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        """Of each instance in a microbatch, as the language model sees them. Raises ValueError for a batch that
        contradicts itself."""

    def unit_tokens(self, config: Any, arguments: Arguments, own: slice) -> tuple[int, ...]:
        """Tokens of a unit's instances, on any rank: also of one that the loop gives nothing to encode."""
        return tuple(self.tokens(config, arguments)[own])

    @abstractmethod
    def encode(
        self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        """Call ``model``'s encoder on some of a microbatch's instances; embeddings ``[tokens, language hidden]``.
        ``hidden``, on chunks after the first, is of the shape that those modules should see which come before the
        layers and are on other chunks; what they hand on is lost."""

    def entering(self, config: Any, arguments: Arguments, embeddings: torch.Tensor) -> torch.Tensor:
        """``embeddings`` of all instances as they come to the language model's first chunk, so that each
        tensor-parallel rank has the whole gradient of them."""
        return embeddings

    @abstractmethod
    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        """What stands in the encoder's place where the model's forward calls it: ``embeddings`` are those of all
        instances."""

    def leaving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` as it travels to the next chunk, where what instances are doesn't tell its shape."""
        return hidden

    def arriving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`leaving`."""
        return hidden

    def in_order(self, config: Any, arguments: Arguments, rows: torch.Tensor) -> torch.Tensor:
        """``rows``, what a tap made of all instances, in the order of the tokens of samples one after the other."""
        return rows

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        """Arguments for the language model's first chunk, where others than the given ones do; ``present``: the
        microbatch has instances."""
        return {}

    def settings(self, config: Any) -> Any:
        """What of the model's config ``depth`` is in."""
        return reduce(getattr, self.depth.split(".")[:-1], config)

    def layers(self, config: Any) -> int:
        """Their number, by the config."""
        return int(getattr(self.settings(config), self.depth.rpartition(".")[2]))

    def tensor_parallel(self, config: Any) -> TensorParallel:
        """How tensor-parallel ranks hold and run it. One with dropout isn't shared out: its ranks would draw unequally
        many random numbers, and then disagree in the language model's."""
        if self.splits:
            return "split"
        drops = (v for name, v in vars(self.settings(config)).items() if "dropout" in name or "drop_path" in name)
        return "whole" if any(isinstance(v, int | float) and v > 0 for v in drops) else "shared"


class ModelSpec(ABC):
    """A family: ``name``, the model's class, its encoders, and how to build it in parts. ``config_name`` is the
    constructor's argument that is the language model's config, Bridge's provider as a rule; ``unsupported`` are
    arguments of ``forward`` that nothing can be done with, and what they are."""

    name: ClassVar[str]
    model_class: ClassVar[type[torch.nn.Module]]
    encoders: tuple[Encoder, ...]
    workload: ClassVar[str] = "vlm-any-resolution"
    config_name: ClassVar[str] = "config"
    language: ClassVar[str] = "language_model"
    """Where the language model is within the model; ``""``: the class extends it."""
    unsupported: ClassVar[Mapping[str, str]] = {
        "inputs_embeds": "embeddings instead of tokens",
        "inference_context": "inference",
        "inference_params": "inference",
    }
    shares: ClassVar[bool] = False
    """Whether the class shares merged sequences out over context-parallel ranks by itself, on every stage."""
    shares_packed: ClassVar[bool] = False
    """Whether it does that with samples packed into one row, each by itself."""
    predicts: ClassVar[bool] = False
    """Whether the class takes multi-token prediction."""
    replicates: ClassVar[bool] = True
    """Whether every rank may hold all of an encoder."""
    usual_picture: ClassVar[int] = 391
    """Tokens of a picture of 640 x 480 pixels, for the first choice of a partition."""

    def check(self, config: Any) -> None:
        """Raises ValueError for models that can't be segmented."""
        if getattr(config, "mtp_num_layers", None) and not self.predicts:
            raise ValueError("DIP can't segment multi-token prediction layers; use --dip-schedule off")
        if config.context_parallel_size > 1 and not self.shares:
            raise ValueError(f"DIP can't run {self.model_class.__name__} with context parallelism; use "
                             "--dip-schedule off")  # fmt: skip

    def check_layers(  # noqa: B027  most pages take every partition
        self, config: Any, layers: Mapping[str, tuple[tuple[int, ...], ...]]
    ) -> None:  # fmt: skip
        """Raises ValueError for partitions, ``[segment][rank]`` of each module, that the class can't have."""

    def check_call(self, arguments: Arguments) -> None:  # noqa: B027  most pages take every call
        """Raises ValueError for a batch that has no segmented form."""

    def taken(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Of the arguments of a call, those that the whole model makes use of."""
        return arguments

    def packed(self, arguments: Arguments) -> Any:
        """How samples are packed in the rows of a microbatch, None for one a row."""
        return arguments.get("packed_seq_params")

    def laid(self, arguments: Arguments) -> tuple[int, tuple[int, ...]]:
        """Rows of hidden states that a microbatch becomes, and the tokens of each sample in a row: one, or those packed
        into it. Raises ValueError for a packing that doesn't fit its row."""
        rows, length = arguments["input_ids"].shape
        packed = self.packed(arguments)
        return int(rows), (int(length),) if packed is None else packed_lengths(packed, int(length))

    def places(self, config: Any, arguments: Arguments) -> torch.Tensor:
        """Where taps are added: ``[b, s]``, of the rows that :meth:`laid` tells of."""
        ids = arguments["input_ids"]
        return torch.isin(ids, torch.tensor(self.position_tokens(config), device=ids.device))

    def check_shared(self, row: Sequence[int], packed: Any, ranks: int) -> None:
        """Raises ValueError for a row of samples of so many tokens that ``ranks`` context-parallel ranks can't
        share."""
        if packed is not None and not self.shares_packed:
            raise ValueError(
                f"Megatron-Bridge's {self.model_class.__name__} shares no packed samples out over context-parallel "
                "ranks; pack none, or use context_parallel_size 1"
            )
        if packed is not None and not fills(packed, sum(row)):
            raise ValueError(
                f"samples end before the {sum(row)} tokens of their row do, of which context-parallel ranks know no "
                "shares; let the last one fill it, or use context_parallel_size 1"
            )
        odd = sorted({length for length in row if length % (2 * ranks)})
        if odd:
            raise ValueError(
                f"{ranks} context-parallel ranks share sequences of a multiple of {2 * ranks} tokens; this microbatch "
                f"has {', '.join(map(str, odd))}; pad each, or use context_parallel_size 1"
            )

    def shown(self) -> Mapping[str, Any]:
        """Attributes, by name, that a model has which isn't built yet, where what builds it looks at them afterwards.
        What it does then, :meth:`chunk` does."""
        return {}

    @abstractmethod
    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        """The model with its encoders and without a language model; frozen as its own freeze says, later."""

    @abstractmethod
    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        """The model with some layers of its language model, built by ``config``, and without encoders."""

    def calling(self, model: Any) -> AbstractContextManager[None]:
        """Around each call of a chunk of the language model."""
        return nullcontext()

    def hidden_of(self, output: Any) -> torch.Tensor:
        """Hidden states ``[s, b, h]`` in what a chunk of the language model returns that isn't the last."""
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def position_tokens(self, config: Any) -> tuple[int, ...]:
        """Ids of the tokens in whose places taps are added."""
        return tuple(getattr(config, name) for name in ("image_token_id", "video_token_id") if hasattr(config, name))

    def add_tap(
        self, model: Any, hidden: torch.Tensor, where: torch.Tensor, tap: torch.Tensor, row: Sequence[int]
    ) -> torch.Tensor:  # fmt: skip
        """``hidden`` ``[s, b, h]`` of the language model, ``tap`` added ``where`` ``[b, s]`` instances stand. Each row
        is of samples of so many tokens: one, or those packed into it."""
        raise NotImplementedError(f"{self.name} has no taps")

    def tied(self, config: Any) -> bool:
        """Whether the head has the embedding's weight."""
        return bool(config.share_embeddings_and_output_weights)

    def vocabulary(self, config: Any) -> int:
        """Tokens the language model knows."""
        return int(config.vocab_size)

    def longest(self, config: Any) -> int:
        """Tokens of a sequence, as the loop packs or pads them."""
        return int(config.seq_length)

    def decoder(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        """The language model in the planner's words."""
        reads, words = not freeze.get("freeze_language_model"), self.vocabulary(config)
        return ModuleShape(
            LANGUAGE, "text", config.num_layers,
            layer_shape(config, causal=True, spec=configured_experts(config)), TokenEmbedding(words),
            LanguageHead(words, self.tied(config)),
            tuple(e.name for e in self.encoders), trainable_parts(stem=reads, layers=reads, head=reads),
            mtp=getattr(config, "mtp_num_layers", None) or 0,
            carried=self.carried(config),
        )  # fmt: skip

    def carried(self, config: Any) -> int:
        """How many tensors as large as hidden states the language model's chunks hand on as one."""
        return 1

    def describe(self, config: Any, freeze: Mapping[str, bool], parallel: Parallel) -> MultimodalModel:
        """The model of this config."""
        encoders = []
        for encoder in self.encoders:
            shape = encoder.describe(config, freeze)
            tensor: TensorParallel = encoder.tensor_parallel(config) if parallel.tp > 1 else "split"
            context: ContextParallel = "shared" if parallel.cp > 1 else "whole"
            encoders.append(replace(shape, tensor_parallel=tensor, context_parallel=context))
        modules = (*encoders, self.decoder(config, freeze))
        longest = self.longest(config)
        packing = Packing(max_tokens=longest, image_tokens=min(self.usual_picture, longest // 2))
        return MultimodalModel(self.name, modules, parallel, packing)


def check_places(
    arguments: Arguments, token: int, counted: list[int], kind: str, instances: str, way_out: str = ""
) -> list[int]:
    """``counted``, the tokens of each instance, if the microbatch has as many of their ``token``. Raises ValueError."""
    places = int((arguments["input_ids"] == token).sum())
    if places != sum(counted):
        raise ValueError(
            f"the microbatch has {places} {kind} tokens for {len(counted)} {instances} that become "
            f"{sum(counted)}{way_out}"
        )
    return counted


def projector_of(parameters: int, width: int, output: int, reduction: int) -> Projector:
    """Two matrices, as descriptions have them, with as many parameters in all as a projector from ``reduction`` rows of
    ``width`` to ``output`` that is built otherwise."""
    return Projector(output, max(1, round(parameters / (width * reduction + output))), reduction)


class ProviderSpec(ModelSpec):
    """A model that is built as ``Model(provider, pre_process, post_process, vp_stage)``, and has its language model
    from the provider."""

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        own = copy.copy(kwargs["config"])
        own.provide_language_model = lambda **_: NoLanguageModel()
        return self.model_class(own, pre_process=True, post_process=False, vp_stage=None)

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        with without_layers(config, self.encoders):  # what is built on the first chunk is thrown away
            model = self.model_class(config, pre_process=first, post_process=last, vp_stage=segment)
        drop(model, first, *(name for e in self.encoders for name in (e.called, *e.points(config).tail)))
        return model


@contextmanager
def without_layers(config: Any, encoders: tuple[Encoder, ...]) -> Iterator[None]:
    """Within, the settings of ``config`` that these encoders are built by give them no layers."""
    paths = [e.depth.split(".") for e in encoders]
    owners = {path[0]: getattr(config, path[0]) for path in paths}
    for name, owner in owners.items():
        setattr(config, name, copy.deepcopy(owner))
    for *path, last in paths:
        setattr(reduce(getattr, path, config), last, 0)
    try:
        yield
    finally:
        for owner, before in owners.items():
            setattr(config, owner, before)


def drop(model: torch.nn.Module, there: bool, *names: str) -> None:
    """Take submodules away, which are ``there`` on the first chunk only; their names are free for something else."""
    for name in names if there else ():
        owner, _, last = name.rpartition(".")
        try:
            held = found(model, owner)
        except ValueError:  # gone with what it stood in
            continue
        if last in held._modules:
            delattr(held, last)
