"""One rank of a benchmark: ``python -m benchmarks.shared.worker MODULE SETTING.json`` runs ``MODULE.work(worker,
setting)`` on each rank of a process group, of one pipeline, on a CPU core or a GPU of its own or a part of one."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dip_megatron.megatron.cpu import install_cpu_platform

install_cpu_platform()  # does nothing where CUDA is available

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from benchmarks.shared.ranks import run_as_rank  # noqa: E402
from dip_megatron.megatron.exchange import GlooExchange  # noqa: E402
from dip_megatron.runtime.transport import Transport  # noqa: E402
from dip_megatron.runtime.transport_choice import TransportKind, choose_transport  # noqa: E402
from dip_megatron.testing.synthetic import draw_weights, wrap  # noqa: E402

TIMEOUT = 300.0


class Worker:
    """A rank's device, precision and exchange with the other ranks."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.everyone = list(range(self.ranks))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.exchange = GlooExchange(self.everyone, 2 * TIMEOUT)
        self.start = time.monotonic()

    @classmethod
    def started(cls, seed: int, own_gpu: bool) -> Worker:
        """Join the process group as one rank of a single pipeline of all ranks, which share the first GPU or, with
        ``own_gpu``, take the host's GPUs in turn."""
        logging.getLogger("megatron").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["RANK"]) % torch.cuda.device_count() if own_gpu else 0)
        dist.init_process_group("gloo")
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=dist.get_world_size())
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
        return cls()

    def transport(self, kind: TransportKind | None = None) -> Transport:
        """A transport between all ranks; the one that suits them, unless ``kind`` names another."""
        return choose_transport(self.everyone, self.rank, self.device, TIMEOUT, self.exchange, kind)

    def log(self, text: str) -> None:
        """Print a line with the time, on the first rank."""
        if self.rank == 0:
            print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on all ranks."""
        return [pickle.loads(data) for data in self.exchange.gather(pickle.dumps(value))]

    def wait_for_device(self) -> None:
        """Wait until this rank's GPU, if it has one, has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def synchronize(self) -> None:
        """Wait until all ranks have done their work."""
        self.wait_for_device()
        self.exchange.gather(b"")

    def timed(self, iterate: Callable[[], Any]) -> float:
        """Run ``iterate`` on all ranks; return the seconds from a common start to the end of the last rank."""
        gc.collect()
        gc.disable()
        self.synchronize()
        begun = time.perf_counter()
        iterate()
        self.synchronize()
        seconds = time.perf_counter() - begun
        gc.enable()
        return float(max(self.gather(seconds)))

    def wrapped(self, bare: Sequence[torch.nn.Module], seed: int) -> list[torch.nn.Module]:
        """Return the chunks on this rank's device, with gradient buffers and weights that don't depend on the cut."""
        chunks = wrap(bare, self.device)
        draw_weights(bare, seed)
        return chunks

    def release(self) -> None:
        """Free the memory of models that are gone, so that the next model finds it in one piece."""
        gc.collect()
        self.wait_for_device()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def squared_norm(chunks: Sequence[torch.nn.Module]) -> float:
    """The sum of squares of the gradients in the chunks' buffers."""
    return sum(float(buffer.grad_data.double().square().sum()) for chunk in chunks for buffer in chunk.buffers)


def main() -> None:
    """Run the work of one rank."""
    setting = json.loads(Path(sys.argv[2]).read_text())
    module = importlib.import_module(sys.argv[1])
    worker = Worker.started(setting["seed"], setting.get("own_gpu", False))
    module.work(worker, setting)
    worker.synchronize()


if __name__ == "__main__":
    run_as_rank(main)
