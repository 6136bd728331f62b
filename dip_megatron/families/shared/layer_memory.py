"""Memory strategies of single layers, chosen anew for every stage: recompute through Megatron's own checkpointing, and
offload.

Each transformer layer of a chunk gets a ``forward`` that looks up its strategy in the stage's mode; the functions
``run_...`` are what :mod:`dip_megatron.core.strategies` names. ``full`` is what
``--recompute-granularity full`` does to a layer. ``selective`` sets, for the call, the layer's own flag that
``--recompute-modules core_attn`` sets for good. ``mlp`` doesn't use Megatron's flag for it: that returns the MLP's bias
from inside the checkpoint, which makes the parameter itself a result of the checkpoint, and a later backward through it
never ends (megatron-core 0.16 and 0.19). ``activation`` does to a dense MLP what ``--recompute-modules moe_act`` does
to experts, with the same Megatron class, and to experts just that: their tokens aren't exchanged again. ``mlp`` of a
MoE layer is ``--recompute-modules moe``, router and exchange included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from ...compat import transformer_engine
from ...compat.experts import BaseMoELayer, activations_recomputed, expert_mlps
from ...compat.layer_specs import MultiTokenPrediction
from ...compat.recompute import CORE_ATTENTION, CheckpointWithoutOutput
from ...core.strategies import strategy
from ...runtime.deferred import AtOnce
from ...runtime.layer_context import LayerContext
from ...runtime.offload import OffloadedActivations
from .deferred_te import OperationStore


def transformer_layers(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """The chunk's transformer layers, in the order in which a strategy names them. Not those of multi-token prediction,
    which go with the head and keep all their activations."""
    with_head = {id(part) for m in chunk.modules() if isinstance(m, MultiTokenPrediction) for part in m.modules()}
    return [m for m in chunk.modules() if isinstance(m, TransformerLayer) and id(m) not in with_head]


def install(chunk: torch.nn.Module, mode: LayerContext) -> None:
    """Let the layers of a chunk follow ``mode.strategies``. Call it once, before the chunk is wrapped."""
    for index, layer in enumerate(transformer_layers(chunk)):
        layer.forward = _switched(layer, index, mode)


WRITES_QUERY = "dip_writes_query"
"""An attribute of attentions whose core overwrites the queries it is given: a second run would get them changed."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One forward of a layer under a memory strategy: what a strategy's ``run`` works with. ``forward(*args,
    **kwargs)`` is Megatron's; ``index`` is the layer's in its chunk; ``mlp`` runs the layer's MLP as its ``recomputed``
    says, ``attentions`` are its attentions whose core can be recomputed alone, cross attention included."""

    layer: torch.nn.Module
    index: int
    mode: LayerContext
    mlp: SwitchedMLP | SwitchedExperts
    attentions: tuple[Any, ...]
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """The layer as Megatron runs it."""
        return self.forward(*self.args, **self.kwargs)


def _switched(layer: torch.nn.Module, index: int, mode: LayerContext) -> Callable[..., Any]:
    megatrons = layer.forward
    experts = isinstance(layer.mlp, BaseMoELayer)
    mlp = SwitchedExperts(layer) if experts else SwitchedMLP(layer.config, layer.mlp)
    # A layer without cross attention has a placeholder there.
    attentions = tuple(
        a for a in (layer.self_attention, layer.cross_attention)
        if isinstance(a, Attention) and not getattr(a, WRITES_QUERY, False)
    )  # fmt: skip

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not mode.strategies or not torch.is_grad_enabled():
            return megatrons(*args, **kwargs)
        name = mode.strategies[index]
        if name == "none":
            return megatrons(*args, **kwargs)
        return strategy(name).runner()(LayerCall(layer, index, mode, mlp, attentions, megatrons, args, kwargs))

    return forward


@contextlib.contextmanager
def _set(owners: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Within, an attribute of all ``owners`` has this value."""
    before = [getattr(owner, name) for owner in owners]
    for owner in owners:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, earlier in zip(owners, before, strict=True):
            setattr(owner, name, earlier)


def run_without_attention(call: LayerCall) -> Any:
    """Strategy ``selective``; a layer whose attention has no core (a gated delta net), or one that can't be run twice,
    is recomputed as a whole, so that it holds no more than planned."""
    if not call.attentions:
        return run_checkpointed(call)
    with _set(call.attentions, CORE_ATTENTION, True):
        return call()


def run_without_mlp(call: LayerCall) -> Any:
    """Strategy ``mlp``."""
    with _set([call.mlp], "recomputed", "mlp"):
        return call()


def run_without_activation(call: LayerCall) -> Any:
    """Strategy ``activation``."""
    with _set([call.mlp], "recomputed", "activation"):
        return call()


def run_offloaded(call: LayerCall) -> Any:
    """Strategy ``offload``."""
    return offloaded(call.layer, call.index, call.mode, call.forward, call.args, call.kwargs)


def run_offloaded_without_activation(call: LayerCall) -> Any:
    """Strategy ``offload_and_activation``."""
    with _set([call.mlp], "offloaded", call.mode.offloaded), _set([call.mlp], "recomputed", "activation"):
        return run_offloaded(call)


def run_offloaded_until_weight(call: LayerCall) -> Any:
    """Strategy ``offload_until_weight``."""
    with _inputs_hosted(call):
        return run_offloaded(call)


def run_offloaded_without_activation_until_weight(call: LayerCall) -> Any:
    """Strategy ``offload_and_activation_until_weight``."""
    with _inputs_hosted(call):
        return run_offloaded_without_activation(call)


@contextlib.contextmanager
def _inputs_hosted(call: LayerCall) -> Iterator[None]:
    """Within, linears take note that inputs of their weight gradients are to wait in host memory, where these wait."""
    mode, place = call.mode, call.mode.offloaded
    deferred = mode.weight_gradients
    if deferred is None or place is None:
        yield
        return
    linears = [m for m in call.layer.modules() if isinstance(transformer_engine.store_of(m), OperationStore)]
    stores = [transformer_engine.store_of(m) for m in linears]
    mode.weight_gradients = deferred.hosting(place)
    for linear, store in zip(linears, stores, strict=True):
        transformer_engine.replace_store(linear, store.hosting(place))
    try:
        yield
    finally:
        mode.weight_gradients = deferred
        for linear, store in zip(linears, stores, strict=True):
            transformer_engine.replace_store(linear, store)


def offloaded(
    layer: torch.nn.Module,
    index: int,
    mode: LayerContext,
    forward: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
) -> Any:
    """``forward(*args, **kwargs)`` of a chunk's layer, whose activations are left to the stage's place for them."""
    if mode.offloaded is None:
        raise RuntimeError("a stage with offloaded layers needs a place for them")
    deferred = mode.weight_gradients
    # What autograd saves through hooks comes back as another object, without the attributes by which Megatron's fused
    # accumulation knows a weight. Our linears keep the parameter itself.
    mode.weight_gradients = AtOnce() if deferred is None else deferred
    try:
        with mode.offloaded.layer(index, _shared(layer, args, kwargs)):
            return forward(*args, **kwargs)
    finally:
        mode.weight_gradients = deferred


class SwitchedMLP:
    """The ``forward`` of an MLP, all of it (``mlp``) or its activation function (``activation``) under a checkpoint, as
    ``recomputed`` says. ``offloaded``: where the layer around it leaves its activations, if it does."""

    def __init__(self, config: Any, mlp: Any):
        self.recomputed: str | None = None
        self.offloaded: OffloadedActivations | None = None
        self._config = config
        self._mlp = mlp
        self._megatrons = mlp.forward
        mlp.forward = self.forward

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.recomputed is None or not hidden_states.requires_grad:
            return self._megatrons(hidden_states, *args, **kwargs)
        # Fused MLPs have no activation function of their own: those are recomputed as a whole. So are experts with a
        # bias, which Megatron adds, weighted, behind the second linear.
        plain = type(self._mlp).forward is MLP.forward and not (args and self._config.add_bias_linear)
        if self.recomputed == "activation" and plain:
            return self._without_activation(hidden_states, args, kwargs)
        return _checkpoint(self._config, partial(self._whole, kwargs), False, hidden_states, *args)

    def _whole(self, kwargs: dict[str, Any], *args: Any) -> Any:
        output = self._megatrons(*args, **kwargs)
        if not isinstance(output, tuple):
            return output
        # The bias to be added later must leave the checkpoint as a tensor of its own.
        return tuple(t.clone() if isinstance(t, torch.nn.Parameter) else t for t in output)

    def _without_activation(
        self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron's MLP, whose second linear's input is dropped and made again when the backward comes to it. ``args``
        are an expert's probabilities of its tokens, which take a gradient too."""
        intermediate, bias = self._mlp.linear_fc1(hidden_states)
        checkpoint = CheckpointWithoutOutput(fp8=self._config.fp8 or None)
        activated = checkpoint.checkpoint(partial(self._activate, kwargs), intermediate, bias, *args)
        if self.offloaded is not None:
            self.offloaded.keep(activated)
        output, output_bias = self._mlp.linear_fc2(activated)
        checkpoint.discard_output_and_register_recompute(output)
        if self.offloaded is not None:
            self.offloaded.release(intermediate)
        return output, output_bias

    def _activate(
        self, kwargs: dict[str, Any], intermediate: torch.Tensor, bias: torch.Tensor | None, *args: Any
    ) -> torch.Tensor:
        """What Megatron's MLP does between its linears: its own forward, while these pass on what they are given."""
        given = _forward_of(self._mlp.linear_fc1, lambda _: (intermediate, bias))
        taken = _forward_of(self._mlp.linear_fc2, lambda activated: (activated, None))
        with given, taken:
            activated: torch.Tensor = self._megatrons(intermediate, *args, **kwargs)[0]
        return activated


class SwitchedExperts(SwitchedMLP):
    """The same of a mixture of experts: all of it, or the experts' activation functions."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__(layer.config, layer.mlp)
        self._experts = [SwitchedMLP(expert.config, expert) for expert in expert_mlps(self._mlp)]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.recomputed != "activation" or not hidden_states.requires_grad:
            return super().forward(hidden_states, *args, **kwargs)
        place, recomputed = (
            _set(self._experts, "offloaded", self.offloaded),
            _set(self._experts, "recomputed", "activation"),
        )
        with place, recomputed, activations_recomputed(self._mlp):
            return self._megatrons(hidden_states, *args, **kwargs)


@contextlib.contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, ``module`` computes ``forward``."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _checkpoint(config: Any, run: Callable[..., Any], distribute: bool, *tensors: torch.Tensor) -> Any:
    """Megatron's checkpoint, or Transformer Engine's where Megatron takes that."""
    if config.fp8 or getattr(config, "fp4", None):
        return transformer_engine.checkpoint(
            run, distribute, tensor_parallel.random.get_cuda_rng_tracker,
            parallel_state.get_tensor_model_parallel_group(), *tensors,
        )  # fmt: skip
    return tensor_parallel.checkpoint(run, distribute, *tensors)


def run_checkpointed(call: LayerCall) -> Any:
    """Strategy ``full``: the whole layer under Megatron's checkpoint, as its transformer block does it."""
    layer, forward, args, kwargs = call.layer, call.forward, call.args, call.kwargs
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not hidden.requires_grad:
        # Checkpointing gives gradients only to what follows from an input that needs one.
        return forward(*args, **kwargs)
    places: list[int | str] = ["hidden_states" if "hidden_states" in kwargs else 0]
    places += [i for i, value in enumerate(args) if isinstance(value, torch.Tensor) and i not in places]
    places += [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in places]
    tensors = [args[place] if isinstance(place, int) else kwargs[place] for place in places]
    # The checkpoint holds its function longer than its tensors.
    others = [None if i in places else value for i, value in enumerate(args)]
    other = {name: value for name, value in kwargs.items() if name not in places}

    def run(*tensors: torch.Tensor) -> Any:
        given, named = list(others), dict(other)
        for place, tensor in zip(places, tensors, strict=True):
            if isinstance(place, int):
                given[place] = tensor
            else:
                named[place] = tensor
        return forward(*given, **named)

    return _checkpoint(layer.config, run, layer.config.distribute_saved_activations, *tensors)


def _shared(layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What autograd may save inside a layer without its being the layer's own: weights, masks, position angles."""
    inputs = [value for name, value in kwargs.items() if name != "hidden_states"] + list(args[1:])
    inputs += [part for value in inputs if isinstance(value, tuple) for part in value]
    return [*layer.parameters(), *(t for t in inputs if isinstance(t, torch.Tensor))]
