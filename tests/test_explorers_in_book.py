"""The explorers where a reader meets them: in the built pages, under the book's own style."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from test_explorers import assert_shows, contrast
from test_explorers_stepper import assert_shows as assert_steps

from labkit import explorers

pytest.importorskip("jupyter_book")

pytest_plugins = ["browser"]

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "scores_buffer", "what_grows", "roofline", "tile_stepper", "fits", "pattern_tiles",
    "nsa_reads",
)  # fmt: skip
#: the chapter that each explorer belongs to
HOME = {
    "01": "scores_buffer", "02": "what_grows", "04": "roofline", "07": "tile_stepper",
    "10": "fits", "11": "pattern_tiles", "12": "nsa_reads",
}  # fmt: skip


@cache
def stored() -> list[tuple[str, str, str]]:
    """(notebook, call, key) of every explorer that a notebook holds."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                html = output.get("data", {}).get("text/html", "")
                key = re.search(r'data-lkx="(\w+)"', html)
                if key and "<form" in html:  # a figure without inputs is not an explorer
                    found.append((path.stem, cell.source, key[1]))
    return found


def built(source: str) -> explorers.Explorer:
    """The explorer that a cell's last line makes, made again from its source."""
    call = ast.parse(source).body[-1].value
    assert isinstance(call, ast.Call), f"the last line is not a call: {source}"
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
    assert name in NAMES
    named = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    return getattr(explorers, name)(**named)


CASES = [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(stored())]
#: those that step, those that only lists move, and those that a size moves
STEPPED = [case for case in CASES if "tile_stepper" in case.values[1]]
LISTED = [case for case in CASES if "pattern_tiles" in case.values[1]]
SIZED = [case for case in CASES if case not in STEPPED + LISTED]
#: each explorer in one theme, in turns: what moves it is the same code in both
THEMED = [
    pytest.param(*case.values, theme, id=f"{case.id}-{theme}")
    for case, theme in zip(SIZED, ["light", "dark"] * len(SIZED), strict=False)
]


@pytest.fixture(scope="module")
def html() -> Path:
    """The built site, brought up to date."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/build.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "_build/html/notebooks"


def assert_fits_a_phone(page) -> None:
    """Nothing sticks out of the page, and each explorer in it can be read."""
    page.set_viewport_size({"width": 375, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    sizes = page.evaluate(
        """() => [...document.querySelectorAll(".lkx-svg text")].filter(t => t.checkVisibility())
          .map(t => t.ownerSVGElement.getScreenCTM().a * parseFloat(getComputedStyle(t).fontSize))
        """
    )
    assert len(sizes) > 5 and min(sizes) >= 11


@pytest.mark.parametrize("notebook, source, key", CASES)
def test_stored_explorer_is_the_one_that_labkit_makes_today(notebook, source, key):
    assert built(source).key == key, "run `make execute`: the stored output is stale"


@pytest.mark.parametrize("number", HOME)
def test_chapter_holds_its_explorer(number):
    chapters = [p.stem for p in (ROOT / "notebooks").glob(f"{number}_*.ipynb")]
    if not chapters:
        pytest.fail(f"there is no notebook {number}_…")
    calls = [source for notebook, source, _ in stored() if notebook in chapters]
    assert any(HOME[number] in source for source in calls)


@pytest.mark.browser
@pytest.mark.parametrize("notebook, source, key, theme", THEMED)
def test_explorer_in_its_page_moves_by_keyboard_and_mouse_and_fits_a_phone(
    notebook, source, key, theme, html, open_page
):
    figure = built(source)
    page = open_page(viewport={"width": 1280, "height": 900}, color_scheme=theme)
    page.goto((html / f"{notebook}.html").as_uri())
    nth = page.evaluate(
        "key => [...document.querySelectorAll('.lkx')].findIndex(n => n.dataset.lkx === key)", key
    )
    assert nth >= 0
    root = page.locator(".lkx").nth(nth)
    root.scroll_into_view_if_needed()
    assert_shows(page, figure, nth)

    slider = root.locator('[data-control="N"] input[type=range]')
    stops = next(c["stops"] for c in figure.spec["controls"] if c["name"] == "N")
    slider.focus()
    page.keyboard.press("End")
    assert_shows(page, figure, nth, N=stops[-1])
    page.keyboard.press("ArrowLeft")
    assert_shows(page, figure, nth, N=stops[-2])
    size = slider.bounding_box()
    slider.click(position={"x": 3, "y": size["height"] / 2})
    assert_shows(page, figure, nth, N=stops[0])
    number = root.locator('[data-control="N"] input[type=number]')
    number.fill("1000")
    assert_shows(page, figure, nth, N=1000)
    number.fill("-1")
    assert "whole number" in root.locator(".lkx-error").inner_text()
    assert_shows(page, figure, nth, N=1000)
    root.locator(".lkx-reset").click()
    assert_shows(page, figure, nth)

    # the theme's panel behind outputs must not swallow the text
    ink, ground = root.evaluate(
        """node => { let ground = "rgba(0, 0, 0, 0)";
          for (let n = node; n && ground === "rgba(0, 0, 0, 0)"; n = n.parentElement)
            ground = getComputedStyle(n).backgroundColor;
          const numbers = c => c.match(/[\\d.]+/g).map(Number);
          return [numbers(getComputedStyle(node.querySelector(".lkx-summary")).color),
                  numbers(ground)]; }"""
    )
    assert contrast(ink, ground) >= 7
    assert_fits_a_phone(page)


@pytest.mark.browser
@pytest.mark.parametrize("notebook, source, key", LISTED)
def test_explorer_of_lists_moves_in_its_page_by_keyboard(notebook, source, key, html, open_page):
    figure = built(source)
    page = open_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page.goto((html / f"{notebook}.html").as_uri())
    nth = page.evaluate(
        "key => [...document.querySelectorAll('.lkx')].findIndex(n => n.dataset.lkx === key)", key
    )
    root = page.locator(".lkx").nth(nth)
    assert_shows(page, figure, nth)
    control = figure.spec["controls"][0]
    last = control["options"][-1]["value"]
    root.locator(f'[data-control="{control["name"]}"] select').focus()
    page.keyboard.press("End")
    assert_shows(page, figure, nth, **{control["name"]: last})
    root.locator(".lkx-reset").click()
    assert_shows(page, figure, nth)
    assert_fits_a_phone(page)


@pytest.mark.browser
@pytest.mark.parametrize("notebook, source, key", STEPPED)
def test_stepper_in_its_page_steps_by_keyboard_and_mouse_and_fits_a_phone(
    notebook, source, key, html, open_page
):
    figure = built(source)
    page = open_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.goto((html / f"{notebook}.html").as_uri())
    root = page.locator(f'.lkx[data-lkx="{key}"]')
    nth = page.evaluate(
        "key => [...document.querySelectorAll('.lkx')].findIndex(n => n.dataset.lkx === key)", key
    )
    root.scroll_into_view_if_needed()
    assert_steps(page, figure, nth)
    root.get_by_role("slider").focus()
    page.keyboard.press("End")
    assert_steps(page, figure, nth, step=figure.steps())
    page.keyboard.press("ArrowLeft")
    assert_steps(page, figure, nth, step=figure.steps() - 1)
    page.emulate_media(color_scheme="dark")  # the rest in the other theme
    root.get_by_role("button", name="Back").click()
    assert_steps(page, figure, nth, step=figure.steps() - 2)
    root.locator('[data-control="causal"] input').click()
    assert_steps(page, figure, nth, step=figure.steps() - 2, causal=True)
    root.locator(".lkx-reset").click()
    assert_steps(page, figure, nth)
    assert_fits_a_phone(page)
