"""What ``scripts/bench predicted`` is made of; it runs itself for minutes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.predicted import beyond_plan, peak_of, static_bytes, table
from benchmarks.shared.predicted_models import BRIDGE, CASES, enlarged


def test_networks_grow_and_their_heads_do_not() -> None:
    small: dict[str, Any] = {
        "hidden_size": 64, "image_token_id": 120,
        "text_config": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 4},
        "vision_config": {"hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "depth": 4},
    }  # fmt: skip
    assert enlarged(small) == {
        "hidden_size": 256, "image_token_id": 120,
        "text_config": {"hidden_size": 256, "num_attention_heads": 16, "head_dim": 16, "num_hidden_layers": 4},
        "vision_config": {"hidden_size": 256, "num_heads": 16, "out_hidden_size": 256, "depth": 4},
    }  # fmt: skip


def test_memory_is_what_stays_and_the_most_beside_it() -> None:
    def work() -> None:
        kept = torch.ones(1000, 256)
        for _ in range(3):
            torch.ones(2000, 256)  # one at a time
        del kept

    assert peak_of(work) == 3000 * 256 * 4

    class Chunk(torch.nn.Linear):
        buffers: Any = ()  # as Megatron's wrapper has them

    frozen, trained = Chunk(10, 10, bias=False).requires_grad_(False), Chunk(10, 10, bias=False)
    assert static_bytes([frozen]) == 400
    assert static_bytes([trained]) == 400 + 800


def test_what_takes_longer_than_planned_is_a_share_of_the_iteration() -> None:
    lines = [
        {"iteration_seconds": 2.0, "breakdown": {
            "measured": [{"waiting": 0.5}, {"waiting": 0.3}], "planned": [{"waiting": 0.3}, {"waiting": 0.1}]}}
    ]  # fmt: skip
    assert abs(beyond_plan(lines, "waiting") - 0.1) < 1e-12


def test_a_row_off_by_more_than_the_bar_is_marked() -> None:
    def row(**changed: Any) -> dict[str, Any]:
        return {
            "family": "gpt", "schedule": "off", "seconds": [1.0, 1.02, 1.04], "predicted_seconds": 1.0, "ratio": 1.02,
            "bytes": [10.0, 20.0], "predicted_bytes": [10.0, 20.0], "bytes_ratio": 1.0, "beyond": {},
            "replayed_seconds": None,
        } | changed  # fmt: skip

    assert "MISSED" not in table([row()])
    assert "MISSED" in table([row(ratio=0.94)])
    assert "MISSED" in table([row(bytes_ratio=1.06)])


def test_every_family_has_a_case() -> None:
    assert {name for name, case in CASES.items() if case.bridge} == set(BRIDGE)
    assert all("dynamic" in case.schedules for case in CASES.values())
