"""What a run would be set to here, and whether a flag, the environment, a file or a default says so."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from ..describe.files import ConfigurationError
from ..environment import DEFAULT, ENVIRONMENT, FILE, FLAG, load_settings, offers, variable
from ..megatron.arguments import add_arguments
from .check import Check, Checker, Status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigurationError(message)


def settings_of(flags: Sequence[str]) -> Checker:
    """Checks of the settings of a run with these ``--dip-`` flags (others are its own), in this environment."""

    def settings() -> Iterator[Check]:
        try:
            known, rest = add_arguments(_Parser(add_help=False, allow_abbrev=False)).parse_known_args(list(flags))
            wrong = next((word for word in rest if word.startswith("--dip-")), None)
            if wrong is not None:
                raise ConfigurationError(f"{wrong}: no flag of dip_megatron's")
            given = {name.removeprefix("dip_"): value for name, value in vars(known).items()}
            path = load_settings(given).path
            found = offers(given)
        except ConfigurationError as error:
            yield Check("settings", Status.BROKEN, str(error), "a run with them ends before anything is built",
                        "correct what the line names")  # fmt: skip
            return
        names = {
            FLAG: "--dip-{flag}",
            ENVIRONMENT: "{variable} in the environment",
            FILE: str(path),
            DEFAULT: "the default",
        }
        defaults = []
        for setting, values in found.items():
            said = {
                origin: names[origin].format(flag=setting.replace("_", "-"), variable=variable(setting))
                for origin in values
            }  # fmt: skip
            (winner, value), *lower = values.items()
            if winner == DEFAULT:
                defaults.append(f"{setting} {_shown(value)}")
                continue
            over = "".join(f"; {said[origin]} has {_shown(lost)}" for origin, lost in lower if origin != DEFAULT)
            yield Check(f"setting {setting}", Status.OK, f"{_shown(value)}, by {said[winner]}{over}")
        yield Check("settings by default", Status.OK, ", ".join(defaults))

    return settings


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return ", ".join(f"{name} {own.model_dump(exclude_none=True)}" for name, own in value.items()) or "none"
    return "none" if value is None else str(value)
