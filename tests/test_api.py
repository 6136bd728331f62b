"""The public names: all there, all on the page, light to import, and no older than promised."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import dip_megatron
from dip_megatron import api
from dip_megatron.deprecation import Deprecated, deprecated, numbers
from scripts.make_api import PAGE, page
from tests.patience import LONG

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", dip_megatron.__all__)
def test_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(dip_megatron, name)
    assert name in dir(dip_megatron)
    if callable(value) and getattr(value, "__module__", "").startswith("dip_megatron"):
        assert value.__doc__


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the page is written with the newest Python supported")
def test_the_page_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run scripts/make_api.py"


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in ast.parse(Path(dip_megatron.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: home for name, home in api.HOMES.items() if home}


def test_planning_names_load_neither_torch_nor_megatron() -> None:
    names = ", ".join(api.PUBLIC["Plan without training"])
    check = f"from dip_megatron import {names}; import sys; sys.exit(bool({{'torch', 'megatron'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], timeout=LONG).returncode == 0


_HELP = "import contextlib; from dip_megatron.cli import main\nwith contextlib.suppress(SystemExit): main(['--help'])"
_FIND = "from dip_megatron import find_schedule, schedule_names; [find_schedule(name) for name in schedule_names()]"


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import dip_megatron", set()),
        (_HELP, set()),
        ("from dip_megatron.schedulers.registry import check_name; check_name('dip')", set()),
        (_FIND, {"numpy"}),
    ],
    ids=["package", "help", "name", "entries"],
)  # fmt: skip
def test_names_and_help_load_no_large_package(code: str, allowed: set[str]) -> None:
    large = {"torch", "megatron", "scipy", "numba", "numpy", "pydantic", "yaml"} - allowed
    check = f"{code}\nimport sys; print('loaded:', *set({sorted(large)}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=LONG)
    assert done.stdout.splitlines()[-1:] == ["loaded:"], done.stderr


def test_what_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Executor'"):
        dip_megatron.Executor  # noqa: B018


def test_examples_and_walkthroughs_use_public_names_alone() -> None:
    programs = [*(ROOT / "examples" / "three_modules").glob("*.py"), *(ROOT / "examples").glob("*/pretrain*.py")]
    pages = [ROOT / "docs" / name for name in ("add-a-model.md", "cost-model.md")]
    inside = [
        f"{path.name}: {line}"
        for path in [*programs, *pages]
        for line in re.findall(r"from dip_megatron\.[\w.]+ import [^\n]+", path.read_text())
    ]
    assert len(programs) > 5
    assert not inside


def test_an_old_name_works_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(api.DEPRECATED, "OldPlan", Deprecated("OldPlan", "0.2", "dip_megatron.Plan"))
    with pytest.warns(
        DeprecationWarning, match=r"OldPlan is deprecated since 0\.2 and gone in 0\.3; use dip_meg"
    ) as told:
        assert dip_megatron.OldPlan is dip_megatron.Plan
    assert told[0].filename == __file__


def test_an_old_function_works_and_warns() -> None:
    @deprecated("1.4", "dip_megatron.simulate")
    def replay(times: int) -> int:
        """Run it."""
        return 2 * times

    with pytest.warns(DeprecationWarning, match=r"replay is deprecated since 1\.4 and gone in 1\.5") as told:
        assert replay(4) == 8
    assert told[0].filename == __file__
    assert replay.__doc__ == "Run it."


def test_nothing_stays_longer_than_promised() -> None:
    here = numbers(dip_megatron.__version__)
    assert [d.name for d in api.DEPRECATED.values() if here >= numbers(d.gone_in)] == []


def test_public_names_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", r"dip_megatron\.", DeprecationWarning
        )  # Megatron's modules may warn as they load
        for name in set(dip_megatron.__all__) - set(api.DEPRECATED):
            getattr(dip_megatron, name)
