r"""From tokens to compressed keys and values, and from compressed keys to selection blocks.

Taught in chapter 12 (how NSA chooses what to read).

A compressed key stands for a block of l tokens, and the next one begins d tokens later
(equation 7 of Yuan et al. 2025):

.. math:: \tilde k_c = \varphi(k_{cd}, \dots, k_{cd + l - 1}), \qquad 0 \le c \le (N - l)/d

φ is a mean, a learned weight for each place in the block, or an MLP that is told the places.
Tokens after the last complete block are in no compressed key: a query that stands among them
reads them through the window and through its own selection block.

What one compressed key tells about a selection block is proportional to the tokens that the two
have in common; ``overlap_weights`` holds that as a matrix.  For l = d = l′ it is the identity.

Loads torch.  Imports downwards: errors, nsa.semantics.
"""

from __future__ import annotations

import torch
from torch import nn

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.nsa.semantics import block_numbers, compressed_keys

__all__ = [
    "KINDS",
    "TokenCompression",
    "block_bounds",
    "compressed_bounds",
    "overlap_weights",
    "pool_mean",
    "token_blocks",
]

#: the ways in which :class:`TokenCompression` makes one key of many
KINDS = ("mean", "weighted", "mlp")


def pool_mean(x, length=64, stride=None, *, cu_seqlens=None):
    """Mean over each complete block of tokens.

    Parameters
    ----------
    x : ``[B, N, H, D]``, any float dtype; keys or values.
    length, stride : tokens of a block (l), and from one block's start to the next (d);
        ``stride`` is ``length`` unless given.
    cu_seqlens : ``[sequences + 1]`` integers with B = 1: no block reaches over a boundary.

    Returns
    -------
    torch.Tensor
        ``[B, C, H, D]`` with C = max(0, (N − l) // d + 1); with ``cu_seqlens``
        ``[1, ΣC, H, D]``, sequence after sequence as ``compressed_bounds`` says.
    """
    stride = length if stride is None else stride
    if cu_seqlens is None and stride == length:
        # Blocks lie side by side: a view, and no copy of x.
        complete = x.shape[1] // length
        return x[:, : complete * length].unflatten(1, (complete, length)).mean(2)
    return token_blocks(x, length, stride, cu_seqlens=cu_seqlens).mean(2)


def token_blocks(x, length, stride, *, cu_seqlens=None):
    """The tokens of each complete block: ``[B, N, H, D]`` to ``[B, C, length, H, D]``."""
    length, stride = check_positive_int("length", length), check_positive_int("stride", stride)
    if cu_seqlens is None:
        if x.shape[1] < length:  # a view all the same: x has a gradient, and it is 0
            return x[:, :0].unflatten(1, (0, length))
        return x.unfold(1, length, stride).movedim(-1, 2)
    bounds = compressed_bounds(cu_seqlens, length, stride)
    total = int(bounds[-1])
    # Compressed key number i of all belongs to the last sequence that starts at or before i.
    number = torch.arange(total, device=x.device)
    sequence = torch.searchsorted(bounds.long(), number, right=True) - 1
    first = cu_seqlens.long()[sequence] + (number - bounds.long()[sequence]) * stride
    return x[:, first[:, None] + torch.arange(length, device=x.device)]


def compressed_bounds(cu_seqlens, length, stride=None):
    """Where each sequence's compressed keys start: ``[sequences + 1]`` int32, from 0 to ΣC."""
    stride = length if stride is None else stride
    tokens = cu_seqlens.diff()
    # −1 // d would be −1: a sequence shorter than one block has no compressed key.
    counts = torch.where(tokens < length, 0, (tokens - length) // stride + 1)
    return _bounds(counts)


def block_bounds(cu_seqlens, block_size):
    """Where each sequence's selection blocks start: ``[sequences + 1]`` int32."""
    return _bounds((cu_seqlens.diff() + block_size - 1) // block_size)


def _bounds(counts):
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def overlap_weights(n, *, length, stride, block_size, dtype=torch.float32, device=None):
    """How much of compressed key c lies in selection block j, in units of the stride.

    Returns ``[C, blocks]`` for a sequence of ``n`` tokens.  A column of l = 32, d = 16, l′ = 64
    reads 1, 2, 2, 2, 1; with l = d = l′ the matrix is the identity (its last, incomplete block a
    column of zeros).  Importance of blocks = probability of compressed keys @ this matrix.
    """
    first = stride * torch.arange(compressed_keys(n, length, stride), device=device)[:, None]
    start = block_size * torch.arange(block_numbers(n, block_size), device=device)[None, :]
    common = torch.minimum(first + length, start + block_size) - torch.maximum(first, start)
    return common.clamp(min=0).to(dtype) / stride


class TokenCompression(nn.Module):
    """Learned φ: one compressed key, and one compressed value, for each block of tokens.

    ``compression(k, v)`` gives ``(k_cmp, v_cmp)``; keys and values have parameters of their own,
    which all KV heads share.

    Parameters
    ----------
    head_dim, head_dim_v : last axis of k and of v; ``head_dim_v`` is ``head_dim`` unless given.
    kind : ``"mean"`` has no parameters.  ``"weighted"`` learns l weights, softmax-normalised,
        and begins as the mean.  ``"mlp"`` adds a learned vector for each place in the block,
        lays the block's tokens side by side, and applies Linear, GELU, Linear: the paper's form.
    length, stride : l and d; the paper has 32 and 16.
    hidden : width of the MLP; twice ``head_dim`` unless given.

    Raises
    ------
    ArgumentError
        if ``kind`` is unknown, a size is no positive integer, or ``stride`` > ``length``, which
        would leave tokens out.
    """

    def __init__(
        self, head_dim, head_dim_v=None, *, kind="mlp", length=32, stride=16, hidden=None
    ) -> None:
        super().__init__()
        self.kind = check_choice("kind", kind, KINDS)
        self.length = check_positive_int("length", length)
        self.stride = check_positive_int("stride", stride)
        if self.stride > self.length:
            raise ArgumentError(
                "stride", stride, f"is more than length = {length}: tokens between two blocks"
                " would be in none.", "Pass a stride of at most the length.",
            )  # fmt: skip
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.key = _Pooling(head_dim, kind, length, hidden)
        self.value = _Pooling(head_dim_v, kind, length, hidden)

    def forward(self, k, v, cu_seqlens=None):
        """``[B, N, H, D]``, ``[B, N, H, V]`` → ``[B, C, H, D]``, ``[B, C, H, V]``."""
        cut = [token_blocks(x, self.length, self.stride, cu_seqlens=cu_seqlens) for x in (k, v)]
        return self.key(cut[0]), self.value(cut[1])

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, length={self.length}, stride={self.stride}"


class _Pooling(nn.Module):
    """φ for keys or for values: ``[B, C, length, H, D]`` → ``[B, C, H, D]``."""

    def __init__(self, head_dim, kind, length, hidden) -> None:
        super().__init__()
        self.kind = kind
        if kind == "weighted":
            self.logits = nn.Parameter(torch.zeros(length))
        if kind == "mlp":
            self.place = nn.Parameter(0.02 * torch.randn(length, 1, head_dim))
            hidden = 2 * head_dim if hidden is None else hidden
            self.mlp = nn.Sequential(
                nn.Linear(length * head_dim, hidden), nn.GELU(), nn.Linear(hidden, head_dim)
            )

    def forward(self, blocks):
        if self.kind == "mean":
            return blocks.mean(2)
        if self.kind == "weighted":
            weights = self.logits.softmax(0).to(blocks.dtype)
            return torch.einsum("l,bclhd->bchd", weights, blocks)
        placed = (blocks + self.place).movedim(2, 3)  # [B, C, H, length, D]
        return self.mlp(placed.flatten(-2))
