"""Whether what DIP hooks into and leans on is where it expects it."""

from __future__ import annotations

from collections.abc import Iterator

from ..compat import FILES, topics_of
from ..compat.names import Topic, fault, in_releases
from ..compat.releases import TESTED, has_training_loop, megatron_version
from .check import Check, Status
from .libraries import importable

_TESTED = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
_WAY_OUT = f"use a Megatron-Core from {_TESTED}, or mend dip_megatron/compat/{{}}.py"


def places() -> Iterator[Check]:
    """One check for every topic of ``dip_megatron.compat`` that this environment can have."""
    if not (importable("torch") and importable("megatron.core")):
        return
    for file in FILES:
        try:
            topics = topics_of(file)
        except ImportError as error:
            yield Check(
                f"dip_megatron.compat.{file}", Status.BROKEN, f"can't be loaded: {error}", "no model can train",
                _WAY_OUT.format(file),
            )  # fmt: skip
            continue
        yield from (_of(topic, file) for topic in topics if _applies(topic))


def _applies(topic: Topic) -> bool:
    if topic.package == "megatron.training":
        return has_training_loop()
    optional = {
        "transformer-engine": "transformer_engine", "megatron-bridge": "megatron.bridge",
        "mcore-bridge": "mcore_bridge", "ms-swift": "swift.megatron", "mcore-adapter": "mcore_adapter",
        "roll": "roll.distributed.strategy.megatron_strategy",
    }  # fmt: skip
    return topic.package not in optional or importable(optional[topic.package])


def _of(topic: Topic, file: str) -> Check:
    version = megatron_version()
    expected = [name for name in topic.names if in_releases(name, version)]
    faults = [found for name in expected if (found := fault(name)) is not None]
    if not faults:
        count = f"{len(expected)} name{'s' if len(expected) > 1 else ''}"
        return Check(topic.title, Status.OK, f"{count} as expected (seen in {topic.package} {topic.seen})")
    return Check(topic.title, Status.BROKEN, "; ".join(faults), topic.lost, _WAY_OUT.format(file))
