"""Stages on one device: gradients, and bytes that are held, are as planned. What runs on a GPU runs on the host, too,
so that nothing but the card is untried; without one the former skip."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dip_megatron.core.strategies import strategy_names
from tests.patience import LONG

ROOT = Path(__file__).resolve().parents[2]
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
TE = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
ALL = strategy_names()


@cache
def on_device(what: str, device: str, dtype: str, implementation: str, strategies: tuple[str, ...]) -> Any:
    """What :mod:`.card` prints."""
    stand_in = [str(ROOT / "tests/bridge/stand_in")] if (device, implementation) == ("cpu", "te") else []
    path = os.pathsep.join([*stand_in, str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.card", what, device, dtype, implementation, *strategies],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# bfloat16: sums in another order, where a layer is computed again or an output's gradient is made of parts.
@pytest.mark.parametrize(
    ("device", "dtype", "implementation", "strategies", "most"),
    [
        pytest.param("cpu", "float32", "local", ("none", "all"), 2e-5, id="host"),
        pytest.param("cpu", "float32", "te", ("none", "all"), 2e-5, id="host-stand-in-for-te"),
        pytest.param("cuda", "float32", "local", (*ALL, "all"), 5e-5, marks=GPU, id="gpu-float32"),
        pytest.param("cuda", "bfloat16", "local", (*ALL, "all"), 2e-2, marks=GPU, id="gpu-bfloat16"),
        pytest.param("cuda", "float32", "te", (*ALL, "all"), 5e-5, marks=(*GPU, TE), id="gpu-te-float32"),
        pytest.param("cuda", "bfloat16", "te", (*ALL, "all"), 2e-2, marks=(*GPU, TE), id="gpu-te-bfloat16"),
    ],
)  # fmt: skip
def test_gradients_are_those_of_megatrons_schedule(device, dtype, implementation, strategies, most):
    """Under every memory strategy, with most backwards in two: split, offloaded and brought back on streams of their
    own, and recomputed."""
    found = on_device("equal", device, dtype, implementation, strategies)
    assert found.keys() == set(strategies)
    for name, one in found.items():
        assert one["weights"] > 0, name
        assert one["loss"] <= most, name
        assert one["gradient"] <= most, name


@pytest.mark.parametrize(
    ("device", "strategies"),
    [
        pytest.param("cpu", ("none", "offload_until_weight"), id="host"),
        pytest.param("cuda", ALL, marks=GPU, id="gpu"),
    ],
)  # fmt: skip
def test_bytes_are_as_planned(device, strategies):
    """Within 5%, and what norms and random states of a checkpoint add."""
    for place, one in on_device("held", device, "float32", "local", strategies).items():
        expected, measured = one["activation"]
        state = 0.0 if place.startswith("none") else 1.05 * one["hidden_state"] + 64 * 1024
        assert abs(measured - expected) <= 0.05 * expected + state, place
        expected, measured = one["deferred_activation"]
        assert abs(measured - expected) <= 0.05 * expected, place
