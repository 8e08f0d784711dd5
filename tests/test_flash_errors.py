"""Bad input: refused by name, before anything is launched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from rejection import rejected

from labkit.errors import ArgumentError
from labkit.flash import flash_attention, flash_attention_varlen, launch

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _nothing_is_launched(monkeypatch):
    def launched(*args, **kwargs):
        raise AssertionError("a kernel was launched before the arguments were checked")

    monkeypatch.setattr(launch, "forward", launched)


def qkv(device, q=(2, 4, 9, 16), k=(2, 2, 7, 16), v=(2, 2, 7, 16), dtype=torch.float32):
    return [torch.zeros(s, dtype=dtype, device=device) for s in (q, k, v)]


def test_the_canary_a_good_call_does_launch(device):
    with pytest.raises(AssertionError, match="launched"):
        flash_attention(*qkv(device))


@pytest.mark.parametrize(
    ("shapes", "argument"),
    [
        ({"q": (4, 9, 16)}, "q"),
        ({"k": (2, 2, 7, 16, 1)}, "k"),
        ({"v": (2, 2, 7)}, "v"),
        ({"q": (2, 4, 0, 16)}, "q"),
        ({"k": (2, 2, 0, 16), "v": (2, 2, 0, 16)}, "k"),
        ({"k": (1, 2, 7, 16)}, "k"),  # another batch
        ({"v": (1, 2, 7, 16)}, "v"),
        ({"k": (2, 2, 7, 24)}, "k"),  # another head_dim
        ({"v": (2, 2, 8, 16)}, "v"),  # another number of keys
        ({"v": (2, 4, 7, 16)}, "v"),  # another number of heads
        ({"k": (2, 3, 7, 16), "v": (2, 3, 7, 16)}, "k"),  # 3 heads do not divide 4
        ({"k": (2, 8, 7, 16), "v": (2, 8, 7, 16)}, "k"),  # more KV heads than query heads
    ],
)
def test_shapes_that_do_not_go_together(shapes, argument, device):
    error = rejected(argument, call=lambda: flash_attention(*qkv(device, **shapes)))
    assert error.argument == f"{argument}.shape"


@pytest.mark.parametrize("width", [1, 8, 15, 257, 512])
def test_a_head_dim_that_has_no_kernel(width, device):
    wide = {"q": (2, 4, 9, width), "k": (2, 2, 7, width)}
    rejected("q", str(width), "16 to 256", call=lambda: flash_attention(*qkv(device, **wide)))
    rejected(
        "v", str(width), "16 to 256",
        call=lambda: flash_attention(*qkv(device, v=(2, 2, 7, width))),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_that_has_no_kernel(dtype, device):
    rejected(
        "q.dtype", "float16", "float32",
        call=lambda: flash_attention(*qkv(device, dtype=dtype)),
    )  # fmt: skip


def test_dtypes_that_differ(device):
    q, k, v = qkv(device)
    rejected("k.dtype", "float16", call=lambda: flash_attention(q, k.half(), v))
    rejected("v.dtype", "float16", call=lambda: flash_attention(q, k, v.half()))


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_bfloat16_in_the_interpreter():
    rejected(
        "q.dtype", "bfloat16", "interpreter",
        call=lambda: flash_attention(*qkv("cpu", dtype=torch.bfloat16)),
    )  # fmt: skip


def test_devices_that_differ(device):
    q, k, v = qkv(device)
    rejected("k.device", "meta", call=lambda: flash_attention(q, k.to("meta"), v))
    rejected("v.device", "meta", call=lambda: flash_attention(q, k, v.to("meta")))


@pytest.mark.gpu
def test_tensors_on_the_cpu_beside_a_gpu():
    with pytest.raises(ArgumentError, match="cuda"):
        flash_attention(*qkv("cpu"))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_tensor(position, device):
    tensors = qkv(device)
    tensors[position] = tensors[position].tolist()
    rejected("qkv"[position], call=lambda: flash_attention(*tensors))


@pytest.mark.parametrize("window", [0, -1, True, False, 2.0, "8", (4, 4), float("inf")])
def test_a_window_that_is_no_positive_integer(window, device):
    rejected("window", call=lambda: flash_attention(*qkv(device), window=window))


@pytest.mark.parametrize("scale", [0, -0.5, float("nan"), float("inf"), True, "1"])
def test_a_scale_that_is_no_positive_number(scale, device):
    rejected("scale", call=lambda: flash_attention(*qkv(device), scale=scale))


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [("window", 1, True), ("window", 1, 1.0), ("scale", 1.0, True), ("scale", 1, True)],
)
def test_what_was_checked_before_does_not_let_its_like_pass(option, good, bad, device):
    """1, 1.0 and True are equal and have one hash: a memory of checked calls must tell them."""
    with pytest.raises(AssertionError, match="launched"):
        flash_attention(*qkv(device), **{option: good})
    rejected(option, call=lambda: flash_attention(*qkv(device), **{option: bad}))


@pytest.mark.parametrize("precision", ["fp32", "TF32", "", "highest"])
def test_a_precision_that_is_not_known(precision, device):
    rejected(
        "precision", "ieee", "tf32",
        call=lambda: flash_attention(*qkv(device), precision=precision),
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_precision_for_half(precision, device):
    rejected(
        "precision", "float16",
        call=lambda: flash_attention(*qkv(device, dtype=torch.float16), precision=precision),
    )  # fmt: skip


def test_options_are_named(device):
    """A mask passed by position would be taken for the scale of another library."""
    with pytest.raises(TypeError, match="positional"):
        flash_attention(*qkv(device), True)


# -- varlen ------------------------------------------------------------------------------------


def varlen(device, cu_q=(0, 4, 9), cu_k=(0, 3, 7), dtype=torch.int32, **options):
    q, k, v = (torch.zeros(n, 2, 16, device=device) for n in (9, 7, 7))
    cu = (torch.tensor(c, dtype=dtype, device=device) for c in (cu_q, cu_k))
    return flash_attention_varlen(q, k, v, *cu, **options)


def test_the_canary_a_good_varlen_call_does_launch(device):
    with pytest.raises(AssertionError, match="launched"):
        varlen(device)


@pytest.mark.parametrize(
    ("cu", "says"),
    [
        ((1, 4, 9), "Start at 0"),
        ((-1, 4, 9), "Start at 0"),
        ((0, 5, 4, 9), "sequence 1"),  # decreases
        ((0, 12, 9), "sequence 1"),  # decreases, after an overrun
        ((0, 4, 10), "overruns"),
        ((0, 4, 8), "stops short"),
        ((0,), "offsets"),
        ((), "offsets"),
        (((0, 4), (4, 9)), "offsets"),  # pairs, not offsets
    ],
)
def test_offsets_that_do_not_describe_the_tensors(cu, says, device):
    rejected("cu_seqlens_q", says, call=lambda: varlen(device, cu_q=cu))
    smaller = tuple(c - 2 if isinstance(c, int) and c > 6 else c for c in cu)
    rejected("cu_seqlens_k", says, call=lambda: varlen(device, cu_k=smaller))


def test_as_many_offsets_for_keys_as_for_queries(device):
    rejected("cu_seqlens_k", "as many", call=lambda: varlen(device, cu_k=(0, 3, 5, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_offsets_of_another_dtype(dtype, device):
    rejected("cu_seqlens_q", "torch.int32", call=lambda: varlen(device, dtype=dtype))


def test_offsets_elsewhere_or_no_tensor(device):
    q, k, v = (torch.zeros(n, 2, 16, device=device) for n in (9, 7, 7))
    good = torch.tensor([0, 7], device=device)
    rejected(
        "cu_seqlens_q.device", "meta",
        call=lambda: flash_attention_varlen(q, k, v, good.to("meta"), good),
    )  # fmt: skip
    rejected("cu_seqlens_q", call=lambda: flash_attention_varlen(q, k, v, [0, 9], good))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_varlen_takes_three_dimensions(position, device):
    tensors = [torch.zeros(n, 2, 16, device=device) for n in (9, 7, 7)]
    tensors[position] = tensors[position][None]
    cu = torch.tensor([0, 9]), torch.tensor([0, 7])
    rejected("qkv"[position], "varlen", call=lambda: flash_attention_varlen(*tensors, *cu))


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"window": 0}, "window"), ({"scale": -1}, "scale"), ({"precision": "x"}, "precision")],
)
def test_varlen_checks_its_options_too(options, argument, device):
    rejected(argument, call=lambda: varlen(device, **options))


# -- without a GPU and without the interpreter ----------------------------------------------------


@pytest.mark.skipif(GPU, reason="about a machine without a GPU")
def test_without_gpu_and_interpreter_the_error_says_how_to_switch_it_on(clean_env):
    code = """
import torch
from labkit.errors import NoGpuError
from labkit.flash import flash_attention, flash_attention_varlen
x, c = torch.zeros(1, 1, 4, 16), torch.tensor([0, 4])
packed = [x[0, 0, :, None]] * 3
for call in (lambda: flash_attention(x, x, x), lambda: flash_attention_varlen(*packed, c, c)):
    try:
        call()
    except NoGpuError as error:
        print(error)
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_env | {"PYTHONPATH": root},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert len(said) == 2
    for line in said:
        assert "TRITON_INTERPRET=1" in line and "use_interpreter_if_no_gpu" in line
