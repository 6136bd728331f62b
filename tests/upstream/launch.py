"""Start a Megatron script of any release in one of the ways a user can, on GPU or CPU, with weights drawn by name.

    launch.py WAY SCRIPT ARGUMENTS...

WAY is ``run`` (through ``dip run``), ``tree`` (as ``python SCRIPT``: whatever the Megatron tree itself does),
``absent`` (likewise, and ``dip_megatron`` can't be imported) or ``startup`` (as ``tree``, with the start-up file of
``dip_megatron``'s wheel). ``LAUNCH_PACKAGE`` is the training loop's package if it isn't ``megatron.training``,
``LAUNCH_KILL`` the iteration in which the last rank ends as if its host had gone (SIGKILL). Weights are drawn from
their names, so that runs of the same script at other pipeline sizes and partitions start alike; nothing else is
changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import signal
import site
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = os.environ.get("LAUNCH_PACKAGE", "megatron.training")


class _Absent:
    """Finds no ``dip_megatron``, wherever it is installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "dip_megatron":
            raise ModuleNotFoundError("No module named 'dip_megatron'", name="dip_megatron")


def _load(path: Path) -> ModuleType:
    """A file as a module of its own, so that ``dip_megatron`` need not be there."""
    spec = importlib.util.spec_from_file_location(f"launch_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def draw_weights_before_the_optimizer() -> None:
    """Let Megatron's training loop draw the model's weights by name, right before it builds the optimizer."""
    # The drawing is a file of dip_megatron that imports nothing of it, and must work where it can't be imported.
    draw_by_name = _load(ROOT / "dip_megatron" / "families" / "shared" / "weights.py").draw_by_name
    deviations = _load(ROOT / "examples" / "llava_digits" / "weights.py").deviations
    training: Any = importlib.import_module(f"{PACKAGE}.training")
    build = training.get_megatron_optimizer

    def build_from_drawn(config: Any, chunks: Any, *rest: Any, **kwargs: Any) -> Any:
        draw_by_name(chunks, 7, deviations(0.05, 0.02))
        return build(config, chunks, *rest, **kwargs)

    training.get_megatron_optimizer = build_from_drawn


def end_within_an_iteration() -> None:
    """Let the last rank kill itself in the iteration that ``LAUNCH_KILL`` names, as it reads a microbatch."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    if not (last and "LAUNCH_KILL" in os.environ):
        return
    training: Any = importlib.import_module(f"{PACKAGE}.training")
    get_args = importlib.import_module(PACKAGE).get_args
    train_step = training.train_step

    def killed_step(forward_step: Any, *rest: Any, **kwargs: Any) -> Any:
        def step(*given: Any) -> Any:
            if get_args().curr_iteration + 1 == int(os.environ["LAUNCH_KILL"]):
                os.kill(os.getpid(), signal.SIGKILL)
            return forward_step(*given)

        return train_step(step, *rest, **kwargs)

    training.train_step = killed_step


def begin_on_this_host() -> None:
    """On a host without a GPU, let Megatron run on the CPU."""
    from dip_megatron.compat.host import adapt_training
    from dip_megatron.megatron.cpu import install_cpu_platform

    if install_cpu_platform():
        adapt_training(PACKAGE)
        return
    import torch

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def adapt_example(script: str) -> None:
    """What ``examples/multimodal/train.py`` needs; see :mod:`tests.upstream.multimodal`."""
    if Path(script).resolve().parent.name == "multimodal":
        from tests.upstream.multimodal import cut_down, mend

        cut_down()
        mend()


def _main() -> None:
    way, script, *arguments = sys.argv[1:]
    sys.path[0] = str(ROOT)  # not this folder
    if way == "run":
        import dip_megatron
        from dip_megatron.cli import main

        install = dip_megatron.install

        def install_and_draw(families: Any = (), samples: Any = None) -> None:
            install(families, samples)
            draw_weights_before_the_optimizer()
            end_within_an_iteration()
            adapt_example(script)

        dip_megatron.install = install_and_draw
        main(["run", script, *arguments])
        return
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    if way == "startup":
        site.addsitedir(str(ROOT))
    begin_on_this_host()
    if way == "absent":
        for name in [name for name in sys.modules if name.partition(".")[0] == "dip_megatron"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Absent())  # type: ignore[arg-type]
    draw_weights_before_the_optimizer()
    end_within_an_iteration()
    adapt_example(script)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _main()
