"""The explorer of chapter 12: its counts are labkit.nsa.model's, in Python and in the browser."""

from __future__ import annotations

import re

import pytest
from test_explorers import _as_serialised, assert_parity, assert_shows, grid, page_of

from labkit.errors import ArgumentError
from labkit.explorers import nsa_reads, scene
from labkit.explorers.nsa_reads import FORCED
from labkit.nsa.model import Shape, forced_blocks, keys_read, query_costs

pytest_plugins = ["browser"]


def shape_of(changes: dict, figure) -> tuple[Shape, int]:
    """The model's shape and position for a state of the figure."""
    at = {**figure.state, **changes}
    initial, local = FORCED[at["forced"]][1]
    shape = Shape(
        seq_len=at["N"], block_size=at["L"], count=at["S"], window=at["W"],
        initial=initial, local=local,
    )  # fmt: skip
    return shape, min(at["p"], at["N"] - 1)


def settings(figure) -> list[dict]:
    edges = [{"p": 0}, {"W": 0}, {"W": 0, "p": 0, "N": 1}, {"L": 1}, {"S": 1, "p": 5}]
    return edges + grid(figure)


def test_counts_are_those_of_the_model():
    figure = nsa_reads()
    checked = 0
    for changes in settings(figure):
        shape, position = shape_of(changes, figure)
        values, seen = figure.values(**changes), keys_read(shape, position)
        assert values["slots"] == seen["slots"], changes
        assert (values["initial"], values["local"]) == forced_blocks(shape, position), changes
        for branch, cost in query_costs(shape, position).items():
            name = "topk" if branch == "top-k" else branch
            for what, value in cost.items():
                assert values[f"{name}_{what}"] == value, (changes, branch, what)
                checked += 1
    assert checked > 1000


def test_drawn_blocks_are_as_many_as_counted_and_never_in_the_future():
    figure = nsa_reads()
    for changes in ({}, {"N": 512, "p": 300, "L": 16, "S": 7}, {"p": 64, "S": 2}, {"p": 40}):
        values = figure.values(**changes)
        box = scene.LAYOUTS["wide"]
        unit = (box["w"] - 4) / changes.get("N", figure.state["N"])
        shapes = scene.draw(figure._model(changes), "wide")
        chosen = [s for s in shapes if s[0] == "rect" and s[-1] == "bar a"]
        places = {round((s[1] - 2) / unit) for s in chosen}
        assert len(places) == len(chosen) == values["free"]
        size = changes.get("L", figure.state["L"])
        assert all(x % size == 0 and x + size <= values["t"] for x in places)


def test_a_query_near_the_start_saves_nothing_and_the_sentence_says_so():
    figure = nsa_reads(seq_len=100, position=5000)
    assert "the last one" in figure.summary() and "nothing is saved" in figure.summary()
    far = nsa_reads(seq_len=2**17, position=2**17 - 1)
    assert "times as much" in far.summary()
    assert far.values()["bytes_ratio"] > 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block_size": 0}, "block_size = 0"),
        ({"window_size": -1}, "window = -1"),
        ({"block_counts": 1000}, "blocks = 1000"),
        ({"position": 2**20}, "query at = 1048576"),
        ({"forced": "none"}, "forced = 'none'"),
        ({"kv_heads": 3}, "kv_heads = 3"),
        ({"dtype": "fp13"}, "dtype"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        nsa_reads(**arguments)


@pytest.mark.browser
def test_script_and_python_give_the_same_figure_and_it_fits_a_phone(open_page):
    figure = nsa_reads()
    page = open_page(viewport={"width": 375, "height": 900})
    page.set_content(page_of(figure))
    for layout in scene.LAYOUTS:
        drawn = page.locator(f".lkx-{layout}").inner_html()
        assert drawn == _as_serialised(page, figure.svg(layout))
    assert_parity(page, figure, settings(figure))
    window = page.locator('[data-control="W"] input[type=number]')
    window.fill("0")
    assert_shows(page, figure, W=0)
    window.fill("-3")
    assert "from 0 to" in page.locator(".lkx-error").inner_text()
    page.locator('[data-control="N"] input[type=range]').focus()
    page.keyboard.press("End")
    stops = figure.spec["controls"][0]["stops"]
    assert_shows(page, figure, W=0, N=stops[-1])
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    overlaps = page.evaluate(
        """() => { const t = [...document.querySelectorAll(".lkx-narrow text")].map(
          n => n.getBoundingClientRect());
        return t.filter((a, i) => t.some((b, j) => j > i && a.left < b.right && b.left < a.right
          && a.top < b.bottom - 3 && b.top < a.bottom - 3)).length; }"""
    )
    assert overlaps == 0
