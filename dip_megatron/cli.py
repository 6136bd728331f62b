"""The ``dip`` command. Verbs are loaded when they are used, so that planning needs neither torch nor Megatron."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

import click

from . import __version__

VERBS = {
    "run": "run a pretrain script with the hooks installed",
    "estimate": "say what a script would gain, without training it",
    "partition": "choose sub-microbatch sizes, segments and layers",
    "plan": "plan the batches of a workload",
    "compare": "all schedules side by side, with bounds",
    "check": "verify plan files",
    "trace": "draw a plan as a Perfetto trace",
    "plot": "draw a plan as a picture",
    "rehearse": "run a job's processes on this machine before it has its GPUs",
    "report": "show a run or a plan in a browser",
    "doctor": "say what works in this environment, and what doesn't",
    "profile": "measure this device, calibrate the cost model",
}


class Verbs(click.Group):
    """The verb ``x`` is the click command ``x`` in ``dip_megatron.commands.x``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in VERBS if importlib.util.find_spec(f"dip_megatron.commands.{verb}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        try:
            module = importlib.import_module(f"dip_megatron.commands.{cmd_name}")
        except ImportError as error:
            raise click.ClickException(
                f"dip {cmd_name} can't be loaded: {error}; install what it needs (see README.md)"
            ) from error
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table, so that help loads no verb.
        with formatter.section("Commands"):
            formatter.write_dl([(verb, VERBS[verb]) for verb in self.list_commands(ctx)])


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dip")
def dip() -> None:
    """Plan, check, draw and run pipeline schedules made for every batch of a large multimodal model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0, 1 where a check found a fault, 2 for bad input (one line on stderr)."""
    try:
        status = dip.main(list(arguments) if arguments is not None else None, prog_name="dip", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        usage = f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""
        click.echo(f"dip: {' '.join(error.format_message().split())}{usage}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"dip: {error.format_message()}", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("dip: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
