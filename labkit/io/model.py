r"""The two-level memory model: how many bytes a tiled kernel moves, as exact closed forms.

There is a slow memory that holds everything, and a fast memory of :math:`M_{\text{fast}}`
elements.  Arithmetic is only done on what is in fast memory, and is free.  The cost of an
algorithm is what it moves between the two.  On a GPU, fast memory is what one program has to
itself (registers and shared memory), and slow memory is all the rest.

.. math::
    W_{\text{matmul}} &= MNK\Bigl(\frac{1}{b_m} + \frac{1}{b_n}\Bigr) + MN \\
    W_{\text{naive}} &= 4N^2 + N^2 d\Bigl(\frac{2}{b_m} + \frac{1}{b_n}\Bigr) + Nd \\
    W_{\text{q outer}} &= \frac{2N^2 d}{b_m} + 2Nd + N \\
    W_{\text{kv outer}} &= \frac{N^2(3d + 4)}{b_n} + 2Nd

(elements, where the tiles divide the sizes; the forms below hold for any size, with the number
of tiles as a symbol, and in bytes).  With the largest b that fits, :math:`b \propto
M_{\text{fast}}/d`, the last two are :math:`\Theta(N^2 d^2 / M_{\text{fast}})`, and no exact
algorithm does better while :math:`M_{\text{fast}} \ge d^2` (Saha & Ye, 2024).

Symbols: B H Hkv Nq Nk d dv e as in ``labkit.memory.forms``; Tq = ⌈Nq/b_m⌉ and Tk = ⌈Nk/b_n⌉ tiles.

Imports: closed_form, dtypes, errors, hardware.  Neither torch nor Triton.
Taught in chapter 06 (how few bytes could it take?).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labkit.closed_form import Form, symbols
from labkit.dtypes import itemsize
from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.hardware import Card, card

__all__ = [
    "ORDERS",
    "TileLimits",
    "attention_traffic",
    "compulsory_elements",
    "flash_backward_traffic",
    "kv_rereads",
    "largest_block_m",
    "law",
    "matmul_lower_bound",
    "matmul_traffic",
    "tile_elements",
    "tile_for_card",
    "tiles_of",
    "total_bytes",
]

#: the algorithms with a closed form; those but ``naive`` are ``labkit.kernels.tiled_attention``'s
ORDERS = ("naive", "two_pass", "kv_outer", "q_outer")

Traffic = Mapping[tuple[str, str], Form]

_B, _H, _HKV, _NQ, _NK, _D, _DV, _E, _TQ, _TK = symbols("B H Hkv Nq Nk d dv e Tq Tk")
_M, _N, _K, _BM, _BN, _TM, _TN = symbols("M N K bm bn Tm Tn")
_ROW = Form(4)  # the maximum, the sum and the LSE of a row are float32 whatever e is


def total_bytes(traffic: Traffic, **sizes: int) -> int:
    """Bytes of all loads and stores together, at these sizes."""
    return sum(form(**sizes) for form in traffic.values())


def tiles_of(
    *,
    seq_len: int,
    head_dim: int,
    block_m: int,
    block_n: int,
    seq_len_k: int | None = None,
    head_dim_v: int | None = None,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    dtype: Any = "float32",
) -> dict[str, int]:
    """Checked sizes under the symbols of the forms, tiles counted.

    >>> sizes = tiles_of(seq_len=1000, head_dim=64, block_m=128, block_n=32)
    >>> sizes["Tq"], sizes["Tk"]
    (8, 32)
    """
    n_q = check_positive_int("seq_len", seq_len)
    n_k = n_q if seq_len_k is None else check_positive_int("seq_len_k", seq_len_k)
    d = check_positive_int("head_dim", head_dim)
    h = check_positive_int("heads", heads)
    return {
        "B": check_positive_int("batch", batch),
        "H": h,
        "Hkv": h if kv_heads is None else check_positive_int("kv_heads", kv_heads),
        "Nq": n_q,
        "Nk": n_k,
        "d": d,
        "dv": d if head_dim_v is None else check_positive_int("head_dim_v", head_dim_v),
        "e": itemsize(dtype),
        "Tq": -(-n_q // check_positive_int("block_m", block_m)),
        "Tk": -(-n_k // check_positive_int("block_n", block_n)),
    }


# -- traffic -----------------------------------------------------------------------------------


def matmul_traffic() -> dict[tuple[str, str], Form]:
    """Bytes that ``labkit.kernels.matmul`` moves, by ``(tensor, "load" or "store")``.

    Symbols: M, N, K of C = AB; bm, bn the tile, Tm = ⌈M/bm⌉ and Tn = ⌈N/bn⌉; e bytes per
    element.  The kernel wraps rows beyond the end instead of masking them, so it loads whole
    tiles: Tm·bm rows of A and Tn·bn columns of B where the tile does not divide the size.

    >>> sizes = dict(M=256, N=256, K=256, bm=32, bn=32, Tm=8, Tn=8, e=4)
    >>> total_bytes(matmul_traffic(), **sizes) // 4 == 2 * 256**3 // 32 + 256**2
    True
    """
    tiles = _TM * _TN
    return {
        ("a", "load"): tiles * _BM * _K * _E,
        ("b", "load"): tiles * _BN * _K * _E,
        ("c", "store"): _M * _N * _E,
    }


def attention_traffic(order: str) -> dict[tuple[str, str], Form]:
    """Bytes that the kernels of chapter 06 move, by ``(tensor, "load" or "store")``.

    Parameters
    ----------
    order : one of ``ORDERS``: ``"naive"`` is ``labkit.kernels.naive_in_kernels``, the
        others are orders of ``labkit.kernels.tiled_attention``.

    Returns
    -------
    dict
        to be evaluated with :func:`tiles_of`.  ``naive`` keeps S and P apart; ``"m"`` and
        ``"l"`` are the maximum and the sum of each row, which only ``kv_outer`` moves (it also
        sets O, m and l to their first values before it starts: Nq·dv·e + 8·Nq bytes more per
        head, written by another kernel and not counted here).

    Raises
    ------
    ArgumentError
        if the order is unknown.

    >>> flash = attention_traffic("q_outer")
    >>> flash["K", "load"](**tiles_of(seq_len=512, head_dim=64, block_m=64, block_n=64))
    1048576
    """
    check_choice("order", order, ORDERS)
    head = _B * _H
    rows = head * _NQ * _ROW
    Q, K = head * _NQ * _D * _E, head * _NK * _D * _E
    V, O = head * _NK * _DV * _E, head * _NQ * _DV * _E  # noqa: E741
    S = head * _NQ * _NK * _E
    if order == "naive":
        return {
            # scores: every tile of S reads its rows of Q and of K
            ("Q", "load"): _TK * Q,
            ("K", "load"): _TQ * K,
            ("S", "store"): S,
            # softmax: a row at a time
            ("S", "load"): S,
            ("P", "store"): S,
            # output: block_m rows of O see all of V
            ("P", "load"): S,
            ("V", "load"): _TQ * V,
            ("O", "store"): O,
        }
    if order == "kv_outer":
        return {
            ("K", "load"): K,
            ("V", "load"): V,
            ("Q", "load"): _TK * Q,
            ("O", "load"): _TK * O,
            ("O", "store"): _TK * O,
            ("m", "load"): _TK * rows,
            ("m", "store"): _TK * rows,
            ("l", "load"): _TK * rows,
            ("l", "store"): _TK * rows,
        }
    return {
        ("Q", "load"): Q,
        ("K", "load"): _TQ * K * (2 if order == "two_pass" else 1),
        ("V", "load"): _TQ * V,
        ("O", "store"): O,
        ("LSE", "store"): rows,
    }


def flash_backward_traffic() -> dict[tuple[str, str], Form]:
    r"""Bytes that the three backward kernels of ``labkit.flash`` move, without a mask.

    *delta* reads O and dO once.  *dK and dV*: a program holds a tile of keys, and all queries
    go by, with dO, LSE and δ: Tk times.  *dQ*: a program holds a tile of queries, and all keys
    go by: Tq times.  Two passes, because one program cannot own both sums; a kernel that adds
    up dQ atomically would read half and write more.

    Symbols as in :func:`attention_traffic`, and Hkv; Tk counts the tiles of keys of the first
    pass, Tq the tiles of queries of the second.
    """
    heads, kv_heads = _B * _H, _B * _HKV
    row = heads * _NQ * _ROW
    Q, dO = heads * _NQ * _D * _E, heads * _NQ * _DV * _E
    # each query head reads its KV head's rows for itself
    K, V = heads * _NK * _D * _E, heads * _NK * _DV * _E
    K_once, V_once = kv_heads * _NK * _D * _E, kv_heads * _NK * _DV * _E
    return {
        ("O", "load"): dO,
        ("dO", "load"): dO + _TK * dO + dO,
        ("delta", "store"): row,
        ("K", "load"): K_once + _TQ * K,
        ("V", "load"): V_once + _TQ * V,
        ("Q", "load"): _TK * Q + Q,
        ("LSE", "load"): _TK * row + row,
        ("delta", "load"): _TK * row + row,
        ("dK", "store"): K_once,
        ("dV", "store"): V_once,
        ("dQ", "store"): Q,
    }


def kv_rereads(order: str = "q_outer") -> Form:
    """Bytes of the loads that grow as the square of the length: the part that tiles decide."""
    moved = attention_traffic(order)
    if order == "kv_outer":
        return sum((f for (t, _), f in moved.items() if t not in "KV"), Form(0))
    return moved["K", "load"] + moved["V", "load"]


def compulsory_elements(seq_len: int, head_dim: int) -> int:
    """4Nd: read Q, K and V once, write O once.  No algorithm moves fewer."""
    return 4 * check_positive_int("seq_len", seq_len) * check_positive_int("head_dim", head_dim)


def matmul_lower_bound(m: int, n: int, k: int, fast: int) -> float:
    r"""Elements that any order of the :math:`mnk` products must move, to leading order.

    :math:`2mnk/\sqrt{M_{\text{fast}}}` (Smith et al., 2019, after Hong & Kung, 1981; the exact
    statement subtracts a multiple of :math:`M_{\text{fast}}`), but at least what must be read
    and written once.
    """
    m, n, k = (check_positive_int(a, v) for a, v in (("m", m), ("n", n), ("k", k)))
    products = 2 * m * n * k / math.sqrt(check_positive_int("fast", fast))
    return max(products, m * k + k * n + m * n)


def law(seq_len: int, head_dim: int, fast: int) -> float:
    r"""What exact attention must move, up to a constant factor, in elements.

    :math:`Nd + N^2 d^2/M_{\text{fast}}` for :math:`M_{\text{fast}} \ge d^2`, where tiles of
    whole rows are best, and :math:`Nd + N^2 d/\sqrt{M_{\text{fast}}}` below, where tiles of
    parts of rows are better (Saha & Ye, 2024).  The two meet at
    :math:`d^2`.
    """
    n, d = check_positive_int("seq_len", seq_len), check_positive_int("head_dim", head_dim)
    fast = check_positive_int("fast", fast)
    squares = n * n * d * d / fast if fast >= d * d else n * n * d / math.sqrt(fast)
    return n * d + squares


# -- tiles -------------------------------------------------------------------------------------


def tile_elements(
    block_m: int, block_n: int, head_dim: int, head_dim_v: int | None = None, *, stages: int = 1
) -> int:
    """Elements that must be in fast memory at once: tiles of Q, K, V, S and O, and m and l.

    Parameters
    ----------
    stages : copies of the tiles of K and V: while one is used the next arrive.

    >>> tile_elements(64, 64, 64)
    20608
    """
    bm, bn = check_positive_int("block_m", block_m), check_positive_int("block_n", block_n)
    d = check_positive_int("head_dim", head_dim)
    dv = d if head_dim_v is None else check_positive_int("head_dim_v", head_dim_v)
    stages = check_positive_int("stages", stages)
    # P overwrites S; the maximum and the sum are one element per row each.
    return bm * (d + dv) + stages * bn * (d + dv) + bm * bn + 2 * bm


def largest_block_m(
    fast: int, head_dim: int, *, block_n: int = 16, head_dim_v: int | None = None
) -> int:
    """The largest power of two for which the tiles fit into ``fast`` elements.

    Raises
    ------
    ArgumentError
        if not even one row fits.

    >>> [largest_block_m(2**15, d) for d in (32, 64, 128)]
    [256, 128, 64]
    """
    fast = check_positive_int("fast", fast)
    block_m = 1
    if tile_elements(block_m, block_n, head_dim, head_dim_v) > fast:
        needed = tile_elements(block_m, block_n, head_dim, head_dim_v)
        raise ArgumentError(
            "fast", fast, f"holds no tile: one row needs {needed} elements.", "Pass more."
        )
    while tile_elements(2 * block_m, block_n, head_dim, head_dim_v) <= fast:
        block_m *= 2
    return block_m


@dataclass(frozen=True)
class TileLimits:
    """The rows of Q that one program can hold on a card, and which memory says so.

    Attributes
    ----------
    card : name of the card.
    by_shared : most rows that shared memory allows: Q and ``stages`` tiles of K and V, in dtype.
    by_registers : most rows that the register file allows: O, S, m and l in float32.
    block_m : the largest power of two within both; 0 if there is none.
    """

    card: str
    by_shared: int
    by_registers: int
    block_m: int

    @property
    def limited_by(self) -> str:
        """``"shared memory"`` or ``"registers"``: the tighter of the two."""
        return "shared memory" if self.by_shared < self.by_registers else "registers"


def tile_for_card(
    which: str | Card,
    *,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: Any = "float16",
    block_n: int = 64,
    stages: int = 2,
) -> TileLimits:
    """The largest tile that one program can hold on a card: an upper bound, from sizes alone.

    A fused kernel keeps what it loads (Q, K, V) in shared memory and what it computes (S, O, m,
    l, in float32) in registers.  The program is given the SM's whole register file and all the
    shared memory that one block may ask for; registers for addresses, and a second program on
    the SM, come off this.

    Raises
    ------
    ArgumentError
        if the card is unknown or a size is no positive integer.

    >>> tile_for_card("h200", head_dim=128).block_m
    256
    """
    which = card(which)
    e = itemsize(dtype)
    d = check_positive_int("head_dim", head_dim)
    dv = d if head_dim_v is None else check_positive_int("head_dim_v", head_dim_v)
    bn, stages = check_positive_int("block_n", block_n), check_positive_int("stages", stages)
    left = which.smem_per_block - stages * bn * (d + dv) * e
    by_shared = max(0, left // (d * e))
    by_registers = which.registers_per_sm // (4 * (dv + bn + 2))
    both = min(by_shared, by_registers)
    block_m = 1 << (both.bit_length() - 1) if both else 0
    return TileLimits(which.name, by_shared, by_registers, block_m)
