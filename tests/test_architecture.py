"""What the tree promises of itself beside the layers of pyproject.toml."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dip_megatron

PACKAGE = Path(dip_megatron.__file__).parent


def test_no_two_files_import_each_other_in_a_circle() -> None:
    """Imports for type checkers count, too: whoever reads one file of a circle has to read them all."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("dip_megatron", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


MOST_ARGUMENTS = 8
TOO_MANY = {
    "families/t2v/diffusion.py:DiffusionTransformer": 9,
    "families/t2v/program.py:TextToVideoModel": 11,
    "megatron/forward_backward.py:DipForwardBackward": 15,
    "megatron/replicas.py:ReplicaExchange": 9,
    "profile/operations.py:OperationRun": 9,
}
"""Constructors that take more, and how many. The list is to become shorter: nothing is added to it."""


def test_constructors_take_few_arguments() -> None:
    """Plain data that can't change, and settings, may hold as many values as they describe."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and (count := constructor_arguments(node)) > MOST_ARGUMENTS:
                found[f"{path.relative_to(PACKAGE).as_posix()}:{node.name}"] = count
    assert found == TOO_MANY


def constructor_arguments(node: ast.ClassDef) -> int:
    """Arguments without ``self`` of a constructor that is written out, or of a dataclass that isn't frozen."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__new__"):
            return len(item.args.posonlyargs + item.args.args + item.args.kwonlyargs) - 1
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if any("dataclass" in text and "frozen=True" not in text for text in decorators):
        return sum(isinstance(item, ast.AnnAssign) and "init=False" not in ast.unparse(item) for item in node.body)
    return 0
