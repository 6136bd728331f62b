"""What ranks of tests import, so that they are forked with it instead of importing it each."""

import atexit
import gc
import importlib.util
import os
import queue
from typing import Any

import torch

from dip_megatron.megatron.cpu import install_cpu_platform

# A CUDA driver that has been asked for its devices can't be used in a fork: ask the management library instead.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
install_cpu_platform()
torch.set_num_threads(1)

import megatron.core.models.multimodal.llava_model  # noqa: E402
import megatron.core.models.multimodal.llava_spec  # noqa: E402
import megatron.core.models.vision.vit_layer_specs  # noqa: E402
import sklearn.datasets  # noqa: E402, F401
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402

import dip_megatron.commands.run  # noqa: E402
import dip_megatron.families.known  # noqa: E402
import dip_megatron.megatron.hooks  # noqa: E402
import dip_megatron.megatron.session  # noqa: E402
import dip_megatron.schedulers.entries  # noqa: E402, F401
from dip_megatron.planner.warm import warm_up_all  # noqa: E402

if importlib.util.find_spec("megatron.training") is not None:
    import megatron.training.checkpointing  # noqa: F401

_Optimizer = distrib_optimizer.DistributedOptimizer
_sharded_state_dict, _set_state = _Optimizer.sharded_state_dict, _Optimizer._set_main_param_and_optimizer_states


def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, **rest: Any) -> Any:
    """Megatron's, after a step that gives the optimizer a state to load into."""
    if is_loading and not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return _sharded_state_dict(self, model, is_loading, **rest)


def set_main_param_and_optimizer_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
    """Megatron's, with a step of each parameter's own, which the checkpoint has in its parameter groups."""
    group, index = self.model_param_group_index_map[parameter]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
    state["step"] = state["step"].clone()
    with torch.no_grad():
        _set_state(self, parameter, {"step": None, **tensors})


# Without Transformer Engine and Apex, no run of Megatron 0.19 resumes with a distributed optimizer: it asks torch's
# Adam for its step before it has one, looks for a step beside every parameter's moments, and lets all parameters count
# on one tensor. Nor does one in fp32 from its default format: it writes to parameters as if no gradient were recorded.
if not distrib_optimizer.HAVE_APEX_OR_TE:
    _Optimizer.sharded_state_dict = sharded_state_dict  # type: ignore[method-assign]
    _Optimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states  # type: ignore[method-assign]

# Ranks that train no further until all is saved write in threads of their own, whose results need no queue between
# processes: Megatron's is a new Python per rank, which imports all of this again.
assert filesystem_async._results_queue is None
filesystem_async._results_queue = queue.Queue()

del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]

# What ranks plan themselves: kernels loaded once.
warm_up_all()
gc.collect()
gc.freeze()  # a collection in a rank would write to, and so copy, what is shared
atexit.register(gc.unfreeze)  # else libraries complain of what was left when the server ends
