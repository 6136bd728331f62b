"""What is installed, in which version, and what each library gives."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import dip_megatron

from ..compat.releases import TESTED, has_training_loop, megatron_version, training_loop_fault, version_numbers
from .check import Check, Status


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether a module can be found; it isn't imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def python() -> Iterator[Check]:
    """The interpreter, and this package."""
    yield Check("Python", Status.OK, f"{platform.python_version()} at {sys.executable}")
    yield Check("dip_megatron", Status.OK, f"{dip_megatron.__version__} at {next(iter(dip_megatron.__path__))}")


def planning() -> Iterator[Check]:
    """What plans are searched with."""
    names = ("numba", "numpy", "scipy", "pydantic")
    for name in names:
        importlib.import_module(name)
    importlib.import_module("dip_megatron.schedulers.dip.engine")
    yield Check("planning", Status.OK, ", ".join(f"{name} {version_of(name)}" for name in names))


def torch() -> Iterator[Check]:
    """torch, and what it was built for."""
    way_out = "install torch >= 2.4 as your cluster needs it"
    if not importable("torch"):
        yield Check("torch", Status.BROKEN, "not installed", "plans can be made and drawn, nothing can train", way_out)
        return
    module = importlib.import_module("torch")
    built = f"CUDA {module.version.cuda}" if module.version.cuda else "CPU only"
    yield Check("torch", Status.OK, f"{module.__version__}, built for {built}")


def megatron_core() -> Iterator[Check]:
    """Megatron-Core, and whether it is a release that the tests cover."""
    if not importable("megatron.core"):
        yield Check(
            "Megatron-Core", Status.BROKEN, "not installed", "plans can be made and drawn, nothing can train",
            "install your cluster's build, or megatron-core >= 0.16.1 from the index",
        )  # fmt: skip
        return
    version, (oldest, newest) = megatron_version().partition("+")[0], TESTED
    if oldest <= version_numbers() <= newest:
        yield Check("Megatron-Core", Status.OK, version)
        return
    tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
    yield Check(
        "Megatron-Core", Status.LIMITED, version, f"DIP is tested with {tested}",
        "look at the lines below, and compare losses with --dip-schedule off before a long run",
    )  # fmt: skip


def training_loop() -> Iterator[Check]:
    """``megatron.training``, and whether it can be imported."""
    name = "megatron.training"
    if not importable("megatron.core"):
        return
    if not has_training_loop():
        yield Check(
            name, Status.LIMITED, "not installed: wheels of Megatron-Core before 0.17 don't bring it",
            "the executor runs, dip run and the --dip- flags don't",
            "put a Megatron-LM checkout on PYTHONPATH, or install megatron-core >= 0.17",
        )  # fmt: skip
        return
    fault = training_loop_fault()
    if fault is not None:
        yield Check(
            name, Status.BROKEN, f"can't be imported: {fault}", "dip run and the --dip- flags don't work",
            "install what is missing",
        )  # fmt: skip
        return
    yield Check(name, Status.OK, "can be imported")


def transformer_engine() -> Iterator[Check]:
    """NVIDIA's Transformer Engine: what it gives, or its absence takes."""
    name, version = "Transformer Engine", version_of("transformer-engine") or version_of("transformer_engine_torch")
    if not importable("transformer_engine"):
        yield Check(
            name, Status.LIMITED, "not installed",
            "no FP8 and none of its fused kernels; models need --transformer-impl local, and packed sequences attend "
            "through torch",
            "on GPUs: pip install --no-build-isolation transformer-engine[pytorch]",
        )  # fmt: skip
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # its libraries may miss the GPU's
        yield Check(
            name, Status.BROKEN, f"{version or 'version unknown'}, can't be imported: {error}",
            "Megatron's default layers (--transformer-impl transformer_engine) can't be built",
            "install the build for this torch and CUDA, or remove it and use --transformer-impl local",
        )  # fmt: skip
        return
    yield Check(
        name, Status.OK, f"{version or 'version unknown'}: its fused layers and FP8; weight gradients fused into "
        "main_grad; plans may split its linears' backward",
    )  # fmt: skip


def _nvidia_apex() -> bool:
    return importable("apex.multi_tensor_apply") and importable("amp_C")


def apex() -> Iterator[Check]:
    """NVIDIA's Apex, which no package index has under that name."""
    way_out = (
        "build NVIDIA's from https://github.com/NVIDIA/apex with its C++ and CUDA extensions (docs/with-megatron.md); "
        "the index's package apex is another project"
    )
    fused = importable("fused_weight_gradient_mlp_cuda")
    given = "fused optimizers and norms"
    if _nvidia_apex():
        if fused:
            yield Check("Apex", Status.OK, f"NVIDIA's: {given}; weight gradients fused into main_grad")
            return
        yield Check(
            "Apex", Status.LIMITED, f"NVIDIA's: {given}; built without fused_weight_gradient_mlp_cuda",
            "Megatron's local linears need --no-gradient-accumulation-fusion", way_out,
        )  # fmt: skip
        return
    foreign = importable("apex")
    detail = "a package apex that is not NVIDIA's" if foreign else "not installed"
    if importable("transformer_engine"):
        lost = "only layers of --transformer-impl local miss it: use --no-gradient-accumulation-fusion with them"
    else:
        lost = (
            "weight gradients aren't fused into main_grad (use --no-gradient-accumulation-fusion), and norms and Adam "
            "are torch's"
        )
    yield Check("Apex", Status.LIMITED, detail, lost, f"pip uninstall apex, then {way_out}" if foreign else way_out)


def resuming() -> Iterator[Check]:
    """Whether runs with a distributed optimizer can go on from a checkpoint."""
    name = "resuming --use-distributed-optimizer"
    if not importable("megatron.core"):
        return
    if importable("transformer_engine") or _nvidia_apex():
        yield Check(name, Status.OK, "with the optimizer's state")
        return
    yield Check(
        name, Status.LIMITED, "Megatron's Adam is torch's, which has no step before its first one",
        "Megatron can't load such an optimizer's state (`assert len(steps) == 1`), with DIP or without",
        "install Transformer Engine or NVIDIA's Apex, or go on with --no-load-optim, or without the distributed "
        "optimizer",
    )  # fmt: skip
