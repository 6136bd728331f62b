"""How the quickstart's model divides its work between the ViT and the language model, beside real ones.

``python -m examples.llava_digits.ratios`` prints it: model FLOPs, forward and backward, of the encoder with its
projector over those of the language model, and how many images a packed sequence holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import click
import numpy as np
from megatron.core.datasets.utils import Split
from rich.console import Console

from benchmarks.paper.flops import model_flops
from dip_megatron.describe.model import (
    LanguageHead,
    ModuleShape,
    MultimodalModel,
    Packing,
    Parallel,
    PatchEmbedding,
    Projector,
    TokenEmbedding,
    TransformerLayer,
    load_model,
)
from dip_megatron.describe.workload import Microbatch, load_workload
from dip_megatron.report.tables import table

from .documents import PackedDigitDocuments, split_images
from .quickstart import ARGUMENTS, ITERATIONS
from .runs import RANKS, training_flags

REAL = ("qwen2-5-vl-7b", "vlm-m", "vlm-l", "vlm-s")
MIX = "vlm-mix"


def quickstart_model() -> MultimodalModel:
    """The description of the model of ``quickstart.args``."""
    flags = {a: b for a, b in pairwise(training_flags(ITERATIONS, ARGUMENTS)) if a.startswith("--")}

    def number(name: str) -> int:
        return int(flags[f"--{name}"])

    def layer(prefix: str, causal: bool) -> TransformerLayer:
        hidden, heads = number(f"{prefix}hidden-size"), number(f"{prefix}num-attention-heads")
        return TransformerLayer(hidden, 4 * hidden, heads, heads, causal=causal)

    hidden, vocabulary = number("hidden-size"), number("make-vocab-size-divisible-by")
    patches = (number("image-side") // number("patch-side")) ** 2
    vision = ModuleShape(
        "vision", "images", number("vision-num-layers"), layer("vision-", causal=False),
        PatchEmbedding(number("patch-side")), Projector(hidden, 4 * hidden, 4),
    )  # fmt: skip
    language = ModuleShape(
        "language", "text", number("num-layers"), layer("", causal=True),
        TokenEmbedding(vocabulary), LanguageHead(vocabulary), ("vision",),
    )  # fmt: skip
    packing = Packing(max_tokens=number("seq-length"), image_tokens=patches // 4)
    return MultimodalModel("quickstart", (vision, language), Parallel(pp=RANKS), packing)


def quickstart_microbatches(count: int) -> list[Microbatch]:
    """The first packed sequences of the quickstart, in the planner's words."""
    packing = quickstart_model().packing
    tokens, length = packing.image_tokens, packing.max_tokens
    documents = PackedDigitDocuments(
        split_images()[0], Split.train, count, sequence_length=length, image_tokens=tokens, side=8, seed=1234
    )
    images = [documents[i]["images"].shape[0] for i in range(count)]
    return [Microbatch(length - n * tokens, (tokens,) * n) for n in images]


def encoder_share(model: MultimodalModel, microbatches: Sequence[Microbatch]) -> float:
    """FLOPs of the encoder over those of the language model."""
    encoder, language = model.modules
    return model_flops(replace(model, modules=(encoder,)), microbatches) / model_flops(
        replace(model, modules=(replace(language, upstream=()),)), microbatches
    )


@click.command()
@click.option("--microbatches", default=640, show_default=True, type=click.IntRange(min=1))
def main(microbatches: int) -> None:
    """FLOPs of the encoder over those of the language model, and images a packed sequence."""
    cases = [(quickstart_model(), quickstart_microbatches(microbatches))]
    for name in REAL:
        model = load_model(name)
        batches = load_workload(MIX, model, -(-microbatches // 16), 16)
        cases.append((model, [m for batch in batches for m in batch.microbatches]))
    rows = []
    for model, drawn in cases:
        counts = np.array([len(m.images) for m in drawn])
        low, middle, high = np.percentile(counts, [5, 50, 95])
        rows.append((
            model.name,
            {
                "encoder : language": f"{encoder_share(model, drawn):.2f}",
                "images, 5% / median / 95%": f"{low:.0f} / {middle:.0f} / {high:.0f}",
                "deviation over mean": f"{counts.std() / counts.mean():.2f}",
            },
        ))  # fmt: skip
    columns = ("", "encoder : language", "images, 5% / median / 95%", "deviation over mean")
    Console().print(table(f"Work of a packed sequence; real models on {MIX}", columns, rows))


if __name__ == "__main__":
    main()
