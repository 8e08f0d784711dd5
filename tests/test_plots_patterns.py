"""Figures of masks against blocks: what they draw of what was measured."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result

LENGTHS = (1024, 4096, 16384)


def made_up(*, peaks: bool = True) -> Result:
    """A result with the shape of a GPU's; the numbers in it are made up."""
    result = Result()

    def add(part, pattern, name, n, ms, blocks, peak=0):
        result.rows.append({
            "part": part, "pattern": pattern, "name": name, "pass": "forward", "seq_len": n,
            "median_ms": ms, "density": 0.05, "block_density": blocks, "held": n,
            "peak": peak if peaks else None,
        })  # fmt: skip

    add("density", "dense", "sdpa", 16384, 3.0, 1.0)
    add("density", "dense", "flash", 16384, 2.0, 1.0)
    for name, ms in (("naive", 40.0), ("sdpa", 10.0)):
        add("density", "local", name, 16384, ms, 0.07)
        add("density", "random", name, 16384, ms * 1.01, 1.0)
    add("density", "random", "flex", 16384, 8.0, 1.0)
    add("density", "random_blocks", "flex", 16384, 0.5, 0.06)
    add("density", "clustered_sorted", "flex", 16384, 1.0, 0.08)
    add("density", "local", "window", 16384, 0.25, 0.07)
    for n in LENGTHS:
        add("lengths", "local", "sdpa", n, n * n / 1e6, 0.1, 3 * n * n)
        add("lengths", "local", "window", n, n / 1e4, 0.1, 64 * n)
    return result


def marks(ax, marker):
    return [line.get_xydata()[0] for line in ax.lines if line.get_marker() == marker
            and len(line.get_xydata())]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_times_stand_over_that_of_our_dense_kernel(theme):
    fig, alt = plots.blocks_and_time(made_up()).figure(theme)
    (ax,) = fig.axes
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == ["local, window kernel", "random, in blocks", "clustered, sorted", "random",
                     "any, mask, SDPA", "any, mask, naive"]  # fmt: skip
    times = {names[int(y)]: x for x, y in marks(ax, "o")}
    assert times["local, window kernel"] == pytest.approx(0.25 / 2.0)
    assert times["random"] == pytest.approx(4.0)
    assert times["any, mask, SDPA"] == pytest.approx(5.0, rel=0.02)
    blocks = {names[int(y)]: x for x, y in marks(ax, "s")}
    assert blocks == {"local, window kernel": 0.07, "random, in blocks": 0.06,
                      "clustered, sorted": 0.08, "random": 1.0}  # fmt: skip
    assert all(x == 0.05 for x, _ in marks(ax, "|")) and len(marks(ax, "|")) == 6
    assert "clustered, sorted" in alt


def test_lengths_are_drawn_in_seconds_and_bytes():
    fig, _ = plots.window_lengths(made_up()).figure()
    time, held = fig.axes
    for line, law in zip(time.lines, (lambda n: n * n / 1e9, lambda n: n / 1e7), strict=True):
        assert list(line.get_ydata()) == pytest.approx([law(n) for n in LENGTHS])
    assert [list(line.get_ydata()) for line in held.lines] == [
        [3 * n * n for n in LENGTHS], [64 * n for n in LENGTHS],
    ]  # fmt: skip
    assert "model" not in held.get_title(loc="left")
    _, held = plots.window_lengths(made_up(peaks=False)).figure()[0].axes
    assert list(held.lines[0].get_ydata()) == list(LENGTHS)
    assert "by the model" in held.get_title(loc="left")


def test_what_was_not_measured_is_refused():
    with pytest.raises(ArgumentError, match="not measured"):
        plots.blocks_and_time(Result()).figure()
    with pytest.raises(ArgumentError, match="both"):
        plots.window_lengths(made_up(), what="both").figure()
