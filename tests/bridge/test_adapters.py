"""Adapters (Bridge's ``peft``) under DIP: what trains is read off the model as built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridge.equality import together
from tests.bridge.loop import Run, save_text_model, trained
from tests.bridge.tiny import TINY
from tests.processes import Team

EVERYWHERE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""As Bridge's recipes: every linear of Megatron's."""
LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj",
          "linear_fc1", "linear_fc2")  # fmt: skip
"""Of latent attention, of MLPs and of experts."""
BLOCKS = ("*.attn.qkv", "*.mlp.down_proj")
"""Of Hugging Face's encoder."""
LAYERS = {
    "qwen2-5-vl": {"vision": {"layers": [[0, 2], [2, 0]]}, "language": {"layers": [[1, 1], [0, 2]]}},
    "qwen3-vl": {"vision": {"layers": [[0, 2], [3, 0]]}, "language": {"layers": [[1, 1], [0, 4]]}},
    "kimi-k2-5": {"vision": {"layers": [[0, 2], [2, 0]]}, "language": {"layers": [[1, 1], [0, 2]]}},
    "text": {"language": {"layers": [[1, 1], [1, 1]]}},
}


def run(folder: Path, how: Run) -> list[dict[str, Any]]:
    ranks = Team(how.pipeline)  # of their own: Bridge initialises a process once
    try:
        return ranks.run(trained, folder, how)
    finally:
        ranks.close()


@pytest.mark.parametrize(("name", "frozen", "targets"), [
    ("qwen2-5-vl", (), (*EVERYWHERE, *BLOCKS)),
    ("qwen2-5-vl", (), EVERYWHERE),
    ("qwen3-vl", ("vision_model",), EVERYWHERE),
    ("kimi-k2-5", (), (*LATENT, "*.wqkv", "*.mlp.fc1")),
    ("text", (), EVERYWHERE),
], ids=["both modules", "language alone", "Megatron's encoder", "experts", "text"])  # fmt: skip
def test_adapters_train_as_without_dip(
    name: str, frozen: tuple[str, ...], targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Losses, norms, and every gradient: nothing but adapters has one."""
    text = name == "text"
    save_text_model(tmp_path) if text else TINY[name].save(tmp_path)
    how = Run(pipeline=2, finetunes=True, frozen=frozen, adapters=targets, text=text)
    how = how if text else replace(how, tiny=name)
    off = run(tmp_path, how)
    under = run(tmp_path, replace(how, dip={"schedule": "dynamic", "modules": LAYERS[name], "planner_workers": 0}))

    torch.testing.assert_close(under[1]["losses"], off[1]["losses"], rtol=0, atol=3e-6)
    torch.testing.assert_close(under[1]["norms"], off[1]["norms"], rtol=3e-5, atol=0)
    expected, found = (together([rank["gradients"] for rank in ranks]) for ranks in (off, under))
    assert found.keys() == expected.keys()
    assert all("linear_in" in name or "linear_out" in name for name in found)
    assert [target for target in targets if not any(f".{target.rpartition('.')[2]}." in name for name in found)] == []
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 0, name
        off_by = float((found[name] - gradient).abs().max())
        assert off_by <= 2e-5 * float(gradient.abs().max()) + 1e-9, f"{name}: {off_by} of {gradient.abs().max()}"
