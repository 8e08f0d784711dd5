"""Tables of what attention holds: every tensor with its shape and bytes.

>>> table = attention_memory(seq_len=2048, heads=12, dtype="float16")
>>> table.bytes_of("S", "P") // 2**20
192

A table sums tensors; which of them are alive at the same time is another question, and
:mod:`labkit.memory.schedules` answers it.

Imports: closed_form, dtypes, errors, units.  No torch.  Taught in chapter 01.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from labkit.closed_form import Form
from labkit.dtypes import dtype_name, itemsize
from labkit.errors import (
    ArgumentError,
    LabError,
    check_choice,
    check_positive_int,
    check_positive_number,
)
from labkit.memory.forms import SHAPES, attention_forms, problem_sizes, visible_pairs
from labkit.memory.schedules import VARIANTS, attention_peak
from labkit.units import format_bytes

__all__ = [
    "METHODS",
    "MemoryRow",
    "MemoryTable",
    "attention_memory",
    "longest_seq_len",
    "scores_buffer_bytes",
]

#: methods of computing attention that a table describes, and the schedules of more forms
METHODS = ("naive", "fused")

_ROLES = {
    "Q": "input", "K": "input", "V": "input", "S": "scores", "P": "scores", "O": "output",
    "mask": "mask", "LSE": "statistics", "delta": "statistics", "dO": "gradient",
    "dQ": "gradient", "dK": "gradient", "dV": "gradient", "dP": "scores gradient",
    "dS": "scores gradient",
}  # fmt: skip

# forward, then what the backward pass adds
_TENSORS = {
    "naive": (("Q", "K", "V", "S", "P", "O"), ("dO", "dV", "dP", "dS", "dQ", "dK")),
    "fused": (("Q", "K", "V", "O", "LSE"), ("dO", "delta", "dV", "dQ", "dK")),
}


@dataclass(frozen=True)
class MemoryRow:
    """One tensor of a :class:`MemoryTable`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    #: bytes that hold something: under a causal mask, the visible part of an N×N tensor
    useful_bytes: int
    #: "input", "scores", "output", "mask", "statistics", "gradient" or "scores gradient"
    role: str
    #: the closed form of ``bytes``
    form: Form = field(repr=False, compare=False)


@dataclass(frozen=True)
class MemoryTable:
    """Every tensor of one attention problem, with its bytes (binary units when printed)."""

    rows: tuple[MemoryRow, ...]
    caption: str
    causal: bool
    #: bytes alive at the worst moment, inputs included (see ``labkit.memory.schedule``)
    peak: int

    @property
    def total(self) -> int:
        """Bytes of all tensors together, whether or not they live at the same time."""
        return sum(row.bytes for row in self.rows)

    @property
    def useful(self) -> int:
        """Bytes of the total that hold something (less than it under a causal mask)."""
        return sum(row.useful_bytes for row in self.rows)

    @property
    def scores_share(self) -> float:
        """Share of the total (0 to 1) that tensors with N×N elements take, masks aside."""
        return sum(r.bytes for r in self.rows if r.role.startswith("scores")) / self.total

    def bytes_of(self, *names: str) -> int:
        """Bytes of the named tensors together.

        Raises
        ------
        ArgumentError
            if a name is not in the table.
        """
        known = {row.name: row.bytes for row in self.rows}
        return sum(known[check_choice("name", name, known)] for name in names)

    def __getitem__(self, name: str) -> MemoryRow:
        known = {row.name: row for row in self.rows}
        return known[check_choice("name", name, known)]

    # -- showing -----------------------------------------------------------------
    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["tensor", "shape", "dtype", "bytes", "share", "role"]
        if self.causal:
            head.insert(4, "useful")
        body = []
        for r in self.rows:
            cells = [r.name, _shape(r.shape), r.dtype, format_bytes(r.bytes)]
            cells += [format_bytes(r.useful_bytes)] if self.causal else []
            body.append([*cells, f"{100 * r.bytes / self.total:.1f} %", r.role])
        last = ["all tensors", "", "", format_bytes(self.total)]
        last += [format_bytes(self.useful)] if self.causal else []
        body.append([*last, "100.0 %", ""])
        return head, body

    def _note(self) -> str:
        return (
            f"Alive at once, at the worst moment: {format_bytes(self.peak)}, inputs included. "
            "Binary units: 1 KiB = 1024 bytes."
        )

    def __str__(self) -> str:
        head, body = self._cells()
        wide = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        right = {"bytes", "useful", "share"}
        lines = []
        for row in [head, *body]:
            cells = [
                cell.rjust(w) if name in right else cell.ljust(w)
                for cell, w, name in zip(row, wide, head, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        rule = "─" * max(len(line) for line in lines)
        return "\n".join(
            [self.caption, rule, lines[0], rule, *lines[1:-1], rule, lines[-1], self._note()]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, body = self._cells()
        numeric = [name in {"bytes", "useful", "share"} for name in head]
        align = [' style="text-align:right"' if n else ' style="text-align:left"' for n in numeric]
        out = ['<table class="labkit-memory">', f"<caption>{html.escape(self.caption)}</caption>"]
        heads = (f'<th scope="col"{a}>{h}</th>' for h, a in zip(head, align, strict=True))
        out.append("<thead><tr>" + "".join(heads) + "</tr></thead>")

        def tr(row: list[str]) -> str:
            first, *rest = (html.escape(cell) for cell in row)
            cells = (f"<td{a}>{c}</td>" for c, a in zip(rest, align[1:], strict=True))
            return f'<tr><th scope="row"{align[0]}>{first}</th>' + "".join(cells) + "</tr>"

        out.append("<tbody>" + "".join(tr(row) for row in body[:-1]) + "</tbody>")
        note = f'<tr><td colspan="{len(head)}"{align[0]}>{html.escape(self._note())}</td></tr>'
        out.append("<tfoot>" + tr(body[-1]) + note + "</tfoot></table>")
        return "\n".join(out)

    # -- exporting ---------------------------------------------------------------
    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict per tensor; bytes as integers."""
        return [
            {
                "name": r.name,
                "shape": list(r.shape),
                "dtype": r.dtype,
                "bytes": r.bytes,
                "useful_bytes": r.useful_bytes,
                "role": r.role,
            }
            for r in self.rows
        ]

    def to_json(self) -> str:
        """The table as JSON: caption, tensors, total and peak, in bytes."""
        whole = {
            "caption": self.caption,
            "tensors": self.to_dicts(),
            "total_bytes": self.total,
            "peak_bytes": self.peak,
        }
        return json.dumps(whole, ensure_ascii=False, indent=2)

    def to_csv(self) -> str:
        """The table as CSV with a header line; a shape is written ``1x12x2048x2048``."""
        text = io.StringIO()
        rows = self.to_dicts()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "shape": "x".join(map(str, row["shape"]))})
        return text.getvalue()

    def plot(self, ax=None):
        """Bars of the tensors (``labkit.plots.memory_bars``); loads matplotlib."""
        from labkit import plots

        drawing = plots.memory_bars(self)
        return drawing if ax is None else plots.draw(drawing, ax)


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def attention_memory(
    *,
    seq_len: int,
    heads: int = 1,
    batch: int = 1,
    head_dim: int = 64,
    dtype: Any = "float16",
    kv_heads: int | None = None,
    seq_len_k: int | None = None,
    head_dim_v: int | None = None,
    causal: bool = False,
    training: bool = False,
    method: str = "naive",
) -> MemoryTable:
    """Every tensor of one attention problem as a table.

    Parameters
    ----------
    seq_len, seq_len_k : int
        queries and keys per head; ``seq_len_k`` defaults to ``seq_len``.
    heads, kv_heads : int
        query heads and KV heads (defaults to ``heads``).
    batch : int
        sequences.
    head_dim, head_dim_v : int
        columns of Q and K, and of V and O (defaults to ``head_dim``).
    dtype : str
        element type of every tensor but the mask (bool), LSE and delta (float32).
    causal : bool
        adds the mask that eager attention makes.  S and P keep their full size: the hidden
        half is stored too, as −∞ and 0.  ``useful_bytes`` tells what is left visible.
    training : bool
        adds dO, dQ, dK, dV and, for naive, dP and dS.
    method : str
        ``"naive"`` (S and P in memory) or ``"fused"`` (LSE instead, no mask).

    Returns
    -------
    MemoryTable

    Raises
    ------
    ArgumentError
        for a size that is not a positive integer, an unknown dtype or method, or a head
        count that does not divide.

    >>> table = attention_memory(seq_len=4096, head_dim=64, dtype="float16")
    >>> table.bytes_of("Q", "K", "V", "O") // 2**20, table.bytes_of("S", "P") // 2**20
    (2, 64)
    """
    check_choice("method", method, METHODS)
    problem = {
        "seq_len": seq_len, "heads": heads, "batch": batch, "head_dim": head_dim, "dtype": dtype,
        "kv_heads": kv_heads, "seq_len_k": seq_len_k, "head_dim_v": head_dim_v,
    }  # fmt: skip
    sizes = problem_sizes(**problem)
    forward, backward = _TENSORS[method]
    names = [*forward, *(backward if training else ())]
    if causal and method == "naive":
        names.insert(names.index("S"), "mask")
    pairs, visible = sizes["Nq"] * sizes["Nk"], visible_pairs(sizes["Nq"], sizes["Nk"])
    forms = attention_forms()
    rows = []
    for name in names:
        shape, _ = SHAPES[name]
        count = forms[name](**sizes)
        kind = {"mask": "bool", "LSE": "float32", "delta": "float32"}.get(name, dtype_name(dtype))
        square = causal and shape[-2:] == ("Nq", "Nk") and name != "mask"
        useful = count // pairs * visible if square else count
        role = _ROLES[name]
        rows.append(
            MemoryRow(name, tuple(sizes[s] for s in shape), kind, count, useful, role, forms[name])
        )
    inputs = sum(r.bytes for r in rows if r.role == "input" or r.name == "dO")
    peak = inputs + attention_peak(
        **problem,
        causal=causal,
        training=training,
        variant="fused" if method == "fused" else "out_of_place",
    )
    what = "forward and backward" if training else "forward"
    mask = ", causal" if causal else ""
    kv = "" if sizes["Hkv"] == sizes["H"] else f", {sizes['Hkv']} KV heads"
    n = f"{sizes['Nq']}" if sizes["Nq"] == sizes["Nk"] else f"{sizes['Nq']} × {sizes['Nk']}"
    caption = (
        f"{method.capitalize()} attention, {what}{mask}: batch {sizes['B']}, {sizes['H']} heads"
        f"{kv}, seq_len {n}, head_dim {sizes['d']}, {dtype_name(dtype)}"
    )
    return MemoryTable(tuple(rows), caption, causal, peak)


def scores_buffer_bytes(
    seq_len: int,
    *,
    batch: int = 1,
    heads: int = 1,
    dtype: Any = "float32",
    seq_len_k: int | None = None,
    causal: bool = False,
    copies: int = 1,
) -> int:
    """Bytes of one N×N buffer (S), or of ``copies`` of them (2: S and P).

    ``causal=True`` counts the visible pairs only, what a kernel that skips the hidden ones
    would need; eager attention stores the full square whether or not it is masked.

    Raises
    ------
    ArgumentError
        for a size that is not a positive integer or an unknown dtype.

    >>> [scores_buffer_bytes(n) // 2**10 for n in (256, 512, 1024, 2048)]
    [256, 1024, 4096, 16384]
    """
    n_q = check_positive_int("seq_len", seq_len)
    n_k = n_q if seq_len_k is None else check_positive_int("seq_len_k", seq_len_k)
    b, h = check_positive_int("batch", batch), check_positive_int("heads", heads)
    pairs = visible_pairs(n_q, n_k) if causal else n_q * n_k
    return b * h * pairs * itemsize(dtype) * check_positive_int("copies", copies)


def longest_seq_len(
    memory_bytes: float,
    *,
    heads: int = 1,
    batch: int = 1,
    head_dim: int = 64,
    dtype: Any = "float16",
    kv_heads: int | None = None,
    causal: bool = False,
    training: bool = False,
    method: str = "naive",
    counting: str = "tensors",
    device: str = "cpu",
) -> int:
    """The longest self-attention that fits: the exact integer inverse of the table.

    Parameters
    ----------
    memory_bytes : float
        bytes to fit into (``80e9``, or ``12 * 2**30``).
    method : str
        ``"naive"`` or ``"fused"``; with ``counting="peak"`` also any variant of
        ``labkit.memory.VARIANTS`` and ``"checkpointed"``.
    counting : str
        ``"tensors"``: every tensor of :func:`attention_memory` at once; ``"peak"``: what is
        alive at the worst moment, inputs included, by the schedule.
    device : str
        ``"cpu"`` or ``"cuda"``; the peaks of some variants differ.
    heads, batch, head_dim, dtype, kv_heads, causal, training
        as for :func:`attention_memory`.

    Returns
    -------
    int
        the largest N whose bytes are at most ``memory_bytes``.

    Raises
    ------
    LabError
        if not even one token fits.
    ArgumentError
        for bad sizes, an unknown method or counting.

    >>> n = longest_seq_len(2**30, dtype="float16")
    >>> def total(n):
    ...     return attention_memory(seq_len=n, dtype="float16").total
    >>> total(n) <= 2**30 < total(n + 1)
    True
    """
    limit = check_positive_number("memory_bytes", memory_bytes)
    check_choice("counting", counting, ("tensors", "peak"))
    problem: dict[str, Any] = {
        "heads": heads, "batch": batch, "head_dim": head_dim, "dtype": dtype,
        "kv_heads": kv_heads, "causal": causal, "training": training,
    }  # fmt: skip
    if counting == "tensors":
        check_choice("method", method, METHODS)

        def needed(n: int) -> int:
            return attention_memory(seq_len=n, method=method, **problem).total
    else:
        variant = "out_of_place" if method == "naive" else method
        check_choice("method", variant, (*VARIANTS, "fused", "checkpointed"))

        def needed(n: int) -> int:
            return attention_peak(
                seq_len=n, variant=variant, with_inputs=True, device=device, **problem
            )

    if needed(1) > limit:
        raise LabError(
            f"not even seq_len = 1 fits: it needs {format_bytes(needed(1))} of "
            f"{format_bytes(limit)}. Use fewer heads, a smaller batch or a narrower dtype."
        )
    return _largest(lambda n: needed(n) <= limit)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n ≥ 1 with ``fits(n)``, for a predicate that is true up to some n."""
    high = 2
    while fits(high):
        high *= 2
        if high > 2**62:
            raise ArgumentError("memory_bytes", "∞", "is without limit.", "Pass a finite size.")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
