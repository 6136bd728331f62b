"""What a large multimodal model is, for the planner: modality modules with their layer shapes, and their graph.

Plain frozen dataclasses: a running model can be described with them as well as a YAML file can. Sizes are in elements;
a *token* is one position of a module's sequence (a patch for a ViT, a latent patch for a DiT).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from .ends import Head, LanguageHead, LatentEmbedding, LatentHead, Nothing, Projector, Stem, TokenEmbedding
from .experts import Experts, LayerKind
from .faults import ModelError, positive
from .linear_attention import GatedDeltaNet
from .parallel import Parallel

TrainablePart = Literal["stem", "layers", "head"]
TensorParallel = Literal["split", "shared", "whole"]
ContextParallel = Literal["shared", "whole"]
EVERY_PART: tuple[TrainablePart, ...] = ("stem", "layers", "head")


@dataclass(frozen=True)
class TransformerLayer:
    """Shape of one transformer layer.

    ``cross_attention`` is the width of the condition its second attention reads (0: none). ``adaln`` says where scale,
    shift and gate come from: nowhere, one projection shared by all layers (``single``, in the stem), or one of each
    layer's own (``block``). ``window`` limits self-attention to windows of so many tokens (0: none), except in every
    ``full_attention_every``-th layer (0: no exception). ``linear_attention`` stands instead of self-attention in all
    layers but every ``full_attention_every``-th one. ``output_gate``: queries bring a gate of their size, by which the
    attention's output is multiplied. ``experts`` stand instead of the MLP in some layers, or all.
    """

    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int = 0
    gated: bool = False
    causal: bool = False
    cross_attention: int = 0
    adaln: Literal["none", "single", "block"] = "none"
    window: int = 0
    full_attention_every: int = 0
    experts: Experts | None = None
    linear_attention: GatedDeltaNet | None = None
    output_gate: bool = False

    def __post_init__(self) -> None:
        if self.linear_attention is not None and self.window:
            raise ModelError("layer.window: layers are either of windows or of linear_attention; leave one out")
        positive("layer", hidden=self.hidden, ffn=self.ffn, heads=self.heads, kv_groups=self.kv_groups)
        if self.head_dim == 0:
            if self.hidden % self.heads:
                raise ModelError(f"layer.heads: {self.heads} don't divide hidden {self.hidden}; set head_dim")
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.heads % self.kv_groups:
            raise ModelError(f"layer.kv_groups: {self.kv_groups} don't divide {self.heads} heads")

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_groups * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of one layer with full attention and without experts, biases left out."""
        return self.parameters_of(LayerKind())

    def parameters_of(self, kind: LayerKind) -> int:
        """Parameters of one layer of a kind, biases left out, and experts: router and shared experts are counted."""
        linear = self.linear_attention
        mixer = self._attention if linear is None or kind.full_attention else linear.parameters(self.hidden)
        if not kind.experts:
            return mixer + self._beside + self._mlp(self.ffn)
        assert self.experts is not None
        return mixer + self._beside + self.hidden * self.experts.count + self._mlp(self.experts.shared_ffn)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of one layer."""
        return 0 if self.experts is None else self.experts.count * self._mlp(self.experts.ffn)

    def _mlp(self, ffn: int) -> int:
        return self.hidden * ffn * (3 if self.gated else 2)

    @property
    def _attention(self) -> int:
        return self.hidden * ((3 if self.output_gate else 2) * self.query_width + 2 * self.kv_width)

    @cached_property
    def _beside(self) -> int:
        """Of all that stands beside self-attention and MLP."""
        cross = 2 * self.hidden * self.query_width + 2 * self.cross_attention * self.kv_width
        modulation = {"none": 0, "single": 6 * self.hidden, "block": 6 * self.hidden**2}[self.adaln]
        norms = (3 if self.cross_attention else 2) * self.hidden
        return (cross if self.cross_attention else 0) + modulation + norms


@dataclass(frozen=True)
class ModuleShape:
    """One modality module: ``layers`` equal layers between a stem (on its first chunk) and a head (on its last).

    ``input`` is what of a microbatch it reads: ``text`` (a language model: packed sequences, or the prompts of the
    clips), ``clips`` (a DiT), or the name of a kind of instances (an encoder, one instance each): ``images``,
    ``audios``, or any other. ``upstream`` names the modules whose outputs it waits for. ``trainable`` lists the parts
    that have weight gradients; ``trained_share`` says of how many of the parameters of stem, layers and head, where
    they do (adapters: few). ``taps`` are layers, counted from 0, whose outputs also go, each through a projector like
    the head's, to the next module: that of the i-th is added behind its layer i (Qwen3-VL's deepstack).
    ``mtp`` depths of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) go with the head: each a
    linear from two hidden states to one, a layer like the last, and the head once more. ``carried`` tensors as large as
    hidden states go from rank to rank: two where embeddings travel with them to such a head. ``tensor_parallel`` says
    what tensor-parallel ranks do: each holds a part of every matrix (``split``, Megatron's modules); or each holds the
    whole module, as of Hugging Face's, and either has a share of every unit's instances (``shared``, encoders only; so
    DIP runs them in segments, but mixed chunks as Megatron does) or runs all of them (``whole``). ``context_parallel``
    says the same of the ranks that ``cp`` counts, for an encoder.
    """

    name: str
    input: str
    layers: int
    layer: TransformerLayer
    stem: Stem = field(default_factory=Nothing)
    head: Head = field(default_factory=Nothing)
    upstream: tuple[str, ...] = ()
    trainable: tuple[TrainablePart, ...] = EVERY_PART
    trained_share: tuple[float, float, float] = (1.0, 1.0, 1.0)
    taps: tuple[int, ...] = ()
    mtp: int = 0
    carried: int = 1
    tensor_parallel: TensorParallel = "split"
    context_parallel: ContextParallel = "whole"

    def __post_init__(self) -> None:
        positive(f"modules.{self.name}", layers=self.layers)
        if self.taps and not isinstance(self.head, Projector):
            raise ModelError(f"modules.{self.name}.taps: each has a projector like the head's; set head")
        if any(not 0 <= layer < self.layers for layer in self.taps):
            raise ModelError(f"modules.{self.name}.taps: {self.taps}, the layers are 0 to {self.layers - 1}")
        if self.mtp and not isinstance(self.head, LanguageHead):
            raise ModelError(f"modules.{self.name}.mtp: multi-token prediction needs a language_head")
        unknown = set(self.trainable) - set(EVERY_PART)
        if unknown:
            raise ModelError(
                f"modules.{self.name}.trainable: unknown {sorted(unknown)}; known: {', '.join(EVERY_PART)}"
            )
        if self.input == "clips" and not isinstance(self.stem, LatentEmbedding):
            raise ModelError(f"modules.{self.name}.stem: a module of clips needs a latent_embedding")
        if isinstance(self.stem, TokenEmbedding) and self.input != "text":
            raise ModelError(f"modules.{self.name}.input: a token_embedding reads text, not {self.input}")
        if isinstance(self.head, LanguageHead | LatentHead) and self.encodes:
            raise ModelError(
                f"modules.{self.name}.head: an encoder's ({self.input}) head is a projector or none, not a loss; "
                "a language model's input is text"
            )
        for name in ("tensor_parallel", "context_parallel"):
            if getattr(self, name) == "shared" and not self.encodes:
                raise ModelError(
                    f"modules.{self.name}.{name}: only an encoder's instances can be shared out, not {self.input}; "
                    "leave it out"
                )

    @property
    def encodes(self) -> bool:
        """Whether it reads instances of a kind, neither text nor clips."""
        return self.input not in ("text", "clips")

    @property
    def sharded(self) -> bool:
        """Whether context-parallel ranks have a share each of its sequences: so where the loss is."""
        return isinstance(self.head, LanguageHead | LatentHead)

    def sharing(self, parallel: Parallel) -> int:
        """Over how many ranks of a stage the instances of each of its units are shared out."""
        tensor = parallel.tp if self.tensor_parallel == "shared" else 1
        return tensor * (parallel.cp if self.context_parallel == "shared" else 1)

    def share(self, part: TrainablePart) -> float:
        """Of the part's parameters, those that train; 0 for a frozen part."""
        return self.trained_share[EVERY_PART.index(part)] if part in self.trainable else 0.0

    @property
    def reduction(self) -> int:
        """Own tokens per token that the next module sees."""
        return self.head.reduction if isinstance(self.head, Projector) else 1

    @property
    def output_width(self) -> int:
        """Width of what the next module gets."""
        return self.head.output if isinstance(self.head, Projector) else self.layer.hidden

    @property
    def parameters(self) -> int:
        hidden = self.layer.hidden
        layers = sum(map(sum, (self.layer_parameters(i) for i in range(self.layers))))
        taps = len(self.taps) * self.head.parameters(hidden)
        return self.stem.parameters(hidden) + layers + taps + sum(self.head_parameters)

    def tapped(self, first: int, layers: int) -> int:
        """How many taps the ``layers`` layers from number ``first`` have."""
        return sum(first <= layer < first + layers for layer in self.taps)

    @property
    def head_parameters(self) -> tuple[int, int]:
        """Parameters of what stands behind the last layer, without the copy of the stem that multi-token prediction
        needs there; and of experts there."""
        hidden = self.layer.hidden
        own, experts = self.layer_parameters(self.layers - 1)
        return self.head.parameters(hidden) + self.mtp * (own + 2 * hidden**2), self.mtp * experts

    def layer_parameters(self, layer: int) -> tuple[int, int]:
        """Parameters of layer number ``layer`` (from 0), and of its experts."""
        kind = self.kind(layer)
        return self.layer.parameters_of(kind), self.layer.expert_parameters if kind.experts else 0

    def kind(self, layer: int) -> LayerKind:
        """What layer number ``layer`` (from 0) is."""
        experts = self.layer.experts
        return LayerKind(self.full_attention(layer), experts is not None and experts.in_layer(layer))

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What each layer is."""
        return tuple(map(self.kind, range(self.layers)))

    def full_attention(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0) attends to its whole sequence, not to a window or linearly."""
        every = self.layer.full_attention_every
        other = self.layer.window > 0 or self.layer.linear_attention is not None
        return not other or (every > 0 and (layer + 1) % every == 0)


@dataclass(frozen=True)
class Packing:
    """How samples become microbatches. VLMs: up to ``max_tokens`` tokens and ``max_images`` images, an image of default
    size being ``image_tokens`` tokens of the language model. Text to video: up to ``max_clips`` clips of ``fps`` frames
    a second, less than ``max_seconds`` in all (section 5 of the paper; MovieGen)."""

    max_tokens: int = 8192
    max_images: int = 48
    image_tokens: int = 169
    max_clips: int = 8
    max_seconds: float = 16.0
    fps: int = 16


@dataclass(frozen=True)
class MultimodalModel:
    """A graph of modality modules, upstream modules first, with the parallel sizes it is trained at."""

    name: str
    modules: tuple[ModuleShape, ...]
    parallel: Parallel = field(default_factory=Parallel)
    packing: Packing = field(default_factory=Packing)

    def __post_init__(self) -> None:
        if not self.modules:
            raise ModelError("modules: a model needs at least one")
        pieces = sum(m.layers + 2 for m in self.modules)  # each has a stem and a head
        if self.parallel.pp > pieces:
            raise ModelError(f"parallel.pp: {self.parallel.pp} stages, but only {pieces} pieces to spread over them")
        known: set[str] = set()
        for m in self.modules:
            place = f"modules.{m.name}"
            if m.name in known:
                raise ModelError(f"{place}: two modules share the name")
            missing = [u for u in m.upstream if u not in known]
            if missing:
                raise ModelError(f"{place}.upstream: {', '.join(missing)} must be a module listed before it")
            known.add(m.name)
            self._check_tensor_parallel(m, place)
            if m.layer.cross_attention:
                widths = [self.module(u).output_width for u in m.upstream]
                if widths and m.layer.cross_attention not in widths:
                    raise ModelError(
                        f"{place}.layer.cross_attention: {m.layer.cross_attention}, upstream gives {widths}"
                    )
            elif m.input == "text":
                for u in m.upstream:
                    if self.module(u).output_width != m.layer.hidden:
                        raise ModelError(
                            f"{place}.upstream: {u} gives width {self.module(u).output_width}, "
                            f"hidden is {m.layer.hidden}; set {u}'s projector"
                        )

    def _check_tensor_parallel(self, m: ModuleShape, place: str) -> None:
        tp = self.parallel.tp if m.tensor_parallel == "split" else 1
        for name in ("heads", "ffn", "kv_groups"):
            value = getattr(m.layer, name)
            if value % tp and not (name == "kv_groups" and tp % value == 0):
                raise ModelError(f"{place}.layer.{name}: {value} can't be split over tp {tp}")
        linear = m.layer.linear_attention
        cp = self.parallel.cp  # ranks with a share of each sequence exchange it for some of the heads
        if linear is not None and (linear.key_heads % (tp * cp) or linear.value_heads % (tp * cp)):
            heads = f"{linear.key_heads} and {linear.value_heads} heads"
            both = f"tp {tp}" if cp == 1 else f"tp {tp} and cp {cp}"
            raise ModelError(f"{place}.layer.linear_attention: {heads} can't be split over {both}")
        experts = m.layer.experts
        if experts is not None:
            ep, etp = self.parallel.ep, self.parallel.expert_tp
            for what, value, name, ranks in (("count", experts.count, "ep", ep), ("ffn", experts.ffn, "etp", etp)):
                if value % ranks:
                    raise ModelError(f"{place}.layer.experts.{what}: {value} can't be split over {name} {ranks}")

    @cached_property
    def _by_name(self) -> dict[str, ModuleShape]:
        return {m.name: m for m in self.modules}

    def module(self, name: str) -> ModuleShape:
        """The module of that name. Raises ModelError listing the names there are."""
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelError(f"modules: no {name!r}; there are {', '.join(self._by_name)}") from None

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self.modules)

    def with_parallel(
        self,
        *,
        tp: int | None = None,
        pp: int | None = None,
        dp: int | None = None,
        sequence_parallel: bool | None = None,
        distributed_optimizer: bool | None = None,
        cp: int | None = None,
        ep: int | None = None,
        etp: int | None = None,
    ) -> MultimodalModel:
        """The same model at other parallel sizes (``None``: as they are). Raises ModelError if they don't divide it."""
        given = {
            "tp": tp, "pp": pp, "dp": dp,
            "sequence_parallel": sequence_parallel, "distributed_optimizer": distributed_optimizer,
            "cp": cp, "ep": ep, "etp": etp,
        }  # fmt: skip
        changes = {k: v for k, v in given.items() if v is not None}
        return replace(self, parallel=replace(self.parallel, **changes))  # type: ignore[arg-type]
