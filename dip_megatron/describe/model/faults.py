"""What is wrong with a model's description."""

from __future__ import annotations


class ModelError(ValueError):
    """A model description that contradicts itself; the message is ``PLACE: REASON``."""


def positive(place: str, **values: int) -> None:
    """Raises ModelError for the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ModelError(f"{place}.{name}: must be at least 1, got {value}")
