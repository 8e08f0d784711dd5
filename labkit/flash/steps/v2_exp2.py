r"""Step 2, exp2: scale and change of base cost one multiply-add per score.

The GPU has an instruction for :math:`2^x` and none for :math:`e^x`; a natural exponential is
:math:`e^x = 2^{x \log_2 e}`, a multiplication more.  Fold it into the scale,
:math:`c = \mathrm{scale} \cdot \log_2 e`, and keep the maximum in base 2 as well:

.. math::
    m'  &= \max(m, c \operatorname{rowmax} Q K_j^\top) \\
    P_j &= 2^{c\, Q K_j^\top - m'}, \qquad \alpha = 2^{m - m'}

:math:`c x - m'` is a single fused multiply-add.  P, :math:`\ell` and O are the same numbers as
before; only :math:`m` is counted in other units, so :math:`\mathrm{LSE} = m \ln 2 + \ln \ell`.

Needs c > 0: the largest score must stay the largest after it is multiplied.

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


@triton.jit
def forward_kernel(
    q,  # [B · H, N, HEAD_DIM]
    k,  # [B · Hkv, N, HEAD_DIM]
    v,  # [B · Hkv, N, HEAD_DIM]
    o,  # [B · H, N, HEAD_DIM]
    lse,  # [B · H, N] float32
    N,
    scale_log2e,
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
        S = tl.dot(Q, K.T, input_precision="ieee")

        visible = keys[None, :] < N
        if CAUSAL:
            visible = visible & (keys[None, :] <= rows[:, None])
        S = tl.where(visible, S, float("-inf"))

        m_new = tl.maximum(m, tl.max(S, 1) * scale_log2e)
        P = tl.exp2(S * scale_log2e - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        ell = alpha * ell + tl.sum(P, 1)
        V = tl.load(v + kv_at, mask=inside, other=0.0)
        acc = tl.dot(P.to(V.dtype), V, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    tl.store(o + at, acc / ell[:, None], mask=rows[:, None] < N)
    tl.store(lse + head * N + rows, (m + tl.log2(ell)) * LN_2, mask=rows < N)


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
        q, k, v, o, lse, sizes.seq_len_q, scale * LOG2_E,
        GROUP=sizes.group, CAUSAL=causal, HEAD_DIM=sizes.head_dim, **tiles,
    )  # fmt: skip
    return o, lse
