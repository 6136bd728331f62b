"""A real browser for pages that the package writes: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tests.patience import LONG

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
MISSING = "no Chromium here (Debian: apt-get install chromium)"
# As root it needs --no-sandbox; the rest keeps it from asking a network that a test machine may not have.
_ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
DRAWN = "html[data-drawn=yes]"
LONGEST = 1000 * LONG  # milliseconds


@contextmanager
def opened(
    path: Path, scheme: Literal["light", "dark"] = "light", width: int = 1400
) -> Iterator[tuple[Any, list[str]]]:
    """A page drawn from a file, what it complains about (errors, warnings), and what it asks of a network."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_ARGUMENTS), timeout=LONGEST)
        context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": width, "height": 1000})
        context.set_default_timeout(LONGEST)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
        page.goto(path.resolve().as_uri())
        page.wait_for_selector(DRAWN)
        yield page, complaints
        browser.close()
