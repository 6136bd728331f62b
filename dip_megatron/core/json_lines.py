"""Lines of JSON that users may have edited."""

from __future__ import annotations

import json
from typing import Any


def load_line(line: str, error: type[ValueError]) -> Any:
    """What a line says. Raises ``error`` in a line for what is not JSON, or says a field twice."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise error(f"{key}: the field comes twice")
            out[key] = value
        return out

    def no_constant(text: str) -> Any:
        raise error(f"line: {text} is not a number of JSON")

    try:
        return json.loads(line, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except json.JSONDecodeError as fault:
        message = fault.msg.removesuffix(" at").removesuffix(" starting")  # as json says of a string
        ended = message.startswith("Unterminated") or fault.pos >= len(line.rstrip()) - len("fals")
        cut = "; the line ends within it: has the file been cut off?" if ended else ""
        raise error(f"line: not JSON ({message} at column {fault.colno}){cut}") from fault
    except (RecursionError, ValueError) as fault:
        if isinstance(fault, error):
            raise
        raise error("line: nested too deeply or a number too long") from fault
