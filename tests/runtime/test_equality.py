"""Equality with Megatron's own schedules: the first test of everything that runs."""

from __future__ import annotations

import torch

from tests.processes import team
from tests.runtime.dip_case import dip_run
from tests.runtime.llava_case import Case, reference


def merged(answers):
    """Losses (of the last rank that has some) and gradients of all ranks."""
    losses = next(a[0] for a in reversed(answers) if a[0] and (not isinstance(a[0][0], list) or a[0][0]))
    grads = {}
    for _, own in answers:
        grads.update(own)
    return losses, grads


def assert_equal(case: Case, world: int, theirs, ours, tolerance: float = 2e-6):
    their_losses, their_grads = theirs
    our_losses, our_grads = ours
    our_losses = our_losses[-1]
    assert len(their_losses) == len(case.images)
    for a, b in zip(their_losses, our_losses, strict=True):
        torch.testing.assert_close(b["lm loss"], a["lm loss"], rtol=1e-6, atol=1e-6)
    assert set(our_grads) == set(their_grads)
    for name, grad in their_grads.items():
        scale = grad.abs().max().clamp(min=1e-8)
        error = (our_grads[name] - grad).abs().max() / scale
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_two_ranks():
    case = Case((2, 0, 3, 1))
    theirs = merged(team(1).run(reference, case))
    ours = merged(team(2).run(dip_run, case))
    assert_equal(case, 2, theirs, ours)
