"""Operations, their dependencies, schedules and plans; the verifier and the file format."""

from .actions import Action, Channel, Communicate, CommunicationKind, Compute, Message, Reduce, parse_action
from .graph import GraphError, OperationGraph
from .modules import ModalityModule, Unit
from .operations import Kind, Operation
from .order import Schedule, check_complete
from .plan import Payload, Plan, Predicted, SearchStatistics, TensorSpec, used_strategies

__all__ = [
    "Action",
    "Channel",
    "Communicate",
    "CommunicationKind",
    "Compute",
    "GraphError",
    "Kind",
    "Message",
    "ModalityModule",
    "Operation",
    "OperationGraph",
    "Payload",
    "Plan",
    "Predicted",
    "Reduce",
    "Schedule",
    "SearchStatistics",
    "TensorSpec",
    "Unit",
    "check_complete",
    "parse_action",
    "used_strategies",
]
