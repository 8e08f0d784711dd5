r"""Step 3, two stages: no work that a mask throws away, no mask where nothing is hidden.

Three things that a program of the steps before does for nothing:

- Under a causal mask it reads and multiplies blocks of keys that are hidden whole: half of them.
- It asks of each score whether it is visible, also in blocks that are visible whole.  Only the
  block that the end of K cuts, and those that the diagonal cuts, need the question:

  .. code-block:: text

               keys →
      rows     ░░░░░░░░▒▒          ░ stage 1: visible whole, no mask
       ↓       ░░░░░░░░░░▒▒        ▒ stage 2: the diagonal, masked
               ░░░░░░░░░░░░▒▒        not visited

- Programs start in order of their number.  Under a causal mask the last rows take longest; if
  they start last, the other SMs wait for them.  Here they start first.  K and V of a few heads
  fit in L2, so the programs of a few heads run together before the next few.

Guards against: a stage 1 that ends one block too far.  The last key of its last block must be
visible to the *first* row of the program.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from labkit.flash.steps import _host

__all__ = ["TILES", "forward"]

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

#: rows of Q and of K that a program holds, warps that share them, loads under way
TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
#: bytes of K and V that run together: well within an L2 of 40 MiB and more
L2_SHARE = 16 * 2**20


@triton.jit
def attend(
    Q, m, ell, acc, k, v, rows, columns, N, scale_log2e, first_key, last_key,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The update of step 2 for the keys from first_key to last_key."""
    for first in range(first_key, last_key, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        kv_at = keys[:, None] * HEAD_DIM + columns
        inside = keys[:, None] < N
        K = tl.load(k + kv_at, mask=inside, other=0.0) if MASKED else tl.load(k + kv_at)
        S = tl.dot(Q, K.T, input_precision="ieee")

        if MASKED:
            visible = keys[None, :] < N
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            S = tl.where(visible, S, float("-inf"))

        m_new = tl.maximum(m, tl.max(S, 1) * scale_log2e)
        P = tl.exp2(S * scale_log2e - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        ell = alpha * ell + tl.sum(P, 1)
        V = tl.load(v + kv_at, mask=inside, other=0.0) if MASKED else tl.load(v + kv_at)
        acc = tl.dot(P.to(V.dtype), V, alpha[:, None] * acc, input_precision="ieee")
        m = m_new
    return m, ell, acc


@triton.jit
def forward_kernel(
    q,  # [B · H, N, HEAD_DIM]
    k,  # [B · Hkv, N, HEAD_DIM]
    v,  # [B · Hkv, N, HEAD_DIM]
    o,  # [B · H, N, HEAD_DIM]
    lse,  # [B · H, N] float32
    N,
    heads,  # B · H
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
    width = min(together, heads - round_ * together)  # the last round may be narrower
    head = (round_ * together + place % width).to(tl.int64)
    start = (tiles - 1 - place // width) * BLOCK_M

    rows = start + tl.arange(0, BLOCK_M)
    k += head // GROUP * N * HEAD_DIM
    v += head // GROUP * N * HEAD_DIM
    columns = tl.arange(0, HEAD_DIM)[None, :]

    at = head * N * HEAD_DIM + rows[:, None] * HEAD_DIM + columns
    Q = tl.load(q + at, mask=rows[:, None] < N, other=0.0)

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
        Q, m, ell, acc, k, v, rows, columns, N, scale_log2e, 0, whole,
        False, CAUSAL, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    m, ell, acc = attend(
        Q, m, ell, acc, k, v, rows, columns, N, scale_log2e, whole, end,
        True, CAUSAL, HEAD_DIM, BLOCK_N,
    )  # fmt: skip

    tl.store(o + at, acc / ell[:, None], mask=rows[:, None] < N)
    tl.store(lse + head * N + rows, (m + tl.log2(ell)) * LN_2, mask=rows < N)


def forward(q, k, v, *, causal: bool = False, scale: float | None = None, tiles=None):
    """O and LSE of attention; parameters, result and errors as in ``v1_correct.forward``."""
    sizes, scale = _host.check(q, k, v, scale)
    tiles = TILES if tiles is None else tiles
    o, lse = _host.outputs(q)
    heads = sizes.batch * sizes.heads
    of_one_head = 2 * sizes.seq_len_k * sizes.head_dim * k.element_size() / sizes.group
    together = max(1, min(heads, int(L2_SHARE / of_one_head)))
    grid = (triton.cdiv(sizes.seq_len_q, tiles["BLOCK_M"]) * heads,)
    forward_kernel[grid](
        q, k, v, o, lse, sizes.seq_len_q, heads, together, scale * LOG2_E,
        GROUP=sizes.group, CAUSAL=causal, HEAD_DIM=sizes.head_dim, **tiles,
    )  # fmt: skip
    return o, lse
