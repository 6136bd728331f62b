"""``dip doctor`` in the environment that runs the tests, and in ones that lack something."""

import json
import subprocess
import sys

import pytest

from dip_megatron.compat import linears
from dip_megatron.compat.names import Name, Topic
from dip_megatron.compat.releases import has_training_loop
from dip_megatron.doctor import Check, Status, diagnose, libraries, machine, places
from dip_megatron.doctor.checks import CHECKS

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


def run(*missing: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status and checks by name, in a process that can't import ``missing``."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing)], capture_output=True, text=True, timeout=240
    )
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

    found = diagnose([first, machine.cores])
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
