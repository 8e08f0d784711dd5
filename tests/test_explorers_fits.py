"""The explorer of chapter 10: its bytes are the budget's, in Python and in the browser."""

from __future__ import annotations

import random
import re

import pytest
from test_explorers import _as_serialised, assert_parity, assert_shows, page_of

from labkit.errors import ArgumentError
from labkit.explorers import fits, scene
from labkit.explorers.fits import BATCHES, CARDS, MODES, REGIMES, WAYS
from labkit.hardware import card
from labkit.layers.budget import PARTS, layer_budget

pytest_plugins = ["browser"]

#: what partial sums of a bias's gradient may hold besides (``labkit.explorers.fits``)
SUMS = 140 * 2**20


def settings(count: int) -> list[dict]:
    draw = random.Random(10)
    return [
        {
            "H": draw.choice([2, 3, 16, 64]), "d": draw.choice([16, 64, 128]),
            "L": draw.choice([2, 3, 24, 96]), "N": int(2 ** draw.uniform(5, 20)),
            "batch": str(draw.choice(BATCHES)), "precision": draw.choice([*REGIMES]),
            "attention": draw.choice([*WAYS]), "mode": draw.choice([*MODES]),
            "taken": draw.choice([0, 768, 5000]),
        }
        for _ in range(count)
    ]  # fmt: skip


def budget_of(at: dict):
    return layer_budget(
        at["H"] * at["d"], at["H"], at["L"], at["N"], int(at["batch"]),
        backend=WAYS[at["attention"]][1], precision=REGIMES[at["precision"]][1],
        training=at["mode"] != "inference", checkpoint=at["mode"] == "checkpointed", causal=False,
    )  # fmt: skip


def test_bytes_are_those_of_the_budget():
    figure = fits()
    exact = 0
    for at in settings(36):
        model, budget = figure._model(at), budget_of(at)
        peak = model("peak")
        assert sum(model(part) for part in PARTS) == peak, at
        assert -0.001 * budget.total <= budget.total - peak <= SUMS + 0.01 * budget.total, at
        if at["mode"] == "inference":
            assert peak == budget.total, at
            exact += 1
    assert exact > 6


@pytest.mark.parametrize("key", CARDS)
def test_the_longest_that_fits_is_the_last_that_fits(key):
    figure = fits(heads=8, layers=4)
    name = key.replace("-", "_")
    for at in ({"attention": "naive"}, {"attention": "fused", "mode": "checkpointed"}):
        model = figure._model(at)
        longest, memory = model(f"full_{name}"), model(f"memory_{name}")
        row = card(key)
        assert memory == (row.usable_bytes or row.memory_bytes) - 768 * 2**20
        assert model.with_size("N", int(longest))("peak") <= memory
        assert model.with_size("N", int(longest) + 1)("peak") > memory


def test_what_does_not_fit_is_said_and_drawn_beyond_the_frame():
    figure = fits(attention="naive", seq_len=2**15)
    assert "too much" in figure.table()[1][2] and "square" in figure.summary()
    box = scene.LAYOUTS["wide"]
    bars = [s for s in figure.draw(figure._model({}), "wide") if s[0] == "rect" and s[1] > 2]
    assert max(s[1] + s[3] for s in bars) == pytest.approx(box["w"] - 2)
    small = fits(attention="fused", seq_len=128)
    assert all("full" in row[2] for row in small.table()[1:])
    frame = 2 + (box["w"] - 4) * 0.86
    lanes = [s for s in small.draw(small._model({}), "wide") if s[0] == "rect" and s[2] > 60]
    assert max(s[1] + s[3] for s in lanes) < frame


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"heads": 1}, "heads = 1"),
        ({"layers": 1}, "layers = 1"),
        ({"layers": 2.5}, "layers = 2.5"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"batch": 3}, "batch = 3"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"attention": "nsa"}, "attention = 'nsa'"),
        ({"mode": "play"}, "mode = 'play'"),
        ({"taken_mib": 9000}, "taken, MiB = 9000"),
        ({"causal": 1}, "causal = 1"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        fits(**arguments)


@pytest.mark.browser
def test_script_and_python_give_the_same_figure_and_it_fits_a_phone(open_page):
    figure = fits()
    page = open_page(viewport={"width": 375, "height": 900})
    page.set_content(page_of(figure))
    for layout in scene.LAYOUTS:
        drawn = page.locator(f".lkx-{layout}").inner_html()
        assert drawn == _as_serialised(page, figure.svg(layout))
    assert_parity(page, figure, settings(4))
    page.locator('[data-control="attention"] select').select_option("fused")
    assert_shows(page, figure, attention="fused")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    overlaps = page.evaluate(
        """() => { const t = [...document.querySelectorAll(".lkx-narrow text")].map(
          n => n.getBoundingClientRect());
        return t.filter((a, i) => t.some((b, j) => j > i && a.left < b.right && b.left < a.right
          && a.top < b.bottom - 3 && b.top < a.bottom - 3)).length; }"""
    )
    assert overlaps == 0
