"""Figures: both themes, alt text, units, and a picture of what they were given."""

from __future__ import annotations

import base64
import io
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
from PIL import Image

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 2**20


def table():
    sizes = {"Q": 1, "K": 1, "V": 1, "S": 32, "P": 32, "O": 1}
    rows = [SimpleNamespace(name=n, bytes=b * MIB, shape=(1, 1, 8, 8)) for n, b in sizes.items()]
    return SimpleNamespace(rows=rows)


#: S, its scaled copy, P and O, as out-of-place attention allocates them
EVENTS = [
    ("matmul", "S", 64 * MIB, 1),
    ("mul", "S scaled", 64 * MIB, 2),
    ("", "S", -64 * MIB, 1),
    ("softmax", "P", 64 * MIB, 3),
    ("", "S scaled", -64 * MIB, 2),
    ("matmul", "O", 8 * MIB, 4),
    ("", "P", -64 * MIB, 3),
]


class Power:
    exponent, coefficient, range = 2.0, 1e-9, (256, 1024)

    def __call__(self, x):
        return self.coefficient * x**self.exponent


SERIES = [
    {"label": "seq_len", "x": [128, 256, 512, 1024], "y": [1e-4, 1e-4, 3e-4, 1e-3], "fit": Power()},
    {"label": "head_dim", "x": [16, 32, 64], "y": [1e-4, 1.1e-4, 1.2e-4], "dashed": True},
]


def sweeps():
    """A result of the experiment scaling, with times that follow known laws (in ms)."""
    result = Result()
    laws = {"seq_len": (2, 2), "batch": (1, 1), "heads": (1, 1), "head_dim": (0.5, 0)}
    for knob, (time, memory) in laws.items():
        for x in (64, 128, 256, 512):
            row = {"sweep": knob, knob: x, "median_ms": 1e-3 * x**time}
            result.rows.append({**row, "measured_bytes": 8 * x**memory})
    for how, floor in (("eager", 0.03), ("queued", 0.01), ("graph", 0.015)):
        for n in (64, 128, 256, 512, 1024):
            ms = floor + 1e-7 * n**2
            result.rows.append({"sweep": "one_head", "how": how, "seq_len": n, "median_ms": ms})
    return result


def all_figures():
    return {
        "growth": plots.growth(sweeps(), where="this machine"),
        "launch": plots.launch_overhead(sweeps(), label="a GPU"),
        "saved": plots.saved_bars({"out_of_place": 1.0, "checkpointed": 0.0}),
        "stack": plots.stack_peaks({"out_of_place": {1: 3, 2: 4}, "fused": {1: 0.5, 2: 0.6}}),
        "longest": plots.longest_lengths(
            {"naive": [(2**30, 4096), (2**32, 8192)], "fused": [(2**30, 2**17), (2**32, 2**19)]},
            [(2**31, 5792)],
        ),
        "memory_bars": plots.memory_bars(table()),
        "timeline": plots.timeline(EVENTS, capacity=200 * MIB),
        "scaling_fit": plots.scaling_fit(SERIES, x="size", y="time", kind="seconds"),
        "here": plots.here_beside_recorded(
            [(64, 1e-3), (128, 2e-3)], [(64, 1e-5), (256, 1e-4)], x="seq_len (tokens)", y="time"
        ),
        "data_flow": plots.data_flow(),
        "fused": plots.data_flow(fused=True),
    }


@pytest.mark.parametrize("name", all_figures())
def test_a_figure_is_stored_light_and_dark_with_alt_text_and_always_the_same(name):
    data, metadata = plots.show(all_figures()[name])._repr_mimebundle_()
    about = metadata["image/png"]
    assert set(data) == {"image/png", "text/plain"}
    assert data["text/plain"] == f"Figure: {about['alt']}" and len(about["alt"]) > 40
    stored = base64.b64decode(data["image/png"])
    assert all_figures()[name].png() == stored, "the same input gives the same bytes"
    colours = Image.open(io.BytesIO(stored)).getcolors()
    light = Image.open(io.BytesIO(stored)).convert("RGB")
    dark = Image.open(io.BytesIO(base64.b64decode(about["dark"]))).convert("RGB")
    assert light.size == dark.size and light.width == 2 * about["width"]
    assert light.getpixel((1, 1)) == (255, 255, 255)
    assert sum(dark.getpixel((1, 1))) < 100
    assert len(colours) > 20, "nothing was drawn"


@pytest.mark.parametrize("name", [n for n in all_figures() if n not in ("data_flow", "fused")])
def test_every_chart_names_its_axes(name):
    fig, _ = all_figures()[name].figure()
    for ax in fig.axes:
        assert ax.get_xlabel()
        assert ax.get_ylabel() or name in ("memory_bars", "saved")  # its rows are named one by one


@pytest.mark.parametrize("alt", [None, "", "  \n ", "plot"])
def test_a_figure_without_alt_text_is_refused(alt):
    with pytest.raises(ArgumentError, match="alt"):
        plots.show(plots.draw(lambda ax: ax.plot([1, 2])), alt=alt)


def test_own_alt_text_replaces_that_of_the_figure():
    shown = plots.show(plots.data_flow(), alt="Another sentence\n  about the same figure.")
    assert shown.alt == "Another sentence about the same figure."
    assert repr(shown) == "Figure: Another sentence about the same figure."


def test_a_finished_figure_is_refused():
    from matplotlib.figure import Figure

    with pytest.raises(ArgumentError, match=r"plots\.draw"):
        plots.show(Figure(), alt="A line that rises from left to right.")
    with pytest.raises(ArgumentError, match="not callable"):
        plots.draw(Figure())


def test_a_figure_function_sees_the_theme_it_is_drawn_in():
    seen = []
    plots.show(plots.draw(lambda ax: seen.append(plots.theme().name)), alt="An empty pair of axes.")
    assert seen == ["light", "dark"]
    assert plots.theme() is plots.LIGHT


def test_drawing_leaves_the_readers_matplotlib_alone():
    import matplotlib
    from matplotlib import pyplot as plt

    before, open_figures = dict(matplotlib.rcParams), plt.get_fignums()
    plots.show(plots.data_flow())
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == open_figures


def test_use_style_knows_two_styles():
    import matplotlib

    with matplotlib.rc_context():
        plots.use_style("dark")
        assert matplotlib.rcParams["axes.facecolor"] == plots.DARK.paper
        plots.use_style()
        assert matplotlib.rcParams["axes.facecolor"] == plots.LIGHT.paper
        with pytest.raises(ArgumentError, match="Known: light, dark"):
            plots.use_style("sepia")


def test_given_axes_it_draws_there():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert plots.memory_bars(table(), ax=ax) is ax
    assert len(ax.patches) == 6


# -- what is drawn is what was given -------------------------------------------------


def test_bars_are_as_long_as_the_tensors():
    (ax,) = plots.memory_bars(table()).figure()[0].axes
    assert [bar.get_width() for bar in ax.patches] == [row.bytes for row in table().rows]
    assert "47 %" in ax.texts[3].get_text() and "32 MiB" in ax.texts[3].get_text()


def rectangles(ax):
    """(left, bottom, right, top in MiB) of each block of a timeline."""
    boxes = [c.get_paths()[0].get_extents() for c in ax.collections]
    return [(int(b.x0), round(b.y0 / MIB), int(b.x1), round(b.y1 / MIB)) for b in boxes]


def test_a_timeline_shows_when_each_tensor_lives():
    (ax,) = plots.timeline(EVENTS).figure()[0].axes
    assert rectangles(ax) == [
        (0, 0, 2, 64),  # S, until its scaled copy exists
        (1, 64, 3, 128),  # the copy, until P exists
        (2, 0, 4, 64),  # P, in the place of S
        (3, 64, 4, 72),  # O
    ]
    assert any(text.get_text() == "peak 128 MiB" for text in ax.texts)


def test_a_timeline_with_holes_is_stacked_to_the_bytes_alive():
    # 1 MiB freed below 2 MiB, then 2 MiB more: first fit would reach 5 MiB, alive are 4
    events = [("a", "a", MIB, 1), ("b", "b", 2 * MIB, 2), ("", "a", -MIB, 1), ("c", "c", MIB, 3)]
    events += [("", "c", -MIB, 3), ("d", "d", 2 * MIB, 4)]
    (ax,) = plots.timeline(events).figure()[0].axes
    tops = {}
    for left, _, right, top in rectangles(ax):
        for step in range(left, right):
            tops[step] = max(tops.get(step, 0), top)
    assert tops == {0: 1, 1: 3, 2: 3, 3: 4}


def test_a_timeline_of_a_trace_and_of_a_schedule_are_read():
    event = SimpleNamespace(op="bmm", bytes=MIB, shape=(2, 3), storage=0)
    (ax,) = plots.timeline(SimpleNamespace(events=[event])).figure()[0].axes
    assert ax.texts[0].get_text() == "bmm [2, 3]"

    class Schedule:
        def timeline(self, *, N):
            moments = [("bmm", "S", N), ("softmax", "P", N), ("softmax", "S", -N)]
            return [{"step": s, "name": n, "bytes": b * MIB} for s, n, b in moments]

    (ax,) = plots.timeline(Schedule(), N=3).figure()[0].axes
    assert rectangles(ax) == [(0, 0, 2, 3), (1, 3, 2, 6)]


def test_what_a_step_frees_before_it_creates_is_not_drawn_beside_it():
    events = [("softmax", "max", 2 * MIB, 1), ("softmax", "max", -2 * MIB, 1)]
    events += [("softmax", "sum", 2 * MIB, 2), ("PV", "O", MIB, 3)]
    (ax,) = plots.timeline(events).figure()[0].axes
    assert rectangles(ax) == [(0, 0, 1, 2), (1, 0, 3, 2), (2, 2, 3, 3)]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["softmax", "PV"]
    events[3:] = [("softmax", "P", MIB, 3)]  # beside the sum, which is alive
    (ax,) = plots.timeline(events).figure()[0].axes
    assert rectangles(ax) == [(0, 0, 1, 2), (1, 0, 2, 2), (1, 2, 2, 3)]


def test_a_fit_is_drawn_over_its_range_with_its_exponent():
    (ax,) = plots.scaling_fit(SERIES, x="size", y="time", kind="seconds").figure()[0].axes
    line = next(one for one in ax.lines if len(one.get_xdata()) == 2)
    assert list(line.get_xdata()) == [256, 1024]
    assert list(line.get_ydata()) == [1e-9 * 256**2, 1e-9 * 1024**2]
    assert "seq_len\nexponent 2.00" in [t.get_text() for t in ax.texts]


def test_growth_writes_the_exponents_beside_the_lines():
    memory, time = plots.growth(sweeps()).figure()[0].axes
    said = [{t.get_text() for t in ax.texts} for ax in (memory, time)]
    assert said[0] == {"seq_len  2.00", "batch  1.00", "heads  1.00", "head_dim  0.00"}
    assert said[1] == {"seq_len  2.00", "batch  1.00", "heads  1.00", "head_dim  0.50"}
    assert memory.get_ylim() == time.get_ylim()


def test_launch_overhead_marks_where_time_is_level():
    (ax,) = plots.launch_overhead(sweeps()).figure()[0].axes
    # 0.03 ms + 1e-7 N²: within a quarter of its least at N = 256, not at 512
    assert ax.patches[0].get_extents().transformed(ax.transData.inverted()).x1 == pytest.approx(256)
    guide = next(one for one in ax.lines if one.get_color() == plots.LIGHT.muted)
    y = guide.get_ydata()
    assert y[-1] / y[-2] == pytest.approx(4)
    only_eager = sweeps()
    only_eager.rows = [row for row in only_eager.rows if row.get("how") in (None, "eager")]
    (ax,) = plots.launch_overhead(only_eager).figure()[0].axes
    assert [text.get_text() for text in ax.texts] == ["one call"]
    with pytest.raises(ArgumentError, match="nothing to draw"):
        plots.launch_overhead(Result()).figure()


def test_end_labels_do_not_overlap():
    def three(ax):
        ax.plot([1, 2], [1, 1])
        ax.set_ylim(0, 10)
        plots.end_labels(ax, [(2, 1.0 + i / 100, f"line {i}", "black") for i in range(3)])

    (ax,) = plots.draw(three).figure()[0].axes
    offsets = sorted(text.xyann[1] for text in ax.texts)
    assert all(b - a > 9 for a, b in itertools.pairwise(offsets))


def test_size_axes_tick_at_powers_of_two():
    def sizes(ax):
        ax.plot([64, 65536], [1, 2**30])
        plots.size_axis(ax, "x", label="seq_len (tokens)")
        plots.bytes_axis(ax, "y", label="bytes")

    fig, _ = plots.draw(sizes).figure()
    fig.draw_without_rendering()
    (ax,) = fig.axes
    assert "4,096" in [t.get_text() for t in ax.get_xticklabels()]
    assert "1 MiB" in [t.get_text() for t in ax.get_yticklabels()]
    assert 2 < len(ax.get_yticklabels()) < 14


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ArgumentError, match="empty"):
        plots.memory_bars(SimpleNamespace(rows=[])).figure()
    with pytest.raises(ArgumentError, match="allocates nothing"):
        plots.timeline([]).figure()


# -- colours ---------------------------------------------------------------------------


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=lambda t: t.name)
def test_labels_in_any_colour_can_be_read(theme):
    for colour in (*theme.cycle, theme.ink, theme.muted):
        assert contrast(colour, theme.paper) >= 4.5, colour
        assert contrast(colour, theme.panel) >= 4.5, colour


def test_plots_load_neither_torch_nor_triton():
    code = (
        "import sys; from labkit import plots; plots.show(plots.data_flow());"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_a_trace_shows_scores_and_probabilities_in_their_own_colours():
    # A trace knows operators, not tensors: a product is S, what the softmax makes is P.
    from matplotlib.colors import to_hex

    events = [
        ("bmm", "bmm [8, 8]", 4 * MIB, 1),
        ("_softmax", "_softmax [8, 8]", 4 * MIB, 2),
        ("cos", "cos [8, 8]", 4 * MIB, 3),
    ]
    fig, _ = plots.timeline(events).figure("light")
    drawn = [to_hex(c.get_facecolor()[0]) for c in fig.axes[0].collections]
    tensors = plots.LIGHT.tensors
    assert drawn[:3] == [tensors["S"], tensors["P"], plots.LIGHT.purple]
    assert drawn[0] != drawn[1]
