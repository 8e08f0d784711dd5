r"""What a number format costs: errors against float64, overflow, underflow, and training steps.

Parts, each of which may be missing from a result with the reason among its notes:

``rounding``
    attention in float64 with *one* rounding put in, at the inputs, at S, at P, at the sum of
    products, or at O: which of them costs what.  No kernel is asked.
``overflow``
    Q and K scaled up in powers of two until O, or a gradient, is no longer finite.
``underflow``
    gradients of a mean over a large output, with the loss multiplied by powers of two before the
    backward pass: what is flushed to zero, what overflows, and how large the error is between.
``error``
    O, dQ, dK, dV against float64 by way of computing (naive attention, ``labkit.flash``, torch's
    SDPA; each float32, TF32, float16, bfloat16), as seq_len grows and as the scores grow.
``training``
    steps of a small model in each precision of ``labkit.layers.training``: the loss, the steps
    that were skipped, and the weights that never moved.

Scores are drawn with a standard deviation of ``sigma``: entries of Q and K are normal with
variance ``sigma``, and the scale is 1/√head_dim.  An error is relative in the Frobenius norm; in
``error``, ``relative`` is against float64 *on the rounded inputs* (the kernel's own share), and
``whole`` against float64 on the inputs as drawn (what a user sees who changes the dtype).

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claims C19, C20.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from labkit.errors import check_choice, check_positive_int, check_positive_number
from labkit.experiments import Progress, Result, _release_memory
from labkit.experiments._correctness import _environment
from labkit.experiments._jobs import Jobs, first_line, untuned

__all__ = [
    "CHAPTERS",
    "FORMATS",
    "NEEDS_GPU",
    "PARTS",
    "PLACES",
    "TITLE",
    "WAYS",
    "Way",
    "attention_rounded_at",
    "draw",
    "float64_attention",
    "round_to",
    "run",
]

TITLE = "Precision: errors against float64, overflow, underflow, and training steps"
CHAPTERS = ("10",)
NEEDS_GPU = False

#: what ``run`` measures, in order
PARTS = ("rounding", "training", "overflow", "underflow", "error")
#: significant bits (the leading one included), largest finite number, smallest normal, smallest > 0
FORMATS: dict[str, tuple[int, float, float, float]] = {
    "float32": (24, 2.0**128 - 2.0**104, 2.0**-126, 2.0**-149),
    "tf32": (11, 2.0**128 - 2.0**117, 2.0**-126, 2.0**-136),
    "bfloat16": (8, 2.0**128 - 2.0**120, 2.0**-126, 2.0**-133),
    "float16": (11, 65504.0, 2.0**-14, 2.0**-24),
}
#: where ``attention_rounded_at`` may round
PLACES = ("inputs", "scores", "probabilities", "sums", "output")
_TENSORS = ("o", "dq", "dk", "dv")
#: seconds after which what is not measured yet is left out; a record of less is still a record
LIMIT_S = 56.0


# -- formats, and where they round -----------------------------------------------------------------


def round_to(x: Any, name: str) -> Any:
    """``x`` rounded to the nearest number of a format, in its own dtype.

    Parameters
    ----------
    x : float32 or float64 tensor.
    name : ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float64"`` (nothing happens), or
        ``"tf32"``: float32 with 10 bits of mantissa instead of 23, ties away from zero, as the
        conversion instruction of tensor cores rounds (``cvt.rna.tf32``).
    """
    import torch

    check_choice("name", name, ("float64", *FORMATS))
    if name == "float64":
        return x
    if name != "tf32":
        return x.to(getattr(torch, name)).to(x.dtype)
    single = x.to(torch.float32)
    # Adding half of the last kept bit and cutting the 13 bits below rounds the magnitude.
    bits = (single.view(torch.int32) + 0x1000) & ~0x1FFF
    rounded = bits.view(torch.float32)
    return torch.where(single.isfinite(), rounded, single).to(x.dtype)


def attention_rounded_at(
    q: Any, k: Any, v: Any, name: str, places: Sequence[str], *, step: int = 16
) -> Any:
    """Attention of one head in float64, with values rounded to a format at ``places`` alone.

    Parameters
    ----------
    q, k, v : float64 ``[seq_len, head_dim]``.
    name : a format of ``round_to``.
    places : some of :data:`PLACES`.  ``"sums"`` rounds the running sums of both products after
        every ``step`` terms, as a matrix unit does that accumulates in this format; it is by far
        the slowest.
    """
    import torch

    for place in places:
        check_choice("places", place, PLACES)
    scale = q.shape[-1] ** -0.5

    def at(place: str, x: Any) -> Any:
        return round_to(x, name) if place in places else x

    def product(a: Any, b: Any) -> Any:
        if "sums" not in places:
            return a @ b
        total = a.new_zeros(a.shape[0], b.shape[1])
        for i in range(0, a.shape[1], step):
            total = round_to(total + a[:, i : i + step] @ b[i : i + step], name)
        return total

    q, k, v = (at("inputs", x) for x in (q, k, v))
    s = at("scores", product(q, k.mT) * scale)
    # the probabilities as a kernel rounds them: before the division by their sum
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return at("output", product(at("probabilities", p), v) / p.sum(-1, keepdim=True))


def draw(
    batch: int, heads: int, seq_len: int, head_dim: int, *, sigma: float = 1.0, seed: int = 0,
    device: str = "cpu",
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Q, K, V, dO in float64, ``[batch, heads, seq_len, head_dim]``; scores have std ``sigma``."""
    import torch

    for name, size in (("batch", batch), ("heads", heads), ("seq_len", seq_len),
                       ("head_dim", head_dim)):  # fmt: skip
        check_positive_int(name, size)
    sigma = check_positive_number("sigma", sigma)
    generator = torch.Generator(device).manual_seed(seed)
    made = {"generator": generator, "device": device, "dtype": torch.float64}
    q, k, v, dout = (torch.randn(batch, heads, seq_len, head_dim, **made) for _ in range(4))
    return q * sigma**0.5, k * sigma**0.5, v, dout


def float64_attention(q: Any, k: Any, v: Any, dout: Any, *, rows: int = 1024) -> tuple[Any, ...]:
    """O, dQ, dK, dV in float64, ``rows`` queries of one head at a time: never more than rows × N.

    Parameters
    ----------
    q, k, v, dout : ``[batch, heads, seq_len, head_dim]``, any floating dtype; no mask.
    """
    import torch

    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    o, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for index in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        at = tuple(index)
        for i in range(0, q.shape[2], rows):
            block = (*at, slice(i, i + rows))
            p = torch.softmax(q[block] @ k[at].mT * scale, -1)
            o[block] = p @ v[at]
            dv[at] += p.mT @ dout[block]
            ds = dout[block] @ v[at].mT
            ds = p * (ds - (dout[block] * o[block]).sum(-1, keepdim=True))
            dq[block] = ds @ k[at] * scale
            dk[at] += ds.mT @ q[block] * scale
    return o, dq, dk, dv


# -- ways of computing -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way of computing attention: whose code, on which element type, with which products.

    ``family``: ``"naive"`` (S and P in memory), ``"labkit"`` (``labkit.flash``), ``"sdpa"`` (what
    torch takes by itself), or ``"math"`` (its backend of that name).  ``option`` of naive
    attention: ``"softmax32"`` (the softmax in float32), ``"scale_first"`` (the scale goes to Q,
    before the product), ``"no_maximum"`` (nothing is subtracted before the exponential),
    ``"sum16"`` (cuBLAS may add up in float16).
    """

    family: str
    element: str
    precision: str = "ieee"
    option: str = ""

    @property
    def name(self) -> str:
        """As keys have it: ``naive.float16.softmax32``, ``labkit.tf32x3``."""
        number = self.element if self.precision == "ieee" else self.precision
        return ".".join(x for x in (self.family, number, self.option) if x)


#: ways of computing by name
WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("naive", "float32"),
        Way("naive", "float32", "tf32"),
        Way("naive", "float16"),
        Way("naive", "bfloat16"),
        Way("naive", "float16", option="softmax32"),
        Way("naive", "bfloat16", option="softmax32"),
        Way("naive", "float16", option="sum16"),
        Way("naive", "float16", option="scale_first"),
        Way("naive", "float16", option="no_maximum"),
        Way("naive", "bfloat16", option="no_maximum"),
        Way("naive", "float32", option="no_maximum"),
        Way("labkit", "float16"),
        Way("labkit", "bfloat16"),
        Way("labkit", "float32"),
        Way("labkit", "float32", "tf32x3"),
        Way("labkit", "float32", "tf32"),
        Way("sdpa", "float32"),
        Way("sdpa", "float16"),
        Way("sdpa", "bfloat16"),
        Way("math", "float16"),
    )
}
_MEASURED = [
    "naive.float32", "naive.tf32", "naive.float16", "naive.bfloat16", "labkit.float16",
    "labkit.bfloat16", "sdpa.float32", "sdpa.float16", "sdpa.bfloat16", "labkit.float32",
    "labkit.tf32x3", "labkit.tf32", "naive.float16.softmax32", "naive.bfloat16.softmax32",
    "naive.float16.sum16",
]  # fmt: skip
_LIMITS = [
    "naive.float16.no_maximum", "naive.bfloat16.no_maximum", "naive.float32.no_maximum",
    "naive.float16", "naive.float16.scale_first", "naive.float16.softmax32", "math.float16",
    "sdpa.float16", "labkit.float16", "naive.bfloat16", "labkit.bfloat16", "naive.float32",
]  # fmt: skip
_SCALED = ["naive.float16", "labkit.float16", "sdpa.float16", "naive.bfloat16", "labkit.bfloat16"]


@contextmanager
def _switches(way: Way) -> Iterator[None]:
    """torch's switches for products of this way, and back."""
    import torch

    matmul = torch.backends.cuda.matmul
    kept = {"allow_tf32": matmul.allow_tf32}
    wanted = {"allow_tf32": way.precision == "tf32"}
    if hasattr(matmul, "allow_fp16_accumulation"):
        kept["allow_fp16_accumulation"] = matmul.allow_fp16_accumulation
        wanted["allow_fp16_accumulation"] = way.option == "sum16"
    try:
        for name, value in wanted.items():
            setattr(matmul, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(matmul, name, value)


def _without_maximum(q: Any, k: Any, v: Any) -> Any:
    p = (q @ k.mT * q.shape[-1] ** -0.5).exp()
    return p / p.sum(-1, keepdim=True) @ v


def _function(way: Way) -> Callable[[Any, Any, Any], Any]:
    """``(q, k, v) -> O``."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from labkit.naive import naive_attention

    if way.family == "labkit":
        from labkit.flash import flash_attention

        precision = way.precision if way.element == "float32" else None
        return functools.partial(flash_attention, precision=precision)
    if way.family == "sdpa":
        return sdpa
    if way.family != "naive":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def only(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, way.family.upper())):
                return sdpa(q, k, v)

        return only
    if way.option == "no_maximum":
        return _without_maximum
    if way.option == "scale_first":
        return lambda q, k, v: naive_attention(q * q.shape[-1] ** -0.5, k, v, scale=1.0)
    variant = "softmax_fp32" if way.option == "softmax32" else "out_of_place"
    return functools.partial(naive_attention, variant=variant)


def _can(way: Way, device: str) -> bool:
    if device == "cuda":
        return True
    if way.precision != "ieee" or way.option == "sum16":
        return False  # a CPU has no tensor cores to multiply or add so
    return not (way.family == "labkit" and way.element == "bfloat16")


def _forward_backward(way: Way, q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, ...]:
    """O, dQ, dK, dV of float64 inputs that are rounded to the way's element type first."""
    import torch

    if way.family == "labkit":
        _wait_for_children()

    element = getattr(torch, way.element)
    leaves = [x.to(element).requires_grad_() for x in (q, k, v)]
    with _switches(way), torch.enable_grad():
        out = _function(way)(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout.to(element))
    return (out.detach(), *gradients)


# -- the plan --------------------------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    tiny = device == "cpu"
    small = tiny or quick
    return {
        "rounding": {"seq_len": 128 if tiny else 512 if quick else 2048, "head_dim": 64,
                     "sigma": (1, 4, 16) if tiny else (1, 2, 4, 8, 16, 32, 64)},
        "overflow": {"ways": _LIMITS, "heads": 1, "seq_len": 32 if tiny else 256, "head_dim": 64,
                     "most": 40},
        "underflow": {"ways": _SCALED, "heads": 1 if tiny else 4, "seq_len": 64 if tiny else 2048,
                      "head_dim": 64, "elements": 4 * 2048 * 256, "every": 8 if tiny else 4,
                      "most": 40},
        "error": {"ways": _MEASURED, "heads": 1, "head_dim": 64,
                  "seq_len": (32, 96) if tiny else (512, 2048) if quick
                  else (128, 512, 2048, 8192),
                  "sigma": (1, 8) if small else (1, 2, 4, 8, 16, 32, 64),
                  "at": 96 if tiny else 2048},
        "training": {"dim": 32 if tiny else 256, "heads": 2 if tiny else 4, "layers": 2,
                     "seq_len": 32 if tiny else 256, "batch": 2 if tiny else 4,
                     "steps": 4 if tiny else 20 if quick else 100, "lr": 1e-4},
    }  # fmt: skip


# -- running ---------------------------------------------------------------------------------------


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] | None = None,
    limit_s: float = LIMIT_S,
) -> Result:
    """Measure the parts that this device can.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    parts : some of :data:`PARTS`; all by default.
    limit_s : after so many seconds nothing new is started, which a note says.

    Returns
    -------
    Result
        ``results``: ``rounding.<format>.<place>.s<sigma>``; ``overflow.<way>.<o|grad>``, the
        largest |q·k| (before the scale) with a finite result; ``underflow.<way>.<tensor>.l<log2 of
        the loss scale>`` and ``….zeros``; ``error.<way>.<tensor>.n<seq_len>.s<sigma>`` and
        ``….whole``; ``training.<precision>.<first|last|skipped|unmoved>``.
        ``rows``: one per measured point, ``part`` as above; an error that is not finite is None.
    """
    import torch

    torch.manual_seed(0)
    jobs = Jobs(_plan, quick, device, PARTS if parts is None else parts, PARTS)
    work = [(part, item) for part in PARTS for item in _ITEMS[part](jobs.plan[part], jobs.device)]
    # labkit's ways last: their kernels are being compiled meanwhile
    for part, item in sorted(work, key=lambda w: _is_ours(w[1])):
        jobs.add(part, f"{part} {item}", _of_part, part, item)
    with untuned(), _compiling(jobs), warnings.catch_warnings():
        # the interpreter's numpy says so when a number overflows: here they are made to
        warnings.simplefilter("ignore", RuntimeWarning)
        result = jobs.run(progress, limit_s=limit_s, tidy=_tidy)
    _oracle.cache_clear()
    _summarise(result)
    return result


def _tidy(failed: bool) -> None:
    """Collecting garbage after each of hundreds of short jobs would take longer than they do."""
    import torch

    if failed or (torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30):
        _release_memory()


def _is_ours(item: Any) -> bool:
    return str(item[0] if isinstance(item, tuple) else item).startswith("labkit")


def _of_part(result: Result, plan: dict[str, Any], device: str, part: str, item: Any) -> None:
    _MEASURE[part](result, plan[part], device, item)


@contextmanager
def _compiling(jobs: Jobs) -> Iterator[None]:
    """On a GPU, compile labkit's kernels side by side while the parts run that need none."""
    sizes = [
        (plan["heads"], n, plan["head_dim"])
        for part in ("overflow", "underflow", "error")
        if part in jobs.parts and (plan := jobs.plan[part])
        for n in (plan["seq_len"] if part == "error" else (plan["seq_len"],))
    ]
    # a process for each takes half a gigabyte of the GPU: three are enough
    for names in _COMPILED if jobs.device == "cuda" and sizes else ():
        command = [sys.executable, "-m", "labkit.experiments._precision_child", *names]
        _children.append(
            subprocess.Popen(
                [*command, json.dumps(sizes)], stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, env=_environment(),
            )
        )  # fmt: skip
    try:
        yield
    finally:
        for child in _children:
            child.kill()
            child.wait()
        _children.clear()


_children: list[subprocess.Popen] = []
_COMPILED = (("labkit.float16", "labkit.tf32"), ("labkit.bfloat16", "labkit.tf32x3"),
             ("labkit.float32",))  # fmt: skip


def _wait_for_children(seconds: float = 30.0) -> None:
    """What they have compiled lies on disk; what is not done by then is compiled here, again."""
    end = time.perf_counter() + seconds
    while _children:
        child = _children.pop()
        try:
            child.wait(timeout=max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _relative(got: Any, right: Any) -> float | None:
    """‖got − right‖ / ‖right‖, or None where that is no number."""
    value = ((got.double() - right).norm() / right.norm()).item()
    return value if math.isfinite(value) else None


# -- rounding --------------------------------------------------------------------------------------


def _rounding_items(plan: dict[str, Any], device: str) -> list[tuple[str, float]]:
    return [(name, sigma) for sigma in plan["sigma"] for name in FORMATS]


def _rounding(result: Result, plan: dict[str, Any], device: str, item: tuple[str, float]) -> None:
    name, sigma = item
    n, d = plan["seq_len"], plan["head_dim"]
    q, k, v, _ = (x[0, 0] for x in draw(1, 1, n, d, sigma=sigma, device=device))
    right = attention_rounded_at(q, k, v, "float64", ())
    for place in (*PLACES, "all"):
        places = PLACES if place == "all" else (place,)
        got = attention_rounded_at(q, k, v, name, places)
        error = _relative(got, right)
        row = {"part": "rounding", "format": name, "place": place, "sigma": sigma, "seq_len": n}
        result.rows.append({**row, "head_dim": d, "relative": error})
        if error is not None:
            how = f"‖O − float64‖ / ‖float64‖, {name} at {place} alone; N = {n}, d = {d}"
            result.add(f"rounding.{name}.{place}.s{sigma:g}", error, "1", how)


# -- overflow --------------------------------------------------------------------------------------


def _way_items(plan: dict[str, Any], device: str) -> list[str]:
    return [name for name in plan["ways"] if _can(WAYS[name], device)]


def _overflow(result: Result, plan: dict[str, Any], device: str, name: str) -> None:
    """The largest power of two that the largest |q·k| may have."""
    n, d, way = plan["seq_len"], plan["head_dim"], WAYS[name]
    q, k, v, dout = draw(1, plan["heads"], n, d, device=device)
    top = (q @ k.mT).abs().max()
    largest = {"o": 0.0, "grad": 0.0}
    alive = dict.fromkeys(largest, True)
    # the interpreter is slow, and the wide formats do not end within the sweep
    slow = way.family == "labkit" or (way.element != "float16" and not way.option)
    every = 8 if device == "cpu" and slow else 1
    for power in range(0, plan["most"] + 1, every):
        factor = (2.0**power / top) ** 0.5
        out, *gradients = _forward_backward(way, q * factor, k * factor, v, dout)
        finite = {"o": bool(out.isfinite().all())}
        finite["grad"] = all(bool(x.isfinite().all()) for x in gradients)
        for what in largest:
            alive[what] &= finite[what]
            if alive[what]:
                largest[what] = 2.0**power
        if not any(alive.values()):
            break
    row = {"part": "overflow", "way": name, "seq_len": n, "head_dim": d, "most": plan["most"]}
    result.rows.append({**row, **largest})
    for what, value in largest.items():
        tensor = "O is" if what == "o" else "dQ, dK, dV are"
        how = f"largest |q·k| before the scale at which {tensor} finite, in powers of two to "
        how += f"2^{plan['most']}; N = {n}, d = {d}"
        result.add(f"overflow.{name}.{what}", value, "1", how)


# -- underflow -------------------------------------------------------------------------------------


def _underflow(result: Result, plan: dict[str, Any], device: str, name: str) -> None:
    """Gradients of loss · 2^l, divided by 2^l again, against float64."""
    import torch

    n, d, heads, way = plan["seq_len"], plan["head_dim"], plan["heads"], WAYS[name]
    q, k, v, dout = draw(1, heads, n, d, device=device)
    dout = dout / plan["elements"]  # the derivative of a mean over so many numbers
    element = getattr(torch, way.element)
    _, *right = float64_attention(*(x.to(element) for x in (q, k, v)), dout)
    every = 16 if way.family == "labkit" and device == "cpu" else plan["every"]
    for power in range(0, plan["most"] + 1, every):
        scale = 2.0**power
        _, *got = _forward_backward(way, q, k, v, dout * scale)
        row = {"part": "underflow", "way": name, "power": power, "heads": heads, "seq_len": n,
               "head_dim": d, "elements": plan["elements"]}  # fmt: skip
        for tensor, mine, true in zip(_TENSORS[1:], got, right, strict=True):
            error = _relative(mine.double() / scale, true)
            zeros = (mine == 0).double().mean().item()
            row[tensor] = {"relative": error, "zeros": zeros}
            how = f"loss × 2^{power}, dO ≈ 1/{plan['elements']}; {heads} heads, N = {n}, d = {d}"
            key = f"underflow.{name}.{tensor}.l{power}"
            if error is not None:
                result.add(key, error, "1", f"‖{tensor} − float64‖ / ‖float64‖, {how}")
            result.add(f"{key}.zeros", zeros, "1", f"share of {tensor} that is exactly 0, {how}")
        result.rows.append(row)


# -- error -----------------------------------------------------------------------------------------


def _error_items(plan: dict[str, Any], device: str) -> list[tuple[str, int, float]]:
    """Lengths at σ = 1 first, then scores; the important ways before the slow ones."""
    names = _way_items(plan, device)
    points = [(n, 1) for n in plan["seq_len"]]
    points += [(plan["at"], sigma) for sigma in plan["sigma"] if (plan["at"], sigma) not in points]
    return [(name, n, sigma) for name in names for n, sigma in points]


@functools.lru_cache(maxsize=64)
def _oracle(element: str, heads: int, n: int, d: int, sigma: float, device: str) -> tuple:
    """What float64 gives for inputs rounded to ``element``, kept on the CPU."""
    import torch

    tensors = [x.to(getattr(torch, element)) for x in
               draw(1, heads, n, d, sigma=sigma, device=device)]  # fmt: skip
    return tuple(x.cpu() for x in float64_attention(*tensors))


def _error(result: Result, plan: dict[str, Any], device: str, item: tuple[str, int, float]) -> None:
    name, n, sigma = item
    heads, d, way = plan["heads"], plan["head_dim"], WAYS[name]
    got = _forward_backward(way, *draw(1, heads, n, d, sigma=sigma, device=device))
    sizes = (heads, n, d, sigma, device)
    rounded = [x.to(device) for x in _oracle(way.element, *sizes)]
    drawn = [x.to(device) for x in _oracle("float64", *sizes)]
    row = {"part": "error", "way": name, "family": way.family, "element": way.element,
           "heads": heads, "seq_len": n, "head_dim": d, "sigma": sigma}  # fmt: skip
    where = f"{heads} heads, N = {n}, d = {d}, scores of std {sigma:g}"
    for tensor, mine, on_rounded, on_drawn in zip(_TENSORS, got, rounded, drawn, strict=True):
        own, whole = _relative(mine, on_rounded), _relative(mine, on_drawn)
        row[tensor] = {"relative": own, "whole": whole}
        key = f"error.{name}.{tensor}.n{n}.s{sigma:g}"
        if own is not None:
            how = f"‖{tensor} − float64 on the rounded inputs‖ / ‖float64‖; {where}"
            result.add(key, own, "1", how)
        if whole is not None:
            how = f"‖{tensor} − float64 on the inputs as drawn‖ / ‖float64‖; {where}"
            result.add(f"{key}.whole", whole, "1", how)
    result.rows.append(row)


# -- training --------------------------------------------------------------------------------------


def _training_items(plan: dict[str, Any], device: str) -> list[str]:
    if device == "cpu":
        return ["fp32", "autocast_bf16", "bf16"]
    return ["fp32", "tf32", "autocast_fp16", "autocast_bf16", "fp16", "bf16"]


def _training(result: Result, plan: dict[str, Any], device: str, precision: str) -> None:
    """A small model learns what a fixed one computes."""
    import torch

    from labkit.layers import TrainingStep, TransformerModel

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        made = TransformerModel(plan["dim"], plan["heads"], plan["layers"], backend="sdpa")
        return made.to(device)

    teacher, student = model(1), model(2)
    shape = (plan["batch"], plan["seq_len"], plan["dim"])
    made = {"generator": torch.Generator(device).manual_seed(3), "device": device}
    trainer = TrainingStep(student, precision=precision, lr=plan["lr"])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    losses: list[float | None] = []
    skipped, said = 0, ""
    for _ in range(plan["steps"]):
        x = torch.randn(shape, **made)
        with torch.no_grad():
            target = teacher(x)
        try:
            done = trainer.step(x, target)
        except Exception as error:  # pure float16 may stop here: that is the result
            said = first_line(error)
            break
        loss = float(done.loss)
        losses.append(loss if math.isfinite(loss) else None)
        skipped += bool(done.skipped)
    after = list(trainer.model.parameters())
    moved = sum((a.detach() != b).sum().item() for a, b in zip(after, before, strict=True))
    unmoved = 1 - moved / sum(b.numel() for b in before)
    row = {"part": "training", "precision": precision, **plan, "losses": losses,
           "skipped": skipped, "unmoved": unmoved, "said": said}  # fmt: skip
    result.rows.append(row)
    where = f"{plan['steps']} steps of AdamW, lr {plan['lr']:g}, dim {plan['dim']}, {precision}"
    finite = [loss for loss in losses if loss is not None]

    def add(key: str, value: float, how: str) -> None:
        result.add(f"training.{precision}.{key}", value, "1", how)

    if finite:
        tenth = max(1, len(finite) // 10)
        add("first", finite[0], f"loss of the first step; {where}")
        add("last", sum(finite[-tenth:]) / tenth, f"mean loss of the last {tenth} steps; {where}")
    add("steps", len(finite), f"steps with a finite loss; {where}")
    add("skipped", skipped, f"steps not taken; {where}")
    add("unmoved", unmoved, f"share of weights that are what they were at the start; {where}")


# -- summary ---------------------------------------------------------------------------------------


def _summarise(result: Result) -> None:
    """How an error grows with the length and with the scores, and ours over plain."""
    rows = [r for r in result.select(part="error") if r["o"]["relative"]]
    for name in dict.fromkeys(r["way"] for r in rows):
        lengths = sorted((r["seq_len"], r["o"]["relative"]) for r in rows
                         if r["way"] == name and r["sigma"] == 1)  # fmt: skip
        if len(lengths) > 1:
            growth = lengths[-1][1] / lengths[0][1]
            how = f"error of O at N = {lengths[-1][0]} over N = {lengths[0][0]}, {name}, σ = 1"
            result.add(f"growth.{name}.n", growth, "1", how)
    for number in ("float16", "bfloat16", "float32", "tf32"):
        ours, plain = f"labkit.{number}", f"naive.{number}"
        ratios = [
            result.value(key) / result.value(other)
            for key in list(result.results)
            if key.startswith(f"error.{ours}.") and not key.endswith(".whole")
            and (other := key.replace(ours, plain)) in result
        ]  # fmt: skip
        if ratios:
            how = f"largest error of {ours} over that of {plain}, O and gradients, all sizes"
            result.add(f"against_plain.{ours}", max(ratios), "1", how)


_ITEMS: dict[str, Callable[[dict[str, Any], str], list]] = {
    "rounding": _rounding_items,
    "overflow": _way_items,
    "underflow": _way_items,
    "error": _error_items,
    "training": _training_items,
}
_MEASURE: dict[str, Callable[..., None]] = {
    "rounding": _rounding,
    "overflow": _overflow,
    "underflow": _underflow,
    "error": _error,
    "training": _training,
}
