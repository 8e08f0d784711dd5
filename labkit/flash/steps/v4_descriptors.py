r"""Step 4, descriptors: the copy engine fetches whole tiles, and the tiles grow.

A pointer load makes every thread compute addresses and ask for its own 16 bytes.  A *tensor
descriptor* is written once by the host: base, shape, strides, and the shape of a tile.  On Hopper
and later one thread then asks the Tensor Memory Accelerator (TMA) for a tile by its coordinates,

.. math:: K_j = \texttt{k.load}([b, h, j, 0]),

and goes on.  The tile lands in shared memory while the tensor cores work on the one before
(``num_stages`` tiles are under way), without passing through a register.  What lies beyond
the shape reads as 0 and is not written: a ragged N needs no mask on any load or store, only the −∞
in the scores.  Older cards get the same kernel with pointer loads made from the descriptor.

With addresses and masks gone there is room for 128 rows per program: each tile of K and V that
comes from L2 then serves twice as many queries, and wgmma is fed by two warp groups.

Guards against: one descriptor over [B · H · N, d].  Its ragged tail would read the next head's
first rows instead of zeros, and overwrite its O.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from labkit.flash.steps import _host

__all__ = ["forward", "tiles_for"]

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

#: bytes of K and V that run together: well within an L2 of 40 MiB and more
L2_SHARE = 16 * 2**20


@triton.jit
def attend(
    Q, m, ell, acc, k, v, batch, kv_head, rows, N, scale_log2e, first_key, last_key,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The update of step 3, its tiles fetched by coordinates."""
    for first in tl.range(first_key, last_key, BLOCK_N):
        K = k.load([batch, kv_head, first, 0]).reshape(BLOCK_N, HEAD_DIM)
        S = tl.dot(Q, K.T, input_precision="ieee")

        if MASKED:
            keys = first + tl.arange(0, BLOCK_N)
            visible = keys[None, :] < N
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            S = tl.where(visible, S, float("-inf"))

        m_new = tl.maximum(m, tl.max(S, 1) * scale_log2e)
        P = tl.exp2(S * scale_log2e - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        ell = alpha * ell + tl.sum(P, 1)
        V = v.load([batch, kv_head, first, 0]).reshape(BLOCK_N, HEAD_DIM)
        acc = tl.dot(P.to(V.dtype), V, alpha[:, None] * acc, input_precision="ieee")
        m = m_new
    return m, ell, acc


@triton.jit
def forward_kernel(
    q,  # descriptor of [B, H, N, HEAD_DIM], tiles of BLOCK_M rows
    k,  # descriptor of [B, Hkv, N, HEAD_DIM], tiles of BLOCK_N rows
    v,  # descriptor of [B, Hkv, N, HEAD_DIM], tiles of BLOCK_N rows
    o,  # descriptor of [B, H, N, HEAD_DIM], tiles of BLOCK_M rows
    lse,  # [B · H, N] float32
    N,
    batches,
    heads,
    together,  # heads that run together
    scale_log2e,
    GROUP: tl.constexpr,  # query heads that read one KV head
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Which rows of which head: a few heads together, of these the last rows first.
    tiles = tl.cdiv(N, BLOCK_M)
    round_ = tl.program_id(0) // (together * tiles)
    place = tl.program_id(0) % (together * tiles)
    width = min(together, batches * heads - round_ * together)
    batch_head = round_ * together + place % width
    start = (tiles - 1 - place // width) * BLOCK_M

    batch, head = batch_head // heads, batch_head % heads
    rows = start + tl.arange(0, BLOCK_M)
    Q = q.load([batch, head, start, 0]).reshape(BLOCK_M, HEAD_DIM)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    ell = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    if CAUSAL:
        whole = start // BLOCK_N * BLOCK_N  # keys before it are visible to every row
        end = min(N, start + BLOCK_M)  # keys from it on are visible to none
    else:
        whole = N // BLOCK_N * BLOCK_N
        end = N
    m, ell, acc = attend(
        Q, m, ell, acc, k, v, batch, head // GROUP, rows, N, scale_log2e, 0, whole,
        False, CAUSAL, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    m, ell, acc = attend(
        Q, m, ell, acc, k, v, batch, head // GROUP, rows, N, scale_log2e, whole, end,
        True, CAUSAL, HEAD_DIM, BLOCK_N,
    )  # fmt: skip

    out = (acc / ell[:, None]).to(o.dtype)
    o.store([batch, head, start, 0], out.reshape(1, 1, BLOCK_M, HEAD_DIM))
    lse_at = batch_head.to(tl.int64) * N + rows
    tl.store(lse + lse_at, (m + tl.log2(ell)) * LN_2, mask=rows < N)


def tiles_for(head_dim: int, itemsize: int, shared_bytes: int = 227 * 1024) -> dict[str, int]:
    """Tiles, warps and stages that fit a card whose blocks may have ``shared_bytes``.

    Q takes BLOCK_M · d · e bytes, K and V together num_stages · 2 · BLOCK_N · d · e.
    """
    wide = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    small = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    for tiles in (wide, {**wide, "BLOCK_N": 64}, {**wide, "BLOCK_N": 32}, small):
        rows = tiles["BLOCK_M"] + 2 * tiles["num_stages"] * tiles["BLOCK_N"]
        if rows * head_dim * itemsize <= shared_bytes - 8 * 1024:  # and some for barriers
            break
    return tiles


def forward(q, k, v, *, causal: bool = False, scale: float | None = None, tiles=None):
    """O and LSE of attention; parameters, result and errors as in ``v1_correct.forward``."""
    sizes, scale = _host.check(q, k, v, scale)
    if tiles is None:
        room = 227 * 1024
        if q.is_cuda:
            room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
        tiles = tiles_for(sizes.head_dim, q.element_size(), room)
    o, lse = _host.outputs(q)
    heads = sizes.batch * sizes.heads
    of_one_head = 2 * sizes.seq_len_k * sizes.head_dim * k.element_size() / sizes.group
    together = max(1, min(heads, int(L2_SHARE / of_one_head)))
    descriptors = (
        TensorDescriptor.from_tensor(tensor, [1, 1, rows, sizes.head_dim])
        for tensor, rows in (
            (q, tiles["BLOCK_M"]),
            (k, tiles["BLOCK_N"]),
            (v, tiles["BLOCK_N"]),
            (o, tiles["BLOCK_M"]),
        )
    )
    grid = (triton.cdiv(sizes.seq_len_q, tiles["BLOCK_M"]) * heads,)
    forward_kernel[grid](
        *descriptors, lse, sizes.seq_len_q, sizes.batch, sizes.heads, together, scale * LOG2_E,
        GROUP=sizes.group, CAUSAL=causal, HEAD_DIM=sizes.head_dim, **tiles,
    )  # fmt: skip
    return o, lse
