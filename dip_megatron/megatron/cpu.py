"""Megatron on a machine without a GPU.

Megatron-Core and ``megatron.training`` place tensors on CUDA unconditionally and ask ``torch.cuda`` for streams, memory
and random states, and no flag turns that off. :func:`install_cpu_platform` answers these calls on the host, so that
Megatron's own initialisation, layers, DDP, schedules and optimizers run over gloo. It changes where tensors live and no
arithmetic. Where CUDA is available it does nothing.

What is replaced, for megatron-core 0.16 to 0.19:

1. ``torch.cuda``: ``current_device()`` is ``torch.device("cpu")``; the random state is the default generator's;
   streams, events, NVTX, synchronisation and memory statistics do nothing. ``is_available()`` stays False.
2. torch's tensor factories, ``Tensor.to``, ``Tensor.cuda`` and ``Module.cuda`` take a CUDA device for the host, and
   ``pin_memory`` for nothing. They are wrapped one by one: a ``TorchFunctionMode`` would tax every operation.
   ``Tensor.type()`` answers as CUDA tensors do, because Megatron's optimizers compare that string.
3. ``torch.compile`` (Megatron's ``jit_fuser``) runs eagerly: there may be no C++ compiler, and tiny models don't gain.
4. In Megatron: the state functions of the RNG tracker, the default of ``initialize_megatron(allow_no_cuda=...)``, the
   compilation of fused kernels, the norm of a ``CLIPViTModel`` built without Transformer Engine (it would be a
   ``torch.nn.LayerNorm``, which doesn't take the arguments Megatron passes), and the sizes by which experts exchange
   tokens (tensors of the host, which ``all_to_all_single`` refuses).

Flags a script needs beside this: ``--distributed-backend gloo --transformer-impl local --attention-backend unfused
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
--no-persist-layer-norm --no-rope-fusion`` (:data:`CPU_FLAGS`).
"""

from __future__ import annotations

import functools
import logging
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from ..compat.host import adapt_core, adapt_training
from ..compat.process_groups import adapt_gloo_groups
from ..compat.releases import has_training_loop

CPU_FLAGS = (
    "--distributed-backend", "gloo",
    "--transformer-impl", "local",
    "--attention-backend", "unfused",
    "--use-cpu-initialization",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
)  # fmt: skip

_HOST = torch.device("cpu")
_MARK = "_answers_on_the_host"


def install_cpu_platform() -> bool:
    """Let Megatron run on CPU and gloo, in this process.

    Imports Megatron. May be called any number of times, before or after Megatron is imported. Uses one thread per
    process unless ``OMP_NUM_THREADS`` says otherwise: with several ranks on a machine more threads are much slower.

    Returns True if the platform is installed, False (and nothing was touched) if CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # demanded of CUDA devices with tensor parallelism
    if getattr(torch.cuda.current_device, _MARK, False):
        return True
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    _silence()
    adapt_gloo_groups()
    # Megatron and the compiler first: torch._dynamo builds tables of torch's own functions when it is imported.
    adapt_core(_get_state, _set_state)
    if has_training_loop():
        adapt_training()
    torch.compiler.set_stance("force_eager")
    _replace_cuda_functions()
    _replace_factories()
    _replace_tensor_methods()
    return True


class _Stream:
    """Work on the host is done when the call returns: every wait is over before it begins."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """An event that keeps the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, _: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, _: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _Event) -> float:
        """Milliseconds between two events."""
        return (later.seconds - self.seconds) * 1000.0


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed_all, which is this function.
    torch.default_generator.manual_seed(seed)


def _current_device() -> torch.device:
    return _HOST


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _no_context(*_: Any, **__: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _own(value: Any) -> Any:
    """A function of the same code: torch._dynamo has one rule for each function and refuses one under two names."""
    if not isinstance(value, FunctionType):
        return value
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, value.__closure__)
    copy.__dict__.update(value.__dict__)
    return copy


def _replace_cuda_functions() -> None:
    setattr(_current_device, _MARK, True)
    properties = SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count())
    replacements: dict[str, Any] = {
        "current_device": _current_device,
        "device_count": lambda: 1,  # megatron.training sets up its process groups only where it counts a device
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (0, 0),
        "get_device_name": lambda *_: "cpu",
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": _get_state,
        "set_rng_state": _set_state,
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "initial_seed": torch.initial_seed,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": _no_context,
        "device": _no_context,
        "memory_stats": lambda *_: defaultdict(int),
        "mem_get_info": lambda *_: (0, 0),
    }
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect"):
        replacements[name] = _nothing
    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated"):
        replacements[name] = _nothing
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replacements[name] = _zero
    replacements["device_memory_used"] = _zero
    for name, value in replacements.items():
        setattr(torch.cuda, name, _own(value))
    torch.cuda.random.get_rng_state = _get_state
    torch.cuda.random.set_rng_state = _set_state
    torch.cuda.nvtx.range_push = _own(_nothing)
    torch.cuda.nvtx.range_pop = _own(_nothing)
    torch.cuda.nvtx.range = _no_context


def _is_cuda(device: Any) -> bool:
    """Whether ``device``, in any form torch takes, means a CUDA device."""
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _hosted(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its ``device`` keyword on the host and without ``pin_memory``."""

    @functools.wraps(function)
    def on_host(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = _HOST
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return on_host


def _replace_factories() -> None:
    names = (
        "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
        "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
    )  # fmt: skip
    for name in names:
        setattr(torch, name, _hosted(getattr(torch, name)))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, _hosted(getattr(torch.Tensor, name)))


def _replace_tensor_methods() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type
    module_to, module_to_empty = torch.nn.Module.to, torch.nn.Module.to_empty

    def to_host(function: Callable[..., Any], kinds: tuple[type, ...]) -> Callable[..., Any]:
        @functools.wraps(function)
        def move(self: Any, *args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], kinds) and _is_cuda(args[0]):
                args = (_HOST, *args[1:])
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = _HOST
            return function(self, *args, **kwargs)

        return move

    @functools.wraps(tensor_type)
    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        if isinstance(answer, str) and self.is_floating_point() and answer.startswith("torch."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    device_forms = (str, torch.device, int)
    torch.Tensor.to = to_host(tensor_to, device_forms)
    torch.nn.Module.to = to_host(module_to, device_forms)
    torch.nn.Module.to_empty = to_host(module_to_empty, device_forms)
    torch.Tensor.type = type_as_on_cuda
    torch.Tensor.cuda = stay
    torch.Tensor.pin_memory = stay
    torch.Tensor.record_stream = _own(_nothing)
    torch.nn.Module.cuda = stay


def _silence() -> None:
    """Drop warnings that state what this platform is: no accelerator, no Transformer Engine or Apex, one generator."""
    for message in (
        ".*'pin_memory' argument is set as true but no accelerator",
        "(Transformer Engine and )?Apex (is|are) not installed",
        "Only transformer-engine>=",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )
