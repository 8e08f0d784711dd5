"""Attention weights from the LSE: exact against dense float64, for every branch, and their checks.

The oracle below shares no line with labkit: it loops over queries and writes each definition out.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from labkit.errors import ArgumentError, NotEnoughMemoryError
from labkit.nsa import (
    compute_attention_weights_from_lse,
    get_attention_weights_summary,
    total_attention_weights,
    validate_attention_weights,
)
from labkit.nsa import weights as weights_module
from labkit.nsa.weights import attention_weights_bytes

BRANCHES = ("compression", "selection", "sliding_window")


def softmax_row(scores, seen):
    """Probabilities and LSE of one row; 0 and −∞ where nothing is seen."""
    p = torch.zeros_like(scores)
    if not seen.any():
        return p, -math.inf
    lse = torch.logsumexp(scores[seen], 0)
    p[seen] = torch.exp(scores[seen] - lse)
    return p, lse


def oracle(q, k, v, blocks, *, size, window, length=None, stride=None, cu=None, share=None):
    """``{branch: (output [B, M, HQ, V], LSE [B, HQ, M])}``, query by query."""
    length = length or size
    stride = stride or length
    b_, m, hq, d = q.shape
    n, group = k.shape[1], hq // k.shape[2]
    cu = cu or [0, n]
    out = {x: torch.zeros(b_, m, hq, v.shape[-1], dtype=torch.float64) for x in BRANCHES}
    lse = {x: torch.full((b_, hq, m), -math.inf, dtype=torch.float64) for x in BRANCHES}
    share = torch.full((length,), 1 / length, dtype=torch.float64) if share is None else share
    for b in range(b_):
        for i in range(m):
            row = i + n - m
            s = max(x for x in range(len(cu) - 1) if cu[x] <= row and cu[x] < cu[x + 1])
            t, keys, values = row - cu[s], k[b, cu[s] : cu[s + 1]], v[b, cu[s] : cu[s + 1]]
            at = torch.arange(len(keys))
            for h in range(hq):
                g = h // group
                scores = keys[:, g] @ q[b, i, h] / math.sqrt(d)
                chosen = torch.zeros(len(keys), dtype=torch.bool)
                for block in blocks[b, i, g].tolist():
                    if block >= 0:
                        chosen |= at // size == block
                for name, seen in (
                    ("selection", chosen & (at <= t)),
                    ("sliding_window", (at <= t) & (at > t - window)),
                ):
                    p, lse[name][b, h, i] = softmax_row(scores, seen)
                    out[name][b, i, h] = p @ values[:, g]
                starts = [c for c in range(0, len(keys) - length + 1, stride)]
                if starts:
                    pooled = torch.stack([keys[c : c + length, g].mean(0) for c in starts])
                    pooled_v = torch.stack([share @ values[c : c + length, g] for c in starts])
                    seen = torch.tensor([c + length - 1 <= t for c in starts])
                    p, lse["compression"][b, h, i] = softmax_row(
                        pooled @ q[b, i, h] / math.sqrt(d), seen
                    )
                    out["compression"][b, i, h] = p @ pooled_v
    return {name: (out[name], lse[name]) for name in BRANCHES}


def problem(b=1, m=19, n=19, hq=4, h=2, d=8, dv=6, slots=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((b, m, hq, d), (b, n, h, d), (b, n, h, dv))
    )
    blocks = torch.randint(-1, -(-n // size), (b, m, h, slots), generator=generator)
    return q, k, v, blocks


def times_v(weights, v):
    """weights [B, HQ, M, N] @ v [B, N, H, V] → [B, M, HQ, V]."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhmn,bnhv->bmhv", weights, v)


CASES = [
    dict(),
    dict(b=2, m=7, n=23, hq=6, h=2),
    dict(m=1, n=17, hq=3, h=3, size=16),
    dict(m=13, n=13, hq=5, h=1, size=16, slots=2),  # shorter than a block
    dict(m=40, n=40, hq=2, h=1, size=8, window=1),
    dict(m=12, n=12, hq=2, h=2, window=99),
    dict(m=12, n=12, hq=2, h=2, window=0),
    dict(m=30, n=30, hq=2, h=1, size=8, length=8, stride=4),
    dict(m=30, n=30, hq=2, h=1, size=8, length=8, stride=3),
    dict(m=29, n=29, hq=4, h=2, cu=[0, 3, 3, 17, 29]),
    dict(m=29, n=29, hq=4, h=2, cu=[0, 11, 29], length=8, stride=4, size=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_times_v_is_the_branch(case):
    case = dict(case)
    window, cu = case.pop("window", 5), case.pop("cu", None)
    length, stride = case.pop("length", None), case.pop("stride", None)
    size = case.get("size", 4)
    q, k, v, blocks = problem(**case)
    if cu:
        shortest = min(b - a for a, b in pairwise(cu) if b > a)
        blocks = blocks.clamp(max=(shortest - 1) // size)
    expected = oracle(
        q, k, v, blocks, size=size, window=window, length=length, stride=stride, cu=cu
    )
    asked = {
        "compression": {"block_size": length or size, "stride": stride},
        "selection": {"block_size": size, "block_indices": blocks},
        "sliding_window": {"window_size": window},
    }
    cu = torch.tensor(cu) if cu else None
    for name, (out, lse) in expected.items():
        w = compute_attention_weights_from_lse(lse, q, k, **asked[name], cu_seqlens=cu)
        assert w.shape == (*lse.shape, k.shape[1]) and w.dtype == torch.float64
        assert torch.allclose(times_v(w, v), out, rtol=0, atol=1e-12), name
        assert torch.allclose(w.sum(-1), torch.isfinite(lse).double(), rtol=0, atol=1e-12), name
        assert (w >= 0).all(), name


def test_float32_is_within_twice_the_rounding_of_plain_float32():
    q, k, v, blocks = problem(m=40, n=40, d=64, size=8)
    _, lse = oracle(q, k, v, blocks, size=8, window=9)["selection"]
    w64 = compute_attention_weights_from_lse(lse, q, k, 8, blocks)
    w = compute_attention_weights_from_lse(lse.float(), q.float(), k.float(), 8, blocks)
    assert w.dtype == torch.float32
    plain = torch.softmax(
        torch.where(w64 > 0, torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float().repeat_interleave(
            2, 2)) / 8, -math.inf), dim=-1,
    ).nan_to_num(0)  # fmt: skip
    error, allowed = (w - w64).abs().max(), (plain - w64).abs().max()
    assert error <= 2 * allowed + 2e-7


def test_block_counts_drop_the_last_slots():
    q, k, v, blocks = problem()
    counts = torch.randint(0, 4, blocks.shape[:3], generator=torch.Generator().manual_seed(5))
    kept = blocks.masked_fill(torch.arange(3) >= counts[..., None], -1)
    out, lse = oracle(q, k, v, kept, size=4, window=1)["selection"]
    w = compute_attention_weights_from_lse(lse, q, k, 4, blocks, block_counts=counts)
    assert torch.allclose(times_v(w, v), out, rtol=0, atol=1e-12)
    kept = blocks.masked_fill(torch.arange(3) >= 1, -1)
    out, lse = oracle(q, k, v, kept, size=4, window=1)["selection"]
    w = compute_attention_weights_from_lse(lse, q, k, 4, blocks, block_counts=1)
    assert torch.allclose(times_v(w, v), out, rtol=0, atol=1e-12)


def test_weighted_pooling_spreads_as_it_pools():
    q, k, v, blocks = problem()
    share = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    out, lse = oracle(q, k, v, blocks, size=4, window=1, share=share)["compression"]
    w = compute_attention_weights_from_lse(lse, q, k, 4, spread=share)
    assert torch.allclose(times_v(w, v), out, rtol=0, atol=1e-12)
    means = k[:, :16].unflatten(1, (4, 4)).mean(2)
    same = compute_attention_weights_from_lse(lse, q, k, 4, spread=share, k_cmp=means)
    assert torch.equal(w, same)


def test_heads_and_rows_are_a_part_of_the_whole(monkeypatch):
    q, k, v, blocks = problem(b=2, hq=6, h=3)
    _, lse = oracle(q, k, v, blocks, size=4, window=5)["compression"]
    whole = compute_attention_weights_from_lse(lse, q, k, 4)
    part = compute_attention_weights_from_lse(lse, q, k, 4, heads=[5, 0], rows=slice(3, 9))
    assert torch.allclose(part, whole[:, [5, 0], 3:9], rtol=0, atol=1e-14)
    assert part.numel() * 8 == attention_weights_bytes(q, k, heads=[5, 0], rows=slice(3, 9))
    monkeypatch.setattr(weights_module, "_SCRATCH", 1)  # one row at a time
    chunked = compute_attention_weights_from_lse(lse, q, k, 4)
    assert torch.allclose(chunked, whole, rtol=0, atol=1e-14)


def returned(q, k, v, blocks, *, size=4, window=5, gates=None):
    """What nsa_func returns, by the oracle: the output and the dictionary."""
    branches = oracle(q, k, v, blocks, size=size, window=window)
    generator = torch.Generator().manual_seed(3)
    gates = gates or [torch.randn(q.shape[:3], generator=generator).double() for _ in range(3)]
    out = sum(g[..., None] * branches[name][0] for g, name in zip(gates, BRANCHES, strict=True))
    weights = {name: {"lse": branches[name][1].float()} for name in BRANCHES}
    weights["compression"]["block_indices"] = weights["selection"]["block_indices"] = blocks
    weights["sliding_window"]["window_size"] = window
    weights["gating_weights"] = dict(zip(("g_cmp", "g_slc", "g_swa"), gates, strict=True))
    weights["options"] = {"block_size": size, "scale": None, "cu_seqlens": None}
    return out, weights


def test_total_weights_times_v_is_the_layer():
    q, k, v, blocks = problem(b=2)
    out, weights = returned(q, k, v, blocks)
    total = total_attention_weights(weights, q, k)
    assert torch.allclose(times_v(total, v), out, rtol=0, atol=1e-6)
    gates = weights["gating_weights"]
    sums = sum(
        gates[g] * torch.isfinite(weights[name]["lse"]).transpose(1, 2)
        for g, name in zip(gates, BRANCHES, strict=True)
    )
    assert torch.allclose(total.sum(-1).transpose(1, 2), sums, rtol=0, atol=1e-6)
    report = validate_attention_weights(weights, q, k, v, out=out)
    assert set(report) == {*BRANCHES, "output"}
    assert report["output"]["relative_error"] < 1e-6
    assert report["compression"]["empty_rows"] == 2 * 4 * 3  # before the first complete block
    del weights["sliding_window"], weights["options"]
    two = total_attention_weights(weights, q, k, block_size=4, heads=2, rows=slice(5, 6))
    assert two.shape == (2, 1, 1, 19)


def test_half_precision_and_its_rounded_means_pass():
    q, k, v, blocks = problem(d=16, m=33, n=33)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    _, weights = returned(q.double(), k.double(), v.double(), blocks)
    # the branch pools in bf16, and its LSE is of the rounded means
    rounded = k[:, :32].unflatten(1, (8, 4)).mean(2)
    s = torch.einsum("bmhd,bchd->bhmc", q.double(), rounded.double().repeat_interleave(2, 2)) / 4
    s[..., torch.arange(8) * 4 + 3 > torch.arange(33)[:, None]] = -math.inf
    weights["compression"]["lse"] = torch.logsumexp(s, -1).float()
    report = validate_attention_weights(weights, q, k)
    assert report["compression"]["largest_sum_error"] < 1e-5
    assert report["selection"]["tolerance"] < 1e-3


# -- what is turned away -----------------------------------------------------------------------


def wrong(name, change):
    q, k, v, blocks = problem(m=4, n=4, size=2)  # M = HQ: the wrong layout has the right shape
    _, weights = returned(q, k, v, blocks.clamp(max=1), size=2, window=2)
    weights[name]["lse"] = change(weights[name]["lse"])
    return weights, q, k


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.transpose(1, 2), "transpose it"),
        (lambda x: x / math.log(2), "base 2"),
        (lambda x: x + 0.01, "it counts keys that it does not"),
        (lambda x: x.index_fill(2, torch.tensor(3), -math.inf), "do not sum to 1"),
        (lambda x: x.index_fill(2, torch.tensor(3), math.nan), "NaN"),
        (lambda x: x.nan_to_num(neginf=0.0).index_fill(2, torch.tensor(0), math.inf), "NaN or"),
        (lambda x: x[:, :3], "lse.shape|lse'].shape"),
    ],
)
def test_a_wrong_lse_is_noticed(name, change, says):
    with pytest.raises(ArgumentError, match=says) as caught:
        validate_attention_weights(*wrong(name, change))
    assert name in str(caught.value)


def test_an_lse_that_saw_the_future_is_noticed():
    q, k, v, blocks = problem()
    _, weights = returned(q, k, v, blocks)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    weights["sliding_window"]["lse"] = torch.logsumexp(scores, -1).float()
    with pytest.raises(ArgumentError, match="such as the future"):
        validate_attention_weights(weights, q, k)


def test_wrong_weights_are_noticed():
    q, k, v, blocks = problem()
    out, lse = oracle(q, k, v, blocks, size=4, window=5)["sliding_window"]
    w = compute_attention_weights_from_lse(lse, q, k, window_size=5)
    assert validate_attention_weights(w, q, k, v, out=out)["output"]["relative_error"] < 1e-12
    with pytest.raises(ArgumentError, match="not the weights' product"):
        validate_attention_weights(w, q, k, v, out=1.1 * out)
    future = w.clone()
    future[0, 1, 4, 9] = future[0, 1, 4, 4].item()
    future[0, 1, 4, 4] = 0
    with pytest.raises(ArgumentError, match=r"future.* head 1, row 4"):
        validate_attention_weights(future, q, k)
    with pytest.raises(ArgumentError, match="neither empty nor a probability"):
        validate_attention_weights(0.9 * w, q, k)
    with pytest.raises(ArgumentError, match="negative"):
        validate_attention_weights(-w, q, k)
    with pytest.raises(ArgumentError, match="future or in another sequence"):
        validate_attention_weights(w, q, k, cu_seqlens=torch.tensor([0, 10, 19]))
    with pytest.raises(ArgumentError, match="does not fit q and k"):
        validate_attention_weights(w[:, :, :4], q, k)
    with pytest.raises(ArgumentError, match="v and out, or neither"):
        validate_attention_weights(w, q, k, v)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a | {"lse": a["lse"].transpose(1, 2)}, r"\[B, M, HQ\]"),
        (lambda a: a | {"lse": 3.0}, "lse"),
        (lambda a: a | {"q": a["q"][0]}, "q.shape"),
        (lambda a: a | {"k": a["k"][..., :4]}, "head_dim"),
        (lambda a: a | {"k": a["k"].float()}, "k.dtype"),
        (lambda a: a | {"k": a["k"].repeat(1, 1, 3, 1)}, "divide"),
        (lambda a: a | {"k": a["k"][:, :3]}, "more queries"),
        (lambda a: a | {"block_size": 0}, "block_size"),
        (lambda a: a | {"block_indices": torch.full((1, 19, 2, 3), 5)}, "is no block"),
        (lambda a: a | {"block_indices": torch.zeros(1, 19, 4, 3).long()}, "each query and KV"),
        (lambda a: a | {"block_indices": torch.zeros(1, 19, 2, 3)}, "integer"),
        (lambda a: a | {"window_size": -1}, "negative"),
        (lambda a: a | {"window_size": 4, "block_indices": torch.zeros(1, 19, 2, 3).int()}, "two"),
        (lambda a: a | {"stride": 9}, "stride"),
        (lambda a: a | {"k_cmp": a["k"]}, "k_cmp"),
        (lambda a: a | {"spread": torch.ones(3)}, "spread"),
        (lambda a: a | {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        (lambda a: a | {"heads": 4}, "heads"),
        (lambda a: a | {"rows": slice(19, 30)}, "rows"),
        (lambda a: a | {"rows": 3}, "rows"),
        (lambda a: a | {"scale": 0.0}, "scale"),
    ],
)
def test_bad_arguments_are_named(change, says):
    q, k, _, _ = problem()
    good = {"lse": torch.zeros(1, 4, 19), "q": q, "k": k, "block_size": 4}
    assert compute_attention_weights_from_lse(**good).shape == (1, 4, 19, 19)
    with pytest.raises(ArgumentError, match=says):
        compute_attention_weights_from_lse(**change(good))


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    q, k, _, _ = problem(m=50, n=50)
    monkeypatch.setattr(weights_module, "free_memory", lambda device: 64 * 2**20 + 10_000)
    lse = torch.zeros(1, 4, 50)
    with pytest.raises(NotEnoughMemoryError, match=r"take 78\.1 KiB .* rows=slice"):
        compute_attention_weights_from_lse(lse, q, k, 4)
    few = compute_attention_weights_from_lse(lse, q, k, 4, heads=0, rows=slice(0, 20))
    assert few.shape == (1, 1, 20, 50)


def test_dictionaries_that_lack_something_say_what():
    q, k, v, blocks = problem()
    _, weights = returned(q, k, v, blocks)
    with pytest.raises(ArgumentError, match="not a mapping"):
        total_attention_weights(weights["selection"]["lse"], q, k)
    with pytest.raises(ArgumentError, match="no branch"):
        total_attention_weights({"gating_weights": {}}, q, k)
    with pytest.raises(ArgumentError, match="block_size"):
        total_attention_weights({**weights, "options": None}, q, k)
    gates = weights["gating_weights"]
    missing = {name: gate for name, gate in gates.items() if name != "g_slc"}
    with pytest.raises(ArgumentError, match="g_slc"):
        total_attention_weights({**weights, "gating_weights": missing}, q, k)
    no_blocks = {"lse": weights["selection"]["lse"]}
    with pytest.raises(ArgumentError, match="no block_indices"):
        total_attention_weights({**weights, "selection": no_blocks}, q, k)


def test_a_branch_that_is_off_is_left_out():
    q, k, v, blocks = problem()
    _, weights = returned(q, k, v, blocks)
    gates = weights["gating_weights"]
    whole = total_attention_weights(weights, q, k)
    window = compute_attention_weights_from_lse(
        weights["sliding_window"]["lse"], q, k, window_size=5
    )
    weights["gating_weights"] = {**gates, "g_swa": None}  # the LSE may be there all the same
    two = total_attention_weights(weights, q, k)
    assert torch.allclose(two + gates["g_swa"].transpose(1, 2)[..., None] * window, whole)
    assert set(validate_attention_weights(weights, q, k)) == set(BRANCHES)


def test_options_and_keys_of_another_compression_are_taken_from_the_mapping():
    q, k, v, blocks = problem()
    share = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    out, lse = oracle(
        q, k, v, blocks, size=8, window=1, length=4, stride=2, share=share
    )["compression"]  # fmt: skip
    weights = {
        "compression": {"lse": lse, "spread": share},
        "gating_weights": {"g_cmp": torch.ones(1, 19, 4)},
        "options": {"block_size": 8, "length": 4, "stride": 2},
    }
    report = validate_attention_weights(weights, q, k, v, out=out)
    assert report["output"]["relative_error"] < 1e-12
    means = k.unfold(1, 4, 2).mean(-1) + 1e-3  # keys of some other pooling: not those of the LSE
    weights["compression"]["k_cmp"] = means
    with pytest.raises(ArgumentError, match="do not sum"):
        validate_attention_weights(weights, q, k)


def test_summary_counts_what_was_read():
    q, k, v, _ = problem()
    t = torch.arange(19)
    blocks = torch.stack([t // 4, torch.zeros_like(t), t // 4], -1)[None, :, None]
    blocks = blocks.expand(1, 19, 2, 3)
    gates = [torch.full(q.shape[:3], x).double() for x in (1.0, -2.0, 5.0)]
    _, weights = returned(q, k, v, blocks, gates=gates)
    summary = get_attention_weights_summary(weights)
    assert summary["selection"]["rows"] == 4 * 19
    assert summary["compression"]["empty_rows"] == 4 * 3
    # the first four queries read one block, all others two
    assert summary["selection"]["blocks"]["mean"] == pytest.approx((4 + 2 * 15) / 19)
    assert summary["selection"]["blocks"]["max"] == 2
    assert summary["selection"]["distance"]["max"] == 4
    back = sum(x // 4 for x in range(19))  # to block 0; the own block is 0 back
    assert summary["selection"]["distance"]["mean"] == pytest.approx(back / (4 + 2 * 15))
    assert [summary["gating_weights"][g]["share"] for g in ("g_cmp", "g_slc", "g_swa")] == (
        pytest.approx([1 / 8, 2 / 8, 5 / 8])
    )
    low = weights["sliding_window"]["lse"].min().item()
    assert summary["sliding_window"]["lse"]["min"] == pytest.approx(low)
    assert get_attention_weights_summary({"selection": None}) == {}
    nothing = {"selection": {"lse": torch.full((1, 1, 2), -math.inf)}}
    assert get_attention_weights_summary(nothing)["selection"]["lse"]["mean"] is None


# -- with the kernels --------------------------------------------------------------------------


def from_kernels(*, m, n, hq, h, d, dv=None, size=16, count=3, window=9, dtype=torch.float32,
                 device="cpu", cu=None):  # fmt: skip
    """Inputs and result of nsa_func, validated to the row."""
    from labkit.nsa import nsa_func

    generator = torch.Generator(device).manual_seed(n)
    options = {"generator": generator, "device": device}
    q, k, v = (
        torch.randn(1, *shape, **options).to(dtype)
        for shape in ((m, hq, d), (n, h, d), (n, h, dv or d))
    )
    gates = [torch.rand(1, m, hq, **options).to(dtype) for _ in range(3)]
    cu = None if cu is None else torch.tensor(cu, dtype=torch.int32, device=device)
    out, weights = nsa_func(
        q, k, v, *gates, block_counts=count, block_size=size, window_size=window, cu_seqlens=cu,
        return_attn_weights=True,
    )  # fmt: skip
    asked = {"block_size": size, "cu_seqlens": cu}
    return validate_attention_weights(weights, q, k, v, out=out, **asked)


@pytest.mark.parametrize(
    "case",
    [
        {"m": 35, "n": 35, "hq": 3, "h": 1, "d": 16, "cu": [0, 7, 35]},
        {"m": 3, "n": 50, "hq": 2, "h": 2, "d": 16, "dv": 32},
    ],
    ids=str,
)
def test_what_nsa_func_returns_rebuilds_its_output(case):
    report = from_kernels(**case)
    assert report["output"]["relative_error"] < 1e-5
    assert report["compression"]["empty_rows"] == (3 * (7 + 15) if "cu" in case else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"m": 1024, "n": 1024, "hq": 32, "h": 2, "d": 64, "window": 200},
        {"m": 500, "n": 500, "hq": 8, "h": 8, "d": 64, "cu": [0, 33, 34, 200, 500]},
        {"m": 17, "n": 700, "hq": 6, "h": 2, "d": 128, "dv": 64, "count": 5, "size": 64},
    ],
    ids=str,
)
def test_what_the_gpu_returns_rebuilds_its_output(case, dtype):
    report = from_kernels(**case, dtype=dtype, device="cuda")
    worst = max(found["largest_sum_error"] for name, found in report.items() if name != "output")
    # no score is rounded to the inputs' dtype: the rows of half precision sum as float32's do
    assert worst < 1e-3 and report["output"]["relative_error"] < 0.01
