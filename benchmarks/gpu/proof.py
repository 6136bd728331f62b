"""Everything that only a GPU can show, from a bare machine: one command, in pieces that end in time and are kept.

    python benchmarks/gpu/proof.py OUT [--wheels FOLDER] [--seconds 540] [--only NAMES] [--rehearse]

Each call goes on where the last one stopped: pieces that have ended well are not run again, one is begun only if its
time is left, and what it found is in ``OUT/proof.json`` before the next begins. So a machine that is lent for minutes
at a time, or taken away, loses one piece at most; give a new machine the ``proof.json`` of the last. ``--wheels`` are
installed first, parts of a wheel (``NAME.whl.part0``, ...) joined. ``--rehearse`` does all of it on CPU processes with
tiny models. Exit codes: 0 all pieces have ended well, 1 one has failed, 3 some are left for another call. Needs nothing
but Python to begin with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A command and what to keep of it. ``seconds``: its limit; ``command`` and ``figures`` get the piece's folder and
    whether this is a rehearsal."""

    name: str
    seconds: int
    command: Callable[[Path, bool], Sequence[str]]
    figures: Callable[[Path], Figures] = lambda folder: {}


def _bench(folder: Path, rehearsal: bool, *more: str) -> list[str]:
    small = ["--size", "tiny", "--batches", "2", "--microbatches", "4", "--search", "0.2", "--partition-search", "1",
             "--memory-gb", "2", "--schedules", "megatron-interleaved,dip"]  # fmt: skip
    return ["-m", "benchmarks.gpu", "--out", str(folder), "--limit", "520", *(small if rehearsal else ()), *more]


def _again(folder: Path, rehearsal: bool) -> list[str]:
    """With the costs of the first run, so that only the training is measured anew."""
    return _bench(folder, rehearsal, "--costs", str(folder.parent / "vlm" / "costs.json"))


def _loop(case: str) -> Callable[[Path, bool], Sequence[str]]:
    def command(folder: Path, rehearsal: bool) -> list[str]:
        small = ["--size", "tiny", "--ranks", "2", "--iterations", "5", "--schedules", "dynamic"]
        return ["-m", "benchmarks.gpu.loops", case, "--out", str(folder.parent), *(small if rehearsal else ())]

    return command


def _tests(folder: Path, rehearsal: bool) -> list[str]:
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "tests/megatron/test_shared_gpu.py", "-rs"]


def _profile(folder: Path, rehearsal: bool) -> list[str]:
    costs = ["--json", "--layers", "--out", str(folder / "costs.json")]
    if not rehearsal:
        return ["-m", "dip_megatron.cli", "profile", "--model", "vlm-s", *costs]
    from tests.profile.test_profile import TINY

    (folder / "tiny.yaml").write_text(TINY)
    return ["-m", "dip_megatron.cli", "profile", "--model", str(folder / "tiny.yaml"), "--repeats", "1", *costs]


def _bridge(folder: Path, rehearsal: bool) -> list[str]:
    small = ["--ranks", "2", "--iterations", "3"] if rehearsal else []
    return ["-m", "benchmarks.gpu.bridge", "--out", str(folder), *small]


def _transports(folder: Path, rehearsal: bool) -> list[str]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/runtime/test_transports.py"]
    few = "overwrites" if rehearsal else "ipc or staging or overwrites or slots or choice"
    shared = ["--percent", "12", "--card-gb", "10", "--limit", "160", "--out", str(folder)]
    return ["-m", "benchmarks.shared.ranks", *shared, "--", *pytest, "-k", few]


def _faults(folder: Path, rehearsal: bool) -> list[str]:
    return ["-m", "benchmarks.gpu.faults", "--out", str(folder), *(["--ranks", "2"] if rehearsal else [])]


def summary(folder: Path) -> Figures:
    """What a benchmark found, schedule by schedule; empty where it wrote nothing."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    keep = ("gain", "speedup", "seconds", "spread", "tokens_per_second", "prediction_error", "measured_over_predicted",
            "bubble_measured", "bubble", "peak_gb", "predicted_peak_gb", "loss_difference", "failure")  # fmt: skip
    return {
        line.get("name", line.get("schedule")): {k: line[k] for k in keep if line.get(k) not in (None, "")}
        for line in record["summary"]
    }


def _doctor(folder: Path, rehearsal: bool) -> list[str]:
    """For the record: what it misses may be what a piece needs, or not."""
    return ["-c", "import subprocess, sys; subprocess.run([sys.executable, '-m', 'dip_megatron.cli', 'doctor'])"]


PIECES = (
    Piece("doctor", 60, _doctor),
    Piece("tests", 400, _tests),
    Piece("transports", 180, _transports),
    Piece("faults", 240, _faults),
    Piece("profile", 300, _profile),
    Piece("vlm", 540, _bench, summary),
    Piece("vlm-again", 420, _again, summary),
    Piece("vlm-third", 420, _again, summary),
    Piece("llava", 480, _loop("llava"), summary),
    Piece("t2v", 480, _loop("t2v"), summary),
    Piece("experts", 480, _loop("experts"), summary),
    Piece("bridge", 480, _bridge, summary),
)


class Proof:
    """The record of all calls so far, in ``out/proof.json``."""

    def __init__(self, out: Path, rehearsal: bool):
        self.out, self.rehearsal = out, rehearsal
        self.path = out / "proof.json"
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        if found and found.get("rehearsal") != rehearsal:
            raise SystemExit(
                f"{self.path} is of a {'rehearsal' if found.get('rehearsal') else 'proof'}; use another OUT"
            )
        self.pieces: dict[str, dict[str, Any]] = found.get("pieces", {})

    def done(self, name: str) -> bool:
        """Whether a piece has ended well."""
        return self.pieces.get(name, {}).get("status") == "done"

    def keep(self, name: str, entry: dict[str, Any]) -> None:
        """Write at once, and whole: a call may be cut at any time."""
        self.pieces[name] = entry
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"rehearsal": self.rehearsal, "pieces": self.pieces}, indent=1))
        os.replace(scratch, self.path)

    def run(self, piece: Piece, limit: float) -> None:
        """Run a piece for at most ``limit`` seconds; its output goes to a file beside the record."""
        folder = self.out / piece.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *piece.command(folder, self.rehearsal)]
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if self.rehearsal:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log, began = self.out / f"{piece.name}.txt", time.monotonic()
        self.keep(piece.name, {"status": "cut", "log": log.name})  # unless it comes back
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                status = "done" if process.wait(limit) == 0 else f"failed ({process.returncode})"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
                os.killpg(process.pid, 9)
                process.wait()
        tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-15:]
        self.keep(
            piece.name,
            {"status": status, "seconds": round(time.monotonic() - began, 1), "log": log.name,
             "figures": piece.figures(folder), "tail": [] if status == "done" else tail},
        )  # fmt: skip


def install(wheels: Path, site: Path) -> None:
    """Join wheels that came in parts, and install all of them where this process and those it starts look first."""
    for first in sorted(wheels.glob("*.whl.part0")):
        whole = first.with_suffix("")
        parts = sorted(wheels.glob(f"{whole.name}.part*"), key=lambda part: int(part.suffix.removeprefix(".part")))
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    found = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    if not found:
        raise SystemExit(f"no wheels in {wheels}")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(site), *found], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(site), os.environ.get("PYTHONPATH")) if p)


def table(proof: Proof, pieces: Sequence[Piece]) -> str:
    """What is known so far, in plain words."""
    lines = []
    for piece in pieces:
        entry = proof.pieces.get(piece.name)
        lines.append(f"{piece.name}: {'not yet' if entry is None else entry['status']}")
        for name, figures in (entry or {}).get("figures", {}).items():
            numbers = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
            lines.append(f"  {name}: {numbers}")
        lines += [f"  | {line}" for line in (entry or {}).get("tail", [])]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, pieces: Sequence[Piece] = PIECES) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Everything that only a GPU can show, in pieces.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path, help="install these first")
    parser.add_argument("--site", type=Path, default=Path("/tmp/proof-site"), help="where to (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=540.0, help="of this call (default: %(default)s)")
    parser.add_argument("--only", help="names of pieces, comma-separated; run even if they have ended well")
    parser.add_argument("--rehearse", action="store_true", help="on CPU processes, with tiny models")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.seconds
    asked = given.only.split(",") if given.only else [piece.name for piece in pieces]
    if unknown := set(asked) - {piece.name for piece in pieces}:
        parser.error(f"no pieces {', '.join(sorted(unknown))}; there are {', '.join(piece.name for piece in pieces)}")
    given.out.mkdir(parents=True, exist_ok=True)
    proof = Proof(given.out.resolve(), given.rehearse)
    if given.wheels is not None:
        install(given.wheels, given.site)
    begun = False
    for piece in pieces:
        if piece.name not in asked or (proof.done(piece.name) and not given.only):
            continue
        left = deadline - time.monotonic()
        if begun and left < piece.seconds:
            print(f"{piece.name} needs up to {piece.seconds} s, {left:.0f} s are left: call again", flush=True)
            break
        print(f"{piece.name} ...", flush=True)
        proof.run(piece, min(piece.seconds, left - 10))
        begun = True
    text = table(proof, pieces)
    (given.out / "proof.txt").write_text(text + "\n")
    print(text)
    entries = [proof.pieces.get(name, {}).get("status") for name in asked]
    if any(entry not in (None, "done", "cut") for entry in entries):
        return 1
    return 0 if all(entry == "done" for entry in entries) else 3


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
