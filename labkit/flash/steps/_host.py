"""What every step checks before its launch: the same few lines, kept out of the kernels' way.

The steps take less than ``labkit.flash.flash_attention`` so that each kernel stays short:
as many queries as keys, a head_dim that is a power of two, contiguous tensors.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

import torch

from labkit.errors import ArgumentError
from labkit.kernels.runtime import check_can_launch
from labkit.shapes import Sizes, check_qkv, check_scale

__all__ = ["check", "outputs"]

_HEAD_DIMS = (16, 32, 64, 128, 256)


def check(q, k, v, scale: float | None) -> tuple[Sizes, float]:
    """Sizes and scale of one call, or the reason why a step cannot do it.

    Parameters
    ----------
    q : [B, H, N, d], float16, bfloat16 (GPU only) or float32, contiguous, d a power of two.
    k, v : [B, Hkv, N, d], Hkv a divisor of H.
    scale : multiplies Q Kᵀ; None means 1/√d.

    Raises
    ------
    ArgumentError
        naming the argument that does not fit.
    NoGpuError
        if nothing on this machine can run the kernel.
    """
    sizes = check_qkv(q, k, v, dtypes=("float16", "bfloat16", "float32"))
    scale = check_scale(scale, sizes.head_dim)
    if sizes.seq_len_q != sizes.seq_len_k:
        raise ArgumentError(
            "k.shape",
            tuple(k.shape),
            f"has {sizes.seq_len_k} keys for {sizes.seq_len_q} queries; the steps take one N.",
            "Use labkit.flash.flash_attention.",
        )
    if sizes.head_dim not in _HEAD_DIMS or sizes.head_dim_v != sizes.head_dim:
        raise ArgumentError(
            "q.shape",
            tuple(q.shape),
            f"has head_dim {sizes.head_dim} (values: {sizes.head_dim_v}); the steps take one "
            f"head_dim out of {', '.join(map(str, _HEAD_DIMS))}.",
            "Use labkit.flash.flash_attention.",
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_contiguous():
            raise ArgumentError(
                name,
                f"strides {tuple(tensor.stride())}",
                "is not contiguous; the steps find a row by its number alone.",
                "Pass .contiguous(), or use labkit.flash.flash_attention.",
            )
    if check_can_launch("q", q, k, v) == "interpreter" and q.dtype == torch.bfloat16:
        raise ArgumentError(
            "q.dtype",
            "bfloat16",
            "is multiplied wrongly by Triton's interpreter, which keeps it as 16-bit integers.",
            "Pass float16 or float32 here; bfloat16 needs a GPU.",
        )
    return sizes, scale


def outputs(q) -> tuple[torch.Tensor, torch.Tensor]:
    """All that is written: O [B, H, N, d] in q's dtype and LSE [B, H, N] in float32."""
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
