"""Documents of pictures, melodies and words, drawn from a seed.

A picture shows one to three handwritten digits (scikit-learn's scans) side by side, a melody is the spectrogram of one
to four notes; each is followed by the words for what it shows or plays. A document holds any number of both, or
neither: then it only counts.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from .model import PLACEHOLDER, EncoderInput
from .shapes import AUDIO, VISION

SIDE, PATCH = 8, (4, 4)
MELS, FRAMES = 10, 4
NOTES = 5
INPUTS = {VISION: EncoderInput(1, PATCH), AUDIO: EncoderInput(1, (FRAMES, MELS), reduction=2)}
FIRST_NOTE, PERIOD, VOCABULARY = 10, 15, 16
"""Words: ten digits, five notes, and the end of a sentence."""


def split_scans() -> tuple[tuple[NDArray[np.float32], NDArray[np.int64]], ...]:
    """Disjoint scans ``[count, 8, 8]`` (0 .. 1) with their digits, to train on, to validate and to test with."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    scans = (pixels.reshape(-1, SIDE, SIDE) / 16.0).astype(np.float32)
    ends = 0, 1437, 1617, len(scans)
    return tuple((scans[a:b], digits[a:b].astype(np.int64)) for a, b in pairwise(ends))


class Documents(torch.utils.data.Dataset[dict[str, object]]):
    """``size`` documents, each a microbatch; item ``index`` depends on ``seed``, ``split`` and ``index`` alone.

    An item holds the arguments of a ThreeModuleModel, without the dimension of the batch, and the ``mask`` of the
    positions whose next word is asked for.
    """

    def __init__(
        self, scans: tuple[NDArray[np.float32], NDArray[np.int64]], split: Split, size: int, *, seed: int
    ) -> None:
        self.split = split  # read by Megatron's data loader
        self._scans, self._size, self._seed = scans, size, seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, object]:
        random = np.random.default_rng((self._seed, self.split.value, index))
        images: list[torch.Tensor] = []
        clips: list[torch.Tensor] = []
        tokens: list[int] = []
        most = {name: int(random.choice([0, 2, 6])) for name in (VISION, AUDIO)}
        for name in random.permutation([n for n, count in most.items() for _ in range(random.integers(count + 1))]):
            instance, words = self._picture(random) if name == VISION else self._melody(random)
            (images if name == VISION else clips).append(instance)
            tokens += [PLACEHOLDER[name]] * INPUTS[name].tokens(instance) + [*words, PERIOD]
        tokens += [int(n) % 10 for n in np.arange(random.integers(4, 12)) + random.integers(10)]
        following = torch.tensor(tokens[1:])
        return {
            "tokens": torch.tensor(tokens[:-1]),
            "labels": following.clamp(min=0),
            "mask": (following >= 0).float(),
            "images": images,
            "clips": clips,
        }

    def _picture(self, random: np.random.Generator) -> tuple[torch.Tensor, list[int]]:
        pixels, digits = self._scans
        which = random.integers(len(digits), size=random.integers(1, 4))
        return torch.from_numpy(np.concatenate(pixels[which], axis=1)).unsqueeze(0), digits[which].tolist()

    def _melody(self, random: np.random.Generator) -> tuple[torch.Tensor, list[int]]:
        notes = random.integers(NOTES, size=random.integers(1, 5))
        lengths = random.integers(1, 4, size=len(notes)) * INPUTS[AUDIO].reduction * FRAMES
        spectrum = random.normal(0.0, 0.1, size=(int(lengths.sum()), MELS)).astype(np.float32)
        bands = np.repeat(notes, lengths) * (MELS // NOTES)
        spectrum[np.arange(len(bands)), bands] += 1.0
        return torch.from_numpy(spectrum).unsqueeze(0), (FIRST_NOTE + notes).tolist()
