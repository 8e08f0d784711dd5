r"""The two functions that users call, and everything that is checked before a kernel is launched.

.. math:: O = \mathrm{softmax}(\mathrm{scale}\; QK^\top + \text{mask})\, V

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

from itertools import pairwise

import torch

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.flash import launch, ops
from labkit.shapes import check_qkv, check_scale

__all__ = ["flash_attention", "flash_attention_varlen"]

_DTYPES = ("float16", "bfloat16", "float32")
_MAX_WIDTH, _MIN_WIDTH = 256, 16


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    precision: str | None = None,
):
    r"""Attention without S and P in memory: exact, differentiable, linear in seq_len.

    FlashAttention (Dao et al. 2022, Dao 2023) in Triton; chapters 08 and 09 build it.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch, heads, seq_len_q, head_dim]``; float16, bfloat16 (not in the interpreter) or
        float32; head_dim from 16 to 256, any strides.
    k : torch.Tensor
        ``[batch, kv_heads, seq_len_k, head_dim]``; ``kv_heads`` divides ``heads``, and query head
        h reads KV head ``h // (heads // kv_heads)``.  K and V are not copied.
    v : torch.Tensor
        ``[batch, kv_heads, seq_len_k, head_dim_v]``; head_dim_v from 16 to 256.
    causal : bool
        query i sees key j when j ≤ i + Nk − Nq: the last query sees every key.
    scale : float
        multiplies QKᵀ; default 1/√head_dim.
    window : int
        see only keys nearer than this: with ``causal`` the last ``window`` keys, self included;
        without, :math:`|i + N_k - N_q - j| <` ``window``.  None means all.
    return_lse : bool
        also return LSE, the natural logarithm of :math:`\sum_j e^{S_{ij}}`.
    precision : str
        how float32 is multiplied.  ``"ieee"`` (default): in float32, on the CUDA cores.
        ``"tf32x3"``: on the tensor cores, each factor as the sum of two TF32 numbers, three of
        the four products kept; 22 bits of each factor, several times faster, and what SDPA's
        float32 kernel does.  ``"tf32"``: 10 bits of each factor's mantissa.  Has no meaning for
        half precision, whose products are exact.

    Returns
    -------
    torch.Tensor or tuple
        O ``[batch, heads, seq_len_q, head_dim_v]`` in q's dtype, or ``(O, LSE)`` with LSE
        ``[batch, heads, seq_len_q]`` float32.  A row that sees no key has O = 0, LSE = −∞ and
        zero gradients.  Both are differentiable once.

    Raises
    ------
    ArgumentError
        naming the argument, if shapes, dtypes, devices, sizes or options do not fit.
    DoubleBackwardError, ForwardModeError
        if a second derivative is taken, or one in forward mode.
    MissingDependencyError, NoGpuError
        if nothing here can run the kernels; the message says what still works.

    Notes
    -----
    Memory beyond the inputs: O and 4 bytes of LSE per row (and, when a few queries read many keys,
    float32 parts of O).  Nothing of size Nq × Nk exists.  The result is the same to the bit each
    time on one machine and configuration.  A NaN in a row of q stays in that row; a NaN in v
    reaches the rows whose tiles contain its key, also where the mask hides it, since 0 · NaN is
    NaN.
    """
    asked = (causal, scale, type(scale), window, type(window), precision)
    how = _remembered(q, k, v, asked)
    if how is None:
        sizes = check_qkv(q, k, v, dtypes=_DTYPES)
        _check_widths(sizes.head_dim, sizes.head_dim_v)
        how = (
            sizes.seq_len_q, sizes.seq_len_k, bool(causal), check_scale(scale, sizes.head_dim),
            _check_window(window), _check_precision(precision, sizes.dtype),
        )  # fmt: skip
        _check_runs(q, k, v)
        _remember(q, k, v, asked, how)
    return _run(q, k, v, None, None, *how, return_lse)


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    precision: str | None = None,
):
    """Attention within each of several sequences that lie one after another, without padding.

    Parameters
    ----------
    q : torch.Tensor
        ``[total_q, heads, head_dim]``.
    k, v : torch.Tensor
        ``[total_k, kv_heads, head_dim]`` and ``[total_k, kv_heads, head_dim_v]``.
    cu_seqlens_q, cu_seqlens_k : torch.Tensor
        ``[sequences + 1]`` int32 or int64, on the same device: sequence s has the queries
        ``cu_seqlens_q[s] … cu_seqlens_q[s + 1] − 1``.  Starts at 0, does not decrease, ends at
        the total.  A sequence may be empty on either side.  They are read on the host, which waits
        for the device.
    causal, scale, window, precision
        as for :func:`flash_attention`, within each sequence.
    return_lse : bool
        also return LSE, ``[heads, total_q]`` float32.

    Returns
    -------
    torch.Tensor or tuple
        O ``[total_q, heads, head_dim_v]``, or ``(O, LSE)``.

    Raises
    ------
    ArgumentError
        as for :func:`flash_attention`, and for offsets that do not describe the tensors.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(name, type(x).__name__, "is not a torch tensor.", "Pass a tensor.")
        if x.dim() != 3:
            raise ArgumentError(
                f"{name}.shape", tuple(x.shape), f"has {x.dim()} dimensions, varlen takes 3.",
                "Pass [total, heads, head_dim]; for [batch, heads, seq_len, head_dim] use "
                "flash_attention.",
            )  # fmt: skip
    # [total, heads, width] → [1, heads, total, width], a view
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    sizes = check_qkv(q4, k4, v4, dtypes=_DTYPES)
    scale = check_scale(scale, sizes.head_dim)
    window = _check_window(window)
    precision = _check_precision(precision, sizes.dtype)
    _check_widths(sizes.head_dim, sizes.head_dim_v)
    cu_q, max_q = _check_offsets("cu_seqlens_q", cu_seqlens_q, q, "q")
    cu_k, max_k = _check_offsets("cu_seqlens_k", cu_seqlens_k, k, "k")
    if cu_q.shape != cu_k.shape:
        raise ArgumentError(
            "cu_seqlens_k", tuple(cu_k.shape),
            f"does not go with cu_seqlens_q {tuple(cu_q.shape)}.",
            "Pass as many offsets for the keys as for the queries: one per sequence, plus one.",
        )  # fmt: skip
    _check_runs(q, k, v)
    out = _run(
        q4, k4, v4, cu_q, cu_k, max_q, max_k,
        bool(causal), scale, window, precision, return_lse,
    )  # fmt: skip
    if return_lse:
        return out[0][0].transpose(0, 1), out[1][0]
    return out[0].transpose(0, 1)


def _run(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window, precision, return_lse):
    if window is not None and window >= max_q + max_k:
        window = None  # it hides nothing
    how = (cu_q, cu_k, max_q, max_k, causal, scale, window, precision)
    if not torch.compiler.is_compiling():
        ops.check_not_forward_mode(q, k, v)
    if not ops.nobody_listens(q, k, v):
        o, lse = torch.ops.labkit.flash_forward(q, k, v, *how)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        o, lse = ops.Flash.apply(q, k, v, *how)
    else:
        call = launch.Call(causal, scale, window, precision, max_q, max_k, cu_q, cu_k)
        o, lse = launch.forward(q, k, v, call)
    return (o, lse) if return_lse else o


# -- checks, once for each kind of call ----------------------------------------------------------

_checked: dict[tuple, tuple] = {}


def _face(q, k, v, asked: tuple) -> tuple:
    return (
        q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device, asked
    )  # fmt: skip


def _remembered(q, k, v, asked: tuple) -> tuple | None:
    """What a call just like this one was checked to mean: a short call is mostly host time."""
    if torch.compiler.is_compiling():
        return None
    try:
        return _checked.get(_face(q, k, v, asked))
    except (AttributeError, TypeError):  # not tensors, or an option that cannot be hashed
        return None


def _remember(q, k, v, asked: tuple, how: tuple) -> None:
    if type(q) is torch.Tensor and ops.nobody_listens(q, k, v):
        if len(_checked) > 4096:
            _checked.clear()
        _checked[_face(q, k, v, asked)] = how


# -- checks, one by one ----------------------------------------------------------------------------


def _check_window(window: int | None) -> int | None:
    return None if window is None else check_positive_int("window", window)


def _check_precision(precision: str | None, dtype: str) -> str:
    if precision is None:
        return "ieee"
    check_choice("precision", precision, ("ieee", "tf32x3", "tf32"))
    if dtype != "float32":
        raise ArgumentError(
            "precision", precision, f"has no meaning for {dtype}, whose products are exact.",
            "Leave it out; it chooses how float32 is multiplied.",
        )  # fmt: skip
    return precision


def _check_widths(head_dim: int, head_dim_v: int) -> None:
    for name, argument, width in (("head_dim", "q", head_dim), ("head_dim_v", "v", head_dim_v)):
        if not _MIN_WIDTH <= width <= _MAX_WIDTH:
            raise ArgumentError(
                f"{argument}.shape[-1]", width, f"is a {name} the kernels are not made for.",
                f"Use {_MIN_WIDTH} to {_MAX_WIDTH}; narrower heads can be padded with zeros, "
                "wider ones are labkit.naive's.",
            )  # fmt: skip


def _check_runs(q, k, v) -> None:
    if not ops.nobody_listens(q, k, v):
        return  # nothing is launched on fake or meta tensors; a launch checks real ones
    launch.check_runs(q, k, v)


def _check_offsets(name: str, cu, x: torch.Tensor, of: str) -> tuple[torch.Tensor, int]:
    """The offsets as int32, and the longest sequence."""
    if not isinstance(cu, torch.Tensor):
        raise ArgumentError(name, type(cu).__name__, "is not a torch tensor.", "Pass a tensor.")
    if cu.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{name}.dtype", str(cu.dtype).removeprefix("torch."), "is not an integer of 32 or 64 "
            "bits.", f"Convert it: {name}.to(torch.int32).",
        )  # fmt: skip
    if cu.dim() != 1 or cu.shape[0] < 2:
        raise ArgumentError(
            f"{name}.shape", tuple(cu.shape), "is not a list of offsets.",
            "Pass [sequences + 1]: [0, len_0, len_0 + len_1, …].",
        )  # fmt: skip
    if cu.device != x.device:
        raise ArgumentError(
            f"{name}.device", str(cu.device), f"differs from {of}'s {x.device}.",
            f"Move it: {name}.to({of}.device).",
        )  # fmt: skip
    offsets = cu.tolist()
    if offsets[0] != 0:
        raise ArgumentError(name, offsets[0], "is its first offset.", "Start at 0.")
    lengths = [b - a for a, b in pairwise(offsets)]
    if min(lengths) < 0:
        s = next(s for s, n in enumerate(lengths) if n < 0)
        raise ArgumentError(
            name, offsets[s : s + 2], f"decreases at sequence {s}.", "Pass cumulative lengths.",
        )  # fmt: skip
    if offsets[-1] != x.shape[0]:
        what = "overruns" if offsets[-1] > x.shape[0] else "stops short of"
        raise ArgumentError(
            name, offsets[-1], f"is its last offset, which {what} the {x.shape[0]} rows of {of}.",
            f"End at {of}.shape[0].",
        )  # fmt: skip
    return cu.to(torch.int32), max(lengths)
