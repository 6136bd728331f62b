"""Write ``docs/api.md`` from the table of public names and their docstrings.

python scripts/make_api.py
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

import dip_megatron
from dip_megatron.api import DEPRECATED, PUBLIC

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """# Public names

<!-- Made by scripts/make_api.py from docstrings: edit those. -->

What stands here is public: import it from `dip_megatron` itself, as in `from dip_megatron import ModelFamily`. A name
is loaded when it is first asked for, so that planning needs neither torch nor Megatron.

**The promise.** Within a minor version (0.1.0, 0.1.1, ...) a public name keeps its meaning: code that uses it goes on
working, and the flags `--dip-...`, the YAML settings and the plan format with it. A name that is to go works and warns
(`DeprecationWarning`) for one minor version before. Everything else may change at any time, whatever its spelling.
"""
_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):\n((?:    .*\n)+)", re.MULTILINE)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for chapter, names in PUBLIC.items():
        parts.append(f"\n## {chapter}\n")
        parts += [entry(name, getattr(dip_megatron, name), home) for name, home in names.items()]
    if DEPRECATED:
        parts.append("\n## Deprecated\n")
        parts += [f"- `{d.name}`: since {d.since}, gone in {d.gone_in}; use `{d.use}`\n" for d in DEPRECATED.values()]
    return "".join(parts)


def entry(name: str, value: Any, home: str) -> str:
    """One public name: what it is, its docstring, and for a class its public methods."""
    text = f"\n### {name}\n\n"
    if inspect.isclass(value):
        text += _signature(name, value, "class ") + _words(value.__doc__)
        for method, function in vars(value).items():
            if method.startswith("_"):
                continue
            function = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
            shown = function.fget if isinstance(function, property) else function
            if not inspect.isfunction(shown) or not shown.__doc__:
                continue
            taken = "" if isinstance(function, property) else " ".join(_parameters(shown).split()).replace("( ", "(")
            head = f"`{method}{taken.replace(', )', ')')}`"
            text += f"\n- {head}: " + _words(shown.__doc__).strip().replace("\n", "\n  ") + "\n"
        return text
    if inspect.isfunction(value):
        return text + _signature(name, value) + _words(value.__doc__)
    shown = str(value) if not typing.get_origin(value) else str(value).replace("typing.", "")
    words = _after(name, home) or f"`{shown}`"
    return text + words + "\n"


def _signature(name: str, value: Any, kind: str = "") -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"```python\n{kind}{name}({value.__mro__[1].__name__})\n```\n\n"
    if inspect.isclass(value) and (getattr(value, "_is_protocol", False) or issubclass(value, tuple)):
        return f"```python\n{kind}{name}\n```\n\n"
    return f"```python\n{kind}{name}{_parameters(value)}\n```\n\n"


def _parameters(value: Any) -> str:
    signature = inspect.signature(value)
    kept = [_parameter(p) for name, p in signature.parameters.items() if name not in ("self", "cls")]
    kinds = [p.kind for name, p in signature.parameters.items() if name not in ("self", "cls")]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        kept.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = "" if inspect.isclass(value) else f" -> {_annotation(signature.return_annotation)}"
    shown = f"({', '.join(kept)}){result}"
    return shown if len(shown) < 100 else "(\n    " + ",\n    ".join(kept) + f",\n){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    text = f"{stars}{parameter.name}"
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is inspect.Parameter.empty:
        return text
    shown = repr(parameter.default)
    return f"{text} = {'...' if shown.startswith('<') else shown}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation).replace("typing.", "")


def _words(docstring: str | None) -> str:
    text = _SECTION.sub(_section, inspect.cleandoc(docstring or "") + "\n").rstrip()
    text = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`") + "\n"


def _section(match: re.Match[str]) -> str:
    """A section of a docstring in Markdown, with a list item for each entry."""
    body = textwrap.dedent(match[2])
    if match[1] != "Returns":
        body = re.sub(r"^(\w+):", r"- `\1`:", body, flags=re.MULTILINE).replace("\n    ", "\n  ")
    return f"{match[1]}:\n\n{body}"


def _after(name: str, home: str) -> str:
    """The docstring that follows an assignment."""
    source = inspect.getsource(__import__(f"dip_megatron.{home}", fromlist=["_"]))
    found = re.search(rf'^{name}\b[^\n]*=(?:.|\n)*?\n"""((?:.|\n)*?)"""', source, re.MULTILINE)
    return _words(found[1]).strip() if found and source[found.start() : found.end()].count("\n\n") < 2 else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
