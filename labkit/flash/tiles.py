"""Tiles: how a kernel brings rows of Q, K, V from memory into a program, and takes them back.

A tile is ``ROWS`` consecutive rows of one head, all of head_dim wide.  Two roads lead to it:

descriptor (Hopper and later)
    The kernel hands a coordinate to the copy engine (TMA), which knows shape and strides from
    a descriptor made on the host, writes the tile to shared memory, and fills with zeros what
    lies beyond the end of a sequence or of head_dim.  No thread computes an address.
pointers (everywhere, and for any strides)
    Each thread computes its addresses.  Rows and columns beyond the end are masked; where the
    caller knows that there are none (``TAIL=False``), no mask is evaluated.

Offsets are 64-bit from the start of the tensor to the first row of a tile, and 32-bit inside the
tile unless ``WIDE``: 64-bit offsets for every element would double the registers they take.

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["head_offset", "load_tile", "row_vector", "store_tile"]


@triton.jit
def head_offset(batch, head, start, stride_b, stride_h, stride_n):
    """Elements from the start of a tensor to row ``start`` of one head; 64-bit."""
    batch, head, start = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(start, tl.int64)
    return batch * stride_b + head * stride_h + start * stride_n


@triton.jit
def _inside(row, first, N, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    """Which elements of a tile exist; None when all do."""
    column = tl.arange(0, BLOCK_D)
    if TAIL:
        if D != BLOCK_D:
            return (first + row < N)[:, None] & (column < D)[None, :]
        return tl.broadcast_to((first + row < N)[:, None], row.shape[0], BLOCK_D)
    return tl.broadcast_to((column < D)[None, :], row.shape[0], BLOCK_D)


@triton.jit
def load_tile(
    x, batch, head, first, N, offset, stride_n, stride_d,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows ``first … first + ROWS`` of one head: ``[ROWS, BLOCK_D]``, zeros where there are none.

    ``x`` is a descriptor of ``[batch, heads, seq_len, head_dim]`` or a pointer; ``offset`` is
    :func:`head_offset` of row 0 of this head, for the pointer road.
    """
    # One return at the end: what follows a return in a compile-time branch is still compiled, and
    # a descriptor has no address to add to.
    if DESCRIPTOR:
        tile = tl.reshape(x.load([batch, head, first, 0]), [ROWS, BLOCK_D])
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        if WIDE:
            row, column = row.to(tl.int64), column.to(tl.int64)
        base = x + offset + tl.cast(first, tl.int64) * stride_n
        at = base + (row[:, None] * stride_n + column[None, :] * stride_d)
        if TAIL or D != BLOCK_D:
            inside = _inside(row, first, N, D, BLOCK_D, TAIL)
            tile = tl.load(at, mask=inside, other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def store_tile(
    x, value, first, N, offset, stride_n,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write rows ``first … first + ROWS`` of one head; what lies beyond N or D is left alone."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    if WIDE:
        row = row.to(tl.int64)
    base = x + offset + tl.cast(first, tl.int64) * stride_n
    at = base + (row[:, None] * stride_n + column[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=_inside(row, first, N, D, BLOCK_D, True))


@triton.jit
def row_vector(x, offset, first, N, ROWS: tl.constexpr, OTHER: tl.constexpr, TAIL: tl.constexpr):
    """One number per row (LSE, delta), ``[ROWS]``; ``OTHER`` where there is no row."""
    row = first + tl.arange(0, ROWS)
    if TAIL:
        return tl.load(x + offset + row, mask=row < N, other=OTHER)
    return tl.load(x + offset + row)
