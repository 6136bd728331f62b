"""Megatron-Core's making of process groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state

from .names import Name, Topic

TOPIC = Topic(
    "ranks that share a GPU (--distributed-backend gloo)",
    "megatron-core",
    "0.16.1, 0.19.2",
    "several ranks can't share a GPU",
    (Name("megatron.core.parallel_state:create_group", ("ranks", "timeout", "backend")),),
)


def group_maker() -> Callable[..., Any]:
    """The function through which Megatron makes all its groups."""
    maker: Callable[..., Any] = parallel_state.create_group
    return maker


def replace_group_maker(maker: Callable[..., Any]) -> None:
    """Make them through another one."""
    parallel_state.create_group = maker
