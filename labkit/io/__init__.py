"""How many bytes attention moves between two levels of memory: modelled and counted.

``model``
    the two-level memory model: closed forms of the traffic of tiled kernels, the tile that a
    fast memory can hold, and the lower bounds.
``counting``
    the bytes of each load and store, counted while Triton's interpreter runs the real kernels.

The model loads neither torch nor Triton; ``count`` loads both when used.
Taught in chapter 06 (how few bytes could it take?).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from labkit.io.model import (
    ORDERS,
    TileLimits,
    attention_traffic,
    compulsory_elements,
    flash_backward_traffic,
    kv_rereads,
    largest_block_m,
    law,
    matmul_lower_bound,
    matmul_traffic,
    tile_elements,
    tile_for_card,
    tiles_of,
    total_bytes,
)

if TYPE_CHECKING:
    from labkit.io.counting import Access, Traffic, count

__all__ = [
    "ORDERS",
    "Access",
    "TileLimits",
    "Traffic",
    "attention_traffic",
    "compulsory_elements",
    "count",
    "flash_backward_traffic",
    "kv_rereads",
    "largest_block_m",
    "law",
    "matmul_lower_bound",
    "matmul_traffic",
    "tile_elements",
    "tile_for_card",
    "tiles_of",
    "total_bytes",
]

# What needs Triton is looked up on use (PEP 562).
_TRITON = {"Access", "Traffic", "count"}


def __getattr__(name: str):
    if name not in _TRITON:
        raise AttributeError(f"module 'labkit.io' has no attribute {name!r}")
    return getattr(import_module("labkit.io.counting"), name)
