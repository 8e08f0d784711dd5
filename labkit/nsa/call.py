"""What a call of Native Sparse Attention asks for beside its tensors.

Every kernel file of the package takes one ``Call``; ``api.py`` makes it from checked arguments.
What each choice means is stated in ``semantics.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Call"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """Options, decided once and handed down to every branch.

    Attributes
    ----------
    scale : multiplies QKᵀ.
    precision : how float32 is multiplied: ``"ieee"``, ``"tf32"`` or ``"tf32x3"``.
    block_size : tokens of a selection block (l′ in the paper).
    length, stride : tokens that a compressed key stands for, and tokens from one to the next
        (l and d in the paper); both are block_size unless said otherwise.
    count : slots of a query's choice, the forced ones among them (n in the paper).
    initial, local : blocks that every query reads: the first ones, and the last ones up to its
        own.
    max_q, max_k : seq_len of q and k; of the longest sequence with varlen.
    cu : ``[sequences + 1]`` int32, where each sequence starts; None without varlen.
    cu_cmp : the same for compressed keys.
    cu_blocks : the same for selection blocks.
    """

    scale: float
    precision: str = "ieee"
    block_size: int = 64
    length: int = 64
    stride: int = 64
    count: int = 16
    initial: int = 1
    local: int = 2
    max_q: int = 0
    max_k: int = 0
    cu: torch.Tensor | None = None
    cu_cmp: torch.Tensor | None = None
    cu_blocks: torch.Tensor | None = None

    @property
    def sequences(self) -> int | None:
        """How many sequences lie one after another; None without varlen."""
        return None if self.cu is None else self.cu.shape[0] - 1

    @property
    def offset(self) -> int:
        """Position of query 0: the last query stands beside the last key."""
        return self.max_k - self.max_q

    @property
    def blocks(self) -> int:
        """Selection blocks of the (longest) sequence, the last one perhaps incomplete."""
        return -(-self.max_k // self.block_size)

    @property
    def compressed(self) -> int:
        """Compressed keys of the (longest) sequence: complete blocks only."""
        return max(0, (self.max_k - self.length) // self.stride + 1)
