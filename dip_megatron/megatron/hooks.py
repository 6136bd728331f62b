"""The hooks in Megatron's training loop: attributes of its modules, all looked up when they are called."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.package_info import __version__ as megatron_version

from ..describe.files import ConfigurationError
from ..families.family import ModelFamily
from ..families.known import known_families
from .arguments import add_arguments, check_arguments, dip_config
from .checkpoints import share_step
from .session import DipSession

_MARK = "dip_megatron_hook"
TESTED = ((0, 16), (0, 19))
"""The oldest and the newest minor release that the tests cover; README.md lists them."""
_BUILDERS = "models that Megatron's builders build, as for pretrain_gpt.py"


def version_numbers() -> tuple[int, int]:
    """Major and minor number of the installed Megatron-Core."""
    major, minor = megatron_version.split(".")[:2]
    return int(major), int(minor)


def warn_of_version(missing: Sequence[str]) -> None:
    """Say once what could not be hooked, or that this Megatron is not a tested one. ``missing`` is from install()."""
    untested = not TESTED[0] <= version_numbers() <= TESTED[1]
    if os.environ.get("RANK", "0") != "0" or not (missing or untested):
        return
    tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
    found = "has all it hooks into"
    if missing:
        found = f"has no {', no '.join(missing)}: --dip-schedule will not work fully"
    logging.getLogger(__name__).warning(
        "dip: Megatron-Core %s %s. DIP is tested with %s (README.md, Versions)", megatron_version, found, tested
    )


class Hooks:
    """Wraps Megatron's functions; with ``--dip-schedule off`` each calls straight through."""

    def __init__(self) -> None:
        self._session: DipSession | None = None
        self._families = list(known_families())

    def add_families(self, families: Sequence[ModelFamily]) -> None:
        """Look for models of these families, too. Raises ValueError if a class has another family already."""
        for family in families:
            known = next((f for f in self._families if f.model_class is family.model_class), None)
            if known is None:
                self._families.append(family)
            elif known is not family:
                raise ValueError(f"{family.model_class.__name__} already belongs to the model family {known.name!r}")

    @staticmethod
    def installed() -> Hooks | None:
        """The hooks that are in place already, if any."""
        loaded = importlib.import_module("megatron.training.training")
        hooks: Hooks | None = getattr(getattr(loaded, "get_model", None), _MARK, None)
        return hooks

    def install(self) -> list[str]:
        """Hook in whatever is there; returns the names of what could not be hooked, with what it is for."""
        missing = []
        for module, attribute, wrap, purpose in (
            ("arguments", "add_megatron_arguments", self._arguments, "the --dip- flags"),
            ("arguments", "validate_args", self._validated, "checking flags, starting DIP"),
            # initialize.py imported it by name in releases before 0.17.
            ("initialize", "validate_args", self._validated, ""),
            ("training", "get_model", self._get_model, "models of a script's provider"),
            ("training", "get_forward_backward_func", self._forward_backward, "the schedule"),
            ("checkpointing", "generate_state_dict", self._state_dict, "the optimizer's step in checkpoints"),
            # From 0.19 on scripts may give a model's config instead of a provider.
            ("models.dist_utils", "build_virtual_pipeline_stages", self._stages, _BUILDERS),
            ("models.dist_utils", "prepare_existing_model_chunks_for_distributed_training", self._prepared, _BUILDERS),
        ):
            name = f"megatron.training.{module}"
            try:
                loaded = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not name.startswith(error.name):
                    raise
                loaded = None
            original = getattr(loaded, attribute, None)
            if original is None:
                if purpose and not (purpose == _BUILDERS and version_numbers() < (0, 19)):
                    missing.append(f"{name}.{attribute} ({purpose})")
            elif not hasattr(original, _MARK):
                wrapped = functools.wraps(original)(wrap(original))
                setattr(wrapped, _MARK, self)
                setattr(loaded, attribute, wrapped)
        return missing

    def _arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda parser: add_arguments(original(parser))

    def _validated(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def validate(args: Any, *rest: Any, **kwargs: Any) -> Any:
            try:
                check_arguments(args)
                result = original(args, *rest, **kwargs)
                check_arguments(args)  # validation derives sizes that the check looks at
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")
            config = dip_config(args)
            if config.on:
                try:
                    self._session = DipSession(args, config, self._families)
                except ConfigurationError as error:
                    sys.exit(f"dip: {error}")
            return result

        return validate

    def _get_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_model(provider: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
            if self._session is None:
                return original(provider, *rest, **kwargs)
            try:
                return original(self._session.segmented(provider), *rest, **kwargs)
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")

        return get_model

    def _stages(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def build_virtual_pipeline_stages(build: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
            if self._session is None:
                return original(build, *rest, **kwargs)
            try:
                # One stage as Megatron asks for it, which is all chunks of this rank.
                return original(self._session.segmented(build), *rest, **kwargs)[0]
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")

        return build_virtual_pipeline_stages

    def _prepared(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(chunks: list[Any], config: Any, *rest: Any, **kwargs: Any) -> Any:
            # Wrappers for mixed precision must know how many chunks there are: the whole model's config doesn't.
            return original(chunks, config if self._session is None else chunks[0].config, *rest, **kwargs)

        return prepare

    def _forward_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
            if self._session is None:
                return original(*args, **kwargs)
            return self._session.forward_backward()

        return get_forward_backward_func

    def _state_dict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_state_dict(*args: Any, **kwargs: Any) -> Any:
            state = original(*args, **kwargs)
            loading = (kwargs.get("optim_sd_kwargs") or {}).get("is_loading", False)
            if self._session is not None and not loading:
                share_step(state)
            return state

        return generate_state_dict
