"""Virtual stages and layouts that flags give: Megatron's own numbers of layers, and a run that takes them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from dip_megatron.describe.model import load_model
from dip_megatron.megatron.adapters.layout import given_layout, take_layout
from dip_megatron.megatron.chunks import unlike_the_loop
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.upstream.runs import HERE, run_script

SCRIPT = HERE / "pretrain_tiny_gpt.py"


@given(
    ranks=st.integers(2, 5), virtual=st.integers(1, 3), each=st.integers(1, 4),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    given_ends=st.tuples(st.booleans(), st.booleans()), accounts=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_layers_are_megatrons(
    ranks: int, virtual: int, each: int, ends: tuple[int, int], given_ends: tuple[bool, bool],
    accounts: tuple[bool, bool],
) -> None:  # fmt: skip
    first, last = (virtual * end if asked else None for end, asked in zip(ends, given_ends, strict=True))
    if first is not None or last is not None:
        accounts = (False, False)
    middle = ranks - (first is not None) - (last is not None)
    layers = virtual * each * middle + (first or 0) + (last or 0) - sum(accounts)
    flags: dict[str, Any] = {
        "decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last,
        "account_for_embedding_in_pipeline_split": accounts[0], "account_for_loss_in_pipeline_split": accounts[1],
        "num_virtual_stages_per_pipeline_rank": virtual if virtual > 1 else None,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
    }  # fmt: skip
    args = Namespace(num_layers=layers, pipeline_model_parallel_size=ranks, **flags)
    layout = given_layout(args)
    if all(value is None or value is False for value in flags.values()):
        assert layout is None
        return
    assert layout is not None
    config = Namespace(
        num_layers=layers, pipeline_model_parallel_size=ranks, pipeline_model_parallel_layout=None,
        virtual_pipeline_model_parallel_size=flags["virtual_pipeline_model_parallel_size"],
        num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=accounts[0], account_for_loss_in_pipeline_split=accounts[1],
    )  # fmt: skip
    for stage, line in enumerate(layout.layers):
        for rank, count in enumerate(line):
            assert count == get_num_layers_to_build(config, vp_stage=stage if virtual > 1 else None, pp_rank=rank)
    take_layout(args)
    assert given_layout(args) is None
    assert args.virtual_pipeline_model_parallel_size is None


def test_a_layout_is_read_as_megatron_reads_it() -> None:
    args = Namespace(num_layers=6, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tt|t|ttL")
    layout = given_layout(args)
    assert layout is not None
    assert layout.layers == ((1, 2), (1, 2))
    assert str(layout) == "--pipeline-model-parallel-layout"
    args.num_layers = 7
    assert given_layout(args) is None


@on_cpu_ranks
@needs_megatron_training
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-virtual-stages-per-pipeline-rank", "2"), "language: layers ((1, 1), (1, 1)), as --num-virtual-stages"),
        (("--pipeline-model-parallel-layout", "Et|ttL|t|L"), "language: layers ((1, 2), (1, 0)), as --pipeline-model"),
        (
            ("--cuda-graph-impl", "local", "--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"),
            "CUDA graphs are switched off",  # which ends Megatron's own validation here
        ),
        (("--num-virtual-stages-per-pipeline-rank", "2", "--dip-override"), "sub-microbatches of"),
    ],
)
def test_virtual_stages_and_layouts_train_as_chunks_of_dip(
    whole: dict[int, float], flags: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    run = run_script("run", SCRIPT, tmp_path, "--dip-schedule", "dynamic", *flags, ranks=2, start=forked)
    assert run.losses == pytest.approx(whole, rel=1e-5)
    assert said in (tmp_path / "run.rank0.log").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Without DIP, on one rank."""
    return run_script("absent", SCRIPT, tmp_path_factory.mktemp("whole"), ranks=1, start=forked).losses


def test_what_differs_from_the_loop_is_said() -> None:
    """Deepstack with sequence parallelism into an encoder that trains; nothing of models without any of these."""
    model = load_model("qwen3-vl-8b")
    assert "docs/with-megatron-bridge.md" in str(unlike_the_loop(model))
    frozen = tuple(replace(m, trainable=()) if m.taps else m for m in model.modules)
    for other in (
        replace(model, modules=frozen),
        replace(model, parallel=replace(model.parallel, sequence_parallel=False)),
        load_model("qwen2-5-vl-7b"),
    ):
        assert unlike_the_loop(other) is None
