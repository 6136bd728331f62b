"""Documents name files that are there, and become a site without a warning."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dip_megatron.config import DipConfig, ModuleConfig
from dip_megatron.megatron.arguments import add_arguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PATH = re.compile(r"`((?:dip_megatron|scripts|benchmarks|tests|examples|configs|docs|patches)/[\w./-]*[\w/])`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = set(_PATH.findall(page.read_text(encoding="utf-8")))
    missing = sorted(
        name for name in named if not (ROOT / name).exists() and "NAME" not in name and "unit_tests" not in name
    )
    assert not missing


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is in the newest environment only")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "how-a-batch-travels" / "index.html").is_file()


def test_the_page_of_settings_has_them_all() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for name in (*DipConfig.model_fields, *ModuleConfig.model_fields):
        assert f"`--dip-{name.replace('_', '-')}" in page or f"`{name}`" in page, name
    flags = (action.option_strings[0] for action in add_arguments(argparse.ArgumentParser(add_help=False))._actions)
    for flag in flags:
        assert f"`{flag}" in page, flag


def test_what_the_first_run_page_says_of_a_line_is_in_a_line() -> None:
    page = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
    source = (ROOT / "dip_megatron" / "report" / "progress.py").read_text(encoding="utf-8")
    named = set(re.findall(r"`dip/\w+`", page))
    assert len(named) > 8
    for name in named:
        assert f'"{name.strip("`")}":' in source, name


def test_the_reach_page_is_what_its_data_say() -> None:
    loader = importlib.machinery.SourceFileLoader("make_reach", str(ROOT / "scripts" / "make_reach"))
    spec = importlib.util.spec_from_loader("make_reach", loader)
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    data = yaml.safe_load((ROOT / "docs" / "reach.yaml").read_text(encoding="utf-8"))
    assert script.page(data) == (ROOT / "docs" / "reach.md").read_text(encoding="utf-8"), "run scripts/make_reach"
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.table(data) in first
    assert script.readme(first, data) == first, "run scripts/make_reach"
    rows = [row for rows in data.values() for row in rows]
    assert {row["state"] for row in rows} == {"runs", "refused", "untried"}
    for row in rows:
        assert (row["shown"] == "read") == (row["state"] == "untried"), row["name"]
        assert row["shown"] == "read" or (ROOT / row["shown"]).is_file(), row["name"]
