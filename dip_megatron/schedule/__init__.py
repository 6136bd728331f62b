"""Stages, their dependencies, schedules and plans; the verifier and the files."""

from .graph import GraphError, ModalityModule, StageGraph, Unit
from .keys import Kind, StageKey
from .order import Schedule, check_complete

__all__ = ["GraphError", "Kind", "ModalityModule", "Schedule", "StageGraph", "StageKey", "Unit", "check_complete"]
