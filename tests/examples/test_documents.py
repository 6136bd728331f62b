from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.utils import Split

from examples.llava_digits.documents import (
    COLON,
    FIRST_DIGIT,
    IMAGE,
    LABEL_WEIGHT,
    MOST_IMAGES,
    VOCABULARY,
    PackedDigitDocuments,
    split_images,
)
from tests.drawn import settings

TRAIN, VALID, TEST = split_images()


def documents(split: Split = Split.train, *, length: int = 192, image_tokens: int = 9, seed: int = 1, side: int = 24):
    images = {Split.train: TRAIN, Split.valid: VALID, Split.test: TEST}[split]
    return PackedDigitDocuments(
        images, split, 1000, sequence_length=length, image_tokens=image_tokens, side=side, seed=seed
    )


def test_images_are_split_without_overlap() -> None:
    parts = [Counter(map(bytes, part.pixels)) for part in (TRAIN, VALID, TEST)]
    assert [sum(part.values()) for part in parts] == [1437, 180, 180]
    assert sum((parts[0], parts[1], parts[2]), Counter()) == Counter(map(bytes, np.concatenate(
        [TRAIN.pixels, VALID.pixels, TEST.pixels])))  # fmt: skip
    assert not parts[0].keys() & parts[2].keys()
    assert set(TEST.digits.tolist()) == set(range(10))


@settings(max_examples=50, deadline=None)
@given(index=st.integers(0, 10**6), length=st.integers(20, 400), image_tokens=st.integers(1, 16))
def test_an_item_fills_its_sequence_and_labels_its_images(index: int, length: int, image_tokens: int) -> None:
    data = documents(length=length, image_tokens=image_tokens)
    item = data[index]
    tokens, labels, mask, images = item["tokens"], item["labels"], item["loss_mask"], item["images"]
    count = int((tokens == IMAGE).sum())
    assert images.shape == (count, 3, 24, 24)
    assert count <= MOST_IMAGES
    assert len(tokens) - count + count * image_tokens == length
    assert torch.equal(labels[:-1], tokens[1:])
    assert tokens[tokens != IMAGE].min() >= 0
    assert tokens.max() < VOCABULARY
    # What must be read off an image, and only that, carries the label's weight; nothing is asked of image positions.
    read = mask == LABEL_WEIGHT
    assert torch.all(tokens[read] == COLON)
    assert torch.all((labels[read] >= FIRST_DIGIT) & (labels[read] < FIRST_DIGIT + 10))
    assert int(read.sum()) in (count, count - 1)  # the sequence may end between an image and its label
    assert torch.all(mask[tokens == IMAGE] == 0)
    assert torch.all(mask[labels == IMAGE] == 0)
    again = documents(length=length, image_tokens=image_tokens)[index]
    assert all(torch.equal(item[name], again[name]) for name in item)


def test_labels_say_what_the_images_show() -> None:
    shown = {bytes(pixels): int(digit) for pixels, digit in zip(TRAIN.pixels, TRAIN.digits, strict=True)}
    for index in range(20):
        item = documents()[index]
        labels = item["labels"][item["loss_mask"] == LABEL_WEIGHT] - FIRST_DIGIT
        small = item["images"][:, 0, ::3, ::3].contiguous().numpy()
        assert [shown[bytes(pixels)] for pixels in small[: len(labels)]] == labels.tolist()


def test_the_number_of_images_varies_from_none_to_a_dozen() -> None:
    counts = [documents()[index]["images"].shape[0] for index in range(300)]
    assert min(counts) == 0
    assert max(counts) >= 12
    assert np.std(counts) > 0.5 * np.mean(counts)


def test_items_differ_by_seed_and_split() -> None:
    base = documents()[0]["tokens"].tolist()
    assert documents(seed=2)[0]["tokens"].tolist() != base
    assert documents(Split.valid)[0]["tokens"].tolist() != base


@pytest.mark.parametrize(("keywords", "message"), [({"side": 20}, "multiple of 8"), ({"length": 10}, "must hold")])
def test_impossible_sizes_are_refused(keywords: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents(**keywords)
