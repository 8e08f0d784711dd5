"""Which SDPA backend would run, why the others would not, which ran, and one forced.

The GPU's answers are played by functions that warn as torch's do; what torch really says on a
GPU is in the tests that need one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from labkit import dispatch
from labkit.dispatch import explain, force, ran
from labkit.dispatch import sdpa as module
from labkit.dispatch.compute import function, switches_kept
from labkit.dispatch.seen import backend_of_kernel
from labkit.errors import ArgumentError
from labkit.naive import naive_attention

ROOT = Path(__file__).resolve().parent.parent
flags = torch.backends.cuda
#: how torch ends a warning that explains a choice of backend
AT = "(Triggered internally at /a/native/transformers/cuda/sdp_utils.cpp:12.)"


def draw(*shape, dtype=torch.float32, n=3):
    return tuple(torch.randn(*shape).to(dtype) for _ in range(n))


def switches():
    names = ("flash", "cudnn", "mem_efficient", "math")
    return [getattr(flags, f"{name}_sdp_enabled")() for name in names]


def test_the_bare_import_loads_neither_torch_nor_triton():
    code = "import sys, labkit.dispatch as d; assert 'ran' in dir(d); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
    with pytest.raises(AttributeError, match="rann"):
        dispatch.rann  # noqa: B018


# -- explain, on a CPU -----------------------------------------------------------------------------


def refused():
    q = torch.randn(1, 4, 8, 16)
    bad = {
        "heads of v": (q, q, q[:, :2], {}),
        "heads not divided": (q, q[:, :3], q[:, :3], {"enable_gqa": True}),
        "head_dim of k": (q, q[..., :8], q, {}),
        "as many values as keys": (q, q, q[:, :, :7], {}),
        "batch": (q.expand(2, 4, 8, 16), q.expand(3, 4, 8, 16), q.expand(3, 4, 8, 16), {}),
        "integers": (*[q.int()] * 3, {}),
        "mask of integers": (q, q, q, {"attn_mask": torch.ones(8, 8, dtype=torch.int32)}),
        "mask of another dtype": (q, q, q, {"attn_mask": torch.zeros(8, 8).half()}),
        "mask's shape": (q, q, q, {"attn_mask": torch.zeros(8, 9)}),
        "mask of one dimension": (q, q, q, {"attn_mask": torch.zeros(8)}),
        "device": (*[q.to("meta")] * 3, {}),
    }
    return [pytest.param(*case, id=name) for name, case in bad.items()]


@pytest.mark.parametrize(("q", "k", "v", "options"), refused())
def test_what_the_call_would_refuse_is_refused_before_torch_chooses(q, k, v, options):
    with pytest.raises(ArgumentError):
        explain(q, k, v, **options)


def test_heads_that_broadcast_need_no_grouping():
    q, k, v = torch.randn(1, 1, 8, 16), *draw(1, 4, 8, 16, n=2)
    assert sdpa(q, k, v).shape == (1, 4, 8, 16)
    assert explain(q, k, v).would_run == ran(sdpa, q, k, v).backend == "math"


def test_a_classifier_with_a_softmax_is_no_attention():
    layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4, bias=False))
    x = torch.randn(2, 8, 16)
    assert ran(lambda: layers(x).softmax(-1)).backend is None
    head = torch.randn(8, 16)
    assert ran(lambda: (head @ head.T).softmax(-1) @ head).backend == "unfused"


def cases():
    q, k, v = draw(2, 4, 8, 16)
    yield "plain", (q, k, v), {}, "flash_cpu", ""
    yield "causal", (q, k, v), {"is_causal": True}, "flash_cpu", ""
    yield "half", (q.half(), k.half(), v.half()), {}, "flash_cpu", ""
    yield "float64", (q.double(), k.double(), v.double()), {}, "flash_cpu", ""
    yield "gqa", (q, k[:, :2], v[:, :2]), {"enable_gqa": True}, "flash_cpu", ""
    yield "mask", (q, k, v), {"attn_mask": torch.ones(8, 8, dtype=torch.bool)}, "flash_cpu", ""
    yield "dropout", (q, k, v), {"dropout_p": 0.1}, "math", "has no dropout"
    yield "values", (q, k, v[..., :8]), {}, "math", "one head_dim for q, k and v; q has 16, v has 8"
    yield "three", (q[0], k[0], v[0]), {}, "math", "takes 4 dimensions, not 3"
    yield "strides", tuple(x.mT for x in (q, k, v)), {}, "math", "stride 1"
    yield "one head", (q, k[:, :1], v[:, :1]), {}, "math", "as many KV heads as query heads"
    learnt = torch.zeros(8, 8, requires_grad=True)
    yield "bias", (q, k, v), {"attn_mask": learnt}, "math", "no attn_mask that needs a gradient"
    yield "odd mask", (q, k, v), {"attn_mask": torch.zeros(2, 8, 8)[:1]}, "math", "takes attn_mask"


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("name", CASES)
def test_explain_says_what_runs_on_a_cpu_and_ran_sees_it(name):
    inputs, options, expected, why = CASES[name]
    asked = explain(*inputs, **options)
    assert asked.would_run == expected and asked.order == ("flash_cpu", "math")
    assert ran(sdpa, *inputs, **options).backend == expected
    said = "; ".join(map(str, asked.refused.get("flash_cpu", ())))
    assert (why in said) if why else said == ""
    assert asked.fused is (expected == "flash_cpu")
    assert asked.could_run[0] == expected, "the first that can is the one that torch takes"
    assert {"cudnn", "efficient"} <= set(asked.refused)


def test_a_reason_has_torchs_own_words_beside_ours():
    q, k, v = draw(1, 1, 4, 8)
    (reason,) = explain(q, k, v, dropout_p=0.5).refused["flash_cpu"]
    assert "dropout" in reason.torch and "Triggered internally" not in reason.torch
    assert str(reason) == reason.why == "has no dropout"


def test_explain_in_words():
    q, k, v = draw(1, 2, 4, 8)
    text = str(explain(q.requires_grad_(), k, v, is_causal=True))
    assert text.splitlines()[0] == (
        "q [1, 2, 4, 8] float32 on cpu, causal, with gradients: flash_cpu runs."
    )
    assert "math       could run" in text and "cudnn      refuses: runs on a GPU only" in text
    mask = torch.ones(4, 4, dtype=torch.bool)
    text = str(explain(q, k[:, :, :4], v[..., :4], attn_mask=mask, dropout_p=0.25))
    assert "v [1, 2, 4, 4]" in text and "attn_mask [4, 4] bool, dropout 0.25" in text


def test_the_switches_count():
    q, k, v = draw(1, 1, 4, 8)
    with sdpa_kernel(SDPBackend.MATH):
        asked = explain(q, k, v)
        assert asked.would_run == "math" and "switched off" in str(asked)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        asked = explain(q, k, v, dropout_p=0.1)
        assert asked.would_run is None and asked.could_run == () and not asked.fused
        assert "nothing runs" in str(asked)
        assert [r.why for r in asked.refused["math"]] == ["switched off"]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        asked = explain(q, k, v, dropout_p=0.1)
        assert asked.would_run is None
        # both: that it is off, and what it would say if it were on
        assert [r.why for r in asked.refused["flash_cpu"]] == ["switched off", "has no dropout"]


def test_explaining_leaves_no_trace():
    q, k, v = draw(1, 1, 4, 8)
    before, filters, show = switches(), list(warnings.filters), warnings.showwarning
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        explain(q, k, v, dropout_p=0.1)
        with module._hearing() as said:
            warnings.warn(f"A reason. {AT}", stacklevel=1)
            warnings.warn("something else altogether", stacklevel=1)
    assert [str(w.message) for w in heard] == ["something else altogether"]
    assert said == [f"A reason. {AT}"]
    assert switches() == before and not torch.is_warn_always_enabled()
    assert warnings.filters == filters and warnings.showwarning is show


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (lambda q, k, v: ("q", k, v), {}, "q"),
        (lambda q, k, v: (q, k.half(), v), {}, "k.dtype"),
        (lambda q, k, v: (q, k, v.to("meta")), {}, "v.device"),
        (lambda q, k, v: (q[0, 0, 0], k, v), {}, "q.shape"),
        (lambda q, k, v: (q, k[:, :2], v[:, :2]), {}, "enable_gqa"),
        (lambda q, k, v: (q, k, v), {"dropout_p": 1.5}, "dropout_p"),
        (lambda q, k, v: (q, k, v), {"is_causal": True, "attn_mask": torch.ones(4, 4)},
         "is_causal"),
    ],
)  # fmt: skip
def test_what_no_backend_takes_is_refused_by_name(change, options, named):
    with pytest.raises(ArgumentError) as caught:
        explain(*change(*draw(1, 4, 4, 8)), **options)
    assert caught.value.argument == named


# -- explain, on a GPU that is played --------------------------------------------------------------

#: what torch 2.11 and 2.13 say, and what is made of it
SAID = {
    "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got Query dtype: float, "
    "Key dtype: float, and Value dtype: float instead.": "takes float16, bfloat16, not float32",
    "Flash Attention does not support non-null attn_mask.": "takes no attn_mask",
    "Flash attention requires q,k,v to have the same last dimension and to be less than or equal "
    "to 256. Got Query.size(-1): 512, Key.size(-1): 512, Value.size(-1): 512 instead.":
    "takes one head_dim for q, k and v, at most 256; q has 512, v has 512",
    "head_dim should be no more than 128": "takes head_dim up to 128",
    "head_dim should be a multiple of 8": "takes head_dim in steps of 8",
    "Mem efficient attention requires last dimension of inputs to be divisible by 8. Got "
    "Query.size(-1): 100, Key.size(-1): 100, Value.size(-1): 100 instead.":
    "takes head_dim in steps of 8",
    "Flash attention does not support the is_causal flag when seqlen_q != seqlen_k. Got "
    "seqlen_q: 8 seqlen_k: 4.": "takes is_causal only with as many keys as queries",
    "Flash attention only supports gpu architectures in the range [sm80, sm121]. Attempting to "
    "run on a sm 7.5 gpu.": "runs on sm80 to sm121, this card is sm75",
    "cuDNN attention has been runtime disabled.": "switched off",
    "cuDNN SDPA is not deterministic.": "is not deterministic, and torch is told to be",
    "cudnn SDPA does not support key/value sequence length 1.": "takes no single key",
    "For dense input, both fused kernels require query, key and value to have the same "
    "num_heads. Query.sizes(): [1, 8, 4, 8], Key sizes(): [1, 2, 4, 8]":
    "takes as many KV heads as query heads",
    "Torch was not compiled with flash attention.": "is not in this build of torch",
    "SDPA fprop requires a reason nobody has met yet.\nSecond line": "SDPA fprop requires a "
    "reason nobody has met yet.",
}  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_torchs_sentences_become_a_few_words(text):
    assert module._short(text) == SAID[text]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is not heard becomes an error
        with module._hearing() as heard:
            warnings.warn(f"{text} {AT}", stacklevel=1)
    assert [module._clean(line) for line in heard] == [text]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that takes cuDNN first; set what each backend says (None: it takes the inputs)."""
    says: dict[str, str | None] = {"flash": None, "cudnn": None, "efficient": None}
    order = [1, 2, 0, 3, 4]

    def why_not(name):
        on = getattr(flags, f"{name.replace('efficient', 'mem_efficient')}_sdp_enabled")()
        return says[name] if on else f"{name.capitalize()} attention has been runtime disabled."

    def warn(text):
        warnings.warn(f"{text} {AT}", stacklevel=1)

    def choose(*args, **kwargs):
        order[:] = [3, 1, 2, 0, 4]  # torch learns the order of the card at the first choice
        for index in order[:4]:
            name = module._NAMES[index]
            if flags.math_sdp_enabled() if name == "math" else why_not(name) is None:
                return index
        for name, head in (("efficient", "Memory efficient"), ("flash", "Flash attention"),
                           ("cudnn", "cuDNN attention")):  # fmt: skip
            warn(f"{head} kernel not used because:")
            if text := why_not(name):
                warn(text)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    monkeypatch.setattr(torch._C, "_get_sdp_priority_order", lambda: list(order))
    monkeypatch.setattr(module._Call, "on_gpu", True)
    return says


def test_the_order_is_read_after_torch_has_learnt_it(gpu):
    asked = explain(*draw(1, 1, 4, 8))
    assert asked.order == ("cudnn", "flash", "efficient", "math")
    assert asked.would_run == "cudnn" and asked.refused == {}
    assert asked.could_run == asked.order


def test_a_gpu_refuses_in_its_own_words(gpu):
    gpu["cudnn"] = gpu["flash"] = next(iter(SAID))
    asked = explain(*draw(1, 1, 4, 8))
    assert asked.would_run == "efficient"
    assert set(asked.refused) == {"cudnn", "flash"}
    assert str(asked.refused["flash"][0]) == "takes float16, bfloat16, not float32"
    assert asked.refused["flash"][0].torch == next(iter(SAID))


def test_a_backend_that_is_off_says_what_else_is_wrong(gpu):
    gpu["cudnn"] = "head_dim should be no more than 128"
    with force("flash"):
        asked = explain(*draw(1, 1, 4, 8))
    assert asked.would_run == "flash"
    assert [r.why for r in asked.refused["cudnn"]] == ["switched off", "takes head_dim up to 128"]
    assert [r.why for r in asked.refused["efficient"]] == ["switched off"]


def test_force_with_inputs_names_one_that_can(gpu):
    gpu["flash"] = "Flash Attention does not support non-null attn_mask."
    q, k, v = draw(1, 1, 4, 8)
    with (
        pytest.raises(ArgumentError, match=r"flash: takes no attn_mask.*Use 'cudnn'"),
        force("flash", inputs=(q, k, v), attn_mask=torch.ones(4, 4)),
    ):
        raise AssertionError("the block was entered")


# -- force -----------------------------------------------------------------------------------------


def test_force_takes_one_and_puts_the_switches_back():
    q, k, v = draw(1, 2, 8, 16)
    before = switches()
    for name, runs in (("math", "math"), ("flash", "flash_cpu"), ("flash_cpu", "flash_cpu")):
        with force(name):
            assert ran(sdpa, q, k, v).backend == runs
        assert switches() == before


def test_force_orders_and_restores_the_order():
    before = torch._C._get_sdp_priority_order()
    with force("efficient", "flash"):
        assert torch._C._get_sdp_priority_order()[:2] == [2, 1]
        assert switches() == [True, False, True, False]
    assert torch._C._get_sdp_priority_order() == before


def test_force_learns_the_cards_order_before_it_sets_its_own(monkeypatch):
    learnt = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_learn_order", lambda: learnt.append(True))
    with force("math"):
        assert learnt == []
    with force("efficient", "flash"):
        assert learnt == [True]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("flash",), "flash: has no dropout"),
        (("cudnn", "efficient"), "none of them runs on this device"),
    ],
)
def test_a_call_that_no_forced_backend_takes_says_which_and_why(names, why):
    q, k, v = draw(1, 1, 4, 8)
    before = switches()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(ArgumentError) as caught, force(*names):
            sdpa(q, k, v, dropout_p=0.1)
    assert caught.value.value == ", ".join(names) and why in caught.value.why
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert heard == [] and switches() == before
    with pytest.raises(ArgumentError, match="Use 'math'"), force(
        *names, inputs=(q, k, v), dropout_p=0.1
    ):  # fmt: skip
        raise AssertionError("the block was entered")


def test_other_errors_pass_through_force():
    with pytest.raises(RuntimeError, match="mine"), force("math"):
        raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("names", "options", "named"),
    [
        (("flush",), {}, "flash"),
        ((), {}, "backends"),
        (("math",), {"is_causal": True}, "is_causal"),
    ],
)
def test_force_refuses_what_it_does_not_know(names, options, named):
    with pytest.raises(ArgumentError, match=named), force(*names, **options):
        raise AssertionError("the block was entered")


def test_the_old_way_of_forcing_leaves_cudnn_on():
    """Claim C24: the report's recipe, where torch still has it."""
    if not hasattr(flags, "sdp_kernel"):
        pytest.skip("this torch no longer has torch.backends.cuda.sdp_kernel")
    with pytest.warns(FutureWarning, match="deprecated"), flags.sdp_kernel(
        enable_flash=True, enable_math=False, enable_mem_efficient=False
    ):  # fmt: skip
        assert switches() == [True, True, False, False]
    with force("flash"):
        assert switches() == [True, False, False, False]


# -- ran -------------------------------------------------------------------------------------------


def test_ran_counts_operators_and_is_silent(capfd):
    q, k, v = draw(1, 2, 8, 16)
    seen = ran(lambda: sdpa(sdpa(q, k, v), k, v))
    assert seen.operators["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2
    assert seen.device == "cpu" and seen.kernels == {} and seen.launches == 0
    assert "flash_cpu ran on cpu" in str(seen) and "2 × aten::_scaled" in str(seen)
    assert capfd.readouterr().err == ""


def test_ran_tells_several_and_none():
    q, k, v = draw(1, 1, 8, 16)
    seen = ran(lambda: (sdpa(q, k, v), sdpa(q, k, v, dropout_p=0.5)))
    assert seen.backends == ("flash_cpu", "math") and seen.backend == "flash_cpu"
    assert ran(torch.add, q, k).backend is None
    assert "no attention ran" in str(ran(torch.add, q, k))


def test_ran_sees_the_backward_pass_and_what_is_not_fused():
    from labkit.naive import naive_attention

    q, k, v = draw(1, 1, 8, 16)
    leaf = q.clone().requires_grad_()
    seen = ran(lambda: sdpa(leaf, k, v).sum().backward())
    assert any("flash_attention_for_cpu_backward" in name for name in seen.operators)
    assert ran(naive_attention, q, k, v).backend == "unfused"


def test_ran_sees_our_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    from labkit.flash import flash_attention

    q, k, v = draw(1, 1, 16, 16)
    if torch.cuda.is_available():
        q, k, v = q.cuda(), k.cuda(), v.cuda()
    assert ran(flash_attention, q, k, v).backend == "ours"


@pytest.mark.parametrize("name", ["flash_cpu", "math", "naive"])
def test_ran_sees_what_runs_and_not_what_is_asked_before(name):
    # attention() has torch try the call without data first, which dispatches math's operators
    seen = ran(dispatch.attention, *draw(1, 2, 16, 16), backend=name)
    assert seen.backends == ("unfused" if name == "naive" else name,)


def test_ran_counts_no_call_without_data_where_operators_are_listened_to():
    from labkit.dispatch.seen import _dispatched

    heard = _dispatched(dispatch.attention, draw(1, 2, 16, 16), {"backend": "flash_cpu"})
    assert not any("math" in name for name in heard)
    assert any("flash_attention_for_cpu" in name for name in heard)


def test_ran_wants_a_function():
    q, k, v = draw(1, 1, 4, 8)
    with pytest.raises(ArgumentError, match="is not a function"):
        ran(sdpa(q, k, v))


def test_kernels_of_the_recorded_run_are_known_by_name():
    rows = json.loads((ROOT / "records/nvidia-h200/flash_forward.json").read_text())["rows"]
    seen = {}
    for row in rows:
        for name in row.get("kernels", []):
            seen.setdefault((row["name"].partition("_")[0], row["dtype"]), set()).add(
                backend_of_kernel(name)
            )
    assert seen["ours", "bfloat16"] == {"ours"} and seen["ours", "float32"] == {"ours"}
    assert seen["torch", "float32"] == {"efficient"}
    assert "cudnn" in seen["torch", "bfloat16"] <= {"cudnn", None}  # None: it sums the parts
    assert backend_of_kernel("void pytorch_flash::flash_fwd_splitkv_kernel<…>(…)") == "flash"
    assert backend_of_kernel("void at::native::vectorized_elementwise_kernel<4, …>") is None


# -- attention by name -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["flash_cpu", "math", "naive", "sdpa", "ours"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_backend_computes_the_same(backend, causal, device):
    if backend == "ours":
        pytest.importorskip("triton")
    if device == "cuda" and backend == "flash_cpu":
        backend = "efficient"
    q = torch.randn(1, 4, 17, 16, device=device)
    k, v = (torch.randn(1, 2, 17, 16, device=device) for _ in range(2))
    exact = oracle.attention_f64(q, k, v, causal=causal)[0]
    plain = oracle.attention(q, k, v, causal=causal)[0]
    before = switches(), flags.matmul.allow_tf32
    out = dispatch.attention(q, k, v, backend=backend, is_causal=causal)
    oracle.assert_within_low_precision_error(out, exact, plain)
    assert (switches(), flags.matmul.allow_tf32) == before


@pytest.mark.parametrize(("n_q", "n_k"), [(3, 7), (7, 3)])
def test_what_is_causal_with_other_lengths_is_said_in_masks_that_run(n_q, n_k):
    q, k, v = draw(1, 1, n_q, 16)[0], *draw(1, 1, n_k, 16)[1:]
    with pytest.raises(ArgumentError) as refused:
        dispatch.attention(q, k, v, is_causal=True)
    assert "labkit.flash.flash_attention" in str(refused.value)
    assert f"j ≤ i {'+' if n_k > n_q else '−'} 4" in str(refused.value)
    diagonals = [int(d) for d in re.findall(r"\.tril\((-?\d+)\)", str(refused.value))]
    assert diagonals == [0, n_k - n_q]
    first, second = (torch.ones(n_q, n_k, dtype=torch.bool).tril(d) for d in diagonals)
    theirs = sdpa(q, k, v, is_causal=True)
    torch.testing.assert_close(dispatch.attention(q, k, v, attn_mask=first), theirs)
    ours = naive_attention(q, k, v, causal=True)
    seeing = second.any(1)
    out = dispatch.attention(q, k, v, attn_mask=second)
    torch.testing.assert_close(out[:, :, seeing], ours[:, :, seeing])


def test_a_backend_that_cannot_says_why_and_names_those_that_can():
    q, k, v = draw(1, 1, 8, 16)
    mask = torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(ArgumentError, match=r"takes no attn_mask.*math, flash_cpu, sdpa"):
        dispatch.attention(q, k, v, backend="naive", attn_mask=mask)
    with pytest.raises(ArgumentError, match="Known: flash, cudnn"):
        dispatch.attention(q, k, v, backend="xformers")
    assert "GPU only" in dispatch.can_run("flash", q, k, v)
    assert "GPU only" in dispatch.can_run("cudnn", q, k, v)
    assert "as many keys" in dispatch.can_run("naive", q, k[:, :, :4], v[:, :, :4], is_causal=True)
    for backend in ("math", "naive"):
        with pytest.raises(
            ArgumentError, match=r"is_causal.*two meanings for 8 queries and 4 keys"
        ):
            dispatch.attention(q, k[:, :, :4], v[:, :, :4], backend=backend, is_causal=True)
    assert "float32 on a GPU" in dispatch.can_run("naive", q, k, v, tf32=True)
    with pytest.raises(ArgumentError, match=r"q\.shape = \(\).*0 dimensions"):
        dispatch.can_run("ours", torch.tensor(1.0), k, v)
    with pytest.raises(ArgumentError, match="scale = 'a'"):
        dispatch.attention(q, k, v, backend="math", scale="a")
    with pytest.raises(ArgumentError, match="None of the others"):
        dispatch.attention(q, k, v, backend="naive", tf32=True)
    assert "16 to 256" in dispatch.can_run("ours", *draw(1, 1, 8, 8))
    assert "float64" not in dispatch.can_run("ours", *draw(1, 1, 8, 16, dtype=torch.float64))
    assert dispatch.can_run("math", q, k, v) is None
    with force("math"):  # a switch of the caller's is no property of the inputs
        assert dispatch.can_run("flash_cpu", q, k, v) is None


def test_the_function_that_is_timed_runs_the_backend_it_is_named_for():
    q, k, v = draw(1, 1, 8, 16)
    before = switches()
    with switches_kept():
        for backend in ("flash_cpu", "math"):
            assert ran(function(backend, q, k, v)).backend == backend
        assert ran(function("naive", q, k, v)).backend == "unfused"
        assert ran(function("sdpa", q, k, v)).backend == "flash_cpu"
    assert switches() == before


# -- on a GPU --------------------------------------------------------------------------------------


def on_gpu(b=2, h=4, n=256, d=64, dtype=torch.float16, kv_heads=None, nk=None, grad=False):
    made = {"device": "cuda", "dtype": dtype, "requires_grad": grad}
    q = torch.randn(b, h, n, d, **made)
    k, v = (torch.randn(b, kv_heads or h, nk or n, d, **made) for _ in range(2))
    return q, k, v


GPU_CASES = [
    (dict(dtype=dtype, d=d, grad=grad), {"is_causal": causal})
    for dtype in (torch.float16, torch.float32)
    for d, grad, causal in ((64, False, False), (64, True, True), (128, True, False),
                            (256, False, True), (100, False, False))
] + [
    (dict(dtype=torch.float64), {}),
    (dict(kv_heads=2), {"enable_gqa": True}),
    (dict(nk=128), {"is_causal": True}),
    (dict(n=1, nk=512), {}),
    (dict(n=64, nk=1), {}),
    (dict(), {"dropout_p": 0.1}),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "options"), GPU_CASES, ids=str)
def test_on_a_gpu_what_explain_says_is_what_runs(sizes, options):
    q, k, v = on_gpu(**sizes)
    asked = explain(q, k, v, **options)
    seen = ran(sdpa, q, k, v, **options)
    assert seen.backend == asked.would_run, f"{asked}\n{seen}"
    assert seen.kernels and seen.device == "cuda"
    for name, reasons in asked.refused.items():
        assert all(r.why and "torch does not say" not in r.why for r in reasons), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "efficient", "math"])
def test_on_a_gpu_the_forced_backend_runs(name):
    q, k, v = on_gpu()
    with force(name):
        assert ran(sdpa, q, k, v).backend == name
    assert ran(dispatch.attention, q, k, v, backend=name).backend == name


@pytest.mark.gpu
def test_on_a_gpu_an_order_of_ones_own_holds_from_the_first_call_on():
    code = (
        "import torch; from labkit.dispatch import explain, force\n"
        "q = torch.randn(1, 2, 128, 64, device='cuda', dtype=torch.float16)\n"
        "with force('efficient', 'flash'): print(explain(q, q, q).would_run)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["efficient"]


@pytest.mark.gpu
def test_on_a_gpu_float32_cannot_be_forced_into_flash():
    q, k, v = on_gpu(dtype=torch.float32)
    with pytest.raises(ArgumentError, match="takes float16, bfloat16, not float32"), force("flash"):
        sdpa(q, k, v)
    with pytest.raises(ArgumentError, match="Use 'efficient'"), force("flash", inputs=(q, k, v)):
        raise AssertionError("the block was entered")


@pytest.mark.gpu
def test_on_a_gpu_sdpa_does_not_switch_at_1024():
    """Claim C24: the backend depends on dtype and shape, not on the length."""
    for dtype in (torch.float16, torch.float32):
        picked = {
            explain(*on_gpu(b=4, n=n, dtype=dtype)).would_run
            for n in (64, 128, 512, 1000, 1023, 1024, 1025, 2048, 4096)
        }
        assert len(picked) == 1
