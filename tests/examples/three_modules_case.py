"""The three-module example on real processes: its plain model under Megatron's schedule, and in stages under DIP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dip_megatron.describe.model import Parallel
from tests.runtime.llava_case import initialize
from tests.runtime.program_case import drawn_run, plain_run, tiny_config
from tests.runtime.split_case import Drawn

VOCABULARY, MELS = 64, 6
SMALL, WIDE, TALL = (4, 4), (4, 12), (12, 8)
"""Height and width of images, in patches of four by four pixels."""
SHORT, LONG = 8, 40
"""Frames of audio clips, of which eight become a token of the language model."""


@dataclass(frozen=True)
class Held:
    """What a microbatch holds."""

    images: tuple[tuple[int, int], ...] = ()
    clips: tuple[int, ...] = ()
    text: int = 5


@dataclass(frozen=True)
class ThreeModuleCase:
    """What to train: microbatches, layers per chunk, instances of a sub-microbatch, encoders that stay as they are."""

    held: tuple[Held, ...]
    vision: tuple[tuple[int, ...], ...] = ((1, 1),)
    audio: tuple[tuple[int, ...], ...] = ((1, 1),)
    language: tuple[tuple[int, ...], ...] = ((1, 1),)
    unit_size: dict[str, int | None] = field(default_factory=lambda: {"vision": 2, "audio": 1, "language": None})
    frozen: tuple[str, ...] = ()
    per_token: bool = True
    trains: str | None = None

    @property
    def layers(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {"vision": self.vision, "audio": self.audio, "language": self.language}


def settings(case: ThreeModuleCase, pp: int) -> Any:
    from examples.three_modules.model import EncoderInput, Settings

    widths = {"vision": (24, 40), "audio": (16, 24), "language": (32, 48)}
    configs = {
        name: tiny_config(
            sum(map(sum, case.layers[name])), hidden, pp, ffn_hidden_size=ffn, calculate_per_token_loss=case.per_token
        )
        for name, (hidden, ffn) in widths.items()
    }
    inputs = {"vision": EncoderInput(3, (4, 4)), "audio": EncoderInput(1, (4, MELS), reduction=2)}
    return Settings(configs, inputs, VOCABULARY, sequence_length=64)


def batches(case: ThreeModuleCase) -> list[dict[str, Any]]:
    """Placeholders stand anywhere: the model puts embeddings there in their order."""
    out = []
    for i, held in enumerate(case.held):
        draw = torch.Generator().manual_seed(i)
        seen = sum(height * width // 16 for height, width in held.images)
        heard = sum(frames // 8 for frames in held.clips)
        words = torch.randint(0, VOCABULARY, (held.text,), generator=draw)
        tokens = torch.cat([words, torch.full((seen,), -1), torch.full((heard,), -2)])
        tokens = tokens[torch.randperm(len(tokens), generator=draw)].unsqueeze(0)
        out.append({
            "tokens": tokens,
            "labels": torch.randint(0, VOCABULARY, tokens.shape, generator=draw),
            "mask": (torch.rand(tokens.shape, generator=draw) < 0.8).float(),
            "images": [torch.randn(3, *size, generator=draw) for size in held.images],
            "clips": [torch.randn(1, frames, MELS, generator=draw) for frames in held.clips],
        })  # fmt: skip
    return out


def forward_step(data_iterator: Any, model: Any) -> Any:
    item = next(data_iterator)
    losses = model(item["tokens"], item["labels"], images=item["images"], clips=item["clips"])

    def loss_func(losses: torch.Tensor) -> Any:
        total, count = (losses * item["mask"]).sum(), item["mask"].sum().to(torch.int)
        return total, count, {"loss": torch.stack([total.detach().clone(), count.float()])}

    return losses, loss_func


def reference(rank: int, world: int, case: ThreeModuleCase) -> Any:
    """Losses and gradients of the whole model under Megatron's schedule without a pipeline."""
    initialize(1)
    from examples.three_modules.model import ThreeModuleModel

    model = ThreeModuleModel(settings(case, 1))
    model.freeze(case.frozen)
    return plain_run(model, forward_step, batches(case), case.trains)


def blueprint(case: ThreeModuleCase, pp: int) -> Any:
    """What a script asks for, as DIP records it."""
    from dip_megatron.megatron.build import record_blueprint
    from examples.three_modules.family import FAMILY
    from examples.three_modules.model import ThreeModuleModel

    def provider() -> Any:
        model = ThreeModuleModel(settings(case, pp))
        model.freeze(case.frozen)
        return model

    return record_blueprint([FAMILY], provider)


def dip_run(rank: int, world: int, case: ThreeModuleCase, drawn: Drawn, forward_only: bool = False) -> Any:
    """See :func:`tests.runtime.program_case.drawn_run`."""
    initialize(world)
    family, asked = blueprint(case, world)
    program = family.program(asked, case.layers, rank=rank, micro_batch_size=1)
    model = family.describe(asked, Parallel(1, world, 1, False, False))
    return drawn_run(
        rank, world, program, model, case.unit_size, drawn, forward_step, batches(case), forward_only, case.trains,
    )  # fmt: skip
