"""One call for every implementation of attention, by name.

What the measurements compare, and what a :class:`labkit.dispatch.policy.Choice` runs.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cuda as flags

from labkit.dispatch.sdpa import explain
from labkit.errors import ArgumentError, check_choice
from labkit.shapes import check_scale

__all__ = ["BACKENDS", "DTYPES", "attention", "can_run", "function", "switches_kept"]

#: what can compute attention, by the names that rows and policies use
BACKENDS = {
    "flash": "SDPA, FlashAttention-2 (float16, bfloat16)",
    "cudnn": "SDPA, cuDNN's kernels (float16, bfloat16)",
    "efficient": "SDPA, the memory-efficient kernels (float16, bfloat16, float32)",
    "math": "SDPA without a fused kernel: S and P in memory",
    "flash_cpu": "SDPA's fused loop on a CPU",
    "ours": "labkit.flash, in Triton and by hand for Hopper",
    "naive": "labkit.naive, one operator per equation: S and P in memory",
    "sdpa": "SDPA, and torch chooses",
}
#: how numbers are held and multiplied: a dtype, or float32 with products in TF32
DTYPES = ("float32", "tf32", "float16", "bfloat16")
_SDPA = ("flash", "cudnn", "efficient", "math", "flash_cpu")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backend: str = "sdpa",
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    tf32: bool = False,
) -> torch.Tensor:
    """Attention by the implementation of that name.

    Parameters
    ----------
    q : ``[batch, heads, seq_len_q, head_dim]``.
    k, v : ``[batch, kv_heads, seq_len_k, head_dim]``; fewer KV heads than query heads are
        grouped-query attention.
    backend : one of :data:`BACKENDS`.
    is_causal : query i sees key j when j ≤ i; with as many keys as queries only, since otherwise
        SDPA aligns its mask to the top left and labkit to the bottom right.  A mask of one's own
        says which is meant; the error names both.
    attn_mask : as for SDPA; ``"ours"`` and ``"naive"`` take none.
    scale : multiplies QKᵀ; default 1/√head_dim.
    tf32 : multiply float32 in TF32, where the implementation has that choice.

    Returns
    -------
    torch.Tensor
        O ``[batch, heads, seq_len_q, head_dim]`` in q's dtype.

    Raises
    ------
    ArgumentError
        for an unknown backend, or one that cannot take the inputs: why, and one that can; for
        is_causal with other lengths; for a scale that is not positive.
    """
    why = can_run(backend, q, k, v, is_causal=is_causal, attn_mask=attn_mask, tf32=tf32)
    if why is not None:
        if is_causal and _unequal(q, k):
            n_q, n_k = q.shape[-2], k.shape[-2]
            sign = "+" if n_k > n_q else "−"
            raise ArgumentError(
                "is_causal", True, f"has two meanings for {n_q} queries and {n_k} keys: SDPA lets "
                f"query i see j ≤ i, labkit j ≤ i {sign} {abs(n_k - n_q)}.",
                "Pass is_causal=False and, to a backend that takes one, a mask: "
                f"attn_mask=torch.ones({n_q}, {n_k}, dtype=torch.bool, device=q.device).tril(0) "
                f"is the first, .tril({n_k - n_q}) the second, which "
                "labkit.flash.flash_attention(q, k, v, causal=True) computes without a mask.",
            )  # fmt: skip
        able = ", ".join(_able(q, k, v, is_causal, attn_mask, tf32))
        raise ArgumentError(
            "backend", backend, f"cannot take these inputs: it {why}.",
            f"Use one that can: {able}." if able else "None of the others takes them either.",
        )  # fmt: skip
    scale = None if scale is None else check_scale(scale, q.shape[-1])
    with switches_kept():
        options = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "tf32": tf32}
        return function(backend, q, k, v, **options)()


def can_run(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    tf32: bool = False,
) -> str | None:
    """None if that backend takes these inputs; else why not, as "takes no attn_mask".

    Raises
    ------
    ArgumentError
        for an unknown backend, or inputs that no attention takes.
    """
    check_choice("backend", backend, BACKENDS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(name, type(x).__name__, "is not a torch tensor.", "Pass a tensor.")
        if x.dim() < 2:
            raise ArgumentError(
                f"{name}.shape", tuple(x.shape), f"has {x.dim()} dimensions.",
                "Use [batch, heads, seq_len, head_dim].",
            )  # fmt: skip
    if is_causal and _unequal(q, k):
        return "takes is_causal only with as many keys as queries here"
    if tf32 and (q.dtype != torch.float32 or q.device.type != "cuda"):
        return "multiplies in TF32 only float32 on a GPU"
    if backend in ("sdpa", *_SDPA):
        if tf32 and backend in ("flash", "cudnn", "efficient", "flash_cpu"):
            return "does not heed the TF32 switch"
        with _switched_on():
            asked = explain(
                q, k, v, is_causal=is_causal, attn_mask=attn_mask, enable_gqa=_grouped(q, k)
            )
        if backend == "flash" and q.device.type == "cpu":
            return "runs on a GPU only; on a CPU it is 'flash_cpu'"
        if backend == "flash_cpu" and q.device.type != "cpu":
            return "runs on a CPU only"
        reasons = asked.refused.get(backend)
        return None if reasons is None else "; ".join(map(str, reasons))
    if attn_mask is not None:
        return "takes no attn_mask"
    if backend == "ours":
        return _ours_cannot(q, k, v)
    return None


def _unequal(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether there are not as many keys as queries."""
    return q.shape[-2] != k.shape[-2]


def _able(q, k, v, is_causal, attn_mask, tf32) -> list[str]:
    asked = {"is_causal": is_causal, "attn_mask": attn_mask, "tf32": tf32}
    return [name for name in BACKENDS if can_run(name, q, k, v, **asked) is None]


def _grouped(q: torch.Tensor, k: torch.Tensor) -> bool:
    return q.dim() > 2 and q.shape[-3] != k.shape[-3]


def _ours_cannot(q, k, v) -> str | None:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if q.dtype == torch.float64:
        return "takes float16, bfloat16, float32"
    if not all(16 <= x.shape[-1] <= 256 for x in (q, v)):
        return "takes head_dim from 16 to 256"
    if q.device.type == "cpu":
        from labkit.kernels.runtime import backend

        if backend() != "interpreter":
            return "runs on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
        if q.dtype == torch.bfloat16:
            return "takes no bfloat16 in Triton's interpreter"
    return None


# -- for timing: what is the same in each call is done once --------------------------------------


def function(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    tf32: bool = False,
) -> Callable[[], torch.Tensor]:
    """A function of no arguments that computes O; nothing is checked.

    It leaves torch's switches as it needs them: call it inside of :func:`switches_kept`.  A
    context manager in every call would cost the host more than some of the kernels take.
    """
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    grouped = _grouped(q, k)
    if backend in ("sdpa", *_SDPA):
        on = _SDPA if backend == "sdpa" else (backend,)

        def call() -> torch.Tensor:
            _switch(on)
            flags.matmul.allow_tf32 = tf32
            return sdpa(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )

    elif backend == "ours":
        from labkit.flash import flash_attention

        precision = "tf32" if tf32 else None

        def call() -> torch.Tensor:
            return flash_attention(q, k, v, causal=is_causal, scale=scale, precision=precision)

    else:
        from labkit.naive import naive_attention

        def call() -> torch.Tensor:
            flags.matmul.allow_tf32 = tf32
            return naive_attention(q, k, v, causal=is_causal, scale=scale)

    return call


def _switch(on: tuple[str, ...]) -> None:
    """Four switches, half a microsecond in all."""
    flags.enable_flash_sdp("flash" in on or "flash_cpu" in on)
    flags.enable_cudnn_sdp("cudnn" in on)
    flags.enable_mem_efficient_sdp("efficient" in on)
    flags.enable_math_sdp("math" in on)


@contextmanager
def switches_kept() -> Iterator[None]:
    """Put torch's switches back as they were: SDPA's backends, and TF32 for products."""
    names = ("flash", "cudnn", "mem_efficient", "math")
    before = {name: getattr(flags, f"{name}_sdp_enabled")() for name in names}
    tf32 = flags.matmul.allow_tf32
    try:
        yield
    finally:
        for name, was in before.items():
            getattr(flags, f"enable_{name}_sdp")(was)
        flags.matmul.allow_tf32 = tf32


@contextmanager
def _switched_on() -> Iterator[None]:
    with switches_kept():
        _switch(_SDPA)
        yield


def with_backward(
    forward: Callable[[], Any], inputs: tuple[torch.Tensor, ...], dout: torch.Tensor
) -> Callable[[], Any]:
    """A function that computes O and then dQ, dK, dV; ``inputs`` need gradients."""

    def call() -> Any:
        return torch.autograd.grad(forward(), inputs, dout)

    return call
