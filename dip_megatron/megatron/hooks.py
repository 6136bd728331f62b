"""The hooks in Megatron's training loop: five attributes, all looked up when they are called."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..config import ConfigurationError
from ..models.family import ModelFamily
from .arguments import add_arguments, check_arguments, dip_config
from .checkpoints import share_step
from .families import known_families
from .session import DipSession

logger = logging.getLogger(__name__)
_MARK = "dip_megatron_hook"


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
        hooks: Hooks | None = getattr(loaded.get_model, _MARK, None)
        return hooks

    def install(self) -> list[str]:
        """Hook in whatever is there; returns the names of what could not be hooked."""
        missing = []
        for module, attribute, wrap in (
            ("megatron.training.arguments", "add_megatron_arguments", self._arguments),
            ("megatron.training.arguments", "validate_args", self._validated),
            # initialize.py imported it by name in releases before 0.17.
            ("megatron.training.initialize", "validate_args", self._validated),
            ("megatron.training.training", "get_model", self._get_model),
            ("megatron.training.training", "get_forward_backward_func", self._forward_backward),
            ("megatron.training.checkpointing", "generate_state_dict", self._state_dict),
        ):
            loaded = importlib.import_module(module)
            original = getattr(loaded, attribute, None)
            if original is None:
                missing.append(f"{module}.{attribute}")
            elif not hasattr(original, _MARK):
                wrapped = functools.wraps(original)(wrap(original))
                setattr(wrapped, _MARK, self)
                setattr(loaded, attribute, wrapped)
        return [m for m in missing if m != "megatron.training.initialize.validate_args"]

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
            if config.schedule != "off":
                self._session = DipSession(args, config, self._families)
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
