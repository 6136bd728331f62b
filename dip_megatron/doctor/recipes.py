"""Whether a recipe of Megatron-Bridge, or a script with its flags, runs under DIP, and what stands in the way.

Nothing is built: what a provider builds is read off what its ``provide`` says it returns, what a script builds off the
names in it and in the modules beside it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml

from ..core.faults import nearest
from ..describe.files import ConfigurationError
from .check import Check, Status

Refusals = Sequence[tuple[str, str, str]]
_ENDS = "the run ends before anything is built"


class RecipeError(ValueError):
    """A recipe that can't be looked at; the message says why."""


def recipe_of(recipe: str, rest: Sequence[str]) -> Callable[[], Iterator[Check]]:
    """A check of ``recipe``: a function that returns a configuration of Bridge's, as ``FILE.py:FUNCTION``,
    ``MODULE:FUNCTION`` or the name of one of Bridge's own, with ``rest`` of the form ``model.num_layers=4``; or a
    script of ``megatron.training`` with its flags in ``rest``."""

    def recipe_check() -> Iterator[Check]:
        try:
            found = list(_script(Path(recipe), rest) if _is_script(recipe) else _bridge(recipe, rest))
        except (RecipeError, ConfigurationError) as error:
            yield Check(recipe, Status.BROKEN, str(error), "nothing can be said of it",
                        "mend what the line names; `dip doctor --help` says what a recipe is")  # fmt: skip
            return
        yield from found
        in_the_way = [check for check in found if check.status is Status.BROKEN]
        if in_the_way:
            yield Check(
                recipe, Status.BROKEN, "doesn't run under DIP", _ENDS, f"see the {len(in_the_way)} above"
            )  # fmt: skip
        else:
            yield Check(recipe, Status.OK, "nothing that can be seen before it starts stands in the way of DIP")

    return recipe_check


def _is_script(recipe: str) -> bool:
    return recipe.endswith(".py")


def _in_the_way(refusals: Refusals) -> Iterator[Check]:
    for setting, reason, way_out in refusals:
        yield Check(setting, Status.BROKEN, reason, _ENDS, way_out)


def _switched_off(settings: Any) -> Iterator[Check]:
    """What is changed in ``settings``."""
    from ..megatron.switched_off import switch_off

    for line in switch_off(settings):
        yield Check(
            "settings", Status.LIMITED, line, "what it gains in Megatron's own schedule is lost", "leave it out"
        )


# -- Megatron-Bridge -------------------------------------------------------------------------------------------------
def _bridge(recipe: str, overrides: Sequence[str]) -> Iterator[Check]:
    from ..megatron.adapters.bridge_checks import check_release, refusals

    config = bridge_configuration(recipe, overrides)
    told: list[str] = []
    try:
        check_release(told.append)
    except ConfigurationError as error:
        yield Check("Megatron-Bridge", Status.BROKEN, str(error), _ENDS, "install the tested release")
    for line in told:
        yield Check(
            "Megatron-Bridge", Status.LIMITED, line, "untested", "compare losses with DIP off before a long run"
        )
    yield from _switched_off(config.model)
    yield from _switched_off(config.straggler)
    yield from _in_the_way(refusals(config))
    yield _provided(config.model)


def bridge_configuration(recipe: str, overrides: Sequence[str]) -> Any:
    """What a recipe of Bridge's gives (see :func:`recipe_of`), changed as ``overrides`` say. Raises RecipeError."""
    function = _function(recipe)
    try:
        config = function()
    except Exception as error:  # whatever a recipe may need, such as a model's configuration from the net
        first = next(iter(str(error).splitlines()), "")
        raise RecipeError(f"can't be made here: {type(error).__name__}: {first}{_without_hub(str(error))}") from error
    for override in overrides:
        _override(config, override)
    return config


def _without_hub(text: str) -> str:
    """What to do where a recipe looks for a model on Hugging Face's hub in vain; nothing for other errors."""
    if "huggingface.co" not in text:
        return ""
    named = re.search(r"(?<![\w/:.])[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.sub(r"https?://\S+", "", text))
    place = named[0] if named else "ORGANIZATION/MODEL"
    return (
        f" Way out: a folder of the model's name, ./{place}, with its config.json, where the command is run; it is "
        "taken in place of the hub"
    )


def _function(recipe: str) -> Callable[[], Any]:
    place, _, name = recipe.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _module_at(Path(place))
        else:
            module = importlib.import_module(place or "megatron.bridge.recipes")
        function: Callable[[], Any] = getattr(module, name)
    except AttributeError:
        if place:
            raise RecipeError(f"{place} has no {name}{_meant(name, module)}") from None
        raise RecipeError(
            "no script (*.py), no FILE.py:FUNCTION, and none of Megatron-Bridge's own recipes" + _meant(name, module)
        ) from None
    except (ImportError, OSError) as error:
        way_out = ""
        if isinstance(error, ModuleNotFoundError):
            missing = str(error.name)
            missing = "Megatron-Bridge" if missing.startswith("megatron.bridge") else missing
            way_out = f"; {missing} isn't installed here: ask where the recipe trains"
        raise RecipeError(f"{type(error).__name__}: {error}{way_out}") from error
    return function


def _meant(name: str, module: ModuleType) -> str:
    found = nearest(name, dir(module))
    return f"; did you mean {found}?" if found else ""


def _module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _override(config: Any, override: str) -> None:
    """``model.num_layers=4``, as Bridge's scripts take it."""
    name, equals, value = override.lstrip("+").partition("=")
    *parts, last = name.split(".")
    try:
        for part in parts:
            config = getattr(config, part)
        getattr(config, last)
    except AttributeError as error:
        raise RecipeError(f"{override}: {error}") from error
    if not equals:
        raise RecipeError(f"{override}: expected NAME=VALUE")
    setattr(config, last, yaml.safe_load(value))


def _provided(provider: Any) -> Check:
    """By what ``provide`` says it returns."""
    from ..families.known import known_families
    from ..families.multimodal.bridge_models import BRIDGE_FAMILIES

    name = type(provider).__name__
    try:
        built = inspect.get_annotations(type(provider).provide, eval_str=True).get("return")
    except (AttributeError, NameError, TypeError):
        built = None
    if not isinstance(built, type):
        return Check(
            name, Status.LIMITED, "doesn't say which model it builds", "it is seen when the model is built",
            "see docs/reach.md",
        )  # fmt: skip
    return _family(built.__name__, [f for f in (*known_families(), *BRIDGE_FAMILIES) if f.model_class is built], name)


def _family(model: str, families: Sequence[Any], where: str) -> Check:
    if families:
        return Check(where, Status.OK, f"builds {model}, of the model family {families[0].name}")
    return Check(
        where, Status.BROKEN, f"builds {model}, which DIP can't cut into segments", _ENDS,
        "add it as docs/add-a-model.md says",
    )  # fmt: skip


# -- scripts ---------------------------------------------------------------------------------------------------------
def _script(path: Path, flags: Sequence[str]) -> Iterator[Check]:
    from ..families.known import known_families

    if not path.is_file():
        raise RecipeError("no such script")
    names = _names(path, set())
    if "build_model" in names and "dip_megatron" in names:
        yield Check(path.name, Status.OK, "builds its model through DIP (docs/any-loop.md)")
        return
    if "megatron.bridge" in names:
        raise RecipeError(
            "a script of Megatron-Bridge's: give the function that makes its configuration, FILE.py:FUNCTION"
        )
    if "megatron.training" not in names:
        yield Check(
            path.name, Status.BROKEN, "imports neither megatron.training nor Megatron-Bridge",
            "DIP doesn't know its loop", "build its model through dip_megatron.build_model (docs/any-loop.md); a fork "
            "that moved megatron.training: start it with DIP_SCHEDULE and look at what it says",
        )  # fmt: skip
        return
    args, unknown = _parsed(flags)
    from ..megatron.arguments import refusals

    yield from _switched_off(args)
    yield from _in_the_way(refusals(args))
    if unknown:
        yield Check(path.name, Status.OK, f"flags of its own, which were not looked at: {' '.join(unknown)}")
    families = [family for family in known_families() if family.model_class.__name__ in names]
    if families:
        yield _family(families[0].model_class.__name__, families, path.name)
    else:
        yield Check(
            path.name, Status.LIMITED, "names no model that DIP knows", "which one it builds is seen when it is built",
            "add another as docs/add-a-model.md says",
        )  # fmt: skip


def _parsed(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Megatron's flags and DIP's, and what is left. Raises RecipeError for values that Megatron doesn't take."""
    from ..megatron.arguments import add_arguments, run_config

    try:
        module = importlib.import_module("megatron.training.arguments")
    except Exception as error:  # whatever a foreign import may raise
        raise RecipeError(f"megatron.training can't be imported here: {type(error).__name__}: {error}") from error
    parser = _Parser(allow_abbrev=False)
    module.add_megatron_arguments(parser)
    with contextlib.suppress(argparse.ArgumentError):  # where the hooks have added them
        add_arguments(parser)
    args, unknown = parser.parse_known_args(list(flags))
    if not run_config(args).on:
        args.dip_schedule = "dynamic"
    return args, unknown


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def _names(path: Path, seen: set[Path]) -> set[str]:
    """All that a script, and the modules beside it that it imports, names: identifiers, and packages it imports."""
    if path in seen or not path.is_file():
        return set()
    seen.add(path)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                parts = module.split(".")
                found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
                found |= _names(path.parent / f"{parts[0]}.py", seen)
            if isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names}
    return found
