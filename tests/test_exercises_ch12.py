"""Graders of chapter 12: right answers pass, each plausible mistake is turned away and told why."""

from __future__ import annotations

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch12

# -- the folded solutions, as the chapter prints them ---------------------------------------------


def visible(t, length, stride):
    return max(0, (t + 1 - length) // stride + 1)


def shared(c, block, length, stride, block_size):
    first = max(c * stride, block * block_size)
    end = min(c * stride + length, (block + 1) * block_size)
    return max(0, end - first)


def choose(importance, t, block_size, count, initial, local):
    own = t // block_size
    forced = [own - back for back in range(local)] + list(range(initial))
    rest = sorted(range(own + 1), key=lambda b: -importance[b])
    chosen = []
    for b in forced + rest:
        if 0 <= b <= own and b not in chosen:
            chosen.append(b)
    return sorted(chosen[:count])


def selected(q, K, V, blocks, t, block_size):
    keys = torch.arange(len(K))
    named = torch.tensor([b for b in blocks if b >= 0])
    seen = torch.isin(keys // block_size, named) & (keys <= t)
    if not seen.any():
        return torch.zeros_like(V[0])
    p = torch.softmax(K[seen] @ q / len(q) ** 0.5, dim=0)
    return p @ V[seen]


def operations(seq_len, count, block_size, window, heads, head_dim, head_dim_v):
    keys = count * block_size + window
    return 2 * seq_len * heads * keys * (head_dim + head_dim_v)


RIGHT = {
    "visible": (ch12.visible, visible),
    "shared": (ch12.shared, shared),
    "choose": (ch12.choose, choose),
    "selected": (ch12.selected, selected),
    "operations": (ch12.operations, operations),
}

test_solutions_are_taken = solutions_are_taken(RIGHT)

test_skeletons_are_not_errors = skeletons_are_not_errors(RIGHT)


# -- mistakes -------------------------------------------------------------------------------------


def forced_on_top(importance, t, block_size, count, initial, local):
    own = t // block_size
    forced = {b for b in [*range(initial), *range(own - local + 1, own + 1)] if 0 <= b <= own}
    rest = sorted((b for b in range(own + 1) if b not in forced), key=lambda b: -importance[b])
    return sorted([*forced, *rest[:count]])


def with_order(importance, t, block_size, count, order):
    chosen = list(dict.fromkeys(b for b in order if 0 <= b <= t // block_size))
    return sorted(chosen[:count])


def initial_first(importance, t, block_size, count, initial, local):
    own = t // block_size
    rest = sorted(range(own + 1), key=lambda b: -importance[b])
    order = [own, *range(initial), *(own - back for back in range(1, local)), *rest]
    return with_order(importance, t, block_size, count, order)


def higher_wins(importance, t, block_size, count, initial, local):
    own = t // block_size
    rest = sorted(range(own + 1), key=lambda b: (-importance[b], -b))
    order = [*(own - back for back in range(local)), *range(initial), *rest]
    return with_order(importance, t, block_size, count, order)


def only_positive(importance, t, block_size, count, initial, local):
    own = t // block_size
    rest = [b for b in sorted(range(own + 1), key=lambda b: -importance[b]) if importance[b] > 0]
    order = [*(own - back for back in range(local)), *range(initial), *rest]
    return with_order(importance, t, block_size, count, order)


def not_forced(importance, t, block_size, count, initial, local):
    return sorted(sorted(range(t // block_size + 1), key=lambda b: -importance[b])[:count])


def into_the_future(importance, t, block_size, count, initial, local):
    order = sorted(range(len(importance)), key=lambda b: -importance[b])
    return sorted([t // block_size, *(b for b in order if b != t // block_size)][:count])


def by_importance(*arguments):
    return sorted(choose(*arguments), key=lambda b: -arguments[0][b])


def gathered(q, K, V, blocks, t, block_size, *, past=lambda j, t: j <= t, used=lambda b: b >= 0):
    seen = [j for b in blocks if used(b) for j in range(b * block_size, (b + 1) * block_size)]
    seen = [j for j in seen if -len(K) <= j < len(K) and past(j, t)]
    if not seen:
        return torch.zeros_like(V[0])
    return torch.softmax(K[seen] @ q / len(q) ** 0.5, dim=0) @ V[seen]


def unscaled(q, K, V, blocks, t, block_size):
    return selected(q * len(q) ** 0.5, K, V, blocks, t, block_size)


def nan_for_nothing(q, K, V, blocks, t, block_size):
    seen = torch.isin(torch.arange(len(K)) // block_size, torch.tensor(blocks))
    seen &= torch.arange(len(K)) <= t
    s = torch.where(seen, K @ q / len(q) ** 0.5, float("-inf"))
    return torch.softmax(s, dim=0) @ V


def the_future(q, K, V, blocks, t, block_size):
    return selected(q, K, V, blocks, len(K), block_size)


def claim(n, count, size, window, heads, d, dv):
    return n * heads * (count * size * (d + dv) + window * d)


WRONG = {
    "begun": (ch12.visible, lambda t, length, stride: t // stride + 1, "begun"),
    "strictly": (
        ch12.visible,
        lambda t, length, stride: max(0, (t - length) // stride + 1),
        "≤, not <",
    ),
    "minus one": (ch12.visible, lambda t, length, stride: (t + 1 - length) // stride + 1, "−1"),
    "equal sizes": (ch12.visible, lambda t, length, stride: (t + 1) // length, "complete"),
    "negative overlap": (
        ch12.shared,
        lambda c, b, n, d, s: min(c * d + n, (b + 1) * s) - max(c * d, b * s),
        "negative",
    ),
    "inside or not": (
        ch12.shared,
        lambda c, b, n, d, s: n if b * s <= c * d < (b + 1) * s else 0,
        "stands for tokens",
    ),
    "in strides": (
        ch12.shared,
        lambda c, b, n, d, s: shared(c, b, n, d, s) / d,
        "stands for tokens",
    ),
    "on top": (ch12.choose, forced_on_top, "on top"),
    "initial before previous": (ch12.choose, initial_first, "Forced first"),
    "higher": (ch12.choose, higher_wins, "lower number"),
    "only positive": (ch12.choose, only_positive, "Importance 0"),
    "not forced": (ch12.choose, not_forced, "not see itself"),
    "future": (ch12.choose, into_the_future, "future"),
    "by importance": (ch12.choose, by_importance, "ascending"),
    "a tensor": (ch12.choose, lambda *x: torch.tensor(choose(*x)), "Return a list"),
    "reads the future": (ch12.selected, the_future, "after t"),
    "twice": (ch12.selected, gathered, "counts once"),
    "minus one as a row": (
        ch12.selected,
        lambda *x: gathered(*x, used=lambda b: True),
        "unused slot",
    ),
    "without itself": (
        ch12.selected,
        lambda q, K, V, blocks, t, s: selected(q, K, V, blocks, t - 1, s),
        "Key t itself",
    ),
    "unscaled": (ch12.selected, unscaled, "1/√D"),
    "NaN": (ch12.selected, nan_for_nothing, "not finite"),
    "wrong shape": (ch12.selected, lambda *x: selected(*x)[None], "tensor of 3"),
    "claim": (ch12.operations, claim, "as it stands"),
    "multiply-adds": (ch12.operations, lambda *x: operations(*x) // 2, "two operations"),
    "window half": (ch12.operations, lambda *x: 2 * claim(*x), "product with V, too"),
    "V as wide as D": (
        ch12.operations,
        lambda n, c, s, w, h, d, dv: operations(n, c, s, w, h, d, d),
        "head_dim_v",
    ),
    "no window": (
        ch12.operations,
        lambda n, c, s, w, h, d, dv: operations(n, c, s, 0, h, d, dv),
        "Two products",
    ),
}

test_mistakes_are_turned_away = mistakes_are_turned_away(WRONG)
