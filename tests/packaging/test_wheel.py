"""The wheel, installed beside an environment's other packages and used from an empty folder, far from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.patience import LONG

ROOT = Path(__file__).parents[2]
STARTUP = "dip_megatron_startup.pth"
SHIPPED = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".args")
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built from: building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", STARTUP, "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("dip_megatron", "configs"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.nb[ic]")
        )
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("dip_megatron-*.whl")
    return built


@pytest.fixture(scope="module")
def interpreter(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an environment of its own, laid over the one that runs the tests, in which pip has installed the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = _packages(folder)
    pip("install", "--target", str(packages), str(wheel))
    _bring_kernels(packages / "dip_megatron")
    # After the wheel's, so that its start-up file is the first to be read.
    (packages / "zz_laid_over.pth").write_text("".join(f"{path}\n" for path in sys.path if "site-packages" in path))
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def installed(interpreter: str) -> Path:
    """The folder that the wheel was installed in; the same one, so that kernels are compiled once."""
    return _packages(Path(interpreter).parents[1])


def _packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))


def _bring_kernels(package: Path) -> None:
    """What the checkout has compiled, so that nothing is compiled again: it would take the better part of a minute."""
    for source in (ROOT / "dip_megatron").rglob("*.py"):
        compiled = list((source.parent / "__pycache__").glob(f"{source.stem}.*.nb[ic]"))
        if compiled:
            same = package / source.relative_to(ROOT / "dip_megatron")
            shutil.copystat(source, same)  # numba asks when a file was written
            (same.parent / "__pycache__").mkdir(exist_ok=True)
            for file in compiled:
                shutil.copy2(file, same.parent / "__pycache__")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", arguments[0], "--no-deps"]
    done = subprocess.run([*command, *arguments[1:]], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr


def python(installed: Path | None, folder: Path, *arguments: str, interpreter: str = sys.executable,
           **variables: str) -> str:  # fmt: skip
    """Run Python in ``folder`` with the installed package, and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(installed or ""), "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [interpreter, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_wheel_and_source_archive_bring_every_shipped_file(source: Path, wheel: Path, tmp_path: Path) -> None:
    expected = {f"dip_megatron/{name}" for name in SHIPPED} | {"dip_megatron/py.typed", STARTUP}
    assert len(expected) > 50
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert expected <= files


def test_plans_are_compared_from_what_is_shipped(installed: Path, empty: Path) -> None:
    printed = python(
        installed, empty, "-m", "dip_megatron.cli", "compare", "--model", "vlm-s", "--cluster", "h100", "--workload",
        "vlm-mix", "--iterations", "1", "--microbatches", "4", "--partition", "vlm-s", "--budget", "0.05",
        "--schedules", "megatron-1f1b,dip", "--json",
    )  # fmt: skip
    assert json.loads(printed)


def test_the_doctor_finds_itself_where_it_is_installed(installed: Path, empty: Path) -> None:
    checks = {c["name"]: c for c in json.loads(python(installed, empty, "-m", "dip_megatron.cli", "doctor", "--json"))}
    assert checks["dip_megatron"]["detail"].endswith(f" at {installed / 'dip_megatron'}")
    assert "broken" not in {check["status"] for check in checks.values()}


@on_cpu_ranks
@needs_megatron_training
def test_a_model_trains(installed: Path, empty: Path) -> None:
    example = empty / "digits"
    shutil.copytree(ROOT / "examples" / "llava_digits", example, ignore=shutil.ignore_patterns("__pycache__"))
    script = example / "located.py"
    script.write_text(
        "import runpy\nimport dip_megatron\nprint('using', *dip_megatron.__path__, flush=True)\n"
        f"runpy.run_path({str(example / 'pretrain_llava_digits.py')!r}, run_name='__main__')\n"
    )
    printed = python(
        installed, empty, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "dip_megatron.cli", "run", str(script), *(example / "tiny.args").read_text().split(), "--train-iters", "3",
        "--global-batch-size", "2", "--eval-iters", "1", "--vision-num-layers", "2", "--lr-warmup-iters", "1",
        "--pipeline-model-parallel-size", "2", "--dip-schedule", "dynamic", "--dip-search-budget", "0.05",
    )  # fmt: skip
    assert printed.count(f"using {installed / 'dip_megatron'}\n") == 2
    assert "iteration        3/" in printed
    assert "[dip] iteration 3: measured" in printed


def test_what_is_installed_starts_with_python_and_only_where_it_is_asked_for(interpreter: str, empty: Path) -> None:
    source = (
        "import sys; print([type(f).__module__ for f in sys.meta_path]); print('torch' in sys.modules);"
        "import dip_megatron; print(*dip_megatron.__path__)"
    )
    for asked in ("", "dynamic"):
        printed = python(None, empty, "-c", source, interpreter=interpreter, DIP_SCHEDULE=asked, DIP_CONFIG="")
        assert ("dip_megatron.megatron.watching" in printed) == bool(asked)
        assert "True" not in printed  # a start of Python stays as short as it was
        assert str(Path(interpreter).parents[1]) in printed


@on_cpu_ranks
@needs_megatron_training
def test_an_unedited_script_trains_under_dip_by_the_environment_alone(interpreter: str, empty: Path) -> None:
    """As ``torchrun SCRIPT`` would on a GPU; here something must let Megatron begin on the CPU."""
    example = empty / "digits"
    shutil.copytree(ROOT / "examples" / "llava_digits", example, ignore=shutil.ignore_patterns("__pycache__"))
    plain = (example / "pretrain_llava_digits.py").read_text()
    assert "dip_megatron.install" not in plain
    script = example / "on_cpu.py"
    script.write_text(
        "import runpy\nfrom dip_megatron.megatron.cpu import install_cpu_platform\ninstall_cpu_platform()\n"
        "from dip_megatron.compat.host import adapt_training\nadapt_training()\n"
        f"runpy.run_path({str(example / 'pretrain_llava_digits.py')!r}, run_name='__main__')\n"
    )
    printed = python(
        None, empty, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
        *(example / "tiny.args").read_text().split(), "--train-iters", "3", "--global-batch-size", "2", "--eval-iters",
        "1", "--vision-num-layers", "2", "--lr-warmup-iters", "1", "--pipeline-model-parallel-size", "2",
        interpreter=interpreter, DIP_SCHEDULE="dynamic", DIP_SEARCH_BUDGET="0.05",
    )  # fmt: skip
    assert "iteration        3/" in printed
    assert "[dip] iteration 3: measured" in printed
