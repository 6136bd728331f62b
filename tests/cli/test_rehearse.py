"""``dip rehearse``: jobs of eight ranks on this machine, with faults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dip_megatron.cli import main
from dip_megatron.core import Kind, Operation, Unit
from dip_megatron.rehearsal.job import Fault, Job, Prices, price
from dip_megatron.rehearsal.launch import Lines
from dip_megatron.rehearsal.summary import Summary, limits, summarize
from tests.forked import serve

ROOT = Path(__file__).resolve().parents[2]
PARTITION = str(ROOT / "configs" / "train" / "vlm-s" / "partition.yaml")
JOB = ("--model", "vlm-s", "--workload", "vlm-mix", "--partition", PARTITION, "--microbatches", "4", "--scale", "0.05")


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The tests' own: all later ones of this process would else be forked from what a rehearsal's has loaded."""
    serve()


def test_a_mix_of_strategies_that_nobody_priced_takes_what_the_nearest_one_does() -> None:
    known: dict[str, tuple[float, ...]] = {"none": (1.0,) * 4, "full:2": (2.0,) * 4, "full:2+offload:4": (3.0,) * 4}
    prices: Prices = {(0, "language", 0, 0): known}
    operation, unit = Operation(Kind.B, "language", 0, 0, 0), Unit(0, "language", 0)
    found = [
        price(prices, 0, operation, unit, text) for text in ("full:2", "full:3", "full:1+offload:3", "activation:1")
    ]
    assert found == [2.0, 2.0, 3.0, 1.0]


def test_eight_ranks_train_every_microbatch_once_whatever_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ("--kill-planner", "1@2", "--late-planner", "0@2", "--kill-rank", "5@4", "--save-interval", "2")
    with pytest.raises(SystemExit) as ended:
        main(["rehearse", *JOB, "--jobs", "4x2", "--iterations", "5", *faults, "--keep", str(tmp_path), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    (job,) = told["jobs"]
    assert (job["ranks"], job["iterations"], job["wrong"]) == (8, 5, [])
    (restart,) = job["restarts"]
    assert restart["resumed"] == 3  # the checkpoint after two iterations
    assert 1 <= restart["told"] <= 7
    assert restart["others_left_seconds"] > 0
    assert min(job["control"], job["control_planning"]) > 0
    assert job["rank_bytes"] > 0
    assert job["planner_bytes"] > 0
    assert job["files"] > 8
    # Lines of all iterations, of both launches, and what was told of them.
    lines = [json.loads(line) for line in (tmp_path / "4x2" / "rank0.jsonl").read_text().splitlines()]
    ran = [line["iteration"] for line in lines if "iteration" in line]
    assert ran[:3] == [1, 2, 3]
    assert ran[-3:] == [3, 4, 5]
    assert max(line.get("worker_deaths", 0) for line in lines) == 0  # it is the other replica's that died
    assert next(line for line in lines if line.get("iteration") == 3)["fallback"]  # this one's was asked in vain
    other = [json.loads(line) for line in (tmp_path / "4x2" / "rank1.jsonl").read_text().splitlines()]
    assert max(line.get("worker_deaths", 0) for line in other) == 1
    assert "going on with the checkpoint's partition" in (tmp_path / "4x2" / "rank0.log").read_text()


def test_replicas_that_share_experts_plan_together_and_wait_for_one_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "moe.yaml"
    shipped = (ROOT / "configs" / "models" / "qwen3-vl-30b-a3b.yaml").read_text()
    sizes = "parallel: {tp: 1, pp: 2, dp: 2, ep: 2, etp: 1, sequence_parallel: false, distributed_optimizer: true}"
    model.write_text(re.sub("(?m)^parallel: .*$", sizes, shipped))
    command = ["rehearse", "--model", str(model), "--workload", "vlm-any-resolution", "--memory-gb", "500"]
    job = [*command, "--microbatches", "4", "--iterations", "4", "--scale", "0.05", "--budget", "0.1"]
    with pytest.raises(SystemExit) as ended:
        main([*job, "--jobs", "2x2", "--keep", str(tmp_path / "kept"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["wrong"] == []
    predicted = [
        [json.loads(line).get("predicted_seconds") for line in (tmp_path / "kept" / "2x2" / name).open()]
        for name in ("rank0.jsonl", "rank1.jsonl")
    ]
    assert predicted[0] == predicted[1]  # both replicas' time together
    with pytest.raises(SystemExit) as ended:
        main([*job, "--jobs", "2x3"])
    assert ended.value.code == 2
    assert "--jobs 2x3: 2 replicas of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--jobs", "4"), "PIPELINExREPLICAS"),
        (("--kill-planner", "0"), "'0': a fault is WHO@ITERATION"),
        (("--kill-rank", "8@1"), "global rank 8 is killed as iteration 1 begins: this job has 2 replicas, 8 ranks"),
        (("--workload", "no-such-mix"), "no-such-mix"),
    ],
)
def test_bad_input_gets_one_line(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rehearse", *JOB, *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def line(iteration: int, numbers: int, **fields: Any) -> dict[str, Any]:
    names = (
        "measured_seconds", "predicted_seconds", "latency_seconds", "stall_seconds", "control_core_seconds",
        "stage_core_seconds", "gloo_core_seconds", "before_first_action", "exchange_seconds",
        "exchange_stall_seconds", "moved", "sent_bytes", "late_plans", "worker_deaths", "fallback",
    )  # fmt: skip
    return dict.fromkeys(names, 0) | {"iteration": iteration, "numbers": numbers} | fields


def summary(job: Job, control: float, files: int, doubled: int = 0) -> Summary:
    """Of a job whose ranks' lines say so; microbatches ``doubled`` in its last iteration."""
    held = {"own_bytes": 2, "planner_bytes": [], "files": files, "threads": 1, "most_files": 2048}
    iterations = []
    for rank in range(job.ranks):
        replica, stage = rank % job.replicas, rank // job.replicas
        own = [sum(job.numbers(replica, i)) if stage == job.stages - 1 else 0 for i in range(job.iterations)]
        own[-1] += doubled if rank == job.ranks - 1 else 0
        iterations.append([line(i + 1, n, control_core_seconds=control) for i, n in enumerate(own)])
    return summarize(job, Lines(iterations, [held] * job.ranks, 1.0, ()))


def test_what_grows_with_the_job_is_told_with_where_it_ends() -> None:
    from dip_megatron.describe.model import load_model
    from dip_megatron.describe.workload import load_workload

    def job(stages: int, replicas: int) -> Job:
        model = load_model("vlm-s").with_parallel(tp=None, pp=stages, dp=replicas)
        batches = load_workload("vlm-mix", model, 3 * replicas, 4, 0)
        microbatches = tuple(m for b in batches for m in b.microbatches)
        return Job(model, "h100", None, None, None, microbatches, 4, replicas, {})  # type: ignore[arg-type]

    jobs = [job(4, 1), job(4, 2), job(8, 2)]
    found = [summary(j, 1e-3 + 1e-4 * j.ranks, 10 + 2 * j.ranks) for j in jobs]
    assert [s.wrong for s in found] == [(), (), ()]
    text = " ".join(limits(found))
    assert "grows by 100 us a rank, and is 1% of a second at about 90 ranks" in text
    assert "2.0 more with each rank: the usual limit of 1024 (ulimit -n) is reached at about 507 ranks" in text
    wrong = summary(jobs[0], 1e-3, 10, doubled=1)
    assert wrong.wrong == (3,)
    assert "4 x 1: iterations 3 trained on other microbatches" in " ".join(limits([wrong]))


def test_a_fault_says_what_it_is() -> None:
    assert str(Fault.read("planner dies", "1@3")) == "the planner of replica 1 is killed as iteration 3 begins"
