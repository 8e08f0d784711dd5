r"""Matrix product: the other ceiling, arithmetic.

.. math:: C = A B, \qquad \text{FLOPs} = 2MNK, \qquad
          \text{bytes} \ge (MK + KN + MN)\,e

Each program owns one tile of C, block_m × block_n.  It walks along K in steps of
block_k, multiplies a tile of A by a tile of B, and keeps the sum in registers in
float32: C is written once, and S-sized intermediates never exist.  The tile is what
buys intensity: per step it loads (block_m + block_n) · block_k elements and does
2 · block_m · block_n · block_k FLOPs.

Programs are numbered so that ``GROUP`` rows of tiles are done together: neighbours
in time then share tiles of B that are still in L2.

float32 inputs need a decision, which is made aloud with ``precision``:

- ``"ieee"`` multiplies in float32 on the CUDA cores.
- ``"tf32"`` keeps 10 mantissa bits of the inputs and uses the tensor cores, several times
  faster and several hundred times less exact.  Triton hands the tensor core all 32 bits
  and it ignores the last 13: truncation.  cuBLAS's error is about a third of that, which
  is what rounding gives.

For float16 and bfloat16 the products are exact in float32 and it means nothing.

Taught in chapter 03 (the memory hierarchy), used for the measured ceiling of chapter 04.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from labkit.errors import ArgumentError, check_choice
from labkit.kernels.runtime import (
    _interpreter_on,
    check_can_launch,
    check_same_device,
    check_tensor,
)

__all__ = ["matmul"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _config(block_m, block_n, block_k, warps, stages, group=8) -> triton.Config:
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": group}
    return triton.Config(tiles, num_warps=warps, num_stages=stages)


#: half precision: wgmma on Hopper wants 128-wide tiles; the small ones fill small problems
_HALF = [
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(128, 128, 64, 8, 4),
    _config(128, 128, 64, 4, 3),
    _config(64, 128, 64, 4, 4),
    _config(64, 64, 64, 4, 4),
]
#: float32 on the CUDA cores: the sums alone fill the registers, so smaller tiles
_FULL = [
    _config(128, 128, 32, 8, 3),
    _config(128, 64, 32, 4, 4),
    _config(64, 64, 32, 4, 3),
    _config(128, 128, 16, 8, 3),
]
#: float32 rounded to tf32: as half precision, at half the depth for the same shared memory
_TF32 = [
    _config(128, 256, 32, 8, 3),
    _config(128, 256, 32, 8, 4),
    _config(128, 128, 32, 8, 4),
    _config(128, 128, 32, 4, 3),
    _config(64, 64, 32, 4, 4),
]


def _prune(configs, named_args, **kwargs):
    """Few enough to try all of them: by kind of product, and no tile far beyond the problem."""
    if _interpreter_on():
        return [_config(32, 32, 32, 4, 1)]
    a, m, n = named_args["a"], named_args["M"], named_args["N"]
    kind = _HALF if a.element_size() == 2 else {"ieee": _FULL, "tf32": _TF32}[kwargs["PRECISION"]]
    fits = [
        c
        for c in kind
        if c.kwargs["BLOCK_M"] <= max(64, triton.next_power_of_2(m))
        and c.kwargs["BLOCK_N"] <= max(64, triton.next_power_of_2(n))
    ]
    if torch.cuda.get_device_properties(a.device).shared_memory_per_block_optin < 160 * 1024:
        # Consumer cards have 99 KiB for a block; a stage is (BLOCK_M + BLOCK_N) · BLOCK_K · e.
        fits = [c for c in fits if _shared_bytes(c, a.element_size()) < 98 * 1024]
    return fits


def _shared_bytes(config, itemsize: int) -> int:
    k = config.kwargs
    return (k["BLOCK_M"] + k["BLOCK_N"]) * k["BLOCK_K"] * itemsize * config.num_stages


@triton.autotune(
    configs=[_config(32, 32, 32, 4, 1)] if _interpreter_on() else _HALF + _FULL + _TF32,
    key=["M", "N", "K", "PRECISION"],  # the dtypes of the tensors are part of the key anyway
    prune_configs_by={"early_config_prune": _prune},
)
@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit
def matmul_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Which tile of C: GROUP rows of tiles at a time, down the columns within the group.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP * tiles_n) * GROUP
    rows = min(tiles_m - first_m, GROUP)
    tile_m = first_m + program % (GROUP * tiles_n) % rows
    tile_n = program % (GROUP * tiles_n) // rows

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end are wrapped instead of masked: they are computed and not stored,
    # and the loop keeps its wide loads.
    a_tile = a + (m % M).to(tl.int64)[:, None] * stride_am + k[None, :].to(tl.int64) * stride_ak
    b_tile = b + k[:, None].to(tl.int64) * stride_bk + (n % N).to(tl.int64)[None, :] * stride_bn

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, y = tl.load(a_tile), tl.load(b_tile)
        else:
            x = tl.load(a_tile, mask=k[None, :] < K - start, other=0.0)
            y = tl.load(b_tile, mask=k[:, None] < K - start, other=0.0)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
        a_tile += BLOCK_K * stride_ak
        b_tile += BLOCK_K * stride_bk

    c_tile = c + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c_tile, sums.to(c.dtype.element_ty), mask=inside)


@torch.library.custom_op("labkit::matmul", mutates_args=())
def _matmul(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    if check_can_launch("a", a, b) == "interpreter" and a.dtype == torch.bfloat16:
        raise ArgumentError(
            "a",
            "bfloat16",
            "is a dtype that Triton's interpreter multiplies wrongly: it holds bfloat16 as "
            "16-bit integers, and its dot multiplies those.",
            "Pass float16 or float32 here; bfloat16 needs a GPU.",
        )
    (m, k), n = a.shape, b.shape[1]
    if precision == "tf32" and a.dtype == torch.float32 and a.is_cuda:
        # Hopper's matrix unit reads tf32 tiles along K only.  Left to transpose each tile as it
        # loads it, the kernel is several times slower than this one copy makes up for.
        a, b = a.contiguous(), b.mT.contiguous().mT
    c = torch.empty((m, n), dtype=a.dtype, device=a.device)

    def tiles(meta):
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    matmul_kernel[tiles](a, b, c, m, n, k, *a.stride(), *b.stride(), PRECISION=precision)
    return c


@_matmul.register_fake
def _(a, b, precision):
    return a.new_empty((a.shape[0], b.shape[1]))


def _keep_inputs(ctx, inputs, output):
    a, b, ctx.precision = inputs
    ctx.save_for_backward(a, b)


def _matmul_backward(ctx, dc):
    a, b = ctx.saved_tensors
    product = torch.ops.labkit.matmul
    da = product(dc, b.mT, ctx.precision) if ctx.needs_input_grad[0] else None
    db = product(a.mT, dc, ctx.precision) if ctx.needs_input_grad[1] else None
    return da, db, None


_matmul.register_autograd(_matmul_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.labkit.matmul)
def _matmul_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def matmul(a: torch.Tensor, b: torch.Tensor, *, precision: str = "ieee") -> torch.Tensor:
    """``a @ b`` with float32 accumulation.

    Parameters
    ----------
    a : [M, K], float16, bfloat16 or float32, any strides.
    b : [K, N], same dtype and device.
    precision : ``"ieee"`` or ``"tf32"``: how float32 inputs are multiplied (see the module).
        Ignored for float16 and bfloat16.

    Returns
    -------
    torch.Tensor
        [M, N], dtype of the inputs, contiguous.  ``2 * M * N * K`` FLOPs.

    Raises
    ------
    ArgumentError
        if shapes, dtypes or devices do not fit, or for bfloat16 in the interpreter.
    NoGpuError
        if nothing on this machine can run the kernel.
    """
    check_tensor("a", a, _DTYPES, dims=2)
    check_tensor("b", b, _DTYPES, dims=2)
    check_same_device("a", a, "b", b)
    check_choice("precision", precision, ("ieee", "tf32"))
    if a.dtype != b.dtype:
        raise ArgumentError("b", str(b.dtype), f"differs from a ({a.dtype}).", "Convert one.")
    if a.shape[1] != b.shape[0]:
        raise ArgumentError(
            "b", tuple(b.shape), f"does not follow a of shape {tuple(a.shape)}.", "Pass [K, N]."
        )
    return torch.ops.labkit.matmul(a, b, precision)
