"""``dip doctor``: what works in this environment, what doesn't, and what that costs."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..doctor import Check, Status, diagnose
from ..doctor.checks import CHECKS
from .common import json_option, print_json


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Look at this environment: versions, what can be hooked, libraries, devices, cores.

    Ends with 1 if something is broken, so that nothing can train under DIP or not as it is meant to; with 0 otherwise.
    """
    found = diagnose(CHECKS)
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
