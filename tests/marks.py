"""Where a test runs: what skips it elsewhere, and why."""

from __future__ import annotations

import importlib.util

import pytest
import torch

needs_megatron_training = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="needs megatron.training"
)
on_cpu_ranks = pytest.mark.skipif(torch.cuda.is_available(), reason="is laid out for CPU ranks")
