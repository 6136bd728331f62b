"""``dip doctor --recipe`` with recipes of Megatron-Bridge: its own, and one of a file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from tests.bridge.tiny import TINY
from tests.forked import Forked
from tests.patience import LONG
from tests.processes import Team, team

GPT = "vanilla_gpt_pretrain_config"
ON_THE_HUB = {
    "qwen2-5-vl": [f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")],
    "qwen3-vl": ["Qwen/Qwen3-VL-8B-Instruct"],
    "qwen3-vl-moe": ["Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct"],
    "qwen3-5-vl": [f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B", "27B")],
    "qwen3-5-vl-moe": [f"Qwen/Qwen3.5-{size}" for size in ("35B-A3B", "122B-A10B", "397B-A17B")],
    "gemma3-vl": [f"google/gemma-3-{size}-it" for size in ("4b", "12b", "27b")],
    "ministral3-vl": [f"mistralai/Ministral-3-{size}-Instruct-2512" for size in ("3B", "8B", "14B")],
    "glm-4-5v": ["zai-org/GLM-4.5V"],
    "kimi-k2-5": ["moonshotai/Kimi-K2.5"],
    "qwen3-omni": ["Qwen/Qwen3-Omni-30B-A3B-Instruct"],
}
"""Models that Bridge's recipes name; the tests' own have their configurations' classes."""
OF_FAMILIES = r"(qwen|glm|kimi|gemma3)_vl\.|\.ministral3\.|\.qwen_omni\."
"""Modules of the recipes for them."""


def said(rank: int, world: int, recipes: list[tuple[str, ...]]) -> list[list[tuple[str, str, str]]]:
    """Name, status and detail of each finding, recipe by recipe."""
    from dip_megatron.doctor import diagnose
    from dip_megatron.doctor.recipes import recipe_of

    found = [diagnose([recipe_of(recipe, rest)]) for recipe, *rest in recipes]
    return [[(check.name, str(check.status), check.detail) for check in checks] for checks in found]


def test_recipes_are_made_and_looked_at(tmp_path: Path) -> None:
    TINY["qwen2-5-vl"].save(tmp_path)
    file = tmp_path / "recipes.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.bridge.loop import Run, configuration\n"
        "def fits(): return configuration(Path(__file__).parent, Run(pipeline=2))\n"
        "def straggling():\n    from megatron.bridge.training.config import StragglerDetectionConfig\n"
        "    config = fits()\n    config.straggler = StragglerDetectionConfig(log_straggler=True)\n    return config\n"
        "def fails(): raise OSError('no such model\\nand more')\n"
        "def offline(): raise OSError('no config.json of Qwen/Qwen2.5-VL-7B: no https://huggingface.co/Qwen')\n"
    )
    answers: list[Any] = team(1).run(
        said,
        [
            (GPT, "model.pipeline_model_parallel_size=2"), (GPT, "model.context_parallel_size=2"),
            (GPT, "model.pipeline=2"), (f"{file}:fits",), (f"{file}:fails",), ("no_such_recipe",),
            (f"{file}:offline",), (f"{file}:straggling",),
        ],
    )[0]  # fmt: skip
    runs, refused, unknown, fits, fails, missing, offline, straggling = answers

    assert runs[-1][1:] == ("ok", "nothing that can be seen before it starts stands in the way of DIP")
    assert [detail for _, _, detail in runs if "GPTModel" in detail]
    assert [name for name, status, _ in refused if status == "broken"] == [
        "pipeline_model_parallel_size 1", "context_parallel_size 2", GPT,
    ]  # fmt: skip
    assert "has no attribute 'pipeline'" in unknown[0][2]
    assert [detail for _, _, detail in fits if detail.startswith("builds Qwen25VLModel, of the model family")]
    assert fits[-1][1] == straggling[-1][1] == "ok"
    assert [detail for _, _, detail in straggling if detail.startswith("log_straggler is switched off")]
    assert fails[0][1:] == ("broken", "can't be made here: OSError: no such model")
    assert "none of Megatron-Bridge's own recipes" in missing[0][2]
    assert "./Qwen/Qwen2.5-VL-7B, with its config.json" in offline[0][2]


def in_the_way(rank: int, world: int, folder: Path) -> dict[str, list[str]]:
    """Of each of Bridge's recipes for models of ``ON_THE_HUB`` that has a pipeline: what its check finds broken."""
    import megatron.bridge.recipes as recipes

    from dip_megatron.doctor import diagnose
    from dip_megatron.doctor.recipes import recipe_of

    found, before = {}, Path.cwd()
    os.chdir(folder)  # where folders of these names are taken in place of the hub
    try:
        for name in dir(recipes):
            function = getattr(recipes, name)
            if not name.endswith("_config") or not re.search(OF_FAMILIES, function.__module__):
                continue
            config = function()
            if config.model.pipeline_model_parallel_size > 1:
                checks = diagnose([recipe_of(name, [])])
                found[name] = [f"{check.name}: {check.detail}" for check in checks if str(check.status) == "broken"]
        return found
    finally:
        os.chdir(before)


def test_all_of_bridges_recipes_with_a_pipeline_run(tmp_path: Path) -> None:
    """As they are: parallel sizes, experts, precision, what is frozen. Those of the models that have a family."""
    for tiny, names in ON_THE_HUB.items():
        TINY[tiny].save(tmp_path / tiny)
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(tmp_path / tiny)
    alone = Team(1)
    try:
        found = alone.run(in_the_way, tmp_path)[0]
    finally:
        alone.close()
    assert {name: faults for name, faults in found.items() if faults} == {}
    families = {re.sub(r"_\d+(p\d+)?[bm]_.*|_sft.*|_peft.*", "", name) for name in found}
    assert families >= {"gemma3_vl", "glm_45v", "kimi_k25_vl", "qwen25_vl", "qwen35_vl", "qwen3_vl"}
    assert len(found) >= 29  # of Bridge 0.6.2


def estimated(folder: Path, *words: str) -> tuple[int, str]:
    """Status and words of ``dip estimate --recipe``, in a process that takes itself for one of many."""
    log = folder / "estimate.log"
    log.unlink(missing_ok=True)
    options = ["--recipe", "--iterations", "1", "--budget", "0.05"]
    command = ["python", "-m", "dip_megatron.cli", "estimate", *options, *words]
    process = Forked(command, dict(os.environ), log)
    return process.wait(LONG), log.read_text()


def test_an_estimate_of_a_recipe(tmp_path: Path) -> None:
    TINY["qwen2-5-vl"].save(tmp_path)
    file = tmp_path / "recipes.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.bridge.loop import Run, configuration\n"
        "def fits(): return configuration(Path(__file__).parent, Run(pipeline=2))\n"
    )
    status, said = estimated(tmp_path, "--gpus", "4", "--json", f"{file}:fits")
    assert status == 0, said[-3000:]
    assert "TP 1 x PP 2 x DP 2 on 4 GPUs, 2 microbatches a replica" in said
    told = json.loads(said[said.index("\n{") :])["estimate"]
    assert told["replicas"] == 2
    assert told["outcomes"]["dip"]["seconds"] > 0

    tried = estimated(tmp_path, GPT, "model.pipeline_model_parallel_size=2")  # whose size is its user's to set
    assert tried[0] == 2
    assert tried[1].strip().endswith("its model can't be made: ZeroDivisionError: integer division or modulo by zero")
    refused = estimated(tmp_path, GPT)
    assert refused[0] == 2
    assert "pipeline_model_parallel_size 1: there is no pipeline to schedule" in refused[1]
