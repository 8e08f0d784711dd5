"""One function, five ways to compute it: the same result, different bytes.

=============  ====================================================================================
``naive``      S and P written, the pattern as a matrix.
``sdpa``       torch's ``scaled_dot_product_attention`` with the pattern as a matrix.
``blocks``     plain PyTorch over blocks that are not empty: runs everywhere, no kernel of its own.
``flex``       FlexAttention: a kernel that leaves empty blocks out.
``window``     ``labkit.flash.flash_attention`` with a window; for ``Local``.
=============  ====================================================================================

A matrix or a list of blocks is made when a size is first seen, and kept: ``clear_masks`` lets go
of them.  Inside of ``torch.compile`` lists of blocks are made once, while it traces, and become
part of a graph for that one length (of ``blocks``, with each row of blocks written out in it).  A
matrix is made there on each call, by arithmetic that the compiler fuses.

``blocks`` keeps O and the LSE of each row for the backward pass, and computes the scores again.
Beside that there is the pattern's own list, one for all heads: of each row of blocks that has a
partial one, a byte for every score that is computed.

What each way promises:

==========  ====================================  ==============================================
way         S and P are held in                   a NaN or inf in v that a row does not see
==========  ====================================  ==============================================
``naive``   q's dtype: in float16 a score         reaches every row: it is weighted with 0, and
            above 65504 is inf                    0 · NaN is NaN
``sdpa``    float32 by the fused kernels          reaches every row; one in k too, where a
                                                  kernel adds the matrix to S
``blocks``  float32                               reaches the queries whose row of blocks reads
                                                  its block
``flex``    float32; on a CPU QKᵀ is rounded      the same of the kernel's tiles; on a CPU it
            to q's dtype first                    reaches every row
``window``  float32                               reaches the queries whose tile reads its tile
==========  ====================================  ==============================================

(float64 is computed in float64.)  In each way the error of O against float64 is at most twice, and
that of a gradient three times, that of plain PyTorch in the same dtype.  A row that sees no key is
0 and has no gradient.

Taught in chapter 11 (a mask saves nothing).
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.flash.recompute import block_of_pairs, delta
from labkit.online_softmax import finish, identity, update
from labkit.patterns import masks
from labkit.patterns.definitions import Local, Pattern, lasting
from labkit.patterns.definitions import pattern as find_pattern
from labkit.shapes import Sizes, check_qkv, check_scale

__all__ = ["HOWS", "clear_masks", "pattern_attention"]

#: the ways, and what each does
HOWS = {
    "naive": "S and P written, the pattern as a matrix",
    "sdpa": "torch's scaled_dot_product_attention, the pattern as a matrix",
    "blocks": "plain PyTorch over the blocks that are not empty",
    "flex": "FlexAttention: a kernel that leaves out empty blocks",
    "window": "labkit.flash with a window (Local only)",
}


def pattern_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    *,
    how: str = "sdpa",
    causal: bool = False,
    scale: float | None = None,
    block: int = 128,
    reorder: bool = False,
) -> torch.Tensor:
    """Attention in which each query sees the keys that the pattern allows.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch, heads, seq_len_q, head_dim]``.
    k, v : torch.Tensor
        ``[batch, kv_heads, seq_len_k, head_dim]`` and ``[…, head_dim_v]``; ``kv_heads`` divides
        ``heads``.
    pattern : Pattern or str
        of ``labkit.patterns``, or the name of one with its default parameters.
    how : str
        one of :data:`HOWS`; changes what is computed and stored on the way, not the result.
    causal : bool
        hide also the keys ahead: query t sees key j when j ≤ t + Nk − Nq.
    scale : float
        multiplies QKᵀ; default 1/√head_dim.
    block : int
        tokens of a block, of ``"blocks"`` and ``"flex"``.  FlexAttention's kernel takes multiples
        of its own tile, which 128 is.
    reorder : bool
        bring the tokens into the pattern's own order (``Pattern.order``), attend there, and put O
        back: four gathers of N · d elements, and fewer blocks.  For ``Clustered``, and
        ``Strided`` without a window.

    Returns
    -------
    torch.Tensor
        O ``[batch, heads, seq_len_q, head_dim_v]``.  A row that sees no key is 0.

    Raises
    ------
    ArgumentError
        if the tensors do not go together, the pattern or way is not known, or the way cannot
        compute this here; the message says what can.
    MissingDependencyError, NoGpuError
        if ``"window"`` can run nowhere here.
    """
    sizes = check_qkv(q, k, v)
    which = find_pattern(pattern)
    check_choice("how", how, HOWS)
    scale = check_scale(scale, sizes.head_dim)
    block = check_positive_int("block", block)
    if reorder:
        how_there = {"how": how, "causal": causal, "scale": scale, "block": block}
        return _in_its_order(q, k, v, which, sizes, how_there)
    if how == "window":
        return _window(q, k, v, which, causal, scale)
    if how == "blocks":
        return _blocks(q, k, v, which, sizes, bool(causal), scale, block)
    if how == "flex":
        _check_flex(q, k, v, sizes)
    size = (sizes.seq_len_q, sizes.seq_len_k, bool(causal))
    run = {"naive": _naive, "sdpa": _sdpa, "flex": _flex}[how]
    kind = "matrix" if how in ("naive", "sdpa") else how
    return run(q, k, v, _made(kind, which, size, q, block), sizes, scale)


def _in_its_order(q, k, v, which: Pattern, sizes, how: dict[str, Any]) -> torch.Tensor:
    if sizes.seq_len_q != sizes.seq_len_k:
        raise ArgumentError(
            "reorder", True, f"needs as many queries as keys, not {sizes.seq_len_q} and "
            f"{sizes.seq_len_k}.", "Leave it out.",
        )  # fmt: skip
    size = (sizes.seq_len_q, sizes.seq_len_k, False)
    there, tokens, places = _made("order", which, size, q, 1)
    q, k, v = (x.index_select(2, tokens) for x in (q, k, v))
    return pattern_attention(q, k, v, there, **how).index_select(2, places)


# -- the ways ----------------------------------------------------------------------------------


def _naive(q, k, v, made, sizes, scale: float) -> torch.Tensor:
    mask, empty = made
    S = (_group(q, sizes) @ k.transpose(-2, -1)).view(*q.shape[:3], k.shape[2]) * scale
    S = S.masked_fill(~mask if empty is None else ~(mask | empty), float("-inf"))
    P = torch.softmax(S, dim=-1)
    del S
    O = (_group(P, sizes) @ v).view(*q.shape[:3], v.shape[3])  # noqa: E741
    return O if empty is None else O.masked_fill(empty, 0.0)


def _sdpa(q, k, v, made, sizes, scale: float) -> torch.Tensor:
    mask, empty = made
    grouped = {"enable_gqa": True} if sizes.group > 1 else {}
    # A row of −∞ has no softmax, and torch's kernels differ in what they make of it.
    mask = mask if empty is None else mask | empty
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, **grouped
    )
    return out if empty is None else out.masked_fill(empty, 0.0)


def _blocks(q, k, v, which: Pattern, sizes: Sizes, causal: bool, scale: float, block: int):
    if q.is_meta or isinstance(q, FakeTensor):
        raise ArgumentError(
            "how", "blocks", "looks at which blocks are empty, and a tensor without data (fake or "
            "meta) cannot be looked at.", 'Trace how="sdpa" or "naive".',
        )  # fmt: skip
    size = (masks.number(sizes.seq_len_q), masks.number(sizes.seq_len_k), causal)
    # What a block is added up in is this way's choice, and not autocast's.
    with torch.autocast(q.device.type, enabled=False):
        return _Blocks.apply(q, k, v, masks.recipe(which), size, scale, block)[0]


class _Blocks(torch.autograd.Function):
    """One row of blocks after another: gather the keys of its blocks, and attend to them.

    Autograd by itself would keep S and P of every row of blocks.  Here, as in FlashAttention, the
    backward pass has O and the LSE of each row, and computes P again.
    """

    @staticmethod
    def forward(q, k, v, of, size, scale, block):
        """O ``[B, H, Nq, dv]`` in q's dtype and LSE ``[B, H, Nq]``."""
        sizes = check_qkv(q, k, v)
        wide, outputs, lses = _wide(q), [], []
        for start, stop, keys, seen in _lines_of(of, size, str(q.device), block):
            Q = _group(q[:, :, start:stop], sizes).to(wide)
            state = identity(*Q.shape[:3], head_dim_v=sizes.head_dim_v, dtype=wide, device=q.device)
            if len(keys):
                S = Q @ k[:, :, keys].to(wide).mT * scale
                if seen is not None:
                    S = S.masked_fill(~seen.repeat(sizes.group, 1), float("-inf"))
                state = update(state, S, v[:, :, keys])
            O, lse = finish(state)  # noqa: E741
            rows = (sizes.batch, sizes.heads, stop - start)
            outputs.append(O.view(*rows, sizes.head_dim_v).to(q.dtype))
            lses.append(lse.view(rows))
        return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, *ctx.problem = inputs
        O, lse = output  # noqa: E741
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, O, lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dO, _):
        q, k, v, O, lse = ctx.saved_tensors  # noqa: E741
        of, size, scale, block = ctx.problem
        sizes, wide = check_qkv(q, k, v), _wide(q)
        with torch.autocast(q.device.type, enabled=False):
            D = delta(dO, O)
            # A row that sees no key has LSE = −∞; with ∞ in its place P is 0.
            lse = lse.masked_fill(lse == float("-inf"), float("inf"))
            dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
            for start, stop, keys, seen in _lines_of(of, size, str(q.device), block):
                if not len(keys):
                    continue
                Q, dO_rows, lse_rows, D_rows = (
                    _group(x[:, :, start:stop], sizes).to(wide) for x in (q, dO, lse, D)
                )
                K, V = (x[:, :, keys].to(wide) for x in (k, v))
                seen = None if seen is None else seen.repeat(sizes.group, 1)
                P, dS = block_of_pairs(Q, K, V, dO_rows, lse_rows, D_rows, scale, seen)
                dv.index_add_(2, keys, P.mT @ dO_rows)
                dk.index_add_(2, keys, scale * (dS.mT @ Q))
                dq[:, :, start:stop] = (scale * (dS @ K)).view(dq[:, :, start:stop].shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _flex(q, k, v, made, sizes, scale: float) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    options = {"block_mask": made, "scale": scale, "enable_gqa": sizes.group > 1}
    if not q.is_cuda:
        q, k, v = q.detach(), k.detach(), v.detach()  # asked for by torch, also under no_grad
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **options)  # becomes part of the caller's graph
    # Each predicate is a program of its own to the compiler, which by default gives up after
    # eight and then runs the unfused form.
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        if q.is_cuda:
            return _compiled_flex()(q, k, v, **options)
        with warnings.catch_warnings():
            # On a CPU the unfused form is what we want: it says what the kernel would give.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(q, k, v, **options)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _window(q, k, v, which: Pattern, causal: bool, scale: float) -> torch.Tensor:
    if not isinstance(which, Local):
        raise ArgumentError(
            "how", "window", f"computes a local window, and the pattern is {which!r}.",
            'Use how="flex", or "blocks".',
        )  # fmt: skip
    from labkit.flash import flash_attention

    return flash_attention(q, k, v, causal=causal, scale=scale, window=which.window)


def _check_flex(q, k, v, sizes) -> None:
    records_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and records_grad:
        raise ArgumentError(
            "how", "flex", "has no backward pass on a CPU.",
            'Use how="blocks", which leaves out the same blocks, or torch.no_grad().',
        )  # fmt: skip
    if q.is_cuda and min(sizes.head_dim, sizes.head_dim_v) < 16:
        raise ArgumentError(
            "q.shape[-1]", sizes.head_dim, "is a head_dim below 16, which FlexAttention's kernel "
            "does not take.", 'Pad the heads with zeros, or use how="blocks".',
        )  # fmt: skip


def _group(x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """``[B, H, N, …]`` → ``[B, Hkv, group · N, …]``: K and V need no copies."""
    if sizes.group == 1:
        return x
    return x.reshape(sizes.batch, sizes.kv_heads, sizes.group * x.shape[2], *x.shape[3:])


# -- what is made once for each size -------------------------------------------------------------

_KEPT = 8
_made_before: OrderedDict[tuple, Any] = OrderedDict()


def clear_masks() -> None:
    """Let go of the matrices, orders and lists of blocks that earlier calls have made.

    Lists that a compiled graph holds go with the graph (``torch.compiler.reset``).
    """
    _made_before.clear()


def _made(kind: str, which: Pattern, size: tuple[int, int, bool], q: torch.Tensor, block: int):
    if torch.compiler.is_dynamo_compiling() or not _is_real(q):
        return _make(kind, which, size, q.device, block)  # part of a graph, or not to be kept
    return _kept(kind, which, size, str(q.device), block)


@masks.constant  # a pattern and a length have one list
def _lines_of(of: Any, size: tuple[int, int, bool], device: str, block: int) -> list:
    return _kept("blocks", masks.from_recipe(of), size, device, block)


def _kept(kind: str, which: Pattern, size: tuple[int, int, bool], device: str, block: int):
    if not lasting():
        return _make(kind, which, size, device, block)
    key = (kind, which, size, device, block if kind != "matrix" else None)
    if key not in _made_before:
        # outside inference mode too a later backward pass has to be able to save it
        with torch.inference_mode(False), torch.no_grad():
            _made_before[key] = _make(kind, which, size, device, block)
        while len(_made_before) > _KEPT:
            _made_before.popitem(last=False)
    _made_before.move_to_end(key)
    return _made_before[key]


def _make(kind: str, which: Pattern, size: tuple[int, int, bool], device: Any, block: int):
    n_q, n_k, causal = size
    if kind == "flex":
        return masks.block_mask(which, n_q, n_k, causal=causal, device=device, block=block)
    if kind == "blocks":
        return _lines(which, n_q, n_k, causal, device, block)
    if kind == "order":  # the reordered pattern, the token at each place, the place of each token
        there = which.reordered(n_k)
        tokens = torch.tensor(there.tokens, device=device)
        return there, tokens, torch.argsort(tokens)
    mask = masks.dense_mask(which, n_q, n_k, causal=causal, device=device)
    return mask, _empty_rows(mask, which.sees_own and n_q <= n_k)


def _is_real(x: torch.Tensor) -> bool:
    """Whether it holds data; of fake tensors nothing may be kept, and nothing asked."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta


def _empty_rows(mask: torch.Tensor, none: bool) -> torch.Tensor | None:
    """``[rows, 1]``: which rows see no key; None if there are none, or known to be none."""
    if none:
        return None
    empty = ~mask.any(dim=-1, keepdim=True)
    if torch.compiler.is_dynamo_compiling() or not _is_real(mask):
        return empty
    return empty if bool(empty.any()) else None


def _lines(which: Pattern, n_q: int, n_k: int, causal: bool, device: Any, block: int) -> list:
    """Of each row of blocks: first query, last, its keys, what is seen of them or None for all."""
    states = masks.blocks(which, n_q, block, causal=causal, seq_len_k=n_k, device=device).tolist()
    see, lines = masks.visible(which, n_q, n_k, causal, device), []
    for line, row in enumerate(states):
        start, stop = line * block, min((line + 1) * block, n_q)
        columns = [c for c, state in enumerate(row) if state != masks.EMPTY]
        spans = [torch.arange(c * block, min((c + 1) * block, n_k)) for c in columns]
        keys = (torch.cat(spans) if spans else torch.arange(0)).to(device)
        seen = None
        if any(row[c] == masks.PARTIAL for c in columns):
            seen = see(torch.arange(start, stop, device=device)[:, None], keys[None, :])
        lines.append((start, stop, keys, seen))
    return lines
