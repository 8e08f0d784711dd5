"""Exercises of chapter 06 (how few bytes could it take?)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import ExerciseFailed, call, exercise, expect, expect_number

__all__ = ["SlowMemory", "half_the_bytes", "kv_outer", "largest_tile", "matmul", "two_passes"]


def _up(a: int, b: int) -> int:
    return -(-a // b)


@exercise("Traffic of a tiled product")
def matmul(answer: Any) -> str:
    """Grade ``matmul_elements(m, n, k, block_m, block_n)``, elements loaded and stored."""
    for m, n, k, bm, bn in ((64, 64, 64, 16, 16), (64, 128, 32, 16, 64), (100, 70, 33, 32, 64)):
        got = expect_number(call(answer, m, n, k, bm, bn), "The result")
        tm, tn = _up(m, bm), _up(n, bn)
        right = tn * m * k + tm * k * n + m * n
        where = f"for [{m}, {k}] × [{k}, {n}] in tiles of {bm} × {bn} you return {got:,.0f}"
        mistakes = {
            tm * m * k + tn * k * n + m * n: "A is read once for each column of tiles, not row.",
            tn * m * k + tm * k * n: "C is written, too.",
            tn * m * k + tm * k * n + 2 * m * n: "C stays in fast memory until it is written once.",
            m * k + k * n + m * n: "That is each matrix once. Every tile of C reads its own rows.",
            2 * m * n * k + m * n: "That is without tiles: each element of C reads a row and a "
            "column.",
            tm * tn * (bm * k + bn * k) + m * n: "A tile at the edge loads only what is inside.",
            (n // bn) * m * k + (m // bm) * k * n + m * n: "A tile that is cut off is a tile: "
            "round up.",
        }
        if got == right * 4 or got == right * 2:
            raise ExerciseFailed(f"{where}: count elements, not bytes.")
        uncut = n / bn * m * k + m / bm * k * n + m * n
        if got != right and math.isclose(got, uncut):
            raise ExerciseFailed(f"{where}: a tile that is cut off is a tile: round up.")
        hint = mistakes.get(int(got), "Count the tiles of C; each loads a band of A and of B.")
        expect(got == right, f"{where}, which should be {right:,}. {hint}")
    return "each band of A once per column of tiles, each band of B once per row of tiles."


@exercise("The largest tile")
def largest_tile(answer: Any) -> str:
    """Grade ``largest_tile(fast, head_dim, block_n)``: rows of Q, any integer."""
    for fast, d, bn in ((2**15, 64, 16), (2**15, 128, 64), (116_224, 128, 128), (9_000, 40, 24)):
        got = expect_number(call(answer, fast, d, bn), "The result")
        where = f"for {fast:,} elements, head_dim {d} and block_n = {bn} you return {got:,.6g}"
        expect(got == int(got), f"{where}: a number of rows is whole. Round down.")
        rows, free = int(got), fast - 2 * bn * d
        right = free // (2 * d + bn + 2)
        mistakes = {
            free // (2 * d): "The tile of S needs room as well: block_m × block_n.",
            free // (2 * d + bn): "Each row also has a maximum and a sum.",
            free // (d + bn + 2): "O has as many elements as Q and is in fast memory with it.",
            fast // (2 * d + bn + 2): "The tiles of K and V take room first.",
            (fast - bn * d) // (2 * d + bn + 2): "K and V are two tiles.",
            free // (2 * d + 2 * bn + 2): "P overwrites S: one tile for both.",
            _up(free, 2 * d + bn + 2): "Rounded up, it no longer fits.",
        }
        hint = "" if rows == right else mistakes.get(rows, "Add up Q, O, S, K, V and two per row.")
        expect(rows == right, f"{where}, but {right:,} is the largest that fits. {hint}".rstrip())
    return "with more fast memory block_m grows in proportion, with more head_dim it shrinks."


@exercise("The other way round")
def kv_outer(answer: Any) -> str:
    """Grade ``kv_outer_elements(n, head_dim, block_n)``: K and V outside, Q and O inside."""
    for n, d, bn in ((256, 64, 64), (512, 32, 16), (100, 40, 32)):
        got = expect_number(call(answer, n, d, bn), "The result")
        t = _up(n, bn)
        right = 2 * n * d + t * (3 * n * d + 4 * n)
        where = f"for N = {n}, d = {d} and block_n = {bn} you return {got:,.0f}"
        mistakes = {
            2 * n * d + t * (2 * n * d + 4 * n): "O is read and written back.",
            2 * n * d + t * (n * d + 4 * n): "O is read and written back.",
            2 * n * d + t * 3 * n * d: "The maximum and the sum of each row travel with O.",
            2 * n * d + t * (3 * n * d + 2 * n): "The maximum and the sum are read, and written.",
            3 * n * d + 4 * n + t * 2 * n * d: "K and V stay; Q and O go by.",
            2 * n * d * t + t * (3 * n * d + 4 * n): "Each tile of K and V is loaded once.",
            2 * n * d + n // bn * (3 * n * d + 4 * n): "A last tile that is cut off is a tile.",
            3 * n * d + t * (3 * n * d + 4 * n) + 2 * n: "Leave out the zeros that O starts from.",
        }
        hint = mistakes.get(int(got), "For each tile of keys: what is loaded, what is stored?")
        if t != n / bn and math.isclose(got, 2 * n * d + n / bn * (3 * n * d + 4 * n)):
            hint = "A last tile that is cut off is a tile: round up."
        expect(got == right, f"{where}, which should be {right:,}. {hint}")
    return "3Nd + 4N for each tile of keys, where Q outside moves 2Nd for each tile of queries."


@exercise("Half the bytes per element")
def half_the_bytes(answer: Any) -> str:
    """Grade the factor by which the re-read bytes fall when all elements are half as large."""
    got = expect_number(answer, "The answer")
    hints = {
        1.0: "There are fewer bytes for each element to begin with.",
        2.0: "That is from the smaller elements. How many of them fit into fast memory now?",
        8.0: "One factor from the elements, one from the tile. Where is the third?",
        0.25: "By which factor do they fall: bytes before over bytes after.",
        0.5: "By which factor do they fall: bytes before over bytes after.",
    }
    expect(
        got == 4,
        f"you say {got:g}. {hints.get(got, 'Write the law in bytes: two places change.')}",
    )
    return "the law in bytes is e²N²d²/M_bytes: e enters like d."


class SlowMemory:
    """A slow memory that counts: rows of Q, K and V can be loaded, rows of O stored.

    Parameters
    ----------
    q, k, v : ``[seq_len, head_dim]``, float64.
    limit : most rows that may be loaded or stored at once.

    Attributes
    ----------
    seq_len_q, seq_len_k, head_dim : sizes.
    loaded, stored : elements so far.
    out : ``[seq_len_q, head_dim]``, what was stored; NaN where nothing was.
    """

    def __init__(self, q: Any, k: Any, v: Any, limit: int) -> None:
        import torch

        self._tensors = {"Q": q, "K": k, "V": v}
        self.seq_len_q, self.head_dim = q.shape
        self.seq_len_k = k.shape[0]
        self.limit = limit
        self.loaded = self.stored = 0
        self.out = torch.full_like(q, float("nan"))

    def load(self, name: str, first: int, last: int) -> Any:
        """Rows ``first`` to ``last`` (not included) of ``"Q"``, ``"K"`` or ``"V"``."""
        expect(
            name in self._tensors,
            f"load({name!r}, …): slow memory holds Q, K and V. S and P stay in fast memory.",
        )
        rows = self._rows("load", name, first, last, self._tensors[name])
        self.loaded += rows.numel()
        return rows.clone()

    def store(self, first: int, rows: Any) -> None:
        """Write ``rows``, ``[count, head_dim]``, to O from row ``first`` on."""
        place = self._rows("store", "O", first, first + len(rows), self.out)
        expect(
            rows.shape == place.shape, f"store: {list(rows.shape)} is not rows of {self.head_dim}."
        )
        place.copy_(rows)
        self.stored += rows.numel()

    def _rows(self, what: str, name: str, first: int, last: int, tensor: Any) -> Any:
        count = last - first
        expect(
            0 <= first < last <= len(tensor),
            f"{what} rows {first} to {last} of {name}, which has {len(tensor)}. The last tile may "
            "be cut off: min(first + block, N).",
        )
        expect(
            count <= self.limit,
            f"{what} {count} rows of {name} at once; fast memory has room for {self.limit}.",
        )
        return tensor[first:last]


@exercise("Attention in two passes")
def two_passes(answer: Any) -> str:
    """Grade ``attention(slow, block)``, which loads and stores through a :class:`SlowMemory`."""
    import torch

    generator = torch.Generator().manual_seed(6)
    # the last has scores of thousands: an exponential without the maximum overflows
    for nq, nk, d, block, size in ((32, 32, 8, 8, 1), (20, 33, 4, 8, 3), (5, 50, 3, 16, 2000)):
        q, k, v = (
            torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (nq, nk, nk)
        )
        q = size * q
        slow = SlowMemory(q, k, v, block)
        _call_without_result(answer, slow, block)
        where = f"for {nq} queries, {nk} keys and tiles of {block} rows: "
        s = q @ k.T / math.sqrt(d)
        right = torch.softmax(s, -1) @ v
        missing = int(slow.out.isnan().any(-1).sum())
        overflow = slow.stored >= nq * d and missing
        expect(
            not overflow,
            f"{where}{missing} rows of O are NaN. Subtract the largest score of the row first.",
        )
        expect(not missing, f"{where}{missing} rows of O were never stored.")
        hint = "Is the maximum that of the whole row, and the division by the sum at the end?"
        if torch.allclose(slow.out, torch.softmax(q @ k.T, -1) @ v):
            hint = "The scores are divided by √d."
        expect(torch.allclose(slow.out, right, atol=1e-9), f"{where}O is wrong. {hint}")
        tiles = _up(nq, block)
        most = nq * d + tiles * 3 * nk * d
        expect(
            slow.stored == nq * d, f"{where}you store {slow.stored} elements; O has {nq * d}."
        )
        expect(
            slow.loaded <= most,
            f"{where}you load {slow.loaded:,} elements where {most:,} are enough: Q once, and for "
            "each tile of queries K twice and V once.",
        )
    return "K twice, V once, and never a row of S."


def _call_without_result(answer: Any, slow: SlowMemory, block: int) -> None:
    """Call the reader's function, whose result is what it stored."""
    from labkit.exercises import Unanswered

    if not callable(answer):
        raise ExerciseFailed(f"Pass the function itself, not {answer!r}.")
    try:
        answer(slow, block)
    except (NotImplementedError, ExerciseFailed) as error:
        if isinstance(error, ExerciseFailed):
            raise
        raise Unanswered from None
    except Exception as error:
        name = getattr(answer, "__name__", "your function")
        raise ExerciseFailed(f"{name} raised {type(error).__name__}: {error}") from error
    if not slow.loaded and not slow.stored:
        raise Unanswered
