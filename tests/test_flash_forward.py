"""The forward kernel: O and LSE against float64, for every shape, mask, layout and group.

Without a GPU the kernels run in the interpreter on cases chosen so that each value of each
factor occurs; the full matrix, in which all pairs of values meet, needs a GPU.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import triton
import triton.language as tl
from flash_cases import LAYOUTS, Case, assert_right, check_case, lay_out, make, matrix, ours

from labkit.experiments._flash_cases import covering
from labkit.flash import flash_attention
from labkit.flash.masking import key_bounds, query_bounds, visible_pairs

GPU = torch.cuda.is_available()
ids = {"ids": str}

# -- the interpreter's share ---------------------------------------------------------------------

SMALL = [
    # every length
    Case(1, 1), Case(2, 2, causal=True), Case(5, 5, causal=True, dtype="float16"), Case(17, 17),
    Case(97, 97, causal=True), Case(127, 127, causal=True, window=40),
    Case(128, 128, causal=True, dtype="float16"), Case(129, 129),
    Case(257, 257, causal=True),
    Case(1, 239, causal=True), Case(239, 1, causal=True), Case(3, 799, window=99),
    Case(799, 3, causal=True), Case(1, 1, causal=True, window=1, layout="bounds"),
    # every head_dim; values of another
    Case(19, 35, d=17, d_v=33), Case(19, 35, d=40, d_v=16, dtype="float16"),
    Case(19, 35, d=64, d_v=80), Case(19, 35, d=80, causal=True), Case(19, 35, d=96, d_v=64),
    Case(19, 35, d=128, window=8, dtype="float16"), Case(19, 35, d=192, d_v=128),
    Case(19, 35, d=256, dtype="float16"), Case(19, 35, d=16, d_v=256),
    # groups
    Case(9, 40, heads=8, kv_heads=2, causal=True), Case(9, 40, heads=6, kv_heads=2),
    Case(9, 40, heads=5, kv_heads=1, causal=True, dtype="float16", batch=2),
    # windows: one key, more than there are, and rows that see nothing on either side
    Case(20, 50, window=1), Case(50, 20, causal=True, window=1), Case(20, 20, window=1000),
    Case(90, 20, window=7), Case(20, 90, window=70, causal=True),
    # scales, and logits in the thousands
    Case(33, 65, scale=1.0), Case(33, 65, scale=1e-3, causal=True),
    Case(33, 65, d=64, factor=100.0, causal=True), Case(33, 65, factor=100.0, dtype="float16"),
]  # fmt: skip
LAID_OUT = [
    Case(9, 43, d=24, batch=2, heads=2, layout=layout, causal=True, dtype=dtype)
    for layout, dtype in zip(LAYOUTS, ("float32", "float16") * 5, strict=True)
]


@pytest.mark.parametrize("case", SMALL + LAID_OUT, **ids)
def test_output_and_lse_are_within_twice_the_error_of_plain_attention(case, device):
    check_case(case, device, backward=False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", matrix(), **ids)
def test_full_matrix(case):
    check_case(case, "cuda", backward=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mask", [(False, None), (True, None), (True, 64), (False, 64)])
@pytest.mark.parametrize("n", [1, 2, 5, 17, 97, 127, 128, 129, 257, 1000])
def test_every_length_with_every_mask(n, mask, dtype):
    case = Case(n, n, 64, batch=2, causal=mask[0], window=mask[1], dtype=dtype)
    check_case(case, "cuda", backward=False)


# -- what the cases are made of ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_say(layout):
    x = torch.randn(2, 3, 5, 16)
    y = lay_out(x, layout) if layout != "mixed" else lay_out(x, "bnhd")
    expected = x[:1].expand_as(x) if layout == "expanded" else x
    assert torch.equal(y, expected)
    stored = torch.empty(0).set_(y.untyped_storage())
    surrounded = {"packed", "offset", "bounds", "aligned_bounds", "strided_d"}
    assert torch.isnan(stored).any() == (layout in surrounded)
    assert y.is_contiguous() == (layout in {"plain", "offset"})
    assert (y.stride(-1) == 1) == (layout not in {"strided_d", "transposed_d"})
    if layout == "aligned_bounds":  # what a tensor descriptor asks for
        assert all(s * 4 % 16 == 0 for s in y.stride()[:-1]) and y.storage_offset() * 4 % 16 == 0
    if layout in {"offset", "bounds"}:
        assert y.storage_offset() * 4 % 16 != 0


def test_in_a_covering_every_two_values_meet():
    factors = {"a": range(7), "b": "xyz", "c": (True, False), "d": range(4)}
    rows = covering(factors)
    assert len(rows) < 7 * 4 * 2  # 168 would be all; 28 is the least
    for a in factors:
        for b in factors:
            if a != b:
                met = {(row[a], row[b]) for row in rows}
                assert met == {(x, y) for x in factors[a] for y in factors[b]}


def test_full_matrix_has_what_the_issue_asks_for():
    cases = matrix()
    assert {c.n_q for c in cases if c.n_q == c.n_k} >= {1, 2, 5, 17, 97, 127, 128, 129, 257, 1000}
    assert {(c.n_q, c.n_k) for c in cases} >= {(1, 239), (239, 1), (3, 799), (1023, 1024)}
    assert {c.d for c in cases} == {16, 40, 64, 80, 96, 128, 192, 256}
    assert {c.heads // c.kv for c in cases} == {1, 4} and any(c.kv == 1 for c in cases)
    assert {(c.causal, c.window is not None) for c in cases} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    assert {c.dtype for c in cases} == {"float16", "bfloat16", "float32"}
    assert {c.layout for c in cases} == set(LAYOUTS)
    assert {c.factor for c in cases} == {1.0, 100.0}
    assert any(c.dv != c.d for c in cases)


# -- rows that see nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(60, 20, causal=True),
        Case(200, 20, causal=True),  # whole tiles of queries see nothing
        Case(90, 20, window=5),
        Case(40, 3, causal=True, window=1, dtype="float16"),
    ],
    **ids,
)
def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(case, device):
    q, k, v, _ = make(case, device)
    got = ours(q, k, v, **case.options)
    hidden = oracle.hidden_pairs(case.n_q, case.n_k, causal=case.causal, window=case.window)
    dead = hidden.all(1).to(device)
    assert dead.any() and not dead.all()
    assert (got["o"][:, :, dead] == 0).all() and torch.isneginf(got["lse"][:, :, dead]).all()
    assert (got["o"][:, :, ~dead] != 0).any(-1).all()
    assert torch.isfinite(got["lse"][:, :, ~dead]).all()


# -- NaN and infinity stay where they come from --------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_nan_query_stays_in_its_row(causal, device):
    q, k, v, _ = make(Case(20, 40, heads=4, kv_heads=2, batch=2), device)
    clean = ours(q, k, v, causal=causal)
    q[1, 2, 7, 3] = math.nan
    got = ours(q, k, v, causal=causal)
    for name in ("o", "lse"):
        hit = torch.isnan(got[name])
        assert hit[1, 2, 7].all(), f"{name}: the NaN is lost"
        got[name][1, 2, 7] = clean[name][1, 2, 7]
        assert torch.equal(got[name], clean[name]), f"{name}: the NaN is in another row"


def test_a_nan_key_reaches_only_the_rows_that_see_it(device):
    q, k, v, _ = make(Case(30, 30, heads=4, kv_heads=2, batch=2), device)
    clean = ours(q, k, v, causal=True, window=8)
    k[1, 1, 20, 3] = math.nan
    got = ours(q, k, v, causal=True, window=8)
    for name in ("o", "lse"):
        rows = torch.isnan(got[name]).flatten(3).any(-1) if name == "o" else torch.isnan(got[name])
        expected = torch.zeros(2, 4, 30, dtype=torch.bool, device=device)
        expected[1, 2:, 20:28] = True
        assert torch.equal(rows, expected), name
        assert torch.equal(got[name][~expected], clean[name][~expected]), name


def test_a_nan_value_stays_in_its_head_and_column(device):
    q, k, v, _ = make(Case(30, 30, heads=4, kv_heads=2, batch=2), device)
    clean = ours(q, k, v)
    v[1, 1, 20, 3] = math.nan
    got = ours(q, k, v)
    assert torch.isnan(got["o"][1, 2:, :, 3]).all()
    got["o"][1, 2:, :, 3] = clean["o"][1, 2:, :, 3]
    assert torch.equal(got["o"], clean["o"]) and torch.equal(got["lse"], clean["lse"])


def test_a_score_of_minus_infinity_weighs_nothing(device):
    # a key so far off that its score is −∞ in float32
    q, k, v, _ = make(Case(20, 40), device)
    q[..., 0], k[:, :, 11, 0] = 1.0, -math.inf
    got = ours(q, k, v)
    keep = [j for j in range(40) if j != 11]
    assert_right(got, q, k[:, :, keep], v[:, :, keep])


# -- arguments -----------------------------------------------------------------------------------


def test_lse_is_returned_only_when_asked_for(device):
    q, k, v, _ = make(Case(5, 9), device)
    alone = flash_attention(q, k, v, causal=True)
    both = flash_attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(alone, torch.Tensor) and isinstance(both, tuple) and len(both) == 2
    assert torch.equal(alone, both[0])


def test_default_scale_is_one_over_the_root_of_head_dim(device):
    q, k, v, _ = make(Case(9, 20, d=24, d_v=40), device)
    named = flash_attention(q, k, v, scale=1 / math.sqrt(24))
    assert torch.equal(flash_attention(q, k, v), named)
    assert not torch.equal(flash_attention(q, k, v, scale=1 / math.sqrt(40)), named)


def test_a_window_as_wide_as_the_keys_is_none(device):
    q, k, v, _ = make(Case(30, 50), device)
    for causal in (False, True):
        wide, none = ours(q, k, v, causal=causal, window=50), ours(q, k, v, causal=causal)
        assert_right(wide, q, k, v, causal=causal)
        torch.testing.assert_close(wide["o"], none["o"], rtol=0, atol=1e-6)


def test_inputs_that_are_one_tensor_are_fine(device):
    x = torch.randn(1, 2, 37, 16, device=device)
    assert_right(ours(x, x, x, causal=True), x, x, x, causal=True)


# -- merging by LSE ------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 40, 63])
def test_two_halves_of_the_keys_merge_by_lse_to_the_whole(cut, device):
    q, k, v, _ = make(Case(20, 64, d=32, factor=3.0), device)
    whole = ours(q, k, v)
    a = ours(q, k[:, :, :cut], v[:, :, :cut])
    b = ours(q, k[:, :, cut:], v[:, :, cut:])
    lse = torch.logaddexp(a["lse"], b["lse"])
    o = a["o"] * (a["lse"] - lse).exp()[..., None] + b["o"] * (b["lse"] - lse).exp()[..., None]
    assert_right({"o": o, "lse": lse}, q, k, v)
    torch.testing.assert_close(lse, whole["lse"], rtol=0, atol=2e-6)
    torch.testing.assert_close(o, whole["o"], rtol=0, atol=2e-6)


# -- the intervals of the mask, one inequality at a time -----------------------------------------


@triton.jit
def _bounds_kernel(
    problems, out, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):  # fmt: skip
    at = problems + tl.program_id(0) * 5
    first, last, n_q, n_k = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    window = tl.load(at + 4)
    if OF_QUERIES:
        a, b, c, d = query_bounds(first, last, n_q, n_k, window, BLOCK, CAUSAL, WINDOW)
    else:
        a, b, c, d = key_bounds(first, last, n_q, n_k, window, BLOCK, CAUSAL, WINDOW)
    to = out + tl.program_id(0) * 4
    tl.store(to, a)
    tl.store(to + 1, b)
    tl.store(to + 2, c)
    tl.store(to + 3, d)


@pytest.mark.parametrize("of_queries", [False, True])
@pytest.mark.parametrize(("causal", "windowed"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_intervals_of_a_tile_hold_what_is_seen_and_what_all_see(
    causal, windowed, of_queries, device
):
    block, tile = 4, 8
    problems = [
        (first, min(first + tile, n_k if of_queries else n_q), n_q, n_k, window)
        for n_q, n_k in [(1, 1), (7, 7), (16, 16), (20, 9), (9, 20), (1, 21), (21, 1)]
        for window in ([1, 3, 6, 30] if windowed else [1])
        for first in range(0, n_k if of_queries else n_q, tile)
    ]
    table = torch.tensor(problems, dtype=torch.int32, device=device)
    out = torch.full((len(problems), 4), -7, dtype=torch.int32, device=device)
    _bounds_kernel[(len(problems),)](
        table, out, BLOCK=block, CAUSAL=bool(causal), WINDOW=bool(windowed), OF_QUERIES=of_queries
    )
    for (first, last, n_q, n_k, window), found in zip(problems, out.tolist(), strict=True):
        lo, full_lo, full_hi, hi = found
        seen = ~oracle.hidden_pairs(
            n_q, n_k, causal=bool(causal), window=window if windowed else None
        )
        seen = seen.T if of_queries else seen
        some, every = seen[first:last].any(0), seen[first:last].all(0)
        where = f"{(first, last, n_q, n_k, window)}: {found}"
        assert lo % block == full_lo % block == full_hi % block == 0, where
        assert lo <= full_lo <= full_hi, where
        walked = torch.zeros_like(some)
        walked[lo:hi] = True
        assert not (some & ~walked).any(), f"{where}: a visible pair is skipped"
        assert every[full_lo:full_hi].all(), f"{where}: a hidden pair is not masked"
        assert full_hi <= len(every) or full_hi == full_lo, f"{where}: past the end, no mask"
        if not windowed and not of_queries:
            assert full_lo == 0, f"{where}: the forward kernel does not walk lo … full_lo"
        if not (causal or windowed) and len(every) % block == 0:
            assert full_hi == hi, f"{where}: nothing walks full_hi … hi when all tiles are full"
        # and no more work than whole tiles ask for: a kernel that walks all is right, and slow
        if some.any():
            seen_at = torch.nonzero(some).flatten()
            assert lo > seen_at[0] - block and hi <= seen_at[-1] + 1, where
            whole = every[: len(every) // block * block].view(-1, block).all(1).sum() * block
            assert full_hi - full_lo >= whole - block, f"{where}: {whole} need no mask"


@pytest.mark.parametrize("causal", [False, True])
def test_visible_pairs_counts_what_the_mask_leaves(causal):
    for n_q, n_k in [(1, 1), (5, 5), (7, 20), (20, 7), (1, 9), (9, 1)]:
        for window in (None, 1, 2, 5, 8, 30):
            seen = ~oracle.hidden_pairs(n_q, n_k, causal=causal, window=window)
            assert visible_pairs(n_q, n_k, causal, window) == int(seen.sum()), (n_q, n_k, window)


# -- large, on a GPU -----------------------------------------------------------------------------


def _free(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.gpu
def test_tensors_of_more_than_two_to_the_31_elements():
    _free(24)
    n, d = 2**25 + 77, 64  # n · d > 2³¹
    q = torch.randn(1, 1, n, d, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(1, 1, 40, d, device="cuda", dtype=torch.float16) for _ in range(2))
    with torch.no_grad():
        o, lse = flash_attention(q, k, v, return_lse=True)
    for part in (slice(0, 300), slice(n // 2, n // 2 + 300), slice(n - 300, n)):
        assert_right({"o": o[:, :, part], "lse": lse[:, :, part]}, q[:, :, part], k, v)


@pytest.mark.gpu
def test_keys_of_more_than_two_to_the_31_elements():
    _free(16)
    n, d = 2**25 + 77, 64
    k, v = (torch.randn(1, 1, n, d, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(1, 1, 9, d, device="cuda", dtype=torch.float16)
    with torch.no_grad():  # the last keys only, so that what they are is what is seen
        o, lse = flash_attention(q, k, v, causal=True, window=500, return_lse=True)
    tail = slice(n - 600, n)
    got = {"o": o, "lse": lse}
    assert_right(got, q, k[:, :, tail], v[:, :, tail], causal=True, window=500)


@pytest.mark.gpu
def test_batch_heads_and_length_multiply_beyond_two_to_the_31():
    _free(90)
    batch, heads, n = 2**15 + 1, 32, 2048  # B · H · N > 2³¹ rows
    q = torch.randn(1, heads, n, 16, device="cuda", dtype=torch.float16).expand(batch, -1, -1, -1)
    k, v = (torch.randn(1, heads, 19, 16, device="cuda", dtype=torch.float16) for _ in range(2))
    k, v = k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
    with torch.no_grad():
        o, lse = flash_attention(q, k, v, return_lse=True)
    assert lse.numel() > 2**31
    for b in (0, batch // 2, batch - 1):
        part = slice(b, b + 1)
        assert_right({"o": o[part], "lse": lse[part]}, q[part], k[part], v[part])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(70_000, 1, 9), (1, 70_000, 9), (300, 300, 3)])
def test_more_heads_than_a_grid_has_in_y_and_z(shape):
    batch, heads, n = shape
    q, k, v = (
        torch.randn(batch, heads, n, 16, device="cuda", dtype=torch.float16) for _ in range(3)
    )
    assert_right(ours(q, k, v, causal=True), q, k, v, causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_forward_is_the_same_to_the_bit_250_times(dtype):
    case = Case(500, 999, 64, heads=8, kv_heads=2, batch=2, causal=True, dtype=dtype)
    q, k, v, _ = make(case, "cuda")
    first = ours(q, k, v, causal=True)
    for _ in range(250):
        again = ours(q, k, v, causal=True)
        assert torch.equal(again["o"], first["o"]) and torch.equal(again["lse"], first["lse"])


@pytest.mark.gpu
def test_tf32_is_as_exact_as_tf32_is():
    case = Case(300, 300, 64, batch=2)
    q, k, v, _ = make(case, "cuda")
    o64 = oracle.attention_f64(q, k, v)[0]
    ieee, thrice, tf32 = (
        (flash_attention(q, k, v, precision=p).double() - o64).abs().max().item()
        for p in ("ieee", "tf32x3", "tf32")
    )

    def cut(x):  # Triton hands float32 bits to tensor cores as they are: the last 13 are not read
        return (x.float().view(torch.int32) & -(1 << 13)).view(torch.float32).double()

    p = torch.softmax(cut(q) @ cut(k).mT / 8, dim=-1)
    plain = (cut(p) @ cut(v) - o64).abs().max().item()
    assert tf32 <= 2 * plain
    assert ieee < tf32 / 20 and thrice < tf32 / 20
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k, v, precision="ieee"))


@pytest.mark.gpu
@pytest.mark.parametrize("n_k", [4096, 20_000])
def test_a_single_query_over_many_keys(n_k):
    for dtype in ("float16", "bfloat16", "float32"):
        case = Case(1, n_k, 128, heads=8, kv_heads=2, causal=True, dtype=dtype)
        check_case(case, "cuda", backward=False)
