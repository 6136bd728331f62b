"""What DIP can't run is refused before anything is built, in one line with the reason and a way out."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import Parallel
from dip_megatron.megatron.arguments import check_arguments, parallel_of
from dip_megatron.megatron.configs import check_configs
from dip_megatron.megatron.experts import check_experts, joined_by_balance

FINE: dict[str, Any] = {
    "dip_schedule": "dynamic", "dip_config": None, "dip_planner_workers": None, "dip_search_budget": None,
    "dip_memory_limit": None, "dip_trace_dir": None, "dip_override": None,
    "pipeline_model_parallel_size": 2, "context_parallel_size": 1,
    "micro_batch_size": 1, "save": None, "load": None, "ckpt_format": "torch_dist",
    "tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 8, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1,
    "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel: .* use --context-parallel-size alone"),
        (
            EXPERTS | {"expert_model_parallel_size": 3},
            "--expert-model-parallel-size 3: a group of experts over 3 ranks .* spread experts over a multiple of 2",
        ),
        (EXPERTS | {"moe_enable_routing_replay": True}, "--moe-enable-routing-replay: .* leave it out"),
        (EXPERTS | {"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm: .* leave it out"),
        (
            EXPERTS | {"overlap_dispatch_backward_with_experts_wgrad": True},
            "--overlap-dispatch-backward-with-experts-wgrad: .* leave it out",
        ),
        ({"use_torch_fsdp2": True}, "FSDP: .* use --use-distributed-optimizer"),
        ({"use_megatron_fsdp": True}, "FSDP: .* use --use-distributed-optimizer"),
        ({"perform_rl_step": True}, "--perform-rl-step: .* can't be read ahead; use --dip-schedule off"),
        ({"logits_load_dir": "there"}, "--logits-load-dir: .* microbatches by their order .* leave it out"),
        ({"logits_save_dir": "there"}, "--logits-save-dir: .* leave it out"),
        ({"save_activations_interval": 1}, "--save-activations-interval: .* leave it out"),
        ({"save_dgrads_interval": 1}, "--save-dgrads-interval: .* leave it out"),
        ({"save_tokens_per_expert_interval": 1}, "--save-tokens-per-expert-interval: .* by their place in a chunk"),
        ({"moe_routing_trace_path": "there"}, "--moe-routing-trace-path: .* leave it out"),
        ({"moe_paged_stash": True}, "--moe-paged-stash: it wraps Megatron's own schedule; leave it out"),
        ({"moe_expert_rank_capacity_factor": 1.5}, "--moe-expert-rank-capacity-factor: it wraps .* leave it out"),
        (
            {"tensor_parallel_num_weight_shards": 4},
            "--tensor-parallel-num-weight-shards 4: every layer gathers its weights .* leave it out",
        ),
        ({"expert_tensor_parallel_num_weight_shards": 4}, "--expert-tensor-parallel-num-weight-shards 4: .* leave it"),
        (
            {"ddp_param_name_patterns_for_fp32_local_accumulation": ["all", "*.layers.1.mlp.*"]},
            "--ddp-param-name-patterns-for-fp32-local-accumulation: .* use patterns without one",
        ),
        (
            {"reset_attention_mask": True, "transformer_impl": "local", "pipeline_model_parallel_size": 4},
            "--reset-attention-mask: scripts give masks to the first and last rank alone, .*-inter-document-masking",
        ),
        ({"moe_use_upcycling": True}, "--moe-use-upcycling: .* a run of its own"),
        ({"inprocess_restart": True}, "--inprocess-restart: .* restart the job"),
        ({"deterministic_mode": True}, "--deterministic-mode: plans follow measured times, .* recalibrate: false and"),
    ],
)
def test_the_reason_and_the_way_out_are_named(flags: dict[str, Any], message: str) -> None:
    check_arguments(Namespace(**FINE))
    check_arguments(Namespace(**FINE | EXPERTS))
    check_arguments(Namespace(**FINE | {"context_parallel_size": 2}))
    with pytest.raises(ConfigurationError, match=f"--dip-schedule dynamic and {message}") as refusal:
        check_arguments(Namespace(**FINE | flags))
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("use --dip-schedule off")
    check_arguments(Namespace(**FINE | flags | {"dip_schedule": "off"}))


def test_weights_that_every_rank_holds_are_no_shards() -> None:
    """As Megatron's validation leaves these sizes where nobody sets them."""
    whole = {"tensor_parallel_num_weight_shards": 2, "expert_tensor_parallel_num_weight_shards": 1}
    check_arguments(Namespace(**FINE | EXPERTS | whole))


@pytest.mark.parametrize(
    ("schedule", "settings", "repeats"),
    [
        ("dynamic", {"recalibrate": False}, False), ("dynamic", {"search_evaluations": 100}, False),
        ("dynamic", {"recalibrate": False, "search_evaluations": 100}, True),
        ("dynamic", {"recalibrate": False, "search_evaluations": 100, "balance": "swap"}, False),
        ("static", {}, False), ("static", {"recalibrate": False}, True),
    ],
)  # fmt: skip
def test_a_deterministic_run_needs_plans_that_repeat(
    tmp_path: Path, schedule: str, settings: dict[str, Any], repeats: bool
) -> None:
    (tmp_path / "dip.yaml").write_text(yaml.safe_dump(settings))
    own = {"dip_config": tmp_path / "dip.yaml", "dip_schedule": schedule, "deterministic_mode": True}
    with nullcontext() if repeats else pytest.raises(ConfigurationError, match="--deterministic-mode: "):
        check_arguments(Namespace(**FINE | own))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fine_grained_activation_offloading", True), ("cpu_offloading", True), ("gtp_weight_remat_size", 2),
        ("expert_gtp_weight_remat_size", 2), ("moe_paged_stash", True), ("defer_embedding_wgrad_compute", True),
    ],
)  # fmt: skip
def test_a_config_that_goes_by_megatrons_order_is_refused(name: str, value: Any) -> None:
    """In any loop, where nothing has been said of it before."""
    with pytest.raises(ConfigurationError, match=f"DIP and {name} {value}: .*, or use --dip-schedule off"):
        check_configs([None, SimpleNamespace(**{name: value})], Parallel(tp=2, dp=4))
    check_configs([SimpleNamespace(**{name: False if value is True else 1})], Parallel(tp=2, dp=4))


@pytest.mark.parametrize(
    ("pattern", "fits"), [("*layers.10*", False), ("*.layers.[01].mlp*", False), ("*.layers.*.mlp.linear_fc2", True)]
)
def test_a_precision_of_layers_by_number_is_refused(pattern: str, fits: bool) -> None:
    """Chunks number their own layers, under Megatron's pipelines as under DIP's, which cuts others."""
    recipe = SimpleNamespace(matchers=[SimpleNamespace(pattern="*attention*"), SimpleNamespace(pattern=pattern)])
    with nullcontext() if fits else pytest.raises(ConfigurationError, match=r"its pattern .* means a layer"):
        check_configs([SimpleNamespace(quant_recipe=recipe)], Parallel(tp=2, dp=4))


def test_replicas_that_a_loss_joins_plan_together() -> None:
    """The loop's flags tell of it, or the config of the model that it builds; where neither does until it is built,
    replicas that share no experts are refused."""
    asked = {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0, 1]}
    flags = Namespace(**FINE | EXPERTS | asked | {"data_parallel_size": 4})
    check_arguments(flags)
    assert (parallel_of(flags).coupled, parallel_of(flags).sharing) == (4, 1)
    flags.moe_aux_loss_coeff = [1, 0]
    assert parallel_of(flags).coupled == 1
    config = SimpleNamespace(num_moe_experts=8, moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=1)
    (note,) = check_experts([config, None], Parallel(tp=2, dp=4, ep=8, etp=1))
    assert "in the order in which plans run them" in note
    assert check_experts([config], Parallel(tp=2, dp=4, ep=2, etp=1, joined=True)) == {note}
    said = r"joins all 4 replicas, .* alone \(1\); .*_size 8\), or use aux_loss"
    with pytest.raises(ConfigurationError, match=said):
        check_experts([config], Parallel(tp=2, dp=4, ep=2, etp=1))
    assert joined_by_balance([None, config], Parallel(tp=2, dp=4, ep=2, etp=1)).coupled == 4
    assert joined_by_balance([config], Parallel(tp=2, dp=1, ep=2, etp=1)).coupled == 1
    config.moe_router_load_balancing_type = "aux_loss"
    assert check_experts([config], Parallel(tp=2, dp=4, ep=2, etp=1)) == set()
    assert joined_by_balance([config], Parallel(tp=2, dp=4, ep=2, etp=1)).coupled == 1


class Recipe(StrEnum):
    """As Megatron's configs have it; arguments have the string."""

    delayed, tensorwise = "delayed", "tensorwise"


@pytest.mark.parametrize("recipe", ["delayed", Recipe.delayed])
def test_scales_of_all_replicas_are_refused(recipe: Any) -> None:
    """Each has a plan of its own, in which forwards come in another order, or are more."""
    config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe, tp_only_amax_red=False)
    with pytest.raises(ConfigurationError, match=r"every forward joins all 4 replicas .*; set tp_only_amax_red, or"):
        check_configs([None, config], Parallel(tp=2, dp=4))
    check_configs([config], Parallel(tp=2, dp=1))
    for fits in ({"tp_only_amax_red": True}, {"fp8": None}, {"fp8_recipe": Recipe.tensorwise}):
        check_configs([SimpleNamespace(**vars(config) | fits)], Parallel(tp=2, dp=4))


def test_copies_of_weights_in_low_precision_are_told_of() -> None:
    config = SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise", fp8_param=False)
    (note,) = check_configs([None, config], Parallel(tp=2, dp=4))
    assert "plans don't count these copies" in note
    config.fp8_param = True
    assert check_configs([config], Parallel(tp=2, dp=4)) == set()


def test_userbuffers_that_a_loop_has_left_on_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tp_comm_overlap: .*; set tp_comm_overlap to False, or use"):
        check_configs([None, SimpleNamespace(tp_comm_overlap=True)], Parallel(tp=2))
