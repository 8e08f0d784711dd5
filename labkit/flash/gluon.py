"""What the kernels written by hand for Hopper share: their language, descriptors, and reasons.

Gluon (``triton.experimental.gluon``) came with Triton 3.4, is still experimental, and is not in
every build.  A module that writes kernels in it must import without it, and say so only when
somebody asks for such a kernel.  So the names come from here, and are None where there are none::

    from labkit.flash.gluon import gl, jit, mbarrier, tma

The files that teach these kernels (``labkit/flash/hopper.py`` and its like) begin with their
mathematics then, and not with how to import a language.
"""

from __future__ import annotations

from functools import cache

import torch

from labkit.flash import launch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    #: why there is no Gluon; empty if there is
    MISSING = ""
    jit = gluon.jit
except Exception as problem:  # whatever it is, the caller has other kernels
    MISSING = f"{type(problem).__name__}: {problem}"
    gl = async_copy = fence_async_shared = mbarrier = tma = TensorDescriptor = None
    warpgroup_mma = warpgroup_mma_init = warpgroup_mma_wait = None

    def jit(function=None, **options):
        """Nothing can run: a kernel stays the function that it was."""
        return function or (lambda inner: inner)


__all__ = [
    "MISSING",
    "Described",
    "TensorDescriptor",
    "async_copy",
    "describe",
    "fence_async_shared",
    "gl",
    "jit",
    "mbarrier",
    "off_hopper",
    "tma",
    "unreadable",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]


def describe(x: torch.Tensor, block: list[int], bits: int = 16, swizzle: int = 128):
    """How the copy engine sees x: boxes of ``block``, in the order that the products want.

    Parameters
    ----------
    x : any shape, as :func:`unreadable` asks.
    block : elements of a box in each dimension.
    bits : of an element.
    swizzle : bytes of a row within which its 16-byte pieces are permuted; 0: none.
    """
    layout = gl.NVMMASharedLayout(swizzle, bits, rank=x.ndim)
    return TensorDescriptor(x, list(x.shape), launch.strides_of(x), block, layout)


class Described(launch.Described):
    """:func:`describe`, once per plan; a call gives it the tensor."""

    def __init__(self, x: torch.Tensor, block: list[int]) -> None:
        self.form = describe(x, block)
        self.form.base = None  # a plan outlives its first tensors and must not keep them


# -- who can take which tensors --------------------------------------------------------------------


@cache
def _hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


def off_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why no kernel written by hand takes these, whatever their shapes; None: one may."""
    if MISSING:
        return f"this Triton has no Gluon for Hopper ({MISSING})"
    if not q.is_cuda or not _hopper(q.device.index or 0):
        return "not a Hopper card"
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return "not float16 or bfloat16"
    return None


def unreadable(*tensors: torch.Tensor) -> str | None:
    """Why the copy engine cannot read one of these 16-bit tensors of four dimensions; None: it can.

    It wants the last dimension dense, and other strides and the start in multiples of 16 bytes.  A
    stride has 40 bits.
    """
    for x in tensors:
        if not x.numel():
            return "an empty tensor"
        if x.stride(3) != 1 or x.data_ptr() % 16 or x.shape[3] % 8:
            return "rows that do not start at multiples of 16 bytes"
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
            if size > 1 and (stride <= 0 or stride % 8 or stride * 2 >= 2**40):
                return "rows that do not start at multiples of 16 bytes"
    return None
