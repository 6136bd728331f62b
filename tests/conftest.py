"""Examples of properties are the same in every run, so that what fails is what a change has broken. ``DIP_DEEP=1``
draws fifty times as many, anew in each run: what chance finds is found there.

What takes longest comes first, so that no core is idle at the end while another has half a minute left.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.drawn import DEEP, FACTOR

# However busy the machine is: neither an example nor its drawing may be too slow.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", settings.get_profile("steady"), derandomize=False, max_examples=100 * FACTOR,
                          print_blob=True)  # fmt: skip
settings.load_profile("deep" if DEEP else "steady")

_TESTS = Path(__file__).parent
_LONG = ("bench", "packaging", "soak", "hosts")  # tests of up to a minute
_PROCESSES = ("megatron", "examples", "runtime")  # most train in processes of several seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order folders; within each, tests stay as they are written."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(_TESTS).parts[0]
        return 0 if folder in _LONG else 1 if folder in _PROCESSES else 2

    items.sort(key=place)
