r"""Naive attention as three kernels, one per equation, S and P written to memory in between.

.. math::
    S = \mathrm{scale}\cdot QK^\top, \qquad P = \mathrm{softmax}(S), \qquad O = PV

``labkit.naive`` says the same in PyTorch, whose kernels are closed.  Here the three are Triton
kernels with tiles of a size that you choose, so that ``labkit.io.count`` can see every byte
they move and a profiler can be held against it:

- *scores*: a program makes one block_m × block_n tile of S from block_m rows of Q and block_n
  rows of K.
- *softmax*: a program takes whole rows of S: a row must fit into fast memory.
- *output*: a program makes block_m rows of O and walks along them in steps of block_n keys.

The mistakes to guard against: a tile that reaches past the last key must be masked to −∞
before the softmax, not to 0, and the addresses of S need 64 bits, since S has N² elements.

Shapes ``[batch, heads, seq_len, head_dim]``; float16, bfloat16 (GPU only) or float32.
Taught in chapter 06 (how few bytes could it take?).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from labkit.errors import ArgumentError, check_positive_int
from labkit.kernels.runtime import check_can_launch
from labkit.shapes import Sizes, check_qkv, check_scale

__all__ = ["check_teaching_case", "naive_in_kernels"]

_DTYPES = ("float16", "bfloat16", "float32")


@triton.jit
def scores_kernel(
    q,
    k,
    s,
    scale,
    n_q,
    n_k,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Which tile of S, of which head: q, k and s are contiguous, heads one after the other.
    head = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_D)

    q_tile = q + head * n_q * D + m[:, None] * D + c[None, :]
    k_tile = k + head * n_k * D + n[None, :] * D + c[:, None]  # read as Kᵀ
    Q = tl.load(q_tile, mask=(m[:, None] < n_q) & (c[None, :] < D), other=0.0)
    K = tl.load(k_tile, mask=(n[None, :] < n_k) & (c[:, None] < D), other=0.0)
    S = tl.dot(Q, K, input_precision="ieee") * scale

    s_tile = s + (head * n_q + m[:, None]) * n_k + n[None, :]
    tl.store(s_tile, S.to(s.dtype.element_ty), mask=(m[:, None] < n_q) & (n[None, :] < n_k))


@triton.jit
def softmax_kernel(s, p, rows, n_k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Whole rows: the maximum of a row is known before its first exponential.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    tile = row[:, None] * n_k + n[None, :]
    inside = (row[:, None] < rows) & (n[None, :] < n_k)
    S = tl.load(s + tile, mask=inside, other=0.0).to(tl.float32)
    S = tl.where(n[None, :] < n_k, S, float("-inf"))
    P = tl.exp(S - tl.max(S, 1)[:, None])
    P = P / tl.sum(P, 1)[:, None]
    tl.store(p + tile, P.to(p.dtype.element_ty), mask=inside)


@triton.jit
def output_kernel(
    p,
    v,
    o,
    n_q,
    n_k,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_D)
    O = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # noqa: E741
    for start in range(0, n_k, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        p_tile = p + (head * n_q + m[:, None]) * n_k + n[None, :]
        v_tile = v + head * n_k * D + n[:, None] * D + c[None, :]
        P = tl.load(p_tile, mask=(m[:, None] < n_q) & (n[None, :] < n_k), other=0.0)
        V = tl.load(v_tile, mask=(n[:, None] < n_k) & (c[None, :] < D), other=0.0)
        O = tl.dot(P, V, O, input_precision="ieee")  # noqa: E741
    o_tile = o + head * n_q * D + m[:, None] * D + c[None, :]
    tl.store(o_tile, O.to(o.dtype.element_ty), mask=(m[:, None] < n_q) & (c[None, :] < D))


@torch.library.custom_op("labkit::naive_scores", mutates_args=())
def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, block_m: int, block_n: int
) -> torch.Tensor:
    check_can_launch("q", q, k)
    (batch, heads, n_q, d), n_k = q.shape, k.shape[2]
    s = q.new_empty(batch, heads, n_q, n_k)
    grid = (triton.cdiv(n_q, block_m), triton.cdiv(n_k, block_n), batch * heads)
    block_d = _block_d(d)
    scores_kernel[grid](
        q, k, s, scale, n_q, n_k, D=d, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d
    )
    return s


@_scores.register_fake
def _(q, k, scale, block_m, block_n):
    return q.new_empty(*q.shape[:3], k.shape[2])


@register_flop_formula(torch.ops.labkit.naive_scores)
def _scores_flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    batch, heads, n_q, d = q_shape
    return 2 * batch * heads * n_q * k_shape[2] * d


@torch.library.custom_op("labkit::naive_softmax", mutates_args=())
def _softmax(s: torch.Tensor) -> torch.Tensor:
    check_can_launch("s", s)
    p = torch.empty_like(s)
    n_k = s.shape[-1]
    rows, block = s.numel() // n_k, triton.next_power_of_2(n_k)
    # Short rows share a program; a long one gets all the threads that a program can have.
    together = max(1, 4096 // block)
    warps = max(4, min(32, block // 512))
    grid = (triton.cdiv(rows, together),)
    softmax_kernel[grid](s, p, rows, n_k, ROWS=together, BLOCK=block, num_warps=warps)
    return p


@_softmax.register_fake
def _(s):
    return torch.empty_like(s)


@register_flop_formula(torch.ops.labkit.naive_softmax)
def _softmax_flops(s_shape, *args, out_shape=None, **kwargs) -> int:
    return 0  # torch's counters count products only


@torch.library.custom_op("labkit::naive_output", mutates_args=())
def _output(p: torch.Tensor, v: torch.Tensor, block_m: int, block_n: int) -> torch.Tensor:
    check_can_launch("p", p, v)
    (batch, heads, n_q, n_k), d = p.shape, v.shape[3]
    o = v.new_empty(batch, heads, n_q, d)
    grid = (triton.cdiv(n_q, block_m), batch * heads)
    block_d = _block_d(d)
    output_kernel[grid](p, v, o, n_q, n_k, D=d, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d)
    return o


@_output.register_fake
def _(p, v, block_m, block_n):
    return v.new_empty(*p.shape[:3], v.shape[3])


@register_flop_formula(torch.ops.labkit.naive_output)
def _output_flops(p_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    batch, heads, n_q, n_k = p_shape
    return 2 * batch * heads * n_q * n_k * v_shape[3]


def _block_d(head_dim: int) -> int:
    # tl.dot multiplies no fewer than 16 columns at a time, tl.arange counts to powers of two
    return max(16, triton.next_power_of_2(head_dim))


def check_teaching_case(q, k, v, scale, block_m: int, block_n: int) -> tuple[Sizes, float]:
    """Check what the kernels of chapter 06 take; return the sizes and the scale.

    Raises
    ------
    ArgumentError
        beyond ``labkit.shapes.check_qkv``: for grouped heads, bfloat16 in the interpreter, and
        tiles that are no powers of two of at least 16.
    """
    sizes = check_qkv(q, k, v, dtypes=_DTYPES)
    if sizes.heads != sizes.kv_heads:
        raise ArgumentError(
            "k.shape",
            tuple(k.shape),
            f"has {sizes.kv_heads} heads, q has {sizes.heads}: these kernels have one per head.",
            "Repeat K and V for each query head, or use labkit.flash.",
        )
    for argument, value in (("block_m", block_m), ("block_n", block_n)):
        value = check_positive_int(argument, value)
        if value < 16 or value & (value - 1):
            raise ArgumentError(
                argument, value, "is no power of two of at least 16.", "Pass 16, 32, 64 …"
            )
    if check_can_launch("q", q, k, v) == "interpreter" and q.dtype == torch.bfloat16:
        raise ArgumentError(
            "q.dtype",
            "bfloat16",
            "is a dtype that Triton's interpreter multiplies wrongly.",
            "Pass float16 or float32 here; bfloat16 needs a GPU.",
        )
    return sizes, check_scale(scale, sizes.head_dim)


def naive_in_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> torch.Tensor:
    """softmax(scale · QKᵀ) V in three Triton kernels.

    Parameters
    ----------
    q, k, v : ``[batch, heads, seq_len_q or seq_len_k, head_dim]``, one KV head per query head;
        v's head_dim may differ.  Copied if not contiguous.
    scale : multiplies QKᵀ; default 1/√head_dim.
    block_m, block_n : rows of Q and rows of K in one tile, powers of two of at least 16.

    Returns
    -------
    torch.Tensor
        O ``[batch, heads, seq_len_q, head_dim_v]`` in q's dtype; no gradient.

    Raises
    ------
    ArgumentError
        if shapes, dtypes, devices or tiles do not fit.
    NoGpuError
        if nothing on this machine can run the kernels.
    """
    _, scale = check_teaching_case(q, k, v, scale, block_m, block_n)
    S = torch.ops.labkit.naive_scores(q.contiguous(), k.contiguous(), scale, block_m, block_n)
    P = torch.ops.labkit.naive_softmax(S)
    return torch.ops.labkit.naive_output(P, v.contiguous(), block_m, block_n)
