"""Explorers that run the real thing, where a kernel is alive.

``attention_lab()`` shows choices (seq_len, heads, dtype, variant …) and a button.
Each press runs that attention on this machine, measures its peak memory
(``labkit.memory.measure``) and its time (``labkit.timing.time_fn``), and puts both
into the figure beside what the schedule predicted.

A page without a kernel cannot run anything, so what a notebook stores is a figure of
the prediction, as HTML, PNG and text; only a live front end replaces it by the
controls.  ``tools/execute.py`` drops the link to the dead controls when it writes a
notebook.

Used in chapters 01 (what attention writes) and 05 (what the backward pass keeps).
Needs ipywidgets; loads torch when something is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from labkit.dtypes import dtype_name, torch_dtype
from labkit.errors import ArgumentError, LabError, MissingDependencyError, check_choice
from labkit.errors import check_positive_int as positive
from labkit.explorers.core import Explorer
from labkit.memory import VARIANTS, attention_peak, check_fits
from labkit.units import format_bytes, format_seconds

__all__ = ["AttentionLab", "Run", "attention_lab"]

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
LENGTHS = tuple(2**k for k in range(6, 15))
_HEADS = (1, 2, 4, 8, 12, 16, 32)
_DTYPES = ("float32", "float16", "bfloat16")
#: naive attention's variants, and PyTorch's own attention for comparison
_METHODS = (*VARIANTS, "fused")


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        raise MissingDependencyError(
            "labkit.widgets needs ipywidgets, which is not installed. Run `pip install "
            "'ipywidgets>=8.1'` and restart the kernel; or use labkit.explorers, which needs "
            "neither it nor a kernel."
        ) from None
    return ipywidgets


@dataclass(frozen=True)
class Run:
    """One measured run: the problem, its predicted and measured peak in bytes, its time."""

    seq_len: int
    heads: int
    batch: int
    head_dim: int
    dtype: str
    variant: str
    causal: bool
    training: bool
    device: str
    #: peak above the inputs, by the schedule
    predicted: int
    #: the same, measured; None where it could not be, and ``why_not`` says why
    measured: int | None
    seconds: float
    #: (p80 − p20) / median of the time
    spread: float
    why_not: str = ""

    @property
    def what(self) -> str:
        """The problem in one line."""
        extra = (", causal" if self.causal else "") + (", training" if self.training else "")
        return f"N {self.seq_len:,}, H {self.heads}, {self.dtype}, {self.variant}{extra}"


def _attention(variant: str, causal: bool) -> Callable:
    if variant == "fused":
        from torch.nn.functional import scaled_dot_product_attention

        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)
    from labkit.naive import naive_attention

    return lambda q, k, v: naive_attention(q, k, v, causal=causal, variant=variant)


def _call(variant: str, causal: bool, training: bool) -> Callable:
    forward = _attention(variant, causal)
    if not training:
        return forward

    def step(q, k, v, dout):
        import torch

        out = forward(q, k, v)
        return torch.autograd.grad(out, (q, k, v), dout)

    return step


class AttentionLab:
    """Choices, a button, and a figure in which measured points join the predicted line.

    Parameters are those of :func:`attention_lab`.  ``runs`` holds what was measured.
    """

    def __init__(self, **start: Any) -> None:
        _ipywidgets()
        self.start = self._checked(**start)
        self.state = dict(self.start)
        self.runs: list[Run] = []
        self._box: Any = None

    @staticmethod
    def _checked(**problem: Any) -> dict[str, Any]:
        out = {k: positive(k, problem[k]) for k in ("seq_len", "heads", "batch", "head_dim")}
        out["dtype"] = check_choice("dtype", dtype_name(problem["dtype"]), _DTYPES)
        out["variant"] = check_choice("variant", problem["variant"], _METHODS)
        for flag in ("causal", "training"):
            if not isinstance(problem[flag], bool):
                raise ArgumentError(flag, problem[flag], "is not a bool.", "Pass True or False.")
            out[flag] = problem[flag]
        return out

    # -- running -----------------------------------------------------------------
    def run(self, **changes: Any) -> Run:
        """Measure one problem on this machine and keep it among ``runs``.

        Parameters
        ----------
        changes : any of the parameters of :func:`attention_lab`; the rest stays as it is.

        Returns
        -------
        Run

        Raises
        ------
        ArgumentError
            for a size that is not positive, an unknown dtype or variant.
        NotEnoughMemoryError
            if the predicted peak and the inputs do not fit; nothing has been allocated then.
        """
        for name in changes:
            check_choice("parameter", name, self.state)
        self.state = problem = self._checked(**{**self.state, **changes})
        try:
            import torch
        except ImportError:
            raise MissingDependencyError(
                "Running attention needs torch, which is not installed. Run `pip install torch`."
            ) from None
        from labkit.memory import measure
        from labkit.timing import time_fn

        device = "cuda" if torch.cuda.is_available() else "cpu"
        predicted = attention_peak(**problem, device=device)
        needed = attention_peak(**problem, device=device, with_inputs=True)
        check_fits(needed, "this attention, inputs included,", device=device)
        shape = [problem[k] for k in ("batch", "heads", "seq_len", "head_dim")]
        random = torch.Generator(device).manual_seed(0)
        dtype = torch_dtype(problem["dtype"])
        count = 4 if problem["training"] else 3
        tensors = [
            torch.randn(shape, generator=random, device=device, dtype=dtype) for _ in range(count)
        ]
        for tensor in tensors[: 3 if problem["training"] else 0]:
            tensor.requires_grad_()
        call = _call(problem["variant"], problem["causal"], problem["training"])
        report = measure(call, *tensors, predicted=predicted)
        timing = time_fn(lambda: call(*tensors), warmup_ms=20, rep_ms=100)
        run = Run(
            **problem,
            device=device,
            predicted=predicted,
            measured=report.measured,
            seconds=timing.seconds,
            spread=timing.spread,
            why_not=report.why_not.get("measured", ""),
        )
        self.runs.append(run)
        return run

    # -- figures -----------------------------------------------------------------
    def _predictions(self, problem: dict[str, Any]) -> list[tuple[int, int]]:
        # on a CPU, so that the stored figure is the same wherever it was made
        device = self.runs[-1].device if self.runs else "cpu"
        return [(n, attention_peak(**{**problem, "seq_len": n}, device=device)) for n in LENGTHS]

    def memory_figure(self, problem: dict[str, Any] | None = None) -> Explorer:
        """Predicted peak against seq_len for the current choices, and every measured peak."""
        problem = problem or self.state
        line = self._predictions(problem)
        points = [(r, r.measured) for r in self.runs if r.measured is not None]
        marks: list[dict[str, Any]] = [
            {"mark": "polyline", "style": "a", "points": [list(p) for p in line]}
        ]
        marks += [_dot(r, b, problem) for r, b in points]
        extra = (", causal" if problem["causal"] else "") + (
            ", forward and backward" if problem["training"] else ", forward"
        )
        what = (
            f"{problem['variant']}{extra}; batch {problem['batch']}, heads {problem['heads']}, "
            f"head_dim {problem['head_dim']}, {problem['dtype']}"
        )
        if self.runs:
            table = {
                "head": ["run", "predicted", "measured", "time"],
                "rows": [_row(r) for r in self.runs],
            }
            summary = (
                "The line is predicted for the choices above; points are measured on this "
                "machine, grey ones with other choices than the line's."
            )
        else:
            shown = [p for p in line if p[0] in (256, 1024, 4096, 16384)]
            table = {
                "head": ["seq_len", "predicted peak"],
                "rows": [[f"{n:,}", format_bytes(b)] for n, b in shown],
            }
            summary = (
                "The line is predicted from the schedule of buffers. Nothing is measured in a "
                "page: open the notebook, run this cell, and measured points join it."
            )
        values = [b for _, b in [*line, *points]]
        return _plot(
            "Peak memory of attention: predicted and measured",
            what + ". Peak bytes above the inputs.",
            "peak bytes",
            values,
            marks,
            summary,
            table,
            ticks=_bytes_ticks,
        )

    def time_figure(self) -> Explorer | None:
        """Measured time against seq_len; None before the first run.

        On a card that ``labkit.hardware`` knows, a line shows the least time that its data sheet
        allows (``labkit.roofline``).
        """
        if not self.runs:
            return None
        last = self.runs[-1]
        problem = {name: getattr(last, name) for name in self.state}
        nanoseconds = [r.seconds * 1e9 for r in self.runs]
        bound = _least_times(problem, last.device)
        marks: list[dict[str, Any]] = []
        if bound:
            marks.append({"mark": "polyline", "style": "a", "points": [list(p) for p in bound]})
        marks += [_dot(r, t, problem) for r, t in zip(self.runs, nanoseconds, strict=True)]
        return _plot(
            "Time of the same runs",
            f"Median of repeated calls on this machine ({last.device})."
            + (" Line: the least that its data sheet allows." if bound else ""),
            "time",
            [*nanoseconds, *(t for _, t in bound)],
            marks,
            f"Last: {last.what} took {format_seconds(last.seconds)}, "
            f"spread {last.spread * 100:.0f} %.",
            {
                "head": ["run", "time"],
                "rows": [[r.what, format_seconds(r.seconds)] for r in self.runs],
            },
            ticks=_time_ticks,
        )

    # -- the live controls ---------------------------------------------------------
    @property
    def widget(self) -> Any:
        """The controls and figures as one ipywidgets box, made on first use."""
        if self._box is None:
            self._box = self._make()
        return self._box

    def _make(self) -> Any:
        w = _ipywidgets()
        at = self.start
        wide = {"layout": w.Layout(width="auto"), "style": {"description_width": "5.5em"}}

        def menu(name: str, values: tuple) -> Any:
            options = [(f"{v:,}" if isinstance(v, int) else v, v) for v in values]
            if at[name] not in values:
                options = sorted([*options, (f"{at[name]:,}", at[name])], key=lambda o: o[1])
            return w.Dropdown(options=options, value=at[name], description=name, **wide)

        inputs = {
            "seq_len": menu("seq_len", LENGTHS),
            "heads": menu("heads", _HEADS),
            "dtype": menu("dtype", _DTYPES),
            "variant": menu("variant", _METHODS),
            "causal": w.Checkbox(value=at["causal"], description="causal mask", indent=False),
            "training": w.Checkbox(
                value=at["training"], description="forward and backward", indent=False
            ),
        }
        button = w.Button(description="Run it", button_style="primary", icon="play")
        clear = w.Button(description="Clear")
        status = w.HTML()
        memory, time = w.HTML(), w.HTML()

        def say(text: str) -> None:
            status.value = f'<p role="status" style="margin:.2em 0">{escape(text)}</p>'

        def draw() -> None:
            chosen = {**self.state, **{name: widget.value for name, widget in inputs.items()}}
            memory.value = self.memory_figure(chosen).html()
            figure = self.time_figure()
            time.value = figure.html() if figure else ""

        def press(_: Any) -> None:
            button.disabled = True
            say("Running …")
            try:
                run = self.run(**{name: widget.value for name, widget in inputs.items()})
            except LabError as error:
                say(str(error))
            except Exception as error:  # a callback's traceback would end in a log nobody reads
                say(f"{type(error).__name__}: {error}")
            else:
                got = format_bytes(run.measured) if run.measured is not None else run.why_not
                say(
                    f"{run.what}: predicted {format_bytes(run.predicted)}, measured {got}, "
                    f"{format_seconds(run.seconds)} on {run.device}."
                )
                draw()
            finally:
                button.disabled = False

        def wipe(_: Any) -> None:
            self.runs.clear()
            say("")
            draw()

        button.on_click(press)
        clear.on_click(wipe)
        for widget in inputs.values():
            widget.observe(lambda _: draw(), names="value")
        draw()
        grid = w.GridBox(
            [*inputs.values(), button, clear],
            layout=w.Layout(
                grid_template_columns="repeat(auto-fill, minmax(13em, 1fr))",
                grid_gap=".3em 1em",
                max_width="800px",
            ),
        )
        box = w.VBox([grid, status, memory, time])
        # for the tests and for a reader who wants to press from code
        box.parts = {
            **inputs,
            "run": button,
            "clear": clear,
            "status": status,
            "memory": memory,
            "time": time,
        }
        return box

    # -- output --------------------------------------------------------------------
    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data, metadata = self.memory_figure()._repr_mimebundle_()
        if _kernel_alive():
            data[WIDGET_MIME] = {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.widget.model_id,
            }
        return data, metadata

    def __repr__(self) -> str:
        return str(self.memory_figure())


def _kernel_alive() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return getattr(shell, "kernel", None) is not None


def _row(run: Run) -> list[str]:
    measured = format_bytes(run.measured) if run.measured is not None else f"not: {run.why_not}"
    return [run.what, format_bytes(run.predicted), measured, format_seconds(run.seconds)]


def _dot(run: Run, value: float, problem: dict[str, Any]) -> dict[str, Any]:
    same = all(getattr(run, name) == problem[name] for name in problem if name != "seq_len")
    style = "dot b" if same else "dot e"
    return {"mark": "point", "x": run.seq_len, "y": value, "r": 6, "style": style}


def _least_times(problem: dict[str, Any], device: str) -> list[tuple[int, float]]:
    """(seq_len, nanoseconds) that the roofline allows; empty where no data sheet is known."""
    if device != "cuda":
        return []
    from labkit.hardware import detect
    from labkit.roofline import Roofline, steps

    card = detect().card
    if card is None or problem["dtype"] not in card.peak:
        return []
    roof = Roofline.from_card(card, problem["dtype"])
    method = "fused" if problem["variant"] == "fused" else "naive"
    parts = list(steps(method, problem["causal"]))
    if problem["training"]:
        parts += steps(method, problem["causal"], direction="backward")
    sizes = {k: problem[k] for k in ("heads", "batch", "head_dim", "dtype")}
    return [(n, roof.time_of(parts, seq_len=n, **sizes).lower * 1e9) for n in LENGTHS]


def _bytes_ticks(low: int, high: int) -> list[list]:
    step = max(1, math.ceil((high - low) / 6))
    return [[2**k, format_bytes(2**k), False] for k in range(low, high + 1, step)]


def _time_ticks(low: int, high: int) -> list[list]:
    first, last = math.ceil(low * math.log10(2)), math.floor(high * math.log10(2))
    return [[10.0**k, format_seconds(10.0**k * 1e-9), False] for k in range(first, last + 1)]


def _plot(
    title: str,
    about: str,
    label: str,
    values: list[float],
    marks: list[dict[str, Any]],
    summary: str,
    table: dict[str, Any],
    *,
    ticks: Callable[[int, int], list[list]],
) -> Explorer:
    low = math.floor(math.log2(min(values))) - 1
    high = math.ceil(math.log2(max(values))) + 1
    if ticks is _time_ticks:  # at least one power of ten on each side
        low, high = low - 3, high + 3
    return Explorer(
        {
            "title": title,
            "about": about,
            "controls": [],
            "forms": {},
            "quantities": {},
            "figure": {
                "kind": "loglog",
                "x": {
                    "low": LENGTHS[0] / 2,
                    "high": LENGTHS[-1] * 2,
                    "label": "seq_len (tokens)",
                    "ticks": [[n, f"{n:,}", i % 2 == 1] for i, n in enumerate(LENGTHS[::2])],
                },
                "y": {
                    "low": float(2.0**low),
                    "high": float(2.0**high),
                    "label": label,
                    "ticks": ticks(low, high),
                },
                "marks": marks,
            },
            "summary": summary,
            "table": table,
        }
    )


def attention_lab(
    *,
    seq_len: int = 1024,
    heads: int = 4,
    batch: int = 1,
    head_dim: int = 64,
    dtype: Any = "float32",
    variant: str = "out_of_place",
    causal: bool = False,
    training: bool = False,
) -> AttentionLab:
    """Run attention from a notebook and watch its peak and time join the predicted line.

    Parameters
    ----------
    seq_len, heads, batch, head_dim : sizes to start with.
    dtype : ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    variant : a variant of ``labkit.naive.naive_attention``, or ``"fused"`` for PyTorch's own
        ``scaled_dot_product_attention``.
    causal, training : masked; forward and backward instead of forward alone.

    Returns
    -------
    AttentionLab
        shows itself when it is the last line of a cell; ``.run()`` does what the button does.

    Raises
    ------
    MissingDependencyError
        without ipywidgets.
    ArgumentError
        for a size that is not positive, an unknown dtype or variant.
    """
    return AttentionLab(
        seq_len=seq_len,
        heads=heads,
        batch=batch,
        head_dim=head_dim,
        dtype=dtype,
        variant=variant,
        causal=causal,
        training=training,
    )
