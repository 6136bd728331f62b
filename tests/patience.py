"""How long a test waits for what is bound to come: as long as the busiest machine may take for it."""

LONG = 600.0
"""Seconds until a process of a test counts as stuck. pytest ends a test later than that (``timeout`` in
pyproject.toml), so that what is told is which process, and what it has written."""

APART = 300.0
"""Seconds that ranks wait for one another: less, so that they tell for whom they have waited."""
