"""Numbers of DIP's beside those that megatron.training writes."""

from __future__ import annotations

from argparse import Namespace

import pytest


def test_scalars_go_to_the_writers_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.training")
    from megatron.training import global_vars

    from dip_megatron.megatron.adapters.megatron_training import MegatronLoop

    class Writer:
        def __init__(self) -> None:
            self.written: list[object] = []

        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            self.written.append((name, value, iteration))

        def log(self, scalars: dict[str, float], iteration: int) -> None:
            self.written.append((scalars, iteration))

    sizes = dict.fromkeys(("tensor", "pipeline"), 2)
    loop = MegatronLoop(
        Namespace(
            **{f"{name}_model_parallel_size": size for name, size in sizes.items()},
            data_parallel_size=1, context_parallel_size=1,
            sequence_parallel=False, use_distributed_optimizer=False, micro_batch_size=1, global_batch_size=4, seed=1,
            log_interval=1,
        )
    )  # fmt: skip
    board, online = Writer(), Writer()
    loop.write_scalars({"dip/stall_seconds": 1.0}, 3)  # neither is on
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", board)
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", online)
    loop.write_scalars({"dip/stall_seconds": 1.0}, 7)
    assert board.written == [("dip/stall_seconds", 1.0, 7)]
    assert online.written == [({"dip/stall_seconds": 1.0}, 7)]
