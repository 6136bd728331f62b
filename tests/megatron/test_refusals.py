"""What DIP can't run is refused before anything is built, in one line with the reason and a way out."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from dip_megatron.describe.files import ConfigurationError
from dip_megatron.megatron.arguments import check_arguments

FINE: dict[str, Any] = {
    "dip_schedule": "dynamic", "dip_config": None, "dip_planner_workers": None, "dip_search_budget": None,
    "dip_memory_limit": None, "dip_trace_dir": None, "dip_override": None,
    "pipeline_model_parallel_size": 2, "context_parallel_size": 1,
    "micro_batch_size": 1, "save": None, "load": None, "ckpt_format": "torch_dist",
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"context_parallel_size": 2}, "--context-parallel-size 2: .* context parallelism; use tensor parallelism"),
        ({"num_experts": 8}, "--num-experts: how many tokens an expert gets is not known .* train a dense model"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers: .* no segment yet; leave it out"),
        ({"use_torch_fsdp2": True}, "FSDP: .* use --use-distributed-optimizer"),
        ({"use_megatron_fsdp": True}, "FSDP: .* use --use-distributed-optimizer"),
        ({"eval_micro_batch_size": 2}, "--eval-micro-batch-size 2: payload shapes .* leave it out"),
        ({"perform_rl_step": True}, "--perform-rl-step: .* can't be read ahead; use --dip-schedule off"),
        ({"cuda_graph_impl": "local"}, r"CUDA graphs \(local\): .* leave --cuda-graph-impl out"),
    ],
)
def test_the_reason_and_the_way_out_are_named(flags: dict[str, Any], message: str) -> None:
    check_arguments(Namespace(**FINE))
    with pytest.raises(ConfigurationError, match=f"--dip-schedule dynamic and {message}") as refusal:
        check_arguments(Namespace(**FINE | flags))
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("use --dip-schedule off")
    check_arguments(Namespace(**FINE | flags | {"dip_schedule": "off"}))
