"""Bad input to Native Sparse Attention: refused by name, before anything is launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rejection import rejected

from labkit.errors import ArgumentError, LabError
from labkit.nsa import (
    NativeSparseAttention,
    checks,
    nsa_compressed_attention,
    nsa_func,
    nsa_selected_attention,
    nsa_window_attention,
    ops,
    select_blocks,
)

GPU = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parent.parent
B, T, HQ, H, D = 2, 40, 4, 2, 16


@pytest.fixture(autouse=True)
def _nothing_is_launched(monkeypatch):
    def launched(*args, **kwargs):
        raise AssertionError("a kernel was launched before the arguments were checked")

    monkeypatch.setattr(ops.selection, "forward", launched)
    monkeypatch.setattr(ops.compression, "forward", launched)
    monkeypatch.setattr(ops.topk, "select", launched)
    monkeypatch.setattr("labkit.flash.launch.forward", launched)


def qkv(device, q=(B, T, HQ, D), k=(B, T, H, D), v=(B, T, H, D), dtype=torch.float32):
    return [torch.zeros(s, dtype=dtype, device=device) for s in (q, k, v)]


def whole(device, gates=None, gate_shape=None, options=None, **shapes):
    q, k, v = qkv(device, **shapes)
    if gates is None:
        gates = [torch.zeros(gate_shape or q.shape[:3], device=device, dtype=q.dtype)] * 3
    return nsa_func(q, k, v, *gates, **(options or {}))


def selected(device, blocks=None, counts=None, options=None, **shapes):
    q, k, v = qkv(device, **shapes)
    if blocks is None:
        blocks = torch.zeros(B, T, H, 3, dtype=torch.int32, device=device)
    return nsa_selected_attention(q, k, v, blocks, counts, **{"block_size": 16, **(options or {})})


def compressed(device, options=None, **shapes):
    return nsa_compressed_attention(*qkv(device, **shapes), **(options or {}))


def window(device, options=None, **shapes):
    return nsa_window_attention(*qkv(device, **shapes), **{"window_size": 4, **(options or {})})


FUNCTIONS = (whole, selected, compressed, window)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_canary_a_good_call_does_launch(function, device):
    with pytest.raises(AssertionError, match="launched"):
        function(device)


# -- q, k, v -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("shapes", "argument", "says"),
    [
        ({"q": (T, HQ, D)}, "q", "4"),
        ({"v": (B, T, H)}, "v", "4"),
        ({"q": (B, 0, HQ, D)}, "q", "0"),
        ({"k": (1, T, H, D)}, "k", "batch"),
        ({"v": (1, T, H, D)}, "v", "batch"),
        ({"k": (B, T, H, D + 8)}, "k", "head_dim"),
        ({"v": (B, T - 1, H, D)}, "v", "one value per key"),
        ({"v": (B, T, H + 1, D)}, "v", "one value per key"),
        ({"k": (B, T, 3, D), "v": (B, T, 3, D)}, "k", "divide"),
        ({"q": (B, T, 2, D), "k": (B, T, 4, D), "v": (B, T, 4, D)}, "k", "divide"),
        ({"q": (B, T, 65, D), "k": (B, T, 1, D), "v": (B, T, 1, D)}, "k", "64"),
        ({"q": (B, T + 1, HQ, D)}, "q", "queries"),
        # heads first, with as many tokens as heads would have groups
        ({"q": (B, HQ, T, D), "k": (B, H, T, D), "v": (B, H, T, D)}, "q", "transpose(1, 2)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_go_together(function, shapes, argument, says, device):
    error = rejected(argument, says, call=lambda: function(device, **shapes))
    assert error.argument == f"{argument}.shape"


@pytest.mark.parametrize("width", [8, 15, 257])
def test_a_head_dim_that_has_no_kernel(width, device):
    wide = {"q": (B, T, HQ, width), "k": (B, T, H, width)}
    rejected("q", str(width), "16 to 256", call=lambda: whole(device, **wide))
    rejected("v", str(width), "16 to 256", call=lambda: whole(device, v=(B, T, H, width)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_a_dtype_that_has_no_kernel(dtype, device):
    rejected("q.dtype", "float16", "naive_nsa", call=lambda: compressed(device, dtype=dtype))


def test_dtypes_that_differ(device):
    q, k, v = qkv(device)
    rejected("k.dtype", call=lambda: nsa_window_attention(q, k.half(), v, window_size=3))
    rejected("v.dtype", call=lambda: nsa_window_attention(q, k, v.half(), window_size=3))


def test_devices_that_differ(device):
    q, k, v = qkv(device)
    rejected("k.device", "meta", call=lambda: nsa_compressed_attention(q, k.to("meta"), v))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_tensor(position, device):
    tensors = qkv(device)
    tensors[position] = tensors[position].tolist()
    rejected("qkv"[position], call=lambda: nsa_compressed_attention(*tensors))


@pytest.mark.skipif(GPU, reason="about the interpreter")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_bfloat16_in_the_interpreter(function):
    rejected("q.dtype", "interpreter", call=lambda: function("cpu", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_tensors_on_the_cpu_beside_a_gpu(function):
    with pytest.raises(ArgumentError, match="cuda"):
        function("cpu")


# -- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((B, T, H), "query and head"),  # one per KV head
        ((B, T), "query and head"),
        ((B, T, HQ, 1), "squeeze(-1)"),
        ((B, HQ, T), "transpose(1, 2)"),
        ((1, T, HQ), "query and head"),
        ((B, T, HQ, 3), "query and head"),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gates_of_another_shape(shape, says, which, device):
    gates = [torch.zeros(B, T, HQ, device=device)] * 3
    gates[which] = torch.zeros(shape, device=device)
    name = ("g_cmp", "g_slc", "g_swa")[which]
    rejected(name, says, call=lambda: whole(device, gates))


def test_gates_of_another_kind(device):
    good = torch.zeros(B, T, HQ, device=device)
    rejected("g_slc.dtype", call=lambda: whole(device, [good, good.double(), good]))
    rejected("g_slc.dtype", call=lambda: whole(device, [good, good.long(), good]))
    rejected("g_swa.device", call=lambda: whole(device, [good, good, good.to("meta")]))
    rejected("g_cmp", call=lambda: whole(device, [0.5, good, good]))
    rejected("g_cmp", "every branch is off", call=lambda: whole(device, [None] * 3))


def test_gates_in_float32_beside_half(device):
    gates = [torch.zeros(B, T, HQ, device=device)] * 3
    with pytest.raises(AssertionError, match="launched"):
        whole(device, gates, dtype=torch.float16)


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -64, 8, 48, 63, 256, 64.0, True, "64", None])
def test_block_sizes_that_have_no_tile(size, device):
    rejected("block_size", call=lambda: whole(device, options={"block_size": size}))
    rejected("block_size", call=lambda: selected(device, options={"block_size": size}))


@pytest.mark.parametrize("size", [-1, -512, 2.0, True, False, "8", None, (4, 4)])
def test_a_window_that_is_no_count(size, device):
    rejected("window_size", call=lambda: whole(device, options={"window_size": size}))
    rejected("window_size", call=lambda: window(device, options={"window_size": size}))


def test_a_window_of_0_may_be_an_int_of_numpy_or_torch(device):
    zeros = (np.int64(0), torch.tensor(0))
    assert all(checks.check_window(zero) == 0 for zero in zeros)
    for wrong in (np.int64(-1), 2.0):
        says = ("0 for none",)  # and not "at least 1"
        rejected("window_size", *says, call=lambda w=wrong: window(device, {"window_size": w}))


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "16", None])
def test_block_counts_that_are_no_count(count, device):
    rejected("block_counts", call=lambda: whole(device, options={"block_counts": count}))


def test_a_count_for_each_query_belongs_to_selection(device):
    counts = {"block_counts": torch.ones(B, T, H, dtype=torch.int32, device=device)}
    says = (str((B, T, H)), "nsa_selected_attention")
    rejected("block_counts", *says, call=lambda: whole(device, options=counts))


@pytest.mark.parametrize("forced", [1, (1,), (1, 2, 3), (1.0, 2), (-1, 2), (1, 0), None, "ab"])
def test_forced_blocks_that_are_no_pair(forced, device):
    rejected("forced", call=lambda: whole(device, options={"forced": forced}))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scale", [0, -0.5, float("nan"), float("inf"), True, "1"])
def test_a_scale_that_is_no_positive_number(function, scale, device):
    rejected("scale", call=lambda: function(device, options={"scale": scale}))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_precision_that_is_not_known_or_for_half(function, device):
    rejected("precision", "tf32", call=lambda: function(device, options={"precision": "fp32"}))
    half = {"dtype": torch.float16, "options": {"precision": "tf32"}}
    rejected("precision", "float16", call=lambda: function(device, **half))


def test_a_stride_that_leaves_tokens_out(device):
    options = {"block_size": 32, "stride": 33}
    rejected("stride", "32", call=lambda: compressed(device, options=options))
    rejected("stride", call=lambda: compressed(device, options={"stride": 0}))
    rejected("block_size", call=lambda: compressed(device, options={"block_size": 0}))


def test_a_pooling_that_gives_something_else(device):
    good = {"block_size": 16, "compress": lambda k, v: (k[:, ::20], v[:, ::20])}
    with pytest.raises(AssertionError, match="launched"):
        compressed(device, options=good)
    for wrong in (lambda k, v: (k, v), lambda k, v: (k[:, ::20].half(), v[:, ::20].half())):
        rejected("compress", call=lambda w=wrong: compressed(device, good | {"compress": w}))
    pair = "a pair"
    for wrong in (lambda k, v: k[:, ::20], lambda k, v: None, lambda k, v: (k, v, v)):
        rejected("compress", pair, call=lambda w=wrong: compressed(device, good | {"compress": w}))
    rejected("compress", "function", call=lambda: compressed(device, good | {"compress": 3}))


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [("window_size", 1, True), ("block_counts", 1, 1.0), ("block_counts", 1, True),
     ("scale", 1.0, True), ("scale", 1, True)],
)  # fmt: skip
def test_what_was_checked_before_does_not_let_its_like_pass(option, good, bad, device):
    """1, 1.0 and True are equal and have one hash: a memory of checked calls must tell them."""
    with pytest.raises(AssertionError, match="launched"):
        whole(device, options={option: good})
    rejected(option, call=lambda: whole(device, options={option: bad}))


def test_what_was_checked_before_does_not_let_other_gates_pass(device):
    with pytest.raises(AssertionError, match="launched"):
        whole(device)
    rejected("g_cmp", call=lambda: whole(device, gate_shape=(B, T, HQ, 1)))


# -- block_indices and block_counts ----------------------------------------------------------------


def choice(device, shape=(B, T, H, 3), dtype=torch.int32, **entries):
    blocks = torch.zeros(shape, dtype=dtype, device=device)
    for value in entries.values():
        blocks[-1, -1, -1, -1] = value
    return blocks


@pytest.mark.parametrize(("value", "says"), [(3, "0 to 2"), (2**20, "0 to 2"), (-2, "not −1")])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_blocks_that_do_not_exist(value, says, dtype, device):
    """40 keys make 3 blocks of 16; one wrong number among 480 is found and shown."""
    bad = choice(device, dtype=dtype, at=value)
    rejected("block_indices", str(value), says, call=lambda: selected(device, bad))


def test_a_choice_that_was_good_is_checked_again_when_it_changes(device):
    """What was checked is remembered by the tensor and its version, not by its place alone."""
    blocks = choice(device)
    for _ in range(2):
        with pytest.raises(AssertionError, match="launched"):
            selected(device, blocks)
    rejected("block_indices", call=lambda: selected(device, blocks + 9))
    with pytest.raises(AssertionError, match="launched"):
        selected(device, blocks)
    blocks[0, 0, 0, 0] = 9
    rejected("block_indices", call=lambda: selected(device, blocks))
    blocks[0, 0, 0, 0] = 2
    with pytest.raises(AssertionError, match="launched"):
        selected(device, blocks)
    rejected("block_indices", call=lambda: selected(device, blocks, options={"block_size": 32}))


def test_a_number_that_does_not_fit_32_bits_is_not_cut_off(device):
    bad = choice(device, dtype=torch.int64, at=2**32)
    rejected("block_indices", str(2**32), call=lambda: selected(device, bad))


def test_a_block_in_the_future_is_no_error(device):
    """Its keys are not seen; that it is named does no harm."""
    with pytest.raises(AssertionError, match="launched"):
        selected(device, torch.full((B, T, H, 3), 2, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool, torch.uint8])
def test_blocks_that_are_no_integers(dtype, device):
    rejected(
        "block_indices.dtype", "int32", call=lambda: selected(device, choice(device, dtype=dtype))
    )


@pytest.mark.parametrize(
    ("shape", "says"),
    [((B, T, HQ, 3), "KV head"), ((B, H, T, 3), "transpose(1, 2)"), ((B, T, H), "4"),
     ((1, T, H, 3), "KV head"), ((B, T - 1, H, 3), "KV head"), ((B, T, H, 0), "0")],
)  # fmt: skip
def test_choices_of_another_shape(shape, says, device):
    blocks = torch.zeros(shape, dtype=torch.int32, device=device)
    rejected("block_indices", says, call=lambda: selected(device, blocks))


def test_a_choice_elsewhere_or_no_tensor(device):
    rejected("block_indices.device", call=lambda: selected(device, choice("meta")))
    rejected("block_indices", call=lambda: selected(device, [[0]]))


@pytest.mark.parametrize("count", [0, -1, 4, 1.0, True])
def test_more_blocks_than_slots(count, device):
    rejected("block_counts", call=lambda: selected(device, counts=count))


@pytest.mark.parametrize(("value", "says"), [(4, "3 slots"), (-1, "negative")])
def test_a_tensor_of_counts_with_a_wrong_one(value, says, device):
    counts = torch.ones(B, T, H, dtype=torch.int64, device=device)
    counts[0, 3, 1] = value
    rejected("block_counts", says, call=lambda: selected(device, counts=counts))


def test_a_tensor_of_counts_of_another_kind(device):
    counts = torch.ones(B, T, H, device=device)
    rejected("block_counts.dtype", call=lambda: selected(device, counts=counts))
    rejected("block_counts.shape", call=lambda: selected(device, counts=counts[..., None].int()))
    rejected("block_counts.shape", call=lambda: selected(device, counts=counts[:, :, :1].int()))


# -- select_blocks -------------------------------------------------------------------------------


def chosen(device, q=(B, T, HQ, D), k_cmp=(B, 2, H, D), lse=(B, HQ, T), **options):
    q, k_cmp, lse = (torch.zeros(s, device=device) for s in (q, k_cmp, lse))
    return select_blocks(q, k_cmp, lse, **{"block_size": 16, **options})


def test_the_canary_a_good_choice_does_launch(device):
    with pytest.raises(AssertionError, match="launched"):
        chosen(device)


def test_an_lse_in_the_wrong_layout(device):
    """[B, M, HQ] instead of [B, HQ, M]: a known mistake of public code."""
    rejected("lse.shape", "heads come before seq_len", call=lambda: chosen(device, lse=(B, T, HQ)))


def test_compressed_keys_that_do_not_fit(device):
    rejected("k_cmp.shape", "make 2", call=lambda: chosen(device, k_cmp=(B, 3, H, D)))
    rejected("k_cmp.shape", call=lambda: chosen(device, k_cmp=(B, 2, H, D + 1)))
    rejected("k_cmp.shape", "divide", call=lambda: chosen(device, k_cmp=(B, 2, 3, D)))
    rejected("k_cmp.shape", "make 4", call=lambda: chosen(device, stride=8))
    rejected("k_cmp.shape", call=lambda: chosen(device, k_cmp=(B, 0, 0, D)))
    rejected("seq_len", "39", call=lambda: chosen(device, seq_len=39))


@pytest.mark.parametrize("width", [8, 300])
def test_a_choice_by_a_head_dim_that_has_no_kernel(width, device):
    shapes = {"q": (B, T, HQ, width), "k_cmp": (B, 2, H, width)}
    rejected("q.shape", str(width), call=lambda: chosen(device, **shapes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_choice_by_a_dtype_that_has_no_kernel(dtype, device):
    q, k_cmp = (torch.zeros(B, n, h, D, dtype=dtype, device=device) for n, h in ((T, HQ), (2, H)))
    lse = torch.zeros(B, HQ, T, device=device)
    rejected("q.dtype", call=lambda: select_blocks(q, k_cmp, lse, block_size=16))


# -- varlen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
def test_compressed_keys_of_sequences_are_counted(count, device):
    """Kernels read as many as the offsets say: fewer were read beyond the end of the tensor."""
    cu = torch.tensor([0, 20, 40], device=device)
    shapes = {"q": (1, T, HQ, D), "k_cmp": (1, count, H, D), "lse": (1, HQ, T)}
    rejected("k_cmp.shape", "make 2", call=lambda: chosen(device, cu_seqlens=cu, **shapes))
    shapes = {"q": (1, T, HQ, D), "k": (1, T, H, D), "v": (1, T, H, D)}
    how = {"cu_seqlens": cu, "block_size": 16,
           "compress": lambda k, v, cu: (k[:, :count], v[:, :count])}  # fmt: skip
    rejected("compress", "(1, 2, 2, 16)", call=lambda: compressed(device, how, **shapes))


def test_a_choice_among_sequences_takes_no_length_beside_them(device):
    shapes = {"q": (1, T, HQ, D), "k_cmp": (1, 2, H, D), "lse": (1, HQ, T)}
    cu = torch.tensor([0, 20, 40], device=device)
    rejected("seq_len", call=lambda: chosen(device, cu_seqlens=cu, seq_len=80, **shapes))


def varlen(device, cu, dtype=torch.int32, function=compressed, batch=1):
    shapes = {n: (batch, 9, h, D) for n, h in (("q", HQ), ("k", H), ("v", H))}
    cu = torch.tensor(cu, dtype=dtype, device=device)
    extra = {}
    if function is selected:
        extra["blocks"] = torch.zeros(batch, 9, H, 3, dtype=torch.int32, device=device)
    return function(device, options={"cu_seqlens": cu}, **shapes, **extra)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("cu", "says"),
    [
        ((1, 4, 9), "Start at 0"),
        ((-1, 4, 9), "Start at 0"),
        ((0, 5, 4, 9), "sequence 1"),
        ((0, 12, 9), "sequence 1"),
        ((0, 4, 10), "overruns"),
        ((0, 4, 8), "stops short"),
        ((0,), "offsets"),
        ((), "offsets"),
        (((0, 4), (4, 9)), "offsets"),
    ],
)
def test_offsets_that_do_not_describe_the_tensors(function, cu, says, device):
    rejected("cu_seqlens", says, call=lambda: varlen(device, cu, function=function))


def test_offsets_of_another_kind(device):
    rejected("cu_seqlens.dtype", "int32", call=lambda: varlen(device, (0, 9), torch.float32))
    rejected("cu_seqlens", call=lambda: compressed(device, options={"cu_seqlens": [0, T]}))
    rejected("q.shape", "batch", call=lambda: varlen(device, (0, 9), batch=2))
    elsewhere = torch.tensor([0, T], device="meta")
    one = {n: (1, T, h, D) for n, h in (("q", HQ), ("k", H), ("v", H))}
    rejected("cu_seqlens.device", call=lambda: compressed(device, {"cu_seqlens": elsewhere}, **one))


def test_fewer_queries_than_keys_with_offsets(device):
    shapes = {"q": (1, 5, HQ, D), "k": (1, 9, H, D), "v": (1, 9, H, D)}
    cu = torch.tensor([0, 9], device=device)
    rejected("q.shape", "every key", call=lambda: compressed(device, {"cu_seqlens": cu}, **shapes))


def test_blocks_of_another_sequence(device):
    """Two sequences of 8 and 32 tokens: block 1 exists for the second only."""
    q, k, v = qkv(device, q=(1, T, HQ, D), k=(1, T, H, D), v=(1, T, H, D))
    cu = torch.tensor([0, 8, T], device=device)
    blocks = torch.zeros(1, T, H, 2, dtype=torch.int64, device=device)
    blocks[0, 8:] = 1
    with pytest.raises(AssertionError, match="launched"):
        nsa_selected_attention(q, k, v, blocks, block_size=16, cu_seqlens=cu)
    blocks[0, 7, 1, 0] = 1
    rejected(
        "block_indices", "sequence",
        call=lambda: nsa_selected_attention(q, k, v, blocks, block_size=16, cu_seqlens=cu),
    )  # fmt: skip


# -- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "argument"),
    [
        ((64, 4, 3), {}, "num_kv_heads"),
        ((65, 4, 2), {}, "num_heads"),
        ((0, 4, 2), {}, "dim"),
        ((64, 4, 2, 15), {}, "head_dim"),  # odd, with rotary positions
        ((64, 4, 2), {"block_size": 24}, "block_size"),
        ((64, 4, 2), {"block_counts": 0}, "block_counts"),
        ((64, 4, 2), {"window_size": -1}, "window_size"),
        ((64, 4, 2), {"compression": "average"}, "compression"),
        ((64, 4, 2), {"compression_length": 16, "compression_stride": 17}, "stride"),
        ((64, 4, 2), {"forced": (0, 0)}, "forced"),
        ((64, 4, 2), {"implementation": "cuda"}, "implementation"),
    ],
)
def test_layers_that_cannot_be(arguments, options, argument):
    rejected(argument, call=lambda: NativeSparseAttention(*arguments, **options))


def test_what_a_layer_cannot_attend_over(device):
    layer = NativeSparseAttention(64, 4, 2, device=device)
    x = torch.zeros(2, 20, 64, device=device)
    rejected("x.shape", "64", call=lambda: layer(x[..., :32]))
    rejected("x.shape", call=lambda: layer(x[0]))
    cache, cu = layer.new_cache(batch=2), torch.tensor([0, 20], device=device)
    rejected("x.shape", "batch", call=lambda: layer(x[:1], cache=cache))
    rejected("cu_seqlens", "cache", call=lambda: layer(x, cu_seqlens=cu, cache=cache))
    rejected("cu_seqlens", "cache", call=lambda: layer(x, cu_seqlens=[0, 20], cache=cache))
    rejected("x.shape", "at least 1", call=lambda: layer(x[:, :0]))
    rejected("x.shape", "at least 1", call=lambda: layer(x[:0], cache=cache))
    rejected("x.shape", "list", call=lambda: layer.step([1.0], cache))
    rejected("cu_seqlens", "stops short", call=lambda: layer(x[:1], cu_seqlens=cu - cu // 20))
    other = NativeSparseAttention(64, 4, 2, device=device)
    rejected("cache", "this layer", call=lambda: other(x, cache=cache))
    rejected("batch", call=lambda: layer.new_cache(batch=0))


# -- nothing that could run it ---------------------------------------------------------------------


def _says(code: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(GPU, reason="about a machine without a GPU")
def test_without_gpu_and_interpreter_the_error_says_how_to_switch_it_on(clean_env):
    said = _says(
        "import torch\n"
        "from labkit.errors import NoGpuError\n"
        "from labkit.nsa import nsa_func, naive_nsa_with_compression\n"
        "x, g = torch.ones(1, 4, 1, 16), torch.ones(1, 4, 1)\n"
        "try:\n    nsa_func(x, x, x, g, g, g)\n"
        "except NoGpuError as error:\n    print(error)\n"
        "print('still:', naive_nsa_with_compression(x, x, x, g, g, g, 2, 16, 2).shape)\n",
        clean_env,
    )
    assert "TRITON_INTERPRET=1" in said and "use_interpreter_if_no_gpu" in said
    assert "still: torch.Size([1, 4, 1, 16])" in said


def test_without_triton_the_error_says_what_works_and_it_does(clean_env):
    """A finder that denies Triton, as on a machine that has no wheel for it."""
    said = _says(
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None\n"
        "import torch, labkit.nsa\n"
        "from labkit.errors import MissingDependencyError\n"
        "for name in ('nsa_func', 'nsa_selected_attention', 'select_blocks'):\n"
        "    try:\n        getattr(labkit.nsa, name)\n"
        "    except MissingDependencyError as error:\n        print(error)\n"
        "layer = labkit.nsa.NativeSparseAttention(32, 2, 1, implementation='reference')\n"
        "print('still:', layer(torch.ones(1, 5, 32)).shape)\n"
        "try:\n    labkit.nsa.NativeSparseAttention(32, 2, 1)(torch.ones(1, 5, 32))\n"
        "except MissingDependencyError as error:\n    print('layer:', error)\n",
        clean_env,
    )
    assert said.count("pip install triton") == 4 and "naive_nsa" in said
    assert "still: torch.Size([1, 5, 32])" in said
    assert "layer:" in said


def test_every_refusal_is_one_that_labkit_means(device):
    with pytest.raises(LabError):
        whole(device, options={"window_size": -1})
    with pytest.raises(ValueError, match="window_size"):
        whole(device, options={"window_size": -1})
