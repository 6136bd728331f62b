"""Memory strategies: what each layer of a chunk keeps between its forward and its backward.

A strategy is one entry here, :class:`LayerStrategy`: its name, what kind it is, what it costs and how a layer runs
under it. The cost model, the switches ``recompute`` and ``offload``, the search and the runtime all ask the entry.
:func:`register` adds one from outside the package.

The strategy of a chunk is a name per layer, run-length encoded in the order of the chunk's layers:
``full:2+selective:3+offload:1``. Layers past the end of the text keep everything (``none``), and ``none`` alone means
that of the whole chunk.
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
    """One transformer layer that keeps all its activations, for units of several sizes; arrays ``[U]``.

    ``forward`` and ``backward`` (input gradient) in seconds; ``activation``, what it keeps, and ``layer_input`` in
    bytes. Of its activation function, attention core and MLP: seconds of the forward (``recompute_...``) and bytes that
    recomputing it saves (``saved_by_...``). ``copy`` is the seconds that its activations take to host memory or back,
    ``traffic`` those that the copy's reads and writes take from the layer.
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
"""Seconds of the forward, seconds of the input gradient and bytes kept between them, each ``[U]``."""


@dataclass(frozen=True, kw_only=True)
class LayerStrategy:
    """One way to spend time for memory in a layer.

    ``price`` is what a layer costs under it. ``recomputes``: the switch ``recompute: false`` leaves it out;
    ``offloads``: ``offload: false`` does, and its stages get a place in host memory. ``place`` orders the layers of a
    chunk that mixes strategies, lowest first. ``run`` is the function that runs a layer's forward, as
    ``package.module:function``, so that planning needs not import it; it takes a
    :class:`dip_megatron.families.shared.layer_memory.LayerCall` and returns what the layer's forward returns.
    ``exchanges_again``: the backward of a layer with experts runs the collectives of its forward again.
    ``hosts_weight_inputs``: where its stage's backward is split, what weight gradients need of the forward waits for W
    in host memory, too. ``instead_of``: the entry in whose place this one is offered where W is long enough to hide
    that.
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
        """The function that ``run`` names."""
        return _resolved(self.run)


@lru_cache(maxsize=64)
def _resolved(name: str) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pkgutil.resolve_name(name)
    return function


class StrategyError(ValueError):
    """A text that names no memory strategy, or an entry that can't be one."""


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
    """Copied out behind the layer's forward and back behind its backward: what the copy takes longer is waited for."""
    forward = np.maximum(x.forward, x.copy) + x.traffic
    return forward, np.maximum(x.backward, x.copy) + x.traffic, np.zeros_like(x.activation)


def _offload_without_activation(x: LayerFacts) -> Price:
    """The same with less to copy: the input of the MLP's second linear is dropped and made again."""
    left = np.divide(
        x.activation - x.saved_by_activation, x.activation, where=x.activation > 0, out=np.ones_like(x.copy)
    )
    copy, traffic = left * x.copy, left * x.traffic
    backward = np.maximum(x.backward + x.recompute_activation, copy) + traffic
    return np.maximum(x.forward, copy) + traffic, backward, np.zeros_like(x.activation)


NOT_THE_PAPERS = ("activation",)
"""Names of the entries that the DIP paper's own search doesn't have. What it recomputes and offloads the paper leaves
open (section 2c), so it has the rest: a weaker baseline would flatter ``dip``."""

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
        # Where the link is too slow to copy all of a layer behind it.
        LayerStrategy(
            name="offload_and_activation",
            price=_offload_without_activation,
            run=f"{_RUNNERS}:run_offloaded_without_activation",
            recomputes=True,
            offloads=True,
            place=3.8,
        ),
        # Both with inputs of weight gradients that go to host memory once more, behind the input gradient, until W.
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
    """Add an entry, in every process that plans or trains; the same one again changes nothing. Raises StrategyError if
    another entry has its name, or if a text couldn't spell it."""
    if _known.get(strategy.name, strategy) != strategy:
        raise StrategyError(f"a memory strategy is called {strategy.name!r} already")
    if not re.fullmatch(r"[a-z_]+", strategy.name):
        raise StrategyError(f"memory strategy {strategy.name!r}: a name has lower-case letters and underscores")
    _known[strategy.name] = strategy


def unregister(name: str) -> None:
    """Take out an entry that :func:`register` added."""
    del _known[name]


def known_strategies() -> tuple[LayerStrategy, ...]:
    """All entries: ``none`` first, then in the order in which they were added."""
    return tuple(_known.values())


def strategy_names() -> tuple[str, ...]:
    """Names of :func:`known_strategies`."""
    return tuple(_known)


def allowed_strategies(*, recompute: bool, offload: bool, paper: bool = False) -> tuple[str, ...]:
    """Names of the entries that the switches leave; with ``paper``, of those that the DIP paper's own search has."""
    return tuple(
        s.name
        for s in _known.values()
        if (recompute or not s.recomputes) and (offload or not s.offloads) and not (paper and s.name in NOT_THE_PAPERS)
    )


def exchanging_strategies() -> frozenset[str]:
    """Names of the entries under which a backward runs the collectives of a layer with experts again."""
    return frozenset(s.name for s in _known.values() if s.exchanges_again)


def strategy(name: str) -> LayerStrategy:
    """The entry of a name. Raises StrategyError if there is none."""
    if name not in _known:
        raise StrategyError(f"unknown layer strategy {name!r}; known: {', '.join(_known)}")
    return _known[name]


@lru_cache(maxsize=4096)
def names_in(text: str) -> frozenset[str]:
    """The layer strategies in a chunk's text, ``none`` where it isn't spelled left out."""
    return frozenset(run.partition(":")[0] for run in text.split("+"))


def offloads(names: Iterable[str]) -> bool:
    """Whether any of these strategies needs a place in host memory."""
    return any(strategy(name).offloads for name in names)


_RUN = re.compile(r"([a-z_]+):([1-9]\d*)")


def format_strategy(layers: Iterable[str]) -> str:
    """The text of one strategy per layer; inverse of :func:`parse_strategy`. Raises StrategyError for unknown names."""
    runs = [(strategy(name).name, len(list(group))) for name, group in groupby(layers)]
    if runs and runs[-1][0] == "none":
        runs.pop()
    return "+".join(f"{name}:{count}" for name, count in runs) or "none"


def parse_strategy(text: str, layers: int) -> tuple[str, ...]:
    """One name per layer of a chunk of ``layers`` layers. Raises StrategyError if the text is not canonical or longer
    than the chunk."""
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
