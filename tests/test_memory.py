"""Predicted, traced and measured memory must be the same number, or the gap must have a name."""

from __future__ import annotations

import csv
import functools
import gc
import io
import itertools
import json
import subprocess
import sys
import weakref
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from labkit.errors import ArgumentError, LabError, NotEnoughMemoryError
from labkit.memory import (
    FORMS,
    VARIANTS,
    attention_forms,
    attention_memory,
    attention_peak,
    budget,
    check_fits,
    free_memory,
    longest_seq_len,
    measure,
    measuring,
    problem_sizes,
    saved_for_backward,
    schedule,
    scores_buffer_bytes,
    trace,
    visible_pairs,
)
from labkit.naive import naive_attention
from labkit.units import GIB, KIB, MIB

# -- tables ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seq_len", "rest", "scores", "percent"),
    [
        (512, 256 * KIB, 1 * MIB, 80),
        (1024, 512 * KIB, 4 * MIB, 89),
        (2048, 1 * MIB, 16 * MIB, 94),
        (4096, 2 * MIB, 64 * MIB, 97),
        (8192, 4 * MIB, 256 * MIB, 98),
        (16384, 8 * MIB, 1 * GIB, 99),
    ],
)
def test_scores_outgrow_the_rest(seq_len, rest, scores, percent):
    table = attention_memory(seq_len=seq_len, head_dim=64, dtype="float16")
    assert table.bytes_of("Q", "K", "V", "O") == rest
    assert table.bytes_of("S", "P") == scores
    assert int(100 * table.scores_share) == percent or round(100 * table.scores_share) == percent
    assert table.total == rest + scores


@pytest.mark.parametrize(
    ("batch", "heads", "seq_len", "expected"),
    [(1, 12, 2048, 192 * MIB), (8, 12, 4096, 6 * GIB), (1, 1, 512, 1 * MIB)],
)
def test_heads_and_batch_multiply_the_scores(batch, heads, seq_len, expected):
    table = attention_memory(seq_len=seq_len, heads=heads, batch=batch, dtype="float16")
    assert table.bytes_of("S", "P") == expected
    both = scores_buffer_bytes(seq_len, batch=batch, heads=heads, dtype="float16", copies=2)
    assert both == expected


def test_one_scores_buffer_in_float32():
    sizes = {256: 0.25, 512: 1, 1024: 4, 2048: 16}
    assert {n: scores_buffer_bytes(n) / MIB for n in sizes} == sizes


@settings(max_examples=40, deadline=None)
@given(
    n_q=st.integers(1, 60),
    n_k=st.integers(1, 60),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "float64"]),
    causal=st.booleans(),
    training=st.booleans(),
)
def test_each_row_has_the_bytes_of_its_tensor(
    n_q, n_k, batch, kv_heads, group, dtype, causal, training
):
    table = attention_memory(
        seq_len=n_q, seq_len_k=n_k, batch=batch, heads=kv_heads * group, kv_heads=kv_heads,
        head_dim=3, head_dim_v=5, dtype=dtype, causal=causal, training=training,
    )  # fmt: skip
    for row in table.rows:
        tensor = torch.empty(row.shape, dtype=getattr(torch, row.dtype), device="meta")
        assert row.bytes == tensor.nbytes, row
        assert row.useful_bytes <= row.bytes
    seen = torch.ones(n_q, n_k).tril(n_k - n_q).sum().item()
    assert visible_pairs(n_q, n_k) == seen
    expected = seen / (n_q * n_k) if causal else 1
    assert table["S"].useful_bytes == pytest.approx(expected * table["S"].bytes)
    assert ("mask" in {r.name for r in table.rows}) == causal


def test_a_table_of_what_runs_matches_what_runs():
    q, k, v = (torch.empty(2, 4, 33, 8, device="meta") for _ in range(3))
    table = attention_memory(seq_len=33, heads=4, batch=2, head_dim=8, dtype="float32", causal=True)
    inputs = table.bytes_of("Q", "K", "V")
    assert table.peak == inputs + trace(naive_attention, q, k, v, causal=True).peak


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_table_prints_exports_and_renders():
    table = attention_memory(seq_len=2048, heads=12, dtype="float16", causal=True, training=True)
    text = str(table)
    assert text == repr(table)
    assert "96 MiB" in text and "1 KiB = 1024 bytes" in text and "causal" in text
    assert max(map(len, text.splitlines())) <= 100
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert {r["name"]: int(r["bytes"]) for r in rows} == {r.name: r.bytes for r in table.rows}
    assert rows[4]["shape"] == "1x12x2048x2048"
    data = json.loads(table.to_json())
    assert data["total_bytes"] == table.total == sum(t["bytes"] for t in data["tensors"])
    page = _Cells()
    page.feed(table._repr_html_())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == 1
    scopes = [attrs.get("scope") for tag, attrs in page.tags if tag == "th"]
    assert scopes.count("row") == len(table.rows) + 1
    assert scopes.count("col") == 7
    assert "96 MiB" in page.text


def test_a_fused_table_has_no_square():
    table = attention_memory(seq_len=4096, method="fused", training=True)
    assert table.scores_share == 0
    assert {row.form.degree("Nq") for row in table.rows} <= {0, 1}
    assert "LSE" in {row.name for row in table.rows}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["naive", "fused"])
def test_longest_seq_len_is_the_exact_inverse(method, training, causal):
    problem = {"heads": 12, "head_dim": 64, "dtype": "bfloat16", "causal": causal}
    for limit in (10**6, 12 * GIB, 141e9):
        n = longest_seq_len(limit, method=method, training=training, **problem)
        at, beyond = (
            attention_memory(seq_len=m, method=method, training=training, **problem).total
            for m in (n, n + 1)
        )
        assert at <= limit < beyond
        n = longest_seq_len(limit, method=method, training=training, counting="peak", **problem)
        variant = "out_of_place" if method == "naive" else "fused"
        at, beyond = (
            attention_peak(
                seq_len=m, variant=variant, training=training, with_inputs=True, **problem
            )
            for m in (n, n + 1)
        )
        assert at <= limit < beyond


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: attention_memory(seq_len=0), "seq_len"),
        (lambda: attention_memory(seq_len=-5), "seq_len"),
        (lambda: attention_memory(seq_len=2.0), "seq_len"),
        (lambda: attention_memory(seq_len=8, heads=True), "heads"),
        (lambda: attention_memory(seq_len=8, heads=6, kv_heads=4), "kv_heads"),
        (lambda: attention_memory(seq_len=8, dtype="float12"), "dtype"),
        (lambda: attention_memory(seq_len=8, method="flash"), "method"),
        (lambda: attention_memory(seq_len=8).bytes_of("X"), "name"),
        (lambda: scores_buffer_bytes(8, copies=0), "copies"),
        (lambda: scores_buffer_bytes("8"), "seq_len"),
        (lambda: longest_seq_len(0), "memory_bytes"),
        (lambda: longest_seq_len(float("inf")), "memory_bytes"),
        (lambda: longest_seq_len(1e9, counting="all"), "counting"),
        (lambda: longest_seq_len(1e9, counting="peak", method="best"), "method"),
        (lambda: schedule("fast"), "variant"),
        (lambda: schedule(device="tpu"), "device"),
        (lambda: schedule(unseeing=True), "unseeing"),
        (lambda: trace(3), "fn"),
        (lambda: measure(3), "fn"),
        (lambda: measure(lambda: 1), "args"),
        (lambda: saved_for_backward(torch.softmax, torch.ones(2), 0), "args"),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(ArgumentError) as error:
        call()
    assert error.value.argument == argument


def test_too_little_memory_for_one_token_is_said():
    with pytest.raises(LabError, match=r"not even seq_len = 1"):
        longest_seq_len(100, heads=12)


def test_tables_and_schedules_load_no_torch():
    code = (
        "import sys, labkit.memory as m; t = m.attention_memory(seq_len=99, training=True); str(t);"
        "m.longest_seq_len(1e9, counting='peak'); m.schedule('in_place'); m.free_memory();"
        "assert not {'torch', 'triton', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- schedule against trace -------------------------------------------------------


def forward_backward(q, k, v, dout, *, variant, causal=False):
    """One forward and backward pass; O stays alive to the end."""
    if variant == "fused":
        out = scaled_dot_product_attention(q, k, v, is_causal=causal)
    elif variant == "checkpointed":
        attention = functools.partial(naive_attention, causal=causal)
        out = checkpoint(attention, q, k, v, use_reentrant=False, preserve_rng_state=False)
    else:
        out = naive_attention(q, k, v, causal=causal, variant=variant)
    return torch.autograd.grad(out, (q, k, v), dout)


def problem(n_q, n_k, heads, kv_heads, dtype, *, grad, device="meta", batch=2, d=8, dv=12):
    options = {"dtype": getattr(torch, dtype), "device": device}
    shapes = (batch, heads, n_q, d), (batch, kv_heads, n_k, d), (batch, kv_heads, n_k, dv)
    q, k, v = (torch.zeros(s, **options, requires_grad=grad) for s in shapes)
    dout = torch.zeros(batch, heads, n_q, dv, **options)
    sizes = problem_sizes(
        seq_len=n_q, seq_len_k=n_k, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=d, head_dim_v=dv, dtype=dtype,
    )  # fmt: skip
    return q, k, v, dout, sizes


def plan(variant, dtype, causal, sizes, **kwargs):
    return schedule(
        variant,
        causal=causal,
        dtype=dtype,
        grouped=sizes["H"] != sizes["Hkv"],
        unseeing=causal and sizes["Nq"] > sizes["Nk"],
        **kwargs,
    )


def assert_same_life(traced, predicted, sizes):
    """Every creation has the same bytes at the same moment, the peak and the rest too."""
    moments = predicted.timeline(**sizes)
    expected = [(m["bytes"], m["live"], m["name"]) for m in moments if m["bytes"] > 0]
    got = [(size, live) for _, size, live in traced.allocations]
    assert got == [(size, live) for size, live, _ in expected], "\n".join(
        f"{op} {size} {live}  |  {want}"
        for (op, size, live), want in itertools.zip_longest(
            traced.allocations, expected, fillvalue=(None,) * 3
        )
    )
    assert traced.peak == predicted.peak(**sizes)
    assert traced.left == moments[-1]["live"]


#: Nq, Nk, heads, KV heads
CASES = [(33, 33, 1, 1), (7, 40, 4, 2), (40, 7, 4, 1), (9, 1, 3, 3), (21, 21, 4, 2)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_forward_lives_as_scheduled(variant, causal, dtype):
    for n_q, n_k, heads, kv_heads in CASES:
        q, k, v, _, sizes = problem(n_q, n_k, heads, kv_heads, dtype, grad=False)
        traced = trace(naive_attention, q, k, v, variant=variant, causal=causal)
        assert_same_life(traced, plan(variant, dtype, causal, sizes), sizes)


@pytest.mark.parametrize("variant", [*VARIANTS, "checkpointed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_backward_live_as_scheduled(variant, causal, dtype):
    for n_q, n_k, heads, kv_heads in CASES:
        *tensors, sizes = problem(n_q, n_k, heads, kv_heads, dtype, grad=True)
        traced = trace(forward_backward, *tensors, variant=variant, causal=causal)
        assert_same_life(traced, plan(variant, dtype, causal, sizes, training=True), sizes)


def test_a_forward_pass_that_records_keeps_p():
    q, k, v, _, sizes = problem(20, 20, 2, 2, "float32", grad=True)
    for variant in VARIANTS:
        traced = trace(naive_attention, q, k, v, variant=variant, causal=True)
        assert_same_life(traced, plan(variant, "float32", True, sizes, records_grad=True), sizes)
        forms = attention_forms()
        assert traced.left == sum(forms[name](**sizes) for name in ("P", "O", "mask"))


def test_the_fused_schedule_is_what_autograd_sees_of_it():
    *tensors, sizes = problem(64, 64, 2, 2, "float32", grad=True, dv=8)
    traced = trace(forward_backward, *tensors, variant="fused")
    # dQ, dK, dV come from one operator; nothing dies between them
    assert traced.peak == schedule("fused", training=True).peak(**sizes)


def test_known_peaks_in_units_of_s():
    big = {"seq_len": 4096, "dtype": "float32", "head_dim": 8}
    S = scores_buffer_bytes(4096)
    small = 0.02  # O and dV are 8 / 4096 of S each
    forward = {v: attention_peak(**big, variant=v) / S for v in VARIANTS}
    assert forward["out_of_place"] == forward["softmax_fp32"] == 2.0
    assert forward["in_place"] == pytest.approx(1, abs=small)
    both = {v: attention_peak(**big, variant=v, training=True, causal=True) / S for v in FORMS}
    assert both["out_of_place"] == pytest.approx(3.25, abs=small)
    assert both["in_place"] == both["out_of_place"]  # the worst moment is in the backward pass
    assert both["checkpointed"] == both["out_of_place"]
    assert both["fused"] < 0.02


def test_half_precision_pays_for_a_float32_softmax():
    big = {"seq_len": 4096, "dtype": "float16", "head_dim": 8, "variant": "softmax_fp32"}
    S = scores_buffer_bytes(4096, dtype="float16")
    assert attention_peak(**big, device="cpu") == 5 * S  # S, S in float32, P in float32
    # S and P in float32, then P in half as well; S waits until the step is over
    assert attention_peak(**big, device="cuda") == 4 * S
    # CUDA converts in the softmax's kernel for float16 alone
    assert attention_peak(**{**big, "dtype": "bfloat16"}, device="cuda") == 5 * S


def test_cudas_softmax_backward_holds_a_product_of_its_own():
    big = {"seq_len": 4096, "dtype": "float16", "head_dim": 8, "training": True}
    S, small = scores_buffer_bytes(4096, dtype="float16"), 0.02
    for variant, cpu, cuda in (("out_of_place", 3, 4), ("in_place", 3, 4), ("softmax_fp32", 6, 7)):
        on = {d: attention_peak(**big, variant=variant, device=d) / S for d in ("cpu", "cuda")}
        assert on["cpu"] == pytest.approx(cpu, abs=small)
        assert on["cuda"] == pytest.approx(cuda, abs=small)
        plan = schedule(variant, training=True, dtype="float16", device="cuda")
        sizes = problem_sizes(seq_len=4096, head_dim=8)
        assert "dP ⊙ P" in plan.at_peak(**sizes)
        assert plan.without_scratch().peak(**sizes) < plan.peak(**sizes)


def test_the_form_of_the_peak_is_the_peak():
    for variant, causal, training in itertools.product(VARIANTS, (False, True), (False, True)):
        s = schedule(variant, causal=causal, training=training)
        sizes = problem_sizes(seq_len=512, heads=2)
        assert s.peak_form(**sizes)(**sizes) == s.peak(**sizes) == sum(s.at_peak(**sizes).values())
    sizes = problem_sizes(seq_len=512, heads=2)
    form = schedule("out_of_place", training=True).peak_form(**sizes)
    assert form.degree("Nq") == 1 and form.degree("Nk") == 1
    forms = attention_forms()
    assert form == 3 * forms["S"] + forms["O"] + forms["dV"]


# -- trace -----------------------------------------------------------------------


def test_a_trace_allocates_nothing_and_counts_outputs_not_inputs():
    x = torch.empty(2**15, 2**15, device="meta")  # 4 GiB that do not exist
    traced = trace(lambda x: (x * 2).sum(), x)
    assert (traced.peak, traced.left) == (4 * GIB + 4, 4)
    assert trace(lambda x: x.T.reshape(-1)[:5], torch.empty(3, 3)).peak == 36  # one copy
    assert trace(lambda x: x.add_(1).view(-1), torch.empty(3, 3)).peak == 0


def test_a_trace_knows_what_is_alive_at_its_peak():
    q, k, v, *_ = problem(64, 64, 1, 1, "float32", grad=False, batch=1)
    traced = trace(naive_attention, q, k, v)
    # S has been scaled: the first moment at which two of them are alive
    assert [e.op for e in traced.alive_at_peak()] == ["bmm", "mul"]
    text = str(traced)
    assert "peak 32 KiB" in text and "freed" in text
    assert sum(e.bytes for e in traced.events) == traced.left


def test_a_function_that_needs_values_is_not_traced_but_measured():
    def picky(x):
        return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(LabError, match="Measure it instead"):
        trace(picky, torch.ones(100))
    report = measure(picky, torch.ones(100))
    assert report.traced is None
    assert "not traced: cannot trace 'picky'" in str(report)
    assert report.measured >= 400


# -- measure ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_measured_is_predicted_but_for_python_numbers(variant, dtype):
    for training in (False, True):
        *tensors, _ = problem(65, 65, 3, 3, dtype, grad=training, device="cpu", d=16, dv=16)
        common = {"variant": variant, "causal": True}
        peak = attention_peak(
            seq_len=65, heads=3, batch=2, head_dim=16, dtype=dtype, training=training, **common
        )
        fn = forward_backward if training else naive_attention
        report = measure(fn, *tensors[: 4 if training else 3], predicted=peak, **common)
        assert report.predicted == report.traced == peak
        if report.measured - peak not in range(17):  # the scale and a cast of it
            # oneDNN converts the operands of a product on some CPUs, and the report says so
            assert "inside bmm while it runs" in report.gaps[0], report
            continue
        assert report.method == measuring.CPU_METHOD
        assert report.allocated is None and report.reserved is None
        assert report.agree == (report.measured == peak)
        assert report.agree or "Python numbers" in report.gaps[0]


def test_a_kernels_own_scratch_is_named():
    q, k, v, *_ = problem(256, 256, 2, 2, "bfloat16", grad=False, device="cpu", dv=8)
    report = measure(scaled_dot_product_attention, q, k, v)
    assert report.measured > report.traced
    assert "flash_attention_for_cpu while it runs" in " ".join(report.gaps)


def test_a_wrong_prediction_is_pointed_out():
    x = torch.ones(1000)
    report = measure(lambda x: x + x, x, predicted=1000)
    assert report.measured == report.traced == 4000
    assert "traced − predicted = +2.93 KiB" in report.gaps[0]
    assert not report.agree


def test_a_run_does_not_profit_from_the_one_before():
    w = torch.ones(1000, requires_grad=True)

    def step(w):
        (w * w).sum().backward()

    first, second = measure(step, w), measure(step, w)
    assert first.measured == second.measured
    # w meets itself: 2 gradients of 4000 bytes, which autograd adds in place, a trace does not
    assert first.measured - 8000 in range(17)
    assert first.traced - 12000 in range(17)
    assert "on FakeTensors it makes a third" in first.gaps[0]
    assert w.grad is None


def test_gradients_of_the_run_before_are_dropped_first():
    w = torch.ones(1000, requires_grad=True)

    def step(w):
        (w * w).sum().backward()
        with torch.no_grad():
            return torch.cat([w, w, w])  # beside the new gradient

    assert measure(step, w).measured - 16000 in range(17)


def test_what_dies_but_was_alive_before_is_not_counted():
    calls, held = [], []

    def hold_then_drop(x):
        calls.append(len(calls))  # trace, warm-up, measured run; and again
        if len(calls) == 3:
            held.append(x + x)
        if len(calls) == 6:
            held.clear()
        return x * x

    x = torch.ones(1000)
    assert measure(hold_then_drop, x).measured == 8000
    assert measure(hold_then_drop, x).measured == 4000


def test_what_cannot_be_measured_is_never_zero(monkeypatch):
    monkeypatch.setattr(
        measuring,
        "_measure_cpu",
        lambda call, tensors: (None, None, "the profiler saw no memory events"),
    )
    report = measure(lambda x: x + 1, torch.ones(10))
    assert report.measured is None
    assert report.to_dict()["measured"] is None
    assert "not measured: the profiler saw no memory events" in str(report)
    assert "not measured" in report._repr_html_()


def test_the_profilers_chatter_stays_out_of_the_notebook(capfd):
    measure(lambda x: x + 1, torch.ones(10))
    assert capfd.readouterr().err == ""
    with measuring._without_profiler_noise():
        import os

        os.write(2, b"USDT: profiler_start\na real warning\n")
    assert capfd.readouterr().err == "a real warning\n"


def test_what_the_function_raises_reaches_the_caller():
    def broken(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        measure(broken, torch.ones(3))


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ArgumentError, match="one device"):
        measure(torch.add, torch.ones(3), torch.ones(3, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_gpu_holds_what_was_predicted(variant, training, dtype):
    *tensors, _ = problem(513, 513, 4, 4, dtype, grad=training, device="cuda", d=64, dv=64)
    common = {"variant": variant, "causal": True}
    peak = attention_peak(
        seq_len=513, heads=4, batch=2, dtype=dtype, training=training, device="cuda", **common
    )
    fn = forward_backward if training else naive_attention
    report = measure(fn, *tensors[: 4 if training else 3], predicted=peak, **common)
    assert report.method == measuring.CUDA_METHOD
    assert report.predicted == report.measured
    assert report.measured <= report.allocated
    if not training:
        assert report.traced == report.measured
    else:  # the softmax's product, inside its operator
        sizes = problem_sizes(seq_len=513, heads=4, batch=2, dtype=dtype)
        plan = schedule(variant, causal=True, training=True, dtype=dtype, device="cuda")
        assert report.traced == plan.without_scratch().peak(**sizes)
        assert "own scratch" in report.gaps[0]


# -- saved for backward --------------------------------------------------------------


def test_autograd_keeps_p_once_and_the_mask():
    q, k, v, _, sizes = problem(40, 40, 4, 2, "float32", grad=True)
    forms = attention_forms()
    plain = saved_for_backward(naive_attention, q, k, v)
    assert plain.beyond_inputs == forms["P"](**sizes)
    (p,) = [t for t in plain.tensors if not t.is_input]
    assert set(p.by) == {"SoftmaxBackward0.result", "BmmBackward0.self"}
    inputs = sum(forms[name](**sizes) for name in "QKV")
    assert plain.total == plain.beyond_inputs + inputs
    causal = saved_for_backward(naive_attention, q, k, v, causal=True)
    assert causal.beyond_inputs == forms["P"](**sizes) + forms["mask"](**sizes)


def test_a_float32_softmax_keeps_p_twice():
    q, k, v, _, sizes = problem(40, 40, 2, 2, "float16", grad=True)
    saved = saved_for_backward(naive_attention, q, k, v, variant="softmax_fp32")
    assert saved.beyond_inputs == 3 * attention_forms()["P"](**sizes)


def test_fused_attention_keeps_o_and_one_number_per_row():
    q, k, v, _, sizes = problem(40, 40, 2, 2, "float32", grad=True, dv=8, device="cpu")
    saved = saved_for_backward(scaled_dot_product_attention, q, k, v)
    forms = attention_forms()
    assert saved.beyond_inputs == forms["O"](**sizes) + forms["LSE"](**sizes)


def test_checkpoint_keeps_the_inputs_only():
    q, k, v, *_ = problem(40, 40, 2, 2, "float32", grad=True, device="cpu")
    calls = []

    def counted(q, k, v):
        calls.append(1)
        return naive_attention(q, k, v)

    saved = saved_for_backward(functools.partial(checkpoint, counted, use_reentrant=False), q, k, v)
    assert saved.beyond_inputs == 0
    assert len(calls) == 1  # looking does not run the function again


def test_saved_is_the_same_with_and_without_memory():
    for device in ("cpu", "meta"):
        q, k, v, *_ = problem(12, 30, 4, 2, "float32", grad=True, device=device)
        text = str(saved_for_backward(naive_attention, q, k, v, causal=True))
        if device == "cpu":
            first = text
    assert text == first
    assert "Softmax.result" in text


def test_a_function_cut_off_from_autograd_is_said():
    with pytest.raises(LabError, match="no_grad"):
        saved_for_backward(lambda x: x.detach() * 2, torch.ones(2, requires_grad=True))


# -- budget -------------------------------------------------------------------------


def test_free_memory_of_this_machine_is_plausible():
    free = free_memory()
    assert free is None or 2**20 < free < 2**50
    assert free_memory("tpu") is None


def test_a_container_limit_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "_available", lambda: 64 * GIB)
    monkeypatch.setattr(budget, "_cgroup_left", lambda: 2 * GIB)
    assert free_memory() == 2 * GIB
    with pytest.raises(NotEnoughMemoryError, match=r"a test needs 3 GiB .* cpu has 2 GiB free"):
        check_fits(3 * GIB, "a test")
    check_fits(2 * GIB, "a test")
    monkeypatch.setattr(budget, "_available", lambda: None)
    monkeypatch.setattr(budget, "_cgroup_left", lambda: None)
    check_fits(2**60, "where nobody can tell")


def test_looking_at_saved_tensors_leaves_nothing_behind():
    # An earlier version kept P alive in a cycle through autograd's graph, which no collector sees.
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    kept = []

    def attention(*inputs):
        out, _, probabilities = naive_attention(*inputs, return_scores=True)
        kept.append(weakref.ref(probabilities))
        return out

    saved_for_backward(attention, q, k, v)
    gc.collect()
    assert kept[0]() is None
