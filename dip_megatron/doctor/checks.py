"""The checks of ``dip doctor``, in the order in which they are printed. To add one, write a function and list it."""

from __future__ import annotations

from .check import Checker
from .kernels import kernels
from .libraries import apex, megatron_core, planning, python, resuming, torch, training_loop, transformer_engine
from .machine import cores, devices
from .places import places

CHECKS: tuple[Checker, ...] = (
    python, planning, kernels, torch, megatron_core, training_loop, places, transformer_engine, apex, resuming,
    devices, cores,
)  # fmt: skip
