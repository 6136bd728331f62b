"""A hook of mkdocs: links from a page to files outside ``docs`` become plain names, because the site has pages only.

In the repository the same links lead to the files.
"""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return _OUTSIDE.sub(r"\1", markdown)
