"""The schedule of ``docs/add-a-schedule.md``, from outside the package: found, planned, verified, trained with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dip_megatron.core.files import read_plans
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import Effort, Setting, make_planner
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.schedulers import registry
from dip_megatron.schedulers.registry import UnknownScheduleError, find_schedule, register_schedule
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_schedule"


def installed(folder: Path, value: str = "gpipe:GPIPE") -> Path:
    """A folder of the import path as an installation leaves it: the example, and the entry point that it declares."""
    info = folder / "own_schedule-0.1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "gpipe.py").write_text((EXAMPLE / "gpipe.py").read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-schedule\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[dip_megatron.schedules]\ngpipe = {value}\n")
    return folder


@pytest.fixture
def gpipe(tmp_path, monkeypatch):
    """The registry with the example in it."""
    monkeypatch.syspath_prepend(str(installed(tmp_path / "site")))
    registry._foreign.cache_clear()
    yield find_schedule("gpipe")
    registry._foreign.cache_clear()
    sys.modules.pop("gpipe", None)


def test_its_plans_verify(gpipe):
    model = load_model("vlm-s").with_parallel(pp=2)
    batches = load_workload("vlm-mix", model, iterations=1, microbatches=3)
    setting = Setting(model, load_cluster("h100"), batches, memory_limit=400e9)
    partition = paper_partition(model, setting.cluster, batches)
    planner = make_planner("gpipe", setting, Effort(), partition)
    for batch in setting.batches:
        planned = planner(batch.microbatches)
        verify(planned.plan())
        assert planned.fits
    assert planned.name == "gpipe"


def dip(*arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", "dip_megatron.cli", *arguments], env=env, capture_output=True, text=True
    )


def test_commands_know_it(tmp_path):
    setting = ["--model", "vlm-s", "--cluster", "h100", "--workload", "vlm-mix", "--iterations", "1", "--pp", "2",
               "--microbatches", "2", "--partition-budget", "0.1", "--memory-gb", "400"]  # fmt: skip
    done = dip("compare", *setting, "--schedules", "gpipe,megatron-1f1b", "--json", site=installed(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mean"]["gpipe"]["fits"]
    broken = dip("compare", *setting, "--schedules", "gpipe", site=installed(tmp_path / "broken", "gpipe:NOTHING"))
    assert broken.returncode == 2
    assert re.fullmatch(r"dip: --schedules: schedule 'gpipe' \(gpipe:NOTHING\) can't be loaded: .*\n", broken.stderr)


def test_a_script_may_register_it(gpipe):
    register_schedule(gpipe)
    try:
        assert find_schedule("gpipe") is gpipe
        with pytest.raises(ValueError, match="there is a schedule 'dip' already"):
            register_schedule(find_schedule("dip"))
    finally:
        registry._registered.clear()
    with pytest.raises(UnknownScheduleError, match="unknown schedule 'gpip'; choose one of dynamic, static, dip"):
        find_schedule("gpip")


@on_cpu_ranks
@needs_megatron_training
def test_it_trains_with_megatrons_gradients(tmp_path):
    site = installed(tmp_path / "site")
    trace = tmp_path / "trace"
    flags = ("--dip-schedule", "gpipe", "--dip-trace-dir", str(trace), "--dip-trace-plans")
    ours = run(tmp_path / "gpipe", *flags, options={"path": str(site)}, iterations=2)
    theirs = run(tmp_path / "megatron", dip=False, iterations=2)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.norms == pytest.approx(theirs.norms, abs=2e-3)
    assert [plan.name for plan in read_plans(trace / "plans.jsonl")] == ["gpipe", "gpipe"]


def test_the_page_quotes_the_example():
    """Every block of the page that names a file stands in it word for word."""
    page = (ROOT / "docs" / "add-a-schedule.md").read_text()
    quoted = re.findall(r"```\w+ title=\"([\w.]+)\"\n(.*?)```", page, re.DOTALL)
    assert len(quoted) == page.count(" title=") >= 4
    for name, text in quoted:
        source = (Path(__file__) if name.startswith("test_") else EXAMPLE / name).read_text()
        indented = ["".join(" " * n + line if line.strip() else line for line in text.splitlines(keepends=True))
                    for n in (0, 4)]  # fmt: skip
        assert any(block.strip("\n") in source for block in indented), f"not in {name}:\n{text}"
