r"""What the backward pass keeps, what training holds at its worst moment, how long it can get.

Three parts, for each form of attention (the variants of naive attention, the same under
``torch.utils.checkpoint``, and torch's fused attention):

``saved``
    bytes that autograd keeps between forward and backward, by saved-tensor hooks.
``peak``
    forward and backward of one layer and of a stack of layers, predicted, traced, measured.
    In a stack each layer's output is the next one's Q, so that between the passes every
    layer's saved tensors are alive: :math:`(L-1)(|P|+|O|)` more than one layer, and
    :math:`(L-1)|O|` if the layers are checkpointed.
``longest``
    the longest sequence that fits into a given memory: predicted by the schedule, then found
    by bisection.  On a GPU the allocator is held to that memory and a length fits if the pass
    does not run out of it.  It falls short of the prediction where the allocator's memory is in
    pieces that do not fit: see chapter 05.  On a CPU, which cannot be held to a limit honestly,
    a length fits if the traced peak does: that checks the schedule, not the machine.

Taught in chapter 05 (what the backward pass keeps).  Claims C10, C22, C23.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from labkit.experiments import Progress, Result, has_gpu, steps
from labkit.units import GIB

__all__ = [
    "CAPS",
    "CHAPTERS",
    "NEEDS_GPU",
    "TITLE",
    "attention_in_form",
    "bisect_length",
    "forward_backward",
    "run",
    "stack_forward_backward",
]

TITLE = "What training keeps: saved tensors, peaks, and the longest sequence that fits"
CHAPTERS = ("05",)
NEEDS_GPU = False

#: memory to fit into, by the name of the cards that have it
CAPS = {"12": 12 * GIB, "24": 24 * GIB, "80": 80 * GIB}


def attention_in_form(form: str, *, causal: bool = False) -> Callable:
    """The function ``(q, k, v) -> O`` of one of ``labkit.memory.FORMS``.

    Raises
    ------
    ArgumentError
        for an unknown form.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from torch.utils.checkpoint import checkpoint

    from labkit.errors import check_choice
    from labkit.memory import FORMS
    from labkit.naive import naive_attention

    check_choice("form", form, FORMS)
    if form == "fused":
        return functools.partial(scaled_dot_product_attention, is_causal=causal)
    if form == "checkpointed":
        plain = functools.partial(naive_attention, causal=causal)
        # nothing here draws random numbers, so there is no generator state to keep
        return functools.partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False)
    return functools.partial(naive_attention, causal=causal, variant=form)


def forward_backward(attention: Callable, q, k, v, dout):
    """One forward and backward pass; O lives to the end, as the next layer would keep it."""
    import torch

    out = attention(q, k, v)
    return torch.autograd.grad(out, (q, k, v), dout)


def stack_forward_backward(attention: Callable, layers: int, q, k, v, dout):
    """``layers`` attentions on top of each other, each output the next one's query."""
    import torch

    out = q
    for _ in range(layers):
        out = attention(out, k, v)
    return torch.autograd.grad(out, (q, k, v), dout)


def run(
    *, quick: bool = True, device: str | None = None, progress: Progress | None = None
) -> Result:
    """Measure what each form saves, its peaks, and the longest sequence that fits.

    Parameters
    ----------
    quick : a small problem and one memory limit (seconds on a laptop).
    device : ``"cuda"`` or ``"cpu"``; the GPU if there is one by default.
    progress : called with ``(done, total, what)``.

    Returns
    -------
    Result with rows of ``kind`` ``"saved"``, ``"peak"`` and ``"longest"``, and the keys
    ``saved_<form>``, ``peak_<form>_<column>``, ``stack<L>_<form>_<column>`` in bytes and
    ``longest_<form>_<mode>_<dtype>_<GiB>_<predicted|bisected>`` in tokens;
    ``…_ratio`` is the second over the first, and ``…_expandable`` marks lengths bisected with
    the allocator's expandable segments.
    """
    from labkit.memory import FORMS

    device = device or ("cuda" if has_gpu() else "cpu")
    problem = {
        "batch": 1, "heads": 2 if quick else 16, "seq_len": 256 if quick else 4096,
        "head_dim": 64, "dtype": "float16" if device == "cuda" else "float32",
    }  # fmt: skip
    result = Result()
    work: list[tuple[str, Callable[[], None]]] = []
    for form in FORMS:
        work.append((f"saved, {form}", functools.partial(_saved, result, problem, form, device)))
        for layers in (1,) if form in ("in_place", "softmax_fp32") else (1, 4):
            job = functools.partial(_peak, result, problem, form, layers, device)
            work.append((f"peak, {form}, {layers} layers", job))
    for case in _length_cases(quick, device):
        text = f"longest, {case['form']} {case['mode']}, {case['gib']} GiB"
        work.append((text, functools.partial(_longest, result, case, device)))
    for _, job in steps(work, progress, lambda w: w[0]):
        job()
    result.notes.append(
        "Lengths on CUDA: the caching allocator is limited by set_per_process_memory_fraction."
        if device == "cuda"
        else "Lengths on a CPU: bisected against the traced peak, not against memory."
    )
    return result


def _tensors(problem: dict[str, Any], device: str, *, grad: bool):
    import torch

    from labkit.dtypes import torch_dtype

    shape = [problem[s] for s in ("batch", "heads", "seq_len", "head_dim")]
    options = {"device": device, "dtype": torch_dtype(problem["dtype"])}
    q, k, v = (torch.randn(shape, **options, requires_grad=grad) for _ in range(3))
    return q, k, v, torch.randn(shape, **options)


def _where(problem: dict[str, Any]) -> str:
    shape = [problem[s] for s in ("batch", "heads", "seq_len", "head_dim")]
    return f"[batch, heads, seq_len, head_dim] = {shape}, {problem['dtype']}"


def _saved(result: Result, problem: dict[str, Any], form: str, device: str) -> None:
    from labkit.memory import attention_forms, problem_sizes, saved_for_backward

    q, k, v, _ = _tensors(problem, device, grad=True)
    report = saved_for_backward(attention_in_form(form), q, k, v)
    one = attention_forms()["S"](**problem_sizes(**problem))
    result.rows.append(
        {"kind": "saved", "form": form, **problem, "bytes": report.beyond_inputs,
         "in_s": report.beyond_inputs / one, "tensors": report.to_dicts()}
    )  # fmt: skip
    how = f"bytes kept for backward beyond the inputs, by saved-tensor hooks; {_where(problem)}"
    result.add(f"saved_{form}", report.beyond_inputs, "bytes", how)


def _peak(result: Result, problem: dict[str, Any], form: str, layers: int, device: str) -> None:
    from labkit.memory import attention_forms, attention_peak, measure, problem_sizes

    sizes = problem_sizes(**problem)
    forms = {name: f(**sizes) for name, f in attention_forms().items()}
    predicted = attention_peak(**problem, training=True, variant=form, device=device)
    if layers > 1:
        predicted = _stack_peak(form, layers, predicted, forms)
    tensors = _tensors(problem, device, grad=True)
    attention = attention_in_form(form)
    report = measure(stack_forward_backward, attention, layers, *tensors, predicted=predicted)
    result.rows.append(
        {"kind": "peak", "form": form, "layers": layers, **problem, "scores_bytes": forms["S"],
         **report.to_dict()}
    )  # fmt: skip
    name = f"peak_{form}" if layers == 1 else f"stack{layers}_{form}"
    where = f"{layers} layer(s), forward and backward, {_where(problem)}"
    for column in ("predicted", "traced", "measured", "allocated", "reserved"):
        value = getattr(report, column)
        if value is not None:
            result.add(f"{name}_{column}", value, "bytes", f"peak above the inputs; {where}")
    if report.measured is not None and report.traced is not None:
        how = f"measured − traced: made and freed inside operators; {where}"
        result.add(f"{name}_scratch", report.measured - report.traced, "bytes", how)
    if report.measured is not None:
        how = f"measured peak over the bytes of S; {where}"
        result.add(f"{name}_in_s", report.measured / forms["S"], "1", how)


def _stack_peak(form: str, layers: int, one: int, forms: dict[str, int]) -> int:
    """Peak of a stack without a mask, from the peak of one of its layers."""
    if form == "fused":
        # Nothing is large: the worst moment is the second backward kernel, when the gradients
        # of the last layer wait, dK and dV to be added to.
        gradients = sum(forms[name] for name in ("dQ", "dK", "dV"))
        return layers * forms["O"] + (layers - 1) * forms["LSE"] + 2 * gradients
    # The worst moment is the backward pass of the last layer, when all others still keep theirs.
    kept = forms["O"] if form == "checkpointed" else forms["O"] + forms["P"]
    return one + (layers - 1) * kept


# -- the longest sequence ----------------------------------------------------------


def _length_cases(quick: bool, device: str) -> list[dict[str, Any]]:
    from labkit.memory import VARIANTS

    base = {"heads": 16, "batch": 1, "head_dim": 64}

    def case(form, mode, dtype, gib, expandable=False):
        about = {"form": form, "mode": mode, "dtype": dtype, "gib": gib, "expandable": expandable}
        return about | base

    cases = [
        case(form, mode, "float16", "12") for mode in ("forward", "training") for form in VARIANTS
    ]
    cases += [case("checkpointed", "training", "float16", "12")]
    cases += [case("out_of_place", mode, "float32", "12") for mode in ("forward", "training")]
    cases += [
        case("fused", mode, dtype, "12")
        for mode in ("forward", "training")
        for dtype in ("float16", "float32")
    ]
    caps = ["12"] if quick else list(CAPS)
    for gib in caps[1:]:
        cases += [case("out_of_place", mode, "float16", gib) for mode in ("forward", "training")]
    if device == "cuda":
        cases += [case("out_of_place", "training", "float16", gib, True) for gib in caps]
    return cases


def _longest(result: Result, case: dict[str, Any], device: str) -> None:
    from labkit.memory.tables import _largest

    limit = CAPS[case["gib"]]
    sizes = {name: case[name] for name in ("batch", "heads", "head_dim", "dtype")}
    training = case["mode"] == "training"

    def needed(n: int) -> int:
        from labkit.memory import attention_peak

        return attention_peak(
            seq_len=n, training=training, variant=case["form"], device=device, with_inputs=True,
            **sizes,
        )  # fmt: skip

    predicted = _largest(lambda n: needed(n) <= limit)
    bisected, how, before = None, "", 0
    if case["form"] == "fused":
        how = "not bisected: one pass over so many tokens would take minutes"
    elif device == "cuda" and limit > _total_memory():
        how = "not bisected: the card has less memory"
    elif device == "cuda":
        how = "torch's caching allocator held to the limit"
        how += ", expandable segments" if case["expandable"] else ""
        with _held_to(limit, case["expandable"]) as before:
            bisected = bisect_length(functools.partial(_runs, case, sizes), predicted)
    else:
        how = "traced peak and inputs within the limit"
        fits = functools.partial(_traces_within, case, sizes, limit)
        bisected = bisect_length(fits, predicted, exact=True)
    result.rows.append(
        {"kind": "longest", **case, "limit": limit, "predicted": predicted, "bisected": bisected,
         "held_before": before, "how": how}
    )  # fmt: skip
    name = f"longest_{case['form']}_{case['mode']}_{case['dtype']}_{case['gib']}"
    where = f"batch {case['batch']}, {case['heads']} heads, head_dim {case['head_dim']}"
    result.add(f"{name}_predicted", predicted, "tokens", f"by the schedule; {where}")
    if bisected is not None:
        kind = "_expandable" if case["expandable"] else ""
        ratio = bisected / predicted
        result.add(f"{name}_bisected{kind}", bisected, "tokens", f"{how}; {where}")
        result.add(f"{name}_ratio{kind}", ratio, "1", f"bisected over predicted; {how}; {where}")


def bisect_length(fits: Callable[[int], bool], guess: int, *, exact: bool = False) -> int | None:
    """The largest length that fits, starting from a guess.

    Parameters
    ----------
    fits : tells whether a length fits; true up to some length, false beyond.
    guess : a length near the answer, at least 1.
    exact : to the token; by default to within 1/512 of the guess.

    Returns
    -------
    A length that fits while the next one tried does not, or None if not even 1 fits.
    """
    step = 1 if exact else max(1, guess // 512)
    low, high = 0, guess + step
    stride = step
    while fits(high):
        low, stride = high, 2 * stride
        high += stride
    if low == 0:
        # down from the guess in growing strides, until something fits
        stride, probe = step, guess
        while probe >= 1 and not fits(probe):
            high, stride = probe, 2 * stride
            probe -= stride
        if probe < 1:
            if high == 1 or not fits(1):
                return None
            probe = 1
        low = probe
    while high - low > step:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _attempt(case: dict[str, Any], sizes: dict[str, Any], n: int, device: str) -> Callable:
    """A function of no arguments that makes the inputs and runs one pass."""
    import torch

    from labkit.dtypes import torch_dtype

    training = case["mode"] == "training"
    shape = (sizes["batch"], sizes["heads"], n, sizes["head_dim"])
    options = {"device": device, "dtype": torch_dtype(sizes["dtype"])}

    def one_pass():
        q, k, v = (torch.zeros(shape, **options, requires_grad=training) for _ in range(3))
        attention = attention_in_form(case["form"])
        if training:
            return forward_backward(attention, q, k, v, torch.zeros(shape, **options))
        with torch.no_grad():
            return attention(q, k, v)

    return one_pass


def _traces_within(case: dict[str, Any], sizes: dict[str, Any], limit: int, n: int) -> bool:
    from labkit.memory import trace

    # the inputs are made inside, so that the trace counts them
    return trace(_attempt(case, sizes, n, "cpu")).peak <= limit


def _runs(case: dict[str, Any], sizes: dict[str, Any], n: int) -> bool:
    import torch

    try:
        out = _attempt(case, sizes, n, "cuda")()
        torch.cuda.synchronize()
        del out
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()  # the traceback of an error holds the frames, and they hold tensors
        torch.cuda.empty_cache()


def _total_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


@contextmanager
def _held_to(limit: int, expandable: bool) -> Iterator[int]:
    """Hold the caching allocator to ``limit`` bytes; yields what it holds before the first pass."""
    import torch

    from labkit.memory.measuring import settle_cublas

    settle_cublas("cuda")
    if expandable:
        _allocator_settings("expandable_segments:True")
    torch.cuda.set_per_process_memory_fraction(limit / _total_memory())
    try:
        yield torch.cuda.memory_reserved()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()
        if expandable:
            _allocator_settings("expandable_segments:False")


def _allocator_settings(text: str) -> None:
    """What ``PYTORCH_CUDA_ALLOC_CONF`` sets at the start of a program, later."""
    import torch

    new = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (new or torch.cuda.memory._set_allocator_settings)(text)
