"""Plans of replicas that expert parallelism couples: sets of them, their verifier, their simulator, their bound."""

from ..experts import Coupled, ExpertLayers, ExpertLayersError
from .sets import JointPlan, make_joint_plan
from .simulate import JointError, JointTimeline, simulate_joint, simulate_joint_compiled
from .verify import verify_joint

__all__ = [
    "Coupled",
    "ExpertLayers",
    "ExpertLayersError",
    "JointError",
    "JointPlan",
    "JointTimeline",
    "make_joint_plan",
    "simulate_joint",
    "simulate_joint_compiled",
    "verify_joint",
]
