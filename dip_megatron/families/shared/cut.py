"""An encoder cut between its layers: its own class and code, of which each chunk holds some layers.

The encoder's ``forward`` runs on every chunk as it is: what it works out of positions, grids and bounds of sequences is
made anew there. Its list of layers keeps its length, so that layers keep their numbers; in the place of a layer of
another chunk stands one without parameters. Hidden states enter at the chunk's first layer, whatever came before it in
``forward``, and leave at the first layer that is no longer the chunk's, where ``forward`` is left. So nothing need be
known of the code around the layers but the names of the parameters in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from ...runtime.layer_context import LayerContext
from . import block_memory

Module = TypeVar("Module", bound=torch.nn.Module)
Payload = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CutPoints:
    """Names within a model of one encoder, dotted.

    ``layers`` is the encoder's list of transformer layers. ``stem`` are modules before them: on chunks after the first,
    they hand on their first argument, or do as the module that ``stubs`` makes of them; a parameter among them is zeros
    there. ``unused`` are methods whose
    result is added before the layers, and which would need parameters of the stem: on those chunks they give 0.
    ``tail`` are modules after the layers, which only the last chunk has. ``taps`` is a list of modules of which the
    i-th makes something of the output of layer ``tapped[i]``, beside what the encoder returns; it travels under the
    name ``tap_name(i)``. ``halves`` are the names of a layer's attention and MLP, by which memory strategies recompute
    them ("": it is no module of its own). ``returns_tuple``: layers return hidden states as the only one of a tuple.
    """

    layers: str
    stem: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    taps: str = ""
    tapped: tuple[int, ...] = ()
    halves: tuple[str, str] = ("attn", "mlp")
    stubs: Mapping[str, Callable[[torch.nn.Module], torch.nn.Module]] = field(default_factory=dict)
    returns_tuple: bool = False


def tap_name(index: int) -> str:
    """The payload's name of what a tap gives."""
    return f"tap{index}"


class Left(Exception):
    """Hidden states leave the encoder before its end."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


@dataclass
class _Call:
    """What one run of a chunk was given, and what its taps made."""

    given: Payload = field(default_factory=dict)
    made: Payload = field(default_factory=dict)


class Absent(torch.nn.Module):
    """In the place of a module of another chunk: it hands on its first argument."""

    def forward(self, first: Any, *_: Any, **__: Any) -> Any:
        return first

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing to save, as Megatron asks its modules."""
        return {}


class _Elsewhere(Absent):
    """In the place of a layer of another chunk; ``leaves`` where the chunk's layers end."""

    def __init__(self, number: int, leaves: bool, result: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.layer_number = number + 1  # as Megatron's layers know theirs
        self._leaves, self._result = leaves, result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._leaves:
            raise Left(hidden)
        return self._result(hidden)


class _ArrivedTap(Absent):
    """In the place of a tap of an earlier chunk: it gives what that made."""

    def __init__(self, index: int, chunk: CutEncoder):
        super().__init__()
        self._index, self._of = index, [chunk]  # a list, so that it isn't taken for a submodule

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._of[0].call.given[tap_name(self._index)]


class CutEncoder:
    """One chunk's part of an encoder: ``model`` is of the class of ``whole``, with the modules that are the chunk's."""

    def __init__(self, whole: torch.nn.Module, points: CutPoints, first: int, count: int, *, begins: bool, ends: bool):
        """The ``count`` layers from number ``first``; ``begins`` and ``ends``: with what comes before and after all
        layers. Raises ValueError if the model isn't as ``points`` say."""
        self.points, self.begins, self.ends, self.count = points, begins, ends, count
        self.call = _Call()
        layers = found(whole, points.layers)
        depth, end = len(layers), first + count
        result = _result_of(layers, points)
        kept = [
            layer if first <= n < end else _Elsewhere(n, n == end, result) for n, layer in enumerate(layers)
        ]  # fmt: skip
        if end == depth and not ends:
            kept.append(_Elsewhere(depth, True, result))
        self.own: list[torch.nn.Module] = kept[first:end]
        self.model = with_module(whole, points.layers, torch.nn.ModuleList(kept))
        for name in () if begins else points.stem:
            if isinstance(found(whole, name), torch.nn.Parameter):
                self.model = without_parameter(self.model, name)
                continue
            stub = points.stubs.get(name)
            self.model = with_module(self.model, name, Absent() if stub is None else stub(found(whole, name)))
        for name in () if ends else points.tail:
            self.model = with_module(self.model, name, Absent())
        if not begins:
            for name in points.unused:
                owner, _, method = name.rpartition(".")
                own = shared_copy(found(self.model, owner))
                setattr(own, method, _nothing)
                self.model = with_module(self.model, owner, own)
            # A hook, because it comes to the layer before anything else does.
            kept[min(first, len(kept) - 1)].register_forward_pre_hook(self._enter, with_kwargs=True)
        if points.taps:
            self._tap(whole, first, end)

    @property
    def passes(self) -> bool:
        """Whether it has nothing to do: no layers, and nothing before or after them."""
        return not (self.count or self.begins or self.ends)

    def follow(self, mode: LayerContext) -> None:
        """Let Hugging Face's layers follow the memory strategies of the stage that runs; Megatron's do already."""
        if self.own and not _is_megatrons(self.own[0]):
            block_memory.install(self.own, mode, self.points.halves)

    def run(self, forward: Callable[[], Any], given: Payload) -> tuple[Any, Payload]:
        """What ``forward``, which calls the encoder, returns, and what its taps and those of chunks before it have
        made, of ``given`` and now. On a chunk that isn't the last, hidden states are returned."""
        self.call = call = _Call(given)
        try:
            output = forward()
        except Left as left:
            output = left.hidden
        else:
            if not self.ends:
                raise ValueError(f"the model's forward ends without going through all of its {self.points.layers!r}")
        finally:
            self.call = _Call()
        return output, {name: t for name, t in given.items() if name != "hidden"} | call.made

    def _enter(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = self.call.given["hidden"]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _tap(self, whole: torch.nn.Module, first: int, end: int) -> None:
        taps = list(found(whole, self.points.taps))
        if len(taps) != len(self.points.tapped):
            raise ValueError(
                f"{self.points.taps!r} has {len(taps)} modules, the description taps layers {self.points.tapped}"
            )
        for index, layer in enumerate(self.points.tapped):
            if layer < first:
                taps[index] = _ArrivedTap(index, self)
            elif layer >= end:
                taps[index] = Absent()
            else:
                taps[index].register_forward_hook(self._note(index))
        self.model = with_module(self.model, self.points.taps, torch.nn.ModuleList(taps))

    def _note(self, index: int) -> Callable[..., None]:
        def note(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
            self.call.made[tap_name(index)] = output

        return note


def _nothing(*_: Any, **__: Any) -> float:
    return 0.0


def found(root: torch.nn.Module, name: str) -> Any:
    """Submodule ``name``. Raises ValueError naming what there is instead."""
    reached: Any = root
    for part in name.split(".") if name else ():
        if not hasattr(reached, part):
            there = ", ".join(n for n, _ in reached.named_children())
            raise ValueError(f"{type(root).__name__} has no {name!r}; its {type(reached).__name__} has {there}")
        reached = getattr(reached, part)
    return reached


def _is_megatrons(layer: torch.nn.Module) -> bool:
    return isinstance(layer, TransformerLayer)


def _result_of(layers: Sequence[torch.nn.Module], points: CutPoints) -> Callable[[torch.Tensor], Any]:
    """How these layers return hidden states: Megatron's with a context beside them."""
    if points.returns_tuple:
        return lambda hidden: (hidden,)
    if layers and _is_megatrons(layers[0]):
        return lambda hidden: (hidden, None)
    return lambda hidden: hidden


def shared_copy(module: Module) -> Module:
    """Another module of the same class with the same submodules and parameters, in containers of its own."""
    made: Any = module.__class__.__new__(module.__class__)
    made.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) and name.startswith("_") else value
        for name, value in module.__dict__.items()
    }
    return made  # type: ignore[no-any-return]


def with_module(root: Module, name: str, module: torch.nn.Module) -> Module:
    """A copy of ``root`` that has ``module`` in place of its submodule ``name``, and shares all others."""
    first, _, rest = name.partition(".")
    own = found(root, first)
    made = shared_copy(root)
    made._modules[first] = with_module(own, rest, module) if rest else module
    return made


def without_parameter(root: Module, name: str) -> Module:
    """A copy of ``root`` that has zeros in place of its parameter ``name``, and shares all else."""
    owner, _, last = name.rpartition(".")
    own = shared_copy(found(root, owner))
    zeros = torch.zeros_like(own._parameters.pop(last), requires_grad=False)
    own.register_buffer(last, zeros, persistent=False)
    return with_module(root, owner, own) if owner else own  # type: ignore[no-any-return]


def check_all_cut(whole: torch.nn.Module, points: CutPoints) -> None:
    """Raises ValueError for a name of ``points`` that ``whole`` doesn't have, and for a parameter of it that would
    stand on every chunk: it comes before or after the layers, and ``points`` don't say so."""
    placed = (points.layers, *points.stem, *points.tail, *((points.taps,) if points.taps else ()))
    for place in placed:
        found(whole, place)
    for name, _ in whole.named_parameters():
        if not any(f"{name}.".startswith(f"{place}.") for place in placed):
            raise ValueError(
                f"{type(whole).__name__}: {name} would stand on every chunk; name its module in the stem of "
                f"{points.layers} (what comes before the layers) or its tail (what comes after)"
            )
