"""Sparse attention patterns: as a mask over dense work, and as work that is left out.

======================  ===============================================================  =======
file                    holds                                                            chapter
======================  ===============================================================  =======
``definitions.py``      the patterns: which query sees which key                         11
``masks.py``            a pattern as a matrix, as blocks, as FlexAttention's BlockMask   11
``costs.py``            scores, blocks, FLOPs and bytes of each way to compute it        11
``attention.py``        one function, five ways: the same result, different bytes        11
======================  ===============================================================  =======

Tensors are ``[batch, heads, seq_len, head_dim]``.
Importing this package loads neither torch nor Triton; the first use of a name does.
Taught in chapter 11 (a mask saves nothing).
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "Blocked": "definitions",
    "Clustered": "definitions",
    "Cost": "costs",
    "HOWS": "attention",
    "Hierarchical": "definitions",
    "Local": "definitions",
    "PATTERNS": "definitions",
    "Pattern": "definitions",
    "PatternStatistics": "costs",
    "Random": "definitions",
    "Reordered": "definitions",
    "Strided": "definitions",
    "clear_masks": "attention",
    "expected_block_density": "costs",
    "pattern": "definitions",
    "pattern_attention": "attention",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f"labkit.patterns.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'labkit.patterns' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
