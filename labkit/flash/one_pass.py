r"""The backward pass in one pass, with atomic additions: the road not taken, kept to be measured.

A program owns a tile of keys, as in ``backward.py``, and has everything that dQ needs too:

.. math:: dQ_i \mathrel{+}= \mathrm{scale}\; dS_{ij}\, K_j

So five products do, where two passes take seven.  But every program adds to the same dQ, in
float32 in memory, with atomic additions: N·d·4 bytes more for each head, as many additions as
there are tiles of keys, and an order that changes from run to run, so that dQ does, in its last
bits.  dSᵀ stands in registers as the left factor of dK; for dQ it has to be transposed.

``labkit/experiments/flash_backward.py`` times it beside the two passes, both in Triton with
tiles of their own.  It takes what the steps of chapter 08 take: one N that is a multiple of both
tiles, as many KV heads as heads, head_dim a power of two, contiguous tensors.

Taught in chapter 09 (to keep P or to compute it again).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from labkit.errors import ArgumentError
from labkit.flash.backward import _probabilities, _row_lse
from labkit.flash.launch import Described, _as_it_is
from labkit.flash.masking import hide, query_bounds
from labkit.flash.recompute import delta as delta_of
from labkit.flash.steps import _host
from labkit.flash.tiles import head_offset, load_tile, row_vector, store_tile
from labkit.flash.tuning import Config
from labkit.shapes import check_same_shape

__all__ = ["TILES", "one_pass"]

#: queries and keys in a tile, warps, stages
TILES = Config(64, 128, 8, 2)


@triton.jit
def _gather(
    dk, dv, K, V, q, dout, lse, delta, dq, batch, head, offset, l_offset, j, N, c, scale, lo, hi,
    D: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
    DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries ``lo … hi`` contribute to dK and dV, and, in memory, to dQ."""
    EXACT: tl.constexpr = K.dtype == tl.float32
    for first in tl.range(lo, hi, BLOCK_M):
        first = tl.multiple_of(first, BLOCK_M)
        Q = load_tile(q, batch, head, first, N, offset, D, 1, BLOCK_M, D, D, DESCRIPTOR,
                      False, False)  # fmt: skip
        dO = load_tile(dout, batch, head, first, N, offset, D, 1, BLOCK_M, D, D, DESCRIPTOR,
                       False, False)  # fmt: skip
        st = tl.dot(K, Q.T, input_precision=PRECISION)
        if MASKED:
            i = first + tl.arange(0, BLOCK_M)
            st = hide(st, i[None, :], j[:, None], N, N, 0, CAUSAL, False)
        lse_i = _row_lse(row_vector(lse, l_offset, first, N, BLOCK_M, 0.0, False), EXACT)
        pt = _probabilities(st, lse_i[None, :], c, scale, EXACT)
        dv = tl.dot(pt.to(dO.dtype), dO, dv, input_precision=PRECISION)
        dpt = tl.dot(V, dO.T, input_precision=PRECISION)
        delta_i = row_vector(delta, l_offset, first, N, BLOCK_M, 0.0, False)
        dst = (pt * (dpt - delta_i[None, :])).to(Q.dtype)
        dk = tl.dot(dst, Q, dk, input_precision=PRECISION)
        part = tl.dot(dst.T, K, input_precision=PRECISION)  # the fifth product
        row, column = first + tl.arange(0, BLOCK_M), tl.arange(0, D)
        at = dq + offset + row[:, None] * D + column[None, :]
        tl.atomic_add(at, part * scale, sem="relaxed")
    return dk, dv


@triton.jit
def one_pass_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, heads, N, tiles, c, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, and its part of every dQ that sees it."""
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = bh // heads, bh % heads
    offset = head_offset(bh, 0, 0, N * D, 0, 0)
    l_offset = head_offset(bh, 0, 0, N, 0, 0)
    first = tile * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    K = load_tile(k, batch, head, first, N, offset, D, 1, BLOCK_N, D, D, DESCRIPTOR, False, False)
    V = load_tile(v, batch, head, first, N, offset, D, 1, BLOCK_N, D, D, DESCRIPTOR, False, False)
    dk_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D], tl.float32)
    lo, full_lo, _, hi = query_bounds(first, first + BLOCK_N, N, N, 0, BLOCK_M, CAUSAL, False)
    if CAUSAL:
        dk_acc, dv_acc = _gather(
            dk_acc, dv_acc, K, V, q, dout, lse, delta, dq, batch, head, offset, l_offset, j, N, c,
            scale, lo, min(full_lo, hi), D, BLOCK_M, CAUSAL, DESCRIPTOR, PRECISION, True,
        )  # fmt: skip
    dk_acc, dv_acc = _gather(
        dk_acc, dv_acc, K, V, q, dout, lse, delta, dq, batch, head, offset, l_offset, j, N, c,
        scale, full_lo, hi, D, BLOCK_M, CAUSAL, DESCRIPTOR, PRECISION, False,
    )  # fmt: skip
    store_tile(dk, dk_acc * scale, first, N, offset, D, BLOCK_N, D, D, False)
    store_tile(dv, dv_acc, first, N, offset, D, BLOCK_N, D, D, False)


def one_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    delta: torch.Tensor | None = None,
    config: Config = TILES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv with five products and atomic additions; dq differs from run to run by rounding.

    Parameters
    ----------
    q, k, v, out, dout : ``[batch, heads, seq_len, head_dim]``, one shape and dtype, contiguous.
    lse : ``[batch, heads, seq_len]`` float32, contiguous.
    causal, scale : as in the forward pass.
    delta : rowsum(dO ∘ O), like ``lse``; computed here if None.
    config : tiles, warps, stages, and whether tiles come through tensor descriptors.

    Raises
    ------
    ArgumentError
        if seq_len is no multiple of the tiles, or as the steps of chapter 08 do.
    NoGpuError
        if nothing here can run the kernel.
    """
    sizes, scale = _host.check(q, k, v, scale)
    for name, tensor in (("out", out), ("dout", dout), ("k", k)):
        check_same_shape(name, tensor, tuple(q.shape), q)
    n, d = sizes.seq_len_q, sizes.head_dim
    if n % config.block_m or n % config.block_n:
        raise ArgumentError(
            "q.shape", tuple(q.shape), f"has {n} rows, no multiple of {config.block_m} and "
            f"{config.block_n}.", "Use labkit.flash.flash_attention.",
        )  # fmt: skip
    lse, dout = lse.contiguous(), dout.contiguous()
    delta = delta_of(dout, out) if delta is None else delta
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)  # it is added to
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    tiles = n // config.block_n
    inputs = (q, k, v, dout)
    roads = [_as_it_is] * 4
    if config.descriptors:
        rows = (config.block_m, config.block_n, config.block_n, config.block_m)
        roads = [Described(x, r, d) for x, r in zip(inputs, rows, strict=True)]
    one_pass_kernel[(tiles * sizes.batch * sizes.heads,)](
        *(road(x) for road, x in zip(roads, inputs, strict=True)),
        lse, delta, dq, dk, dv, sizes.heads, n, tiles, scale * math.log2(math.e), scale,
        D=d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=causal,
        DESCRIPTOR=config.descriptors, PRECISION="ieee",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq.to(q.dtype), dk, dv
