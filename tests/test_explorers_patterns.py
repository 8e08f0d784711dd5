"""The explorer of chapter 11: its masks are labkit.patterns', its counts those of the pictures."""

from __future__ import annotations

import re

import pytest
import torch
from test_explorers import _as_serialised, assert_parity, assert_shows, page_of

from labkit import explorers
from labkit.errors import ArgumentError
from labkit.explorers import pattern_tiles, patterns, scene
from labkit.patterns import Clustered, Local, Random

pytest_plugins = ["browser"]

N = patterns.N


@pytest.fixture(scope="module")
def figure():
    return pattern_tiles()


def shown(figure, changes: dict) -> torch.Tensor:
    """The mask of a state, as the page holds it."""
    at = {**figure.state, **changes}
    p, k = list(patterns.SHOWN).index(at["pattern"]), patterns.KEYS.index(int(at["keys"]))
    return torch.tensor(patterns.unpack(figure.spec["figure"]["masks"][p][k]))


def settings() -> list[dict]:
    """Every pattern with every tile and every number of keys, each pair once."""
    names = list(patterns.SHOWN)
    return [
        {"pattern": name, "keys": str(keys), "tile": str(tile)}
        for a, name in enumerate(names)
        for b, keys in enumerate(patterns.KEYS)
        for c, tile in enumerate(patterns.TILES)
        if (a + b + c) % 3 == 0
    ]


def test_packed_masks_are_those_of_the_library(figure):
    i, j = torch.arange(N)[:, None], torch.arange(N)[None, :]
    for keys in patterns.KEYS:
        local = shown(figure, {"pattern": "local", "keys": str(keys)})
        assert torch.equal(local, (j <= i) & (i - j < keys))
        assert torch.equal(local, Local(keys).dense_mask(N, causal=True))
    drawn = shown(figure, {"pattern": "random", "keys": "4"})
    assert torch.equal(drawn, Random(8).dense_mask(N, causal=True))
    assert all(shown(figure, s).diagonal().all() for s in settings())
    assert not any(shown(figure, s).triu(1).any() for s in settings())


def test_sorting_moves_scores_and_loses_none(figure):
    for keys in map(str, patterns.KEYS):
        apart = shown(figure, {"pattern": "clustered", "keys": keys})
        together = shown(figure, {"pattern": "sorted", "keys": keys})
        order = list(Clustered(round(N / (2 * int(keys)))).order(N))
        assert torch.equal(together, apart[order][:, order])
        at = [figure.values(pattern=p, keys=keys, tile="8") for p in ("clustered", "sorted")]
        assert at[0]["seen"] == at[1]["seen"] and at[1]["touched"] < at[0]["touched"]


def test_counts_are_those_of_the_masks(figure):
    for changes in settings():
        values, b = figure.values(**changes), int(changes["tile"])
        squares = shown(figure, changes).view(N // b, b, N // b, b).sum((1, 3))
        assert values["seen"] == squares.sum()
        assert values["touched"] == (squares > 0).sum()
        assert values["full"] == (squares == b * b).sum()
        assert values["computed"] == values["touched"] * b * b
        assert values["seen"] <= values["computed"] <= values["triangle"] <= values["matrix"]
    one = figure.values(tile="1")
    assert one["computed"] == one["seen"] and one["triangle"] == one["causal"] == N * (N + 1) / 2


def test_queries_see_about_as_many_keys_as_the_control_says(figure):
    for name in patterns.SHOWN:
        for keys in patterns.KEYS:
            mean = figure.values(pattern=name, keys=str(keys))["mean"]
            assert 0.6 * keys <= mean <= max(1.6 * keys, 5), (name, keys, mean)


def test_drawing_fills_the_cells_and_tiles_that_are_counted(figure):
    square = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-([\d.]+)z")
    for layout, place in figure.spec["figure"]["at"].items():
        for changes in settings()[::9]:
            shapes = scene_of(figure, changes, layout)
            values = figure.values(**changes)
            for style, scores in (("cells a", values["seen"]), ("cells b", values["computed"])):
                (d,) = [s[1] for s in shapes if s[0] == "path" and s[2] == style]
                sides = [(float(w), float(h)) for _, _, w, h, _ in square.findall(d)]
                assert square.sub("", d) == ""
                area = sum(w * h for w, h in sides) / place["cell"] ** 2
                assert area == pytest.approx(scores, rel=0.04)  # one decimal in the path


def scene_of(figure, changes: dict, layout: str) -> list[tuple]:
    return figure.draw(figure._model(changes), layout)


def test_a_part_travels_in_no_other_page(figure):
    assert "figures.tiles" in figure.html() and "unpack" in figure.html()
    others = (explorers.nsa_reads(), explorers.what_grows())
    assert not any("figures.tiles" in other.html() for other in others)
    # no comment reaches a page, the place for parts included
    assert not re.search(
        r"^\s*//", re.search(r"<script>(.*)</script>", figure.html(), re.S)[1], re.M
    )


def test_picture_for_print_shows_both_colours(figure):
    from io import BytesIO

    import numpy as np
    from PIL import Image

    box = figure.spec["layouts"]["wide"]
    drawn = scene.png(scene_of(figure, {}, "wide"), box["w"], box["h"], scale=1)
    pixels = np.asarray(Image.open(BytesIO(drawn)).convert("RGB")).astype(int).reshape(-1, 3)
    blue, orange = ((abs(pixels - np.array(c)) < 12).all(1).mean() for c in
                    ((0, 114, 178), (239, 193, 159)))  # fmt: skip
    assert blue > 0.01 and orange > 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pattern": "dense"}, "pattern = 'dense'"),
        ({"keys": 5}, "keys = 5"),
        ({"tile": 7}, "tile = 7"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        pattern_tiles(**arguments)


@pytest.mark.browser
def test_script_and_python_give_the_same_figure_and_it_fits_a_phone(figure, open_page):
    page = open_page(viewport={"width": 375, "height": 900})
    page.set_content(page_of(figure))
    assert_parity(page, figure, settings()[::3])
    assert page.locator(".lkx-narrow").inner_html() == _as_serialised(page, figure.svg("narrow"))
    page.locator('[data-control="pattern"] select').select_option("local")
    page.locator('[data-control="tile"] select').select_option("16")
    assert_shows(page, figure, pattern="local", tile="16")
    page.locator(".lkx-reset").click()
    assert_shows(page, figure)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    overlaps = page.evaluate(
        """() => { const t = [...document.querySelectorAll(".lkx-narrow text")].map(
          n => n.getBoundingClientRect());
        return t.filter((a, i) => t.some((b, j) => j > i && a.left < b.right && b.left < a.right
          && a.top < b.bottom - 3 && b.top < a.bottom - 3)).length; }"""
    )
    assert overlaps == 0
