"""Costs of what a script trains, measured with its own microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..describe.cost import Cluster, Costs
from ..describe.workload import Microbatch
from ..families.family import Layers
from ..megatron.device import device_name
from ..megatron.sampling import Reading
from ..runtime.protocol import ModelProgram
from ..testing.synthetic import wrap
from .neighbours import busy_neighbours
from .program import ProgramRun, profile_program

MOST = 5
"""Microbatches that are measured."""


def profile_reading(
    reading: Reading, cluster: Cluster, device: torch.device, *, neighbours: int = 0, repeats: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> Costs:  # fmt: skip
    """Measure the model of a script on some of the microbatches read: those that differ most in what they hold.
    ``neighbours``: how many other cores compute meanwhile. Raises ValueError if nothing was read."""
    sample = reading.sample
    if not reading.inputs:
        raise ValueError(f"no microbatch to measure: {sample.trouble or 'the script read none'}")
    model = sample.model.with_parallel(pp=1, dp=1)

    def build(layers: Layers) -> tuple[ModelProgram, list[torch.nn.Module]]:
        program = reading.program(layers)
        return program, wrap(program.build_chunks(), device)

    run, halved = (ProgramRun(build, model, cluster, reading.forward_step, device, halved=h) for h in (False, True))
    chosen = [reading.inputs[i] for i in spread_out(sample.microbatches)]
    with busy_neighbours(neighbours, lambda: [run.measure(chosen, size) for size in (None, 1)]):
        return profile_program(run, halved, model, chosen, device_name(), repeats=repeats, progress=progress)


def spread_out(microbatches: Sequence[Microbatch], most: int = MOST) -> list[int]:
    """Which microbatches to measure: of different content, from the one that holds least to the one that holds most."""

    def content(microbatch: Microbatch) -> float:
        return sum(map(sum, microbatch.encoded.values())) + sum(c.text_tokens + c.frames for c in microbatch.clips)

    first: dict[float, int] = {}
    for i, microbatch in enumerate(microbatches):
        first.setdefault(content(microbatch), i)
    rising = [first[c] for c in sorted(first)]
    if len(rising) <= most:
        return rising
    return [rising[round(i * (len(rising) - 1) / (most - 1))] for i in range(most)]
