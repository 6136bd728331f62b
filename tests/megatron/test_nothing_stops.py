"""What an iteration asks of the device, which no test machine has."""

from __future__ import annotations

from typing import Any

import torch

from dip_megatron.megatron import copies
from dip_megatron.runtime.layer_context import LayerContext


def test_no_timer_stops_the_device_within_an_iteration(monkeypatch: Any) -> None:
    """As Megatron's do, until posted receives have ended; a script's own, for reading a batch, too."""
    from megatron.core.timers import Timers

    from dip_megatron.compat.losses import time_no_stages

    time_no_stages(lambda name, **_: None)  # a loop's own
    stops: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: stops.append(1))
    for level in (0, 1, 2):
        timers = Timers(level, "minmax")
        time_no_stages(timers)
        for name in ("forward-compute", "backward-compute", "batch-generator"):
            timers(name, log_level=2).start()
            timers(name).stop()
        assert not stops
        timers("forward-backward", log_level=1).start()
        timers("forward-backward").stop()
        assert len(stops) == (2 if level else 0)
        stops.clear()


def test_copies_on_the_host_begin_alike_over_nccl(monkeypatch: Any) -> None:
    """NCCL doesn't reach tensors on the host."""
    given: list[torch.Tensor] = []
    there = torch.full((2, 3), 5.0)

    class Host(torch.Tensor):
        def to(self, device: Any, *_: Any, **__: Any) -> torch.Tensor:
            assert device == torch.device("cuda", 1)
            return there

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda _: "nccl")
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, *_, **__: given.append(tensor))
    tensor = torch.zeros(2, 3)
    copies._take_over(tensor.as_subclass(Host), 0, None)
    assert len(given) == 1
    assert given[0] is there
    assert torch.equal(tensor, there)


def test_offloaded_activations_wait_for_no_reduction(monkeypatch: Any) -> None:
    """Their stream is of another pool than those of NCCL's groups, of which there are more than streams."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **options: made.append(options) or object())  # type: ignore[func-returns-value]
    mode = LayerContext()
    assert mode.offload().stream is mode.offload().stream
    assert made == [{"priority": -1}]
