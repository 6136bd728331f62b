"""What must change in Megatron itself for it to run without a GPU (:mod:`dip_megatron.megatron.cpu`)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .names import Name, Topic

TOPIC = Topic(
    "Megatron on hosts without a GPU",
    "megatron-core",
    "0.16.1, 0.19.2",
    "nothing can train on CPU ranks",
    (
        Name("megatron.core.tensor_parallel.random:_get_cuda_rng_state"),
        Name("megatron.core.tensor_parallel.random:_set_cuda_rng_state", ("new_state",)),
        Name("megatron.core.models.vision.clip_vit_model:CLIPViTModel.__init__", ("*", "ln_pre_impl", "ln_post_impl")),
        Name("megatron.core.transformer.torch_norm:WrappedTorchNorm"),
        Name("megatron.core.datasets.utils:compile_helpers", ()),
        Name(
            "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
            ("tensor", "as_numpy", "record_stream"),
        ),
    ),
)
TRAINING = Topic(
    "Megatron's training loop on hosts without a GPU",
    "megatron.training",
    "0.19.2",
    "nothing can train on CPU ranks",
    (
        Name("megatron.training.initialize:initialize_megatron", ("*", "allow_no_cuda")),
        Name("megatron.training.initialize:_compile_dependencies", ()),
    ),
)


def adapt_core(get_state: Callable[..., Any], set_state: Callable[..., None]) -> None:
    """Let the tracker of random states use these two functions, a ViT the norm that takes Megatron's arguments (without
    Transformer Engine it would be torch's), and experts exchange tokens by splits that are on the host already."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    vit = importlib.import_module("megatron.core.models.vision.clip_vit_model").CLIPViTModel
    norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    random._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = set_state  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    moved = dispatcher.maybe_move_tensor_to_cpu

    def moved_or_here(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron turns what comes from a GPU into an array, and leaves a tensor of the host's, which all_to_all_single
        # doesn't take for sizes.
        tensor = moved(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = moved_or_here  # type: ignore[attr-defined]
    utilities = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utilities, "te_general_gemm"):  # 0.16 looks it up though Transformer Engine is absent
        utilities.te_general_gemm = None  # type: ignore[attr-defined]
    initialise = vit.__init__
    initialise.__defaults__ = tuple(
        norm if default is torch.nn.LayerNorm else default for default in initialise.__defaults__
    )


def adapt_training(package: str = "megatron.training") -> None:
    """Let ``megatron.training``, or a copy of it under another name, begin without CUDA, and compile nothing for it."""
    initialize = importlib.import_module(f"{package}.initialize")
    function = initialize.initialize_megatron
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    # In place: several modules have imported the function by name.
    function.__defaults__ = tuple(
        True if name == "allow_no_cuda" else default
        for name, default in zip(names[-len(function.__defaults__) :], function.__defaults__, strict=True)
    )
    initialize._compile_dependencies = _dataset_helpers  # type: ignore[attr-defined]


def _dataset_helpers() -> None:
    """Of what Megatron compiles at its start, what it needs here: the dataset helpers, missing in a fresh checkout."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        compile_helpers = importlib.import_module("megatron.core.datasets.utils").compile_helpers
        if torch.distributed.get_rank() == 0:
            compile_helpers()
        torch.distributed.barrier()
        importlib.invalidate_caches()
