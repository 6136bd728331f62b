"""``dip doctor --recipe`` with scripts and their flags."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dip_megatron.commands.doctor import doctor
from dip_megatron.megatron.cpu import install_cpu_platform
from tests.marks import needs_megatron_training

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "llava_digits" / "pretrain_llava_digits.py"
TINY = (ROOT / "examples" / "llava_digits" / "tiny.args").read_text().split()
pytestmark = needs_megatron_training


def asked(*arguments: str) -> tuple[int, list[dict[str, str]]]:
    install_cpu_platform()
    result = CliRunner().invoke(doctor, ["--json", "--recipe", *arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return int(result.return_value), json.loads(result.stdout)


def test_a_script_that_runs() -> None:
    status, checks = asked(str(DIGITS), *TINY, "--pipeline-model-parallel-size", "2")
    assert status == 0
    assert "builds LLaVAModel, of the model family llava" in {check["detail"] for check in checks}
    assert checks[-1]["detail"].startswith("nothing that can be seen before it starts")


def test_all_that_stands_in_the_way_is_named_with_a_way_out() -> None:
    status, checks = asked(str(DIGITS), *TINY, "--pipeline-model-parallel-size", "1", "--use-megatron-fsdp")
    assert status == 1
    broken = {check["name"]: check for check in checks if check["status"] == "broken"}
    assert set(broken) == {"--pipeline-model-parallel-size 1", "FSDP", str(DIGITS)}
    assert all(check["consequence"] and check["way_out"] for check in broken.values())
    assert broken[str(DIGITS)]["way_out"] == "see the 2 above"


@pytest.mark.parametrize(
    ("source", "flags", "status", "words"),
    [
        ("from megatron.training import pretrain\nimport parts", ("--pipeline-model-parallel-size", "2", "--mine"), 0,
         "flags of its own, which were not looked at: --mine"),
        ("from megatron.training import pretrain", ("--pipeline-model-parallel-size", "two"), 1, "invalid int value"),
        ("from megatron.training import pretrain", ("--pipeline-model-parallel-size", "2"), 0, "names no model"),
        ("import dip_megatron\ndip_megatron.build_model(f)", (), 0, "builds its model through DIP"),
        ("from megatron.bridge.training.pretrain import pretrain", (), 1, "FILE.py:FUNCTION"),
        ("import another_loop", (), 1, "imports neither megatron.training nor"),
        ("import (", (), 1, "invalid syntax"),
    ],
)  # fmt: skip
def test_what_a_script_is_is_read_off_its_source(
    source: str, flags: tuple[str, ...], status: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "parts.py").write_text("from megatron.core.models.gpt.gpt_model import GPTModel\n")
    script = tmp_path / "train.py"
    script.write_text(source)
    found, checks = asked(str(script), *flags)
    assert found == status
    assert words in " ".join(check["detail"] for check in checks)
    if "parts" in source:
        assert "builds GPTModel, of the model family gpt" in {check["detail"] for check in checks}


def test_a_function_that_is_not_there_or_can_not_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "recipes.py").write_text("def my_recipe():\n    pass\n")
    detail = asked(f"{tmp_path / 'recipes.py'}:my_recipy")[1][0]["detail"]
    assert detail.endswith("has no my_recipy; did you mean my_recipe?")
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    detail = asked(f"{tmp_path / 'needy.py'}:my_recipe")[1][0]["detail"]
    assert detail.endswith("; a_package_that_nobody_has isn't installed here: ask where the recipe trains")


def test_no_script_and_no_recipe() -> None:
    assert asked("nowhere.py")[1][0]["detail"] == "no such script"
    if importlib.util.find_spec("megatron.bridge") is None:
        assert "Megatron-Bridge isn't installed here" in asked("a_recipe_of_its_own")[1][0]["detail"]
    # Flags without a recipe are those of a run, whose settings are shown.
    result = CliRunner().invoke(doctor, ["--pipeline-model-parallel-size", "2", "--dip-schedule", "static"])
    assert "static" in result.output
