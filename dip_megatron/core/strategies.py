"""Memory strategies: what each layer of a chunk keeps between its forward and its backward.

Each strategy is one entry here, a :class:`LayerStrategy`, with its name, its kind, its cost and the function that runs
a layer under it. The cost model, the switches ``recompute`` and ``offload``, the search and the runtime all use the
entries. :func:`register` adds one from outside the package.

The strategy of a chunk names one entry per layer, run-length encoded in the order of the chunk's layers:
``full:2+selective:3+offload:1``. Layers past the end of the text keep everything (``none``); ``none`` alone means that
of the whole chunk.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from .graph import Floats


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """Costs of one transformer layer that keeps all its activations, for units of several sizes. Arrays ``[U]``.

    Attributes:
        forward: Seconds of the forward.
        backward: Seconds of the input gradient.
        activation: Bytes kept between forward and backward.
        layer_input: Bytes of the layer's input.
        recompute_activation: Seconds of the activation function's forward.
        recompute_attention: Seconds of the attention core's forward.
        recompute_mlp: Seconds of the MLP's forward.
        saved_by_activation: Bytes saved by recomputing the activation function.
        saved_by_attention: Bytes saved by recomputing the attention core.
        saved_by_mlp: Bytes saved by recomputing the MLP.
        copy: Seconds of copying the activations to host memory, or back.
        traffic: Seconds by which the memory traffic of one copy slows the layer down.
    """

    forward: Floats
    backward: Floats
    activation: Floats
    layer_input: Floats
    recompute_activation: Floats
    recompute_attention: Floats
    recompute_mlp: Floats
    saved_by_activation: Floats
    saved_by_attention: Floats
    saved_by_mlp: Floats
    copy: Floats
    traffic: Floats


Price = tuple[Floats, Floats, Floats]
"""Seconds of the forward, seconds of the input gradient, and bytes kept between them, each ``[U]``."""


@dataclass(frozen=True, kw_only=True)
class LayerStrategy:
    """One way to trade time for memory in a layer.

    Attributes:
        name: Name in texts such as ``full:2``.
        price: The cost of a layer under this strategy.
        run: The function that runs a layer's forward, as ``package.module:function``, so that planning does not have to
            import it. It takes a :class:`dip_megatron.families.shared.layer_memory.LayerCall` and returns what the
            layer's forward returns.
        recomputes: Whether the setting ``recompute: false`` excludes it.
        offloads: Whether the setting ``offload: false`` excludes it, and its nodes need space in host memory.
        exchanges_again: Whether the backward of a layer with experts repeats the collectives of its forward.
        hosts_weight_inputs: Whether, with a split backward, the inputs of weight gradients wait for W in host memory.
        instead_of: Name of the entry that this one replaces where W is long enough to hide that copy.
        place: Order of the layers in a chunk that mixes strategies, lowest first.
    """

    name: str
    price: Callable[[LayerFacts], Price]
    run: str = ""
    recomputes: bool = False
    offloads: bool = False
    exchanges_again: bool = False
    hosts_weight_inputs: bool = False
    instead_of: str = ""
    place: float = 3.5

    def runner(self) -> Callable[[Any], Any]:
        """Resolve ``run``."""
        return _resolved(self.run)


@lru_cache(maxsize=64)
def _resolved(name: str) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pkgutil.resolve_name(name)
    return function


class StrategyError(ValueError):
    """A text that does not name a memory strategy, or an entry that can't be registered."""


def _keep(x: LayerFacts) -> Price:
    return x.forward, x.backward, x.activation


def _recompute_activation(x: LayerFacts) -> Price:
    return x.forward, x.backward + x.recompute_activation, x.activation - x.saved_by_activation


def _recompute_attention(x: LayerFacts) -> Price:
    return x.forward, x.backward + x.recompute_attention, x.activation - x.saved_by_attention


def _recompute_mlp(x: LayerFacts) -> Price:
    return x.forward, x.backward + x.recompute_mlp, x.activation - x.saved_by_mlp


def _recompute_layer(x: LayerFacts) -> Price:
    return x.forward, x.backward + x.forward, np.minimum(x.layer_input, x.activation)


def _offload(x: LayerFacts) -> Price:
    """The copies overlap the layer's forward and backward; the layer waits for the longer of the two."""
    forward = np.maximum(x.forward, x.copy) + x.traffic
    return forward, np.maximum(x.backward, x.copy) + x.traffic, np.zeros_like(x.activation)


def _offload_without_activation(x: LayerFacts) -> Price:
    """Like :func:`_offload` with less to copy: the input of the MLP's second linear is dropped and recomputed."""
    left = np.divide(
        x.activation - x.saved_by_activation, x.activation, where=x.activation > 0, out=np.ones_like(x.copy)
    )
    copy, traffic = left * x.copy, left * x.traffic
    backward = np.maximum(x.backward + x.recompute_activation, copy) + traffic
    return np.maximum(x.forward, copy) + traffic, backward, np.zeros_like(x.activation)


NOT_THE_PAPERS = ("activation",)
"""Names of the entries that ``dip-paper`` leaves out. The paper does not say which parts it recomputes and offloads
(section 2c), so the baseline has all the others: a weaker one would flatter ``dip``."""

_RUNNERS = "dip_megatron.families.shared.layer_memory"
_known: dict[str, LayerStrategy] = {
    strategy.name: strategy
    for strategy in (
        LayerStrategy(name="none", price=_keep, place=5),
        # The MLP's activation function, as Megatron-Core's module moe_act does in experts.
        LayerStrategy(
            name="activation",
            price=_recompute_activation,
            run=f"{_RUNNERS}:run_without_activation",
            recomputes=True,
            place=3,
        ),
        # The attention core: Megatron-Core's module core_attn.
        LayerStrategy(
            name="selective",
            price=_recompute_attention,
            run=f"{_RUNNERS}:run_without_attention",
            recomputes=True,
            place=2,
        ),
        # Megatron-Core's module mlp.
        LayerStrategy(
            name="mlp", price=_recompute_mlp, run=f"{_RUNNERS}:run_without_mlp", recomputes=True,
            exchanges_again=True, place=1,
        ),
        # Megatron-Core's full granularity.
        LayerStrategy(
            name="full", price=_recompute_layer, run=f"{_RUNNERS}:run_checkpointed", recomputes=True,
            exchanges_again=True, place=0,
        ),
        LayerStrategy(name="offload", price=_offload, run=f"{_RUNNERS}:run_offloaded", offloads=True, place=4),
        # For links that are too slow to copy a whole layer while it computes.
        LayerStrategy(
            name="offload_and_activation",
            price=_offload_without_activation,
            run=f"{_RUNNERS}:run_offloaded_without_activation",
            recomputes=True,
            offloads=True,
            place=3.8,
        ),
        # Variants that copy the inputs of weight gradients to host memory again, after the input gradient, until W.
        LayerStrategy(
            name="offload_until_weight", price=_offload, run=f"{_RUNNERS}:run_offloaded_until_weight", offloads=True,
            hosts_weight_inputs=True, instead_of="offload", place=4,
        ),
        LayerStrategy(
            name="offload_and_activation_until_weight",
            price=_offload_without_activation,
            run=f"{_RUNNERS}:run_offloaded_without_activation_until_weight",
            recomputes=True,
            offloads=True,
            hosts_weight_inputs=True,
            instead_of="offload_and_activation",
            place=3.8,
        ),
    )
}  # fmt: skip


def register(strategy: LayerStrategy) -> None:
    """Add an entry, in every process that plans or trains. Adding the same entry again has no effect.

    Raises:
        StrategyError: If another entry has its name, or if the name has other characters than lower-case letters and
            underscores.
    """
    if _known.get(strategy.name, strategy) != strategy:
        raise StrategyError(f"a memory strategy is called {strategy.name!r} already")
    if not re.fullmatch(r"[a-z_]+", strategy.name):
        raise StrategyError(f"memory strategy {strategy.name!r}: a name has lower-case letters and underscores")
    _known[strategy.name] = strategy


def unregister(name: str) -> None:
    """Remove an entry that :func:`register` added."""
    del _known[name]


def known_strategies() -> tuple[LayerStrategy, ...]:
    """All entries: ``none`` first, then in the order of registration."""
    return tuple(_known.values())


def strategy_names() -> tuple[str, ...]:
    """Names of :func:`known_strategies`."""
    return tuple(_known)


def allowed_strategies(*, recompute: bool, offload: bool, paper: bool = False) -> tuple[str, ...]:
    """Names of the entries that the switches ``recompute`` and ``offload`` allow, and, with ``paper``, that the DIP
    paper's search has."""
    return tuple(
        s.name
        for s in _known.values()
        if (recompute or not s.recomputes) and (offload or not s.offloads) and not (paper and s.name in NOT_THE_PAPERS)
    )


def exchanging_strategies() -> frozenset[str]:
    """Names of the entries under which the backward of a layer with experts repeats the collectives of its forward."""
    return frozenset(s.name for s in _known.values() if s.exchanges_again)


def strategy(name: str) -> LayerStrategy:
    """The entry of a name. Raises StrategyError if there is none."""
    if name not in _known:
        raise StrategyError(f"unknown layer strategy {name!r}; known: {', '.join(_known)}")
    return _known[name]


@lru_cache(maxsize=4096)
def names_in(text: str) -> frozenset[str]:
    """The layer strategies that a chunk's text names. A ``none`` that is only implied is not among them."""
    return frozenset(run.partition(":")[0] for run in text.split("+"))


def offloads(names: Iterable[str]) -> bool:
    """Whether any of these strategies needs space in host memory."""
    return any(strategy(name).offloads for name in names)


_RUN = re.compile(r"([a-z_]+):([1-9]\d*)")


def format_strategy(layers: Iterable[str]) -> str:
    """The text for one strategy per layer; the inverse of :func:`parse_strategy`. Raises StrategyError for unknown
    names."""
    runs = [(strategy(name).name, len(list(group))) for name, group in groupby(layers)]
    if runs and runs[-1][0] == "none":
        runs.pop()
    return "+".join(f"{name}:{count}" for name, count in runs) or "none"


def parse_strategy(text: str, layers: int) -> tuple[str, ...]:
    """The strategy of each of a chunk's ``layers`` layers. Raises StrategyError if the text is not canonical, or covers
    more layers than the chunk has."""
    if text == "none":
        return ("none",) * layers
    out: list[str] = []
    for run in text.split("+"):
        match = _RUN.fullmatch(run)
        if match is None or match[1] not in _known:
            raise StrategyError(
                f"not a memory strategy: {text!r} (expected runs such as full:2+selective:3, with {', '.join(_known)})"
            )
        out += [match[1]] * int(match[2])
        if len(out) > layers:
            raise StrategyError(f"memory strategy {text!r} covers {len(out)} layers or more, the chunk has {layers}")
    if format_strategy(out) != text:
        raise StrategyError(f"memory strategy {text!r} must be written {format_strategy(out)!r}")
    return (*out, *("none",) * (layers - len(out)))
