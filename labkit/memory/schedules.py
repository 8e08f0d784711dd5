r"""Which tensors are alive when: the exact life of every buffer of naive attention.

The peak of a program is not the sum of its tensors but the largest sum that is alive at
one moment.  Here the order in which each variant of :func:`labkit.naive.naive_attention`
creates and frees its tensors is written down as data, one line per event, as PyTorch's
eager mode and autograd really do it.  Evaluated at given sizes it predicts the peak to the
byte; :func:`labkit.memory.trace` checks every single event of it.

Without gradients, out of place, S is written three times: QKᵀ, scaled, masked; but never
are more than two of them alive, since each dies when its successor is complete:

.. math:: \text{peak} = 2\,|S| + |\text{mask}| .

Forward and backward, autograd keeps P and the mask, and the softmax's backward needs P, dP
and dS at once; on CUDA its implementation (ATen's ``softmax_backward_cuda_out``) also makes
the product dP ⊙ P for itself:

.. math:: \text{peak} = 3\,|S| + |\text{mask}| + |O| + |dV| \quad (\text{CUDA: } 4\,|S| + \dots)

Assumed: q, k, v (and dO) contiguous, gradients of all three wanted, O alive to the end as
its next layer would keep it.  Not counted: the inputs q, k, v and dO (``with_inputs=True``
adds them) and, but for that one product, what a kernel allocates for itself while it runs
(cuBLAS's workspace, oneDNN's scratch, the accumulators of a fused backward kernel).

Imports: closed_form, dtypes, errors, memory.forms.  No torch.
Taught in chapters 01 (forward) and 05 (backward).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from labkit.closed_form import Form, symbols
from labkit.dtypes import dtype_name, itemsize
from labkit.errors import ArgumentError, check_choice
from labkit.memory.forms import attention_forms, problem_sizes

__all__ = ["FORMS", "VARIANTS", "Event", "Schedule", "attention_peak", "schedule"]

#: the variants of naive attention
VARIANTS = ("out_of_place", "in_place", "softmax_fp32")
#: every form that a schedule describes
FORMS = (*VARIANTS, "checkpointed", "fused")

_B, _H, _Hkv, _Nq, _Nk, _d, _dv, _e = symbols("B H Hkv Nq Nk d dv e")
_PAIRS = _B * _H * _Nq * _Nk
_ROWS = _B * _H * _Nq
#: query heads per KV head, H / Hkv
_GROUP = Form({(("H", 1), ("Hkv", -1)): 1})


@dataclass(frozen=True)
class Event:
    """One tensor created (``change`` +1) or freed (−1) while ``step`` runs."""

    step: str
    name: str
    change: int
    form: Form
    #: made and freed inside one operator, so that a trace of operators does not see it
    scratch: bool = False


@dataclass(frozen=True)
class Schedule:
    """The life of every buffer of one form of attention, in order, at any size."""

    variant: str
    events: tuple[Event, ...]

    def without_scratch(self) -> Schedule:
        """The same without what operators make for themselves: what a trace sees."""
        return Schedule(self.variant, tuple(e for e in self.events if not e.scratch))

    def timeline(self, **sizes: int) -> list[dict[str, Any]]:
        """Each event at the given sizes: ``step``, ``name``, ``bytes`` (±), ``live`` after it.

        ``sizes`` are the symbols of the forms: B, H, Hkv, Nq, Nk, d, dv, e
        (``labkit.memory.problem_sizes`` makes them).
        """
        live, out = 0, []
        for event in self.events:
            change = event.change * event.form(**sizes)
            live += change
            out.append({"step": event.step, "name": event.name, "bytes": change, "live": live})
        return out

    def peak(self, **sizes: int) -> int:
        """The most bytes alive at one moment, inputs not counted."""
        return max(moment["live"] for moment in self.timeline(**sizes))

    def at_peak(self, **sizes: int) -> dict[str, int]:
        """The buffers that are alive at the (first) peak, with their bytes."""
        peak = self.peak(**sizes)
        alive: dict[str, int] = {}
        for moment in self.timeline(**sizes):
            if moment["bytes"] > 0:
                alive[moment["name"]] = moment["bytes"]
            else:
                alive.pop(moment["name"], None)
            if moment["live"] == peak:
                break
        return alive

    def peak_form(self, **sizes: int) -> Form:
        """The closed form of the peak at these sizes; other sizes may peak at another step."""
        forms = {event.name: event.form for event in self.events}
        return sum((forms[name] for name in self.at_peak(**sizes)), Form(0))

    def plot(self, ax=None, **sizes: int):
        """Live bytes step by step (``labkit.plots.timeline``); loads matplotlib."""
        from labkit import plots

        drawing = plots.timeline(self, **sizes)
        return drawing if ax is None else plots.draw(drawing, ax)


class _Writer:
    """Writes events down; a buffer is named when it is made and again when it dies."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.alive: dict[str, Form] = {}
        self.step = ""

    def make(self, name: str, form: Form, step: str | None = None) -> None:
        self.step = step or self.step
        if name in self.alive:
            raise AssertionError(f"{name} is alive already")
        self.alive[name] = form
        self.events.append(Event(self.step, name, +1, form))

    def free(self, *names: str) -> None:
        for name in names:
            self.events.append(Event(self.step, name, -1, self.alive.pop(name)))

    def scratch(self, name: str, form: Form) -> None:
        """A buffer that one operator makes and frees while it runs."""
        self.events += [Event(self.step, name, change, form, True) for change in (+1, -1)]


@dataclass(frozen=True)
class _Case:
    """What decides which events there are (their sizes are decided later)."""

    variant: str
    causal: bool
    records_grad: bool
    half: bool  # element type narrower than float32
    grouped: bool  # fewer KV heads than query heads
    unseeing: bool  # causal with Nq > Nk: rows that see nothing
    cuda: bool  # softmax backward makes dP ⊙ P for itself
    converts_inside: bool  # the softmax reads float16 and writes float32 in one kernel


def _mask(w: _Writer, case: _Case) -> None:
    if not case.causal:
        return
    # torch.arange makes int64: j > i + (Nk − Nq)
    w.make("i", 8 * _Nq, "mask")
    w.make("j", 8 * _Nk)
    w.make("i + Nk − Nq", 8 * _Nq)
    w.make("mask", _Nq * _Nk)
    w.free("i + Nk − Nq", "i", "j")
    if case.unseeing:
        w.make("i", 8 * _Nq)
        w.make("unseeing", _Nq)
        w.free("i")


def _scores(w: _Writer, case: _Case) -> str:
    """Step 1; returns the name of the buffer that holds S."""
    size = _PAIRS * _e
    if case.variant == "in_place":
        w.make("S", size, "QKᵀ")
        if case.causal and case.records_grad and case.grouped:
            w.make("repeated mask", _GROUP * _Nq * _Nk, "mask S")
            if case.unseeing:
                w.make("repeated unseeing", _GROUP * _Nq)
        return "S"
    w.make("QKᵀ", size, "QKᵀ")
    w.make("S", size, "· scale")
    w.free("QKᵀ")
    if not case.causal:
        return "S"
    w.make("S masked", size, "mask S")
    w.free("S")
    if not case.unseeing:
        return "S masked"
    w.make("S filled", size)
    w.free("S masked")
    return "S filled"


def _softmax(w: _Writer, case: _Case, scores: str) -> None:
    """Step 2: P from the scores, which die."""
    size = _PAIRS * _e
    if case.variant == "in_place" and not case.records_grad:
        w.make("row max", _ROWS * _e, "softmax")
        w.free("row max")
        w.make("row sum", _ROWS * _e)
        w.free("row sum")
        return  # P is written over S and keeps its name
    if case.variant == "softmax_fp32" and case.half:
        if not case.converts_inside:
            w.make("S in float32", _PAIRS * 4, "to float32")
        w.make("P in float32", _PAIRS * 4, "softmax")
        if not case.converts_inside:
            w.free("S in float32")
        w.make("P", size, "to half")
        if not case.records_grad:
            w.free("P in float32")
        w.free(scores)
        return
    w.make("P", size, "softmax")
    w.free(scores)


def _output(w: _Writer, case: _Case) -> None:
    """Step 3, and the end of the forward pass."""
    name = "PV" if case.unseeing else "O"
    w.make(name, _ROWS * _dv * _e, "PV")
    if case.unseeing:
        w.make("O", _ROWS * _dv * _e)
        w.free(name)
    probabilities = "P" if "P" in w.alive else "S"
    # Autograd keeps P and the masks that were used; a mask that was repeated was not.
    if not case.records_grad:
        w.free(probabilities, *(m for m in ("mask", "unseeing") if m in w.alive))
    elif "repeated mask" in w.alive:
        w.free("mask")


def _backward(w: _Writer, case: _Case) -> None:
    size = _PAIRS * _e
    if case.unseeing:
        w.make("dO masked", _ROWS * _dv * _e, "mask dO")
        if "repeated unseeing" in w.alive:
            w.free("unseeing")
    w.make("dV", _B * _Hkv * _Nk * _dv * _e, "dV = Pᵀ dO")
    w.make("dP", size, "dP = dO Vᵀ")
    if case.unseeing:
        w.free("dO masked")
    if case.variant == "softmax_fp32" and case.half:
        w.free("P")  # the product's copy; the softmax has its own in float32
        w.make("dP in float32", _PAIRS * 4, "to float32")
        w.free("dP")
        if case.converts_inside:
            w.make("dS", size, "softmax backward")
            w.scratch("dP ⊙ P", _PAIRS * 4)
            w.free("dP in float32", "P in float32")
        else:
            w.make("dS in float32", _PAIRS * 4, "softmax backward")
            if case.cuda:
                w.scratch("dP ⊙ P", _PAIRS * 4)
            w.free("dP in float32", "P in float32")
            w.make("dS", size, "to half")
            w.free("dS in float32")
    else:
        w.make("dS", size, "softmax backward")
        if case.cuda:
            w.scratch("dP ⊙ P", size)
        w.free("dP", "P")
    gradient = "dS"
    repeated = "repeated " if "repeated mask" in w.alive else ""
    if case.unseeing:
        w.make("dS filled", size, "mask dS")
        w.free(gradient)
        w.free(repeated + "unseeing")
        gradient = "dS filled"
    if case.causal:
        w.make("dS masked", size, "mask dS")
        w.free(gradient, repeated + "mask")
        gradient = "dS masked"
    w.make("dS scaled", size, "· scale")
    w.free(gradient)
    w.make("dK", _B * _Hkv * _Nk * _d * _e, "dK = dSᵀ Q")
    w.make("dQ", _ROWS * _d * _e, "dQ = dS K")
    w.free("dS scaled")


def _fused(w: _Writer, training: bool, records_grad: bool) -> None:
    forms = attention_forms()
    w.make("O", forms["O"], "fused forward")
    w.make("LSE", forms["LSE"])
    if not records_grad:
        w.free("LSE")
    if training:
        for name in ("dQ", "dK", "dV"):
            w.make(name, forms[name], "fused backward")
        w.free("LSE", "O")


@lru_cache(maxsize=256)
def _build(case: _Case, training: bool) -> Schedule:
    w = _Writer()
    if case.variant == "fused":
        _fused(w, training, case.records_grad)
        return Schedule("fused", tuple(w.events))
    if case.variant == "checkpointed":
        inner = _Case(**{**vars(case), "variant": "out_of_place"})
        forgetful = _Case(**{**vars(inner), "records_grad": False})
        _mask(w, forgetful)
        _softmax(w, forgetful, _scores(w, forgetful))
        _output(w, forgetful)
        if training:
            # The forward pass once more, up to the last tensor that backward asks for: P, or
            # the mask of the rows that see nothing.
            _mask(w, inner)
            _softmax(w, inner, _scores(w, inner))
            if inner.unseeing:
                w.make("PV", _ROWS * _dv * _e, "PV")
                w.free("PV")
            _backward(w, inner)
            w.free("O")
        return Schedule("checkpointed", tuple(w.events))
    _mask(w, case)
    _softmax(w, case, _scores(w, case))
    _output(w, case)
    if training:
        _backward(w, case)
        w.free("O")
    return Schedule(case.variant, tuple(w.events))


def schedule(
    variant: str = "out_of_place",
    *,
    causal: bool = False,
    training: bool = False,
    records_grad: bool | None = None,
    dtype: Any = "float16",
    grouped: bool = False,
    unseeing: bool = False,
    device: str = "cpu",
) -> Schedule:
    """The schedule of one form of attention.

    Parameters
    ----------
    variant : str
        one of ``FORMS``: the variants of naive attention, ``"checkpointed"``
        (out of place under ``torch.utils.checkpoint``) or ``"fused"`` (O and the LSE, one
        float32 per row; the kernel's scratch is not known to a model).
    causal, training : bool
        masked; forward and backward instead of forward alone.
    records_grad : bool
        whether autograd records (default: ``training``); a forward pass that records
        keeps P and the mask.
    dtype : str
        element type of the inputs; decides which conversions ``softmax_fp32`` makes.
    grouped : bool
        fewer KV heads than query heads.
    unseeing : bool
        causal with more queries than keys, so that some rows see nothing.
    device : str
        ``"cpu"`` or ``"cuda"``: a softmax that reads float16 and writes float32 is one kernel
        on CUDA; on a CPU, and for bfloat16 on both, a float32 copy of S comes between.  And
        CUDA's softmax backward holds dP ⊙ P while it runs.

    Returns
    -------
    Schedule

    Raises
    ------
    ArgumentError
        for an unknown variant, dtype or device.

    >>> from labkit.memory import problem_sizes
    >>> sizes = problem_sizes(seq_len=1024, heads=8, dtype="float32")
    >>> S = 8 * 1024**2 * 4
    >>> schedule("out_of_place").peak(**sizes) / S
    2.0
    """
    check_choice("variant", variant, FORMS)
    kind = str(device).split(":")[0]
    check_choice("device", kind, ("cpu", "cuda"))
    if unseeing and not causal:
        raise ArgumentError("unseeing", True, "needs a causal mask.", "Pass causal=True.")
    case = _Case(
        variant=variant,
        causal=causal,
        records_grad=training if records_grad is None else records_grad or training,
        half=itemsize(dtype_name(dtype)) < 4,
        grouped=grouped,
        unseeing=unseeing,
        cuda=kind == "cuda",
        # ATen has that kernel for float16 alone: bfloat16 is converted in a step of its own
        converts_inside=kind == "cuda" and dtype_name(dtype) == "float16",
    )
    return _build(case, training)


def attention_peak(
    *,
    seq_len: int,
    heads: int = 1,
    batch: int = 1,
    head_dim: int = 64,
    dtype: Any = "float16",
    kv_heads: int | None = None,
    seq_len_k: int | None = None,
    head_dim_v: int | None = None,
    causal: bool = False,
    training: bool = False,
    records_grad: bool | None = None,
    variant: str = "out_of_place",
    device: str = "cpu",
    with_inputs: bool = False,
) -> int:
    """The predicted peak of one problem, in bytes.

    Parameters are those of :func:`labkit.memory.attention_memory` and :func:`schedule`;
    ``with_inputs`` adds q, k, v and, in training, dO.

    Raises
    ------
    ArgumentError
        as those do.

    >>> attention_peak(seq_len=1024, dtype="float32") / (1024**2 * 4)
    2.0
    """
    sizes = problem_sizes(
        seq_len=seq_len, heads=heads, batch=batch, head_dim=head_dim, dtype=dtype,
        kv_heads=kv_heads, seq_len_k=seq_len_k, head_dim_v=head_dim_v,
    )  # fmt: skip
    plan = schedule(
        variant,
        causal=causal,
        training=training,
        records_grad=records_grad,
        dtype=dtype,
        grouped=sizes["H"] != sizes["Hkv"],
        unseeing=causal and sizes["Nq"] > sizes["Nk"],
        device=device,
    )
    total = plan.peak(**sizes)
    if with_inputs:
        forms = attention_forms()
        names = ("Q", "K", "V", "dO") if training else ("Q", "K", "V")
        total += sum(forms[name](**sizes) for name in names)
    return total
