"""A memory strategy of another package, which the package knows only where it is registered."""

from __future__ import annotations

from contextlib import contextmanager

from dip_megatron.core.strategies import LayerFacts, LayerStrategy, Price, register, unregister

RAN: list[int] = []


def price(x: LayerFacts) -> Price:
    return x.forward, x.backward + 0.5 * x.forward, 0.5 * x.activation


def run(call):
    from dip_megatron.families.shared.layer_memory import run_checkpointed

    RAN.append(call.index)
    return run_checkpointed(call)


OUTSIDE = LayerStrategy(name="outside", price=price, run="tests.outside_strategy:run", recomputes=True, place=2.5)


@contextmanager
def registered():
    """Within, the package knows of it."""
    register(OUTSIDE)
    try:
        yield OUTSIDE
    finally:
        unregister(OUTSIDE.name)
