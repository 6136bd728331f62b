"""The argument group ``dip``, and what can't go together with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config import DipConfig
from ..describe.files import ConfigurationError
from ..describe.model import Parallel
from ..environment import load_settings
from ..schedulers.registry import find_schedule
from .configs import name_a_layer
from .experts import counts_over_iteration, expert_refusals


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group ``dip``; everything else is set in the YAML file."""
    group = parser.add_argument_group("dip", "dynamic, modality-aware pipeline schedules (dip_megatron)")
    group.add_argument("--dip-schedule", metavar="NAME", default=None,
                       help="off (default): Megatron's own schedule; static: one order of modality segments for every "
                       "batch; dynamic: a plan for each batch; or any other schedule that `dip compare` knows, by its "
                       "name")  # fmt: skip
    group.add_argument("--dip-plan-file", type=Path, default=None,
                       help="run the plans of this file; batches that match none are planned under --dip-schedule, or "
                       "end the run")  # fmt: skip
    group.add_argument("--dip-config", type=Path, default=None, help="YAML file; flags override it")
    group.add_argument("--dip-planner-workers", type=int, default=None, help="searching threads per replica (1)")
    group.add_argument("--dip-search-budget", type=float, default=None,
                       help="seconds of search per plan (default: what the running iteration leaves)")  # fmt: skip
    group.add_argument("--dip-memory-limit", type=float, default=None, help="bytes a rank may use (the cluster's)")
    group.add_argument("--dip-override", action="store_true", default=None,
                       help="let DIP's partition replace virtual stages and layouts that other flags give")  # fmt: skip
    group.add_argument("--dip-balance", choices=["off", "swap", "free"], default=None,
                       help="swap: exchange microbatches between replicas so that all end together; free: also change "
                       "how many each has (with --calculate-per-token-loss)")  # fmt: skip
    group.add_argument("--dip-pairing", action="store_true", default=None,
                       help="under Megatron's own schedule: each replica's microbatches longest first, so that "
                       "replicas that share experts wait less for one another")  # fmt: skip
    group.add_argument("--dip-trace-dir", type=Path, default=None,
                       help="write iterations.jsonl; trace.json and timeline.png of the last iteration")  # fmt: skip
    group.add_argument("--dip-trace-plans", action="store_true", default=None,
                       help="write the plans that ran there, too, as plans.jsonl")  # fmt: skip
    return parser


def run_config(args: argparse.Namespace) -> DipConfig:
    """The run's configuration, from flags, environment, file and defaults. Raises ConfigurationError."""
    flags = (
        "config", "schedule", "plan_file", "planner_workers", "search_budget", "memory_limit", "trace_dir",
        "trace_plans", "override", "balance", "pairing",
    )  # fmt: skip
    return load_settings({name: getattr(args, f"dip_{name}", None) for name in flags}).config


def parallel_of(args: Any) -> Parallel:
    """Parallel sizes of Megatron's arguments, validated or not."""
    return Parallel(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size, getattr(args, "data_parallel_size", 1),
        args.sequence_parallel, args.use_distributed_optimizer, args.context_parallel_size,
        getattr(args, "expert_model_parallel_size", 1), getattr(args, "expert_tensor_parallel_size", None) or 0,
        bool(getattr(args, "num_experts", None)) and counts_over_iteration(args),
    )  # fmt: skip


_WITH_OFF = "or use --dip-schedule off"


def check_arguments(args: Any) -> None:
    """Refuse, before anything is built, what DIP can't run. Raises ConfigurationError with the reason and a way out."""
    config = run_config(args)
    if not config.on:
        return
    if config.trace_plans and config.trace_dir is None:
        raise ConfigurationError("--dip-trace-plans needs --dip-trace-dir, which says where to")
    asked = f"--dip-schedule {config.schedule}" if config.schedule != "off" else "--dip-plan-file"
    for flag, reason, way_out in refusals(args):
        raise ConfigurationError(f"{asked} and {flag}: {reason}; {way_out}")


def refusals(args: Any) -> list[tuple[str, str, str]]:
    """What DIP can't run of a run's flags: flag, reason and way out of each."""
    found = []

    def refuse(condition: Any, flag: str, reason: str, way_out: str) -> None:
        if condition:
            found.append((flag, reason, way_out))

    ranks = args.pipeline_model_parallel_size
    refuse(
        ranks < 2 and run_config(args).balance == "off", f"--pipeline-model-parallel-size {ranks}",
        "there is no pipeline to schedule",
        f"use at least 2, let replicas exchange microbatches (--dip-balance swap), {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "hybrid_context_parallel", False), "--hybrid-context-parallel",
        "it gives each microbatch another group of ranks, with other shapes",
        f"use --context-parallel-size alone {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "perform_rl_step", False), "--perform-rl-step",
        "its batches are made while it trains and can't be read ahead", _WITH_OFF.removeprefix("or "),
    )  # fmt: skip
    for unfit, flag, reason, way_out in _tied_to_order(args):
        refuse(unfit, flag, reason, f"{way_out} {_WITH_OFF}")
    if getattr(args, "num_experts", None):
        for unfit, setting, reason, way_out in expert_refusals(args, parallel_of(args)):
            name, _, rest = setting.partition(" ")
            refuse(unfit, f"--{name.replace('_', '-')} {rest}".rstrip(), reason, f"{way_out} {_WITH_OFF}")
    refuse(
        getattr(args, "use_torch_fsdp2", False) or getattr(args, "use_megatron_fsdp", False), "FSDP",
        "it gathers parameters in one fixed order of layers", f"use --use-distributed-optimizer {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "defer_embedding_wgrad_compute", False), "--defer-embedding-wgrad-compute",
        "DIP defers weight gradients by plan", f"leave it out {_WITH_OFF}",
    )  # fmt: skip
    checkpoints = args.save or args.load or getattr(args, "pretrained_checkpoint", None)
    refuse(
        checkpoints and args.ckpt_format not in ("torch_dist", "torch"), f"--ckpt-format {args.ckpt_format}",
        "its files hold layers by their place on a rank, which DIP's partition changes",
        f"use --ckpt-format torch_dist {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "non_persistent_ckpt_type", None) == "local", "--non-persistent-ckpt-type local",
        "local checkpoints hold layers by their place on a rank, which DIP's partition changes",
        f"use --non-persistent-ckpt-type global {_WITH_OFF}",
    )  # fmt: skip
    return found


_KNOWS_PLACES = (
    "logits_save_dir", "logits_load_dir", "save_activations_interval", "save_dgrads_interval",
    "save_tokens_per_expert_interval", "moe_routing_trace_path",
)  # fmt: skip
_ACCUMULATES = "ddp_param_name_patterns_for_fp32_local_accumulation"
_STASHES = ("moe_paged_stash", "moe_expert_rank_capacity_factor")


def _tied_to_order(args: Any) -> list[tuple[Any, str, str, str]]:
    """What takes for granted the order, layers or processes of Megatron's own schedule, and would train or save
    something else without a word: whether it applies, the flag, the reason, the way out."""
    config = run_config(args)
    leave = "leave it out"

    def value(name: str) -> Any:
        return getattr(args, name, None)

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    tensor, between = args.tensor_model_parallel_size, args.pipeline_model_parallel_size > 2
    shards = (
        ("tensor_parallel_num_weight_shards", tensor),
        ("expert_tensor_parallel_num_weight_shards", value("expert_tensor_parallel_size") or tensor),
    )
    return [
        *((value(name), flag(name), "it knows microbatches by their order and layers by their place in a chunk, which "
           "plans change", leave) for name in _KNOWS_PLACES),
        *((value(name), flag(name), "it wraps Megatron's own schedule", leave) for name in _STASHES),
        *(((value(name) or ranks) > ranks, f"{flag(name)} {value(name)}",
           "every layer gathers its weights from ranks that have plans of their own", leave) for name, ranks in shards),
        (name_a_layer(value(_ACCUMULATES) or ()), flag(_ACCUMULATES),
         "a layer's number in it is its place in a chunk, and DIP cuts others", "use patterns without one"),
        (value("reset_attention_mask") and value("transformer_impl") == "local" and between,
         "--reset-attention-mask", "scripts give masks to the first and last rank alone, and ranks between them have "
         "other layers than in Megatron's own pipeline", "use --dataloader-inter-document-masking"),
        (value("moe_use_upcycling"), "--moe-use-upcycling",
         "it copies a dense model, layer by layer, that is built without DIP's partition",
         "convert the model in a run of its own"),
        (value("inprocess_restart"), "--inprocess-restart", "DIP's threads and planner would outlive the restart",
         "restart the job"),
        (value("deterministic_mode") and not _repeats(config), "--deterministic-mode",
         "plans follow measured times, and gradients are summed in the order of plans",
         "set recalibrate: false and search_evaluations in --dip-config, without balance, repeat another run's plans "
         "(--dip-plan-file),"),
    ]  # fmt: skip


def _repeats(config: DipConfig) -> bool:
    """Whether a run's plans are those of another run with the same chunks, data and settings."""
    if config.plan_file is not None or config.recalibrate or config.balance != "off":
        return config.plan_file is not None
    return config.search_evaluations is not None or not find_schedule(config.schedule).searches
