"""The planning verbs, as a user or a script calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dip_megatron
from dip_megatron.cli import VERBS, main
from dip_megatron.core.files import format_plan, read_plans
from dip_megatron.core.verify import verify
from dip_megatron.describe.partition import read_partition
from dip_megatron.schedulers.registry import schedule_names

SETTING = ["--model", "vlm-s", "--cluster", "h100", "--workload", "vlm-mix", "--iterations", "2", "--microbatches", "4"]
QUICK = ["--budget", "0.05", "--workers", "1"]


@pytest.fixture(scope="module")
def partition(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("partition") / "p.yaml"
    assert call("partition", *SETTING, "--paper", "-o", str(path)) == 0
    return str(path)


@pytest.fixture(scope="module")
def plans(partition, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plans.jsonl"
    assert call("plan", *SETTING, *QUICK, "--partition", partition, "-o", str(path)) == 0
    return path


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def fault(capsys, *arguments: str) -> str:
    """The one line on stderr of a call that must fail with status 2."""
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("dip: ")
    return err


def test_plan_writes_plans_that_check(plans, capsys):
    found = list(read_plans(plans))
    assert len(found) == 2
    for plan in found:
        verify(plan)
        assert plan.name == "dip"
        assert plan.predicted.lower_bound <= plan.predicted.iteration_time
    assert call("check", str(plans)) == 0
    assert "2 plans, no fault" in capsys.readouterr().out
    assert call("check", str(plans), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"plans": 2, "ok": True, "fault": None}


@pytest.mark.parametrize("schedule", [s for s in schedule_names() if s != "dip"])
def test_every_schedule_plans(schedule, partition, tmp_path, capsys):
    path = tmp_path / "plans.jsonl"
    arguments = ["--schedule", schedule, "--memory-gb", "300", "--partition", partition, "-o", str(path), "--json"]
    assert call("plan", *SETTING, *QUICK, *arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schedule"] == schedule
    assert [e["fits"] for e in data["iterations"]] == [True, True]
    assert call("check", str(path)) == 0
    for entry, plan in zip(data["iterations"], read_plans(path), strict=True):
        assert plan.name == schedule
        assert plan.predicted.iteration_time == entry["iteration_time"] >= entry["lower_bound"] > 0
        assert max(plan.predicted.peak_bytes) == entry["peak_bytes"]


def test_deterministic_plans_repeat(partition, tmp_path):
    texts = []
    for workers in ("1", "2"):
        path = tmp_path / f"{workers}.jsonl"
        arguments = ["--deterministic", "--evaluations", "300", "--workers", workers, "--seed", "5", "-o", str(path)]
        assert call("plan", *SETTING, *arguments, "--partition", partition) == 0
        texts.append([[str(a) for a in line] for plan in read_plans(path) for line in plan.actions])
    assert texts[0] == texts[1]


def test_compare_prints_and_saves_the_agreed_json(partition, tmp_path, capsys):
    path = tmp_path / "compare.json"
    names = ["dip", "megatron-1f1b", "segmented-static"]
    arguments = ["--schedules", ",".join(names), "--partition", partition, "-o", str(path)]
    assert call("compare", *SETTING, *QUICK, *arguments, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text()) == data
    assert set(data) == {"iterations", "mean"}
    fields = {
        "iteration_time", "lower_bound", "bubble_ratio", "peak_bytes", "fits", "recompute_fraction", "plan_seconds",
    }  # fmt: skip
    assert len(data["iterations"]) == 2
    for entries in (*data["iterations"], data["mean"]):
        assert list(entries) == names
        assert all(set(entry) == fields for entry in entries.values())
    for name in names:
        times = [i[name]["iteration_time"] for i in data["iterations"]]
        assert data["mean"][name]["iteration_time"] == pytest.approx(np.mean(times))
    assert data["mean"]["dip"]["iteration_time"] < data["mean"]["megatron-1f1b"]["iteration_time"]
    assert call("compare", *SETTING, *QUICK, *arguments) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in names)


def test_compare_evens_replicas(partition, tmp_path, capsys):
    path = tmp_path / "compare.json"
    few = [*SETTING[:-3], "1", "--microbatches", "6"]
    names = ["--schedules", "dip,segmented-static", "--partition", partition, "--replicas", "4", "-o", str(path)]
    assert call("compare", *few, *QUICK, *names, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text()) == data
    assert (data["replicas"], data["balance"], list(data["mean"])) == (4, "swap", ["dip", "segmented-static"])
    for entry in data["mean"].values():
        assert entry["gain"] == pytest.approx(entry["slowest_before"] / entry["slowest_after"])
        assert entry["slowest_before"] > entry["slowest_after"] > 0
        assert 0 < entry["moved"] < 1
    assert call("compare", *few, *QUICK, *names, "--balance", "off") == 0
    assert capsys.readouterr().out.split().count("0%") == 2
    assert "nobody to exchange with" in fault(capsys, "compare", *few, "--balance", "swap")


def test_compare_says_what_can_not_run(partition, capsys):
    few = [*SETTING[:-1], "2"]
    names = ["--schedules", "megatron-interleaved,dip", "--memory-gb", "20", "--json"]
    assert call("compare", *few, *QUICK, "--partition", partition, *names) == 0
    mean = json.loads(capsys.readouterr().out)["mean"]
    assert mean["dip"]["fits"] is False
    assert mean["dip"]["iteration_time"] is None
    assert mean["megatron-interleaved"]["fits"] is False


def test_partition_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "p.yaml"
    assert call("partition", *SETTING, "--trials", "3", "-o", str(path), "--json") == 0
    data = json.loads(capsys.readouterr().out)
    chosen = read_partition(path)
    assert {m.module: [list(row) for row in m.layers] for m in chosen.modules} == {
        name: module["layers"] for name, module in data["modules"].items()
    }
    assert data["reasons"] == list(chosen.reasons) != []


def test_trace_and_plot(plans, tmp_path, capsys):
    plan = next(read_plans(plans))
    count = sum(len(order) for order in plan.schedule.orders)
    assert call("trace", str(plans), "-o", str(tmp_path / "t.json"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["operations"] == count
    events = json.loads((tmp_path / "t.json").read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert sum(e["ph"] == "X" for e in events) == count
    assert call("plot", str(plans), "-o", str(tmp_path / "p.svg"), "--number", "2") == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_check_names_the_first_fault_with_status_1(plans, tmp_path, capsys):
    good, other = plans.read_text().splitlines()
    record = json.loads(other)
    actions = record["actions"][1]
    a = next(i for i, text in enumerate(actions) if text.startswith("irecv"))
    del actions[a]
    path = tmp_path / "bad.jsonl"
    path.write_text(good + "\n" + json.dumps(record) + "\n")
    assert call("check", str(path)) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: plan 2: rank 1")
    assert err.count("\n") == 1
    assert call("check", str(path), "--json") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("field", ["iteration_time", "bubble_ratio", "peak_bytes"])
def test_check_refuses_false_predictions(field, plans, tmp_path, capsys):
    record = json.loads(plans.read_text().splitlines()[0])
    value = record["predicted"][field]
    record["predicted"][field] = [b * 0.5 for b in value] if isinstance(value, list) else value * 1.01
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert call("check", str(path)) == 1
    assert f"predicted.{field}" in capsys.readouterr().err


def test_check_refuses_memory_over_the_limit(plans, tmp_path, capsys):
    record = json.loads(plans.read_text().splitlines()[0])
    record["memory_limit"][2] = record["predicted"]["peak_bytes"][2] - 1000
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert call("check", str(path)) == 1
    assert "rank 2: needs" in capsys.readouterr().err


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, plans):
    assert "nope: no such file" in fault(capsys, "plan", *SETTING[:1], "nope", *SETTING[2:])
    assert "--workload" in fault(capsys, "plan", "--model", "vlm-s", "--cluster", "h100")
    assert "No such command" in fault(capsys, "dance")
    assert "unknown schedule 'nope'" in fault(capsys, "compare", *SETTING, "--schedules", "nope")
    assert "--evaluations" in fault(capsys, "plan", *SETTING, "--deterministic")
    assert "No such file" in fault(capsys, "check", str(tmp_path / "nowhere.jsonl"))
    assert "there is no plan 9" in fault(capsys, "trace", str(plans), "--number", "9")
    workload = tmp_path / "w.jsonl"
    workload.write_text('{"microbatches": [{"text_tokens": "many"}]}\n')
    message = fault(capsys, "plan", "--model", "vlm-s", "--cluster", "h100", "--workload", str(workload))
    assert f"{workload}:1: microbatches[0].text_tokens" in message
    (tmp_path / "m.jsonl").write_text("{\n")
    assert f"{tmp_path / 'm.jsonl'}:1: line: not JSON" in fault(capsys, "check", str(tmp_path / "m.jsonl"))
    assert "tp" in fault(capsys, "plan", *SETTING, "--tp", "7")


def test_a_plan_that_can_not_fit_says_by_how_much(capsys, partition):
    assert "bytes over" in fault(capsys, "plan", *SETTING, "--schedule", "megatron-1f1b", "--memory-gb", "20")
    assert "rank" in fault(capsys, "plan", *SETTING, *QUICK, "--partition", partition, "--memory-gb", "20")


def test_a_plan_read_and_written_again_is_the_same_line(plans):
    assert [format_plan(plan) for plan in read_plans(plans)] == plans.read_text().splitlines()


def test_planning_needs_neither_torch_nor_megatron(tmp_path, partition):
    script = """
import sys
for name in ("torch", "megatron", "megatron.core"):
    sys.modules[name] = None
from dip_megatron.cli import VERBS, main
main(sys.argv[1:])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(dip_megatron.__file__).parents[1])}
    plan = ["plan", *SETTING, *QUICK, "--partition", partition]
    for verb in (["--help"], plan, ["trace", "--help"], ["plot", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *verb], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr


def test_help_lists_every_verb_and_so_does_the_page_of_commands(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    page = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert verb in text
        assert f"| `dip {verb}` |" in page
    for verb in ("partition", "plan", "compare", "check", "trace", "plot", "report"):
        assert call(verb, "--help") == 0
        assert "--json" in capsys.readouterr().out


def test_a_shell_completes_verbs_and_options(capsys, monkeypatch):
    monkeypatch.setenv("_DIP_COMPLETE", "bash_complete")
    for words, wanted in (("dip est", "estimate"), ("dip report --num", "--number")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert call() == 0
        assert wanted in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["plan", "compare", "partition", "trace", "plot", "report"])
def test_where_to_write_is_looked_at_before_the_work(verb, plans, tmp_path, capsys):
    out = tmp_path / "nowhere" / "file"
    about = [str(plans)] if verb in ("trace", "plot", "report") else SETTING
    assert f"there is no folder {out.parent}" in fault(capsys, verb, *about, "-o", str(out))


def test_a_file_that_is_not_there_is_named_once(capsys):
    words = fault(capsys, "plan", *SETTING, "--costs", "nowhere.json")
    assert words == "dip: nowhere.json: file: No such file or directory\n"
    assert fault(capsys, "plan", *SETTING, "--orders", "nowhere.csv") == "dip: nowhere.csv: No such file or directory\n"


def test_a_breakdown_of_a_folder_without_a_run(tmp_path, capsys):
    assert "no iterations.jsonl in it" in fault(capsys, "trace", "--breakdown", str(tmp_path))


def test_help_of_run_is_its_own_before_the_script_and_the_scripts_behind_it(capsys, tmp_path):
    assert call("run", "--help") == 0
    assert "Run SCRIPT ARGUMENTS" in capsys.readouterr().out
    script = tmp_path / "script.py"
    assert f"{script}: no such script" in fault(capsys, "run", str(script), "--help")


def test_no_verb_shows_all_verbs(capsys):
    assert call() == 2
    assert "  compare " in capsys.readouterr().err
