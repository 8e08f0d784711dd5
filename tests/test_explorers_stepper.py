"""The tile stepper: the page shows what ``labkit.online_softmax`` computes, at every step."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys

import oracle
import pytest
import torch
from test_explorers import PAGE, _as_serialised, contrast

from labkit import explorers
from labkit.errors import ArgumentError
from labkit.explorers import stepper
from labkit.online_softmax import FinishStep, attention_tiles, finish, merge, tiled_attention

pytest_plugins = ["browser"]

VARIANTS = list(itertools.product(stepper.TILES, (False, True), stepper.ORDERS))
NAMED = ("tile", "causal", "order")


@pytest.fixture(scope="module")
def figure():
    return explorers.tile_stepper()


def settings(figure) -> list[dict]:
    """Every step of every variant."""
    return [
        {**dict(zip(NAMED, v, strict=True)), "step": step}
        for v in VARIANTS
        for step in range(1, figure.steps(**dict(zip(NAMED, v, strict=True))) + 1)
    ]


def page_of(*figures, theme: str = "light") -> str:
    return PAGE.format(theme=theme, body="".join(f.html() for f in figures))


def number(text: str) -> float:
    return -math.inf if text == "−∞" else float(text.replace("−", "-"))


def rows(text: str, tinted: int = 0) -> list[list[float]]:
    """Numbers of a field; the first ``tinted`` columns have no tint in front."""
    plain = [row.replace("*", "").split(" ") for row in text.split(";")]
    return [[number(c if k < tinted else c[1:]) for k, c in enumerate(row)] for row in plain]


def assert_shown(shown: list[list[float]], tensor: torch.Tensor) -> None:
    shown = torch.tensor(shown, dtype=torch.float64)
    assert shown.shape == tensor.shape
    hidden = torch.isneginf(tensor)
    assert torch.equal(torch.isneginf(shown), hidden)
    apart = (shown - tensor)[~hidden].abs()
    assert apart.numel() == 0 or apart.max() <= 0.005 + 1e-9


# -- the numbers ------------------------------------------------------------------------
@pytest.mark.parametrize(("tile", "causal", "order"), VARIANTS)
def test_every_step_shows_what_labkit_computes(figure, tile, causal, order):
    q, k, v = stepper.problem()
    block_m, block_n = stepper.TILES[tile]
    blocks = list(range(math.ceil(stepper.N / block_n)))
    steps = list(
        attention_tiles(
            q, k, v, block_m=block_m, block_n=block_n, causal=causal,
            order=blocks if order == "up" else blocks[::-1],
        )
    )  # fmt: skip
    at = {"tile": tile, "causal": causal, "order": order}
    assert figure.steps(**at) == len(steps)
    for n, step in enumerate(steps, start=1):
        frame = figure.values(**at, step=n)
        assert frame["r"] == [step.rows.start, step.rows.stop - step.rows.start]
        state = torch.cat(
            [step.before.m[0, 0, :, None], step.before.l[0, 0, :, None], step.before.O[0, 0]], -1
        )
        assert_shown(rows(frame["before"], 2), state)
        if isinstance(step, FinishStep):
            assert frame["t"] == [step.i]
            shown = [r.replace("  ", " ").split(" ") for r in frame["a"].split(";")]
            shown = [[number(r[0]), *(number(c[1:]) for c in r[1:])] for r in shown]
            assert_shown(shown, torch.cat([step.LSE[0, 0, :, None], step.O[0, 0]], -1))
        else:
            assert frame["t"] == [step.i, step.j] and frame["k"] == step.keys.start
            assert_shown(rows(frame["S"]), step.S[0, 0])
            assert_shown([[number(f)] for f in frame["f"].split(" ")], step.alpha[0, 0, :, None])
            state = torch.cat(
                [step.after.m[0, 0, :, None], step.after.l[0, 0, :, None], step.after.O[0, 0]], -1
            )
            assert_shown(rows(frame["a"], 2), state)
            grown = (step.after.m > step.before.m)[0, 0].tolist()
            assert [r.startswith("*") for r in frame["a"].split(";")] == grown


@pytest.mark.parametrize(("tile", "causal", "order"), VARIANTS)
def test_the_outputs_shown_are_attention(figure, tile, causal, order):
    q, k, v = stepper.problem()
    right, scores, _ = oracle.attention_f64(q, k, v, causal=causal)
    at = {"tile": tile, "causal": causal, "order": order}
    seen = set()
    for n in range(1, figure.steps(**at) + 1):
        frame = figure.values(**at, step=n)
        if len(frame["t"]) == 1:
            first, count = frame["r"]
            for r, row in enumerate(frame["a"].split(";")):
                lse, _, *out = row.split(" ")
                want = scores[0, 0, first + r].logsumexp(-1).item()
                assert number(lse) == pytest.approx(want, abs=0.00501)
                for c, shown in enumerate(out):
                    true = right[0, 0, first + r, c].item()
                    assert number(shown[1:]) == pytest.approx(true, abs=0.00501)
            seen |= set(range(first, first + count))
    assert seen == set(range(stepper.N))


@pytest.mark.parametrize(("tile", "causal", "order"), VARIANTS)
def test_numbers_moved_are_those_of_the_tiles(figure, tile, causal, order):
    """Counted again from the shapes of what each step touches."""
    at = {"tile": tile, "causal": causal, "order": order}
    n, d, dv = stepper.N, stepper.D, stepper.DV
    block_m, block_n = stepper.TILES[tile]
    visits = [f["t"] for f in _frames(figure, at) if len(f["t"]) == 2]
    read = sum(min(block_n, n - j * block_n) for _, j in visits) * (d + dv) + n * d
    head, reads, writes, held = figure.table(**at, step=figure.steps(**at))
    assert head[0] == "numbers"
    assert reads[1:] == [str(read), str(read), str(2 * n * d + n * dv + 2 * n * n)]
    assert writes[1:3] == [str(n * (dv + 1))] * 2 and writes[3] == str(2 * n * n + n * dv)
    most = max(
        min(block_m, n - i * block_m) * (min(block_n, n - j * block_n) + dv + 2) for i, j in visits
    )
    assert held[2:] == [str(most), str(2 * n * n)]


def _frames(figure, at) -> list[dict]:
    return [figure.values(**at, step=n) for n in range(1, figure.steps(**at) + 1)]


@pytest.mark.parametrize("tile", stepper.TILES)
@pytest.mark.parametrize("order", stepper.ORDERS)
def test_tiles_without_a_visible_score_are_skipped_and_no_others(figure, tile, order):
    block_m, block_n = stepper.TILES[tile]
    visible = {
        (i // block_m, j // block_n) for i in range(stepper.N) for j in range(stepper.N) if j <= i
    }
    at = {"tile": tile, "causal": True, "order": order}
    visits = [tuple(f["t"]) for f in _frames(figure, at) if len(f["t"]) == 2]
    assert sorted(visits) == sorted(visible)


def test_both_orders_end_at_the_same_output(figure):
    for tile, causal in itertools.product(stepper.TILES, (False, True)):
        ends = []
        for order in stepper.ORDERS:
            at = {"tile": tile, "causal": causal, "order": order}
            ends.append([(f["t"], f["a"]) for f in _frames(figure, at) if len(f["t"]) == 1])
        assert ends[0] == ends[1]


def test_the_example_shows_every_case(figure):
    """Else a sentence of the figure would never be read."""
    said = " ".join(figure.summary(**s) for s in settings(figure))
    for part in ("takes the empty state away", "finds a larger score", "find a larger score",
                 "nothing is rescaled", "m stays −∞", "It is the first that",
                 "has met" if stepper.N % 5 == 1 else "have met"):
        assert part in said, part
    factors = {f for s in settings(figure) for f in figure.values(**s)["f"].split(" ")}
    assert {"0.00", "1.00", "÷ℓ"} < factors and len(factors) > 30


def test_states_of_the_example_merge_to_the_last_one():
    q, k, v = stepper.problem()
    steps = [s for s in attention_tiles(q, k, v, block_m=12, block_n=5) if hasattr(s, "after")]
    alone = [
        next(attention_tiles(q, k[:, :, a:b], v[:, :, a:b], block_m=12, block_n=5)).after
        for a, b in ((0, 5), (5, 10), (10, 12))
    ]
    merged = merge(alone[2], merge(alone[0], alone[1]))
    assert torch.allclose(merged.O, steps[-1].after.O, rtol=1e-13, atol=1e-13)
    assert torch.allclose(finish(merged)[0], tiled_attention(q, k, v), rtol=1e-13, atol=1e-13)


# -- the object --------------------------------------------------------------------------
def test_data_is_small_and_the_page_fetches_nothing(figure):
    html = figure.html()
    assert len(figure._json().encode()) < 150_000
    assert len(html.encode()) < 200_000
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^//.*$", "", html, flags=re.M))
    assert not re.search(r"\b(src|href|url\(|@import|fetch\(|XMLHttpRequest|import\()", html)
    assert not re.search(r"\sid=", html)


def test_script_holds_no_formula():
    """No exponential, logarithm or maximum of scores: it can only show what it was given."""
    source = explorers.core._asset("stepper.js")
    assert re.findall(r"Math\.(\w+)", source)
    assert set(re.findall(r"Math\.(\w+)", source)) <= {"ceil", "floor", "abs", "min", "max"}
    # min and max bound indices: of a block, of a step
    for line in source.splitlines():
        if "Math.m" in line:
            assert "spec.n" in line or "step" in line, line


def test_bytes_are_the_same_in_every_process(figure):
    code = (
        "import hashlib; from labkit import explorers as x; f = x.tile_stepper(); "
        "print(f.key, hashlib.sha256(f.html().encode()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[0] == figure.key
    import hashlib

    assert out.stdout.split()[1] == hashlib.sha256(figure.html().encode()).hexdigest()


def test_mimebundle_holds_html_png_and_text(figure):
    data, metadata = figure._repr_mimebundle_()
    assert set(data) == {"text/html", "image/png", "text/plain"}
    assert data["text/plain"].count("Query ") == 4
    assert "Queries 0–3 meet keys 0–3" in metadata["image/png"]["alt"]


def test_a_different_start_has_a_different_key(figure):
    keys = {figure.key} | {
        explorers.tile_stepper(**start).key
        for start in ({"tile": "5x5"}, {"causal": True}, {"order": "down"}, {"step": 3})
    }
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": "3x3"}, "tile = '3x3'"),
        ({"order": "random"}, "order = 'random'"),
        ({"causal": 1}, "causal = 1"),
        ({"step": 0}, "step = 0"),
        ({"step": 13}, "Pass at most 12"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        explorers.tile_stepper(**arguments)


# -- the browser ---------------------------------------------------------------------------
@pytest.mark.browser
def test_script_and_python_draw_the_same_at_every_step(figure, open_page):
    page = open_page()
    page.set_content(page_of(figure))
    every = settings(figure)
    assert len(every) > 200
    answers = page.evaluate(
        "list => list.map(c => document.querySelector('.lkx').explorer.at(c))", every
    )
    for changes, got in zip(every, answers, strict=True):
        assert got["summary"] == figure.summary(**changes), changes
        assert got["table"] == figure.table(**changes), changes
        assert got["label"] == figure.label(**changes), changes
        for layout in stepper.LAYOUTS:
            assert got["svg"][layout] == figure.svg(layout, **changes), (layout, changes)


def assert_shows(page, figure, nth: int = 0, **changes) -> None:
    root = page.locator(".lkx").nth(nth)
    assert root.locator(".lkx-summary").inner_text() == figure.summary(**changes)
    for layout in stepper.LAYOUTS:
        drawn = root.locator(f".lkx-{layout}")
        assert drawn.inner_html() == _as_serialised(page, figure.svg(layout, **changes))
        assert drawn.get_attribute("aria-label") == figure.label(**changes)
    cells = root.locator(".lkx-table tr").all()
    assert [c.locator("th, td").all_text_contents() for c in cells] == figure.table(**changes)
    # inputs agree with it, whichever was used
    step = min(changes.get("step", 1), figure.steps(**changes))
    for kind in ("number", "range"):
        assert root.locator(f'[data-control="step"] input[type={kind}]').input_value() == str(step)


@pytest.mark.browser
def test_keyboard_steps_through_it(figure, open_page):
    page = open_page()
    page.set_content(page_of(figure))
    assert_shows(page, figure)
    assert not page.get_by_text("its first state").is_visible()
    slider = page.get_by_role("slider", name="step, slider")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert_shows(page, figure, step=3)
    page.keyboard.press("End")
    assert_shows(page, figure, step=12)
    assert slider.get_attribute("aria-valuetext") == "step 12 of 12"
    page.keyboard.press("Tab")  # Next
    page.keyboard.press("Enter")
    assert_shows(page, figure, step=12)  # it stays at the last step, and keeps the focus
    assert page.evaluate("document.activeElement.className") == "lkx-next"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")  # Back
    page.keyboard.press("Space")
    page.keyboard.press("Space")
    assert_shows(page, figure, step=10)
    box = page.get_by_label("step", exact=True)
    box.focus()
    page.keyboard.press("ArrowUp")
    assert_shows(page, figure, step=11)
    page.keyboard.press("Control+a")
    page.keyboard.type("5")
    assert_shows(page, figure, step=5)
    page.locator('[data-control="causal"] input').focus()
    page.keyboard.press("Space")
    assert_shows(page, figure, step=5, causal=True)
    page.locator(".lkx-reset").focus()
    page.keyboard.press("Enter")
    assert_shows(page, figure)


@pytest.mark.browser
def test_mouse_steps_through_it(figure, open_page):
    page = open_page(viewport={"width": 900, "height": 900})
    page.set_content(page_of(figure))
    page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Back").click()
    assert_shows(page, figure, step=2)
    slider = page.get_by_role("slider")
    size = slider.bounding_box()
    slider.click(position={"x": size["width"] - 4, "y": size["height"] / 2})
    assert_shows(page, figure, step=12)
    # fewer steps: the last one is shown, and the slider ends there
    page.locator('[data-control="causal"] input').click()
    assert_shows(page, figure, step=9, causal=True)
    assert slider.get_attribute("max") == "9"
    page.locator('[data-control="tile"] select').select_option("4x2")
    page.locator('[data-control="order"] select').select_option("down")
    assert_shows(page, figure, step=9, causal=True, tile="4x2", order="down")
    page.locator(".lkx-reset").click()
    assert_shows(page, figure)


@pytest.mark.browser
def test_a_step_that_cannot_be_keeps_the_last_and_says_why(figure, open_page):
    page = open_page()
    page.set_content(page_of(figure))
    box = page.get_by_label("step", exact=True)
    box.fill("4")
    for typed in ("0", "-1", "13", "2.5", ""):
        box.fill(typed)
        message = page.get_by_role("alert").inner_text()
        assert message == "step must be a whole number from 1 to 12; the figure still shows 4."
        assert box.get_attribute("aria-invalid") == "true"
    box.fill("6")
    assert page.locator(".lkx-error").inner_text() == ""
    assert_shows(page, figure, step=6)


@pytest.mark.browser
def test_two_on_a_page_and_another_explorer_do_not_touch_each_other(figure, open_page):
    other = explorers.what_grows()
    page = open_page()
    page.set_content(page_of(figure, figure, other))
    page.get_by_role("button", name="Next").nth(1).click()
    assert_shows(page, figure, 0)
    assert_shows(page, figure, 1, step=2)
    assert page.locator(".lkx").nth(2).locator(".lkx-summary").inner_text() == other.summary()


@pytest.mark.browser
def test_without_scripts_the_first_step_stays(figure, open_page, tmp_path):
    stored = tmp_path / "page.html"
    stored.write_text(page_of(figure), encoding="utf-8")
    page = open_page(java_script_enabled=False)
    page.goto(stored.as_uri())
    assert page.locator(".lkx-wide").is_visible()
    assert not page.locator(".lkx-controls").is_visible()
    assert page.get_by_text("its first state").is_visible()


@pytest.mark.browser
def test_every_input_tells_jupyterlab_to_leave_its_keys_alone_and_has_a_name(figure, open_page):
    page = open_page()
    page.set_content(page_of(figure))
    inputs = page.locator(".lkx :is(input, select, button)")
    assert inputs.count() == 8
    assert page.locator(".lkx :is(input, select, button):not([data-lm-suppress-shortcuts])"
                        ).count() == 0
    unnamed = page.evaluate(
        "[...document.querySelectorAll('.lkx :is(input, select)')].filter("
        "n => !n.labels.length && !n.getAttribute('aria-label')).length"
    )
    assert unnamed == 0


@pytest.mark.browser
def test_fits_every_screen_at_every_tile_and_is_large_enough(figure, open_page):
    page = open_page()
    page.set_content(page_of(figure))
    for tile, causal in itertools.product(stepper.TILES, (False, True)):
        page.locator('[data-control="tile"] select').select_option(tile)
        page.locator('[data-control="causal"] input').set_checked(causal)
        page.get_by_label("step", exact=True).fill("5")
        for width in (320, 375, 390, 768, 1200):
            page.set_viewport_size({"width": width, "height": 900})
            assert_fits(page, width)


def assert_fits(page, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    measured = page.evaluate(
        """() => [...document.querySelectorAll(".lkx-svg text")].filter(
          t => t.checkVisibility() && t.textContent).map(t => {
          const svg = t.ownerSVGElement, b = t.getBBox(), page = svg.viewBox.baseVal;
          return [svg.getScreenCTM().a * parseFloat(getComputedStyle(t).fontSize), b.x,
            b.x + b.width, page.width, b.y, b.y + b.height, page.height, t.textContent]; })"""
    )
    assert len(measured) > 30
    for size, left, right, wide, top, bottom, tall, text in measured:
        assert size >= (11 if width >= 375 else 9.5), (width, text, size)
        assert left >= -1 and right <= wide + 1, (width, text)
        assert top >= -1 and bottom <= tall + 1, (width, text)
    boxes = sorted((round(b[4]), b[1], b[2], b[7]) for b in measured)
    for (y, _, right, text), (y1, left, _, other) in itertools.pairwise(boxes):
        assert y != y1 or right <= left + 0.5, (width, text, other, "touch each other")
    small = page.evaluate(
        """() => [...document.querySelectorAll(".lkx-controls :is(input, select, button)")].filter(
          n => { const b = n.getBoundingClientRect(); return b.width < 24 || b.height < 24;
        }).length"""
    )
    assert small == 0, width


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_stand_out_from_their_cells(theme, figure, open_page):
    page = open_page()
    page.set_content(page_of(figure, theme=theme))
    page.get_by_label("step", exact=True).fill("6")
    paper, ink, tints, soft = page.evaluate(
        """() => { const canvas = document.createElement("canvas").getContext(
          "2d", {willReadFrequently: true});
        const rgb = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c;
          canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
        const of = (s, p) => rgb(getComputedStyle(document.querySelector(s))[p]);
        const cells = [...document.querySelectorAll(".lkx-wide .lkx-heat")].map(n => {
          const s = getComputedStyle(n); return [...rgb(s.fill).slice(0, 3),
            Number(s.fillOpacity)]; });
        return [of("body", "backgroundColor"), of(".lkx-wide .lkx-num", "fill"), cells,
                of(".lkx-wide .lkx-tick", "fill")]; }"""
    )
    assert len(tints) > 20 and len({tuple(t[:3]) for t in tints}) == 2
    assert contrast(ink, paper) >= 7
    a = soft[3] / 255
    assert contrast([a * c + (1 - a) * p for c, p in zip(soft, paper, strict=True)], paper) >= 4.5
    deepest = [[*t[:3], 0.4] for t in tints]
    for *colour, alpha in tints + deepest:
        mixed = [alpha * c + (1 - alpha) * p for c, p in zip(colour, paper, strict=False)]
        assert contrast(ink, mixed) >= 4.5, (colour, alpha)
