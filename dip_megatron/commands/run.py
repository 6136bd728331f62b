"""``dip run``: a Megatron pretrain script, unedited, with the hooks installed."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import click

from ..describe.files import ConfigurationError


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--dip-schedule", metavar="SCHEDULE", help="As DIP_SCHEDULE in the environment: dynamic, static, off.")
@click.option("--dip-config", metavar="FILE", help="As DIP_CONFIG in the environment: a YAML file of settings.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(dip_schedule: str | None, dip_config: str | None, script: Path, arguments: tuple[str, ...]) -> None:
    """Run SCRIPT ARGUMENTS... with DIP's hooks installed.

    Launch it as you launch the script: `torchrun ... -m dip_megatron.cli run pretrain_vlm.py ... --dip-schedule
    dynamic`. Scripts of megatron.training take the --dip- flags among their own; for those of other loops give the
    flags before SCRIPT, or settings in the environment. SCRIPT's folder is put on the import path, as `python SCRIPT`
    does.
    """
    for name, value in (("DIP_SCHEDULE", dip_schedule), ("DIP_CONFIG", dip_config)):
        if value is not None:
            os.environ[name] = value
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
    import dip_megatron

    try:
        try:
            dip_megatron.install()
        except ImportError as error:
            raise click.ClickException(
                f"dip run needs Megatron-Core, and importing it failed: {error}; install megatron-core, or put a "
                "Megatron-LM checkout on PYTHONPATH"
            ) from error
        except ConfigurationError as error:
            raise click.UsageError(str(error)) from error
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str) and ended.code.startswith("dip: "):  # a refusal: bad input, as of any verb
            raise click.ClickException(ended.code.removeprefix("dip: ")) from ended
        raise


if __name__ == "__main__":
    run()
