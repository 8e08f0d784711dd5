"""Exercises of chapter 07 (whether softmax can be computed before all scores are known)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import Unanswered, call, exercise, expect, expect_number

__all__ = ["attention", "combine", "merge", "normalizer", "stagnation"]

_GUARD = "−∞ − (−∞) is NaN: decide what to subtract where nothing has been seen yet."


def _random(*shape: int, seed: int = 7) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _same(a: Any, b: Any) -> bool:
    import torch

    return a.shape == b.shape and torch.allclose(a.double(), b, rtol=1e-9, atol=1e-9)


def _expect_tensors(got: Any, names: tuple[str, ...], like: tuple[Any, ...], where: str) -> None:
    import torch

    expect(
        isinstance(got, (tuple, list)) and len(got) == len(names),
        f"Return {len(names)} tensors: {', '.join(names)}, in this order.",
    )
    if any(t is None or t is ... for t in got):
        raise Unanswered
    for name, tensor, right in zip(names, got, like, strict=True):
        expect(
            isinstance(tensor, torch.Tensor),
            f"{where}{name} should be a tensor, not {type(tensor).__name__}.",
        )
        expect(
            tensor.shape == right.shape,
            f"{where}{name} has shape {list(tensor.shape)}, not {list(right.shape)}.",
        )


@exercise("One pass")
def normalizer(answer: Any) -> str:
    """Grade ``normalizer(scores)``, which gets an iterator and returns (m, l)."""
    cases = [
        [1.0, 3.0, 2.0],
        [3.0, 2.0, 1.0],
        [-800.0, -801.0],
        [5.0, 900.0, 899.0, 4.0],
        [-math.inf, -math.inf, 2.0, 1.0],
        [0.0] * 7,
        [4.0],
    ]
    for scores in cases:
        got = call(answer, iter(scores))
        where = f"for the scores {', '.join(f'{s:g}' for s in scores)}: "
        expect(
            isinstance(got, (tuple, list)) and len(got) == 2,
            f"{where}return two numbers, m and l.",
        )
        if any(x is None or x is ... for x in got):
            raise Unanswered
        m, total = (expect_number(x, name) for x, name in zip(got, ("m", "l"), strict=True))
        largest = max(scores)
        right = sum(math.exp(s - largest) for s in scores)
        expect(not (math.isnan(m) or math.isnan(total)), f"{where}you return NaN. {_GUARD}")
        expect(
            m == largest,
            f"{where}m is {m:g}, the largest score is {largest:g}. m must follow the maximum.",
        )
        running, naive, first = -math.inf, 0.0, scores[0]
        for s in scores:
            running = max(running, s)
            naive += math.exp(s - running) if s > -math.inf else 0.0
        unshifted = sum(math.exp(min(s - first, 700.0)) for s in scores if first > -math.inf)
        hint = ""
        if math.isclose(total, naive) and not math.isclose(naive, right):
            hint = "When m grows, what is already in l was measured from the old m: rescale it."
        elif math.isclose(total, unshifted) and not math.isclose(unshifted, right):
            hint = "Measure the exponentials from the largest score, not from the first."
        expect(
            math.isclose(total, right, rel_tol=1e-9),
            f"{where}l is {total:.6g}, it should be {right:.6g}. {hint}".rstrip(),
        )
    return "each score was read once, in order, and never kept."


@exercise("Merge two states")
def merge(answer: Any) -> str:
    """Grade ``merge(a, b)`` of two states, tuples (m, l, O), in float64."""
    import torch

    S, V = _random(4, 9) * 6, _random(9, 3, seed=8)
    S[1, :4] = -math.inf  # a row that the first state has not seen
    S[2, 4:] = -math.inf  # one that the second has not
    S[3] = -math.inf  # and one that neither has

    def state(part: slice) -> tuple[Any, Any, Any]:
        s, v = S[:, part], V[part]
        m = s.amax(-1)
        p = torch.exp(s - torch.where(m == -math.inf, 0.0, m)[:, None])
        return m, p.sum(-1), p @ v

    for rows, what in (
        (slice(0, 1), "two states that have seen scores"),
        (slice(0, 4), "with rows that one state, or neither, has seen"),
    ):
        a, b, right = (
            tuple(t[rows] for t in state(part)) for part in (slice(0, 4), slice(4, 9), slice(0, 9))
        )
        for one, other, which in ((a, b, "merge(a, b), "), (b, a, "merge(b, a), ")):
            where = f"{which}{what}: "
            keep = [t.clone() for t in (*one, *other)]
            got = call(answer, one, other)
            _expect_tensors(got, ("m", "l", "O"), right, where)
            expect(
                all(torch.equal(x, y) for x, y in zip(keep, (*one, *other), strict=True)),
                f"{where}your function changed its inputs.",
            )
            m, total, out = got
            expect(not any(t.isnan().any() for t in got), f"{where}there is a NaN. {_GUARD}")
            expect(torch.equal(m.double(), right[0]), f"{where}m should be the larger of the two.")
            hint = _merge_hint(total, out, one, other, right)
            expect(_same(total, right[1]), f"{where}l is wrong. {hint}".rstrip())
            expect(_same(out, right[2]), f"{where}O is wrong. {hint}".rstrip())
    return "both ways round, and where a side has seen nothing."


def _merge_hint(total: Any, out: Any, a: Any, b: Any, right: Any) -> str:
    import torch

    m = right[0]
    base = torch.where(m == -math.inf, 0.0, m)
    wa, wb = torch.exp(a[0] - base), torch.exp(b[0] - base)
    if _same(total, a[1] + b[1]):
        return "The two l are measured from different maxima: bring both to the new m first."
    if not _same(total, right[1]):
        one_sided = _same(total, wa * a[1] + b[1]) or _same(total, a[1] + wb * b[1])
        return "Either side may have the smaller m: both are rescaled." if one_sided else ""
    if _same(out, a[2] + b[2]):
        return "O is a sum of exponentials like l: it is rescaled by the same factors."
    if _same(out, right[2] / right[1].clamp_min(1e-300)[..., None]):
        return "Do not divide by l yet: a divided O cannot be merged by this rule again."
    return "Its factors are those of l, one per row."


class _NoSquare:
    """Notices a tensor of Nq × Nk scores, by watching what every operation returns."""

    def __init__(self, n_q: int, n_k: int) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        watcher = self
        self.found = False

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                for leaf in tree_leaves(result):
                    shape = tuple(getattr(leaf, "shape", ()))
                    if shape[-2:] in ((n_q, n_k), (n_k, n_q)):
                        watcher.found = True
                return result

        self.mode = Mode()


@exercise("Attention in one pass over the keys")
def attention(answer: Any) -> str:
    """Grade ``attention(q, k, v, block)`` for one head, ``[seq_len, head_dim]``, in float64."""
    import torch

    cases = (
        (3, 8, 4, 2, 4, 1.0), (5, 23, 4, 3, 7, 1.0), (2, 6, 4, 5, 6, 1.0),
        (6, 9, 4, 3, 3, 1e3),  # scores a thousand times larger in the later blocks
    )  # fmt: skip
    for n_q, n_k, d, dv, block, growth in cases:
        q, k, v = _random(n_q, d) * 3, _random(n_k, d, seed=8), _random(n_k, dv, seed=9) + 1
        k[block:] *= growth
        s = q @ k.T * d**-0.5
        right = torch.softmax(s, -1) @ v
        watch = _NoSquare(n_q, n_k)
        if block < n_k:
            with watch.mode:
                got = call(answer, q.clone(), k.clone(), v.clone(), block)
        else:
            got = call(answer, q.clone(), k.clone(), v.clone(), block)
        where = f"for {n_q} queries, {n_k} keys and blocks of {block}: "
        expect(
            isinstance(got, torch.Tensor),
            f"{where}the result should be a tensor, not {type(got).__name__}.",
        )
        expect(
            got.shape == right.shape,
            f"{where}the result has shape {list(got.shape)}, not {list(right.shape)}.",
        )
        grown = "The later scores are in the thousands: m must follow the largest so far."
        expect(
            got.isfinite().all(),
            f"{where}the result is not finite. {_GUARD if growth == 1 else grown}",
        )
        why = next((text for wrong, text in _mistakes(s, v, d, block) if _same(got, wrong)), "")
        expect(_same(got, right), f"{where}the result is not softmax(S) V. {why}".rstrip())
        expect(
            not watch.found,
            f"{where}right, but a tensor of {n_q} × {n_k} scores was made. One block at a time.",
        )
    return "any block, dividing or not, and never more than one block of scores at a time."


def _mistakes(s: Any, v: Any, d: int, block: int) -> list[tuple[Any, str]]:
    """What plausible errors would give, with what to say of each."""
    import torch

    def run(
        s: Any, *, l_rescaled: bool = True, o_rescaled: bool = True, follow: bool = True,
        divide: bool = False, drop: bool = False,
    ) -> Any:  # fmt: skip
        m = torch.full_like(s[:, 0], -math.inf)
        total, out = torch.zeros_like(m), s.new_zeros(s.shape[0], v.shape[1])
        for start in range(0, s.shape[1], block):
            part, values = s[:, start : start + block], v[start : start + block]
            if drop and part.shape[1] < block:
                break
            new = torch.maximum(m, part.amax(-1)) if follow or start == 0 else m
            alpha = torch.exp(m - new) if follow or start == 0 else torch.ones_like(m)
            p = torch.exp(part - new[:, None])
            total = total * (alpha if l_rescaled or start == 0 else 1) + p.sum(-1)
            out = out * (alpha[:, None] if o_rescaled or start == 0 else 1) + p @ values
            m = new
            if divide:
                out = out / total[:, None]
        return out if divide else out / total[:, None]

    return [
        (run(s, o_rescaled=False), "O was collected under the old m: rescale it by α as well."),
        (run(s, l_rescaled=False), "l was collected under the old m: rescale it by α as well."),
        (
            run(s, l_rescaled=False, o_rescaled=False),
            "Nothing is rescaled when m grows: the blocks are weighed by different maxima.",
        ),
        (run(s, divide=True), "Divide by l once, after the last block."),
        (run(s, drop=True), "The last, shorter block of keys is missing."),
        (run(s * d**0.5), "The scores lack the scale 1/√d."),
        (torch.softmax(s[:, -block:], -1) @ v[-block:], "That is the last block alone."),
    ]


@exercise("Combine the splits")
def combine(answer: Any) -> str:
    """Grade ``combine(outputs, lses)``: ``[pieces, rows, dv]`` and ``[pieces, rows]``."""
    import torch

    for shift, cuts in ((0.0, (3, 8)), (900.0, (1, 2, 7)), (-900.0, (4,))):
        S, V = _random(3, 10) * 3 + shift, _random(10, 4, seed=8)
        parts = list(zip((0, *cuts), (*cuts, 10), strict=True))
        outs = torch.stack([torch.softmax(S[:, a:b], -1) @ V[a:b] for a, b in parts])
        lses = torch.stack([S[:, a:b].logsumexp(-1) for a, b in parts])
        right = torch.softmax(S, -1) @ V, S.logsumexp(-1)
        got = call(answer, outs.clone(), lses.clone())
        where = f"for {len(parts)} splits" + (f", scores around {shift:g}" if shift else "") + ": "
        _expect_tensors(got, ("O", "LSE"), right, where)
        out, lse = got
        expect(
            all(t.isfinite().all() for t in got),
            f"{where}the result is not finite. Subtract the largest LSE before the exponential.",
        )
        why = ""
        if _same(out, outs.mean(0)):
            why = "A plain mean: a split with larger scores counts for more."
        elif _same(out, (torch.softmax(lses, 0)[..., None] * outs).mean(0)):
            why = "The weights sum to 1 already: sum, do not average."
        elif _same(out, (lses[..., None] * outs).sum(0) / lses.sum(0)[..., None]):
            why = "The weight of a split is e to its LSE, not the LSE."
        expect(_same(out, right[0]), f"{where}O is wrong. {why}".rstrip())
        hint = "It is the log-sum-exp of the LSEs."
        expect(_same(lse, right[1]), f"{where}LSE is wrong. {hint}")
    return "the pieces may come from other blocks, other SMs or other GPUs."


@exercise("Where a sum stops")
def stagnation(answer: Any) -> str:
    """Grade after how many equal scores a bfloat16 l, fed 32 keys at a time, stands still."""
    from labkit.online_softmax import stagnates_at

    said = expect_number(answer, "The answer")
    import torch

    right = stagnates_at(torch.bfloat16, 32)
    hints = {
        256.0: "That is for one key at a time; here a block of 32 is summed first, then added.",
        32.0 * 128: "bfloat16 has 8 significant bits, the hidden one included.",
        2048.0: "That is float16's 11 bits, one key at a time.",
        32.0 * 2048: "That is float16's 11 bits.",
        8.0: "Divide by the size of a block to get blocks; the question asks for keys.",
        256.0 / 32: "The blocks are added, not divided.",
    }
    why = hints.get(said, "When is 32 half of the distance between neighbouring bfloat16 numbers?")
    expect(said == right, f"you say {said:g}. {why}")
    return f"{right:,.0f} keys, 256 blocks of 32; a float32 l would go on to 2²⁴ blocks."
