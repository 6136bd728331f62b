"""What the tree promises of itself beside the layers of pyproject.toml."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest


def test_no_two_files_import_each_other_in_a_circle() -> None:
    """Imports for type checkers count, too: whoever reads one file of a circle has to read them all."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("dip_megatron", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")
