r"""Copy: the plainest use of device memory.

.. math:: y_i = x_i, \qquad \text{bytes moved} = 2\,n\,e

with :math:`n` elements of :math:`e` bytes: each is read once and written once.
Time it at growing sizes and the bandwidth falls off a cliff where :math:`2ne`
no longer fits in L2.

Taught in chapter 03 (the memory hierarchy).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from labkit.kernels.runtime import check_can_launch, check_contiguous, check_tensor

__all__ = ["copy"]

_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    # 64 bits before the product: a 32-bit offset ends at 2^31 elements.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@torch.library.custom_op("labkit::copy", mutates_args=())
def _copy(x: torch.Tensor) -> torch.Tensor:
    check_can_launch("x", x)
    y = torch.empty_like(x)
    # 64 bytes per thread: four 16-byte loads in flight before the first store.
    block = 128 * 64 // x.element_size()
    copy_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), BLOCK=block, num_warps=4)
    return y


@_copy.register_fake
def _(x):
    return torch.empty_like(x)


_copy.register_autograd(lambda ctx, dy: copy(dy.contiguous()))


@register_flop_formula(torch.ops.labkit.copy)
def _copy_flops(x_shape, *, out_shape=None, **kwargs) -> int:
    return 0  # it moves bytes and computes nothing


def copy(x: torch.Tensor) -> torch.Tensor:
    """A new tensor with the elements of ``x``, moved by a Triton kernel.

    Parameters
    ----------
    x : any shape, contiguous; float16, bfloat16, float32, float64 or an integer dtype.

    Returns
    -------
    torch.Tensor
        same shape, dtype and device.  Moves ``2 * x.nbytes`` bytes.

    Raises
    ------
    ArgumentError
        if ``x`` is no tensor, empty, not contiguous, or of another dtype.
    NoGpuError
        if nothing on this machine can run the kernel.
    """
    check_tensor("x", x, _DTYPES)
    check_contiguous("x", x)
    return torch.ops.labkit.copy(x)
