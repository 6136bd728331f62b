"""NVIDIA's multi-process service for one benchmark: a private daemon that divides a GPU among ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PLACES = ("/usr/local/nvidia/bin", "/usr/bin", "/usr/local/cuda/bin")


class MpsError(RuntimeError):
    """The service is not there or does not start; the message says what was tried."""


def control_program() -> str:
    """The path of nvidia-cuda-mps-control. Raises MpsError."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_PLACES])
    found = shutil.which("nvidia-cuda-mps-control", path=path)
    if found is None:
        raise MpsError(f"nvidia-cuda-mps-control is not on {path}; use --no-mps to let ranks take turns on the GPU")
    return found


@contextmanager
def divided_gpu(percent: float, memory_gb: float) -> Iterator[dict[str, str]]:
    """Start the service with pipe and log directories of its own, and stop it after.

    Yields the environment of the ranks: each gets ``percent`` of the multiprocessors and ``memory_gb`` of memory. Other
    processes on the GPU are not concerned: they don't know the pipe directory. Raises MpsError.
    """
    program = control_program()
    with tempfile.TemporaryDirectory(prefix="dip-mps-") as folder:
        pipe, log = Path(folder) / "pipe", Path(folder) / "log"
        pipe.mkdir()
        log.mkdir()
        own = {"CUDA_MPS_PIPE_DIRECTORY": str(pipe), "CUDA_MPS_LOG_DIRECTORY": str(log)}
        environment = {**os.environ, **own}
        said = log / "start.txt"
        with said.open("w") as file:  # no pipe: the daemon would hold it open
            started = subprocess.run([program, "-d"], env=environment, stdout=file, stderr=file, timeout=60)
        if started.returncode != 0:
            raise MpsError(f"{program} -d failed: {' '.join(said.read_text().split())}")
        try:
            yield {
                **own,
                "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{percent:g}",
                "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={memory_gb * 1000:.0f}M",
            }
        finally:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run([program], env=environment, input="quit\n", text=True, capture_output=True, timeout=60)
            for written in sorted(log.glob("*.log")):
                lines = [line for line in written.read_text(errors="replace").splitlines() if "rror" in line]
                for line in lines[-5:]:
                    print(f"mps: {line}", flush=True)
