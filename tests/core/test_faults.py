"""Reasons are words for whoever wrote the file, and name what was likely meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dip_megatron.config import DipConfig
from dip_megatron.core.json_lines import load_line
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.files import ConfigurationError, resolve
from dip_megatron.environment import asks, load_settings


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigurationError) as found:
        DipConfig.load(path, {})
    return str(found.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("search_budgett: 1", "search_budgett: no such key; did you mean search_budget?"),
        ("modules: {vision: {layer: 3}}", "modules.vision.layer: no such key; did you mean layers?"),
        ("modules: {vision: {colour: 3}}",
         "modules.vision.colour: no such key; there are layers, segments, unit_size, placement"),
        ("planner_workers: many",
         'planner_workers: Input should be a valid integer, unable to parse string as an integer, got "many"'),
        ("schedule: [dynamic", "line 2: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("dynamic", "must be a mapping of settings, such as `schedule: dynamic`, got str"),
    ],
)  # fmt: skip
def test_a_file_of_settings_is_told_what_is_wrong_where(tmp_path: Path, text: str, reason: str) -> None:
    assert refusal(tmp_path / "dip.yaml", text + "\n") == reason


def test_a_misspelt_key_is_named_before_the_one_that_is_missing_for_it(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(resolve("clusters", "h100").read_text(encoding="utf-8").replace("tflops:", "tflop:"))
    with pytest.raises(ConfigurationError) as found:
        load_cluster(path)
    assert str(found.value) == f"{path}: tflop: no such key; did you mean tflops? (and 1 more)"


def test_a_variable_that_is_almost_a_settings_is_refused() -> None:
    for look in (asks, lambda environ: load_settings({}, environ)):
        with pytest.raises(ConfigurationError, match=r"^DIP_SCHEDUL: no such variable; did you mean DIP_SCHEDULE\?$"):
            look({"DIP_SCHEDUL": "dynamic"})
        look({"DIP_DEBUG": "1", "DIP_MEGATRON_CHECKOUT": "x", "DIP_VENV_DIR": "y", "SCHEDULE": "z"})


def test_a_line_that_was_cut_off_is_called_so() -> None:
    whole = json.dumps({"name": "a text", "values": [1, 25, 3.5, [2]]})
    for end in range(1, len(whole)):
        with pytest.raises(ValueError, match="cut off"):
            load_line(whole[:end] + "\n", ValueError)
    with pytest.raises(ValueError, match=r"line: not JSON \(Expecting ',' delimiter at column 9\)$"):
        load_line('{"a": 1 "b": 2}\n', ValueError)
