"""The interactive figures: stable bytes, one truth in Python and in the browser, usable by all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import struct
import subprocess
import sys

import pytest

from labkit import explorers, units
from labkit.errors import ArgumentError
from labkit.explorers import scene
from labkit.explorers.model import FORMATS, dyadic
from labkit.explorers.roofline import ROOFLINE_CARDS
from labkit.explorers.scores import CARD_LINES
from labkit.hardware import card
from labkit.memory import attention_forms, problem_sizes, schedule, scores_buffer_bytes
from labkit.roofline import Roofline, steps

pytest_plugins = ["browser"]

BUILDERS = {
    "scores_buffer": explorers.scores_buffer,
    "what_grows": explorers.what_grows,
    "roofline": explorers.roofline,
}
#: N × N buffers alive together
COPIES = {"S": 1, "S+P": 2, "training": 3}
PAGE = (
    '<!doctype html><html lang="en" data-theme="{theme}"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width"><title>explorers</title><style>'
    "html[data-theme=dark] {{ --pst-color-background: #121212; --pst-color-text-base: #ced6dd }}"
    "html[data-theme=light] {{ --pst-color-background: #fff; --pst-color-text-base: #323232 }}"
    "body {{ margin: 20px; font: 16px sans-serif; background: var(--pst-color-background) }}"
    "</style></head><body>{body}</body></html>"
)


def page_of(*figures, theme: str = "light") -> str:
    return PAGE.format(theme=theme, body="".join(f.html() for f in figures))


# -- values ------------------------------------------------------------------------------
def grid(explorer) -> list[dict]:
    """Settings at the edges of every control, and some in between drawn with a fixed seed."""
    draw = random.Random(20)
    axes = {}
    for control in explorer.spec["controls"]:
        if control["kind"] == "size":
            inside = [draw.randint(1, control["max"]) for _ in range(3)]
            axes[control["name"]] = [1, 3, *control["stops"][::4], *inside, control["max"]]
        elif control["kind"] == "choice":
            axes[control["name"]] = [o["value"] for o in control["options"]]
        else:
            axes[control["name"]] = [False, True]
    one_by_one = [{name: value} for name, values in axes.items() for value in values]
    together = [{n: draw.choice(v) for n, v in axes.items()} for _ in range(40)]
    return one_by_one + together


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("seq_len, batch, heads", [(512, 1, 1), (2048, 1, 12), (4097, 3, 5)])
def test_scores_are_those_of_labkit_memory(seq_len, batch, heads, dtype):
    figure = explorers.scores_buffer()
    at = {"N": seq_len, "B": batch, "H": heads, "dtype": dtype}
    sizes = {"batch": batch, "heads": heads, "dtype": dtype}
    for holds, copies in COPIES.items():
        stored = scores_buffer_bytes(seq_len, **sizes, copies=copies)
        seen = scores_buffer_bytes(seq_len, **sizes, copies=copies, causal=True)
        for causal in (False, True):  # a mask changes what is useful, not what is stored
            values = figure.values(**at, holds=holds, causal=causal)
            assert (values["scores"], values["useful"]) == (stored, seen)


@pytest.mark.parametrize(
    "holds, variant, training",
    [("S", "in_place", False), ("S+P", "out_of_place", False), ("training", "out_of_place", True)],
)
def test_buffers_alive_are_those_of_the_schedule(holds, variant, training):
    sizes = problem_sizes(seq_len=4096, heads=2)
    alive = schedule(variant, training=training).at_peak(**sizes)
    square = [n for n, size in alive.items() if size == attention_forms()["S"](**sizes)]
    assert len(square) == COPIES[holds]


@pytest.mark.parametrize("holds, copies", COPIES.items())
@pytest.mark.parametrize(
    "batch, heads, dtype", [(1, 1, "float32"), (1, 12, "float16"), (7, 9, "bfloat16")]
)
def test_a_card_is_full_at_the_last_length_that_fits(holds, copies, batch, heads, dtype):
    values = explorers.scores_buffer().values(B=batch, H=heads, dtype=dtype, holds=holds)
    for key, *_ in CARD_LINES:
        longest = values["full_" + key.replace("-", "_")]
        memory = card(key).memory_bytes
        sizes = {"batch": batch, "heads": heads, "dtype": dtype, "copies": copies}
        assert scores_buffer_bytes(longest, **sizes) <= memory
        assert scores_buffer_bytes(longest + 1, **sizes) > memory


def test_a_card_too_small_for_one_token_is_full_at_zero():
    model = explorers.scores_buffer()._model({"B": 4096, "H": 1024})
    assert model(["longest", "training", "N", 1000]) == 0


def test_memory_lines_are_the_cards_they_name():
    for key, label, in_table, *_ in CARD_LINES:
        gigabytes = re.search(r"(\d+) GB", label)[1]
        assert in_table.startswith(f"{gigabytes} GB")
        assert card(key).memory_bytes == pytest.approx(int(gigabytes) * 2**30, rel=0.01)
    # the names that share a line share its memory
    assert card("rtx3090").memory_bytes == card("rtx4090").memory_bytes
    assert card("a100-sxm-80").memory_bytes == card("h100-sxm").memory_bytes


def test_doubling_factors_are_those_of_the_forms():
    figure = explorers.what_grows()
    sizes = {"N": 512, "B": 2, "H": 6, "d": 80}
    tensors = attention_forms()
    for symbol in sizes:
        before = figure.values(**sizes)
        after = figure.values(**{**sizes, symbol: 2 * sizes[symbol]})
        for quantity in ("io", "scores", "flops"):
            assert before[f"{quantity}_{symbol}"] == after[quantity] / before[quantity]
    e, (n, b, h, d) = 2, sizes.values()
    full = {"B": b, "H": h, "Hkv": h, "Nq": n, "Nk": n, "d": d, "dv": d, "e": e}
    assert (
        figure.values(**sizes)["io"]
        == sum(tensors[t](**full) for t in "QKVO")
        == 4 * b * h * n * d * e
    )
    assert figure.values(**sizes)["scores"] == 2 * b * h * n * n * e


def test_head_dim_leaves_the_scores_alone_and_seq_len_quadruples_them():
    values = explorers.what_grows().values(N=333, d=96)
    assert (values["scores_d"], values["scores_N"], values["scores_H"]) == (1, 4, 2)
    table = dict((row[0], row[1:]) for row in explorers.what_grows().table()[1:])
    assert table["seq_len × 2"][1] == "×4 (2²)"
    assert table["head_dim × 2"][1] == "×1 (2⁰)"


@pytest.mark.parametrize("key", ROOFLINE_CARDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_roofline_points_are_those_of_labkit_roofline(key, dtype):
    figure = explorers.roofline(heads=8, batch=2)
    roof = Roofline.from_card(key, dtype)
    for n, d, causal in itertools.product((128, 5000, 2**17), (32, 128), (False, True)):
        values = figure.values(card=key, dtype=dtype, N=n, d=d, causal=causal)
        sizes = {"seq_len": n, "head_dim": d, "heads": 8, "batch": 2, "dtype": dtype}
        assert values["ridge"] == pytest.approx(roof.ridge)
        naive = steps("naive", causal)
        by_key = {s.key: s for s in [*naive, *steps("fused", causal)]}
        for name in ("scores", "softmax", "output", "fused"):
            cost, bounds = by_key[name].at(**sizes), roof.time_of(by_key[name], **sizes)
            assert values[f"{name}_intensity"] == pytest.approx(cost.intensity, rel=1e-12)
            assert values[f"{name}_seconds"] == pytest.approx(bounds.lower, rel=1e-12)
            assert values[f"{name}_rate"] == pytest.approx(cost.flops / bounds.lower, rel=1e-12)
            for resource, seconds in bounds.parts.items():
                assert values[f"{name}_{resource}"] == pytest.approx(seconds, rel=1e-12)
        total = roof.time_of(naive, **sizes)
        assert values["naive_seconds"] == pytest.approx(total.lower, rel=1e-12)


def test_the_limit_named_is_the_one_that_takes_longest():
    figure = explorers.roofline()
    words = {
        "memory": "memory",
        "tensor": "products",
        "vector": "arithmetic",
        "special": "exponentials",
    }
    seen = set()
    for key, d, n in itertools.product(ROOFLINE_CARDS, (16, 64, 256), (256, 16384)):
        row = figure.table(card=key, d=d, N=n)[-1]
        step = steps("fused")[0]
        roof = Roofline.from_card(key, "float16")
        sizes = {"seq_len": n, "head_dim": d, "heads": 16, "dtype": "float16"}
        limit = roof.time_of(step, **sizes).limited_by
        assert row[-1] == words[limit]
        seen.add(limit)
    assert {"tensor", "special"} <= seen  # or the table above tested one case only


# -- bytes -------------------------------------------------------------------------------
def test_bytes_are_the_same_in_every_process(capsys):
    code = (
        "import hashlib; from labkit import explorers as x\n"
        "for f in (x.scores_buffer(causal=True), x.what_grows(), x.roofline(card='rtx4090')):\n"
        "    data, meta = f._repr_mimebundle_()\n"
        "    print(*(hashlib.sha256(data[k].encode()).hexdigest() for k in sorted(data)), meta)"
    )
    exec(code, {})  # a process too, with a seed of its own
    outs = {capsys.readouterr().out}
    for seed in ("0", "4711"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        outs.add(
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
            ).stdout
        )
    assert len(outs) == 1
    assert len(outs.pop().splitlines()) == 3


@pytest.mark.parametrize("name", BUILDERS)
def test_a_different_setting_has_a_different_key(name):
    build = BUILDERS[name]
    assert build().key == build().key
    assert build().key != build(seq_len=777).key


@pytest.mark.parametrize("name", BUILDERS)
def test_html_fetches_nothing_and_uses_no_ids(name):
    html = BUILDERS[name]().html()
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^//.*$", "", html, flags=re.M))
    assert not re.search(r"\b(src|href|url\(|@import|fetch\(|XMLHttpRequest|import\()", html)
    # an explorer may stand twice on a page, so nothing may need an id of its own
    assert not re.search(r"\sid=", html)


@pytest.mark.parametrize("name", BUILDERS)
def test_mimebundle_holds_html_png_and_text(name):
    import base64

    figure = BUILDERS[name]()
    data, metadata = figure._repr_mimebundle_()
    assert set(data) == {"text/html", "image/png", "text/plain"}
    png = base64.b64decode(data["image/png"])
    box = figure.spec["layouts"]["wide"]
    assert struct.unpack(">II", png[16:24]) == (2 * box["w"], 2 * box["h"])
    assert data["text/plain"].splitlines()[0] == figure.spec["title"]
    assert figure.summary() in metadata["image/png"]["alt"]


def test_import_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys, labkit.explorers as x; x.scores_buffer().html(); "
        "print([m for m in ('torch', 'triton', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seq_len": 0}, "seq_len = 0"),
        ({"seq_len": 2.5}, "seq_len = 2.5"),
        ({"seq_len": 2**21}, "seq_len = 2097152"),
        ({"heads": -1}, "heads = -1"),
        ({"dtype": "fp13"}, "dtype"),
        ({"dtype": "int8"}, "float16"),
        ({"holds": "everything"}, "holds = 'everything'"),
        ({"causal": 1}, "causal = 1"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        explorers.scores_buffer(**arguments)


def test_unknown_card_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="h200"):
        explorers.roofline(card="h2000")


def test_a_coefficient_that_json_would_round_is_refused():
    assert dyadic([[0.5, {"N": 2}], [3, {}]])
    with pytest.raises(ValueError, match=r"0\.33"):
        dyadic([[1 / 3, {"N": 1}]])


# -- the browser -------------------------------------------------------------------------
@pytest.mark.browser
@pytest.mark.parametrize("name", BUILDERS)
def test_script_and_python_give_the_same_figure(name, open_page):
    """Values, sentence, table and both drawings, at every setting of the grid."""
    figure = BUILDERS[name]()
    page = open_page()
    page.set_content(page_of(figure))
    for layout in scene.LAYOUTS:
        # the script has redrawn by now: the page must look as it did before
        drawn = page.locator(f".lkx-{layout}").inner_html()
        assert drawn == _as_serialised(page, figure.svg(layout))
    settings = grid(figure)
    assert len(settings) > 60
    assert_parity(page, figure, settings)


def assert_parity(page, figure, settings) -> None:
    """The page's script and labkit give the same figures, sentence, table and drawing at each."""
    answers = page.evaluate(
        "list => list.map(c => document.querySelector('.lkx').explorer.at(c))", settings
    )
    for changes, got in zip(settings, answers, strict=True):
        want = figure.values(**changes)
        assert {k: float(v) for k, v in got["values"].items()} == {
            k: float(v) for k, v in want.items()
        }, changes
        assert got["summary"] == figure.summary(**changes), changes
        assert got["table"] == figure.table(**changes), changes
        for layout in scene.LAYOUTS:
            assert got["svg"][layout] == figure.svg(layout, **changes), (layout, changes)


def _as_serialised(page, inner: str) -> str:
    return page.evaluate(
        "s => { const n = document.createElementNS('http://www.w3.org/2000/svg', 'svg');"
        " n.innerHTML = s; return n.innerHTML }",
        inner,
    )


@pytest.mark.browser
def test_script_formats_numbers_as_labkit_units_does(open_page):
    draw = random.Random(7)
    values = [0, 1, 0.125, 0.375, 2.5, 0.5, 1.005, 999.5, 1000, 1023, 1023.9, 1024, 1126.4, 2**53]
    values += [k / 8 for k in range(1, 200)] + [10.0**k for k in range(-9, 18)]
    values += [10 ** draw.uniform(-9, 18) for _ in range(300)]
    page = open_page()
    page.set_content(page_of(explorers.what_grows()))
    for name, form in FORMATS.items():
        got = page.evaluate(
            "([f, list]) => list.map(v => document.querySelector('.lkx').explorer.format(f, v))",
            [name, values],
        )
        assert got == [form(v) for v in values], name
    assert FORMATS["bytes"](1.5 * 2**30) == units.format_bytes(1.5 * 2**30) == "1.5 GiB"


@pytest.mark.browser
def test_keyboard_moves_the_figure(open_page):
    figure = explorers.scores_buffer()
    page = open_page()
    page.set_content(page_of(figure))
    assert not page.get_by_text("its first state").is_visible()
    slider, box = (
        page.locator('[data-control="N"] input[type=range]'),
        page.get_by_label("seq_len", exact=True),
    )
    stops = figure.spec["controls"][0]["stops"]
    start = stops.index(figure.state["N"])
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert box.input_value() == str(stops[start + 2])
    assert_shows(page, figure, N=stops[start + 2])
    page.keyboard.press("Home")
    assert_shows(page, figure, N=stops[0])
    page.keyboard.press("Tab")  # to the next control, and on with the keys alone
    box.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("3000")
    assert_shows(page, figure, N=3000)
    assert int(slider.input_value()) == stops.index(3072)
    page.locator('[data-control="causal"] input').focus()
    page.keyboard.press("Space")
    assert_shows(page, figure, N=3000, causal=True)
    page.locator(".lkx-reset").focus()
    page.keyboard.press("Enter")
    assert_shows(page, figure)
    assert box.input_value() == str(figure.state["N"])


@pytest.mark.browser
def test_mouse_moves_the_figure(open_page):
    figure = explorers.roofline()
    page = open_page(viewport={"width": 900, "height": 900})
    page.set_content(page_of(figure))
    slider = page.locator('[data-control="d"] input[type=range]')
    size = slider.bounding_box()
    slider.click(position={"x": size["width"] - 4, "y": size["height"] / 2})
    assert_shows(page, figure, d=256)
    middle = size["y"] + size["height"] / 2
    page.mouse.move(size["x"] + size["width"] - 8, middle)
    page.mouse.down()
    page.mouse.move(size["x"] + size["width"] / 2, middle, steps=4)
    page.mouse.move(size["x"] + 2, middle, steps=4)
    page.mouse.up()
    assert_shows(page, figure, d=16)
    page.locator('[data-control="card"] select').select_option("rtx4090")
    assert_shows(page, figure, d=16, card="rtx4090")
    page.locator('[data-control="causal"] input').click()
    assert_shows(page, figure, d=16, card="rtx4090", causal=True)


def assert_shows(page, figure, nth: int = 0, **changes) -> None:
    """The page shows the figure, sentence and table that labkit computes."""
    root = page.locator(".lkx").nth(nth)
    assert root.locator(".lkx-summary").inner_text() == figure.summary(**changes)
    for layout in scene.LAYOUTS:
        assert root.locator(f".lkx-{layout}").inner_html() == _as_serialised(
            page, figure.svg(layout, **changes)
        )
    cells = root.locator(".lkx-table tr").all()
    assert [c.locator("th, td").all_text_contents() for c in cells] == figure.table(**changes)


@pytest.mark.browser
def test_a_number_that_cannot_be_keeps_the_last_figure_and_says_why(open_page):
    figure = explorers.what_grows()
    page = open_page()
    page.set_content(page_of(figure))
    box = page.get_by_label("seq_len", exact=True)
    # digits typed on the way ("2" of "2.5") are numbers of their own: the last one stands
    for typed, last in (
        ("", 4000),
        ("0", 4000),
        ("-5", 4000),
        ("2.5", 2),
        ("abc", 4000),
        ("9999999", 999999),
    ):
        box.fill("4000")
        page.keyboard.press("Control+a")
        page.keyboard.press("Delete")
        page.keyboard.type(typed)
        message = page.get_by_role("alert").inner_text()
        assert "seq_len must be a whole number from 1 to 1,048,576" in message
        assert f"still shows {last:,}" in message
        assert box.get_attribute("aria-invalid") == "true"
        assert_shows(page, figure, N=last)
    box.fill("512")
    assert page.locator(".lkx-error").inner_text() == ""
    assert box.get_attribute("aria-invalid") is None
    assert_shows(page, figure, N=512)


@pytest.mark.browser
def test_two_explorers_on_a_page_do_not_touch_each_other(open_page):
    same, other = explorers.scores_buffer(), explorers.what_grows()
    page = open_page()
    page.set_content(page_of(same, same, other))
    page.locator(".lkx").nth(1).locator('[data-control="N"] input[type=number]').fill("700")
    assert_shows(page, same, 0)
    assert_shows(page, same, 1, N=700)
    assert_shows(page, other, 2)


@pytest.mark.browser
def test_running_the_script_again_changes_nothing_and_a_new_copy_comes_alive(open_page):
    figure = explorers.scores_buffer()
    page = open_page()
    page.set_content(page_of(figure))
    page.locator('[data-control="N"] input[type=number]').fill("700")
    again = """() => {
        const old = document.querySelector(".lkx script"), copy = document.createElement("script");
        copy.textContent = old.textContent; old.replaceWith(copy); }"""
    page.evaluate(again)
    assert_shows(page, figure, N=700)
    page.locator('[data-control="N"] input[type=number]').fill("900")
    assert_shows(page, figure, N=900)
    # JupyterLab draws an output again from its stored HTML and then runs its scripts
    page.evaluate("html => { document.body.innerHTML = html; }", figure.html())
    page.evaluate(again)
    page.locator('[data-control="N"] input[type=number]').fill("901")
    assert_shows(page, figure, N=901)


@pytest.mark.browser
def test_without_scripts_the_figure_stays_and_a_line_says_so(open_page, tmp_path):
    stored = tmp_path / "page.html"
    stored.write_text(page_of(*(build() for build in BUILDERS.values())), encoding="utf-8")
    page = open_page(java_script_enabled=False)
    page.goto(stored.as_uri())
    for root in page.locator(".lkx").all():
        assert root.locator(".lkx-wide").is_visible()
        assert not root.locator(".lkx-controls").is_visible()
        assert root.get_by_text("its first state").is_visible()
        assert root.locator(".lkx-table").is_visible()


@pytest.mark.browser
def test_print_shows_the_current_state_and_no_inputs(open_page):
    figures = [build() for build in BUILDERS.values()]
    page = open_page()
    page.set_content(page_of(*figures, theme="dark"))
    for nth in range(len(figures)):
        page.locator('[data-control="N"] input[type=number]').nth(nth).fill("700")
    page.emulate_media(media="print")
    for nth, figure in enumerate(figures):
        root = page.locator(".lkx").nth(nth)
        assert not root.locator(".lkx-controls").is_visible()
        assert root.locator(".lkx-wide").is_visible()
        assert_shows(page, figure, nth, N=700)
    # paper is white, whatever the theme on the screen
    blue = page.evaluate("getComputedStyle(document.querySelector('.lkx path.lkx-a')).stroke")
    assert blue == "rgb(0, 114, 178)"


@pytest.mark.browser
def test_every_input_tells_jupyterlab_to_leave_its_keys_alone(open_page):
    page = open_page()
    page.set_content(page_of(explorers.scores_buffer()))
    bare = page.locator(".lkx :is(input, select, button):not([data-lm-suppress-shortcuts])")
    assert page.locator(".lkx :is(input, select, button)").count() == 10
    assert bare.count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_fits_the_screen_and_is_large_enough_to_read_and_to_touch(width, open_page):
    page = open_page(viewport={"width": width, "height": 900})
    page.set_content(page_of(*(build() for build in BUILDERS.values())))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".lkx-svg:visible").count() == len(BUILDERS)
    measured = page.evaluate(
        """() => [...document.querySelectorAll(".lkx-svg text")].filter(
          t => t.checkVisibility()).map(t => {
          const svg = t.ownerSVGElement, b = t.getBBox(), page = svg.viewBox.baseVal;
          return [svg.getScreenCTM().a * parseFloat(getComputedStyle(t).fontSize), b.x,
            b.x + b.width, page.width, b.y, b.y + b.height, page.height, t.textContent]; })"""
    )
    assert len(measured) > 60
    least = 11 if width >= 375 else 9.5
    for size, left, right, wide, top, bottom, tall, text in measured:
        assert size >= least, (text, size)
        assert left >= -1 and right <= wide + 1 and top >= -1 and bottom <= tall + 1, text
    small = page.evaluate(
        """() => [...document.querySelectorAll(".lkx-controls :is(input, select, button)")].filter(
          n => { const b = n.getBoundingClientRect(); return b.width < 24 || b.height < 24;
        }).length"""
    )
    assert small == 0


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(theme, open_page):
    page = open_page()
    page.set_content(page_of(*(build() for build in BUILDERS.values()), theme=theme))
    colours = page.evaluate(
        """() => { const canvas = document.createElement("canvas").getContext(
          "2d", {willReadFrequently: true});
        const rgb = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c;
          canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
        const out = [["page", "page", rgb(getComputedStyle(document.body).backgroundColor)]];
        for (const n of document.querySelectorAll(".lkx-wide :is(text, path, circle, rect)")) {
          const s = getComputedStyle(n);
          if (s.opacity !== "1" || n.matches(".lkx-grid")) continue;
          out.push([n.tagName, n.getAttribute("class"), rgb(n.matches("path, .lkx-halo, .lkx-ring")
            ? s.stroke : s.fill)]); }
        for (const n of document.querySelectorAll("figcaption, figcaption span, label, p, th, td"))
          out.push([n.tagName, "", rgb(getComputedStyle(n).color)]);
        return out; }"""
    )
    (_, _, background), *rest = colours
    assert len(rest) > 100
    for tag, style, (r, g, b, alpha) in rest:
        a = alpha / 255
        mixed = [a * c + (1 - a) * p for c, p in zip((r, g, b), background, strict=False)]
        ratio = contrast(mixed, background)
        assert ratio >= (4.5 if tag not in ("path", "circle", "rect") else 3), (tag, style, ratio)


def contrast(first, second) -> float:
    """Contrast ratio of two sRGB colours (WCAG 2, 1 to 21)."""

    def luminance(colour):
        linear = [c / 255 for c in colour[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in linear]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
def test_screen_readers_get_names_values_and_a_live_sentence(open_page):
    page = open_page()
    page.set_content(page_of(explorers.scores_buffer()))
    unnamed = page.evaluate(
        "[...document.querySelectorAll('.lkx :is(input, select)')].filter("
        "n => !n.labels.length && !n.getAttribute('aria-label')).length"
    )
    assert unnamed == 0
    assert (
        page.get_by_role("slider", name="seq_len, slider").get_attribute("aria-valuetext")
        == "8,192"
    )
    assert page.locator(".lkx-summary").get_attribute("aria-live") == "polite"
    assert page.get_by_role("img", name="How many bytes do the scores take?").count() == 1


def test_key_is_a_hash_of_the_whole_content():
    figure = explorers.scores_buffer()
    assert re.fullmatch(r"[0-9a-f]{12}", figure.key)
    changed = explorers.Explorer({**figure.spec, "title": "another"})
    assert changed.key != figure.key
    digest = hashlib.sha256(json.dumps(figure.spec).encode()).hexdigest()
    assert figure.key != digest[:12]  # the script and the style count too
