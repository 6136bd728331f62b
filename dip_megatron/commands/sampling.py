"""A script of a training loop, run as it is up to its first iteration, without the ranks it was written for."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..describe.files import ConfigurationError
from .common import InputError

if TYPE_CHECKING:  # Megatron's own parts load once the world is pretended
    from ..megatron.sampling import Sample

SIZES = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")


def replica_size(arguments: tuple[str, ...], flags: tuple[str, ...] = SIZES) -> int:
    """GPUs of one replica, by the script's flags (some of the product alone with ``flags``)."""
    size = 1
    for flag in flags:
        for place, word in enumerate(arguments):
            name, _, value = word.partition("=")
            if name == flag:
                value = value or (arguments[place + 1] if place + 1 < len(arguments) else "")
                if not value.isdigit() or int(value) < 1:
                    raise InputError(f"{flag} {value}: not a number of GPUs; give --gpus")
                size *= int(value)
    return size


def on_the_host(hide_gpus: bool = True) -> None:
    """From now on Megatron computes here, and says nothing of what this machine hasn't and the cluster has."""
    if hide_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DIP_SCHEDULE"] = "dynamic"
    warnings.simplefilter("ignore")
    from ..megatron.cpu import install_cpu_platform

    install_cpu_platform()


def sampled(
    script: Path, arguments: tuple[str, ...], size: int, wanted: Callable[[int, int], int], *, hide_gpus: bool = True,
    **session: Any,
) -> Sample:  # fmt: skip
    """Run the script up to its first iteration, as the first of ``size`` ranks. ``wanted`` says how many microbatches
    to read, by an iteration's and the number of replicas; ``session`` goes to
    :class:`~dip_megatron.megatron.sampling.SamplingSession`. Raises InputError where it doesn't come so far."""
    if not script.is_file():
        raise InputError(f"{script}: no such script")
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    from ..compat.lone_rank import pretend_world

    pretend_world(size)
    on_the_host(hide_gpus)
    from ..megatron.hooks import Hooks
    from ..megatron.sampling import SampleTaken, SamplingSession

    Hooks.installed().runs.make_session = lambda loop, config, families, tell: SamplingSession(
        loop, config, families, wanted=wanted(loop.settings.num_microbatches, loop.settings.parallel.dp), **session
    )  # fmt: skip
    said = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(script), run_name="__main__")
    except SampleTaken as taken:
        return taken.sample
    except SystemExit as ended:
        last = next((line for line in reversed(said.getvalue().splitlines()) if line.strip()), "it said nothing")
        why = ended.code if isinstance(ended.code, str) else f"{last} (status {ended.code})"
        raise InputError(f"{script.name} ended before its first iteration: {why}") from ended
    except ConfigurationError:  # DIP's own words
        raise
    except Exception as error:
        if os.environ.get("DIP_DEBUG") == "1":
            click.echo(said.getvalue()[-4000:], err=True)
            raise
        raise InputError(
            f"{script.name} stopped before its first iteration: {type(error).__name__}: {error}; here it must start as "
            "it would on its ranks (DIP_DEBUG=1 shows where it stopped)"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    raise InputError(
        f"{script.name} ended without a model that DIP could schedule; see `dip doctor`, and docs/any-loop.md for "
        "loops of your own"
    )
