"""What is warmed up before the first batch is all that a search runs: else its kernels were compiled after an
installation, or loaded later, while a batch waits for its plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_search_loads_no_kernel_that_is_not_there_by_then() -> None:
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "tests.planner.warmed"], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
