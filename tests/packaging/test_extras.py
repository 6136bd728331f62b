"""What installing this package brings is what it means: a name on an index can be anybody's."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {
    "bokeh": "https://bokeh.org",
    "click": "https://click.palletsprojects.com",
    "hypothesis": "https://hypothesis.works",
    "import-linter": "https://import-linter.readthedocs.io",
    "matplotlib": "https://matplotlib.org",
    "megatron-core": "https://github.com/NVIDIA/Megatron-LM",
    "mkdocs": "https://www.mkdocs.org",
    "mkdocs-material": "https://squidfunk.github.io/mkdocs-material",
    "mypy": "https://www.mypy-lang.org",
    "numba": "https://numba.pydata.org",
    "numpy": "https://numpy.org",
    "ortools": "https://developers.google.com/optimization",
    "packaging": "https://packaging.pypa.io",
    "playwright": "https://github.com/Microsoft/playwright-python",
    "psutil": "https://github.com/giampaolo/psutil",
    "pydantic": "https://github.com/pydantic/pydantic",
    "pytest": "https://github.com/pytest-dev/pytest",
    "pytest-timeout": "https://github.com/pytest-dev/pytest-timeout",
    "pytest-xdist": "https://github.com/pytest-dev/pytest-xdist",
    "pyyaml": "https://pyyaml.org",
    "regex": "https://github.com/mrabarnett/mrab-regex",
    "rich": "https://github.com/Textualize/rich",
    "ruff": "https://github.com/astral-sh/ruff",
    "scikit-learn": "https://scikit-learn.org",
    "scipy": "https://scipy.org",
    "six": "https://github.com/benjaminp/six",
    "tensorboard": "https://github.com/tensorflow/tensorboard",
    "torch": "https://pytorch.org",
    # Not installed where tests run. NVIDIA's: its wheel asks for transformer_engine_torch of the very same version, and
    # https://github.com/NVIDIA/TransformerEngine says to install it under this name.
    "transformer-engine": "https://github.com/NVIDIA/TransformerEngine",
    "types-pyyaml": "https://github.com/python/typeshed",
}
"""By each name that is asked for, the project that is meant, looked up on the index once."""


def _requirements() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    return {group: [_name(text) for text in texts] for group, texts in groups.items()}


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


NAMES = sorted({name for names in _requirements().values() for name in names})


def test_every_requirement_says_which_project_is_meant() -> None:
    assert sorted(HOMES) == NAMES


def test_apex_is_not_asked_of_an_index() -> None:
    # The index's "apex" is a web toolkit of 2013; NVIDIA's is built from source (docs/with-megatron.md).
    assert not any("apex" in names for names in _requirements().values())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_installed_is_the_project_that_is_meant(name: str) -> None:
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    homes = [found.get("Home-page") or "", *(url.partition(", ")[2] for url in found.get_all("Project-URL") or [])]
    assert any(home.startswith(HOMES[name]) for home in homes), homes
