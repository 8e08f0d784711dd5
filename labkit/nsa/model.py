r"""How many operations and bytes each branch of Native Sparse Attention costs, without running it.

A query at position :math:`t` sees, of ``seq_len`` :math:`T` keys,

.. math::
    n_{\text{dense}} &= t + 1 \\
    n_{\text{cmp}} &= \max\Bigl(0, \Bigl\lfloor \tfrac{t + 1 - l}{d} \Bigr\rfloor + 1\Bigr) \\
    n_{\text{slc}} &= (s - 1)\, l' + (t \bmod l') + 1,
        \quad s = \min\bigl(S, \lfloor t / l' \rfloor + 1\bigr) \\
    n_{\text{win}} &= \min(W, t + 1)

with compressed keys of :math:`l` tokens, one every :math:`d`, selection blocks of :math:`l'`
tokens, :math:`S` of them, and a window of :math:`W`.  Everything below is a sum of these over
the queries (exact, in closed form), times what one pair of a query and a key costs; or a sum over
*tiles* of queries that share what they load.

Operations count a multiply-add as two.  Bytes are those that the kernels ask of the L2 cache
unless a function says otherwise; whole blocks are loaded, whatever the mask drops.

Symbols: B batch, HQ and H heads of queries and of keys, G = HQ / H, D and V head_dim of keys and
of values, e bytes per element.

Imports: dtypes, errors.  Neither torch nor Triton.
Taught in chapters 12 (what it costs) and 13 (when is sparse faster).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields

from labkit.dtypes import dtype_name, itemsize
from labkit.errors import ArgumentError, check_choice, check_positive_int

__all__ = [
    "BRANCHES",
    "PATTERNS",
    "Shape",
    "by_keys_bytes",
    "by_queries_bytes",
    "claimed_flops",
    "compression_bytes",
    "dense_bytes",
    "executed_over_useful",
    "expected_union",
    "extra_bytes",
    "flops",
    "forced_blocks",
    "gates_bytes",
    "keys_read",
    "naive_flops",
    "once_bytes",
    "pairs",
    "query_costs",
    "slots",
    "topk_bytes",
    "union_blocks",
    "window_bytes",
]

#: what one call consists of
BRANCHES = ("compression", "top-k", "selection", "window", "gates")

#: how alike neighbouring queries choose: width of the noise that each query adds to a preference
#: of its group of 32 (uniform between 0 and 1); None: no common preference at all
PATTERNS: dict[str, float | None] = {"random": None, "local": 0.06}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one call; the defaults are the paper's head layout and blocks.

    Attributes
    ----------
    seq_len, batch, heads, kv_heads, head_dim, head_dim_v : T, B, HQ, H, D, V (V = D if None).
    block_size, count : l′ and S; ``initial`` first and ``local`` last blocks are among the S.
    length, stride : l and d of the compression; both are block_size if None.
    window : W, 0 for none.
    dtype : of q, k, v and the output.

    Raises
    ------
    ArgumentError
        for a size that cannot be, or no local block: the model needs to know that the block of
        the query itself, which the mask cuts, is chosen.
    """

    seq_len: int
    batch: int = 1
    heads: int = 64
    kv_heads: int = 4
    head_dim: int = 128
    head_dim_v: int | None = None
    block_size: int = 64
    count: int = 16
    window: int = 512
    length: int | None = None
    stride: int | None = None
    initial: int = 1
    local: int = 2
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "dtype":
                object.__setattr__(self, "dtype", dtype_name(value))
            elif field.name in ("window", "initial") and value == 0 and value is not False:
                continue
            elif value is not None:
                check_positive_int(field.name, value)
        if self.heads % self.kv_heads:
            raise ArgumentError(
                "kv_heads", self.kv_heads, f"does not divide heads = {self.heads}.",
                "Pass a divisor.",
            )  # fmt: skip

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def v(self) -> int:
        """V, head_dim of the values."""
        return self.head_dim_v or self.head_dim

    @property
    def e(self) -> int:
        """Bytes per element."""
        return itemsize(self.dtype)

    @property
    def l(self) -> int:  # noqa: E743
        """Tokens of a compressed key."""
        return self.length or self.block_size

    @property
    def d(self) -> int:
        """Tokens from one compressed key to the next."""
        return self.stride or self.l

    @property
    def blocks(self) -> int:
        """Selection blocks, the last one perhaps incomplete."""
        return -(-self.seq_len // self.block_size)

    @property
    def compressed(self) -> int:
        """Compressed keys: complete blocks only."""
        return max(0, (self.seq_len - self.l) // self.d + 1)

    @property
    def key_bytes(self) -> int:
        """(D + V)·e: one key and its value, of one KV head."""
        return (self.head_dim + self.v) * self.e


# -- one query -----------------------------------------------------------------------------


def _position(shape: Shape, position: int) -> int:
    if not 0 <= position < shape.seq_len:
        raise ArgumentError(
            "position", position, f"is no position of {shape.seq_len} tokens.",
            f"Pass 0 to {shape.seq_len - 1}.",
        )  # fmt: skip
    return position


def forced_blocks(shape: Shape, position: int) -> tuple[int, int]:
    """How many of a query's S slots the (first, local) blocks take that everyone reads.

    The local ones come first when there are too few slots or blocks.

    >>> forced_blocks(Shape(seq_len=4096), 4095), forced_blocks(Shape(seq_len=4096), 70)
    ((1, 2), (0, 2))
    """
    there = _position(shape, position) // shape.block_size + 1
    local = min(shape.local, there, shape.count)
    return min(shape.initial, there - local, shape.count - local), local


def keys_read(shape: Shape, position: int) -> dict[str, int]:
    """Keys that the query at ``position`` sees in each branch, and in dense causal attention.

    The four sums of the module's text; ``"slots"`` is s, the blocks it chooses.

    >>> keys_read(Shape(seq_len=32768), 32767)
    {'dense': 32768, 'compression': 512, 'selection': 1024, 'window': 512, 'slots': 16}
    """
    t = _position(shape, position)
    size = shape.block_size
    chosen = min(shape.count, t // size + 1)
    return {
        "dense": t + 1,
        "compression": max(0, (t + 1 - shape.l) // shape.d + 1),
        "selection": (chosen - 1) * size + t % size + 1,
        "window": min(shape.window, t + 1),
        "slots": chosen,
    }


def query_costs(shape: Shape, position: int) -> dict[str, dict[str, int]]:
    r"""Bytes of keys and values, and operations, of one query with all its heads.

    .. math::
        \text{bytes} = n\, H (D + V)\, e \qquad \text{FLOP} = 2\, n\, HQ\, (D + V)

    with the n of :func:`keys_read`; top-k reads the compressed keys again, without values.

    Returns
    -------
    dict
        ``dense``, ``compression``, ``top-k``, ``selection``, ``window`` and ``total`` (the last
        four and compression), each with ``keys``, ``bytes`` and ``flops``.
    """
    seen = keys_read(shape, position)
    out = {}
    for name in ("dense", "compression", "top-k", "selection", "window"):
        n = seen["compression" if name == "top-k" else name]
        width = shape.head_dim + (0 if name == "top-k" else shape.v)
        out[name] = {
            "keys": n,
            "bytes": n * shape.kv_heads * width * shape.e,
            "flops": 2 * n * shape.heads * width,
        }
    parts = [out[name] for name in ("compression", "top-k", "selection", "window")]
    out["total"] = {what: sum(part[what] for part in parts) for what in ("keys", "bytes", "flops")}
    # the second reading of a compressed key is no other key
    out["total"]["keys"] -= out["top-k"]["keys"]
    return out


# -- all queries: pairs and operations --------------------------------------------------------


def slots(shape: Shape) -> int:
    r"""Blocks that all queries of one KV head choose together, :math:`\sum_t s(t)`.

    >>> slots(Shape(seq_len=2048)) / 2048  # 16 but for the first queries
    12.25
    """
    full, rest = divmod(shape.seq_len, shape.block_size)
    return shape.block_size * _sum_min(full, shape.count) + rest * min(shape.count, full + 1)


def _sum_min(n: int, cap: int) -> int:
    """Σ min(i, cap) over i = 1 … n."""
    low = min(n, cap)
    return low * (low + 1) // 2 + (n - low) * cap


def pairs(shape: Shape) -> dict[str, int]:
    r"""Pairs of a query and a key that each branch sees, of one head and batch element.

    .. math::
        P_{\text{dense}} &= T (T + 1) / 2 \\
        P_{\text{cmp}} &= C (T - l + 1) - d\, C (C - 1) / 2,
            \quad C = \lfloor (T - l) / d \rfloor + 1 \\
        P_{\text{slc}} &= \textstyle\sum_t \bigl[(s(t) - 1)\, l' + (t \bmod l') + 1\bigr] \\
        P_{\text{win}} &= W T - W (W - 1) / 2 \quad (W \le T)

    >>> {name: n // 32768 for name, n in pairs(Shape(seq_len=32768)).items()}
    {'dense': 16384, 'compression': 255, 'selection': 977, 'window': 508}
    """
    t, size, c = shape.seq_len, shape.block_size, shape.compressed
    full, rest = divmod(t, size)
    # what a slot loses: every query's own block ends at the query
    cut = full * (size * (size - 1) // 2) + sum(size - 1 - i for i in range(rest))
    w = min(shape.window, t)
    return {
        "dense": t * (t + 1) // 2,
        "compression": c * (t - shape.l + 1) - shape.d * (c * (c - 1) // 2),
        "selection": slots(shape) * size - cut,
        "window": w * t - w * (w - 1) // 2,
    }


def flops(shape: Shape, what: str = "forward") -> dict[str, int]:
    r"""Operations of each branch that no kernel can leave out, and of dense causal attention.

    .. math::
        F_{\text{forward}} = 2\, B\, HQ\, (D + V)\, P
        \qquad
        F_{\text{backward}} = 2\, B\, HQ\, (3D + 2V)\, P

    with P of :func:`pairs`: two products forward (S = QKᵀ, O = PV), five backward (S again,
    dP = dO Vᵀ, dV, dQ, dK).  Top-k computes S of the compressed keys once more, forward only.  The
    gates multiply and add three outputs forward, and backward take three products with dO beside
    three scaled copies of it.

    Parameters
    ----------
    what : ``"forward"``, ``"backward"`` or ``"both"``.

    Returns
    -------
    dict
        each of ``BRANCHES``, ``"total"`` (their sum) and ``"dense"``.

    >>> f = flops(Shape(seq_len=32768))
    >>> round(f["selection"] / 1e12, 2), round(f["dense"] / f["total"], 1)
    (1.05, 8.8)
    """
    check_choice("what", what, ("forward", "backward", "both"))
    d, v, pair = shape.head_dim, shape.v, pairs(shape)
    forward, backward = what != "backward", what != "forward"
    width = (d + v) * forward + (3 * d + 2 * v) * backward
    heads = shape.batch * shape.heads
    out = {name: 2 * heads * width * pair[name] for name in ("compression", "selection", "window")}
    out["top-k"] = 2 * heads * d * pair["compression"] * forward
    out["gates"] = heads * shape.seq_len * v * (6 * forward + 9 * backward)
    out = {name: out[name] for name in BRANCHES}
    return out | {"total": sum(out.values()), "dense": 2 * heads * width * pair["dense"]}


def claimed_flops(
    *, seq_len: int, count: int, block_size: int, heads: int, head_dim: int,
    head_dim_v: int | None = None, window: int = 0,
) -> int:  # fmt: skip
    r"""Claim C26: :math:`T (S l' HQ D + S l' HQ V + W HQ D)`, called FLOPs by source 000.

    Two mistakes: it counts multiply-adds, each of which is two operations, and its window has no
    second product.  :func:`naive_flops` is the count without them.

    >>> claimed_flops(seq_len=2048, count=16, block_size=64, heads=32, head_dim=128) / 1e9
    17.179869184
    """
    v = head_dim_v or head_dim
    return seq_len * heads * (count * block_size * (head_dim + v) + window * head_dim)


def naive_flops(shape: Shape) -> int:
    r"""Operations that a plain gather-and-mask selection and window execute, all slots full.

    .. math::
        2\, B\, T\, HQ\, (D + V) (S l' + W)

    The code of source 000 computes every score of every slot and then masks: nothing is saved
    for queries near the start.  What is useful of it is in :func:`flops`.

    >>> shape = Shape(seq_len=2048, heads=32, kv_heads=8, window=0)
    >>> naive_flops(shape) / 1e9, round(flops(shape)["selection"] / naive_flops(shape), 3)
    (34.359738368, 0.735)
    """
    keys = shape.count * shape.block_size + shape.window
    return 2 * shape.batch * shape.seq_len * shape.heads * (shape.head_dim + shape.v) * keys


# -- what neighbours have in common -----------------------------------------------------------


def expected_union(
    candidates: float, chosen: float, queries: int, spread: float | None = None
) -> float:
    r"""Expected number of different blocks that ``queries`` neighbours choose.

    Each picks ``chosen`` = s of ``candidates`` = n.  With nothing in common,

    .. math::
        u_m = n \bigl(1 - (1 - s/n)^m\bigr).

    With a common preference, uniform in [0, 1], to which each query adds noise, uniform in
    [0, ε] (``spread``), a block above the threshold is everyone's, one more than ε below it is
    nobody's, and in between

    .. math::
        u_m = s + n\, \varepsilon \Bigl(\frac{m}{m + 1} - \frac{1}{2}\Bigr)
        \qquad (s/n \ge \varepsilon/2).

    For smaller s/n the threshold lies above the best preference, only
    :math:`a = \sqrt{2 \varepsilon s / n}` of the band is left, and

    .. math::
        u_m = n \Bigl[a - \varepsilon\, \frac{1 - (1 - a/\varepsilon)^{m + 1}}{m + 1}\Bigr].

    >>> round(expected_union(253, 13, 16), 1), round(expected_union(253, 13, 16, 0.06), 1)
    (144.2, 19.7)
    """
    n, s, m = float(candidates), float(min(chosen, candidates)), queries
    if n <= 0 or s <= 0:
        return 0.0
    if spread is None:
        return n * (1 - (1 - s / n) ** m)
    if s >= n:
        return n
    if s / n >= spread / 2:
        return min(n, s + n * spread * (m / (m + 1) - 0.5))
    band = (2 * spread * s / n) ** 0.5
    outside = 1 - band / spread
    return n * (band - spread * (1 - outside ** (m + 1)) / (m + 1))


def _tiles(shape: Shape, tile: int) -> Counter[tuple[int, int, int]]:
    """Tiles by their first block, their last block, and their queries; most are alike."""
    size, end = shape.block_size, shape.seq_len
    if size % tile == 0:  # no tile crosses a boundary
        found = Counter({(c, c, tile): size // tile for c in range(end // size)})
        starts = range(end // size * size, end, tile)
    else:
        found, starts = Counter(), range(0, end, tile)
    for start in starts:
        last = min(start + tile, end) - 1
        found[start // size, last // size, last - start + 1] += 1
    return found


def union_blocks(shape: Shape, tile: int, pattern: str = "random") -> float:
    r"""Blocks that a kernel loads if ``tile`` neighbouring queries share what they chose.

    .. math::
        U = \sum_{\text{tiles}} \bigl[ f + u_m(n, s) \bigr]

    with f the forced blocks of the tile (the same for every query of a block), and
    :func:`expected_union` for the others.  Of one KV head and batch element; ``tile=1`` gives
    :func:`slots`.

    >>> shape = Shape(seq_len=32768)
    >>> [round(union_blocks(shape, 16, p) / (32768 / 16)) for p in ("random", "local")]
    [130, 22]
    """
    spread = PATTERNS[check_choice("pattern", pattern, PATTERNS)]
    check_positive_int("tile", tile)
    total = 0.0
    for (first, last, queries), tiles in _tiles(shape, tile).items():
        initial, local = forced_blocks(shape, min(shape.seq_len - 1, last * shape.block_size))
        # a tile across a boundary has the local blocks of both sides
        everyone = min(last + 1, initial + local + last - first)
        free = min(shape.count, last + 1) - initial - local
        total += tiles * (everyone + expected_union(last + 1 - everyone, free, queries, spread))
    return total


def executed_over_useful(shape: Shape, queries: int, pattern: str = "random") -> float:
    r"""Scores that a kernel computes for each that counts, if ``queries`` rows share their blocks.

    .. math::
        \frac{m\, l'\, U(m)}{P_{\text{slc}}}

    A row whose query did not choose the block is computed with the others and masked.

    >>> [round(executed_over_useful(Shape(seq_len=32768), m), 2) for m in (1, 4, 16)]
    [1.03, 3.11, 8.48]
    """
    return queries * shape.block_size * union_blocks(shape, queries, pattern) / (
        pairs(shape)["selection"]
    )


# -- bytes of the selected blocks ---------------------------------------------------------------


def once_bytes(shape: Shape, what: str = "forward") -> int:
    r"""What must cross the memory bus at least once, for the selection alone.

    .. math::
        B\,T \bigl[ HQ (D + V)\, e + H (D + V)\, e + 4\,HQ + 4\,H S \bigr]

    (q, o; k, v; the LSE; the indices.)  Backward: q, o, dO, dq; k, v, dk, dv; the LSE; the
    indices.
    """
    check_choice("what", what, ("forward", "backward"))
    times = 1 if what == "forward" else 2
    tokens = shape.batch * shape.seq_len
    tensors = times * (shape.heads + shape.kv_heads) * shape.key_bytes
    return tokens * (tensors + 4 * shape.heads + 4 * shape.kv_heads * shape.count)


def by_queries_bytes(
    shape: Shape, tile: int = 1, pattern: str = "random", what: str = "forward"
) -> dict[str, float]:
    r"""Bytes through L2 when a program owns ``tile`` queries and walks the blocks they chose.

    .. math::
        \text{kv} = B\,H\, U(\text{tile})\, l' (D + V)\, e

    which for one query a program is :math:`B\,T\,H\,S\,l'(D+V)\,e` but for the first queries:
    the same whatever G is.  ``rows`` is what belongs to the queries: forward q, o, LSE and
    indices; backward (dQ alone) q, dO, dq, LSE, δ and indices.

    >>> round(by_queries_bytes(Shape(seq_len=32768))["kv"] / 1e9, 1)
    67.7
    """
    check_choice("what", what, ("forward", "backward"))
    kv = shape.batch * shape.kv_heads * union_blocks(shape, tile, pattern)
    row = shape.key_bytes + (4 if what == "forward" else shape.head_dim * shape.e + 8)
    rows = shape.heads * row + 4 * shape.kv_heads * shape.count
    return {
        "kv": kv * shape.block_size * shape.key_bytes,
        "rows": float(shape.batch * shape.seq_len * rows),
    }


def by_keys_bytes(
    shape: Shape, what: str = "forward", *, part: int | None = None,
    partial_itemsize: int | None = None,
) -> dict[str, float]:  # fmt: skip
    r"""Bytes through L2 when a program owns a block of keys and walks the queries that chose it.

    .. math::
        \text{rows} &= B\,H\,n\,G\,(D e + V e_p + 4) \\
        \text{merge} &= B\,H\,n\,G\,(V e_p + 4) + B\,T\,HQ\,(V e + 4)

    with :math:`n = \sum_t s(t)`: forward every (query, block) pair loads q and stores a partial
    output of :math:`e_p` bytes an element and its LSE, and a second kernel merges the S partials
    of each query.  Backward every pair loads q, dO, LSE and δ and stores its share of dQ, which a
    second kernel adds up; ``grads`` is dK and dV.  ``kv``: each block is loaded once for every
    ``part`` queries of its list (all if None).

    Per pair this is :math:`G (D + 2V) e` bytes where :func:`by_queries_bytes` has
    :math:`l'(D + V) e`: fewer if :math:`G < \tfrac{2}{3} l'` at D = V.

    >>> shape = Shape(seq_len=32768)
    >>> keys, queries = by_keys_bytes(shape), by_queries_bytes(shape)
    >>> round(sum(keys.values()) / sum(queries.values()), 2)
    0.38
    """
    check_choice("what", what, ("forward", "backward"))
    e, ep = shape.e, partial_itemsize or shape.e
    heads = shape.batch * shape.kv_heads
    each = heads * slots(shape) * shape.group
    # a list is cut into parts; on average half a part of each list is not full
    parts = shape.blocks if part is None else slots(shape) / part + shape.blocks / 2
    kv = heads * max(parts, shape.blocks) * shape.block_size * shape.key_bytes
    index = 4 * heads * slots(shape)
    if what == "backward":
        grads = heads * shape.seq_len * shape.key_bytes
        share = shape.head_dim * ep
        dq = shape.batch * shape.seq_len * shape.heads * shape.head_dim * e
        return {
            "kv": float(kv),
            "rows": float(each * (shape.key_bytes + 8 + share) + index),
            "merge": float(each * share + dq),
            "grads": float(grads),
        }
    outputs = shape.batch * shape.seq_len * shape.heads * (shape.v * e + 4)
    return {
        "kv": float(kv),
        "rows": float(each * (shape.head_dim * e + shape.v * ep + 4) + index),
        "merge": float(each * (shape.v * ep + 4) + outputs),
    }


# -- bytes of the other branches ------------------------------------------------------------------


def _tiles_over(shape: Shape, tile: int, blocks_until: Callable[[int], int]) -> int:
    """Σ over tiles of ``tile`` queries of what its last query sees."""
    return sum(
        blocks_until(min(start + tile, shape.seq_len) - 1)
        for start in range(0, shape.seq_len, tile)
    )


def compression_bytes(shape: Shape, tile: int = 4) -> dict[str, int]:
    r"""Bytes through L2 of pooling and of attention to the compressed keys, forward.

    .. math::
        \text{pool} &= B\,H\,(C\,l + C)(D + V)\,e \\
        \text{kv} &= B\,H \sum_{\text{tiles}} n_{\text{cmp}}(\text{last query})\,(D + V)\,e

    A program owns ``tile`` queries with all heads of the group: tile · G rows.
    """
    heads = shape.batch * shape.kv_heads
    seen = _tiles_over(shape, tile, lambda t: keys_read(shape, t)["compression"])
    return {
        "pool": heads * shape.compressed * (shape.l + 1) * shape.key_bytes,
        "kv": heads * seen * shape.key_bytes,
        "rows": shape.batch * shape.seq_len * shape.heads * (shape.key_bytes + 4),
    }


def topk_bytes(shape: Shape, tile: int = 4, *, fused: bool = True) -> dict[str, int]:
    r"""Bytes through L2 of choosing the blocks.

    .. math::
        \text{fused: } & B\,H \textstyle\sum_{\text{tiles}} n_{\text{cmp}}\,D\,e
            + B\,T\,[HQ (D e + 4) + 4\,H S] \\
        \text{stored: } & \text{the same, and } 8\,B\,H\,T\,C

    Fused, S of the compressed keys is computed again and the best blocks stay in registers.
    Stored, a float32 importance per (query, block) is written and read once by ``torch.topk``:
    the term that grows as T².
    """
    heads = shape.batch * shape.kv_heads
    seen = _tiles_over(shape, tile, lambda t: keys_read(shape, t)["compression"])
    row = shape.heads * (shape.head_dim * shape.e + 4) + 4 * shape.kv_heads * shape.count
    out = {
        "k": heads * seen * shape.head_dim * shape.e,
        "rows": shape.batch * shape.seq_len * row,
    }
    if not fused:
        out["scores"] = 2 * 4 * heads * shape.seq_len * shape.blocks
    return out


def window_bytes(shape: Shape, tile: int = 128) -> dict[str, int]:
    r"""Bytes through L2 of the window, by a kernel whose programs own ``tile`` rows of one head.

    .. math::
        B\,HQ \sum_{\text{tiles}} \min(W + \text{tile} - 1,\; t_{\text{last}} + 1)\,(D + V)\,e
    """
    heads = shape.batch * shape.heads
    if not shape.window:
        return {"kv": 0, "rows": 0}
    reach = shape.window + tile - 1
    seen = _tiles_over(shape, tile, lambda t: min(reach, t + 1))
    return {
        "kv": heads * seen * shape.key_bytes,
        "rows": heads * shape.seq_len * (shape.key_bytes + 4),
    }


def gates_bytes(shape: Shape, branches: int = 3) -> int:
    r"""Bytes of the gated sum: :math:`B\,T\,HQ\,[(n + 1) V + n]\,e` for n branches."""
    row = (branches + 1) * shape.v + branches
    return shape.batch * shape.seq_len * shape.heads * row * shape.e


def dense_bytes(shape: Shape, tile: int = 128) -> dict[str, int]:
    r"""Bytes through L2 of dense causal attention whose programs own ``tile`` rows of one head.

    .. math::
        B\,HQ \sum_{\text{tiles}} (t_{\text{last}} + 1)\,(D + V)\,e
    """
    heads = shape.batch * shape.heads
    return {
        "kv": heads * _tiles_over(shape, tile, lambda t: t + 1) * shape.key_bytes,
        "rows": heads * shape.seq_len * (shape.key_bytes + 4),
    }


# -- memory that a call holds ---------------------------------------------------------------------


def extra_bytes(shape: Shape) -> dict[str, int]:
    r"""Bytes that one call of all branches holds beside its inputs and results.

    .. math::
        \text{kept} = B\,T\,[\,3\,HQ\,V e + 12\,HQ + 4\,H S\,] + B\,C\,H (D + V)\,e

    Three outputs, three LSE, the chosen blocks, the compressed keys and values: a constant number
    per token.  A backward pass keeps all of it, and a forward pass without gradients holds it too
    when the gates add up (but where the selection's kernel adds up itself, on Hopper: one output
    less).  ``"backward"``: three scaled copies of dO and δ, while the pass runs.

    >>> kept = extra_bytes(Shape(seq_len=32768))["kept"]
    >>> kept // 32768, kept // extra_bytes(Shape(seq_len=8192))["kept"]
    (50208, 4)
    """
    tokens = shape.batch * shape.seq_len
    rows = shape.heads * shape.v * shape.e
    small = 12 * shape.heads + 4 * shape.kv_heads * shape.count
    means = shape.batch * shape.compressed * shape.kv_heads * shape.key_bytes
    kept = tokens * (3 * rows + small) + means
    return {"forward": kept, "kept": kept, "backward": tokens * (3 * rows + 4 * shape.heads)}
