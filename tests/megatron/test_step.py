"""What a step asks of the device, which no test machine has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dip_megatron.megatron import copies, step


class Timers:
    """Remembers what was timed."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def __call__(self, name: str, **_: Any) -> Timers:
        self.started.append(name)
        return self

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_no_stage_stops_the_device(monkeypatch: Any, device: bool) -> None:
    """As Megatron's timers do, until posted receives have ended."""
    timers, seen = Timers(), []

    def loss(*arguments: Any) -> Any:
        config = arguments[3]
        if config.timers is not None:
            config.timers("forward-compute").stop()
        seen.append(config.timers)
        return arguments[1], torch.zeros(())

    monkeypatch.setattr(step, "calculate_loss", loss)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    config = SimpleNamespace(timers=timers, enable_autocast=False, grad_scale_func=None)
    ours = step.MegatronStep(
        config, lambda *_: None, num_microbatches=1, context_parallel_size=1, collect_non_loss_data=False
    )
    x = torch.ones(2, requires_grad=True)
    outputs = ours.forward(torch.nn.Identity(), lambda: {"hidden": x * 2})
    ours.backward([outputs["hidden"]], [torch.ones(2)])
    ours.weight(SimpleNamespace(compute=lambda: None))  # type: ignore[arg-type]
    assert seen == [None if device else timers]
    assert sorted(set(timers.started)) == ([] if device else ["backward-compute", "forward-compute"])
    assert config.timers is timers


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
