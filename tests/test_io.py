"""labkit.io: what is counted is what the kernels move, and the closed forms say the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from labkit import hardware, io, kernels, roofline
from labkit.errors import ArgumentError, LabError

GPU = torch.cuda.is_available()
needs_interpreter = pytest.mark.skipif(GPU, reason="counts in the interpreter")
ROOT = Path(__file__).resolve().parent.parent

#: what the kernels call their tensors → what the closed forms do
NAMES = {"q": "Q", "k": "K", "v": "V", "s": "S", "p": "P", "o": "O", "lse": "LSE",
         "largest": "m", "total": "l"}  # fmt: skip


def by_form(traffic):
    return {(NAMES.get(t, t), kind): size for (t, kind), size in traffic.by_tensor().items()}


# -- counting: kernels of a few lines, counted by hand ------------------------------------------


@triton.jit
def _masked(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0)
    tl.store(y + i, value, mask=i < n)


@triton.jit
def _unmasked(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def _scalar_and_atomic(x, y, BLOCK: tl.constexpr):
    first = tl.load(x)
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y + i, first, mask=i < 5)
    tl.atomic_cas(y, first, first)


@triton.jit
def _block_pointer(x, y, n, BLOCK: tl.constexpr):
    source = tl.make_block_ptr(x, (n,), (1,), (0,), (BLOCK,), (0,))
    target = tl.make_block_ptr(y, (n,), (1,), (0,), (BLOCK,), (0,))
    value = tl.load(source, boundary_check=(0,), padding_option="zero")
    tl.store(target, value, boundary_check=(0,))


@triton.jit
def _descriptor(x, y, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, COLUMNS], [COLUMNS, 1], [ROWS, COLUMNS])
    target = tl.make_tensor_descriptor(y, [rows, COLUMNS], [COLUMNS, 1], [ROWS, COLUMNS])
    for first in range(0, rows, ROWS):
        target.store([first, 0], source.load([first, 0]))


@triton.jit
def _host_descriptor(x, y, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(y + i, x.load([0, 0]))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.bool])
def test_masked_lanes_move_nothing(dtype):
    x, y = torch.zeros(100, dtype=dtype), torch.zeros(100, dtype=dtype)
    with io.count() as traffic:
        _masked[(2,)](x, y, 100, BLOCK=64)
    load = traffic.total(tensor="x", kind="load")
    assert (load.elements, load.masked, load.calls) == (100, 28, 2)
    assert load.bytes == 100 * x.element_size() and load.times == 1.0
    assert traffic.loaded == traffic.stored == load.bytes
    assert traffic.bytes == 2 * load.bytes
    assert traffic.outside.elements == 0
    assert traffic.launches == [("_masked", (2, 1, 1))]


@needs_interpreter
def test_a_missing_mask_is_seen_as_access_outside():
    # 28 lanes of the second program lie behind x, in memory that belongs to nobody counted
    memory = torch.zeros(2, 128)
    x, y = memory[0, :100], memory[1]
    with io.count() as traffic:
        _unmasked[(2,)](x, y, 100, BLOCK=64)
    assert traffic.outside.elements == 28
    assert traffic.total(tensor="x").elements == 100
    assert traffic.total(tensor="y").elements == 128
    assert traffic.loaded == 128 * 4


@needs_interpreter
def test_a_launch_that_is_all_masked_moves_nothing():
    x, y = torch.zeros(64), torch.zeros(64)
    with io.count() as traffic:
        _masked[(1,)](x, y, 0, BLOCK=64)
    assert traffic.bytes == 0
    assert traffic.total(tensor="x").masked == 64 and traffic.total(tensor="y").masked == 64
    assert traffic.outside.masked == 0


@needs_interpreter
def test_scalars_and_atomics_are_counted():
    x, y = torch.ones(1), torch.zeros(8)
    with io.count() as traffic:
        _scalar_and_atomic[(3,)](x, y, BLOCK=8)
    assert traffic.total(kind="load").elements == 3
    atomic = traffic.total(kind="atomic")
    assert atomic.elements == 3 * (5 + 1) and atomic.masked == 3 * 3
    assert traffic.stored == 0 and traffic.bytes == 4 * (3 + 18)
    assert y[:5].tolist() == [3.0] * 5


@needs_interpreter
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_count_what_their_boundary_lets_through():
    x, y = torch.zeros(100), torch.zeros(100)
    with io.count() as traffic:
        _block_pointer[(1,)](x, y, 100, BLOCK=128)
    for name in "xy":
        access = traffic.total(tensor=name)
        assert (access.elements, access.masked) == (100, 28)


@needs_interpreter
def test_descriptors_of_the_kernel_count_what_lies_inside():
    x, y = torch.zeros(20, 16), torch.zeros(20, 16)
    with io.count() as traffic:
        _descriptor[(1,)](x, y, 20, COLUMNS=16, ROWS=8)
    for name in "xy":
        access = traffic.total(tensor=name)
        assert (access.elements, access.masked, access.calls) == (320, 64, 3)


@needs_interpreter
def test_descriptors_of_the_host_go_by_the_argument():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.zeros(6, 16), torch.zeros(8, 16)
    described = TensorDescriptor(x, [6, 16], [16, 1], [8, 16])
    with io.count() as traffic:
        _host_descriptor[(1,)](described, y, COLUMNS=16, ROWS=8)
    assert traffic.total(tensor="x").elements == 6 * 16
    assert traffic.total(tensor="y").elements == 8 * 16


@needs_interpreter
def test_names_of_the_caller_win_and_overlapping_tensors_share_a_line():
    x, y = torch.zeros(100), torch.zeros(100)
    with io.count(source=x) as traffic:
        _masked[(1,)](x, y, 100, BLOCK=128)
        _masked[(1,)](x, x, 100, BLOCK=128)
        _masked[(1,)](x[:60], x[20:], 60, BLOCK=64)
    tensors = [a.tensor for a in traffic.accesses]
    assert tensors == ["source", "y", "source", "x, y", "x, y"]
    assert traffic.total(tensor="source", kind="load").elements == 200
    assert traffic.total(tensor="source", kind="store").elements == 100
    shared = traffic.total(tensor="x, y")
    assert shared.elements == 120


@needs_interpreter
def test_strided_views_of_one_storage_are_told_apart_where_they_do_not_overlap():
    both = torch.zeros(2, 100)
    with io.count() as traffic:
        _masked[(1,)](both[0], both[1], 100, BLOCK=128)
    assert traffic.by_tensor() == {("x", "load"): 400, ("y", "store"): 400}


@needs_interpreter
def test_counts_nest_and_stop_at_the_end_of_the_block():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = InterpreterBuilder.create_masked_load, GridExecutor._init_args_hst
    x, y = torch.zeros(10), torch.zeros(10)
    with io.count() as outer:
        _masked[(1,)](x, y, 10, BLOCK=16)
        with io.count() as inner:
            _masked[(1,)](x, y, 10, BLOCK=16)
    _masked[(1,)](x, y, 10, BLOCK=16)
    assert (outer.loaded, inner.loaded) == (80, 40)
    assert before == (InterpreterBuilder.create_masked_load, GridExecutor._init_args_hst)


@needs_interpreter
def test_the_interpreter_is_put_back_after_an_error():
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_masked_store
    with pytest.raises(ZeroDivisionError), io.count():
        _ = 1 / 0
    assert InterpreterBuilder.create_masked_store is before


@needs_interpreter
def test_a_sum_of_nothing_is_refused():
    x = torch.zeros(10)
    with io.count() as traffic:
        _masked[(1,)](x, torch.zeros(10), 10, BLOCK=16)
    assert traffic.total(kind="atomic").bytes == 0  # a kind is known, seen or not
    for wrong in ({"tensor": "z"}, {"kernel": "softmax"}, {"kind": "read"}):
        with pytest.raises(ArgumentError, match="was not counted"):
            traffic.total(**wrong)
    with pytest.raises(ArgumentError, match="not a tensor"), io.count(Q=3):
        pass


@needs_interpreter
def test_the_table_says_how_often_a_tensor_went_by():
    x, y = torch.zeros(100), torch.zeros(100)
    with io.count() as traffic:
        _masked[(2,)](x, y, 100, BLOCK=64)
        _masked[(2,)](x, y, 100, BLOCK=64)
    lines = str(traffic).splitlines()
    assert lines[1].split() == ["_masked", "x", "load", "200", "800", "bytes", "2", "56"]
    assert lines[-1].split() == ["all", "stores", "800", "bytes"]


COMPILED = """
from unittest import mock
import torch
from labkit import errors, io
with mock.patch("labkit.io.counting._interpreter_on", lambda: False):
    try:
        with io.count():
            pass
    except errors.LabError as error:
        print(error)
"""


def test_compiled_kernels_are_refused_with_what_works(clean_env):
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env={**clean_env, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for what in ("TRITON_INTERPRET=1", "io_law", "attention_traffic", "Nsight Compute"):
        assert what in done.stdout


@needs_interpreter
def test_an_unknown_interpreter_is_named(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.delattr(InterpreterBuilder, "create_atomic_cas")
    saved = InterpreterBuilder.create_masked_load
    with pytest.raises(LabError, match="create_atomic_cas"), io.count():
        pass
    assert InterpreterBuilder.create_masked_load is saved


def test_the_model_loads_neither_torch_nor_triton():
    code = "import sys, labkit.io; print('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "False"]


# -- closed forms against counts ----------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize(("m", "n", "k"), [(64, 96, 32), (33, 65, 40), (1, 1, 1)])
def test_matmul_moves_what_its_form_says(m, n, k):
    with io.count() as traffic:
        kernels.matmul(torch.randn(m, k), torch.randn(k, n))
    tile = {"bm": 32, "bn": 32, "Tm": -(-m // 32), "Tn": -(-n // 32)}
    forms = io.matmul_traffic()
    expected = {key: form(M=m, N=n, K=k, e=4, **tile) for key, form in forms.items()}
    assert traffic.by_tensor() == expected
    assert traffic.outside.elements == 0
    assert traffic.bytes == io.total_bytes(forms, M=m, N=n, K=k, e=4, **tile)


CASES = [
    # (batch, heads, Nq, Nk, d, dv, block_m, block_n, dtype)
    (1, 1, 64, 64, 32, 32, 32, 16, torch.float32),
    (2, 1, 33, 70, 24, 40, 16, 32, torch.float16),
    (1, 2, 1, 17, 16, 16, 16, 16, torch.float32),
    (1, 1, 50, 1, 16, 8, 32, 16, torch.float32),
]


@needs_interpreter
@pytest.mark.parametrize("order", io.ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:8])))
def test_attention_moves_what_its_form_says_to_the_byte(order, case):
    b, h, nq, nk, d, dv, bm, bn, dtype = case
    q, k, v = (torch.randn(b, h, n, c).to(dtype) for n, c in ((nq, d), (nk, d), (nk, dv)))
    with io.count(Q=q, K=k, V=v) as traffic:
        if order == "naive":
            kernels.naive_in_kernels(q, k, v, block_m=bm, block_n=bn)
        else:
            kernels.tiled_attention(q, k, v, order=order, block_m=bm, block_n=bn)
    sizes = io.tiles_of(
        batch=b, heads=h, seq_len=nq, seq_len_k=nk, head_dim=d, head_dim_v=dv,
        block_m=bm, block_n=bn, dtype=dtype,
    )  # fmt: skip
    expected = {key: form(**sizes) for key, form in io.attention_traffic(order).items()}
    assert by_form(traffic) == expected
    assert traffic.bytes == io.total_bytes(io.attention_traffic(order), **sizes)
    assert traffic.outside.elements == 0


def _flash(nq, nk, d, dv, bm, bn, *, heads=2, kv_heads=2, causal=False, descriptors=False):
    """Count one forward and one backward pass of labkit.flash with a given tile."""
    launch = pytest.importorskip("labkit.flash.launch")
    from labkit.flash.tuning import Config

    shapes = ((heads, nq, d), (kv_heads, nk, d), (kv_heads, nk, dv), (heads, nq, dv))
    q, k, v, dout = (torch.randn(1, *shape) for shape in shapes)
    call = launch.Call(causal, d**-0.5, None, "ieee", nq, nk)
    config = Config(bm, bn, descriptors=descriptors)
    with io.count(Q=q, K=k, V=v) as forward:
        o, lse = launch.forward(q, k, v, call, config=config, splits=1)
    # sizes in the symbols of the forms; the scheduling of the tiles moves no bytes
    sizes = io.tiles_of(
        seq_len=nq, seq_len_k=nk, head_dim=d, head_dim_v=dv, heads=heads, kv_heads=kv_heads,
        block_m=bm, block_n=bn,
    )  # fmt: skip
    return (q, k, v, dout, o, lse, call, config), forward, sizes


@needs_interpreter
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_flash_forward_moves_what_q_outer_does(kv_heads, descriptors):
    # Nq · group > 128: fewer queries would share a tile with the other heads of their group
    _, forward, sizes = _flash(66, 70, 32, 16, 64, 32, kv_heads=kv_heads, descriptors=descriptors)
    expected = {key: form(**sizes) for key, form in io.attention_traffic("q_outer").items()}
    assert by_form(forward) == expected
    assert forward.outside.elements == 0


@needs_interpreter
def test_flash_causal_moves_what_the_roofline_counts():
    n, d, bm = 128, 16, 32
    _, forward, _ = _flash(n, n, d, d, bm, 16, causal=True)
    (step,) = roofline.steps("fused_reread", causal=True)
    where = {"seq_len": n, "head_dim": d, "heads": 2, "dtype": "float32", "block_m": bm}
    assert forward.bytes == step.at(**where).bytes


@needs_interpreter
def test_flash_backward_moves_what_its_form_says():
    launch = pytest.importorskip("labkit.flash.launch")
    (q, k, v, dout, o, lse, call, config), _, sizes = _flash(48, 64, 16, 16, 16, 16, kv_heads=1)
    names = {"Q": q, "K": k, "V": v, "O": o, "dO": dout, "LSE": lse}
    with io.count(**names) as traffic:
        launch.backward(
            dout, None, q, k, v, o, lse, call, dkdv_config=config, dq_config=config
        )
    renamed = {"dq": "dQ", "dk": "dK", "dv": "dV"}
    found = {(renamed.get(t, t), kind): size for (t, kind), size in traffic.by_tensor().items()}
    expected = {key: form(**sizes) for key, form in io.flash_backward_traffic().items()}
    assert found == expected


# -- the model ----------------------------------------------------------------------------------


def _leading(order, d, block):
    n = 2**14
    sizes = io.tiles_of(seq_len=n, head_dim=d, block_m=block, block_n=block)
    return io.total_bytes(io.attention_traffic(order), **sizes) / 4 / n**2


def test_leading_terms_are_those_of_the_text():
    d, b = 64, 64
    assert _leading("naive", d, b) == pytest.approx(4 + 3 * d / b, rel=0.01)
    assert _leading("q_outer", d, b) == pytest.approx(2 * d / b, rel=0.01)
    assert _leading("two_pass", d, b) == pytest.approx(3 * d / b, rel=0.01)
    assert _leading("kv_outer", d, b) == pytest.approx((3 * d + 4) / b, rel=0.01)


def test_one_form_serves_the_roofline_and_this_chapter():
    (step,) = roofline.steps("fused_reread")
    where = {"seq_len": 1000, "head_dim": 80, "heads": 3, "dtype": "float16"}
    sizes = io.tiles_of(**where, block_m=128, block_n=64)
    assert io.total_bytes(io.attention_traffic("q_outer"), **sizes) == step.at(
        **where, block_m=128
    ).bytes


def test_rereads_are_the_law():
    form = io.kv_rereads()
    for knob, change, factor in (("seq_len", 2, 4), ("head_dim", 2, 4), ("fast", 2, 0.5)):
        values = []
        for times in (1, change):
            size = {"seq_len": 512, "head_dim": 64, "fast": 2**15}
            size[knob] *= times
            block_m = io.largest_block_m(size.pop("fast"), size["head_dim"])
            values.append(form(**io.tiles_of(**size, block_m=block_m, block_n=16)))
        assert values[1] == factor * values[0], knob


def test_law_has_its_limits():
    n, d = 4096, 64
    assert io.law(n, d, n * d) < 2.1 * n * d  # everything fits: read it once
    assert io.law(n, d, d * d) == n * d + n * n  # the two regimes meet
    below, above = io.law(n, d, d * d - 1), io.law(n, d, d * d + 1)
    assert above < io.law(n, d, d * d) < below < 1.01 * above
    assert io.law(n, d, d * d // 16) == pytest.approx(n * d + 4 * n * n)


def test_no_form_is_below_the_compulsory_traffic_or_the_lower_bound():
    for order in io.ORDERS:
        sizes = io.tiles_of(seq_len=512, head_dim=64, block_m=512, block_n=512)
        moved = io.total_bytes(io.attention_traffic(order), **sizes)
        assert moved >= 4 * io.compulsory_elements(512, 64)
    for block in (16, 32, 64, 128):
        tile = {"bm": block, "bn": block, "Tm": 512 // block, "Tn": 512 // block}
        moved = io.total_bytes(io.matmul_traffic(), M=512, N=512, K=512, e=1, **tile)
        assert moved >= io.matmul_lower_bound(512, 512, 512, block * block + 2 * block)


@pytest.mark.parametrize("d", [16, 64, 100, 256])
@pytest.mark.parametrize("fast", [2**14, 2**15, 50_000])
def test_largest_block_fits_and_the_next_does_not(fast, d):
    block = io.largest_block_m(fast, d)
    assert io.tile_elements(block, 16, d) <= fast < io.tile_elements(2 * block, 16, d)
    assert block & (block - 1) == 0


def test_a_fast_memory_without_room_for_a_row_is_refused():
    with pytest.raises(ArgumentError, match="one row needs"):
        io.largest_block_m(100, 64)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ArgumentError, match="fast"):
            io.largest_block_m(wrong, 64)
    with pytest.raises(ArgumentError, match="Known: naive"):
        io.attention_traffic("outer")


def test_a_tile_for_a_card_fits_both_memories():
    for key in hardware.CARDS:
        for d in (64, 128):
            limits = io.tile_for_card(key, head_dim=d, block_n=32, stages=1)
            card = hardware.card(key)
            shared = (limits.block_m * d + 32 * 2 * d) * 2
            registers = limits.block_m * (d + 32 + 2) * 4
            assert 0 < shared <= card.smem_per_block and registers <= card.registers_per_sm
            twice = 2 * limits.block_m
            too_big = (twice * d + 64 * d) * 2 > card.smem_per_block
            assert too_big or twice * (d + 34) * 4 > card.registers_per_sm


def test_a_tile_for_a_card_says_which_memory_stops_it():
    h200 = io.tile_for_card("h200", head_dim=128, block_n=128)
    assert (h200.block_m, h200.limited_by) == (128, "registers")
    t4 = io.tile_for_card("t4", head_dim=128, block_n=64)
    assert (t4.block_m, t4.limited_by) == (0, "shared memory")
