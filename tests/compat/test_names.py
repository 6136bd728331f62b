"""The names that others don't promise: all there, in whatever environment runs the tests, and nowhere but in compat."""

import ast
import importlib.util
from pathlib import Path

import pytest

import dip_megatron
from dip_megatron.compat import FILES, topics, topics_of
from dip_megatron.compat.names import Name, Topic, fault, in_releases
from dip_megatron.compat.releases import has_training_loop, megatron_version

PACKAGE = Path(dip_megatron.__file__).parent
CASES = [(topic, name) for topic in topics() for name in topic.names]


@pytest.mark.parametrize(("topic", "name"), CASES, ids=[name.path for _, name in CASES])
def test_name_is_there_as_it_is_used(topic: Topic, name: Name) -> None:
    if topic.package == "megatron.training" and not has_training_loop():
        pytest.skip("this wheel of Megatron-Core has no training loop")
    if topic.package == "transformer-engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    if topic.package in ("megatron-bridge", "mcore-bridge", "ms-swift", "mcore-adapter", "roll"):
        pytest.skip("tests/bridge looks for these, in the environment that has them")
    if not in_releases(name, megatron_version()):
        pytest.skip(f"not expected in {megatron_version()}")
    assert fault(name) is None


def test_every_file_has_a_topic() -> None:
    files = {path.stem for path in (PACKAGE / "compat").glob("*.py")} - {"__init__", "names", "releases"}
    assert files == set(FILES)
    for file in FILES:
        assert topics_of(file), file


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (Name("no_such_module:anything"), "missing"),
        (Name("tests.compat.test_names:Example.nothing"), "missing"),
        (Name("tests.compat.test_names:Example", has=("size", "colour")), "has no colour"),
        (Name("tests.compat.test_names:Example.grow", ("by", "until")), "takes (by, at), not (by, until)"),
        (Name("tests.compat.test_names:Example.grow", ("by", "*", "slowly")), "doesn't take slowly"),
    ],
)
def test_a_changed_name_is_noticed(name: Name, words: str) -> None:
    found = fault(name)
    assert found is not None
    assert words in found


class Example:
    def __init__(self) -> None:
        self.size = 1

    def grow(self, by: int, at: int = 0) -> None:
        pass


# Named tuples' own, documented; and a kernel's cache, of which numba's version is pinned and the use tested beside it.
ALLOWED = {"_fields", "_replace", "_asdict"}
PINNED = PACKAGE / "core" / "simulate" / "compiled.py"


def test_private_names_of_others_stand_in_compat_alone() -> None:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    ours = {name for tree in trees.values() for name in _defined(tree)}
    elsewhere = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in trees.items()
        if "compat" not in path.parts and path != PINNED
        for line, name in _private(tree)
        if name not in ours | ALLOWED
    ]
    assert not elsewhere


def _defined(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return names


def _private(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        found += [(node.lineno, name) for name in names if name.startswith("_") and not name.startswith("__")]
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
