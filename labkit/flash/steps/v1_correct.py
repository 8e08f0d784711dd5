r"""Step 1, correct: the online softmax of chapter 07, one program per block of queries.

For one block of queries and the blocks :math:`K_j, V_j` one after the other:

.. math::
    S_j &= \mathrm{scale} \cdot Q K_j^\top, \quad -\infty \text{ where hidden} \\
    m'  &= \max(m, \operatorname{rowmax} S_j) \\
    P_j &= e^{S_j - m'}, \qquad \alpha = e^{m - m'} \\
    \ell &\leftarrow \alpha \ell + \operatorname{rowsum} P_j \\
    O   &\leftarrow \alpha O + P_j V_j, \qquad m \leftarrow m'

and at the end :math:`O / \ell` and :math:`\mathrm{LSE} = m + \ln \ell`.  S and P exist one
block at a time, in registers.

Nothing is done for speed: the scale is multiplied into each score, the exponential is the
natural one, every block of keys is read and masked, also those that a causal mask hides whole.

Guards against: keys past the end of a ragged block.  Their loads give 0, and a score of 0 is
a score like any other; only −∞ keeps them out of the sum.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

import triton
import triton.language as tl

from labkit.flash.steps import _host

__all__ = ["TILES", "forward"]

#: rows of Q and of K that a program holds, warps that share them, loads under way
TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def forward_kernel(
    q,  # [B · H, N, HEAD_DIM]
    k,  # [B · Hkv, N, HEAD_DIM]
    v,  # [B · Hkv, N, HEAD_DIM]
    o,  # [B · H, N, HEAD_DIM]
    lse,  # [B · H, N] float32
    N,
    scale,
    GROUP: tl.constexpr,  # query heads that read one KV head
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Which rows of which head; batch and head are one number, so are batch and KV head.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)  # an offset in elements may pass 2³¹
    kv_head = head // GROUP
    k += kv_head * N * HEAD_DIM
    v += kv_head * N * HEAD_DIM
    columns = tl.arange(0, HEAD_DIM)[None, :]

    at = head * N * HEAD_DIM + rows[:, None] * HEAD_DIM + columns
    Q = tl.load(q + at, mask=rows[:, None] < N, other=0.0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    ell = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    for first in range(0, N, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        kv_at = keys[:, None] * HEAD_DIM + columns
        inside = keys[:, None] < N
        K = tl.load(k + kv_at, mask=inside, other=0.0)
        S = tl.dot(Q, K.T, input_precision="ieee") * scale

        visible = keys[None, :] < N
        if CAUSAL:
            visible = visible & (keys[None, :] <= rows[:, None])
        S = tl.where(visible, S, float("-inf"))

        m_new = tl.maximum(m, tl.max(S, 1))
        P = tl.exp(S - m_new[:, None])
        alpha = tl.exp(m - m_new)
        ell = alpha * ell + tl.sum(P, 1)
        V = tl.load(v + kv_at, mask=inside, other=0.0)
        acc = tl.dot(P.to(V.dtype), V, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    tl.store(o + at, acc / ell[:, None], mask=rows[:, None] < N)
    tl.store(lse + head * N + rows, m + tl.log(ell), mask=rows < N)


def forward(q, k, v, *, causal: bool = False, scale: float | None = None, tiles=None):
    """O and LSE of attention.

    Parameters
    ----------
    q, k, v : [B, H, N, d] and twice [B, Hkv, N, d]; see ``steps._host.check``.
    causal : query i sees keys 0 … i.
    scale : multiplies Q Kᵀ; None means 1/√d.
    tiles : instead of :data:`TILES`, to try others.

    Returns
    -------
    tuple of torch.Tensor
        O [B, H, N, d] in q's dtype and LSE [B, H, N] in float32.

    Raises
    ------
    ArgumentError, NoGpuError
        before anything is launched.
    """
    sizes, scale = _host.check(q, k, v, scale)
    tiles = TILES if tiles is None else tiles
    o, lse = _host.outputs(q)
    grid = (triton.cdiv(sizes.seq_len_q, tiles["BLOCK_M"]), sizes.batch * sizes.heads)
    forward_kernel[grid](
        q, k, v, o, lse, sizes.seq_len_q, scale,
        GROUP=sizes.group, CAUSAL=causal, HEAD_DIM=sizes.head_dim, **tiles,
    )  # fmt: skip
    return o, lse
