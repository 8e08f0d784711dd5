"""FLOPs and bytes of attention: against torch's counter, the chapter's claims, and brute force."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import labkit.roofline as module
from labkit import hardware
from labkit.closed_form import Form, symbols
from labkit.errors import ArgumentError
from labkit.roofline import Point, Ratio, Roofline, Step, problem, special_rate, steps, total

SIZES = st.fixed_dictionaries(
    {
        "seq_len": st.integers(1, 4096),
        "head_dim": st.sampled_from([1, 16, 63, 64, 128]),
        "batch": st.integers(1, 3),
        "dtype": st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
    }
)
CEILING = st.floats(1e6, 1e16)


def by_key(**options) -> dict[str, Step]:
    return {step.key: step for step in steps(**options)}


def test_docstring_examples_hold():
    assert doctest.testmod(module).failed == 0


def test_counting_needs_no_torch():
    code = (
        "import sys, labkit.roofline as r; r.steps()[0].at(seq_len=64); "
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- claim C04: intensity of each step, the limit and how fast it is reached --------------------


def test_scores_and_output_have_the_intensity_derived_in_the_chapter():
    n, d, e = symbols("N d e")
    for key in ("scores", "output"):
        square = by_key()[key].square
        assert square == Ratio(2 * n * d, n * e + 2 * d * e)
        assert square.limit("N") == Ratio(2 * d, e)


@pytest.mark.parametrize("key", ["scores", "output"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_c04_at_eight_head_dims_a_fifth_of_the_limit_is_missing(key, head_dim):
    step = by_key()[key]
    assert step.limit(head_dim=head_dim, dtype="float16") == head_dim
    at = {"seq_len": 8 * head_dim, "head_dim": head_dim, "dtype": "float16"}
    assert step.intensity(**at) == 0.8 * head_dim
    assert step.reached(**at) == 0.8
    assert step.reached(**at | {"seq_len": 18 * head_dim}) == 0.9


def test_c04_softmax_is_five_quarters_at_every_length():
    softmax = by_key()["softmax"]
    assert [softmax.intensity(seq_len=n, dtype="float16") for n in (1, 512, 16384)] == [1.25] * 3
    assert softmax.limit(dtype="float16") == 1.25
    assert softmax.limit(dtype="float32") == 0.625


def test_naive_as_a_whole_tends_to_less_than_its_products():
    # 4 N² d over 4 N² e (S out, S in, P out, P in) in the source's accounting: d/e
    whole = total(steps(scale_kernel=False), "naive", "naive")
    assert whole.limit(head_dim=64, dtype="float16") == 32
    # a scale kernel of its own reads and writes S once more
    assert total(steps(), "naive", "naive").limit(head_dim=96, dtype="float16") == 32


def test_fused_intensity_grows_with_length_and_reread_stops_at_the_block():
    fused, reread = steps("fused")[0], steps("fused_reread")[0]
    assert fused.limit(head_dim=64) == math.inf and fused.reached(seq_len=64) == 0
    # about N/2 in a 16-bit type: the LSE is 4 bytes a row beside 8 d
    assert fused.intensity(seq_len=8192, head_dim=64) == pytest.approx(8192 * 64 / (2 * 64 + 1))
    for block in (64, 128):
        assert reread.limit(block_m=block, dtype="bfloat16") == block
    assert reread.intensity(seq_len=64, block_m=64) == fused.intensity(seq_len=64)


# -- claim C05: the balance point --------------------------------------------------------------


def test_c05_ridge_points_and_the_bound_they_imply():
    a100, h100 = Roofline(312e12, 2.0e12), Roofline(990e12, 3.35e12)
    assert a100.ridge == 156
    assert round(h100.ridge) == 296
    for roof in (a100, h100):
        for step in steps(scale_kernel=False):
            assert roof.bound(step.limit(head_dim=128, dtype="float16")) == "memory"
        assert roof.bound(steps("fused")[0].intensity(seq_len=4096, dtype="float16")) == "compute"


def test_one_fused_length_is_where_the_bound_changes():
    roof, fused = Roofline(990e12, 3.35e12), steps("fused")[0]
    bounds = [roof.bound(fused.intensity(seq_len=n)) for n in range(64, 2048, 64)]
    assert bounds == sorted(bounds, reverse=True) and {*bounds} == {"memory", "compute"}


# -- counts against torch and against brute force ------------------------------------------------


def counted(fn) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "sizes", [(2, 3, 40, 40, 16, 16), (1, 2, 5, 33, 64, 24), (1, 1, 1, 1, 1, 1)]
)
def test_products_agree_with_the_flop_counter(sizes):
    import torch

    b, h, nq, nk, d, dv = sizes
    q, k, v = (torch.empty(b, h, n, w, device="meta") for n, w in ((nq, d), (nk, d), (nk, dv)))
    p, do = torch.empty(b, h, nq, nk, device="meta"), torch.empty(b, h, nq, dv, device="meta")
    at = {"batch": b, "heads": h, "seq_len": nq, "seq_len_k": nk, "head_dim": d, "head_dim_v": dv}
    forward, backward = by_key(), by_key(direction="backward")
    products = {
        "scores": (forward, lambda: q @ k.mT),
        "output": (forward, lambda: p @ v),
        "dv": (backward, lambda: p.mT @ do),
        "dp": (backward, lambda: do @ v.mT),
        "dq": (backward, lambda: p @ k),
        "dk": (backward, lambda: p.mT @ q),
    }
    for key, (side, product) in products.items():
        assert counted(product) == side[key].at(**at).flops, key


def test_fused_agrees_with_the_flop_counter_forward_and_backward():
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.utils import flop_counter

    b, h, nq, nk, d = 2, 3, 64, 96, 32
    q, k, v = (torch.empty(b, h, n, d, device="meta") for n in (nq, nk, nk))
    at = {"batch": b, "heads": h, "seq_len": nq, "seq_len_k": nk, "head_dim": d}
    forward = steps("fused")[0].at(**at).flops
    assert counted(lambda: scaled_dot_product_attention(q, k, v)) == forward
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    assert flop_counter.flop_registry[flash](q, k, v, out_val=None) == forward
    backward = flop_counter.sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)
    assert backward == steps("fused", direction="backward")[0].at(**at).flops == forward * 5 // 2


def test_naive_backward_has_four_products_and_fused_five():
    naive = total(steps(direction="backward"), "backward", "backward")
    fused = steps("fused", direction="backward")[0]
    at = {"seq_len": 256, "head_dim": 64}
    one = 2 * 256 * 256 * 64
    assert naive.at(**at).flops == 4 * one and fused.at(**at).flops == 5 * one


@given(nq=st.integers(1, 40), older=st.integers(0, 40), heads=st.integers(1, 3))
def test_causal_fused_counts_visible_pairs(nq, older, heads):
    nk = nq + older
    pairs = sum(j <= i + nk - nq for i in range(nq) for j in range(nk)) * heads
    cost = steps("fused", causal=True)[0].at(seq_len=nq, seq_len_k=nk, head_dim=8, heads=heads)
    assert cost.matmul == pairs * 4 * 8 and cost.exps == pairs


@given(blocks=st.integers(1, 9), older=st.integers(0, 40), block=st.sampled_from([1, 4, 16]))
def test_causal_reread_counts_the_keys_of_each_block(blocks, older, block):
    nq, d = blocks * block, 8
    nk = nq + older
    keys = sum(min(nk, (t + 1) * block + older) for t in range(blocks))
    sizes = problem(seq_len=nq, seq_len_k=nk, head_dim=d, block_m=block)
    step = steps("fused_reread", causal=True)[0]
    assert step.reads["K"](**sizes) == keys * d * 2
    whole = steps("fused_reread")[0]
    assert whole.reads["V"](**sizes) == blocks * nk * d * 2


def test_reread_counts_a_ragged_last_block_and_every_query_head():
    sizes = problem(seq_len=130, heads=8, kv_heads=2, head_dim=16, block_m=128)
    step = steps("fused_reread")[0]
    assert step.reads["K"](**sizes) == 8 * 2 * 130 * 16 * 2
    assert steps("fused")[0].reads["K"](**sizes) == 2 * 130 * 16 * 2


def test_bytes_of_each_naive_kernel_are_its_tensors_once():
    b, h, hkv, nq, nk, d, dv, e = 2, 6, 3, 40, 48, 16, 24, 2
    at = {"batch": b, "heads": h, "kv_heads": hkv, "seq_len": nq, "seq_len_k": nk}
    at |= {"head_dim": d, "head_dim_v": dv, "dtype": "float16"}
    q, o = b * h * nq * d * e, b * h * nq * dv * e
    k, v = b * hkv * nk * d * e, b * hkv * nk * dv * e
    s = b * h * nq * nk * e
    expected = {
        "scores": q + k + s,
        "scale": 2 * s,
        "mask": 2 * s + nq * nk,
        "softmax": 2 * s,
        "output": s + v + o,
    }
    found = {key: step.at(**at).bytes for key, step in by_key(causal=True).items()}
    assert found == expected
    assert total(steps(causal=True), "n", "n").at(**at).bytes == sum(expected.values())
    assert steps("fused")[0].at(**at).bytes == q + k + v + o + 4 * b * h * nq
    assert "scale" not in by_key(scale_kernel=False)


def test_naive_causal_saves_no_operation():
    at = {"seq_len": 64, "head_dim": 16}
    dense, causal = (total(steps(causal=c), "n", "n").at(**at) for c in (False, True))
    assert causal.matmul == dense.matmul and causal.bytes > dense.bytes


# -- properties --------------------------------------------------------------------------------


@given(SIZES)
def test_intensity_stays_below_its_limit_and_grows_with_length(sizes):
    longer = sizes | {"seq_len": sizes["seq_len"] + 1}
    for step in steps() + steps("fused"):
        limit = step.limit(**sizes)
        if step.key in ("softmax", "scale"):
            assert step.intensity(**sizes) == limit
        else:
            assert step.intensity(**sizes) < step.intensity(**longer) < limit
            share = step.reached(**sizes)
            assert 0 < share < 1 or (math.isinf(limit) and share == 0)


@given(peak=CEILING, bandwidth=CEILING, intensity=st.floats(1e-6, 1e9))
def test_attainable_is_below_both_ceilings_and_touches_one(peak, bandwidth, intensity):
    roof = Roofline(peak, bandwidth)
    reach = roof.attainable(intensity)
    assert reach <= peak and reach <= bandwidth * intensity
    assert reach == (bandwidth * intensity if roof.bound(intensity) == "memory" else peak) or (
        math.isclose(intensity, roof.ridge)
    )


@given(peak=CEILING, bandwidth=CEILING)
def test_roof_is_continuous_at_the_ridge(peak, bandwidth):
    roof = Roofline(peak, bandwidth)
    below, above = (roof.attainable(roof.ridge * f) for f in (1 - 1e-9, 1 + 1e-9))
    assert below == pytest.approx(peak, rel=1e-8) and above == pytest.approx(peak, rel=1e-8)
    assert roof.bound(roof.ridge) == "compute"


@given(peak=CEILING, bandwidth=CEILING, flops=st.floats(1, 1e15), moved=st.floats(1, 1e12))
def test_time_bounds_are_max_and_sum_and_agree_with_the_roof(peak, bandwidth, flops, moved):
    roof = Roofline(peak, bandwidth)
    bounds = roof.time(flops, moved)
    assert bounds.lower == max(flops / peak, moved / bandwidth)
    assert bounds.lower <= bounds.upper <= 2 * bounds.lower
    assert flops / bounds.lower == pytest.approx(roof.attainable(flops / moved))
    on_the_roof = Point("p", flops, moved, bounds.lower)
    assert on_the_roof.residual(roof) == 1
    assert Point("p", flops, moved, 2 * bounds.lower).residual(roof) == pytest.approx(2)


@given(SIZES)
def test_sizes_scale_counts_by_batch(sizes):
    for step in steps(causal=False) + steps("fused", causal=True):
        one, many = (step.at(**sizes | {"batch": b}) for b in (1, 3))
        assert (many.flops, many.bytes) == (3 * one.flops, 3 * one.bytes)
        assert many.intensity == one.intensity


# -- ceilings ----------------------------------------------------------------------------------

CARD = SimpleNamespace(
    name="Test card",
    peak={"bfloat16": 100e12, "float32": 10e12},
    memory_bandwidth=1e12,
    sm_count=10,
    boost_clock_hz=1.5e9,
    tensor_clock_hz=1e9,
)


def test_special_function_ceiling_is_charged_apart_from_the_cores():
    roof = Roofline.from_card(CARD, "bfloat16")
    assert roof.special_rate == special_rate(10, 1e9) == 1.6e11
    at = {"seq_len": 1024, "head_dim": 64}
    softmax, n2 = by_key()["softmax"], 1024 * 1024
    bounds = roof.time_of(softmax, **at)
    assert bounds.parts["vector"] == 4 * n2 / 10e12 and bounds.parts["special"] == n2 / 1.6e11
    assert bounds.parts["tensor"] == 0 and bounds.limited_by == "special"
    # without that ceiling the exponential is one more operation of the cores
    plain = Roofline(100e12, 1e12, vector_flops=10e12).time_of(softmax, **at)
    assert plain.parts["vector"] == 5 * n2 / 10e12 and "special" not in plain.parts
    # and with one peak only, everything runs at it
    assert Roofline(100e12, 1e12).time_of(softmax, **at).parts["tensor"] == 5 * n2 / 100e12


def test_products_and_exponentials_are_bounded_at_one_clock():
    """An H100's SM does 4096 operations or 16 exponentials in a clock (FlashAttention-3)."""
    for key in ("h100-sxm", "h200"):
        roof, card = Roofline.from_card(key, "float16"), hardware.card(key)
        assert roof.special_rate == 132 * 16 * 1.83e9
        assert card.tensor_clock_hz < card.boost_clock_hz  # or the choice below tests nothing
        assert roof.peak_flops / roof.special_rate == pytest.approx(4096 / 16, rel=1e-4)
        parts = roof.time_of(steps("fused")[0], seq_len=4096, head_dim=64, dtype="float16").parts
        assert parts["special"] == pytest.approx(parts["tensor"], rel=1e-4)


def test_kernels_in_a_row_add_their_bounds():
    roof, at = Roofline.from_card(CARD), {"seq_len": 256}
    each = [roof.time_of(step, **at) for step in steps()]
    whole = roof.time_of(steps(), **at)
    assert whole.lower == pytest.approx(sum(b.lower for b in each))
    assert whole.upper == pytest.approx(sum(b.upper for b in each))
    # launched apart they cannot overlap, so the sum of maxima is above the maximum of the sums
    assert whole.lower >= roof.time_of(total(steps(), "n", "n"), **at).lower


def test_from_record_reads_the_measured_ceilings_and_the_card_fills_the_rest(monkeypatch):
    values = {"copy_peak": 4e12, "matmul_peak_bfloat16": 700e12}
    known = SimpleNamespace(results=values, value=values.__getitem__, machine={"gpu": "Test card"})
    monkeypatch.setattr(module, "card_or_none", lambda gpu: CARD if gpu == "Test card" else None)
    roof = Roofline.from_record(known, "bfloat16")
    assert (roof.ridge, roof.source) == (175, "measured")
    assert (roof.special_rate, roof.vector_flops) == (1.6e11, 10e12)
    assert "Test card" in roof.label
    unknown = SimpleNamespace(results=values, value=values.__getitem__, machine={"gpu": None})
    roof = Roofline.from_record(unknown, "bfloat16")
    assert (roof.special_rate, roof.vector_flops) == (None, None)
    with pytest.raises(KeyError):
        Roofline.from_record(known, "float16")


def test_explanation_names_the_side_of_the_ridge():
    roof = Roofline(990e12, 3.35e12)
    assert roof.explain(64).startswith("memory-bound: 64 FLOP/byte is 0.22 of the ridge")
    assert roof.explain(2048).startswith("compute-bound: 2048 FLOP/byte is 6.9 times")


# -- what the interactive figure reads ------------------------------------------------------------


@given(SIZES)
def test_json_forms_evaluate_to_the_same_counts(sizes):
    values = problem(**sizes)

    def evaluate(form) -> float:
        return sum(c * math.prod(values[n] ** p for n, p in powers.items()) for c, powers in form)

    for step in steps(causal=True) + steps("fused", causal=True) + steps("fused_reread"):
        data, cost = step.to_json(), step.at(**sizes)
        assert evaluate(data["flops"]) == cost.flops and evaluate(data["bytes"]) == cost.bytes
        assert evaluate(data["exps"]) == cost.exps and evaluate(data["vector"]) == cost.vector


def test_ratio_reduces_and_finds_its_limit():
    n, d = symbols("N d")
    assert Ratio(6 * n**2 * d, 4 * n * d).reduced() == Ratio(3 * n, Form(2))
    assert Ratio(n, n**2 + 1).limit("N")(N=3) == 0
    assert Ratio(n**2, n).limit("N") is None
    assert Ratio(3 * n + 7, 2 * n)(N=7) == Fraction(2)
    assert Ratio(6 * n, 3 * n).latex() == "2"


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: steps("flash"), "method"),
        (lambda: steps(direction="sideways"), "direction"),
        (lambda: steps("fused_reread", direction="backward"), "method"),
        (lambda: total([], "a", "b"), "parts"),
        (lambda: steps()[0].at(seq_len=0), "seq_len"),
        (lambda: steps()[0].at(seq_len=2.0), "seq_len"),
        (lambda: steps()[0].at(seq_len=8, heads=6, kv_heads=4), "kv_heads"),
        (lambda: steps()[0].at(seq_len=8, dtype="fp12"), "dtype"),
        (lambda: steps()[0].at(seq_len=8, block_m=-1), "block_m"),
        (lambda: steps("fused", causal=True)[0].at(seq_len=8, seq_len_k=4), "seq_len_k"),
        (lambda: Roofline(0, 1e12), "peak_flops"),
        (lambda: Roofline(1e12, float("nan")), "bandwidth"),
        (lambda: Roofline(1e12, 1e12, source="guess"), "source"),
        (lambda: Roofline(1e12, 1e12, special_rate=-1), "special_rate"),
        (lambda: Roofline(1e12, 1e12).attainable(0), "intensity"),
        (lambda: Roofline(1e12, 1e12).time_of([]), "step"),
        (lambda: Roofline.from_card(CARD, "float8_e4m3fn"), "dtype"),
        (lambda: Point("p", 1, 1, 0), "seconds"),
        (lambda: special_rate(0, 1e9), "sm_count"),
    ],
)
def test_bad_input_names_the_argument(call, names):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.argument == names


# -- figures -----------------------------------------------------------------------------------


def test_figures_of_the_chapter_draw_in_both_themes_and_say_what_they_show():
    from labkit import plots

    roofs = [Roofline.from_card(CARD), Roofline(80e12, 0.9e12, "Test, measured", "measured")]
    at = {"seq_len": 512, "heads": 2}
    points = []
    for step in steps() + steps("fused"):
        cost = step.at(**at)
        seconds = 2 * roofs[1].time(cost.flops, cost.bytes).lower
        points.append(Point(step.name, cost.flops, cost.bytes, seconds))
    bounds = roofs[1].time_of(steps()[0], **at)
    row = {"label": "S", "lower": bounds.lower, "upper": bounds.upper, "measured": 2 * bounds.upper}
    curve = [(n, steps()[0].intensity(seq_len=n)) for n in (64, 128)]
    for drawing in (
        plots.roofline(roofs, points),
        plots.intensity_limits([("S = QKᵀ", curve, 64.0)], ridges={"A": 100.0}),
        plots.time_bounds([row]),
        plots.dram_ledger([{"label": "S", "formula": 2**20, "cold": None, "warm": 2**10}]),
    ):
        shown = plots.show(drawing)
        assert shown.light != shown.dark and len(shown.alt) > 60
    for call in (
        lambda: plots.roofline([]),
        lambda: plots.time_bounds([]),
        lambda: plots.dram_ledger([]),
    ):
        with pytest.raises(ArgumentError):
            plots.show(call())


def test_residual_lines_rise_from_each_point_to_the_first_roof():
    from labkit import plots

    roof = Roofline(1e12, 1e10, "roof", "measured")
    point = Point("p", 1e9, 1e9, 1.0)
    fig, alt = plots.roofline([roof], [point]).figure()
    (line,) = fig.axes[0].collections[0].get_segments()
    assert line[:, 1] == pytest.approx([1e9, 1e10]) and line[:, 0] == pytest.approx([1, 1])
    assert "roof" in alt and "p" in alt
