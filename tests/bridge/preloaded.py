"""What ranks of tests with Megatron-Bridge import, to be forked with it, and what lets Bridge train on them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# Before Megatron looks for Transformer Engine.
sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
os.environ |= {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring"}  # for deterministic_mode

import tests.preloaded  # noqa: F401  installs the CPU platform

# isort: split
from megatron.bridge import AutoBridge  # noqa: F401
from megatron.bridge.training import finetune, gpt_step, initialize, pretrain, vlm_step  # noqa: F401

# setup() doesn't pass allow_no_cuda on.
_function = initialize.initialize_megatron
assert _function.__code__.co_varnames[1] == "allow_no_cuda"
_function.__defaults__ = (True, *_function.__defaults__[1:])

if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
    # The wheel has the compiled library and no Makefile to compile it with, on which Bridge ends the process.
    initialize.compile_helpers = lambda: None
