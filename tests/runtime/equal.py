"""Losses and gradients of one run beside those of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

TOLERANCE = 3e-6
"""Largest difference of a gradient, relative to the largest entry of the same parameter's gradient, in float32."""


def merged(answers: Sequence[tuple[Any, Mapping[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """Losses (of the last rank) and gradients of all ranks, summed where ranks share a parameter."""
    grads: dict[str, Any] = {}
    for _, own in answers:
        for name, grad in own.items():
            grads[name] = grads.get(name, 0) + grad
    return answers[-1][0], grads


def assert_losses_equal(theirs: Sequence[Any], ours: Sequence[Any], key: str = "loss") -> None:
    """As many microbatches, each with the same loss under ``key``."""
    assert len(ours) == len(theirs) > 0
    for our_loss, their_loss in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_loss[key], their_loss[key], rtol=1e-6, atol=1e-6)


def assert_gradients_equal(
    theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], floor: float = 1e-6, where: str = ""
) -> None:
    """The same parameters with the same gradients, but for ``TOLERANCE``; ``floor``: the least that a gradient's
    largest entry counts as. A failure names ``where`` and the parameter."""
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        error = ((ours[name] - grad).abs().max() / grad.abs().max().clamp(min=floor)).item()
        assert error < TOLERANCE, f"{where}{name}: relative error {error:.2e}"
