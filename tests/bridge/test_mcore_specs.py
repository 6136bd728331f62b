"""What pages of mcore-bridge's models refuse, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridge import equality
from tests.bridge.equality import Case
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.processes import team

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mcore_bridge") is None, reason="needs mcore-bridge")
LAYERS: dict[str, tuple[tuple[int, ...], ...]] = {"vision": ((5,),), "language": ((6,),)}


def in_rows(rank: int, world: int, folder: Path) -> tuple[list[float], str]:
    """How far mcore-bridge's logits of two samples in two rows are off those of either alone, without pictures and with
    them; what DIP says of such microbatches."""
    case = Case("mcore-qwen3-vl", folder, LAYERS)
    bridge, provider = equality.provider_of(case, world)
    model = provider.provide().eval()
    bridge.load_hf_weights([model])

    def logits(arguments: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**{n: v for n, v in arguments.items() if n not in ("labels", "loss_mask")})
        return found

    def both(samples: list[dict[str, Any]]) -> dict[str, Any]:
        joined: dict[str, Any] = dict.fromkeys(samples[0])
        for name in {name for sample in samples for name, value in sample.items() if value is not None}:
            dim = 1 if name == "position_ids" else 0
            joined[name] = torch.cat([sample[name] for sample in samples if name in sample], dim)
        return joined

    offs = []
    for shown in ((), (("image", (1, 4, 8)),)):
        samples = [case.of.arguments(shown, seed) for seed in (1, 2)]
        alone = torch.cat([logits(sample) for sample in samples])
        offs.append(float((logits(both(samples)) - alone).abs().max()))
    _, program, _, _ = equality.build(rank, world, case)
    with pytest.raises(ValueError, match="wrong samples") as error:
        program.bind(**both(samples))
    program.bind(**both([case.of.arguments((), seed) for seed in (1, 2)]))
    program.bind(**samples[0])
    return offs, str(error.value)


def with_a_video(rank: int, world: int, folder: Path) -> str:
    """What DIP says of it; mcore-bridge's own forward fails."""
    case = Case("mcore-glm-4-5v", folder, {"vision": ((4,),), "language": ((4,),)})
    bridge, provider = equality.provider_of(case, world)
    model = provider.provide().eval()
    bridge.load_hf_weights([model])
    said = ""
    for frames, fault in ((1, "Video placeholder and embedding counts differ"), (2, "index 1 is out of bounds")):
        arguments = case.of.arguments((("image", (frames, 4, 4)),), 1)
        arguments["pixel_values_videos"] = arguments.pop("pixel_values")
        arguments["video_grid_thw"] = arguments.pop("image_grid_thw")
        with torch.no_grad(), pytest.raises((RuntimeError, IndexError), match=fault):
            model(**{n: v for n, v in arguments.items() if n not in ("labels", "loss_mask")})
        _, program, _, _ = equality.build(rank, world, case)
        with pytest.raises(ValueError, match="no place for videos") as error:
            program.bind(**arguments)
        said = str(error.value)
    return said


def test_videos_of_glm_are_refused(tmp_path: Path) -> None:
    MCORE_TINY["mcore-glm-4-5v"].save(tmp_path)
    (said,) = team(1).run(with_a_video, tmp_path)
    assert "train on images alone" in said


def predicting(rank: int, world: int, folder: Path) -> list[str]:
    """What DIP says of multi-token prediction on a chunk without layers, of one layer for all depths, and on shares of
    sequences."""
    case = Case("mcore-qwen3-5-mtp", folder, {"vision": ((2, 2),), "language": ((4, 0),)})
    said = []
    with pytest.raises(ValueError, match="a layer") as error:
        equality.build(rank, world, case)
    said.append(str(error.value))
    of, given = equality.provider_of, replace(case, layers={"vision": ((2, 2),), "language": ((2, 2),)})
    for setting, value in {"mtp_shared_weights": True, "context_parallel_size": 2}.items():

        def changed(*asked: Any, setting: str = setting, value: int = value) -> Any:
            models, _ = of(*asked)
            setattr(models.config, setting, value)
            return models, models

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(equality, "provider_of", changed)
            with pytest.raises(ValueError, match=setting) as error:
                equality.build(rank, world, given)
        said.append(str(error.value))
    return said


def test_prediction_that_mcore_bridge_cant_load_is_refused(tmp_path: Path) -> None:
    MCORE_TINY["mcore-qwen3-5-mtp"].save(tmp_path)
    layerless, repeated, shared = team(2).run(predicting, tmp_path)[-1]
    assert "give the last chunk of language a layer" in layerless
    assert "leave out mtp_shared_weights" in repeated
    assert "leave out mtp_num_layers, or use context_parallel_size 1" in shared


def test_deepstack_of_several_rows_is_refused(tmp_path: Path) -> None:
    """mcore-bridge's own forward mixes them up."""
    MCORE_TINY["mcore-qwen3-vl"].save(tmp_path)
    (((without, with_pictures), said),) = team(1).run(in_rows, tmp_path)
    assert without < 1e-5
    assert with_pictures > 1e-2
    assert "2 rows; pack them into one (padding_free), or use micro_batch_size 1" in said
