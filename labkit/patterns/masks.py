"""A pattern as a matrix, as blocks, and as FlexAttention's BlockMask.

A matrix costs a byte per score, and building it in one go would cost several times that in
integers.  So the predicate is asked for one row of blocks after another: blocks are counted, and
a BlockMask is made, without the matrix ever being there.

Taught in chapter 11 (a mask saves nothing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from labkit.errors import ArgumentError, check_positive_int
from labkit.patterns.definitions import Pattern

__all__ = ["EMPTY", "FULL", "PARTIAL", "block_mask", "block_mask_bytes", "blocks", "dense_mask"]

EMPTY, PARTIAL, FULL = 0, 1, 2
#: scores whose predicate is evaluated at once
_AT_ONCE = 2**22


def visible(
    which: Pattern, seq_len_q: int, seq_len_k: int, causal: bool, device: Any
) -> Callable[[Any, Any], Any]:
    """A function of query number and key number: pattern and causality together."""
    seen, offset = which.predicate(seq_len_k, device), seq_len_k - seq_len_q
    ahead = which.ahead(seq_len_k, device)

    def see(t, j):
        i = t + offset
        return seen(i, j) & ~ahead(i, j) if causal else seen(i, j)

    return see


def dense_mask(
    which: Pattern,
    seq_len_q: int,
    seq_len_k: int | None = None,
    *,
    causal: bool = False,
    device: Any = None,
) -> torch.Tensor:
    """``[seq_len_q, seq_len_k]`` bool, True where a key is seen."""
    n_q, n_k = _lengths(seq_len_q, seq_len_k)
    rows = max(1, _AT_ONCE // n_k)
    parts = [part for _, part in _rows(which, n_q, n_k, rows, causal, device)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def blocks(
    which: Pattern,
    seq_len_q: int,
    block: int = 128,
    *,
    causal: bool = False,
    seq_len_k: int | None = None,
    device: Any = None,
) -> torch.Tensor:
    """``[⌈Nq/block⌉, ⌈Nk/block⌉]`` int8: 0 empty, 1 partial, 2 full."""
    n_q, n_k = _lengths(seq_len_q, seq_len_k)
    seen, there = counts(which, n_q, n_k, block, causal, device)
    return ((seen > 0).to(torch.int8) + (seen == there).to(torch.int8)).cpu()


def counts(
    which: Pattern, n_q: int, n_k: int, block: int, causal: bool, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores seen in each block, and scores there: two ``[rows, columns]`` int64."""
    block = check_positive_int("block", block)
    lines, columns = math.ceil(n_q / block), math.ceil(n_k / block)
    seen = torch.zeros(lines, columns, dtype=torch.int64, device=device)
    lines_at_once = max(1, _AT_ONCE // (block * n_k))
    for start, part in _rows(which, n_q, n_k, lines_at_once * block, causal, device):
        # to whole blocks, with scores that nobody sees
        beyond = (0, columns * block - n_k, 0, -part.shape[0] % block)
        part = torch.nn.functional.pad(part, beyond)
        found = part.view(-1, block, columns, block).sum((1, 3), dtype=torch.int64)
        seen[start // block : start // block + len(found)] = found
    high = torch.tensor([min(block, n_q - r * block) for r in range(lines)], device=device)
    wide = torch.tensor([min(block, n_k - c * block) for c in range(columns)], device=device)
    return seen, high[:, None] * wide


def block_mask(
    which: Pattern,
    seq_len_q: int,
    seq_len_k: int | None = None,
    *,
    causal: bool = False,
    device: Any = None,
    block: int = 128,
) -> Any:
    """FlexAttention's ``BlockMask``: the lists of partial and of full blocks, and the predicate.

    Full blocks are computed without asking the predicate, empty ones not at all.
    ``torch``'s own ``create_block_mask`` gives the same from the whole matrix of scores.

    Raises
    ------
    ArgumentError
        if this version of torch has no FlexAttention.
    """
    n_q, n_k = _lengths(seq_len_q, seq_len_k)
    try:
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError:
        raise ArgumentError(
            "how", "flex", f"needs FlexAttention, and torch {torch.__version__} has none.",
            'Install torch 2.7 or later, or use how="blocks".',
        ) from None  # fmt: skip
    n_q, n_k = number(n_q), number(n_k)
    # Copies: torch's own code below cannot be traced over a constant itself.
    lists = [x.clone() for x in _lists(recipe(which), n_q, n_k, block, bool(causal), device)]
    see = visible(which, n_q, n_k, causal, device)

    def mask_mod(b, h, t, j):
        return see(t, j)

    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(n_q, n_k)
    )


def block_mask_bytes(mask: Any) -> int:
    """Bytes of a BlockMask's lists."""
    held = [x for x in vars(mask).values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in held)


def constant(function: Callable) -> Callable:
    """Mark what ``torch.compile`` is to run while it traces, and to take the result as it is.

    The mark that ``torch.compiler.assume_constant_result`` sets, which in torch 2.13 loads the
    compiler to do it: seconds for everybody who wants a mask.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant  # in a graph: made while it is traced, not on each call
def _lists(
    of: Any, n_q: int, n_k: int, block: int, causal: bool, device: Any
) -> tuple[torch.Tensor, ...]:
    """Partial and full blocks of each row: two times what ``_list`` gives."""
    which = from_recipe(of)
    with torch.inference_mode(False), torch.no_grad():
        seen, there = counts(which, n_q, n_k, block, causal, device)
        # A block that juts out over the edge stays partial: beyond it there is nothing to see.
        full = (seen == there) & (there == block * block)
        return (*_list((seen > 0) & ~full), *_list(full))


def _list(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of each row, ``[1, 1, rows]``, and which, those first, int32."""
    order = torch.argsort(state.to(torch.int8), dim=1, descending=True, stable=True)
    return state.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _rows(
    which: Pattern, n_q: int, n_k: int, at_once: int, causal: bool, device: Any
) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and ``[rows, n_k]`` bool, from the top to the bottom."""
    see = visible(which, n_q, n_k, causal, device)
    if torch.compiler.is_dynamo_compiling():
        at_once = n_q  # the compiler fuses what follows, so that the integers are never there
    j = torch.arange(n_k, dtype=torch.int32, device=device)[None, :]
    for start in range(0, n_q, at_once):
        stop = min(start + at_once, n_q)
        t = torch.arange(start, stop, dtype=torch.int32, device=device)[:, None]
        yield start, see(t, j).expand(stop - start, n_k)


# -- for a compiler, which is to take lists of blocks for constants ------------------------------


def number(length: int) -> int:
    """A length as a number: ``torch.compile`` may know it as a symbol, and blocks are counted."""
    return range(length, length).start


def recipe(which: Any) -> Any:
    """Class and parameters of a pattern, for :func:`from_recipe`; outside of a compiler, itself.

    What a compiled function makes while it is traced is an object without its parameters to
    whoever is called for a constant.  Its class and its parameters are what they are.
    """
    if not torch.compiler.is_dynamo_compiling():
        return which
    if isinstance(which, int) and not isinstance(which, bool):
        return number(which)
    if not (isinstance(which, Pattern) and is_dataclass(which)):
        return which
    return type(which), tuple((f.name, recipe(getattr(which, f.name))) for f in fields(which))


def from_recipe(of: Any) -> Any:
    """The pattern that :func:`recipe` has taken apart; an equal one, with an equal hash."""
    if not (isinstance(of, tuple) and len(of) == 2 and isinstance(of[0], type)):
        return of
    return of[0](**{name: from_recipe(value) for name, value in of[1]})


def _lengths(seq_len_q: int, seq_len_k: int | None) -> tuple[int, int]:
    n_q = check_positive_int("seq_len_q", seq_len_q)
    return n_q, n_q if seq_len_k is None else check_positive_int("seq_len_k", seq_len_k)
