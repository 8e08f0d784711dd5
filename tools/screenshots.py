"""Photograph every page of the built site: light, dark, and at phone width.

    python tools/screenshots.py shots            # all pages
    python tools/screenshots.py shots intro 03   # pages whose name holds one of these

Looking at them is part of reviewing a change; nothing compares them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import browser

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build/html"
#: name → viewport and theme
VIEWS = {
    "light": ({"width": 1280, "height": 1600}, "light"),
    "dark": ({"width": 1280, "height": 1600}, "dark"),
    "phone": ({"width": 390, "height": 1600}, "light"),
}


def pages(wanted: list[str]) -> list[Path]:
    found = [*sorted((HTML / "book").glob("*.html")), *sorted((HTML / "notebooks").glob("*.html"))]
    return [p for p in found if not wanted or any(word in p.stem for word in wanted)]


def _slices(page, out: Path, name: str) -> int:
    """A long page in pictures of one window each; one picture would be too tall to be drawn."""
    window = page.viewport_size["height"]
    height = page.evaluate("() => document.documentElement.scrollHeight")
    for number, top in enumerate(range(0, height, window)):
        page.evaluate(f"() => window.scrollTo({{top: {top}, behavior: 'instant'}})")
        page.wait_for_timeout(50)
        page.screenshot(path=out / f"{name}-{number:02}.png", timeout=120_000)
    return number + 1


def photograph(playwright, out: Path, wanted: list[str], views: list[str]) -> int:
    path = browser.find()
    if path is None:
        sys.exit(f"screenshots: no Chromium found. {browser.HOW_TO}")
    chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    taken = 0
    for view in views:
        viewport, theme = VIEWS[view]
        context = chromium.new_context(viewport=viewport, device_scale_factor=1)
        # the theme reads this before it draws anything
        context.add_init_script(
            f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}');")
        for file in pages(wanted):
            page = context.new_page()
            page.goto(file.as_uri())
            page.evaluate("() => window.MathJax?.startup?.promise")
            page.wait_for_timeout(300)
            taken += _slices(page, out, f"{file.stem}-{view}")
            page.close()
        context.close()
    chromium.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--view", choices=VIEWS, action="append")
    arguments = parser.parse_args()
    if not (HTML / "index.html").exists():
        sys.exit("screenshots: there is no site yet. Run `make book`.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        taken = photograph(
            playwright, arguments.out, arguments.pages, arguments.view or list(VIEWS))
    print(f"{taken} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
