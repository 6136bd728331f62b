"""What a family's tiny model is: a Hugging Face folder, and microbatches drawn for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

IMAGE, VIDEO, START, END, AUDIO, AUDIO_START, AUDIO_END, VOCABULARY = 120, 121, 122, 123, 124, 125, 126, 128
SEQUENCE = 96
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
}  # fmt: skip

Grid = tuple[int, int, int]
Content = tuple[str, Grid]
"""An image or a video: frames (of two pictures), height and width in patches."""


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model: ``model(tied)`` makes it of Hugging Face's classes, ``change`` gives its provider what
    Bridge doesn't read from the folder. ``split_frames``: tokens of a video's frames stand apart. ``step`` is the
    module of Bridge's forward step; ``tolerance`` is of logits against Hugging Face's, and ``logits`` prepares one of
    Bridge's models to be compared with them. ``pixels_everywhere``: its step gives pixels to every rank;
    ``step_shares``: of labels, it gives each context-parallel rank its share.
    ``predicts``: depths of multi-token prediction that mcore-bridge is asked for."""

    name: str
    model: Callable[[bool], Any]
    patch: int = 14
    temporal: int = 2
    split_frames: bool = False
    experts: bool = False
    pixels_everywhere: bool = False
    step_shares: bool = False
    predicts: int = 0
    videos: bool = True
    vision_layers: int = 4
    language_layers: int = 4
    audio_layers: int = 0
    tied: bool = False
    tolerance: float = 1e-5
    change: Callable[[Any], None] = lambda provider: None
    logits: Callable[[Any], None] = lambda model: None
    step: str = "megatron.bridge.training.vlm_step"
    sizes: Sequence[Grid] = ((1, 4, 4), (1, 4, 8), (1, 8, 12), (1, 2, 2))

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face folder."""
        self.made().save_pretrained(folder)

    def exported(self, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the class's own export gives of the folder's weights."""
        return saved

    def made(self) -> Any:
        """It with random weights, always the same."""
        torch.manual_seed(7)
        model = self.model(self.tied).float()
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():  # norms and biases begin as ones and zeros, which hide mistakes
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    def contents(self, seed: int, microbatches: int) -> list[tuple[Content, ...]]:
        """What microbatches show: first nothing, then a single image, then as many as were drawn, of drawn sizes."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(count: int) -> list[int]:
            return torch.randint(0, count, (1,), generator=generator).tolist()

        shown: list[tuple[Content, ...]] = [(), (("image", self.sizes[drawn(len(self.sizes))[0]]),)]
        while len(shown) < microbatches:
            line: list[Content] = []
            for _ in range(2 + drawn(3)[0]):
                grid = self.sizes[drawn(len(self.sizes))[0]]
                kind = "video" if self.videos and drawn(3)[0] == 0 else "image"
                line.append((kind, (1 + drawn(2)[0], 4, 4) if kind == "video" else grid))
            shown.append(tuple(line))
        return shown

    def tokens(self, kind: str, grid: Grid) -> list[int]:
        """In place of an image or a video."""
        token = IMAGE if kind == "image" else VIDEO
        if kind == "video" and self.split_frames:
            return [START, *[token] * (prod(grid[1:]) // 4), END] * grid[0]
        return [START, *[token] * (prod(grid) // 4), END]

    def arguments(self, shown: tuple[Content, ...], seed: int) -> dict[str, Any]:
        """Of a model's forward, for one sample."""
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> list[int]:
            return torch.randint(3, 110, (count,), generator=generator).tolist()

        line = words(4)
        for kind, grid in shown:
            line += [*self.tokens(kind, grid), *words(2)]
        line += words(SEQUENCE + 1 - len(line))
        tokens = torch.tensor([line])
        found: dict[str, Any] = {
            "input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": torch.arange(SEQUENCE)[None],
            "attention_mask": None, "loss_mask": (tokens[:, 1:] < IMAGE).float(),
        }  # fmt: skip
        return found | self.seen(shown, generator)

    def text(self, model: Any) -> Any:
        """What of Hugging Face's model gives logits."""
        return model

    def hugging_face(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What Hugging Face's model needs beside the tokens, pixels and grids."""
        ids = arguments["input_ids"]
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    def seen(self, shown: tuple[Content, ...], generator: torch.Generator) -> dict[str, Any]:
        """Pixels and grids."""
        found: dict[str, Any] = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            own = [grid for k, grid in shown if k == kind]
            if own:
                values = 3 * self.temporal * self.patch**2
                found[name] = torch.randn(sum(map(prod, own)), values, generator=generator)
                found[f"{kind}_grid_thw"] = torch.tensor(own)
        return found


def packed_row(samples: Sequence[dict[str, Any]], cut: Sequence[int]) -> dict[str, Any]:
    """Samples in one row as Bridge's collators pack them, each padded to a multiple of four tokens, without so many
    of its last ones."""
    from megatron.bridge.data.packing.in_batch import build_mcore_thd_sequence_batch_from_rows

    tokens = ("input_ids", "labels", "loss_mask", "position_ids")
    rows = [{name: sample[name][0, :-left] for name in tokens} for sample, left in zip(samples, cut, strict=True)]
    shown = {name for sample in samples for name in sample} - {*tokens, "attention_mask"}
    return build_mcore_thd_sequence_batch_from_rows(rows, pad_to_multiple_of=4) | {
        name: torch.cat([sample[name] for sample in samples if name in sample]) for name in shown
    }


def sections(*section: int) -> Callable[[Any], None]:
    """Bridge's providers keep the sections of M-RoPE of the published models."""

    def change(provider: Any) -> None:
        provider.mrope_section = list(section)

    return change


def plain_experts(*section: int) -> Callable[[Any], None]:
    """:func:`sections`, and experts without fused kernels and what needs devices of its own."""

    def change(provider: Any) -> None:
        provider.mrope_section, provider.mtp_num_layers = list(section), None
        provider.moe_permute_fusion = provider.moe_shared_expert_overlap = False

    return change
