"""``DIP_DEEP=1`` draws fifty times as many examples of every property and equality case, anew in each run.

What takes longest comes first, so that no core is idle at the end while another has half a minute left.
"""

from pathlib import Path

import pytest
from hypothesis import settings

from tests.drawn import DEEP, FACTOR

if DEEP:
    settings.register_profile("deep", max_examples=100 * FACTOR, deadline=None, print_blob=True)
    settings.load_profile("deep")

_TESTS = Path(__file__).parent
_LONG = ("bench", "packaging", "soak", "hosts")  # tests of up to a minute
_PROCESSES = ("megatron", "examples", "runtime")  # most train in processes of several seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order folders; within each, tests stay as they are written."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(_TESTS).parts[0]
        return 0 if folder in _LONG else 1 if folder in _PROCESSES else 2

    items.sort(key=place)
