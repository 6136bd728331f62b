"""The three-module example of ``docs/add-a-model.md``: losses and gradients of Megatron's run, whatever the plan."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind
from dip_megatron.core.strategies import strategy_names
from dip_megatron.describe.model import Parallel
from examples.llava_digits.runs import train
from tests.drawn import settings_of_ranks
from tests.examples.three_modules_case import (
    LONG,
    SHORT,
    SMALL,
    TALL,
    WIDE,
    Held,
    ThreeModuleCase,
    batches,
    blueprint,
    dip_run,
    reference,
)
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.processes import ProcessFailure, team
from tests.runtime.equal import assert_gradients_equal, assert_losses_equal, merged
from tests.runtime.llava_case import initialize
from tests.runtime.split_case import Drawn

MIXED = (
    Held((SMALL, TALL, WIDE), (LONG, SHORT)),
    Held((), (SHORT, SHORT, LONG)),
    Held((WIDE, SMALL, TALL, TALL, SMALL)),
    Held(text=17),
)
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "three_modules"


Layers = tuple[tuple[int, ...], ...]


def check(case: ThreeModuleCase, world: int, drawn: Drawn):
    """Equality with Megatron's PP1 run; what each rank ran."""
    answers = team(world).run(dip_run, case, drawn)
    losses, grads = merged([a[:2] for a in answers])
    assert len(losses[0]) == len(case.held)
    their_losses, their_grads = team(1).run(reference, case)[0]
    assert_losses_equal(their_losses, losses[0])
    assert_gradients_equal(their_grads, grads)
    return [a[2] for a in answers]


def held(images: int, clips: int):
    return st.builds(
        Held,
        st.lists(st.sampled_from([SMALL, WIDE, TALL]), max_size=images).map(tuple),
        st.lists(st.sampled_from([SHORT, LONG]), max_size=clips).map(tuple),
        st.integers(1, 9),
    )


@settings_of_ranks(8)
@given(
    microbatches=st.lists(held(5, 3), min_size=1, max_size=4).map(tuple),
    sizes=st.tuples(st.sampled_from([None, 1, 2]), st.sampled_from([None, 1, 2])),
    segments=st.booleans(),
    frozen=st.sampled_from([(), (), ("vision",), ("vision", "audio")]),
    strategies=st.sets(st.sampled_from(strategy_names()), min_size=1).map(sorted).map(tuple),
    per_token=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_two_ranks_equal_one(microbatches, sizes, segments, frozen, strategies, per_token, seed):
    vision: Layers = ((1, 1), (1, 2))
    audio: Layers = ((1, 0), (1, 1))
    language: Layers = ((1, 1), (0, 1))
    if not segments:
        vision, audio, language = vision[:1], audio[1:], language[:1]
    unit_size = {"vision": sizes[0], "audio": sizes[1], "language": None}
    case = ThreeModuleCase(microbatches, vision, audio, language, unit_size, frozen, per_token)
    check(case, 2, Drawn(seed, 0.6, strategies))


@pytest.mark.parametrize("trains", ["coin 1", "coin 2", "^language", r"^(vision|audio)\.projector", r"^audio"])
def test_what_a_script_froze_later(trains):
    layers = ((1, 1), (1, 2)), ((1, 0), (1, 1)), ((1, 1), (0, 1))
    check(ThreeModuleCase(MIXED, *layers, trains=trains), 2, Drawn(2, 0.6, strategy_names()))


def test_four_ranks_equal_one():
    case = ThreeModuleCase(
        MIXED, vision=((1, 1, 1, 1), (1, 0, 1, 1)), audio=((0, 1, 0, 1),), language=((1, 1, 1, 1), (1, 1, 1, 0))
    )
    check(case, 4, Drawn(5, 0.6, strategy_names()))


def test_a_frozen_encoder_trains_its_projector_alone():
    first, last = check(ThreeModuleCase(MIXED, frozen=("vision",)), 2, Drawn(1, 1.0))
    assert {kind for module, kind in first if module == "vision"} == {Kind.F}
    assert {kind for module, kind in last if module == "vision"} == {Kind.F, Kind.B, Kind.W}
    assert {kind for module, kind in first if module == "audio"} == {Kind.F, Kind.B, Kind.W}


def test_evaluation():
    case = ThreeModuleCase(MIXED)
    losses = team(2).run(dip_run, case, Drawn(), True)[-1][0][0]
    assert_losses_equal(team(1).run(reference, case)[0][0], losses)


def described(rank, world):
    """Parameters of the planner's view and of the model, and the counts of each microbatch."""
    initialize(world)
    from dip_megatron.runtime.protocol import MicrobatchInputs
    from examples.three_modules.model import ThreeModuleModel

    case = ThreeModuleCase(MIXED)
    family, asked = blueprint(case, 1)
    view = family.describe(asked, Parallel(1, 1, 1, False, False))
    left_out = ("bias", "final_layernorm.weight")
    parameters = ThreeModuleModel(asked.kwargs["settings"]).named_parameters()
    real = sum(p.numel() for name, p in parameters if not name.endswith(left_out))
    program = family.program(asked, dict.fromkeys(case.layers, ((2,),)), rank=0, micro_batch_size=1)
    names = ("tokens", "labels", "images", "clips")
    given = [MicrobatchInputs(program.bind(**{name: item[name] for name in names})) for item in batches(case)]
    return view.parameters, real, [program.load(inputs) for inputs in given]


def test_the_planner_sees_the_model_and_its_batches_as_they_are():
    said, real, loads = team(1).run(described)[0]
    assert said == real
    assert [load.images for load in loads] == [(1, 6, 3), (), (3, 1, 6, 6, 1), ()]
    assert [load.audios for load in loads] == [(5, 1), (1, 1, 5), (), ()]
    assert [load.text_tokens for load in loads] == [5, 5, 5, 17]


def partitioned(rank, world):
    """Layers of each module in the partitioner's choice for two ranks, judged by the family's workload."""
    initialize(world)
    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.describe.workload import load_workload
    from dip_megatron.planner.partitioning import choose_partition

    family, asked = blueprint(ThreeModuleCase(MIXED), 2)
    view = family.describe(asked, Parallel(1, 2, 1, False, False))
    batches = load_workload(family.workload, view, 1, 2)
    partition = choose_partition(view, load_cluster("cpu"), batches, budget_seconds=0.2)
    return {part.module: part.total for part in partition.modules}


def test_the_partitioner_can_cut_it():
    assert team(1).run(partitioned)[0] == {"vision": 2, "audio": 2, "language": 2}


def test_planner_workers_know_it_without_torch():
    command = "import sys, three_modules.shapes; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=EXAMPLE.parent).returncode == 0


def refused(rank, world, what):
    initialize(world)
    from dip_megatron.runtime.protocol import MicrobatchInputs
    from examples.three_modules.model import ThreeModuleModel

    case = ThreeModuleCase(MIXED)
    if what == "pipeline":
        family, asked = blueprint(case, 2)
        ThreeModuleModel(asked.kwargs["settings"])
    family, asked = blueprint(case, 1)
    program = family.program(asked, case.layers, rank=0, micro_batch_size=2 if what == "samples" else 1)
    item = batches(case)[0]
    if what == "size":
        item["images"][1] = torch.zeros(3, 4, 6)
    del item["mask"], item["clips"][:1]
    program.load(MicrobatchInputs(program.bind(**item)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pipeline", "has no pipeline of its own: .* run it through DIP"),
        ("samples", "--micro-batch-size 2: must be 1"),
        ("size", r"an instance of shape \(3, 4, 6\), expected \[3, height, width\] in patches of \(4, 4\)"),
        ("places", r"clips: they become 1 tokens, the sequence has 6 places for them \(token -2\)"),
    ],
)
def test_what_cannot_be_is_refused(what, message):
    with pytest.raises(ProcessFailure, match=message):
        team(1).run(refused, what)


@on_cpu_ranks
@needs_megatron_training
def test_dip_trains_with_megatrons_losses(tmp_path):
    """The pretrain script under Megatron's loop: two ranks through ``dip run``, one without a pipeline, and one that
    goes on from where the two stopped."""

    def pretrain(name: str, ranks: int, *flags: str):
        launcher = ["-m", "dip_megatron.cli", "run"] if ranks > 1 else []
        small = {"--train-iters": 5, "--lr-warmup-iters": 1, "--eval-iters": 1, "--pipeline-model-parallel-size": ranks}
        flags = (*(str(word) for pair in small.items() for word in pair), *flags)
        command = [sys.executable, *launcher, str(EXAMPLE / "pretrain.py"), *flags]
        return train(name, command, tmp_path, lambda *_: None, ranks, forked).losses

    saved = str(tmp_path / "saved")
    stop = ("--save", saved, "--save-interval", "4", "--exit-interval", "4")
    ours = pretrain("dip", 2, "--dip-config", str(EXAMPLE / "dip.yaml"), *stop)
    theirs = pretrain("whole", 1)
    assert sorted(ours) == [1, 2, 3, 4]
    assert ours | {5: theirs[5]} == pytest.approx(theirs, rel=1e-5)
    assert pretrain("resumed", 1, "--load", saved) == pytest.approx({5: theirs[5]}, rel=1e-5)
    log = (tmp_path / "dip.rank1.log").read_text()
    assert "[dip] iteration 4" in log
    assert "can't defer weight gradients" not in log


PAGES = EXAMPLE.parents[1] / "dip_megatron" / "families" / "multimodal"


def test_the_walkthrough_quotes_the_example():
    """Every Python block of the page names a file, of the example or a page of a family, and stands in it word for
    word."""
    page = (EXAMPLE.parents[1] / "docs" / "add-a-model.md").read_text()
    quoted = re.findall(r"```python title=\"([\w.]+)\"\n(.*?)```", page, re.DOTALL)
    assert len(quoted) == page.count("```python") >= 8
    for name, text in quoted:
        here = EXAMPLE / name
        source = (here if here.exists() else PAGES / name).read_text()
        # The page shows them without their indentation in the file.
        levels = [textwrap.indent(text.strip("\n"), " " * level) for level in (0, 4, 8)]
        parts = [re.split(r"\n *\.\.\.\n", text) for text in levels]
        assert any(all(part in source for part in whole) for whole in parts), f"not in {name}:\n{text}"
