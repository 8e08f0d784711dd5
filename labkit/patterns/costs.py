r"""What a pattern saves and what it does not: scores, blocks, FLOPs and bytes of each way.

Four ways to compute attention with a pattern, of forward passes:

``naive``
    S and P written, the matrix of the pattern applied to S in between.
``sdpa``
    ``scaled_dot_product_attention`` with the matrix: a fused kernel that adds a bias.  torch makes
    the bias of the bool matrix first, in the dtype of q.
``blocks``
    a fused kernel that computes the blocks in which something is seen, and no others.
``dense``
    the same kernel without the pattern, which is what it has to beat.

With v visible scores per head and t blocks touched,

.. math::
    F_{\text{useful}} &= 4 B H d\, v \\
    F_{\text{mask}} &= 4 B H d\, N^2 \\
    F_{\text{blocks}} &= 4 B H d\, t\, b^2

where a multiplication and an addition are two.  The bytes count each operand of each kernel once,
as if what a kernel reads twice came from L2 the second time, and a matrix that all heads share
once for each head.

Drawn at random, one score by one, a block stays empty with probability :math:`(1-p)^{b^2}`: see
``expected_block_density``.

Taught in chapter 11 (a mask saves nothing).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from labkit.dtypes import dtype_name, itemsize
from labkit.errors import ArgumentError, check_positive_int
from labkit.patterns.definitions import Pattern
from labkit.units import format_bytes, format_rate

__all__ = ["Cost", "PatternStatistics", "expected_block_density", "statistics"]


@dataclass(frozen=True)
class Cost:
    """What one way costs.

    Attributes
    ----------
    flops : of the matrix products that are carried out, needed or not.
    read, written : bytes, each operand of each kernel once.
    tiles : bytes of K and V that the programs ask for, mostly of L2.
    held : bytes at the peak beyond q, k, v and O: S and P, matrices, lists of blocks, LSE.
        FlexAttention of torch 2.11 holds a second row of numbers beside the LSE.
    """

    flops: int
    read: int
    written: int
    tiles: int
    held: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class PatternStatistics:
    """Scores, blocks and costs of one pattern at one size.

    Attributes
    ----------
    visible : scores that the pattern leaves, of one head.
    dense_visible : scores without it: N², or if causal N(N + 1)/2.
    full, partial : blocks of which all, or some but not all, scores are seen.
    dense_blocks : blocks that dense attention touches.
    block_list : (rows, columns) of blocks.
    costs : ``naive``, ``sdpa``, ``blocks``, ``dense`` → ``Cost``.
    """

    pattern: Pattern
    seq_len: int
    causal: bool
    block: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    visible: int
    dense_visible: int
    full: int
    partial: int
    dense_blocks: int
    costs: dict[str, Cost]

    @property
    def touched(self) -> int:
        """Blocks that are computed: full and partial."""
        return self.full + self.partial

    @property
    def density(self) -> float:
        """Visible scores over those of dense attention."""
        return self.visible / self.dense_visible

    @property
    def block_density(self) -> float:
        """Blocks touched over those that dense attention touches: what leaving out can save."""
        return self.touched / self.dense_blocks

    @property
    def useful_flops(self) -> int:
        """Operations on visible scores, all heads."""
        return 4 * self.batch * self.heads * self.head_dim * self.visible

    @property
    def executed_over_useful(self) -> dict[str, float]:
        """Of each way, how many operations it carries out for one that is needed."""
        return {name: cost.flops / self.useful_flops for name, cost in self.costs.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, as a record's row holds them."""
        plain = asdict(self) | {"pattern": repr(self.pattern)}
        return plain | {"density": self.density, "block_density": self.block_density}

    def __str__(self) -> str:
        lines = [
            f"{self.pattern}, {self.seq_len} tokens{', causal' if self.causal else ''}",
            f"  scores seen     {self.density:7.2%} of dense",
            f"  blocks touched  {self.block_density:7.2%} of dense "
            f"({self.full} full, {self.partial} partial, {self.block} × {self.block})",
        ]
        for name, cost in self.costs.items():
            work, moved = format_rate(cost.flops, "FLOP"), format_bytes(cost.moved)
            lines.append(
                f"  {name:<7} {work:>12}  moves {moved:>9}  holds {format_bytes(cost.held):>9}"
            )
        return "\n".join(lines)


def expected_block_density(density: float, block: int) -> float:
    r"""The share of blocks that are touched if each score is drawn by itself: 1 − (1 − p)^(b²).

    >>> f"{expected_block_density(0.05, 128):.6f}"
    '1.000000'
    >>> f"{expected_block_density(0.05, 4):.2f}"
    '0.56'
    """
    if not 0 <= density <= 1:
        raise ArgumentError("density", density, "is not a share.", "Pass a number from 0 to 1.")
    block = check_positive_int("block", block)
    return 1.0 if density == 1 else -math.expm1(block * block * math.log1p(-density))


def statistics(
    which: Pattern,
    seq_len: int,
    *,
    heads: int = 1,
    head_dim: int = 64,
    dtype: Any = "float16",
    block: int = 128,
    causal: bool = False,
    batch: int = 1,
    device: Any = None,
) -> PatternStatistics:
    """Count a pattern's scores and blocks, and work out what each way costs.

    Parameters
    ----------
    seq_len, heads, head_dim, batch, dtype : the problem; as many KV heads as heads.
    block : tokens of a block, for queries and for keys.
    device : where to count; of use for long sequences.

    Raises
    ------
    ArgumentError
        if a number is not positive, or the dtype is not known.
    """
    from labkit.patterns.masks import counts

    n = check_positive_int("seq_len", seq_len)
    seen, there = counts(which, n, n, block, causal, device)
    full, partial = int((seen == there).sum()), int(((seen > 0) & (seen < there)).sum())
    lines = math.ceil(n / block)
    size = {
        "batch": check_positive_int("batch", batch),
        "heads": check_positive_int("heads", heads),
        "head_dim": check_positive_int("head_dim", head_dim),
    }
    dense_blocks = lines * (lines + 1) // 2 if causal else lines * lines
    return PatternStatistics(
        pattern=which, seq_len=n, causal=bool(causal), block=block, **size,
        dtype=dtype_name(dtype), visible=int(seen.sum()),
        dense_visible=n * (n + 1) // 2 if causal else n * n, full=full, partial=partial,
        dense_blocks=dense_blocks,
        costs=_costs(n, block, full + partial, dense_blocks, itemsize(dtype), **size),
    )  # fmt: skip


def _costs(
    n: int, block: int, touched: int, dense: int, e: int, *, batch: int, heads: int, head_dim: int
) -> dict[str, Cost]:
    all_heads, lines = batch * heads, math.ceil(n / block)
    rows = all_heads * n * head_dim * e  # one of q, k, v, O
    scores, matrix, lse = all_heads * n * n, n * n, 4 * all_heads * n
    flops = 4 * all_heads * head_dim

    def tiles(count: int) -> int:
        return all_heads * count * 2 * block * head_dim * e

    # naive: QKᵀ, scale, mask and softmax each write a matrix; all but the first read one; PV does.
    naive = Cost(
        flops=flops * n * n, read=3 * rows + 4 * scores * e + scores, written=rows + 4 * scores * e,
        tiles=tiles(lines * lines), held=2 * scores * e + matrix,
    )  # fmt: skip
    # sdpa: a matrix of 0 and −∞ is made of the bool one, and each head reads that; no LSE.
    sdpa = Cost(
        flops=flops * n * n, read=3 * rows + matrix + scores * e, written=rows + matrix * e,
        tiles=tiles(lines * lines), held=matrix * e,
    )  # fmt: skip
    # How many partial and full blocks, and which, by rows and by columns: int32.
    lists = 4 * 4 * (lines + lines * lines)
    blocks = Cost(
        flops=flops * touched * block * block, read=3 * rows + lists // 2, written=rows + lse,
        tiles=tiles(touched), held=lists + lse,
    )  # fmt: skip
    plain = Cost(
        flops=flops * dense * block * block, read=3 * rows, written=rows + lse, tiles=tiles(dense),
        held=lse,
    )  # fmt: skip
    return {"naive": naive, "sdpa": sdpa, "blocks": blocks, "dense": plain}
