"""``dip run``: a Megatron pretrain script, unedited, with the hooks installed."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
)
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(script: Path, arguments: tuple[str, ...]) -> None:
    """Run SCRIPT ARGUMENTS... with DIP's hooks installed.

    Launch it as you launch the script: `torchrun ... -m dip_megatron.cli run pretrain_vlm.py ... --dip-schedule
    dynamic`. SCRIPT's folder is put on the import path, as `python SCRIPT` does.
    """
    if not script.is_file():
        raise click.UsageError(f"{script}: no such script")
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        import torch
    except ImportError:
        raise click.ClickException("dip run needs torch; install torch and megatron-core (see README.md)") from None
    if not torch.cuda.is_available():
        from ..megatron.cpu import install_cpu_platform

        install_cpu_platform()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from ..compat.releases import training_loop

    try:
        training_loop()
    except ImportError as error:
        raise click.ClickException(
            f"dip run needs megatron.training, and importing it failed: {error}; use megatron-core >= 0.17, or put a "
            "Megatron-LM checkout on PYTHONPATH"
        ) from error
    import dip_megatron

    dip_megatron.install()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    run()
