"""How much sooner replicas end if samples change microbatches, too, after whole microbatches have. Simulated.

    scripts/bench samples [--draws 10] [--length 8192]

Documents of lognormal lengths are packed into microbatches as they come; with images each brings some for an encoder on
the last of two pipeline ranks. A sample's seconds are linear in its tokens and quadratic for attention; a replica takes
the sum of its busiest rank, as in :mod:`dip_megatron.planner.balance`. Printed: the slowest replica over the mean as
read, after the exchange of whole microbatches and after that of samples, and what the latter gains; means of the draws.
"""

from __future__ import annotations

import argparse

import numpy as np

from dip_megatron.core.graph import Floats
from dip_megatron.planner.balance import Places, Work, assign
from dip_megatron.planner.resample import SampleWork, resample
from dip_megatron.report.schedules import text_table

SIZES = ((4, 2), (16, 2), (16, 3), (16, 4), (16, 16), (64, 4))  # replicas, microbatches of each
MEDIAN, SPREAD = 1000.0, 1.2  # tokens of a document; standard deviation of its logarithm
IMAGES, IMAGE_TOKENS, IMAGE_SECONDS = 1.0, 576, 3.0  # a document, in the mean; of the encoder, over a token's
QUADRATIC = 30_000.0  # tokens of which attention takes as long as all else


def draw_microbatch(random: np.random.Generator, length: int, images: bool) -> tuple[list[int], list[list[float]]]:
    """Tokens ``[samples]`` and seconds ``[samples, 2]`` of one microbatch, until the next document doesn't fit."""
    tokens: list[int] = []
    seconds: list[list[float]] = []
    while True:
        count = int(np.clip(random.lognormal(np.log(MEDIAN), SPREAD), 32, length))
        if sum(tokens) + count > length:
            return tokens, seconds
        encoder = IMAGE_SECONDS * IMAGE_TOKENS * random.poisson(IMAGES) if images else 0.0
        language = count * (1.0 + count / QUADRATIC)
        tokens.append(count)
        seconds.append([language, language + encoder])


def spreads(seed: int, replicas: int, each: int, length: int, images: bool) -> tuple[float, float, float]:
    """The slowest replica over the mean: as read, after whole microbatches have moved, after samples have."""
    random = np.random.default_rng(seed)
    drawn = [draw_microbatch(random, length, images) for _ in range(replicas * each)]
    counts = np.array([len(tokens) for tokens, _ in drawn])
    tokens: Places = np.concatenate([np.array(tokens, dtype=np.int64) for tokens, _ in drawn])
    seconds: Floats = np.concatenate([np.array(of) for _, of in drawn])
    microbatch = np.repeat(np.arange(len(drawn)), counts)
    held = np.repeat(tokens[:, None], 2, axis=1).astype(np.float64)
    sums = [np.stack([np.bincount(microbatch, of[:, rank]) for rank in range(2)], axis=1) for of in (seconds, held)]
    work = Work(sums[0], sums[1], np.repeat(np.arange(replicas), each), replicas)
    whole = assign(work, "swap")
    room = length - np.bincount(microbatch, tokens).astype(np.int64)
    again = resample(SampleWork(seconds, held, tokens, microbatch, counts[microbatch] < 2, room), work, whole.replica)
    mean = float(again.after.mean())
    return float(whole.before.max()) / mean, float(whole.after.max()) / mean, float(again.after.max()) / mean


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a microbatch, at most")
    options = parser.parse_args()
    rows = []
    for images in (False, True):
        for replicas, each in SIZES:
            found = [spreads(seed, replicas, each, options.length, images) for seed in range(options.draws)]
            before, whole, samples = np.mean(found, axis=0)
            kind = "documents with images" if images else "documents"
            rows.append([kind, str(replicas), str(each), f"{before:.3f}", f"{whole:.3f}", f"{samples:.3f}",
                         f"{whole / samples:.3f}"])  # fmt: skip
    head = ["samples", "replicas", "microbatches", "as read", "microbatches moved", "samples, too", "gain"]
    print(text_table(head, rows))


if __name__ == "__main__":
    main()
