"""Measuring a policy, and the measuring that experiments share with it.

Every implementation that takes a shape is checked against float64 on some rows and then timed in
turns with the others (``labkit.timing``), forward or forward and backward.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from labkit.dispatch.compute import (
    BACKENDS,
    DTYPES,
    can_run,
    function,
    switches_kept,
    with_backward,
)
from labkit.dispatch.policy import Point, Policy, machine
from labkit.errors import ArgumentError, check_choice, check_positive_int, check_positive_number

__all__ = ["Shape", "candidates", "measure_policy", "race", "timed"]

#: score matrices above this are not measured: they take gigabytes and seconds, and never win
_LARGEST_SCORES = 2**31
#: lengths of a quick look on a CPU, and of a GPU's policy
_LENGTHS = {
    "cpu": (64, 128, 256, 512),
    "cuda": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}


class _TimeUp(Exception):
    """The budget ended within a race that is to be run whole."""


@dataclass(frozen=True)
class Shape:
    """One attention problem: ``[batch, heads, seq_len, head_dim]``, as many keys as queries."""

    seq_len: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = False
    training: bool = False

    @property
    def scores(self) -> int:
        """Elements of S."""
        return self.batch * self.heads * self.seq_len**2

    def labels(self) -> dict[str, Any]:
        """As a row or a point has it."""
        names = ("seq_len", "batch", "heads", "kv_heads", "head_dim", "causal", "training")
        return {name: getattr(self, name) for name in names}

    def empty(self, dtype: str, device: str) -> tuple[torch.Tensor, ...]:
        """q, k, v to ask about, not to compute with."""
        held = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        return tuple(
            torch.empty(
                self.batch, h, self.seq_len, self.head_dim, dtype=held, device=device,
                requires_grad=self.training,
            )
            for h in (self.heads, self.kv_heads, self.kv_heads)
        )  # fmt: skip

    def draw(self, dtype: str, device: str) -> tuple[torch.Tensor, ...]:
        """q, k, v and dO, the same numbers for every dtype, rounded to it."""
        made = torch.Generator(device).manual_seed(0)
        sizes = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        held = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        x = [
            torch.randn(
                self.batch, h, self.seq_len, self.head_dim, generator=made, device=device
            ).to(held)
            for h in sizes
        ]
        if self.training:
            x[:3] = [t.requires_grad_() for t in x[:3]]
        return tuple(x)


def candidates(device: str) -> tuple[str, ...]:
    """The implementations worth timing there.  Triton's interpreter is none of them."""
    if device == "cpu":
        return ("flash_cpu", "math", "naive")
    return ("flash", "cudnn", "efficient", "math", "ours", "naive")


def measure_policy(
    seq_lens: Iterable[int] | None = None,
    *,
    heads: int = 8,
    head_dim: int | Sequence[int] = 64,
    batch: int = 1,
    kv_heads: int | None = None,
    causal: bool | Sequence[bool] = (False, True),
    training: bool | Sequence[bool] = (False, True),
    backends: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    budget_s: float = 60.0,
    launch: str = "included",
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Policy:
    """Time what can compute attention of these shapes here, and make a policy of it.

    Nothing is written; ``policy.save()`` does that.

    Parameters
    ----------
    seq_lens : tokens; 64 to 16,384 on a GPU by default, 64 to 512 on a CPU.
    heads, head_dim, batch, kv_heads : the shape; several head_dim may be given, and kv_heads is
        heads unless given.
    causal, training : one or both of False and True.
    backends : of ``labkit.dispatch.BACKENDS``; by default all that a program would choose from.
    dtypes : of ``"float32"``, ``"tf32"``, ``"float16"``, ``"bfloat16"``; all by default on a GPU,
        float32 and bfloat16 on a CPU.
    budget_s : stop after so many seconds.  The clock is read before each implementation of a shape
        and before the shape's timing in turns, so it is late by one of those at most.  A shape
        that is not finished by then is left out whole, for a race without some of its runners
        has the wrong winner; of the first one those are timed that are ready, and one at least.
        What is left out is in the policy's notes.  Lengths are taken from both ends inwards, so
        that a policy cut short is coarse and not one-sided.
    launch : ``"included"``: each call on an idle GPU, what a program that launches one call after
        another pays for a short one; ``"hidden"``: the GPU's part alone.
    device : ``"cuda"`` or ``"cpu"``; the GPU if there is one.
    progress : called with ``(done, total, what)``.

    Raises
    ------
    ArgumentError
        for an unknown backend or dtype, a size that is none, or an empty list of anything.
    LabError
        if nothing could be measured.
    """
    from labkit.errors import LabError
    from labkit.timing import _resolve_device

    device = _resolve_device(device)
    asked = _LENGTHS[device] if seq_lens is None else _listed(seq_lens)
    lengths = sorted({check_positive_int("seq_lens", n) for n in asked})
    for name, given in (("causal", causal), ("training", training)):
        for value in _listed(given):
            if not isinstance(value, bool):
                raise ArgumentError(
                    name, given, "is neither True nor False, nor both.", "Pass (False, True)."
                )  # fmt: skip
    chosen = tuple(candidates(device) if backends is None else _listed(backends))
    for name in chosen:
        check_choice("backends", name, BACKENDS)
    held = tuple(
        (DTYPES if device == "cuda" else ("float32", "bfloat16")) if dtypes is None
        else _listed(dtypes)
    )  # fmt: skip
    for name in held:
        check_choice("dtypes", name, DTYPES)
    listed = {
        "seq_lens": lengths, "head_dim": _listed(head_dim), "causal": _listed(causal),
        "training": _listed(training), "backends": chosen, "dtypes": held,
    }  # fmt: skip
    for name, values in listed.items():
        if not values:
            raise ArgumentError(name, values, "is empty.", "Pass at least one.")
    check_choice("launch", launch, ("included", "hidden"))
    budget_s = check_positive_number("budget_s", budget_s)
    sizes = {
        "batch": check_positive_int("batch", batch),
        "heads": check_positive_int("heads", heads),
        "kv_heads": check_positive_int("kv_heads", heads if kv_heads is None else kv_heads),
    }
    if sizes["heads"] % sizes["kv_heads"]:
        raise ArgumentError(
            "kv_heads", sizes["kv_heads"], f"does not divide heads = {heads}.", "Pass a divisor."
        )
    shapes = [
        Shape(n, head_dim=check_positive_int("head_dim", d), causal=bool(c), training=bool(t),
              **sizes)
        for n in _inwards(lengths)
        for d in _listed(head_dim)
        for c in _listed(causal)
        for t in _listed(training)
    ]  # fmt: skip
    points, notes, end = [], [], time.perf_counter() + budget_s
    for index, shape in enumerate(shapes):
        if progress is not None:
            progress(index, len(shapes), f"{shape.seq_len} tokens")
        try:
            rows, said = race(
                shape, chosen, held, device=device, launch=launch, until=end, whole=bool(points)
            )
        except _TimeUp:
            left = sorted({s.seq_len for s in shapes[index:]})
            notes.append(f"Stopped after {budget_s:g} s; not or not fully measured: {left} tokens.")
            break
        notes += said
        points += [_to_point(row) for row in rows]
    if not points:
        raise LabError(f"Nothing could be measured: {'; '.join(dict.fromkeys(notes))[:500]}")
    import datetime

    where = machine() | {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    return Policy(where, tuple(points), tuple(dict.fromkeys(notes)), launch)


def _listed(values: Any) -> tuple:
    """As a tuple; what is no list is one of its own, and judged as that."""
    listed = isinstance(values, Iterable) and not isinstance(values, str)
    return tuple(values) if listed else (values,)


def _inwards(lengths: list[int]) -> list[int]:
    """The longest and the shortest first, then halving the gaps: coarse before fine."""
    order, gaps = [lengths[-1], lengths[0]], [(0, len(lengths) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(lengths[middle])
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))


def _to_point(row: dict[str, Any]) -> Point:
    names = Point.__dataclass_fields__
    return Point(**{name: row[name] for name in names})


# -- one shape, everybody in turns ----------------------------------------------------------------


def race(
    shape: Shape,
    backends: Iterable[str],
    dtypes: Iterable[str],
    *,
    device: str,
    launch: str = "hidden",
    attn_mask: Callable[[str], torch.Tensor] | None = None,
    warmup_ms: float = 3.0,
    rep_ms: float = 12.0,
    max_samples: int = 15,
    largest_scores: int = _LARGEST_SCORES,
    samples: bool = False,
    until: float | None = None,
    whole: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Check each implementation of one shape against float64, then time all in turns.

    Parameters
    ----------
    shape, backends, dtypes : what is computed, by whom, in what.
    device, launch, warmup_ms, rep_ms, max_samples : as ``labkit.timing.time_many`` has them.
    attn_mask : makes the mask ``[Nq, Nk]`` for a dtype.
    largest_scores : leave out who writes S where it would have more elements.
    samples : put the samples into the rows.
    until : a time of ``time.perf_counter()``: nobody is begun after it but the first.
    whole : not even the first, and nobody is timed either: everybody or nobody.  Raises
        ``_TimeUp`` if ``until`` came before everybody was ready.

    Returns
    -------
    tuple
        rows (``Point``'s fields and ``method``; ``samples_ms``), and notes on who was left out.
    """

    def time_is_up() -> bool:
        if until is None or time.perf_counter() <= until:
            return False
        if whole:
            raise _TimeUp
        return bool(calls)

    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    errors: dict[tuple[str, str], float] = {}
    notes: list[str] = []
    with switches_kept(), torch.set_grad_enabled(shape.training):
        for dtype in dtypes:
            if time_is_up():
                notes.append(f"{dtype}: the time was up")
                continue
            q, k, v, dout = shape.draw(dtype, device)
            mask = attn_mask(dtype) if attn_mask is not None else None
            oracle = _Oracle(q, k, v, dout, shape, mask)
            for backend in backends:
                who = (backend, dtype)
                if time_is_up():
                    notes.append(f"{backend} {dtype}: the time was up")
                    continue
                try:
                    if why := _left_out(who, shape, q, k, v, mask, largest_scores):
                        notes += [] if why == _NOT_MEANT else [f"{backend} {dtype}: {why}"]
                        continue
                    forward = function(
                        backend, q, k, v, is_causal=shape.causal, attn_mask=mask,
                        tf32=dtype == "tf32",
                    )  # fmt: skip
                    call = with_backward(forward, (q, k, v), dout) if shape.training else forward
                    error = oracle.error(call())
                    if error != error or error == float("inf"):
                        notes.append(f"{backend} {dtype}: its result is not finite")
                        continue
                    calls[who], errors[who] = call, error
                except Exception as error:  # one implementation fewer, not one shape fewer
                    notes.append(f"{backend} {dtype}: {_first_line(error)}")
                    _release(device)
        time_is_up()
        timings, said = timed(
            calls, warmup_ms=warmup_ms, rep_ms=rep_ms, max_samples=max_samples, device=device,
            launch=launch,
        )  # fmt: skip
        notes += said
    rows = []
    for who, timing in timings.items():
        backend, dtype = who
        row = {**shape.labels(), "backend": backend, "dtype": dtype, "error": errors[who]}
        row |= {"ms": timing.median_ms, "spread_ms": timing.p80 - timing.p20}
        row |= {"launch": launch, "method": timing.method}
        if samples:
            row["samples_ms"] = [round(s, 6) for s in timing.samples_ms]
        rows.append(row)
    return rows, _at(shape, notes)


def timed(calls: dict[Any, Callable[[], Any]], **how: Any) -> tuple[dict[Any, Any], list[str]]:
    """Time all in turns; whoever cannot be timed is left out with a note, and not the others.

    A timer that sees the GPU busy after a function's own stream has finished refuses it, and may
    be wrong where another process uses the GPU: so it is asked twice.
    """
    from labkit.timing import UnsynchronisedError, time_many

    named = {_name(who): call for who, call in calls.items()}
    notes: list[str] = []
    refused: set[str] = set()
    while named:
        try:
            found = time_many(named, **how)
        except UnsynchronisedError as error:
            who = next((name for name in named if str(error).startswith(f"{name} ")), None)
            if who is None:
                return {}, [*notes, f"timing: {_first_line(error)}"]
            if who in refused:
                del named[who]
                notes.append(f"{who}: {_first_line(error)}")
            refused.add(who)
        except Exception as error:  # out of memory, most likely
            return {}, [*notes, f"timing: {_first_line(error)}"]
        else:
            return {who: found[_name(who)] for who in calls if _name(who) in named}, notes
    return {}, notes


def _name(who: Any) -> str:
    return who if isinstance(who, str) else " ".join(who)


_NOT_MEANT = "is not meant for it"


def _left_out(who: tuple[str, str], shape: Shape, q, k, v, mask, largest: int) -> str | None:
    """Why this pair is not measured: it cannot, or it makes no sense to."""
    backend, dtype = who
    tf32 = dtype == "tf32"
    why = can_run(backend, q, k, v, is_causal=shape.causal, attn_mask=mask, tf32=tf32)
    if why is not None:
        # most pairs of kernel and dtype do not exist: that is a table, not a note for each shape
        return _NOT_MEANT if "takes float" in why or "TF32" in why else why
    if backend in ("math", "naive") and shape.scores > largest:
        return f"S would have {shape.scores:.1e} elements"
    return None


def _at(shape: Shape, notes: list[str]) -> list[str]:
    where = f"d{shape.head_dim} n{shape.seq_len}" + (" causal" if shape.causal else "")
    where += " with backward" if shape.training else ""
    return [f"{note} ({where})" for note in notes]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _release(device: str) -> None:
    """After running out of memory, give back what the failed attempt held."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class _Oracle:
    """O and dQ in float64 for some rows of the last head: the last ones, which see most keys."""

    def __init__(self, q, k, v, dout, shape: Shape, mask) -> None:
        group = shape.heads // shape.kv_heads
        head = (shape.heads - 1) // group
        self.rows = rows = min(32, shape.seq_len)
        n = shape.seq_len
        with torch.no_grad(), _no_tf32():
            q64, k64, v64 = (x.double() for x in (q[-1, -1, -rows:], k[-1, head], v[-1, head]))
            scale = shape.head_dim**-0.5
            s = q64 @ k64.mT * scale
            if shape.causal:
                i = torch.arange(n - rows, n, device=q.device)[:, None]
                s = s.masked_fill(torch.arange(n, device=q.device)[None, :] > i, float("-inf"))
            if mask is not None:
                part = mask[-rows:]
                hides = part.dtype == torch.bool
                s = s.masked_fill(~part, float("-inf")) if hides else s + part.double()
            p = torch.softmax(s, -1)
            self.expected = p @ v64
            if shape.training:
                do = dout[-1, -1, -rows:].double()
                dp = do @ v64.mT
                ds = p * (dp - (do * self.expected).sum(-1, keepdim=True))
                self.expected = ds @ k64 * scale

    def error(self, out: Any) -> float:
        """‖computed − float64‖ / ‖float64‖ over the rows: of O, or of dQ if there are gradients."""
        x = out[0] if isinstance(out, tuple) else out
        difference = x.detach()[-1, -1, -self.rows :].double() - self.expected
        return (difference.norm() / self.expected.norm()).item()


@contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
