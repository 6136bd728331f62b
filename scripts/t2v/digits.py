"""Short clips of handwritten digits that move, with captions, packed into microbatches.

The digits are scikit-learn's copy of the UCI handwritten digits (scans of 8x8 pixels, by 43 writers). A clip shows one
of them for 4, 6 or 8 frames, standing still or moving a pixel a frame, up and down a tall canvas or to and fro on a
wide one; its caption says what it shows in one to eight words. So clips of a microbatch differ in size, length and
prompt, and microbatches in how many clips they hold.

Latents are pixels in blocks: 2 frames of 2x2 pixels are the 8 channels of one latent. There is no autoencoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from dip_megatron.families.t2v.diffusion import patchify, unpatchify

SIDE = 8
BLOCK = (2, 2, 2)
"""Frames, rows and columns of pixels in a latent."""
CHANNELS = 8
PATCH = (1, 2, 2)
SMALL, WIDE, TALL = (8, 8), (8, 12), (12, 8)
"""Rows and columns of canvases."""
FRAMES = (4, 6, 8)
CLIPS = (2, 16)
"""Fewest and most of a microbatch."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOVES = {"still": (0, 0), "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
CANVASES = {"still": (SMALL, WIDE, TALL), "up": (TALL,), "down": (TALL,), "left": (WIDE,), "right": (WIDE,)}
"""Where there is room for each of the moves."""
WORDS = ("nothing", "a", "handwritten", "digit", "that", "is", "moving", *DIGITS, *MOVES)
VOCABULARY = 32
WITHOUT_CAPTION = 0.1
"""Share of clips trained with the caption ``nothing``, for guidance (arXiv 2207.12598)."""


def caption(digit: int, move: str, length: int = 1) -> list[str]:
    """What a clip shows, in a short (0), middling (1) or long (2) sentence."""
    name = DIGITS[digit]
    return [[name], [name, "moving", move], ["a", "handwritten", "digit", name, "that", "is", "moving", move]][length]


def tokens(words: list[str]) -> torch.Tensor:
    """Words as token ids, int64 ``[words]``."""
    return torch.tensor([WORDS.index(word) for word in words], dtype=torch.int64)


def to_latent(frames: NDArray[np.float32]) -> torch.Tensor:
    """Pixels ``[frames, height, width]`` as a latent ``[channels, frames / 2, height / 2, width / 2]``."""
    pixels = torch.from_numpy(frames).unsqueeze(0)
    grid = [n // b for n, b in zip(frames.shape, BLOCK, strict=True)]
    return patchify(pixels, BLOCK).T.reshape(CHANNELS, *grid).contiguous()


def to_frames(latent: torch.Tensor) -> NDArray[np.float32]:
    """Inverse of :func:`to_latent`."""
    grid = (latent.shape[1], latent.shape[2], latent.shape[3])
    frames: NDArray[np.float32] = unpatchify(latent.flatten(1).T, grid, BLOCK).squeeze(0).numpy()
    return frames


@dataclass(frozen=True, eq=False)
class Scans:
    """Scans ``[count, 8, 8]`` (float32 in -1 .. 1) and what they show ``[count]``."""

    pixels: NDArray[np.float32]
    digits: NDArray[np.int64]


def split_scans() -> tuple[Scans, Scans, Scans]:
    """Disjoint scans to train on, to validate with and to test with (80%, 10%, 10%), always the same ones."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    scaled = (pixels[order].reshape(-1, SIDE, SIDE) / 8.0 - 1.0).astype(np.float32)
    labels = digits[order].astype(np.int64)
    first, second = int(0.8 * len(labels)), int(0.9 * len(labels))
    parts = slice(0, first), slice(first, second), slice(second, None)
    train, valid, test = (Scans(scaled[part], labels[part]) for part in parts)
    return train, valid, test


def moving(scan: NDArray[np.float32], canvas: tuple[int, int], count: int, start: tuple[int, int],
           step: tuple[int, int]) -> NDArray[np.float32]:  # fmt: skip
    """``count`` frames of a scan that starts at ``start`` and moves by ``step`` a frame, turning at the edges."""
    frames = np.full((count, *canvas), -1.0, dtype=np.float32)
    for i in range(count):
        row, column = (
            _bounced(begin + i * by, size - SIDE) for begin, by, size in zip(start, step, canvas, strict=True)
        )
        frames[i, row : row + SIDE, column : column + SIDE] = scan
    return frames


def _bounced(place: int, most: int) -> int:
    place %= max(2 * most, 1)
    return min(place, 2 * most - place)


class PackedClips(torch.utils.data.Dataset[dict[str, object]]):
    """``size`` microbatches of two to sixteen clips; item ``index`` depends on ``seed``, ``split`` and ``index`` alone.

    An item holds the arguments of a TextToVideoModel: ``tokens``, ``prompt_lengths``, ``latents``, ``timesteps`` and
    ``noise``.
    """

    def __init__(self, scans: Scans, split: Split, size: int, *, seed: int) -> None:
        self.split = split  # read by Megatron's data loader
        self._scans, self._size, self._seed = scans, size, seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self._seed, self.split.value, index))
        draw = torch.Generator().manual_seed(int(random.integers(2**62)))
        prompts, latents = [], []
        for _ in range(int(random.integers(*CLIPS, endpoint=True))):
            words, frames = self._clip(random)
            prompts.append(tokens(words))
            latents.append(to_latent(frames))
        # As many timesteps near the middle of the way as in SD3 (arXiv 2403.03206, section 3.1).
        timesteps = torch.sigmoid(torch.randn(len(latents), generator=draw))
        return {
            "tokens": torch.cat(prompts),
            "prompt_lengths": [len(prompt) for prompt in prompts],
            "latents": latents,
            "timesteps": timesteps,
            "noise": [torch.randn(latent.shape, generator=draw) for latent in latents],
        }

    def _clip(self, random: np.random.Generator) -> tuple[list[str], NDArray[np.float32]]:
        which = int(random.integers(len(self._scans.digits)))
        move = list(MOVES)[int(random.integers(len(MOVES)))]
        canvas = CANVASES[move][int(random.integers(len(CANVASES[move])))]
        start = (int(random.integers(canvas[0] - SIDE + 1)), int(random.integers(canvas[1] - SIDE + 1)))
        frames = moving(
            self._scans.pixels[which], canvas, FRAMES[int(random.integers(len(FRAMES)))], start, MOVES[move]
        )
        words = caption(int(self._scans.digits[which]), move, int(random.integers(3)))
        return (["nothing"] if random.random() < WITHOUT_CAPTION else words), frames
