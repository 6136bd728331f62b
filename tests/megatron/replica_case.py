"""Exchanges of made-up microbatches between replicas, for processes of a team."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dip_megatron.describe.workload import Microbatch
from dip_megatron.megatron.replicas import ReplicaExchange, ReplicaExchangeError
from dip_megatron.megatron.samples import Samples
from dip_megatron.runtime.protocol import MicrobatchInputs
from tests.patience import APART


def begin() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def exchange_of(rank: int, stages: int, world: int, **options: Any) -> ReplicaExchange:
    """Ranks in Megatron's order of pipeline over data: stage p of replica r is rank ``p * replicas + r``."""
    replicas = world // stages
    stage, index = divmod(rank, replicas)
    peers = [stage * replicas + r for r in range(replicas)]
    replica = [p * replicas + index for p in range(stages)]

    def price(loads: list[float]) -> Any:
        return np.array(loads)[:, None] * np.ones(stages), np.ones((len(loads), stages))

    priced = options.pop("priced", price)
    options = {"timeout_seconds": APART} | options
    return ReplicaExchange(peers, replica, priced if stage == 0 else None, **options)


def microbatch(number: int, stage: int) -> MicrobatchInputs:
    """Nested, of many types; not the same on all stages."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(number % 4, 3, 2, generator=generator)
    return MicrobatchInputs(
        {
            "images": images, "tokens": torch.arange(number), "mask": torch.ones(2, 0, dtype=torch.bool),
            "number": number,
            "half": images.to(torch.bfloat16), "nothing": None, "name": f"sample {number}",
            "grid": [(1, 2), {"stage": stage}], "slice": torch.arange(20)[::3],
        },
        None if stage == 1 else [{"images": images, "path": "x"}],
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, MicrobatchInputs):
        return same(a.arguments, b.arguments) and same(a.items, b.items)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def changes(rank: int, world: int, stages: int, each: int, seed: int, mode: str) -> tuple[list[int], Any]:
    """Numbers of the microbatches that this rank has afterwards, and the report."""
    begin()
    replicas = world // stages
    stage, index = divmod(rank, replicas)
    numbers = list(range(index * each, (index + 1) * each))
    worth = random.Random(seed).choices([1.0, 2.0, 5.0, 20.0], k=replicas * each)
    found, report = exchange_of(rank, stages, world, mode=mode).exchange(
        [worth[n] for n in numbers], [microbatch(n, stage) for n in numbers]
    )
    for m in found:
        assert same(m, microbatch(m.arguments["number"], stage)), m
    return [m.arguments["number"] for m in found], (report.before, report.after, report.moved, report.reason, worth)


def little(rank: int, world: int) -> str:
    """An exchange with nothing to gain."""
    begin()
    data = [microbatch(n, 0) for n in range(2)]
    found, report = exchange_of(rank, 1, world).exchange([1.0, 1.0], data)
    assert all(a is b for a, b in zip(found, data, strict=True))
    return report.reason


def stuck(rank: int, world: int) -> str:
    """A microbatch that can't travel."""
    begin()
    bad = MicrobatchInputs({"a": [1, {"b": lambda: 0}]}, None)
    exchange = exchange_of(rank, 1, world)
    try:
        exchange.exchange([1.0 + 10 * rank] * 2, [bad, bad])
    except ValueError as error:
        return str(error)
    return ""


def cut(rank: int, world: int) -> None:
    """The last peer leaves in the middle of an exchange."""
    begin()
    exchange = exchange_of(rank, 1, world)
    if rank == world - 1:
        exchange._round = lambda *_: os._exit(0)  # type: ignore[method-assign]
    exchange.exchange([1.0 + 10 * rank] * 3, [microbatch(n, 0) for n in range(3)])


def hung(rank: int, world: int) -> tuple[str, list[int]]:
    """The last peer never answers: what the others say, and what they still hold."""
    begin()
    dist.barrier()  # whose members have to come within the timeout, too, when the groups are made
    exchange = exchange_of(rank, 1, world, timeout_seconds=8.0)
    data = [microbatch(n, 0) for n in range(3)]
    if rank == world - 1:
        return "", []
    try:
        exchange.exchange([1.0 + 10 * rank] * 3, data)
    except ReplicaExchangeError as error:
        return str(error), [m.arguments["number"] for m in data]
    return "", []


def another(rank: int, world: int) -> str:
    """The last peer sends another microbatch than was agreed on."""
    begin()
    dist.barrier()
    exchange = exchange_of(rank, 1, world, timeout_seconds=8.0)
    if rank == world - 1:
        whole = exchange._round
        exchange._round = lambda out, microbatch, into: whole(  # type: ignore[method-assign]
            out and out._replace(number=out.number + 1), microbatch, into
        )
    try:
        exchange.exchange([1.0 + 10 * rank] * 3, [microbatch(n + 3 * rank, 0) for n in range(3)])
    except ReplicaExchangeError as error:
        return str(error)
    return ""


def in_turn(rank: int, world: int) -> list[tuple[int, str, int, list[int]]]:
    """Exchanges one after the other: with much time left; late; where microbatches are too large; at the call, where
    moving is known to be slow; where the data of one has ended."""
    begin()
    exchange = exchange_of(rank, 1, world)
    strict = exchange_of(rank, 1, world, largest_bytes=1000.0)
    large = [MicrobatchInputs({"number": n, "data": torch.zeros(200 if n % 2 else 1000)}, None) for n in range(4)]
    loads, data = [0.010 + 0.1 * rank] * 4, [microbatch(n + 4 * rank, 0) for n in range(4)]
    out = []

    def note(found: tuple[list[Any], Any]) -> None:
        report = found[1]
        out.append((report.moved, report.reason, report.declined, [m.arguments["number"] for m in found[0]]))

    note(exchange.exchange(loads, data, left=10.0))
    exchange._slowness = 1e6
    note(exchange.exchange(loads, data, left=1e-6))
    note(exchange.exchange(loads, data))
    note(strict.exchange(loads, large))
    note(strict.exchange(loads, large[:1] * 4))
    note(exchange.exchange(loads, data, complete=rank == 0))
    return out


class Crates:
    """A packing of made-up samples, of at most 20 tokens a microbatch. ``fault``: what is wrong with it."""

    length = 20

    def __init__(self, fault: str = ""):
        self.fault = fault

    def split(self, microbatch: MicrobatchInputs) -> list[Any]:
        return list(microbatch.arguments["samples"])[int(self.fault == "loses") :]

    def tokens(self, sample: Any) -> int:
        return int(sample["missing" if self.fault == "raises" else "size"])

    def pack(self, samples: Sequence[Any]) -> MicrobatchInputs:
        return MicrobatchInputs({"samples": list(samples)}, [{"numbers": [sample["number"] for sample in samples]}])


class CrateProgram:
    """What of a stage program samples need."""

    def bind(self, **arguments: Any) -> dict[str, Any]:
        return arguments

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        return Microbatch(sum(sample["size"] for sample in inputs.arguments["samples"]))


def crates(replica: int, each: int, seed: int, stage: int) -> list[MicrobatchInputs]:
    """Of a few samples each, those of odd replicas larger; numbers tell samples apart."""
    draw = random.Random(f"{replica} {seed}")
    out = []
    for m in range(each):
        count = draw.randint(1, 5)
        sizes = [draw.randint(1, 4 if replica % 2 else 2) for _ in range(count)]
        out.append(Crates().pack([
            {"number": 100 * (replica * each + m) + i, "size": size, "data": torch.arange(size) + stage}
            for i, size in enumerate(sizes)
        ]))  # fmt: skip
    return out


def resampled(rank: int, world: int, stages: int, each: int, seed: int) -> tuple[list[list[int]], list[int], Any]:
    """Numbers of the samples in each microbatch that this rank has afterwards, their sizes, and the report."""
    begin()
    stage, index = divmod(rank, world // stages)
    exchange = priced_by_tokens(rank, stages, world, Crates())
    mine = crates(index, each, seed, stage)
    found, report = exchange.exchange((tuple(CrateProgram().load(m) for m in mine), None), mine)
    for m in found:
        assert m.items == [{"numbers": [sample["number"] for sample in m.arguments["samples"]]}]
        for sample in m.arguments["samples"]:
            assert torch.equal(sample["data"], torch.arange(sample["size"]) + stage)
    held = [[sample["number"] for sample in m.arguments["samples"]] for m in found]
    sizes = [sum(sample["size"] for sample in m.arguments["samples"]) for m in found]
    return held, sizes, (report.before, report.after, report.moved, report.samples, report.reason)


def priced_by_tokens(rank: int, stages: int, world: int, packing: Crates) -> ReplicaExchange:
    """A second for a token."""

    def price(given: Any) -> Any:
        tokens = np.array([float(load.tokens) for load in given[0]])
        return tokens[:, None] * np.ones(stages), np.ones((len(tokens), stages))

    return exchange_of(rank, stages, world, priced=price, samples=Samples(packing, CrateProgram()))


def contradicts(rank: int, world: int, fault: str) -> str:
    """A packing that doesn't do what it says, on the last replica."""
    begin()
    mine = crates(rank, 1, 11, 0)
    exchange = priced_by_tokens(rank, 1, world, Crates(fault if rank == world - 1 else ""))
    try:
        exchange.exchange((tuple(CrateProgram().load(m) for m in mine), None), mine)
    except ValueError as error:
        return str(error)
    return ""


def disagreement(rank: int, world: int) -> str:
    """Two replicas of two stages, of which one has frozen a chunk: what each rank hears of it."""
    from types import SimpleNamespace

    from megatron.core import parallel_state

    from dip_megatron.core import ModalityModule
    from dip_megatron.describe.model import TrainingMismatchError
    from dip_megatron.megatron.agreement import TrainingAgreement
    from dip_megatron.megatron.exchange import GlooExchange

    begin()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    stage, index = divmod(rank, 2)
    peers, replica = GlooExchange([2 * stage, 2 * stage + 1], APART), GlooExchange([index, 2 + index], APART)
    chunk = torch.nn.Linear(2, 2).requires_grad_(rank != world - 1)
    agreement = TrainingAgreement(
        SimpleNamespace(modules=(ModalityModule("language", ((1, 1),)),)),  # type: ignore[arg-type]
        stage, SimpleNamespace(share=replica.gather), peers=peers,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        agreement.news([chunk])
    except TrainingMismatchError as error:
        return str(error)
    return ""
