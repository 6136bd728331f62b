"""The argument group ``dip``, and what can't go together with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config import DipConfig
from ..describe.files import ConfigurationError


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
    group.add_argument("--dip-trace-dir", type=Path, default=None,
                       help="write iterations.jsonl; trace.json and timeline.png of the last iteration")  # fmt: skip
    group.add_argument("--dip-trace-plans", action="store_true", default=None,
                       help="write the plans that ran there, too, as plans.jsonl")  # fmt: skip
    return parser


def dip_config(args: argparse.Namespace) -> DipConfig:
    """The run's configuration. Raises ConfigurationError."""
    return DipConfig.load(
        args.dip_config,
        {
            "schedule": args.dip_schedule,
            "planner_workers": args.dip_planner_workers,
            "search_budget": args.dip_search_budget,
            "memory_limit": args.dip_memory_limit,
            "trace_dir": args.dip_trace_dir,
            "trace_plans": getattr(args, "dip_trace_plans", None),
            "plan_file": getattr(args, "dip_plan_file", None),
        },
    )


_WITH_OFF = "or use --dip-schedule off"


def check_arguments(args: Any) -> None:
    """Refuse, before anything is built, what DIP can't run. Raises ConfigurationError with the reason and a way out."""

    def refuse(condition: Any, flag: str, reason: str, way_out: str) -> None:
        if condition:
            raise ConfigurationError(f"{asked} and {flag}: {reason}; {way_out}")

    config = dip_config(args)
    if not config.on:
        return
    asked = f"--dip-schedule {config.schedule}" if config.schedule != "off" else "--dip-plan-file"
    if config.trace_plans and config.trace_dir is None:
        raise ConfigurationError("--dip-trace-plans needs --dip-trace-dir, which says where to")
    refuse(
        args.pipeline_model_parallel_size < 2, f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}",
        "there is no pipeline to schedule", f"use at least 2 {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        any(
            getattr(args, name, None) is not None
            for name in (
                "virtual_pipeline_model_parallel_size",  # derived from either of the others
                "num_layers_per_virtual_pipeline_stage",
                "num_virtual_stages_per_pipeline_rank",
            )
        ),
        "virtual pipeline stages",
        "DIP cuts every module into segments of its own",
        f"leave --num-layers-per-virtual-pipeline-stage (and its like) out {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "pipeline_model_parallel_layout", None) is not None, "--pipeline-model-parallel-layout",
        "layers per chunk are part of DIP's partition", f"set modules.NAME.layers in --dip-config {_WITH_OFF}",
    )  # fmt: skip
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        refuse(
            getattr(args, name, None) is not None, f"--{name.replace('_', '-')}",
            "layers per chunk are part of DIP's partition", f"set modules.NAME.layers in --dip-config {_WITH_OFF}",
        )  # fmt: skip
    refuse(
        args.context_parallel_size > 1, f"--context-parallel-size {args.context_parallel_size}",
        "payload shapes in plans don't know sequence shards of context parallelism",
        f"use tensor parallelism with --sequence-parallel {_WITH_OFF}",
    )  # fmt: skip
    evaluated = getattr(args, "eval_micro_batch_size", None)
    refuse(
        evaluated not in (None, args.micro_batch_size), f"--eval-micro-batch-size {evaluated}",
        "payload shapes in plans are those of --micro-batch-size", f"leave it out {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "perform_rl_step", False), "--perform-rl-step",
        "its batches are made while it trains and can't be read ahead", _WITH_OFF.removeprefix("or "),
    )  # fmt: skip
    refuse(
        getattr(args, "num_experts", None), "--num-experts", "how many tokens an expert gets is not known "
        "before it runs, so its time can't be planned", f"train a dense model {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "use_torch_fsdp2", False) or getattr(args, "use_megatron_fsdp", False), "FSDP",
        "it gathers parameters in one fixed order of layers", f"use --use-distributed-optimizer {_WITH_OFF}",
    )  # fmt: skip
    graphs = getattr(args, "cuda_graph_impl", "none") or "none"
    refuse(
        graphs != "none" or getattr(args, "enable_cuda_graph", False), f"CUDA graphs ({graphs})",
        "a captured iteration can't change with the batch", f"leave --cuda-graph-impl out {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "moe_paged_stash", False), "--moe-paged-stash", "it wraps Megatron's own schedule",
        f"leave it out {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "mtp_num_layers", None), "--mtp-num-layers", "multi-token prediction layers have no segment yet",
        f"leave it out {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "defer_embedding_wgrad_compute", False), "--defer-embedding-wgrad-compute",
        "DIP defers weight gradients by plan", f"leave it out {_WITH_OFF}",
    )  # fmt: skip
    checkpoints = args.save or args.load or getattr(args, "pretrained_checkpoint", None)
    refuse(
        checkpoints and args.ckpt_format != "torch_dist", f"--ckpt-format {args.ckpt_format}",
        "its files hold layers by their place on a rank, which DIP's partition changes",
        f"use --ckpt-format torch_dist {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "non_persistent_ckpt_type", None) == "local", "--non-persistent-ckpt-type local",
        "local checkpoints hold layers by their place on a rank, which DIP's partition changes",
        f"use --non-persistent-ckpt-type global {_WITH_OFF}",
    )  # fmt: skip
    refuse(
        getattr(args, "dataloader_save", None), "--dataloader-save",
        "the data loader's state is past the samples that are read ahead, so resuming would lose them",
        f"leave it out {_WITH_OFF}",
    )  # fmt: skip
