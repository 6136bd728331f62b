"""What the benchmark trains: vision-language models scaled to ranks that are an eighth of a GPU, and their batches."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.shared.models import language_model, llava
from dip_megatron.describe.model import MultimodalModel, Packing, TransformerLayer
from dip_megatron.describe.workload import Microbatch, load_workload
from dip_megatron.runtime.transport_choice import TransportKind

SCHEDULES = (
    "megatron-1f1b-by-parameters", "megatron-1f1b", "megatron-interleaved", "zb-h1", "zb-v", "dip-paper", "dip",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One run of the benchmark. ``search_seconds`` is the search of one plan, ``memory_gb`` what plans may use per rank
    (10^9 bytes); ``rounds`` passes over all batches are timed, after one that is not."""

    size: str = "full"
    ranks: int = 4
    batches: int = 5
    microbatches: int = 16
    rounds: int = 1
    seed: int = 0
    workload: str = "vlm-mix"
    schedules: tuple[str, ...] = SCHEDULES
    search_seconds: float = 2.0
    partition_seconds: float = 15.0
    search_workers: int = 8
    memory_gb: float = 15.0
    transport: TransportKind | None = None
    optimizer: bool = True
    costs: str | None = None
    out: str = "out/bench_gpu"

    def record(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def model_of(setting: Setting) -> MultimodalModel:
    """``full``: a ViT of 0.38 billion parameters and an LLM of 1.36 billion (676 patches of an image become 169 tokens,
    sequences of 2048); ``tiny``: the same kinds of layers, for a CPU."""
    if setting.size == "tiny":
        vision, language, vocabulary, patch = TransformerLayer(64, 128, 4, 4), _causal(96, 192, 4), 256, 4
        layers, packing = (6, 6), Packing(max_tokens=128, max_images=8, image_tokens=9)
    else:
        vision, language, vocabulary, patch = TransformerLayer(1152, 4608, 16, 16), _causal(2048, 5632, 16), 32000, 14
        layers, packing = (24, 24), Packing(max_tokens=2048, max_images=12, image_tokens=169)
    decoder = language_model(layers[1], language, vocabulary, ("vision",))
    return llava(
        layers[0], vision, patch, language.hidden, decoder, setting.ranks, packing, name=f"llava-{setting.size}"
    )


def _causal(hidden: int, ffn: int, heads: int) -> TransformerLayer:
    return TransformerLayer(hidden, ffn, heads, heads, gated=True, causal=True)


def batches_of(setting: Setting, model: MultimodalModel) -> list[tuple[Microbatch, ...]]:
    """The workload's batches, every microbatch one sequence (attention runs over all of it)."""
    drawn = load_workload(setting.workload, model, setting.batches, setting.microbatches, setting.seed)
    return [
        tuple(Microbatch(m.text_tokens, m.images, sequences=(m.tokens,)) for m in batch.microbatches) for batch in drawn
    ]


def training_flops(model: MultimodalModel, batch: tuple[Microbatch, ...]) -> float:
    """FLOPs of forward and backward, nothing recomputed: 6 per parameter and token, 12 per attended pair and channel
    (half of that if causal), embeddings left out."""
    total = 0.0
    for m in batch:
        for shape in model.modules:
            layer = shape.layer
            if shape.input == "images":
                length = model.packing.image_tokens * shape.reduction
                tokens, pairs = length * len(m.images), length**2 * len(m.images)
                outputs = model.packing.image_tokens * len(m.images)
            else:
                tokens = outputs = m.tokens
                pairs = tokens**2
            attention = 12.0 * pairs * layer.query_width * (0.5 if layer.causal else 1.0)
            total += shape.layers * (6.0 * layer.parameters * tokens + attention)
            total += 6.0 * shape.head.parameters(layer.hidden) * outputs
            if shape.input == "images":
                total += 6.0 * shape.stem.parameters(layer.hidden) * tokens
    return total
