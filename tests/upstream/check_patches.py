"""Checks patches/: each is applied to a Megatron tree, trained with in several ways, and taken back."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.llava_digits.runs import ROOT, RunFailed
from tests.upstream.runs import run_script

PATCHES = ROOT / "patches"
TARGET = Path("megatron") / "training" / "__init__.py"
HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5


class CheckFailed(Exception):
    """A patch that doesn't do what it should; the message says what."""


def patch_for(tree: Path) -> tuple[str, Path]:
    """The tree's version and its patch: the one of its minor release, for anything newer than those main's."""
    os.environ.setdefault("NO_VCS_VERSION", "1")
    version = runpy.run_path(str(tree / "megatron" / "core" / "package_info.py"))["__shortversion__"]
    minor = ".".join(version.split(".")[:2])
    named = sorted(PATCHES.glob(f"core_v{minor}.*.patch"))
    return version, named[0] if named else PATCHES / "main.patch"


@contextmanager
def applied(patch: Path, tree: Path) -> Iterator[None]:
    """Within, ``tree`` is patched; afterwards the patched file is what it was, byte for byte."""
    before = (tree / TARGET).read_bytes()
    git_apply(patch, tree)
    try:
        yield
    finally:
        git_apply(patch, tree, "--reverse")
        if (tree / TARGET).read_bytes() != before:
            raise CheckFailed(f"{tree / TARGET} is not what it was before {patch.name} was applied and taken back")


def git_apply(patch: Path, tree: Path, *flags: str) -> None:
    """Raises CheckFailed with git's words."""
    # Outside of any repository, so that a tree that lies in one is not taken for a part of it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(
        ["git", "apply", *flags, str(patch)], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckFailed(f"git apply {' '.join(flags)} {patch.name}: {done.stderr.strip()}")


def check_tree(tree: Path, script: Path, out: Path) -> None:
    """Raises CheckFailed or RunFailed."""
    version, patch = patch_for(tree)
    print(f"Megatron {version}, {script.name}: {patch.name}", flush=True)
    unpatched = run_script("absent", script, out, ranks=2, tree=tree, name="unpatched").losses
    with applied(patch, tree):
        hides_no_error(tree)
        runs = {
            "without dip_megatron": run_script("absent", script, out, ranks=2, tree=tree, name="absent").losses,
            "without --dip-schedule": run_script("tree", script, out, ranks=2, tree=tree, name="off").losses,
        }
        for name, losses in runs.items():
            if losses != unpatched:
                raise CheckFailed(f"patched, {name}: losses {losses}, unpatched {unpatched}")
            print(f"  {name}: the losses of the unpatched tree", flush=True)
        flags = ("--dip-schedule", "dynamic", "--dip-trace-dir", str(out / "trace"))
        dip = run_script("tree", script, out, *flags, ranks=2, tree=tree, name="dip").losses
        if not (out / "trace" / "iterations.jsonl").is_file():
            raise CheckFailed("patched, --dip-schedule dynamic: DIP ran no iteration")
        gap = max(abs(dip[i] - loss) / loss for i, loss in unpatched.items())
        if gap > TOLERANCE:
            raise CheckFailed(f"patched, --dip-schedule dynamic: losses {dip}, unpatched {unpatched}")
        print(f"  --dip-schedule dynamic: losses differ by {gap:.1e} of the unpatched tree's at most", flush=True)
    print(f"  {patch.name} is taken back", flush=True)


def hides_no_error(tree: Path) -> None:
    """A dip_megatron that can't be imported for want of something else must stop the import of megatron.training."""
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "dip_megatron"
        broken.mkdir()
        (broken / "__init__.py").write_text("import a_package_that_is_missing\n")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(tree)])}
        done = subprocess.run(
            [sys.executable, "-c", "import megatron.training"], env=environment, cwd=folder, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
    if done.returncode == 0 or "a_package_that_is_missing" not in done.stderr:
        raise CheckFailed("the patch hides an error of dip_megatron's own")
    print("  a broken dip_megatron is not hidden", flush=True)


def check(checkouts: list[Path]) -> None:
    """All given checkouts, or a copy of what is installed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for number, tree in enumerate(checkouts):
            check_tree(tree, tree / "pretrain_vlm.py", out / str(number))
        if not checkouts:
            installed = importlib.util.find_spec("megatron.training")
            if installed is None or installed.origin is None:
                raise CheckFailed("the installed megatron-core brings no megatron.training; name a checkout")
            shutil.copytree(Path(installed.origin).parents[1], out / "tree" / "megatron")
            check_tree(out / "tree", HERE / "pretrain_tiny_gpt.py", out)


if __name__ == "__main__":
    # As an exception, so that the patch is taken back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("scripts/check_patches: ended by SIGTERM"))
    try:
        check([Path(argument).resolve() for argument in sys.argv[1:]])
    except (CheckFailed, RunFailed) as failure:
        sys.exit(f"scripts/check_patches: {failure}")
