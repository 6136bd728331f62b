"""Traffic drawn at random over a ring of processes, for every transport."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import torch.distributed as dist

from dip_megatron.core import Channel, Payload, TensorSpec
from dip_megatron.runtime.transport import Transport, TransportError, ring_channels
from tests.patience import APART

DTYPES = ("float32", "bfloat16", "int64")


def make(kind: str, rank: int, world: int, timeout: float = APART, slots: int = 2) -> Transport:
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.runtime.ipc import IpcTransport
    from dip_megatron.runtime.transport_choice import choose_transport

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks = list(range(world))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    exchange = GlooExchange(ranks, timeout)
    if kind == "ipc":
        return IpcTransport(world, rank, device, exchange, timeout, slots, replicated=True)
    return choose_transport(ranks, rank, device, timeout, exchange, kind, replicated=True)  # type: ignore[arg-type]


def draw_payloads(channel: Channel, count: int, seed: int) -> list[Payload]:
    """The same for both ends of a channel."""
    source = random.Random(f"{seed} {channel}")
    return [
        tuple(
            TensorSpec(f"t{i}", tuple(source.choice((0, 1, 3, 40)) for _ in range(source.randint(1, 3))),
                       source.choice(DTYPES))
            for i in range(source.randint(1, 3))
        )
        for _ in range(count)
    ]  # fmt: skip


def content(channel: Channel, number: int, spec: TensorSpec) -> torch.Tensor:
    """What a message holds."""
    generator = torch.Generator().manual_seed(hash((channel.source, channel.target, channel.gradient, number)) % 2**31)
    drawn = torch.randint(-99, 99, spec.shape, generator=generator)
    return drawn.to(getattr(torch, spec.dtype))


def traffic(rank: int, world: int, kind: str, count: int, seed: int, slots: int = 2) -> int:
    """Send and receive ``count`` messages on every channel, in drawn orders; returns how many tensors came."""
    transport = make(kind, rank, world, slots=slots)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    channels = [c for c in ring_channels(world, replicated=True) if rank in (c.source, c.target)]
    transport.open(channels)
    payloads = {c: draw_payloads(c, count, seed) for c in channels}
    begun = dict.fromkeys(channels, 0)
    source = random.Random(seed * 100 + rank)
    sends, receives, compared = [], [], 0

    def check(channel: Channel, number: int, transfer: Any) -> int:
        tensors = transfer.wait()
        assert list(tensors) == [s.name for s in payloads[channel][number]]
        for spec in payloads[channel][number]:
            expected = content(channel, number, spec)
            assert tensors[spec.name].dtype == expected.dtype
            torch.testing.assert_close(tensors[spec.name].cpu(), expected, rtol=0, atol=0)
        return len(tensors)

    # Receives go ahead of what is awaited, as a verified plan's do: nothing here may hang by its own order.
    while any(n < count for n in begun.values()):
        channel = source.choice([c for c, n in begun.items() if n < count])
        number = begun[channel]
        begun[channel] += 1
        if channel.source == rank:
            tensors = {s.name: content(channel, number, s).to(device) for s in payloads[channel][number]}
            sends.append(transport.send(channel, tensors))
        else:
            receives.append((channel, number, transport.receive(channel, payloads[channel][number])))
    source.shuffle(receives)
    for channel, number, transfer in receives:
        compared += check(channel, number, transfer)
    for transfer in sends:
        transfer.wait()
    dist.barrier()
    if hasattr(transport, "close"):
        transport.close()
    return compared


def silence(rank: int, world: int, kind: str) -> str:
    """Rank 1 sends nothing: how long rank 0 waits, which has 2 seconds of patience once all are connected, and what it
    says."""
    transport: Any = make(kind, rank, world, timeout=3600.0)
    if kind == "ipc":
        transport._timeout = 2.0
    else:
        for link in transport._links.values():
            link.timeout = 2.0
    message = ""
    if rank == 0:
        start = time.monotonic()
        transfer = transport.receive(Channel(1, 0, False), (TensorSpec("x", (4,), "float32"),))
        try:
            transfer.wait()
        except TransportError as error:
            message = f"{time.monotonic() - start:.1f} {error}"
    dist.barrier()
    return message


def departure(rank: int, world: int) -> str:
    """Rank 1 closes its end: rank 0 must not wait for the timeout, an hour."""
    transport = make("ipc", rank, world, timeout=3600.0)
    message = ""
    if rank == 1:
        transport.close()  # type: ignore[attr-defined]
    else:
        try:
            transport.receive(Channel(1, 0, False), (TensorSpec("x", (4,), "float32"),)).wait()
        except TransportError as error:
            message = str(error)
    dist.barrier()
    return message


def burst(rank: int, world: int, count: int, slots: int) -> list[bool]:
    """Rank 0 sends more messages than there are slots before rank 1 posts its first receive."""
    transport = make("ipc", rank, world, slots=slots)
    channel, payload = Channel(0, 1, True), (TensorSpec("x", (1000,), "float32"),)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if rank == 0:
        sends = [transport.send(channel, {"x": torch.full((1000,), float(i), device=device)}) for i in range(count)]
        if device == "cuda":
            torch.cuda.synchronize()
        done = [send.done() for send in sends]
        dist.barrier()
        for send in sends:
            send.wait()
        dist.barrier()
        return done
    dist.barrier()
    values = [transport.receive(channel, payload).wait()["x"][0].item() for _ in range(count)]
    dist.barrier()
    return [value == i for i, value in enumerate(values)]
