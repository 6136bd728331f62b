"""``dip doctor``: what works in this environment, what doesn't, and what that costs."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..doctor import Check, Status, diagnose
from ..doctor.checks import CHECKS
from ..doctor.recipes import recipe_of
from ..doctor.settings import settings_of
from .common import json_option, print_json, progress_bar


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--recipe", metavar="RECIPE", help="Say whether this runs under DIP, and what stands in the way.")
@click.option("--compile", "compiles", is_flag=True, help="Compile the planner's kernels first, and keep "
              "them: a minute or two of a core after an installation.")  # fmt: skip
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@json_option
def doctor(recipe: str | None, compiles: bool, flags: tuple[str, ...], as_json: bool) -> int:
    """Look at this environment: versions, hooks, libraries, devices, cores, settings; or at a recipe in it.

    Without a recipe FLAGS are those of a run: each --dip- setting is shown with what has set it, a flag, the
    environment, the file or a default, and what has lost.

    RECIPE is a script of megatron.training, followed by its FLAGS; or what makes a configuration of Megatron-Bridge's,
    FILE.py:FUNCTION, MODULE:FUNCTION or the name of a recipe of Bridge's own, followed by changes such as
    model.pipeline_model_parallel_size=4.

    Ends with 1 if something is broken, so that nothing can train under DIP or not as it is meant to; with 0 otherwise.
    """
    with progress_bar("looking", None, as_json) as advance:
        if compiles:
            from ..planner.warm import warm_up_all

            advance("compiling kernels")
            warm_up_all()
        checkers = [*CHECKS, settings_of(flags)] if recipe is None else [recipe_of(recipe, flags)]
        found = diagnose(checkers, lambda name: advance(f"looking at {name}"))
    if as_json:
        print_json([asdict(check) for check in found])
    else:
        for check in found:
            _print(check)
    return int(any(check.status is Status.BROKEN for check in found))


def _print(check: Check) -> None:
    click.echo(f"{check.status:<8} {check.name}: {check.detail}")
    for title, text in (("costs", check.consequence), ("way out", check.way_out)):
        if text:
            click.echo(f"{'':<8}   {title}: {text}")
