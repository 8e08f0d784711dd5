r"""One attention, five ways to compute it, and which of them can run here.

.. math:: O = \mathrm{softmax}\bigl(QK^\top / \sqrt{d} + \text{mask}\bigr)\, V

``naive``, ``tiled``, ``flash`` and ``sdpa`` compute this function, and differ in what they write
to memory.  ``nsa`` reads fewer keys and computes another one.

A sparse pattern is computed as one of two things.  As a **mask**, every score is computed and
most are thrown away.  As **blocks**, what no query of a block sees is left out.  Which of them a
backend has:

=========  ================================  ==================================================
backend    ``sparse="mask"``                 ``sparse="blocks"``
=========  ================================  ==================================================
naive      every score written, then hidden  none
tiled      none                              tiles that nobody sees are not computed
flash      none                              a window: our kernel; others: FlexAttention
sdpa       a mask of Nq × Nk is read         FlexAttention
nsa        none                              none: it chooses its blocks itself
=========  ================================  ==================================================

``tiled`` adds up in float32 (float64 for float64) and keeps q, k, v, O and the LSE of each row: the
backward pass computes its tiles again.  A pattern other than a window has a list besides, made
once for all heads and layers: a byte for each score of a row of tiles in which one is partly seen,
so at most Nq · Nk bytes.  ``labkit.patterns.attention`` says what each way promises.

``torch.func.grad`` goes through ``tiled``; a second derivative and ``torch.func.vmap`` do not, and
torch says so.

Taught in chapters 10 (fp32, fp16, which kernel, and who decides) and 11 (a mask saves nothing).
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from labkit.errors import ArgumentError, NoGpuError, check_choice
from labkit.shapes import check_qkv

__all__ = ["BACKENDS", "attend", "available", "check_available", "check_flex", "check_pattern"]

#: name → what it is
BACKENDS: dict[str, str] = {
    "naive": "S and P written to memory, one operation after another (labkit.naive)",
    "tiled": "FlashAttention's loop over tiles in plain PyTorch: linear memory, runs everywhere",
    "flash": "our Triton kernels (labkit.flash)",
    "sdpa": "torch's scaled_dot_product_attention, which chooses a kernel (labkit.dispatch)",
    "nsa": "Native Sparse Attention (labkit.nsa): another function, causal only",
}

#: where to go from a backend that cannot run: the same function, the nearest first
_NEAREST = ("sdpa", "tiled")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KERNEL_WIDTHS = (16, 256)
_MASK, _BLOCKS = ("naive", "sdpa"), ("tiled", "flash", "sdpa")


# -- what can run ----------------------------------------------------------------------------------


def available(
    backend: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    head_dim: int | None = None,
) -> str | None:
    """Why ``backend`` cannot run here, or None if it can.

    Parameters
    ----------
    backend : str
        one of :data:`BACKENDS`.
    device : torch.device or str
        where the tensors would lie; the GPU if torch sees one, otherwise the CPU.
    dtype : torch.dtype
        of q, k and v; under autocast that of its products.
    head_dim : int
        also ask whether the kernels take heads of this width.

    Raises
    ------
    ArgumentError
        for an unknown backend (the message lists the known ones), or a dtype that is none.
    """
    check_choice("backend", backend, BACKENDS)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(
            "dtype", dtype, f"is a {type(dtype).__name__}, not a torch.dtype.",
            "Pass torch.float16, torch.float32, ….",
        )  # fmt: skip
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if not dtype.is_floating_point:
        return f"{_name(dtype)} is no float dtype"
    if dtype not in (*_KERNEL_DTYPES, torch.float64):
        return f"{_name(dtype)} is for storage: no backend here computes in it"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return _why_not_triton(device, dtype, head_dim) if backend in ("flash", "nsa") else None


def _why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why our Triton kernels cannot run on such tensors, or None."""
    from labkit.kernels.runtime import backend as how_kernels_run

    if find_spec("triton") is None:
        return "it needs Triton, which is not installed (wheels exist for Linux only)"
    if dtype not in _KERNEL_DTYPES:
        return f"its kernels compute in float16, bfloat16 and float32, not in {_name(dtype)}"
    if head_dim is not None and not _KERNEL_WIDTHS[0] <= head_dim <= _KERNEL_WIDTHS[1]:
        return f"its kernels take a head_dim from 16 to 256, not {head_dim}"
    try:
        how = how_kernels_run()
    except NoGpuError:
        return "torch sees no GPU, and Triton's interpreter is off (set TRITON_INTERPRET=1 for it)"
    if how == "gpu" and device.type != "cuda":
        return f"its kernels are compiled for the GPU, and the tensors lie on {device}"
    if how == "interpreter" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 as raw bits"
    return None


def check_available(
    backend: str, device: torch.device, dtype: torch.dtype, *, head_dim: int | None = None
) -> None:
    """Raise an ArgumentError that says why ``backend`` cannot run, and the nearest that can."""
    why = available(backend, device, dtype, head_dim=head_dim)
    if why is None:
        return
    nearest = next((b for b in _NEAREST if available(b, device, dtype) is None), None)
    if nearest is None:
        remedy = "Move the model to a device that is there, and use a float dtype."
    elif backend == "nsa":
        remedy = (
            'Use nsa={"implementation": "reference"}, which computes the same in plain PyTorch; '
            f"dense attention is backend={nearest!r}."
        )
    else:
        remedy = f"The nearest that can is backend={nearest!r}: it computes the same function."
    raise ArgumentError("backend", backend, f"cannot run here: {why}.", remedy)


def check_flex(device: torch.device, training: bool, head_dim: int) -> None:
    """Raise an ArgumentError where FlexAttention, the way of these blocks, cannot run."""
    if device.type == "cuda" and head_dim < 16:
        raise ArgumentError(
            "sparse", "blocks",
            f"is FlexAttention here, whose kernel takes heads of 16 or wider, not of {head_dim}.",
            'Use backend="tiled", which leaves out the same blocks, or fewer and wider heads.',
        )  # fmt: skip
    if device.type == "cpu" and training:
        raise ArgumentError(
            "sparse", "blocks", "is FlexAttention here, which has no backward pass on a CPU.",
            'Use backend="tiled", which leaves out the same blocks, or torch.no_grad().',
        )  # fmt: skip


def check_pattern(backend: str, pattern: Any, sparse: str | None) -> str | None:
    """Which way of ``labkit.patterns.HOWS`` it would be, or None for dense attention.

    Parameters
    ----------
    pattern : labkit.patterns.definitions.Pattern or None
        None is dense attention.
    sparse : str or None
        ``"mask"`` or ``"blocks"``; None is what the backend has, a mask where it has both.

    Raises
    ------
    ArgumentError
        for a combination that does not exist; the message names one that does.
    """
    if sparse is not None:
        check_choice("sparse", sparse, ("mask", "blocks"))
    if pattern is None:
        if sparse is not None:
            raise ArgumentError(
                "sparse", sparse, "says how to compute a pattern, and there is none.",
                "Pass a pattern as well, or a window; or leave it out.",
            )  # fmt: skip
        return None
    if backend == "nsa":
        raise ArgumentError(
            "pattern", pattern, "was given to a backend that chooses its keys itself.",
            'Leave it out, or use backend="flash"; the window of nsa is '
            'nsa={"window_size": …}.',
        )  # fmt: skip
    from labkit.patterns import Local

    if sparse is None:
        sparse = "mask" if backend in _MASK else "blocks"
    if sparse == "mask":
        if backend not in _MASK:
            raise ArgumentError(
                "sparse", sparse, f"is not what backend {backend!r} has: it never holds a row of "
                "scores that a mask could be laid over.",
                'Use sparse="blocks", or backend="sdpa" or "naive".',
            )  # fmt: skip
        return backend
    if backend == "naive":
        raise ArgumentError(
            "sparse", sparse, "is not what backend 'naive' has: it computes every score.",
            'Use sparse="mask", or backend="flash" or "sdpa".',
        )  # fmt: skip
    if backend == "sdpa" or (backend == "flash" and not isinstance(pattern, Local)):
        return "flex"
    return "window" if isinstance(pattern, Local) else "blocks"


# -- one attention ---------------------------------------------------------------------------------


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backend: str = "sdpa",
    causal: bool = True,
    pattern: Any = None,
    sparse: str | None = None,
    precision: str | None = None,
) -> torch.Tensor:
    """softmax(QKᵀ/√d + mask) V by one of the backends that compute it.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch, heads, seq_len, head_dim]``, any strides.
    k, v : torch.Tensor
        ``[batch, kv_heads, seq_len_k, ·]``; ``kv_heads`` divides ``heads``.
    backend : str
        ``"naive"``, ``"tiled"``, ``"flash"`` or ``"sdpa"``.
    causal : bool
        query i sees key j when j ≤ i + Nk − Nq.
    pattern : labkit.patterns.definitions.Pattern or str
        which keys a query sees besides; None for all.
    sparse : str
        ``"mask"`` or ``"blocks"``; None for what the backend has.
    precision : str
        how ``flash`` multiplies float32: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.

    Returns
    -------
    torch.Tensor
        ``[batch, heads, seq_len, head_dim_v]`` in q's dtype (``naive`` under autocast: in the
        dtype that autocast gives the last product).  A row that sees no key is 0.

    Raises
    ------
    ArgumentError
        for a backend or combination that does not exist or cannot run here.
    """
    if backend == "nsa":
        raise ArgumentError(
            "backend", backend, "needs gates besides q, k and v.",
            'Use AttentionLayer(…, backend="nsa"), or labkit.nsa.nsa_func.',
        )  # fmt: skip
    check_choice("backend", backend, BACKENDS)
    if isinstance(pattern, str):
        from labkit.patterns import pattern as of_name

        pattern = of_name(pattern)
    how = check_pattern(backend, pattern, sparse)
    if how == "flex":
        check_qkv(q, k, v)
        records = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        check_flex(q.device, records, min(q.shape[-1], v.shape[-1]))
    if how not in (None, "window"):
        from labkit.patterns import pattern_attention

        return pattern_attention(q, k, v, pattern, how=how, causal=causal)
    window = None if how is None else pattern.window
    if backend == "naive":
        from labkit.naive import naive_attention

        return naive_attention(q, k, v, causal=causal)
    if backend == "tiled":
        # What a tile is added up in is the algorithm's choice, and not autocast's.
        with torch.autocast(q.device.type, enabled=False):
            return _Tiled.apply(q, k, v, causal, window)[0]
    if backend == "flash":
        from labkit.flash import flash_attention

        precision = precision if q.dtype == torch.float32 else None
        return flash_attention(q, k, v, causal=causal, window=window, precision=precision)
    return _sdpa(q, k, v, causal)


def _sdpa(q, k, v, causal: bool) -> torch.Tensor:
    sizes = check_qkv(q, k, v)
    if causal and sizes.seq_len_q != sizes.seq_len_k:
        # torch's is_causal counts from the first key, ours from the last
        from labkit.naive import causal_mask

        seen = ~causal_mask(sizes.seq_len_q, sizes.seq_len_k, q.device)
        o = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=sizes.group > 1)
        if sizes.unseeing:  # a softmax over nothing is NaN in some of torch's kernels
            o = torch.where(seen.any(-1)[:, None], o, torch.zeros_like(o))
        return o
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=sizes.group > 1)


def _block(seq_len: int) -> int:
    """Rows of a tile: 64 at first; as many as keep the loop short later, up to 1024."""
    return min(1024, max(64, 2 ** math.ceil(math.log2(seq_len / 16))))


class _Tiled(torch.autograd.Function):
    """Tiles forward and, from the LSE, tiles backward: nothing of size Nq × Nk is kept.

    Autograd by itself would keep every tile of S and P for the backward pass, and so as much as
    naive attention does.
    """

    @staticmethod
    def forward(q, k, v, causal, window):
        from labkit.online_softmax import tiled_attention

        return tiled_attention(
            q, k, v, causal=causal, window=window, return_lse=True,
            block_m=_block(q.shape[2]), block_n=_block(k.shape[2]),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, ctx.causal, ctx.window = inputs
        o, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, o, lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, _):
        from labkit.flash.recompute import one_pass

        q, k, v, o, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = one_pass(
                q, k, v, o, lse, dout, causal=ctx.causal, window=ctx.window,
                block_q=_block(q.shape[2]), block_k=_block(k.shape[2]),
            )  # fmt: skip
        return dq, dk, dv, None, None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
