r"""Native Sparse Attention as a module for a transformer block, and its cache for decoding.

``NativeSparseAttention`` takes the place of a causal self-attention module: x ``[B, T, dim]`` in,
``[B, T, dim]`` out, and the parameters are in it:

.. math::
    q, k, v = x W_q, x W_k, x W_v, \qquad
    g = \sigma(x W_g) \in (0, 1)^{3 \times HQ}, \qquad
    y = \mathrm{NSA}(q, k, v, g)\, W_o .

There is one gate for each branch and query head, a sigmoid of the same x (section 3.2 of the
paper).  Rotary positions are applied to q and k before anything is pooled, so the compressed key
of a block is the mean of rotated keys.

**Decoding.**  A step appends one key and value and attends with one query.  What a step reads is
bounded by the blocks it chose, the window, and one compressed key per block: a compressed key is
made once, when its last token arrives, and kept.  ``NSACache`` holds the three.  A step gives what
the full forward pass gives at that position, because every branch is causal: nothing that comes
later changes it.

Taught in chapter 13 (the kernels).
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.kernels.runtime import require_triton
from labkit.nsa.pooling import KINDS, TokenCompression, pool_mean
from labkit.nsa.semantics import FORCED, check_forced, compressed_keys

__all__ = ["NSACache", "NativeSparseAttention", "rotate"]

_GATES = ("g_cmp", "g_slc", "g_swa")


def rotate(x: torch.Tensor, position: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of x ``[B, T, heads, D]``, D even.

    Feature i of the first half and feature i of the second are one pair, turned by
    position · base^(−2i/D).  The angles are float32 at least: at position 100 000 half precision
    would not tell neighbours apart.
    """
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    rate = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = position.to(wide)[:, None, None] * rate
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].to(wide), x[..., half:].to(wide)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class NSACache:
    """Keys, values and compressed keys and values of the tokens so far.

    Made by ``NativeSparseAttention.new_cache``; every sequence of the batch is equally long.

    Attributes
    ----------
    length : int
        tokens so far.
    keys, values : ``[B, length, H, D]``, ``[B, length, H, V]``: views of what is kept.
    compressed : ``(k_cmp, v_cmp)``, ``[B, C, H, ·]``, one for each complete block.

    Notes
    -----
    Holds 2 · H · (D + V) · (1 + 1/stride) bytes a token in half precision, and room that doubles
    when it is full: what is kept is copied then, and at no other time.
    """

    def __init__(self, layer: NativeSparseAttention, batch: int, capacity: int, like) -> None:
        self._layer, self._batch, self._like = layer, batch, like
        self.length = 0
        self._tokens = self._room(capacity)
        self._blocks = self._room(max(1, capacity // layer.stride))

    def _room(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self._batch, max(1, rows), self._layer.num_kv_heads)
        return tuple(
            self._like.new_empty((*shape, width))
            for width in (self._layer.head_dim, self._layer.head_dim_v)
        )

    @property
    def capacity(self) -> int:
        """Tokens that there is room for before the next copy."""
        return self._tokens[0].shape[1]

    @property
    def keys(self) -> torch.Tensor:
        return self._tokens[0][:, : self.length]

    @property
    def values(self) -> torch.Tensor:
        return self._tokens[1][:, : self.length]

    def _count(self) -> int:
        return compressed_keys(self.length, self._layer.length, self._layer.stride)

    @property
    def compressed(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = self._count()
        return tuple(x[:, :count] for x in self._blocks)

    @property
    def bytes(self) -> int:
        """Bytes of everything that is kept, the spare room included."""
        return sum(x.numel() * x.element_size() for x in (*self._tokens, *self._blocks))

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add the keys and values of the next tokens, and the blocks that they complete."""
        layer, before, blocks = self._layer, self.length, self._count()
        self._tokens = self._with(self._tokens, before, (k, v))
        self.length = before + k.shape[1]
        new = self._count() - blocks
        if new > 0:
            first, last = blocks * layer.stride, (self._count() - 1) * layer.stride + layer.length
            made = layer.compress(self.keys[:, first:last], self.values[:, first:last])
            self._blocks = self._with(self._blocks, blocks, made)

    def _with(self, kept, at: int, new) -> tuple[torch.Tensor, torch.Tensor]:
        end = at + new[0].shape[1]
        if end > kept[0].shape[1]:
            room = [x.new_empty((x.shape[0], max(end, 2 * x.shape[1]), *x.shape[2:])) for x in kept]
            for to, old in zip(room, kept, strict=True):
                to[:, :at] = old[:, :at]
            kept = tuple(room)
        for to, x in zip(kept, new, strict=True):
            to[:, at:end] = x
        return kept

    def __deepcopy__(self, memo: dict) -> NSACache:
        """A cache of the same layer that goes its own way, as a beam search needs."""
        fork = copy(self)
        fork._layer = memo.get(id(self._layer), self._layer)
        fork._tokens, fork._blocks = (
            tuple(x.clone() for x in kept) for kept in (self._tokens, self._blocks)
        )
        return fork

    def __repr__(self) -> str:
        return f"NSACache(batch={self._batch}, length={self.length}, capacity={self.capacity})"


class NativeSparseAttention(nn.Module):
    """Causal self-attention by Native Sparse Attention: ``[B, T, dim]`` → ``[B, T, dim]``.

    Parameters
    ----------
    dim : int
        features of a token.
    num_heads, num_kv_heads : int
        query heads, and KV heads that they share in groups of 1 to 64.
    head_dim : int
        features of a head, even with rotary positions; dim / num_heads unless given.
    block_size, block_counts : int
        tokens of a selection block (16, 32, 64 or 128), and how many blocks a query reads.
    window_size : int
        keys of the window, the own one included.
    compression : str
        how a block becomes one key: ``"mean"``, ``"weighted"`` or ``"mlp"``
        (``labkit.nsa.TokenCompression``).
    compression_length, compression_stride : int
        tokens of a compressed key and from one to the next; block_size and length unless given.
        The paper has 32 and 16 with blocks of 64.
    head_dim_v : int
        features of a value; head_dim unless given.
    forced : (int, int)
        first and last blocks that every query reads.
    rotary_base : float or None
        base of the rotary positions; None leaves positions out.
    bias : bool
        whether the projections have one.
    implementation : str
        ``"kernels"``: Triton.  ``"reference"``: ``labkit.nsa.naive_nsa_with_compression``, which
        runs everywhere in any float dtype, and slowly.
    device, dtype
        of the parameters.

    Raises
    ------
    ArgumentError
        naming the argument that does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        block_size: int = 64,
        block_counts: int = 16,
        window_size: int = 512,
        compression: str = "mean",
        *,
        compression_length: int | None = None,
        compression_stride: int | None = None,
        head_dim_v: int | None = None,
        forced: tuple[int, int] = FORCED,
        rotary_base: float | None = 10_000.0,
        bias: bool = False,
        implementation: str = "kernels",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        from labkit.nsa import checks

        self.dim = check_positive_int("dim", dim)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.num_kv_heads = check_positive_int("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ArgumentError(
                "num_kv_heads", num_kv_heads, f"does not divide num_heads = {num_heads}.",
                "Use a number of KV heads that divides the number of query heads.",
            )  # fmt: skip
        if head_dim is None and self.dim % self.num_heads:
            raise ArgumentError(
                "num_heads", num_heads, f"does not divide dim = {dim}.",
                "Pass head_dim, or a number of heads that divides dim.",
            )  # fmt: skip
        self.head_dim = (
            self.dim // self.num_heads if head_dim is None else
            check_positive_int("head_dim", head_dim)
        )  # fmt: skip
        self.head_dim_v = (
            self.head_dim if head_dim_v is None else check_positive_int("head_dim_v", head_dim_v)
        )
        if rotary_base is not None and self.head_dim % 2:
            raise ArgumentError(
                "head_dim", self.head_dim, "is odd, and rotary positions turn pairs of features.",
                "Use an even head_dim, or rotary_base=None.",
            )  # fmt: skip
        self.block_size = checks.check_block_size(block_size)
        self.block_counts = check_positive_int("block_counts", block_counts)
        self.window_size = checks.check_window(window_size)
        self.forced = check_forced(forced)
        self.length, self.stride = checks.check_lengths(
            compression_length, compression_stride, self.block_size
        )
        check_choice("compression", compression, KINDS)
        self.rotary_base = rotary_base
        self.implementation = check_choice(
            "implementation", implementation, ("kernels", "reference")
        )

        made = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, **made)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, **made)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim_v, **made)
        self.g_proj = nn.Linear(dim, 3 * num_heads, **made)
        self.o_proj = nn.Linear(num_heads * self.head_dim_v, dim, **made)
        self.compression = None
        if compression != "mean":
            self.compression = TokenCompression(
                self.head_dim, self.head_dim_v, kind=compression, length=self.length,
                stride=self.stride,
            ).to(device=device, dtype=dtype)  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, block_size={self.block_size}, "
            f"block_counts={self.block_counts}, window_size={self.window_size}"
        )

    # -- parts -------------------------------------------------------------------------------------

    def compress(self, k, v, cu_seqlens=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compressed keys and values of every complete block."""
        if self.compression is not None:
            return self.compression(k, v, cu_seqlens)
        return tuple(pool_mean(x, self.length, self.stride, cu_seqlens=cu_seqlens) for x in (k, v))

    def _project(self, x, position):
        """q, k, v ``[B, T, heads, width]`` and the three gates ``[B, T, HQ]``."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim_v))
        if self.rotary_base is not None:
            q, k = (rotate(y, position, self.rotary_base) for y in (q, k))
        gates = self.g_proj(x).sigmoid().unflatten(-1, (3, self.num_heads)).unbind(-2)
        return q, k, v, dict(zip(_GATES, gates, strict=True))

    def _attend(self, q, k, v, gates, cu, compressed, weights: bool):
        if self.implementation == "reference":
            return self._by_reference(q, k, v, gates, cu, compressed, weights)
        require_triton('labkit.nsa.NativeSparseAttention (without: implementation="reference")')
        from labkit.nsa import api, checks

        checks.check_qkv(q, k, v)
        call = api._call(
            q, k, cu, scale=None, precision=None, block_size=self.block_size, length=self.length,
            stride=self.stride, block_counts=self.block_counts, forced=self.forced,
        )  # fmt: skip
        api._check_runs(q, k, v)
        if compressed is None and self.compression is not None:
            compressed = self.compress(k, v, call.cu)
        return api.attend(
            q, k, v, gates, call, self.window_size, compressed=compressed, weights=weights
        )

    def _by_reference(self, q, k, v, gates, cu, compressed, weights: bool):
        from labkit.nsa.reference import naive_nsa_with_compression

        if weights:
            raise ArgumentError(
                "return_attn_weights", True, "is what the kernels return.",
                'Use implementation="kernels".',
            )  # fmt: skip
        compress = self.compress if compressed is None else lambda k, v: compressed
        out = naive_nsa_with_compression(
            q, k, v, *gates.values(), self.block_counts, self.block_size, self.window_size,
            cu_seqlens=cu, forced=self.forced, length=self.length, stride=self.stride,
            compress=compress,
        )  # fmt: skip
        return out, {}

    # -- whole sequences ---------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        cache: NSACache | None = None,
        return_attn_weights: bool = False,
    ):
        """Attend from each token to its past.

        Parameters
        ----------
        x : torch.Tensor
            ``[B, T, dim]``; with ``cu_seqlens`` B is 1.
        cu_seqlens : torch.Tensor
            ``[sequences + 1]``, where each sequence starts.
        cache : NSACache
            what came before x, to which x is added.  A cache carries no gradient, so the call
            runs without.
        return_attn_weights : bool
            also return the weights as ``labkit.nsa.nsa_func`` does.

        Returns
        -------
        torch.Tensor or tuple
            y ``[B, T, dim]``, or ``(y, weights)``.

        Raises
        ------
        ArgumentError
            naming the argument that does not fit.
        """
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[-1] != self.dim:
            shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ArgumentError(
                "x.shape", shape, "is not what this layer attends over.",
                f"Pass [batch, seq_len, {self.dim}].",
            )  # fmt: skip
        if 0 in x.shape:
            raise ArgumentError(
                "x.shape", tuple(x.shape), "has a size of 0.",
                f"Pass [batch, seq_len, {self.dim}], each at least 1.",
            )  # fmt: skip
        if cache is not None:
            if cu_seqlens is not None:
                raise ArgumentError(
                    "cu_seqlens", cu_seqlens, "was given beside a cache.",
                    "A cache holds a batch of equally long sequences; decode others by themselves.",
                )  # fmt: skip
            with torch.no_grad():
                out, weights = self._with_cache(x, cache, return_attn_weights)
        else:
            if cu_seqlens is not None:
                from labkit.nsa import checks

                cu_seqlens, _ = checks.check_offsets(cu_seqlens, x, x)
            position = _positions(x, cu_seqlens) if self.rotary_base is not None else None
            out, weights = self._attend(
                *self._project(x, position), cu_seqlens, None, return_attn_weights
            )
            out = self.o_proj(out.flatten(-2))
        return (out, weights) if return_attn_weights else out

    # -- token by token ----------------------------------------------------------------------------

    def new_cache(
        self, batch: int = 1, capacity: int = 1024, *, dtype: torch.dtype | None = None
    ) -> NSACache:
        """An empty cache for a batch of sequences, with room for ``capacity`` tokens at first.

        It lies where the parameters lie and has their dtype; under autocast pass ``dtype``.
        """
        like = self.k_proj.weight
        like = like.detach() if dtype is None else like.detach().to(dtype)
        batch = check_positive_int("batch", batch)
        return NSACache(self, batch, check_positive_int("capacity", capacity), like[:0])

    def step(self, x_t: torch.Tensor, cache: NSACache) -> torch.Tensor:
        """The output for one more token: x_t ``[B, dim]`` or ``[B, 1, dim]``; shaped as x_t."""
        flat = isinstance(x_t, torch.Tensor) and x_t.dim() == 2
        out = self.forward(x_t[:, None] if flat else x_t, cache=cache)
        return out[:, 0] if flat else out

    def _with_cache(self, x, cache: NSACache, weights: bool):
        if not isinstance(cache, NSACache) or cache._layer is not self:
            raise ArgumentError(
                "cache", repr(cache), "was not made by this layer.", "Pass layer.new_cache(batch)."
            )
        if x.shape[0] != cache._batch:
            raise ArgumentError(
                "x.shape", tuple(x.shape), f"has another batch than the cache's {cache._batch}.",
                "Make a cache for each batch.",
            )  # fmt: skip
        position = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)
        q, k, v, gates = self._project(x, position)
        if k.dtype != cache.keys.dtype or k.device != cache.keys.device:
            raise ArgumentError(
                "cache", f"{cache.keys.dtype} on {cache.keys.device}",
                f"is not what this call makes: {k.dtype} on {k.device}.",
                f"Make it where the layer is; under autocast by new_cache(…, dtype={k.dtype}).",
            )  # fmt: skip
        before = cache.length
        cache.append(k, v)
        try:
            out, found = self._attend(
                q, cache.keys, cache.values, gates, None, cache.compressed, weights
            )
        except BaseException:
            cache.length = before  # what had no output may be tried again
            raise
        return self.o_proj(out.flatten(-2)), found


def _positions(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Where each token stands in its own sequence: ``[T]``."""
    position = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return position
    lengths = cu_seqlens.diff()
    start = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=x.shape[1])
    return position - start
