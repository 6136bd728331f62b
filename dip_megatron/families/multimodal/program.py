"""Stages of a model whose encoders are cut at their call, from its :class:`.model_spec.ModelSpec`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...core import ModalityModule, Operation, Unit
from ...describe.workload import Microbatch
from ...runtime.protocol import Inputs, MicrobatchInputs, Tensors
from ..shared.cut import Absent, CutEncoder, check_all_cut, found, tap_name, with_module
from ..shared.layout import segment_config
from ..shared.segmented import SegmentedProgram, bound, dtype_name, unwrapped
from ..shared.shapes import LANGUAGE
from ..shared.sharing import Sharing, UnitShare, sum_over_ranks
from .model_spec import Encoder, ModelSpec, drop
from .shapes import EncoderShapes, MultimodalShapes, layers_until


class MultimodalProgram(SegmentedProgram):
    """One rank's share of the model that ``kwargs`` of its class would build. ``layers`` gives ``{"vision":
    layers[segment][rank], ..., "language": ...}``, ``freeze`` the arguments of the model's ``freeze``."""

    replicates = True

    def __init__(
        self,
        page: ModelSpec,
        kwargs: Mapping[str, Any],
        layers: Mapping[str, tuple[tuple[int, ...], ...]],
        *,
        rank: int,
        micro_batch_size: int = 1,
        freeze: Mapping[str, bool] | None = None,
    ):
        """Raises ValueError for models that can't be segmented."""
        super().__init__(layers, rank)
        self._page, self._kwargs, self._freeze = page, dict(kwargs), dict(freeze or {})
        self._config = config = kwargs[page.config_name]
        page.check(config)
        page.check_layers(config, layers)
        self._encoders = {e.name: e for e in page.encoders}
        for encoder in page.encoders:
            self.check_layers(encoder.name, encoder.layers(config))
        self.check_layers(LANGUAGE, config.num_layers)
        self.modules = (
            *(ModalityModule(name, layers[name], replicated=self.is_whole(name)) for name in self._encoders),
            ModalityModule(LANGUAGE, layers[LANGUAGE], tuple(self._encoders)),
        )
        self._signature = inspect.signature(page.model_class.forward)
        self._cuts: dict[int, CutEncoder] = {}
        self._taps: dict[int, torch.Tensor] = {}
        self._where: torch.Tensor | None = None
        self._samples: tuple[int, ...] = ()
        self.shapes = MultimodalShapes(
            {e.name: self._shapes_of(e) for e in page.encoders},
            language=layers[LANGUAGE],
            language_hidden=config.hidden_size,
            micro_batch_size=micro_batch_size,
            sequence_parallel_size=config.tensor_model_parallel_size if config.sequence_parallel else 1,
            dtype=dtype_name(config),
            context_parallel_size=config.context_parallel_size,
            carried=page.carried(config),
        )

    def _shapes_of(self, encoder: Encoder) -> EncoderShapes:
        name, config = encoder.name, self._config
        return EncoderShapes(
            encoder.kind, self.layers[name], encoder.hidden(config), encoder.points(config).tapped, self.is_whole(name),
            self._sharing(encoder).ranks,
        )  # fmt: skip

    def _sharing(self, encoder: Encoder) -> Sharing:
        config = self._config
        tensor = config.tensor_model_parallel_size if encoder.tensor_parallel(config) == "shared" else 1
        return Sharing(tensor, config.context_parallel_size)

    # -- chunks --------------------------------------------------------------------------------------------------
    def build_chunks(self) -> list[torch.nn.Module]:
        """Chunks of the encoders, then of the language model."""
        language = segment_config(self._config, self.layers[LANGUAGE], self.rank)
        if language.recompute_granularity == "full":
            language.recompute_granularity = None  # plans say what is recomputed; taps come between layers
        chunks: list[Any] = [chunk for encoder in self._encoder_chunks() for chunk in encoder]
        for segment, first, last in self.places(LANGUAGE):
            chunk = self._page.chunk(self._kwargs, language, first=first, last=last, segment=segment)
            self._set_frozen(chunk, [name for name in self._freeze_names(chunk) if "language" in name])
            _stands(chunk, first, last, self._page.tied(self._config))
            if any(e.tapped for e in self.shapes.encoders.values()):
                self._take_taps(chunk)
            if first:
                self._tie(chunks[0], chunk)
            chunks.append(chunk)
        return self.finish(chunks, language)

    def _encoder_chunks(self) -> list[list[torch.nn.Module]]:
        """The encoders are built once, by the model itself; chunks share their parts out."""
        whole = self._page.bare(self._kwargs)
        drop(whole, True, self._page.language)
        self._set_frozen(whole, [name for name in self._freeze_names(whole) if "language" not in name])
        made = []
        for encoder in self._page.encoders:
            alone = whole
            for other in self._page.encoders:
                if other is not encoder:
                    alone = with_module(alone, other.called, Absent())
            points = encoder.points(self._config)
            check_all_cut(alone, points)
            line = []
            for segment, begins, ends in self.places(encoder.name):
                end = self.shapes.encoders[encoder.name].until(segment, self.rank)
                count = self.layers[encoder.name][segment][self.rank]
                cut = CutEncoder(alone, points, end - count, count, begins=begins, ends=ends)
                cut.follow(self.mode)
                chunk: Any = cut.model
                self._cuts[id(chunk)] = cut
                chunk.forward = _RunsEncoder(cut, encoder, self._sharing(encoder), self._config)
                _stands(chunk, True, False, False)
                line.append(chunk)
            made.append(line)
        return made

    def _freeze_names(self, model: Any) -> list[str]:
        """What a model's own freeze can freeze; nothing where loops freeze parameters by themselves."""
        return list(inspect.signature(model.freeze).parameters) if hasattr(model, "freeze") else []

    def _set_frozen(self, model: Any, names: list[str]) -> None:
        every = self._freeze_names(model)
        if every:
            model.freeze(**{name: bool(name in names and self._freeze.get(name)) for name in every})

    def _tie(self, first: Any, language: Any) -> None:
        """Megatron and Bridge look for an embedding that is tied to the head in a rank's first chunk, here of an
        encoder: let it show the language model, and have none."""
        if self._page.language:
            _put(first, self._page.language, found(language, self._page.language))
        _stands(first, True, False, self._page.tied(self._config))
        first.shared_embedding_or_output_weight = language.shared_embedding_or_output_weight

    def _take_taps(self, chunk: Any) -> None:
        for layer in found(chunk, self._page.language).decoder.layers:
            layer.register_forward_hook(self._add_tap(chunk))

    def _add_tap(self, chunk: Any) -> Any:
        def add(layer: Any, _: Any, output: tuple[torch.Tensor, Any]) -> Any:
            tap = self._taps.get(layer.layer_number - 1)
            if tap is None:
                return None
            assert self._where is not None
            return (self._page.add_tap(chunk, output[0], self._where, tap, self._samples), *output[1:])

        return add

    # -- batches -------------------------------------------------------------------------------------------------
    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of the model's forward by name. Raises ValueError for what has no segmented form."""
        arguments = bound(self._signature, args, kwargs, self._page.unsupported)
        arguments |= arguments.pop("kwargs", {})
        self._page.check_call(arguments)
        return self._page.taken(arguments)

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """Instances as the tokens they become, and the lengths of the sequences."""
        arguments = inputs.arguments
        ids = arguments.get("input_ids")
        if ids is None:
            raise ValueError("the loop's forward_step gives the first pipeline rank no tokens")
        samples, row = self._page.laid(arguments)
        rows = 0 if samples == self.shapes.micro_batch_size else samples
        held = {e.kind: tuple(e.tokens(self._config, arguments)) for e in self._page.encoders}
        if self.shapes.context_parallel_size > 1:
            self._page.check_shared(row, self._page.packed(arguments), self.shapes.context_parallel_size)
        text = samples * sum(row) - sum(map(sum, held.values()))
        images, audios = held.pop("images", ()), held.pop("audios", ())
        sequences = row * samples if len(row) == 1 else row
        return Microbatch(text, images, audios, sequences=sequences, others=held, rows=rows)

    # -- stages --------------------------------------------------------------------------------------------------
    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see ModelProgram."""
        if stage.module in self._encoders:
            encoder, arguments = self._encoders[stage.module], microbatch.arguments
            own = slice(unit.first, unit.first + unit.count)
            given = inputs[0] if inputs else {}
            if not inputs and all(arguments.get(name) is None for name in encoder.values):
                raise ValueError(
                    f"pipeline rank {stage.rank} is to encode what the loop's forward_step gives to other ranks only "
                    f"({' or '.join(encoder.values)}); use placement: segmented for {stage.module}"
                )
            output: Tensors = chunk(arguments, own, given)
            return output
        starts = stage.segment == stage.rank == 0
        done = layers_until(self.layers[LANGUAGE], stage.segment, stage.rank)
        hidden, taps = self._run_language(chunk, inputs, microbatch.arguments, starts)
        return {"hidden": hidden} | {tap_name(i): tap for i, tap in taps.items() if i >= done}

    def final(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> Any:
        """What the model's forward returns: loss per token ``[b, s]``, or logits without labels, with whatever the
        class has beside them."""
        return self._run_language(chunk, inputs, arguments, self._model(chunk).pre_process)[0]

    def _model(self, chunk: torch.nn.Module) -> Any:
        return unwrapped(chunk, self._page.model_class)

    def _run_language(
        self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any], starts: bool
    ) -> tuple[Any, dict[int, torch.Tensor]]:
        model = self._model(chunk)
        taps = self._arrived(inputs, arguments, starts)
        given = dict(arguments)
        if starts:
            for name, encoder in self._encoders.items():
                embeddings = inputs.of(name, "hidden")
                given |= encoder.lean(arguments, embeddings is not None)
                if embeddings is not None:
                    entered = encoder.entering(self._config, arguments, embeddings)
                    _put(model, encoder.called, encoder.given(self._config, entered))
        else:
            model.set_input_tensor(inputs[0]["hidden"])
        if taps:
            self._taps, self._samples = taps, self._page.laid(arguments)[1]
            self._where = self._page.places(self._config, arguments)
        try:
            with self._page.calling(model):
                output = chunk(**given)
        finally:
            self._taps, self._where, self._samples = {}, None, ()
            for encoder in self._page.encoders if starts else ():
                _put(model, encoder.called, None)
        found(model, self._page.language).decoder.input_tensor = None  # Megatron's block would hold it
        return (output if model.post_process else self._page.hidden_of(output)), taps

    def _arrived(self, inputs: Inputs, arguments: Mapping[str, Any], starts: bool) -> dict[int, torch.Tensor]:
        arrived: dict[int, torch.Tensor] = {}
        for name, encoder in self.shapes.encoders.items():
            for i in range(len(encoder.tapped)):
                tap = inputs.of(name, tap_name(i)) if starts else inputs[0].get(tap_name(i))
                if tap is not None:
                    order = self._encoders[name].in_order
                    arrived[i] = order(self._config, arguments, tap) if starts else tap
        return arrived


class _RunsEncoder:
    """The ``forward`` of an encoder's chunk."""

    def __init__(self, cut: CutEncoder, encoder: Encoder, sharing: Sharing, config: Any):
        self._cut, self._encoder, self._sharing, self._config = cut, encoder, sharing, config
        self._share: UnitShare | None = None
        self._marked = sharing.tensor == 1
        if cut.ends and sharing.ranks > 1 and encoder.gathers_before:
            found(cut.model, encoder.gathers_before).register_forward_pre_hook(self._gather_instances)

    def __call__(self, arguments: Mapping[str, Any], own: slice, given: Tensors) -> Tensors:
        cut, encoder = self._cut, self._encoder
        if cut.passes:
            return given
        if not self._marked:  # now, when all that trains is there, adapters too
            behind = encoder.gathers_before if cut.ends else ""
            sum_over_ranks(cut.model, found(cut.model, behind) if behind else None)
            self._marked = True
        share = self._share_of(arguments, own)
        own = own if share is None else share.own
        hidden = None
        if not cut.begins:
            hidden = given["hidden"] if share is None else share.arriving(given["hidden"])
            hidden = encoder.arriving(arguments, own, hidden)
            given = given | {"hidden": hidden}
        self._share = share
        try:
            output, taps = cut.run(lambda: encoder.encode(cut.model, arguments, own, hidden), given)
        finally:
            self._share = None
        if share is not None:
            for name in sorted(taps.keys() - given.keys()):  # the same order on all ranks
                taps[name] = share.gathered(taps[name], share.tokens)
        if not cut.ends:
            output = encoder.leaving(arguments, own, output)
            return {"hidden": output if share is None else share.leaving(output)} | taps
        if share is not None and not encoder.gathers_before:
            output = share.gathered(output, share.tokens)
        return {"hidden": output} | taps

    def _share_of(self, arguments: Mapping[str, Any], own: slice) -> UnitShare | None:
        if self._sharing.ranks == 1:
            return None
        tokens, hidden = self._encoder.unit_tokens(self._config, arguments, own), self._encoder.hidden(self._config)
        return UnitShare.of(tokens, own, self._sharing, lambda some: hidden.of(some)[0])

    def _gather_instances(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._share is not None
        return (self._share.gathered(args[0], self._share.instances), *args[1:])


def _stands(chunk: Any, first: bool, last: bool, tied: bool) -> None:
    """What Megatron asks of a model, also of one that wraps those which know."""
    chunk.pre_process, chunk.post_process, chunk.share_embeddings_and_output_weights = first, last, tied


def _put(model: Any, name: str, value: Any) -> None:
    """Let ``name``, dotted, lead to ``value``, as an attribute and not as a submodule."""
    owner, _, last = name.rpartition(".")
    for part in owner.split(".") if owner else ():
        model = getattr(model, part)
    model.__dict__[last] = value
