"""Who computes attention fastest, what SDPA picks, and where half precision pays (chapter 10)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["backend_map", "half_gain", "sdpa_picks"]

#: as pages call them
_CALLED = {
    "flash": "flash", "cudnn": "cuDNN", "efficient": "efficient", "math": "math",
    "ours": "labkit", "naive": "naive", "flash_cpu": "flash",
}  # fmt: skip
_WHAT = {False: "forward", True: "forward + backward"}


def _colours() -> dict[str, str]:
    t = theme()
    return {
        "flash": t.vermilion, "flash_cpu": t.vermilion, "cudnn": t.green, "ours": t.blue,
        "efficient": t.purple, "math": t.orange, "naive": t.muted,
    }  # fmt: skip


def _rows(cells: dict[tuple[int, bool, int], Any]) -> list[tuple[int, bool]]:
    return sorted({(d, causal) for d, causal, _ in cells}, key=lambda r: (r[1], r[0]))


def _grid(
    ax: Axes,
    cells: dict[tuple[int, bool, int], tuple[str, str, float]],
    rows: list[tuple[int, bool]],
    xs: list[int],
) -> None:
    """A cell for each shape: ``(text, backend for the colour, how strong)``."""
    from matplotlib.patches import Rectangle

    colours = _colours()
    for (d, causal, n), (text, backend, strength) in cells.items():
        x, y = xs.index(n), rows.index((d, causal))
        colour = colours.get(backend, theme().ink)
        ax.add_patch(
            Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, facecolor=colour, alpha=strength, lw=0)
        )
        ax.text(x, y, text, ha="center", va="center", fontsize=7.8, linespacing=1.25)
    ax.set_xlim(-0.55, len(xs) - 0.45)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(xs)), [f"{n:,}" for n in xs])
    ax.set_yticks(range(len(rows)), [f"d = {d}{', causal' if c else ''}" for d, c in rows])
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


@figure(width=7.6, height=5.2, rows=2)
def backend_map(axes: Any, result: Any, *, dtype: str = "bfloat16", kind: str = "dense") -> str:
    """The fastest implementation for each shape, and by how much it leads the next.

    Parameters
    ----------
    result : of the experiment ``backend_map``, or its record.
    dtype, kind : which rows: ``"dense"``, ``"gqa"`` or ``"mask"``.
    """
    from labkit.experiments.backend_map import winners

    found = {t: winners(result, dtype=dtype, training=t, kind=kind) for t in (False, True)}
    rows = _rows({**found[False], **found[True]})
    xs = sorted({n for cells in found.values() for _, _, n in cells})
    for ax, training in zip(axes, (False, True), strict=True):
        cells = {
            key: (f"{_CALLED[who]}\n{lead:.2f}×", who, 0.16 + 0.5 * min(1.0, lead - 1))
            for key, (who, lead) in found[training].items()
        }
        _grid(ax, cells, rows, xs)
        ax.set_title(_WHAT[training])
    axes[-1].set_xlabel("seq_len (tokens)")
    return (
        f"Two tables of coloured cells, forward and with the backward pass, for {dtype}: sequence "
        "length from left to right, head_dim and mask from top to bottom. Each cell names the "
        "fastest implementation and the next one's time over its own."
    )


@figure(width=7.6, height=5.2, rows=2)
def sdpa_picks(axes: Any, result: Any, *, dtype: str = "bfloat16", kind: str = "dense") -> str:
    """What SDPA picks for each shape, and its time over that of its fastest backend.

    Parameters
    ----------
    result : of the experiment ``backend_map``, or its record.
    dtype, kind : which rows.
    """
    picked = [
        r for r in result.select(part="pick", kind=kind, dtype=dtype) if "pick_over_fastest" in r
    ]
    if not picked:
        raise ArgumentError(
            "result", f"{kind} {dtype}", "has no picks.", "Ask for what was measured."
        )
    key = lambda r: (r["head_dim"], r["causal"], r["seq_len"])  # noqa: E731
    rows = _rows({key(r): None for r in picked})
    xs = sorted({r["seq_len"] for r in picked})
    for ax, training in zip(axes, (False, True), strict=True):
        cells = {}
        for r in (r for r in picked if r["training"] == training):
            ratio = r["pick_over_fastest"]
            text = f"{_CALLED[r['picked']]}\n" + ("best" if ratio == 1 else f"{ratio:.2f}×")
            cells[key(r)] = (text, r["fastest"], 0.1 + 0.56 * min(1.0, ratio - 1))
        _grid(ax, cells, rows, xs)
        ax.set_title(_WHAT[training])
    axes[-1].set_xlabel("seq_len (tokens)")
    return (
        f"Two tables of cells, forward and with the backward pass, for {dtype}: the backend that "
        "SDPA picks by itself, and its time over that of the fastest SDPA backend. Strong colour, "
        "that of the faster backend, where the pick was not the fastest."
    )


@figure(width=7.2, height=3.9)
def half_gain(ax: Axes, result: Any, *, precision: str = "autocast_fp16") -> str:
    """float32's time over half precision's, against seq_len: layers, and attention alone.

    Parameters
    ----------
    result : of the experiment ``backend_map``, or its record.
    precision : of the layers, ``"autocast_fp16"``, ``"fp16"`` or ``"tf32"``.
    """
    t = theme()
    lines: dict[str, dict[int, float]] = {}
    for model in dict.fromkeys(r["model"] for r in result.select(part="layer")):
        rows = result.select(part="layer", model=model)
        ms = {(r["precision"], r["seq_len"]): r["median_ms"] for r in rows}
        dim = rows[0]["dim"]
        lines[f"step, dim {dim}"] = {
            n: ms["fp32", n] / x for (p, n), x in ms.items() if p == precision and ("fp32", n) in ms
        }
    dtype = {"tf32": "tf32"}.get(precision, "float16")
    for training, label in ((False, "attention, forward"), (True, "attention, + backward")):
        best: dict[tuple[str, int], float] = {}
        for r in result.select(part="policy", training=training):
            at = (r["dtype"], r["seq_len"])
            best[at] = min(r["ms"], best.get(at, r["ms"]))
        lines[label] = {
            n: best["float32", n] / x for (d, n), x in best.items()
            if d == dtype and ("float32", n) in best
        }  # fmt: skip
    lines = {label: dict(sorted(line.items())) for label, line in lines.items() if line}
    if not lines:
        raise ArgumentError(
            "result", precision, "was measured neither for layers nor for attention.",
            "Pass a GPU's result.",
        )  # fmt: skip
    ends = []
    for (label, line), colour in zip(lines.items(), t.cycle, strict=False):
        xs, ys = list(line), list(line.values())
        ax.plot(xs, ys, "o-", color=colour)
        ends.append((xs[-1], ys[-1], label, colour))
    ax.set_yscale("log", base=2)
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    ax.axhline(1, color=t.ink, linewidth=1)
    size_axis(ax, "x", label="seq_len (tokens)")
    ax.set_ylabel("time in float32 / in half")
    for rule in (256, 512):
        ax.axvline(rule, color=t.muted, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        "rules: 256, 512", (256, 1), xycoords=("data", "axes fraction"), xytext=(-4, -3),
        textcoords="offset points", va="top", ha="right", fontsize=8.5, color=t.muted,
    )  # fmt: skip
    end_labels(ax, ends, room=0.3)
    return (
        "Lines over sequence length, both axes in powers of two: the time in float32 over the time "
        "in half precision, for a training step of two models and for attention alone. A solid "
        "line marks equal times, two dashed ones the fixed thresholds of the report."
    )
