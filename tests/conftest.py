"""``DIP_DEEP=1`` draws fifty times as many examples of every property and equality case, anew in each run."""

from hypothesis import settings

from tests.drawn import DEEP, FACTOR

if DEEP:
    settings.register_profile("deep", max_examples=100 * FACTOR, deadline=None, print_blob=True)
    settings.load_profile("deep")
