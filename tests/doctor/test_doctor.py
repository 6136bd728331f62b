"""``dip doctor`` in the environment that runs the tests, and in ones that lack something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dip_megatron.compat import linears
from dip_megatron.compat.names import Name, Topic
from dip_megatron.compat.releases import has_training_loop
from dip_megatron.core.simulate import compiled
from dip_megatron.doctor import Check, Status, diagnose, kernels, libraries, machine, places
from dip_megatron.doctor.checks import CHECKS
from dip_megatron.doctor.settings import settings_of
from tests.patience import LONG

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from dip_megatron.cli import main
main(["doctor", "--json"])
"""


def run(*missing: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status and checks by name, in a process that can't import ``missing``, with an ``environment`` of its own
    beside this one's."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing)], capture_output=True, text=True, timeout=LONG,
        env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def test_this_environment_is_sound() -> None:
    status, checks = run()
    assert status == 0
    loop = checks["megatron.training"]
    assert loop["status"] == ("ok" if has_training_loop() else "limited")
    assert bool(loop["consequence"] and loop["way_out"]) is not has_training_loop()
    hooked = checks.get("flags, models and checkpoints of megatron.training")
    assert (hooked is not None and hooked["status"] == "ok") is has_training_loop()
    assert checks["planning"]["status"] == checks["torch"]["status"] == checks["Megatron-Core"]["status"] == "ok"
    assert checks["Apex"]["status"] == checks["Transformer Engine"]["status"] == "limited"
    assert "assert len(steps) == 1" in checks["resuming --use-distributed-optimizer"]["consequence"]


def test_without_torch_nothing_trains_and_the_rest_is_told() -> None:
    status, checks = run("torch", "megatron")
    assert status == 1
    assert checks["torch"]["status"] == checks["Megatron-Core"]["status"] == "broken"
    assert checks["planning"]["status"] == checks["cores for planning"]["status"] == "ok"


def test_compiled_kernels_that_are_not_there_yet_are_told_with_what_it_takes(tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        check = run("torch", "megatron", NUMBA_CACHE_DIR=str(tmp_path))[1]["compiled kernels"]
        assert check["status"] == "limited"
        assert f"in {tmp_path}" in check["detail"]
        assert check["way_out"] == "compile them now: dip doctor --compile"
        seen.append((" s to compile" in check["detail"], " s of a core" in check["consequence"]))
    assert seen == [(True, True), (False, False)]  # those that check plans are compiled once


def test_a_folder_that_takes_no_compiled_kernels_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "kernels")
    check = run("torch", "megatron", NUMBA_CACHE_DIR=folder)[1]["compiled kernels"]
    assert check["status"] == "limited"
    assert f"NUMBA_CACHE_DIR={folder} can't be written to" in check["detail"]
    assert "set NUMBA_CACHE_DIR" in check["way_out"]


def test_kernels_that_can_be_kept_nowhere_cost_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that may write to none of its folders."""
    monkeypatch.setattr(compiled, "kept_in", lambda _: None)
    (check,) = diagnose([kernels.kernels])
    assert check.status is Status.LIMITED
    assert "no folder to keep them in can be written to" in check.detail
    assert "at every start" in check.consequence
    assert "NUMBA_CACHE_DIR" in check.way_out


def test_what_has_no_consequence_is_fine_and_what_has_one_says_it() -> None:
    for check in diagnose(CHECKS):
        assert bool(check.consequence) is (check.status is not Status.OK), check


def test_a_name_that_has_gone_is_broken_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Topic("linears", "megatron-core", "0.16.1", "nothing splits", (Name("megatron.core.utils:gone_in_0_20"),))
    monkeypatch.setattr(linears, "TOPIC", gone)
    check = next(check for check in diagnose([places.places]) if check.name == "linears")
    assert check.status is Status.BROKEN
    assert "gone_in_0_20" in check.detail
    assert check.consequence == "nothing splits"
    assert "compat/linears.py" in check.way_out


def test_a_check_that_fails_itself_is_told_with_the_others() -> None:
    def first() -> list[Check]:
        raise OSError("no such library\nand more")

    begun: list[str] = []
    found = diagnose([first, machine.cores], begun.append)
    assert begun == ["first", "cores"]
    assert found[0].status is Status.BROKEN
    assert found[0].detail == "OSError: no such library"
    assert found[1].name == "cores for planning"


@pytest.mark.parametrize(
    ("present", "status", "words"),
    [
        ({"apex"}, Status.LIMITED, "not NVIDIA's"),
        ({"apex", "apex.multi_tensor_apply", "amp_C"}, Status.LIMITED, "without fused_weight_gradient_mlp_cuda"),
        ({"apex.multi_tensor_apply", "amp_C", "fused_weight_gradient_mlp_cuda"}, Status.OK, "weight gradients fused"),
    ],
)
def test_nvidias_apex_is_told_from_the_other(
    present: set[str], status: Status, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "importable", present.__contains__)
    (check,) = libraries.apex()
    assert check.status is status
    assert words in check.detail


def shown(monkeypatch: pytest.MonkeyPatch, *flags: str, **environment: str) -> dict[str, Check]:
    """Checks of settings, by name."""
    for name in [name for name in os.environ if name.startswith("DIP_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {check.name: check for check in diagnose([settings_of(flags)])}


def test_each_setting_says_what_has_set_it_and_what_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "dip.yaml"
    file.write_text("schedule: zb-h1\nsearch_budget: 0.5\ncluster: cpu\n")
    flags = ("--num-layers", "3", "--dip-schedule", "dynamic", "--dip-config", str(file))
    found = shown(monkeypatch, *flags, DIP_SCHEDULE="static", DIP_SEARCH_BUDGET="0.1")
    said = {name: check.detail for name, check in found.items()}
    by_default = said.pop("settings by default")
    assert said == {
        "setting schedule": f"dynamic, by --dip-schedule; DIP_SCHEDULE in the environment has static; {file} has zb-h1",
        "setting search_budget": f"0.1, by DIP_SEARCH_BUDGET in the environment; {file} has 0.5",
        "setting cluster": f"cpu, by {file}",
    }
    assert "planner_workers 1" in by_default
    assert "schedule" not in by_default


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ((), {"DIP_SCHEDULE": "statc"}, "DIP_SCHEDULE=statc: schedule: unknown schedule 'statc'"),
        (("--dip-shedule", "dynamic"), {}, "--dip-shedule: no flag of dip_megatron's"),
        (("--dip-planner-workers", "x"), {}, "argument --dip-planner-workers: invalid int value: 'x'"),
        (("--dip-config", "/no/such.yaml"), {}, "/no/such.yaml"),
    ],
)
def test_settings_that_no_run_can_have(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    (check,) = shown(monkeypatch, *flags, **environment).values()
    assert check.status is Status.BROKEN
    assert said in check.detail
