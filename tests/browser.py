"""Headless Chromium for the tests of what a reader sees.

``pytest_plugins = ["browser"]`` in a test module gives it the fixtures ``chromium`` (the browser),
and ``open_page`` (a page that fails its test on a console error or a request to another host).
``tools/browser.py`` finds the browser; without one the tests are skipped and say how to get it,
or fail when CI=true.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
#: what a browser may load: the page itself, and data that travels inside it
_LOCAL_SCHEMES = ("file", "data", "blob", "about")
_LOCAL_HOSTS = ("localhost", "127.0.0.1")


def is_local(url: str) -> bool:
    """True when loading ``url`` asks no other host."""
    parts = urlsplit(url)
    return parts.scheme in _LOCAL_SCHEMES or parts.hostname in _LOCAL_HOSTS


def finder():
    """The module tools/browser.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("lab_find_browser", ROOT / "tools" / "browser.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unavailable(why: str) -> None:
    """Skip the test that asked for a browser; fail it where a missing browser is a fault."""
    how_to = finder().HOW_TO
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{why} {how_to}")
    pytest.skip(f"{why} {how_to}")


# Module scope, not session: while Playwright's loop runs, nbval could not start its own.
@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A headless Chromium, closed when the module's tests are done."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed.")
    path = finder().find()
    if path is None:
        unavailable("no Chromium on this machine.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def watched(browser, **options) -> Iterator:
    """A page in a context of its own; afterwards its console must be clean and nothing fetched.

    ``options`` are those of Playwright's ``new_context`` (viewport, java_script_enabled …).
    """
    context = browser.new_context(**options)
    faults: list[str] = []

    def gate(route):
        url = route.request.url
        if is_local(url):
            route.continue_()
        else:
            faults.append(f"request to another host: {url}")
            route.abort()

    context.route("**/*", gate)
    page = context.new_page()
    page.on("websocket", lambda s: faults.append(f"websocket: {s.url}"))
    page.on("pageerror", lambda e: faults.append(f"script error: {e}"))
    page.on(
        "console",
        lambda m: (
            faults.append(f"console {m.type}: {m.text}") if m.type in ("error", "warning") else None
        ),
    )
    page.faults = faults
    try:
        yield page
    finally:
        context.close()
    assert not faults, "\n".join(faults)


@pytest.fixture
def open_page(chromium) -> Iterator:
    """Opens a watched page: ``open_page(viewport={...})``."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(watched(chromium, **options))
