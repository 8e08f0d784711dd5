r"""Which blocks to read: importance and the best blocks in one kernel.

The forward pass over the compressed keys left LSE, so a second pass can make any probability
again and add it up where it is needed:

.. math::
    p_{hc} &= e^{\,\mathrm{scale}\; q_h \cdot k_c - \mathrm{LSE}_h} \\
    I_j    &= \sum_{h \in \text{group}} \; \sum_c p_{hc}\,
              \frac{|\,[cd, cd + l) \cap [jl', (j + 1) l')\,|}{d}

A program owns a few tokens with all heads of their group (``compression.py`` says why), walks
along the selection blocks in tiles, and keeps the best ``count`` of each token in registers.
Neither p nor I is ever in memory: for 65536 tokens and 64 heads p would be 16 GiB in float32.

**One number to sort by.**  The bits of a non-negative float32, read as an integer, ascend with its
value.  With the block's number beside them they are a key,

.. math:: \text{score bits} \cdot 2^{32} + (2^{31} - 1 - j) ,

so no second array has to be carried along, all keys differ, and the lower block wins a tie.
Forced blocks get scores above every sum of probabilities, the own block the highest.

Sorting the blocks of a tile is most of the work after the product, and 64-bit integers double it.
In half precision the number within the tile takes the place of the last six of 23 bits of the
score: scores that differ by less than 2⁻¹⁷ of their size may count as equal.  The inputs were
rounded to 2⁻¹¹ or 2⁻⁸ of theirs.  In float32 nothing is left out.

**Merging.**  The kept keys and the best of a tile are sorted, one list turned round: the larger of
each pair are the best of both, and one bitonic merge sorts them again.  A tile without any score
above a token's worst kept one is passed over.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from labkit.flash.backward import _probabilities, _row_lse
from labkit.flash.launch import LOG2E, Launcher, _On
from labkit.flash.tiles import load_tile
from labkit.flash.tuning import Config
from labkit.kernels.runtime import backend
from labkit.nsa.call import Call
from labkit.nsa.compression import (
    by_keys,
    config_for,
    is_wide,
    load_rows,
    plan_key,
    rows_of,
    run,
    sequence_of,
    tile_constants,
    visible,
)

__all__ = ["select"]

#: above the bits of every score, which are cut at 10¹⁰; forced blocks count up from here
_FORCED = tl.constexpr(0x60000000)
_LOWEST = tl.constexpr(-(2**62))
_LAST = tl.constexpr(2**31 - 1)


def overlapping(length: int, stride: int, block_size: int) -> int:
    """How many compressed keys can have tokens in common with one selection block."""
    reach = block_size + length
    # Where starts fall on the same places in every block, both ends of the reach are outside.
    even = block_size % stride == 0 and length % stride == 0
    return reach // stride - 1 if even else -(-reach // stride)


# -- sorting --------------------------------------------------------------------------------------


@triton.jit
def _exchange(x, at, level: tl.constexpr, step: tl.constexpr):
    """One step of Batcher's network, descending, by gathering: what the interpreter does fast."""
    distance: tl.constexpr = 2 ** (level - 1 - step)
    other = tl.gather(x, at ^ distance, 1)
    keep_large = ((at & distance) == 0) == ((at & (2**level)) == 0)
    return tl.where(keep_large, tl.maximum(x, other), tl.minimum(x, other))


@triton.jit
def _best(x, LOG: tl.constexpr, COUNT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The ``COUNT`` largest of each row, descending; ``x`` ``[tokens, 2^LOG]``, 2^LOG ≥ COUNT."""
    if INTERPRETED:
        at = tl.broadcast_to(tl.arange(0, 2**LOG)[None, :], x.shape[0], 2**LOG)
        for level in tl.static_range(1, LOG + 1):
            for step in tl.static_range(level):
                x = _exchange(x, at, level, step)
        first = tl.broadcast_to(tl.arange(0, COUNT)[None, :], x.shape[0], COUNT)
        x = tl.gather(x, first, 1)
    else:
        x = tl.topk(x, COUNT)
    return x


@triton.jit
def _merge(x, y, LOG: tl.constexpr, COUNT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The ``COUNT`` largest of two descending lists of as many, descending."""
    if INTERPRETED:
        at = tl.broadcast_to(tl.arange(0, COUNT)[None, :], x.shape[0], COUNT)
        x = tl.maximum(x, tl.gather(y, COUNT - 1 - at, 1))
        for step in tl.static_range(LOG):
            x = _exchange(x, at, LOG, step)
    else:
        x = tl.bitonic_merge(tl.maximum(x, tl.flip(y, 1)), descending=True)
    return x


@triton.jit
def _spread(x, WIDTH: tl.constexpr, TOKENS: tl.constexpr, INTERPRETED: tl.constexpr):
    """x itself, but each element held by one thread.

    A sum over rows of a product leaves its result with every thread that had a part in it: eight
    threads would sort the same list.  Triton gives a gather a layout of its own, without copies.
    """
    if not INTERPRETED:
        x = tl.gather(x, tl.broadcast_to(tl.arange(0, WIDTH)[None, :], TOKENS, WIDTH), 1)
    return x


# -- the kernel -----------------------------------------------------------------------------------


@triton.jit
def _seen_probabilities(
    Q, K, base, sees, which, c, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr
):
    """Pᵀ ``[keys, rows]`` of the compressed keys ``which`` ``[keys]``; 0 for those not seen."""
    st = tl.dot(K, Q.T, input_precision=PRECISION)
    pt = _probabilities(st, base[None, :], c, scale, Q.dtype == tl.float32)
    if MASKED:
        seen = (which[:, None] < sees[None, :]) & (which >= 0)[:, None]
        pt = tl.where(seen, pt, 0.0)
    return pt


@triton.jit
def _importance(
    Q, k, base, sees, place, head, start_c, first, k_offset, C, c, scale, stride_kn, stride_kd,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    REACH: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """I ``[tokens, blocks]`` of the selection blocks from ``first``, summed over their heads.

    Keys are the rows of the product: the heads of a token then lie in few threads, and most of
    their sum needs no exchange.
    """
    j = first + tl.arange(0, BLOCK_N)
    if REACH == 1 and LENGTH == BLOCK and STRIDE == BLOCK:  # block j is compressed key j
        K = load_tile(
            k, place, head, (start_c + first).to(tl.int32) if DESCRIPTOR else first, C,
            k_offset, stride_kn, stride_kd, BLOCK_N, D, BLOCK_D, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        pt = _seen_probabilities(Q, K, base, sees, j, c, scale, PRECISION, MASKED)
    else:
        pt = tl.zeros([BLOCK_N, TOKENS * HEADS], tl.float32)
        # The first compressed key with a token in block j; negative for the blocks at the start.
        lowest = (j * BLOCK - LENGTH + STRIDE * (LENGTH // STRIDE + 1)) // STRIDE
        lowest = lowest + (1 - (LENGTH // STRIDE + 1))
        column = tl.arange(0, BLOCK_D)
        across = column
        if WIDE:
            across = column.to(tl.int64)
        for o in range(REACH):
            which = lowest + o
            at = which.to(tl.int64) if WIDE else which
            at = k + k_offset + (at[:, None] * stride_kn + across[None, :] * stride_kd)
            inside = ((which >= 0) & (which < C))[:, None] & (column < D)[None, :]
            K = tl.load(at, inside, 0.0)
            start = which * STRIDE
            common = tl.minimum(start + LENGTH, (j + 1) * BLOCK) - tl.maximum(start, j * BLOCK)
            weight = tl.maximum(common, 0).to(tl.float32) / STRIDE
            pt += weight[:, None] * _seen_probabilities(
                Q, K, base, sees, which, c, scale, PRECISION, True
            )
    return tl.trans(tl.sum(tl.reshape(pt, [BLOCK_N, TOKENS, HEADS]), 2))


@triton.jit
def _take(
    best, worst, Q, k, base, sees, own, place, head, start_c, k_offset, C, c, scale,
    initial, local, lo, hi, stride_kn, stride_kd,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    REACH: tl.constexpr, COUNT: tl.constexpr, LOG_N: tl.constexpr, LOG_COUNT: tl.constexpr,
    INTERPRETED: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the selection blocks ``lo … hi`` into the best of each token."""
    EXACT: tl.constexpr = Q.dtype == tl.float32
    for first in tl.range(lo, hi, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        score = _importance(
            Q, k, base, sees, place, head, start_c, first, k_offset, C, c, scale,
            stride_kn, stride_kd, TOKENS, HEADS, D, BLOCK_D, BLOCK_N, BLOCK, LENGTH, STRIDE, REACH,
            DESCRIPTOR, WIDE, PRECISION, MASKED,
        )  # fmt: skip
        score = _spread(score, BLOCK_N, TOKENS, INTERPRETED)
        # A score that is no number counts as a very high one: it shows.
        bits = tl.where(score < 1e10, score, 1e10).to(tl.int32, bitcast=True)
        within = tl.arange(0, BLOCK_N)
        j = first + within
        back = own[:, None] - j[None, :]
        bits = tl.where((j < initial)[None, :], (initial - j)[None, :] * BLOCK_N + _FORCED, bits)
        bits = tl.where(back < local, (initial + local - back) * BLOCK_N + _FORCED, bits)
        if not EXACT:  # the number within the tile takes the place of the last bits
            bits = (bits >> LOG_N << LOG_N) + (within * -1 + (BLOCK_N - 1))[None, :]
        bits = tl.where(back >= 0, bits, -1)
        if tl.max(tl.max((bits > worst[:, None]).to(tl.int32), 1), 0) > 0:
            if EXACT:
                key = (bits.to(tl.int64) << 32) + (j.to(tl.int64) * -1 + _LAST)[None, :]
                found = _best(key, LOG_N, COUNT, INTERPRETED)
            else:
                found = _best(bits, LOG_N, COUNT, INTERPRETED).to(tl.int64)
                number = found & (BLOCK_N - 1)  # BLOCK_N − 1 − number within the tile
                found = ((found >> LOG_N << LOG_N) << 32) + (number + (_LAST - BLOCK_N + 1 - first))
            best = _merge(best, found, LOG_COUNT, COUNT, INTERPRETED)
            worst = tl.min((best >> 32).to(tl.int32), 1)
            if not EXACT:  # an equal score of a later tile has a higher number
                worst = worst + (BLOCK_N - 1)
    return best, worst


@triton.jit
def select_kernel(
    q, k, lse, out, cu, cu_cmp,
    stride_qb, stride_qn, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_lb, stride_lh, stride_ln, stride_ob, stride_on, stride_oh,
    heads, all_heads, Nq, C, offset, tiles, count, initial, local, c, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, REACH: tl.constexpr, COUNT: tl.constexpr,
    LOG_N: tl.constexpr, LOG_COUNT: tl.constexpr, INTERPRETED: tl.constexpr,
    VARLEN: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best blocks of ``BLOCK_M / HEADS`` tokens of one group."""
    pid = tl.program_id(0)
    tile, bh = tiles - 1 - pid // all_heads, pid % all_heads
    place, head, start, start_c, Nq, C = sequence_of(bh, heads, Nq, C, cu, cu_cmp, VARLEN)
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    first = tile * TOKENS
    if VARLEN:
        beyond = first >= Nq  # there are tiles for the longest sequence
        if beyond:
            return

    # -- Q and LSE: once -------------------------------------------------------------------------
    Q = load_rows(
        q, place, start, head, first, Nq, stride_qb, stride_qn, stride_qh, stride_qd,
        BLOCK_M, HEADS, GROUP, D, BLOCK_D, False, True, True,
    )  # fmt: skip
    token, g = rows_of(first, BLOCK_M, HEADS)
    there = (token < Nq) & (g < GROUP)
    at = lse + tl.cast(place, tl.int64) * stride_lb + (head * GROUP + g).to(tl.int64) * stride_lh
    base = tl.load(at + (start + token).to(tl.int64) * stride_ln, there, float("-inf"))
    base = _row_lse(base, Q.dtype == tl.float32)
    sees = visible(token + offset, C, LENGTH, STRIDE)
    i = first + tl.arange(0, TOKENS)
    own = (i + offset) // BLOCK

    # -- all blocks up to the last token's own ---------------------------------------------------
    k_offset = tl.cast(place, tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    k_offset += tl.cast(start_c, tl.int64) * stride_kn
    hi = (tl.minimum(first + TOKENS, Nq) - 1 + offset) // BLOCK + 1
    full = visible(first + offset, C, LENGTH, STRIDE) // BLOCK_N * BLOCK_N
    if REACH > 1 or LENGTH != BLOCK or STRIDE != BLOCK:
        full = 0  # keys are counted in other units than blocks, and each load has its mask
    best = tl.broadcast_to((tl.arange(0, COUNT).to(tl.int64) + _LOWEST)[None, :], TOKENS, COUNT)
    worst = tl.full([TOKENS], -1, tl.int32)
    best, worst = _take(
        best, worst, Q, k, base, sees, own, place, head, start_c, k_offset, C, c, scale,
        initial, local, 0, full, stride_kn, stride_kd, TOKENS, HEADS, D, BLOCK_D, BLOCK_N,
        BLOCK, LENGTH, STRIDE, REACH, COUNT, LOG_N, LOG_COUNT, INTERPRETED,
        DESCRIPTOR, WIDE, PRECISION, False,
    )  # fmt: skip
    best, worst = _take(
        best, worst, Q, k, base, sees, own, place, head, start_c, k_offset, C, c, scale,
        initial, local, full, hi, stride_kn, stride_kd, TOKENS, HEADS, D, BLOCK_D, BLOCK_N,
        BLOCK, LENGTH, STRIDE, REACH, COUNT, LOG_N, LOG_COUNT, INTERPRETED,
        DESCRIPTOR, WIDE, PRECISION, True,
    )  # fmt: skip

    # -- ascending numbers, then −1 --------------------------------------------------------------
    slot = tl.arange(0, COUNT)
    kept = (best >= 0) & (slot < count)[None, :]
    left = (best & 0x7FFFFFFF).to(tl.int32)  # 2^31 − 1 − number
    # Sorted descending by what is left to the largest number, they ascend.
    number = _best(tl.where(kept, left, -1), LOG_COUNT, COUNT, INTERPRETED)
    number = tl.where(number < 0, -1, number * -1 + _LAST)
    at = out + tl.cast(place, tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    at += (start + i).to(tl.int64)[:, None] * stride_on + slot[None, :]
    tl.store(at, number, mask=(i < Nq)[:, None] & (slot < count)[None, :])


# -- launching ------------------------------------------------------------------------------------


def select(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """The blocks that each query's group reads: ``[B, M, H, count]`` int32, ascending, then −1.

    Parameters
    ----------
    q : ``[B, M, HQ, D]``.
    k_cmp : ``[B, C, H, D]``; with varlen ``[1, ΣC, H, D]``.
    lse : ``[B, HQ, M]`` float32, natural: of the attention to the same compressed keys, and so
        −∞ for a query that sees none of them.
    config : overrules the tile sizes; experiments use it.
    """
    b, m, hq, _ = q.shape
    heads = k_cmp.shape[2]
    out = q.new_empty((b, m, heads, call.count), dtype=torch.int32)
    if out.numel() == 0 or call.max_q == 0:
        return out
    c = config or config_for("topk", q, q.shape[3], call, hq // heads, k_cmp)

    def make(c: Config) -> _Select:
        return _Select(q, k_cmp, lse, out, call, c)

    with _On(q):
        key = ("topk", config, lse.stride(), *plan_key(call, q, k_cmp))
        run(key, make, c, q, k_cmp, lse, out, call.cu, call.cu_cmp)
    return out


class _Select:
    """The kernel with one configuration."""

    def __init__(self, q, k, lse, out, call: Call, c: Config) -> None:
        heads, all_heads = k.shape[2], (call.sequences or q.shape[0]) * k.shape[2]
        count = max(2, triton.next_power_of_2(call.count))
        c = replace(c, block_n=max(c.block_n, count))
        reach = overlapping(call.length, call.stride, call.block_size)
        if reach > 1 or call.length != call.block_size:  # rows with gaps between them
            c = replace(c, descriptors=False)
        constants = tile_constants(call, c, q, k)
        tiles = triton.cdiv(call.max_q, c.block_m // constants["HEADS"])
        self.keys = by_keys(c, k)
        self.launch = Launcher(
            select_kernel, (tiles * all_heads,),
            (*q.stride(), *k.stride(), *lse.stride(), *out.stride()[:3],
             heads, all_heads, call.max_q, min(call.compressed, k.shape[1]),
             0 if call.cu is not None else call.offset, tiles, call.count,
             min(call.initial, call.blocks), min(call.local, call.blocks),
             call.scale * LOG2E, call.scale),
            dict(**constants, BLOCK=call.block_size, REACH=reach, COUNT=count,
                 LOG_N=c.block_n.bit_length() - 1, LOG_COUNT=count.bit_length() - 1,
                 INTERPRETED=backend() == "interpreter", VARLEN=call.cu is not None,
                 DESCRIPTOR=c.descriptors, WIDE=is_wide(c, k), PRECISION=call.precision),
            c,
        )  # fmt: skip

    def __call__(self, q, k, lse, out, cu, cu_cmp) -> None:
        self.launch(q, self.keys(k), lse, out, cu, cu_cmp)
