"""The program that runs cases of Native Sparse Attention on the GPU and judges them in float64.

Started by ``labkit.experiments.nsa_correctness``, several side by side; see ``_correctness``.

A *road* is one of the kernels that can compute a case:

``default``
    what the public function chooses by itself.
``queries``, ``keys``, ``by_hand``
    the kernels of selection: along the union of neighbours' blocks, block by block, and those
    written by hand for Hopper.  The first two share the stock backward kernels.
``inference``
    the whole layer without gradients to come: the selection's kernel may add up the branches.

What is right is computed here by the book, in float64 and dense: every branch is attention over
all keys under a mask, a few rows at a time, and the gradients are the formulas of chapter 09.
The yardstick is the same in the dtype of the case.  The tests have another oracle, written apart,
and compare the two.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from labkit.experiments._correctness import on_every_road, serve
from labkit.experiments._flash_worker import base_two, compared, remade
from labkit.experiments._nsa_cases import Case, make, positions

__all__ = ["Case", "attend", "far", "judge", "make", "roads", "run"]

_EPS32 = torch.finfo(torch.float32).eps
#: scores that are held at once: 128 MiB of float64
_AT_ONCE = 2**24
#: gates, by the letter that a case names them with
_GATES = {"c": "g_cmp", "s": "g_slc", "w": "g_swa"}

#: o, lse, dq, dk, dv; heads come first here, as in ``_flash_worker``
Tensors = dict[str, torch.Tensor]


# -- by the book ---------------------------------------------------------------------------------


def branch(q, k, v, dout, seen: Callable, scale: float, low: tuple | None = None) -> Tensors:
    """Attention of q ``[B, HQ, M, D]`` to k, v ``[B, H, N, ·]`` where ``seen(i, j)`` allows.

    ``seen(i, j)`` gives the mask of rows i … j − 1, ``[B or 1, HQ or 1, j − i, N]``.  With ``low``,
    the inputs in the dtype of the case, also the errors that are admitted, named ``o±`` and so on,
    and the largest score.
    """
    group, m, n = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if n == 0:
        o, lse = torch.zeros_like(dout), q.new_full(q.shape[:3], -math.inf)
        out = {"o": o, "lse": lse, "dq": torch.zeros_like(q), "dk": torch.zeros_like(k),
               "dv": torch.zeros_like(v)}  # fmt: skip
        zeros = {f"{x}±": torch.zeros_like(out[x]) for x in ("o", "dq", "dk", "dv")}
        return out | (zeros | {"largest": q.new_zeros(())} if low is not None else {})
    all_k, all_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    parts: dict[str, list] = {"o": [], "lse": [], "dq": []}
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    more_k, more_v, largest = torch.zeros_like(dk), torch.zeros_like(dv), q.new_zeros(())
    if low is not None:
        parts |= {"o±": [], "dq±": []}
    step = max(1, _AT_ONCE // (q.shape[0] * q.shape[1] * n))
    for i in range(0, m, step):
        rows = slice(i, min(m, i + step))
        qi, di = q[:, :, rows], dout[:, :, rows]
        dark = ~seen(rows.start, rows.stop)
        s = (qi @ all_k.mT * scale).masked_fill(dark, -math.inf)
        blind = torch.isneginf(s).all(-1, keepdim=True)
        safe = s.masked_fill(blind, 0.0)
        p = safe.softmax(-1).masked_fill(blind, 0.0)
        parts["o"].append(p @ all_v)
        parts["lse"].append(safe.logsumexp(-1).masked_fill(blind[..., 0], -math.inf))
        dp = di @ all_v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        parts["dq"].append(ds @ all_k)
        dk += (ds.mT @ qi).unflatten(1, (-1, group)).sum(2)
        dv += (p.mT @ di).unflatten(1, (-1, group)).sum(2)
        if low is not None:
            ql, kl, vl, dl = low
            parts["o±"].append(base_two(qi, k, v, s, p))
            each = remade(ql[:, :, rows], kl, vl, dl[:, :, rows], None, s, p, scale)
            parts["dq±"].append(each[0])
            more_k += each[1].square()
            more_v += each[2].square()
            largest = torch.maximum(largest, torch.where(torch.isneginf(s), 0.0, s).abs().max())
    out = {name: torch.cat(x, 2) for name, x in parts.items()}
    out |= {"dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}
    if low is not None:
        out |= {"dk±": more_k.sqrt(), "dv±": more_v.sqrt(), "largest": largest}
    return out


def _places(case: Case, device: Any) -> tuple[torch.Tensor, ...]:
    """Sequence and position of queries and of keys."""
    at, _ = positions(case, device)
    if case.offsets is None:
        keys = torch.arange(case.t, device=device)
        return torch.zeros_like(at), at, torch.zeros_like(keys), keys
    spans = [b - a for a, b in pairwise(case.offsets)]
    number = torch.tensor([s for s, n in enumerate(spans) for _ in range(n)], device=device)
    return number, at, number, at


def see_chosen(case: Case, blocks: torch.Tensor) -> Callable:
    """The mask of selection; ``blocks`` ``[B, M, H, S]`` with −1 where a slot is not used."""
    seq_q, at, seq_k, pos = _places(case, blocks.device)
    exist = int(pos.max()) // case.block + 1

    def seen(i: int, j: int) -> torch.Tensor:
        index = blocks[:, i:j].long()
        named = torch.zeros(*index.shape[:3], exist + 1, dtype=torch.bool, device=blocks.device)
        named.scatter_(3, torch.where(index < 0, exist, index), True)
        named = named[..., pos // case.block].transpose(1, 2)  # [B, H, rows, N]
        past = (seq_q[i:j, None] == seq_k) & (pos <= at[i:j, None])
        return (named & past).repeat_interleave(case.group, dim=1)

    return seen


def see_window(case: Case, device: Any) -> Callable:
    """The mask of the window."""
    seq_q, at, seq_k, pos = _places(case, device)

    def seen(i: int, j: int) -> torch.Tensor:
        behind = at[i:j, None] - pos
        return ((seq_q[i:j, None] == seq_k) & (behind >= 0) & (behind < case.window))[None, None]

    return seen


def see_compressed(case: Case, device: Any) -> Callable:
    """The mask of compression: a staircase for each sequence."""
    seq_q, at, _, _ = _places(case, device)
    last, number = [], []
    for s, (a, b) in enumerate(pairwise(case.offsets or [0, case.t])):
        ends = range(case.own_length - 1, b - a, case.own_stride)
        last += ends
        number += [s] * len(ends)
    last, number = (torch.tensor(x, device=device, dtype=torch.long) for x in (last, number))
    return lambda i, j: ((seq_q[i:j, None] == number) & (last <= at[i:j, None]))[None, None]


def _pooled(x: torch.Tensor, case: Case) -> tuple[torch.Tensor, Callable]:
    """Means of blocks, ``[B, H, C, ·]``, and what carries a gradient of them back to x."""
    from labkit.nsa.pooling import pool_mean

    cu = None if case.offsets is None else torch.tensor(case.offsets, device=x.device)
    leaf = x.detach().transpose(1, 2).requires_grad_()
    with torch.enable_grad():
        means = pool_mean(leaf, case.own_length, case.own_stride, cu_seqlens=cu)

    def back(gradient: torch.Tensor) -> torch.Tensor:
        if means.shape[1] == 0:
            return torch.zeros_like(x)
        (out,) = torch.autograd.grad(means, leaf, gradient.transpose(1, 2), retain_graph=True)
        return out.transpose(1, 2)

    return means.detach().transpose(1, 2), back


def compressed(q, k, v, dout, case: Case, low: tuple | None = None) -> Tensors:
    """The branch of compression, its gradients carried back to k and v.

    Means are rounded to the dtype of the case, as every tensor is that attention is given.
    """
    (k_cmp, back_k), (v_cmp, back_v) = _pooled(k, case), _pooled(v, case)
    if low is not None:
        low = (low[0], _pooled(low[1], case)[0], _pooled(low[2], case)[0], low[3])
        k_cmp, v_cmp = low[1].double(), low[2].double()
    out = branch(q, k_cmp, v_cmp, dout, see_compressed(case, q.device), case.d**-0.5, low)
    for name, back in (("dk", back_k), ("dv", back_v)):
        out[name] = back(out[name])
        if low is not None:
            out[f"{name}±"] = back(out[f"{name}±"])
    return out


def whole(q, k, v, gates, dout, blocks, case: Case, low: tuple | None = None) -> Tensors:
    """The gated sum of the branches, and every gradient; heads first, gates ``[B, HQ, M]``."""
    total: Tensors = {}
    for name, gate in gates.items():
        own = gate[..., None] * dout
        lows = None if low is None else (*low[:3], (gate[..., None] * dout).to(low[3].dtype))
        if name == "g_cmp":
            part = compressed(q, k, v, own, case, lows)
        else:
            seen = see_chosen(case, blocks) if name == "g_slc" else see_window(case, q.device)
            part = branch(q, k, v, own, seen, case.d**-0.5, lows)
        total[f"d{name}"] = (dout * part["o"]).sum(-1)
        part["o"] = gate[..., None] * part["o"]
        if low is not None:
            total[f"d{name}±"] = (dout.square() * part["o±"].square()).sum(-1).sqrt()
            part["o±"] = gate[..., None] * part["o±"]
        for x in ("o", "dq", "dk", "dv", "o±", "dq±", "dk±", "dv±"):
            if x in part:
                total[x] = part[x] if x not in total else total[x] + part[x]
    return total


# -- judging -------------------------------------------------------------------------------------


def _used(blocks, counts, case: Case) -> torch.Tensor:
    """−1 in the slots that are not used."""
    slot = torch.arange(case.slots, device=blocks.device)
    if case.counts == "int":
        return torch.where(slot < min(2, case.slots), blocks, -1)
    return torch.where(slot < counts[..., None], blocks, -1) if case.counts == "tensor" else blocks


def judge(case: Case, tensors: tuple, got: Tensors) -> dict[str, dict[str, float]]:
    """What ``compared`` says of each tensor, and of the choice of blocks."""
    q, k, v, *gates, dout, blocks, counts = tensors
    first = [x.transpose(1, 2) for x in (q, k, v, dout)]
    double = [x.double() for x in first]
    if case.part == "whole":
        blocks = got.get("blocks")
        given = zip(_GATES.items(), gates, strict=True)
        weights = {name: g.mT for (letter, name), g in given if letter in case.gates}
        exact = {n: g.double() for n, g in weights.items()}
        true = whole(*double[:3], exact, double[3], blocks, case, tuple(first))
        plain = whole(*first[:3], weights, first[3], blocks, case)
    elif case.part == "compression":
        true = compressed(*double, case, tuple(first))
        plain = compressed(*first, case)
    else:
        seen = see_chosen(case, _used(blocks, counts, case))
        true = branch(*double, seen, case.d**-0.5, tuple(first))
        plain = branch(*first, seen, case.d**-0.5)
    out = {}
    for name, own in got.items():
        if name in ("blocks", "lse"):
            continue
        own = own.transpose(1, 2) if own.dim() == 4 else own.mT
        wanted = true[name]
        rounding = torch.finfo(own.dtype).eps * max(1e-30, wanted.abs().max().item())
        out[name] = compared(own, wanted, plain[name].double(), true.get(f"{name}±"), rounding)
    if case.part == "whole":
        if blocks is not None:
            out["choice"] = judge_choice(case, q, k, blocks)
    else:
        blind = torch.isneginf(true["lse"])
        if torch.equal(torch.isneginf(got["lse"]), blind):
            own, wanted = (x.masked_fill(blind, 0.0) for x in (got["lse"], true["lse"]))
            # LSE is float32 whatever the inputs are: admitted are some roundings of the scores.
            rounding = 16 * _EPS32 * max(1.0, true["largest"].item())
            out["lse"] = compared(own, wanted, wanted, None, rounding)
        else:
            out["lse"] = dict.fromkeys(("error", "plain", "allowed", "rms", "rms_plain"), 0.0)
            out["lse"] |= {"ratio": math.inf}
    return out


def judge_choice(case: Case, q, k, blocks) -> dict[str, float]:
    """How much worse than the best the chosen blocks are, over what is admitted.

    Compares scores and not numbers: of two blocks whose importance differs by a rounding, either
    may be chosen.  Anything else that a choice must be (ascending, forced blocks, none of the
    future, as many as there are) is judged exactly.
    """
    from labkit.nsa.pooling import overlap_weights

    _, at, _, _ = _places(case, q.device)
    k_cmp, _ = _pooled(k.transpose(1, 2), case)
    seen = see_compressed(case, q.device)
    own, slots = at // case.block, blocks.shape[3]
    initial, local = case.forced
    wrong, worst = 0, 0.0
    offsets = case.offsets or [0, case.t]
    starts, counts = [], 0
    for a, b in pairwise(offsets):
        starts.append(counts)
        counts += max(0, (b - a - case.own_length) // case.own_stride + 1)
    step = max(1, _AT_ONCE // max(1, case.batch * case.heads * max(1, counts)))
    for s, (a, b) in enumerate(pairwise(offsets)):
        if a == b:
            continue
        weights = overlap_weights(
            b - a, length=case.own_length, stride=case.own_stride, block_size=case.block,
            dtype=torch.float64, device=q.device,
        )  # fmt: skip
        rows = torch.arange(q.shape[1], device=q.device) if case.offsets is None else None
        first, last = (0, q.shape[1]) if rows is not None else (a, b)
        for i in range(first, last, step):
            j = min(last, i + step)
            here = slice(starts[s], starts[s] + weights.shape[0])
            qi = q[:, i:j].transpose(1, 2).double()
            keys = k_cmp[:, :, here].double().repeat_interleave(case.group, dim=1)
            dark = ~seen(i, j)[..., here]
            scores = (qi @ keys.mT * case.d**-0.5).masked_fill(dark, -math.inf)
            p = scores.softmax(-1).nan_to_num(0.0) if weights.shape[0] else scores
            importance = p.unflatten(1, (-1, case.group)).sum(2) @ weights  # [B, H, rows, blocks]
            bad, gap = _worse(importance.transpose(1, 2), blocks[:, i:j].long(), own[i:j],
                              slots, initial, local)  # fmt: skip
            wrong, worst = wrong + bad, max(worst, gap)
    allowed = 2e-5
    return {"error": worst, "plain": 0.0, "allowed": allowed, "rms": 0.0, "rms_plain": 0.0,
            "ratio": math.inf if wrong else worst / allowed}  # fmt: skip


def _worse(importance, chosen, own, slots: int, initial: int, local: int) -> tuple[int, float]:
    """Rows that no rule allows, and by how much the worst row falls short of its best choice."""
    count = importance.shape[-1]
    block = torch.arange(count, device=chosen.device)
    back = own[:, None] - block  # [rows, blocks]
    exists = back >= 0
    forced = exists & ((back < local) | (block < initial))
    named = torch.zeros(*chosen.shape[:3], count + 1, dtype=torch.bool, device=chosen.device)
    named.scatter_(3, torch.where(chosen < 0, count, chosen.clamp(max=count)), True)
    named = named[..., :count]
    wanted = torch.minimum(own + 1, torch.tensor(slots, device=own.device))[None, :, None]
    filled = (chosen >= 0).sum(-1)
    ascending = ((chosen.diff() > 0) | (chosen[..., 1:] < 0)).all(-1)
    good = (filled == wanted) & (named.sum(-1) == wanted) & ascending
    good &= ~(named & ~exists[:, None]).any(-1)
    # the forced ones, most urgent first, as far as there are slots: current, previous, …, initial
    rank = torch.where(back < local, back, local + block).masked_fill(~forced, count + 99)
    place = rank[:, None].argsort(dim=-1, stable=True).argsort(dim=-1)
    must = forced[:, None] & (place < slots)
    good &= ~(must & ~named).any(-1)
    # of the others the best: the lowest chosen score against the highest that was left
    free, left = named & ~forced[:, None], exists[:, None] & ~forced[:, None] & ~named
    lowest = importance.masked_fill(~free, math.inf).amin(-1)
    highest = importance.masked_fill(~left, -math.inf).amax(-1)
    gap = (highest - lowest).clamp(min=0.0).masked_fill(~free.any(-1), 0.0)
    relative = gap / highest.clamp(min=1.0)
    return int((~good).sum()), float(relative.max())


# -- roads ---------------------------------------------------------------------------------------


def _call(q, k, case: Case):
    from labkit.nsa import api

    cu = None if case.offsets is None else torch.tensor(case.offsets, device=q.device)
    return api._call(q, k, cu, scale=None, precision=None, block_size=case.block)


def roads(q, k, v, g_cmp, g_slc, g_swa, dout, blocks, counts, case: Case) -> list[str]:
    """Which kernels can compute these tensors."""
    if case.part != "selection":
        return ["default", "inference"] if case.part == "whole" else ["default"]
    found = ["default", "queries", "keys"]
    try:
        from labkit.nsa import hopper, hopper_backward, selection
    except ImportError:
        return found
    call = _call(q, k, case)
    if hopper.supports(q, k, v, call) and hopper_backward.supports(q, k, v, call):
        found.append("by_hand")
        if selection.can_agree(q, k, case.slots):
            found.append("both")
    return found


def attend(
    q, k, v, g_cmp, g_slc, g_swa, dout, blocks, counts, case: Case, road: str
) -> Tensors:  # fmt: skip
    """What the case gives by one road; ``blocks`` is what the whole layer chose."""
    from labkit.nsa import (
        nsa_compressed_attention,
        nsa_func,
        nsa_selected_attention,
        selection,
        selection_backward,
    )

    cu = None if case.offsets is None else torch.tensor(case.offsets, device=q.device)
    how = {"cu_seqlens": cu}
    if road not in ("default", "inference"):
        used = _used(blocks, counts, case).contiguous()
        call = _call(q, k, case)
        forward = "hopper" if road == "by_hand" else road
        o, lse = selection.forward(q, k, v, used, call, road=forward)
        back = "hopper" if road in ("by_hand", "both") else "keys"
        grads = selection_backward.backward(
            dout, None, q, k, v, o, lse, used, call, road=back
        )  # fmt: skip
        return {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    names, extra = ["dq", "dk", "dv"], {}
    if case.part == "whole":
        gates = [
            g.detach().requires_grad_() if letter in case.gates else None
            for letter, g in zip(_GATES, (g_cmp, g_slc, g_swa), strict=True)
        ]
        with torch.set_grad_enabled(road != "inference"):
            o, found = nsa_func(
                *leaves, *gates, block_counts=case.slots, block_size=case.block,
                window_size=case.window, forced=case.forced, return_attn_weights=True, **how,
            )  # fmt: skip
        names += [f"d{n}" for n, g in zip(_GATES.values(), gates, strict=True) if g is not None]
        leaves += [g for g in gates if g is not None]
        if found["selection"]["block_indices"] is not None:
            extra = {"blocks": found["selection"]["block_indices"]}
        if road == "inference":
            return {"o": o} | extra
    elif case.part == "compression":
        o, lse = nsa_compressed_attention(
            *leaves, block_size=case.own_length, stride=case.own_stride, return_lse=True, **how
        )
        extra = {"lse": lse.detach()}
    else:
        used = {"all": None, "int": min(2, case.slots), "tensor": counts}[case.counts]
        o, lse = nsa_selected_attention(*leaves, blocks, used, case.block, return_lse=True, **how)
        extra = {"lse": lse.detach()}
    grads = torch.autograd.grad(o, leaves, dout)
    return {"o": o.detach()} | extra | dict(zip(names, grads, strict=True))


def run(case: Case, device: str = "cuda") -> list[dict[str, Any]]:
    """Every road of one case, judged; outputs are full of NaN before they are written."""
    rows = on_every_road(sys.modules[__name__], case, device, part=case.part)
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows


# -- far addresses -------------------------------------------------------------------------------


def far(case: Case, last: int = 1024) -> list[dict[str, Any]]:
    """The last rows of a problem too large for 32-bit offsets, against those queries alone.

    The loss looks at the last rows only, so that dK and dV are those of the small problem as well.
    """
    from labkit.nsa import nsa_func, nsa_selected_attention

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, case.t, heads, width, device="cuda", dtype=dtype)

    q, k, v = normal(case.heads, case.d), normal(case.kv, case.d), normal(case.kv, case.dv)
    at = torch.arange(case.t, device="cuda") // case.block
    blocks = torch.rand(1, case.t, case.kv, case.slots, device="cuda")
    blocks = (blocks * (at[:, None, None] + 1)).int()
    blocks[..., 0], blocks[..., 1] = 0, at[:, None]
    dout = torch.zeros_like(q)
    dout[:, -last:] = torch.randn_like(dout[:, -last:])
    gates = torch.rand(3, 1, case.t, case.heads, device="cuda", dtype=dtype)

    def tail(x: torch.Tensor) -> torch.Tensor:
        return x[..., -last:, :, :] if x.dim() == 4 else x[..., -last:, :]

    worst: dict[str, float] = {}

    def differ(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        gap = (a.float() - b.float()).abs().max() / b.float().abs().max()
        worst[name] = gap.item() if torch.isfinite(a).all() else math.inf

    few = [tail(q), k, v]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    small = [x.detach().contiguous().requires_grad_() for x in few]
    o = nsa_selected_attention(*leaves, blocks, block_size=case.block)
    got = torch.autograd.grad(o, leaves, dout)
    o_small = nsa_selected_attention(*small, tail(blocks).contiguous(), block_size=case.block)
    wanted = torch.autograd.grad(o_small, small, tail(dout))
    differ("o", tail(o), o_small)
    for name, a, b in zip(("dq", "dk", "dv"), got, wanted, strict=True):
        differ(name, tail(a) if name == "dq" else a, b)
    del o, got, dout, leaves
    with torch.no_grad():
        whole = nsa_func(q, k, v, *gates)
        part = nsa_func(*few, *(tail(g) for g in gates))
        # a near-tie may be decided the other way: a row may differ, most rows may not
        rows = (tail(whole).float() - part.float()).abs().amax((0, 2, 3))
        worst["whole"] = (rows.quantile(0.9) / part.float().abs().max()).item()
    return [{"case": str(case), "road": "default", "dtype": case.dtype, "elements": q.numel(),
             "worst": max(worst.values()), "each": worst}]  # fmt: skip


if __name__ == "__main__":
    serve(sys.modules[__name__])
