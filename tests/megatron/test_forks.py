"""A fork that has moved ``megatron.training``: made here by renaming the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from examples.llava_digits.runs import Run, Start, started
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.upstream.runs import HERE, run_script

pytestmark = [on_cpu_ranks, needs_megatron_training]
PATCH = Path(__file__).resolve().parents[2] / "patches" / "main.patch"


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package ``acme.training``, and a script that uses it."""
    folder = tmp_path_factory.mktemp("fork")
    import megatron.training

    shutil.copytree(Path(megatron.training.__file__).parent, folder / "acme" / "training")
    (folder / "pretrain_tiny_gpt.py").write_text((HERE / "pretrain_tiny_gpt.py").read_text())
    for path in folder.rglob("*.py"):
        text = re.sub(r"\bmegatron\.training\b", "acme.training", path.read_text())
        path.write_text(re.sub(r"\bfrom \.\.+core\b", "from megatron.core", text))
    return folder


def run(
    way: str, fork: Path, out: Path, *flags: str, ranks: int, monkeypatch: pytest.MonkeyPatch, start: Start = started,
    **settings: str,
) -> Run:  # fmt: skip
    monkeypatch.setenv("LAUNCH_PACKAGE", "acme.training")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return run_script(way, fork / "pretrain_tiny_gpt.py", out, *flags, ranks=ranks, tree=fork, start=start)


@pytest.fixture(scope="module")
def whole(fork: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        return run("absent", fork, tmp_path_factory.mktemp("whole"), ranks=1, monkeypatch=patch, start=forked)


def test_the_environment_alone_switches_dip_on(
    fork: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line and no flag of DIP's anywhere: the start-up file and two variables."""
    log = run("startup", fork, tmp_path, ranks=2, monkeypatch=monkeypatch, DIP_SCHEDULE="dynamic",
              DIP_MODULES="{language: {layers: [[1, 1], [1, 1]]}}", DIP_TRACE_DIR=str(tmp_path / "trace"))  # fmt: skip
    assert log.losses == pytest.approx(whole.losses, rel=1e-5)
    assert len((tmp_path / "trace" / "iterations.jsonl").read_text().splitlines()) == len(whole.losses) == 4


def test_the_shipped_patch_does_too(
    fork: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    added = [line[1:] for line in PATCH.read_text().splitlines() if line.startswith("+") and not line.startswith("+++")]
    package = fork / "acme" / "training" / "__init__.py"
    package.write_text(package.read_text() + "\n".join(added) + "\n")
    trace = tmp_path / "trace"
    log = run("tree", fork, tmp_path, "--dip-schedule", "dynamic", "--dip-trace-dir", str(trace), ranks=2,
              monkeypatch=monkeypatch)  # fmt: skip
    assert log.losses == pytest.approx(whole.losses, rel=1e-5)
    assert len((trace / "iterations.jsonl").read_text().splitlines()) == 4
