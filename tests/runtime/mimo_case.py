"""A tiny MimoModel of Megatron-Core, of pictures, sound and text, on real processes: the whole model under Megatron's
schedule, and in stages under DIP. Sound has an encoder of the test's own, with an entry of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from dip_megatron.describe.model import Parallel
from tests.runtime.llava_case import initialize
from tests.runtime.program_case import drawn_run, plain_run, tiny_config
from tests.runtime.split_case import Drawn

VOCABULARY, MELS, SIDE = 64, 6, 8
PICTURE, CLIP = 60, 61
"""Tokens in whose places pictures and sound stand."""
LONGEST = 96
EMBEDDING, OUTPUT = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"


@dataclass(frozen=True)
class Held:
    """What a microbatch holds: pictures, clips and the frames of each, words, samples."""

    images: int = 0
    clips: int = 0
    frames: int = 4
    text: int = 8
    samples: int = 1


@dataclass(frozen=True)
class MimoCase:
    """What to train: microbatches, layers per chunk (``sound`` None: the model has pictures alone), instances of a
    sub-microbatch, parameters that train; ``vision`` is a subtype of Megatron's CLIPViTModel."""

    held: tuple[Held, ...]
    images: tuple[tuple[int, ...], ...] = ((2, 1),)
    sound: tuple[tuple[int, ...], ...] | None = ((1, 1),)
    language: tuple[tuple[int, ...], ...] = ((1, 1),)
    unit_size: int | None = 1
    vision: str = "clip"
    tied: bool = False
    recompute: bool = False
    trains: str | None = None
    projected: bool = True
    tensor: int = 1
    depths: Mapping[str, int] = field(default_factory=lambda: {"images": 3, "sound": 2, "language": 2})

    @property
    def layers(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        sound = {} if self.sound is None else {"sound": self.sound}
        return {"images": self.images, **sound, "language": self.language}

    @property
    def positions(self) -> int:
        """Tokens of a picture: patches of four by four pixels, and class tokens."""
        return (SIDE // 4) ** 2 + (self.vision != "siglip")


@cache
def waves() -> type[torch.nn.Module]:
    """An encoder of sound as a script might have one, ``[clips, frames, mels]`` to ``[clips, frames, h]``; with its
    entry."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_block import TransformerBlock

    from dip_megatron.families.describe import layer_shape
    from dip_megatron.families.multimodal.mimo_encoders import MimoEncoder, register_encoder
    from dip_megatron.families.multimodal.shapes import HiddenShape
    from dip_megatron.families.shared.cut import CutPoints

    class Waves(torch.nn.Module):
        def __init__(self, config: Any, layer_spec: Any):
            super().__init__()
            self.stem = ColumnParallelLinear(
                MELS, config.hidden_size, config=config, init_method=config.init_method, gather_output=True
            )
            self.block = TransformerBlock(config=config, spec=layer_spec, pre_process=True, post_process=True)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            hidden = self.stem(features)[0].transpose(0, 1).contiguous()
            encoded: torch.Tensor = self.block(hidden, None)
            return encoded.transpose(0, 1)

    class Stub(torch.nn.Module):
        def __init__(self, stem: Any):
            super().__init__()
            self._width = stem.output_size

        def forward(self, features: torch.Tensor) -> Any:
            return features.new_zeros(*features.shape[:2], self._width), None

    class Entry(MimoEncoder):
        def points(self, params: Any) -> Any:
            return CutPoints("block.layers", stem=("stem",), tail=("block.final_layernorm",), stubs={"stem": Stub})

        def layers(self, params: Any) -> int:
            return int(params["config"].num_layers)

        def layer(self, params: Any) -> Any:
            return layer_shape(params["config"], causal=False)

        def hidden(self, params: Any) -> Any:
            return HiddenShape(params["config"].hidden_size)

        def tokens(self, params: Any, inputs: Any) -> list[int]:
            return [int(inputs["features"].shape[1])] * int(inputs["features"].shape[0])

        def leaving(self, hidden: torch.Tensor, inputs: Any) -> torch.Tensor:
            return hidden.transpose(0, 1).flatten(0, 1)

        def arriving(self, hidden: torch.Tensor, inputs: Any) -> torch.Tensor:
            return hidden.unflatten(0, inputs["features"].shape[:2]).transpose(0, 1).contiguous()

    register_encoder(Waves, Entry())
    return Waves


def _config(case: MimoCase, name: str, hidden: int, pp: int) -> Any:
    recompute: dict[str, Any] = {}
    if case.recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return tiny_config(
        case.depths[name], hidden, pp, ffn_hidden_size=hidden + 8, tensor_model_parallel_size=case.tensor,
        calculate_per_token_loss=True, **recompute,
    )  # fmt: skip


def mimo_config(case: MimoCase, pp: int) -> Any:
    """The model, as a script describes it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.mimo import MimoModelConfig
    from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
    from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    mlp = decoder_model_with_local_default_spec(None, False).submodules.mlp
    mlp = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    text = _config(case, "language", 32, pp)
    widths = {"images": 24 if case.projected else 32, "sound": 16}

    def projection(name: str) -> Any:
        params = {"config": _config(case, "language", 32, 1), "submodules": mlp, "projector_type": "mlp",
                  "input_size": widths[name]}  # fmt: skip
        return ModuleSpec(module=MultimodalProjector, params=params)

    # Of their own configs, in which a script may have left its pipeline.
    pictures, clips = (_config(case, name, widths[name], pp) for name in ("images", "sound"))
    none = {"add_class_token": False, "class_token_len": 0} if case.vision == "siglip" else {}
    layer = get_vit_layer_with_local_spec()
    seen = ModuleSpec(module=CLIPViTModel, params={
        "transformer_config": pictures, "transformer_layer_spec": layer, "patch_dim": 4, "img_h": SIDE, "img_w": SIDE,
        "model_subtype": case.vision, **none,
    })  # fmt: skip
    submodules: dict[str, Any] = {"encoders": {"vit": seen}}
    if case.projected:
        submodules["input_projections"] = [projection("images")]
    modalities = {"images": ModuleSpec(module=VisionModalitySubmodules, submodules=submodules)}
    tokens = {"images": PICTURE}
    if case.sound is not None:
        heard = ModuleSpec(module=waves(), params={"config": clips, "layer_spec": layer})
        modalities["sound"] = ModuleSpec(
            module=AudioModalitySubmodules,
            submodules={"encoders": {"waves": heard}, "input_projections": [projection("sound")]},
        )
        tokens["sound"] = CLIP
    language = ModuleSpec(module=GPTModel, params={
        "config": text, "transformer_layer_spec": get_gpt_layer_local_spec(), "vocab_size": VOCABULARY,
        "max_sequence_length": LONGEST, "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": case.tied,
    })  # fmt: skip
    return MimoModelConfig(language, modalities, tokens)


def model_of(case: MimoCase, pp: int) -> Any:
    from megatron.core.models.mimo import MimoModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is experimental
        return MimoModel(mimo_config(case, pp))


def batches(case: MimoCase) -> list[dict[str, Any]]:
    """Arguments of the model; places of pictures and sound anywhere in the text, of each sample as many."""
    out = []
    for i, held in enumerate(case.held):
        draw = torch.Generator().manual_seed(i)
        clips = held.clips if case.sound is not None else 0
        rows = []
        for _ in range(held.samples):
            words = torch.randint(0, PICTURE, (held.text,), generator=draw)
            places = [torch.full((held.images * case.positions,), PICTURE), torch.full((clips * held.frames,), CLIP)]
            row = torch.cat([words, *places])
            rows.append(row[torch.randperm(len(row), generator=draw)])
        ids = torch.stack(rows)
        images, sounds = held.images * held.samples, clips * held.samples
        given: dict[str, Any] = {}
        if images:
            given["images"] = {"vit": {"x": torch.randn(images, 3, SIDE, SIDE, generator=draw).double()}}
        if sounds:
            frames = torch.randn(sounds, held.frames, MELS, generator=draw).double()
            given["sound"] = {"waves": {"features": frames}}
        out.append({
            "input_ids": ids,
            "position_ids": torch.arange(ids.shape[1]).expand(held.samples, -1).contiguous(),
            "labels": torch.randint(0, PICTURE, ids.shape, generator=draw),
            "loss_mask": (torch.rand(ids.shape, generator=draw) < 0.8).float(),
            "modality_inputs": given,
        })  # fmt: skip
    return out


def forward_step(data_iterator: Any, model: Any) -> Any:
    """In the manner of upstream's examples/mimo/train.py."""
    losses, mask = model(**next(data_iterator))

    def loss_func(losses: torch.Tensor) -> Any:
        total, count = (losses * mask).sum(), mask.sum().to(torch.int)
        return total, count, {"loss": torch.stack([total.detach().clone(), count.float()])}

    return losses, loss_func


def reference(rank: int, world: int, case: MimoCase) -> Any:
    """Losses and gradients of the whole model under Megatron's schedule without a pipeline."""
    initialize(1, case.tensor)
    return plain_run(model_of(case, 1), forward_step, batches(case), case.trains)


def blueprint(case: MimoCase, pp: int) -> Any:
    """What a script asks for, as DIP records it."""
    from dip_megatron.families.known import known_families
    from dip_megatron.megatron.build import record_blueprint

    return record_blueprint(known_families(), model_of, case, pp)


def dip_run(rank: int, world: int, case: MimoCase, drawn: Drawn, forward_only: bool = False) -> Any:
    """See :func:`tests.runtime.program_case.drawn_run`."""
    initialize(world)
    family, asked = blueprint(case, world)
    program = family.program(asked, case.layers, rank=rank, micro_batch_size=1)
    model = family.describe(asked, Parallel(1, world, 1, False, False))
    sizes = {m.name: case.unit_size if m.encodes else None for m in model.modules}
    return drawn_run(
        rank, world, program, model, sizes, drawn, forward_step, batches(case), forward_only, case.trains
    )  # fmt: skip
