"""Interleaved image-text documents about handwritten digits, packed into sequences of one length.

The images are scikit-learn's copy of the UCI handwritten digits (1797 scans of 8x8 pixels, by 43 writers). A document
holds between none and fourteen of them, heavy-tailed as in web corpora (many documents have no image or one, a few have
very many), each followed by its label and by some sums that begin with its digit::

    <begin> <image> : 7 ; 7 + 5 = 1 2 ; <image> : 5 ; <image> : 0 ; 0 + 8 = 8 ; 0 + 3 = 3 ; <end>

Documents are packed one after the other until the sequence is full and cut there, so that one packed sequence, the
microbatch, holds anything from no image to fourteen. To predict the token after ``:`` a model has to read the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

PAD, BEGIN, END, COLON, PLUS, EQUALS, SEMICOLON = range(7)
FIRST_DIGIT = 10
VOCABULARY = 20
IMAGE = -200  # LLaVAModel's image token: replaced by the image's embeddings, never looked up
PIXELS = 8
# Half the range of a pixel. A ViT's position embeddings start with unit variance: fainter images are seen much later.
CONTRAST = 4.0

# The loss of a label read off an image counts this many times; the weight also marks its place for the accuracy.
LABEL_WEIGHT = 40.0

MOST_IMAGES = 14
_TEXT_ONLY = 0.3  # share of the documents
_SUMS_OF_A_TEXT = (8, 64)
_SUMS_PER_IMAGE = (0.1, 10.0)  # mean of a document


@dataclass(frozen=True, eq=False)
class DigitImages:
    """Scans ``[count, 8, 8]`` (float32 in -4 .. 4) and what they show ``[count]`` (0 .. 9)."""

    pixels: NDArray[np.float32]
    digits: NDArray[np.int64]


def split_images() -> tuple[DigitImages, DigitImages, DigitImages]:
    """Disjoint images to train on, to validate with and to test with (80%, 10%, 10%), always the same ones."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    scaled = (CONTRAST * (pixels[order].reshape(-1, PIXELS, PIXELS) / 8.0 - 1.0)).astype(np.float32)
    labels = digits[order].astype(np.int64)
    first, second = int(0.8 * len(labels)), int(0.9 * len(labels))
    parts = slice(0, first), slice(first, second), slice(second, None)
    train, valid, test = (DigitImages(scaled[part], labels[part]) for part in parts)
    return train, valid, test


def number_tokens(number: int) -> list[int]:
    """The number's figures."""
    return [FIRST_DIGIT + int(figure) for figure in str(number)]


def sum_tokens(a: int, b: int) -> list[int]:
    """``a + b = c ;``"""
    return [*number_tokens(a), PLUS, *number_tokens(b), EQUALS, *number_tokens(a + b), SEMICOLON]


class PackedDigitDocuments(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """``size`` packed sequences; item ``index`` depends on ``seed``, ``split`` and ``index`` alone.

    An item holds ``tokens``, ``labels``, ``position_ids`` (int64 ``[text]``), ``loss_mask`` (float32 ``[text]``) and
    ``images`` (float32 ``[images, 3, side, side]``). An image has one token in the text and ``image_tokens`` embeddings
    in the language model, where the item takes ``sequence_length`` positions.
    """

    def __init__(
        self,
        images: DigitImages,
        split: Split,
        size: int,
        *,
        sequence_length: int,
        image_tokens: int,
        side: int,
        seed: int,
    ) -> None:
        if side % PIXELS:
            raise ValueError(f"image side {side}: must be a multiple of {PIXELS}, the side of the scans")
        if sequence_length < image_tokens + 4:
            raise ValueError(
                f"sequence length {sequence_length}: must hold an image of {image_tokens} tokens and its label"
            )
        self.split = split  # read by Megatron's data loader
        self._images, self._size, self._seed = images, size, seed
        self._sequence_length, self._image_tokens, self._scale = sequence_length, image_tokens, side // PIXELS

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, chosen = self._pack(np.random.default_rng((self._seed, self.split.value, index)))
        ids = torch.tensor(tokens, dtype=torch.int64)
        labels = torch.cat([ids[1:], torch.tensor([PAD])])
        mask = torch.ones(len(tokens))
        mask[(labels == PAD) | (labels == IMAGE) | (ids == IMAGE)] = 0.0
        mask[ids == COLON] = LABEL_WEIGHT
        if tokens[-1] == COLON:
            mask[-1] = 0.0
        pixels = self._images.pixels[np.array(chosen, dtype=np.int64)]
        enlarged = np.kron(pixels, np.ones((1, self._scale, self._scale), dtype=np.float32))
        return {
            "tokens": ids,
            "labels": labels,
            "position_ids": torch.arange(len(tokens)),
            "loss_mask": mask,
            "images": torch.from_numpy(enlarged).unsqueeze(1).repeat(1, 3, 1, 1),
        }

    def _pack(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """Tokens of one sequence, and the images it shows in their order."""
        tokens: list[int] = []
        chosen: list[int] = []
        free = self._sequence_length
        while free > 0:
            document, shown = self._document(random)
            for token in document:
                width = self._image_tokens if token == IMAGE else 1
                if width > free or (token == IMAGE and len(chosen) == MOST_IMAGES):
                    break
                tokens.append(token)
                free -= width
                if token == IMAGE:
                    chosen.append(shown.pop(0))
            else:
                continue
            break
        return tokens + [PAD] * free, chosen

    def _document(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """Tokens of one document, and the images it shows in their order."""
        tokens, shown = [BEGIN], []
        if random.random() < _TEXT_ONLY:
            for _ in range(_spread(random, *_SUMS_OF_A_TEXT)):
                tokens += sum_tokens(*random.integers(0, 10, 2).tolist())
            return [*tokens, END], []
        sums_per_image = float(np.exp(random.uniform(*np.log(_SUMS_PER_IMAGE))))
        for _ in range(_spread(random, 1, MOST_IMAGES + 1)):
            shown.append(int(random.integers(len(self._images.digits))))
            digit = int(self._images.digits[shown[-1]])
            tokens += [IMAGE, COLON, FIRST_DIGIT + digit, SEMICOLON]
            for _ in range(random.poisson(sums_per_image)):
                tokens += sum_tokens(digit, int(random.integers(0, 10)))
        return [*tokens, END], shown


def _spread(random: np.random.Generator, low: int, high: int) -> int:
    """An integer in ``low`` .. ``high - 1``, uniform in its logarithm: small ones are common, large ones happen."""
    return int(np.exp(random.uniform(np.log(low), np.log(high))))
