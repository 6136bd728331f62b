"""From noise to clips: Euler steps along the learned flow, and a picture of what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .digits import BLOCK, CANVASES, CHANNELS, DIGITS, FRAMES, caption, to_frames, tokens


@torch.no_grad()
def sample(
    model: torch.nn.Module, captions: Sequence[list[str]], sizes: Sequence[tuple[int, int, int]], *,
    steps: int = 25, guidance: float = 2.0, seed: int = 0,
) -> list[NDArray[np.float32]]:  # fmt: skip
    """Clips of these ``captions`` and ``sizes`` (frames, height, width in pixels), values about -1 .. 1.

    ``model`` is a whole TextToVideoModel. ``guidance`` goes that many times as far from the velocity without caption as
    the one with it does (arXiv 2207.12598).
    """
    draw = torch.Generator().manual_seed(seed)
    shapes = [(CHANNELS, *(n // b for n, b in zip(size, BLOCK, strict=True))) for size in sizes]
    latents = [torch.randn(shape, generator=draw) for shape in shapes]
    # With caption and without, in one batch.
    prompts = [tokens(words) for words in captions] + [tokens(["nothing"])] * len(latents)
    prompt, lengths = torch.cat(prompts), [len(p) for p in prompts]
    device = next(model.parameters()).device
    latents = [x.to(device) for x in latents]
    for step in range(steps):
        times = torch.full((2 * len(latents),), step / steps, device=device)
        velocities = model(prompt.to(device), lengths, latents * 2, times)
        with_caption, without = velocities[: len(latents)], velocities[len(latents) :]
        latents = [
            x + (free + guidance * (led - free)) / steps
            for x, led, free in zip(latents, with_caption, without, strict=True)
        ]
    return [to_frames(x.cpu()) for x in latents]


def draw_digits(model: torch.nn.Module, path: Path, **options: Any) -> None:
    """Save a picture of one sampled clip of every digit: a column each, its frames from top to bottom."""
    moves = ("right", "down", "left", "up", "still")
    captions = [caption(digit, moves[digit % len(moves)], length=1) for digit in range(10)]
    sizes = [(FRAMES[-1], *CANVASES[words[-1]][0]) for words in captions]
    clips = sample(model, captions, sizes, **options)
    save_grid(clips, [f"{DIGITS[i]}\n{words[-1]}" for i, words in enumerate(captions)], path)


def save_grid(clips: Sequence[NDArray[np.float32]], titles: Sequence[str], path: Path) -> None:
    """Every second frame of each clip below its title, as PNG."""
    from matplotlib.figure import Figure

    rows = max(len(clip[::2]) for clip in clips)
    figure = Figure(figsize=(0.8 * len(clips), 0.8 * rows + 0.5), dpi=100)
    axes = figure.subplots(rows, len(clips), squeeze=False)
    for column, (clip, title) in enumerate(zip(clips, titles, strict=True)):
        axes[0, column].set_title(title, fontsize=8)
        for row in range(rows):
            axis = axes[row, column]
            axis.set_axis_off()
            if row < len(clip[::2]):
                axis.imshow(clip[2 * row], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99 - 0.45 / (0.8 * rows + 0.5), 0.08, 0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
