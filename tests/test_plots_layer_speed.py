"""Figures of a layer's speed: what they draw of the figures that they are given."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result
from labkit.experiments.layer_forward import CLAIMED

LENGTHS = (128, 512, 2048, 8192)


def layers() -> Result:
    """A result with the shape of a GPU's; the times in it are made up."""
    result = Result()
    for name, speed in (("original", 1), ("sdpa", 3), ("sdpa_half", 12), ("flash_half", 14)):
        for n in LENGTHS:
            gpu = 1e-11 * n**2 * 100 / speed + 2e-6
            end = f"report.{name}.n{n}"
            result.add(f"time.{end}", max(3e-4, gpu), "s", "made up")
            result.add(f"speedup.{end}", speed, "1", "made up")
            for key, seconds in (("gpu", gpu), ("host", 2.9e-4), ("graph", gpu + 4e-6)):
                result.add(f"{key}.{end}", seconds, "s", "made up")
            line = [[0.0, 2.0], [10.0, 4.0], [30.0, 10.0]]
            row = {"part": "launch", "size": "report", "name": name, "seq_len": n}
            result.rows.append({**row, "timeline": line} if n < 8192 else row)
        result.add(f"ends.report.{name}", 1800, "tokens", "made up")
    return result


def factors(*, parts: bool = True) -> Result:
    result = Result()
    for n in LENGTHS:
        for key, value in (
            ("a", 2), ("b", 3), ("product", 6), ("direct", 12), ("product_over_direct", 0.5),
            ("product_over_direct_gpu", 0.4), ("mixing_gpu", 0.8), ("inside_gpu", 0.5),
        ):  # fmt: skip
            if parts or not key.endswith("gpu"):
                result.add(f"{key}.report.sdpa.n{n}", value, "1", "made up")
    return result


def axes_of(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 60
    fig.draw_without_rendering()
    return fig.axes


def ys(ax) -> list[list[float]]:
    return [list(line.get_ydata()) for line in ax.lines]


def test_times_are_one_line_for_each_configuration_and_two_of_the_report():
    (ax,) = axes_of(plots.layer_times(layers()))
    assert len(ax.lines) == 4 + 2, "original_half was not measured"
    drawn = ys(ax)
    assert drawn[0][0] == 3e-4 and drawn[0][-1] == pytest.approx(1e-9 * 8192**2 + 2e-6)
    assert [pair[0] for pair in CLAIMED.values()] in drawn
    (ax,) = axes_of(plots.layer_times(layers(), claimed=False, configs=["sdpa"]))
    assert len(ax.lines) == 1


def test_launching_has_four_lines_and_the_end_shaded():
    for ax in axes_of(plots.layer_launch(layers())):
        assert len(ax.lines) == 4
        call, host, graph, gpu = ys(ax)
        assert call[0] == 3e-4 and set(host) == {2.9e-4} and graph[0] > gpu[0]
        (shade,) = ax.patches
        assert shade.get_x() + shade.get_width() == pytest.approx(1800)
        assert 64 < shade.get_x() < 128 and ax.get_xlim()[0] == shade.get_x()


def test_gaps_are_one_strip_for_each_pair_and_one_bar_for_each_kernel():
    (ax,) = axes_of(plots.layer_gaps(layers(), lengths=(128, 512)))
    assert len(ax.collections) == 4
    assert all(len(strip.get_paths()) == 3 for strip in ax.collections)
    assert any("40 % busy" in text.get_text() for text in ax.texts), "16 of 40 µs"
    assert ax.get_yticklabels()[0].get_text() == "original, N = 128"


def test_speed_ups_are_drawn_beside_what_the_report_states():
    (ax,) = axes_of(plots.layer_speedups(layers(), configs=["sdpa", "sdpa_half"]))
    assert [3] * 4 in ys(ax) and [12] * 4 in ys(ax)
    assert [a / b for a, b in CLAIMED.values()] in ys(ax)


def test_a_product_stands_beside_what_was_measured():
    left, right = axes_of(plots.speedup_product(factors()))
    assert ys(left)[:4] == [[2] * 4, [3] * 4, [6] * 4, [12] * 4]
    assert ys(right)[:3] == [[0.4] * 4, [0.8] * 4, [0.5] * 4], "the GPU's own time has parts"
    _, right = axes_of(plots.speedup_product(factors(parts=False)))
    assert ys(right)[:1] == [[0.5] * 4] and len(right.lines) == 2


@pytest.mark.parametrize(
    "draw",
    [
        plots.layer_gaps, plots.layer_launch, plots.layer_speedups, plots.layer_times,
        plots.speedup_product,
    ],
)  # fmt: skip
def test_an_empty_result_is_refused(draw):
    with pytest.raises(ArgumentError, match="nothing to draw"):
        draw(Result()).figure()
