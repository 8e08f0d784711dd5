"""A policy: which implementation and which dtype to use, from what was measured on this card.

A rule such as "fp32 up to 256 tokens, fp16 above" is a measurement with the card, the shape and
the versions left out.  Here they stay in: a :class:`Policy` is a list of measured points, kept in
a file with the card, driver, torch and Triton that they were measured on, and each
:class:`Choice` comes with the points that it rests on.

Between two measured lengths the time is taken to be a power of the length (a straight line, both
axes logarithmic).  Beyond the last one the choice there stays, and says so.

Kept in ``$LABKIT_CACHE`` or ``~/.cache/labkit``, one file per card, torch and Triton version.  A
file that belongs to another card or another version is left alone, and so is a broken one; a
:class:`PolicyIgnored` warning says which and why.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claim C20.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from labkit.errors import (
    ArgumentError,
    LabError,
    check_choice,
    check_positive_int,
    check_positive_number,
)

__all__ = [
    "Choice", "Crossing", "Point", "Policy", "PolicyIgnored", "Segment", "load_policy", "machine",
    "policy_file",
]  # fmt: skip

SCHEMA = "labkit-policy/1"
#: what has to be the same for a policy to hold
_SAME = ("card", "driver", "torch", "triton", "kernels")
_DTYPES = ("float32", "tf32", "float16", "bfloat16")


class PolicyIgnored(UserWarning):
    """A policy file that was found and not used, and why."""


@dataclass(frozen=True)
class Point:
    """One measured time.

    Attributes
    ----------
    seq_len, batch, heads, kv_heads, head_dim : the shape, as many keys as queries.
    causal, training : the mask; whether the backward pass is in the time.
    backend, dtype : who computed, in what: see ``labkit.dispatch.BACKENDS``; ``"tf32"`` is
        float32 with products in TF32.
    ms : median.
    spread_ms : p80 − p20.
    error : ‖computed − float64‖ / ‖float64‖, of O or, in training, of dQ; over sampled rows.
    """

    seq_len: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    training: bool
    backend: str
    dtype: str
    ms: float
    spread_ms: float
    error: float

    def __str__(self) -> str:
        return f"{self.backend} {self.dtype} at {self.seq_len:,}: {self.ms:.4g} ms"


@dataclass(frozen=True)
class Choice:
    """What to use, and on what evidence.

    Attributes
    ----------
    backend, dtype : see :class:`Point`.
    ms : its time at the length asked for, measured or between two that were.
    why : in a sentence.
    evidence : the points the choice rests on: the winner's and the next one's.
    measured : whether the length asked for lies between measured ones.
    """

    backend: str
    dtype: str
    ms: float
    why: str
    evidence: tuple[Point, ...] = field(repr=False)
    measured: bool = True

    def attention(self, q, k, v, **options: Any):
        """Compute attention in this way: q, k, v are cast, O is in their dtype.

        Parameters
        ----------
        q, k, v : ``[batch, heads, seq_len, head_dim]``, ``[batch, kv_heads, seq_len, head_dim]``
            twice.
        options : ``is_causal``, ``scale``, ``attn_mask``, as for
            :func:`labkit.dispatch.compute.attention`.

        Returns
        -------
        O ``[batch, heads, seq_len, head_dim]`` in q's dtype.

        Raises
        ------
        ArgumentError
            if the backend cannot take these inputs: why, and one that can.
        """
        import torch

        from labkit.dispatch.compute import attention

        tf32 = self.dtype == "tf32"
        dtype = torch.float32 if tf32 else getattr(torch, self.dtype)
        cast = (x.to(dtype) for x in (q, k, v))
        return attention(*cast, backend=self.backend, tf32=tf32, **options).to(q.dtype)


@dataclass(frozen=True)
class Segment:
    """A range of lengths with one winner: ``start ≤ seq_len < end`` (end None: no end seen)."""

    start: int
    end: int | None
    backend: str
    dtype: str


@dataclass(frozen=True)
class Crossing:
    """Where one of two becomes the faster, for good.

    Attributes
    ----------
    seq_len : where the two lines meet; None if the second is never the faster.
    after, by : the measured lengths on both sides (``after`` is None if it is the faster from
        the shortest one on).
    gain_at_longest : time of the first over that of the second at the longest measured length.
    """

    seq_len: int | None
    after: int | None
    by: int | None
    gain_at_longest: float


@dataclass(frozen=True)
class Policy:
    """What was measured on one machine, and what follows.

    Attributes
    ----------
    machine : card, driver, torch, triton, kernels (a hash of labkit's), and cuda, cudnn, date.
    points : what was measured.
    notes : what was left out, and why.
    launch : ``"included"``, a call on an idle GPU, or ``"hidden"``, the GPU's part alone.
    """

    machine: dict[str, Any]
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    launch: str = "included"

    # -- asking ------------------------------------------------------------------------------

    def choose(
        self,
        seq_len: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        batch: int | None = None,
        kv_heads: int | None = None,
        causal: bool = False,
        training: bool = False,
        dtypes_allowed: Iterable[str] | None = None,
        backends_allowed: Iterable[str] | None = None,
        max_error: float | None = None,
    ) -> Choice:
        """The fastest that was measured, for attention of this shape.

        Parameters
        ----------
        seq_len : tokens, queries and keys.
        heads, head_dim, batch, kv_heads : the shape; the nearest measured one stands in, and
            ``why`` says so.  None: whichever was measured (of kv_heads: as many as heads, if
            heads are given).
        causal, training : the mask; forward and backward, or forward alone.
        dtypes_allowed, backends_allowed : leave the others out; all by default.  The policy knows
            what is fast; that float16 is accurate and wide enough for a model is for its owner to
            say, here or by ``max_error``.
        max_error : leave out what was measured to err more, relative to float64.

        Raises
        ------
        ArgumentError
            for a size that is none, an unknown dtype, or an error that is not positive; if nothing
            of the kind was measured, or all of it is left out: the message says what was.
        """
        seq_len = check_positive_int("seq_len", seq_len)
        asked = {"heads": heads, "head_dim": head_dim, "batch": batch, "kv_heads": kv_heads}
        allowed = _Allowed(dtypes_allowed, backends_allowed, max_error)
        lines, stands_in = self._lines(asked, causal, training, allowed)
        lengths = sorted({p.seq_len for line in lines.values() for p in line})
        inside = lengths[0] <= seq_len <= lengths[-1]
        at = min(max(seq_len, lengths[0]), lengths[-1])
        times = {who: ms for who, line in lines.items() if (ms := _time_at(line, at)) is not None}
        if not times:  # two that share no stretch of lengths, and a hole between them
            at = min(lengths, key=lambda n: abs(math.log(n / seq_len)))
            times = {w: ms for w, line in lines.items() if (ms := _time_at(line, at)) is not None}
            inside = False
        ranked = sorted(times, key=times.__getitem__)
        best, rest = ranked[0], ranked[1:]
        evidence = _around(lines[best], at)
        why = f"{times[best]:.4g} ms at {at:,} tokens"
        exact = any(p.seq_len == at for p in evidence)
        why += ", measured" if exact else " (between measured lengths)"
        if rest:
            evidence += _around(lines[rest[0]], at)
            ratio = times[rest[0]] / times[best]
            noise = max(p.spread_ms / p.ms for p in evidence if p.ms > 0)
            tie = ", within the noise" if ratio - 1 < noise else ""
            why += f"; next {' '.join(rest[0])}, {ratio:.2f}× the time{tie}"
        if not inside:
            side = "beyond the longest" if seq_len > lengths[-1] else "below the shortest"
            hole = lengths[0] <= seq_len <= lengths[-1]
            why += f"; {seq_len:,} lies {'in a hole between' if hole else side} measured length"
            why += "s" if hole else ""
        if stands_in:
            why += f"; measured at {stands_in}"
        return Choice(*best, times[best] if inside else math.nan, f"{why}.", evidence, inside)

    def crossovers(self, **asked: Any) -> list[Segment]:
        """The winner by length: ranges, each with who wins in it.

        ``asked`` as for :meth:`choose`, without ``seq_len``.  A border lies where the lines of
        the two winners meet between two measured lengths.

        Raises
        ------
        ArgumentError
            as :meth:`choose`, and for a name that is not known.
        """
        lines, _ = self._asked(asked)
        lengths = sorted({p.seq_len for line in lines.values() for p in line})
        won = [self.choose(n, **asked) for n in lengths]
        found = [Segment(lengths[0], None, won[0].backend, won[0].dtype)]
        for i in range(1, len(lengths)):
            who, before = (won[i].backend, won[i].dtype), (won[i - 1].backend, won[i - 1].dtype)
            if who == before:
                continue
            border = _meet(lines[before], lines[who], lengths[i - 1], lengths[i])
            found[-1] = Segment(found[-1].start, border, *before)
            found.append(Segment(border, None, *who))
        return found

    def crossing(self, slow: str = "float32", fast: str = "float16", **asked: Any) -> Crossing:
        """From which length the best in ``fast`` beats the best in ``slow``, for good.

        What a fixed threshold stands for.  ``asked`` as for :meth:`choose`.

        Raises
        ------
        ArgumentError
            if one of the two dtypes was not measured, or they share no length; for a name that is
            not known.
        """
        best = {}
        for dtype in (slow, fast):
            lines, _ = self._asked({**asked, "dtypes_allowed": (dtype,)})
            lengths = sorted({p.seq_len for line in lines.values() for p in line})
            best[dtype] = {
                n: min(t for line in lines.values() if (t := _time_at(line, n)) is not None)
                for n in lengths
            }
        lengths = sorted(set(best[slow]) & set(best[fast]))
        if not lengths:
            raise ArgumentError(
                "fast", fast, f"shares no measured length with {slow}.", "Measure both."
            )
        return crossing({n: best[slow][n] / best[fast][n] for n in lengths})

    def kinds(self) -> list[dict[str, Any]]:
        """The shapes that were measured: batch, heads, kv_heads, head_dim, causal, training."""
        names = ("batch", "heads", "kv_heads", "head_dim", "causal", "training")
        seen = dict.fromkeys(tuple(getattr(p, n) for n in names) for p in self.points)
        # batch may shrink as the length grows: one kind, all the same
        kinds: dict[tuple, dict[str, Any]] = {}
        for values in seen:
            kinds.setdefault(values[1:], dict(zip(names, values, strict=True)))
        return list(kinds.values())

    def _asked(self, asked: dict[str, Any]) -> tuple[dict, str]:
        asked = dict(asked)
        causal, training = asked.pop("causal", False), asked.pop("training", False)
        names = ("dtypes_allowed", "backends_allowed", "max_error")
        allowed = _Allowed(*(asked.pop(n, None) for n in names))
        shape = {n: asked.pop(n, None) for n in ("heads", "head_dim", "batch", "kv_heads")}
        if asked:
            raise ArgumentError(
                next(iter(asked)), next(iter(asked.values())), "is not known.",
                "Known: heads, head_dim, batch, kv_heads, causal, training, dtypes_allowed, "
                "backends_allowed, max_error.",
            )  # fmt: skip
        return self._lines(shape, causal, training, allowed)

    def _lines(
        self, asked: dict[str, int | None], causal: bool, training: bool, allowed: _Allowed
    ) -> tuple[dict[tuple[str, str], list[Point]], str]:
        """Points by (backend, dtype), sorted by length, of the measured shape nearest to that
        asked for; and that shape in words if it is another."""
        points = [p for p in self.points if p.causal == causal and p.training == training]
        if not points:
            what = f"causal={causal}, training={training}"
            raise ArgumentError(
                "policy", what, "was not measured.",
                f"Measure it, or ask for one of {self.kinds()}.",
            )  # fmt: skip
        stands_in = []
        for name in ("head_dim", "heads", "kv_heads", "batch"):
            wanted = asked[name]
            if wanted is not None:
                wanted = check_positive_int(name, wanted)
            elif name == "batch":
                continue
            elif name == "kv_heads" and asked["heads"] is not None:
                wanted = points[0].heads
            else:
                wanted = getattr(points[0], name)
            there = {getattr(p, name) for p in points}
            near = min(there, key=lambda n, w=wanted: (abs(math.log(n / w)), n))
            if near != wanted:
                stands_in.append(f"{name} {near} in place of {wanted}")
            points = [p for p in points if getattr(p, name) == near]
        # Times of two batches are no line: of each length those of its first one count.
        batch: dict[int, int] = {}
        points = [p for p in points if p.batch == batch.setdefault(p.seq_len, p.batch)]
        kept = [p for p in points if allowed(p)]
        if not kept:
            worst: dict[tuple[str, str], float] = {}
            for p in points:
                who = (p.backend, p.dtype)
                worst[who] = max(p.error, worst.get(who, 0.0))
            there = sorted(f"{a} {b} (error {e:.1e})" for (a, b), e in worst.items())
            raise ArgumentError(
                "dtypes_allowed", allowed.words(), "leaves nothing that was measured.",
                f"Measured: {', '.join(there)}.",
            )  # fmt: skip
        lines: dict[tuple[str, str], list[Point]] = {}
        for p in sorted(kept, key=lambda p: p.seq_len):
            line = lines.setdefault((p.backend, p.dtype), [])
            if line and line[-1].seq_len == p.seq_len:  # measured twice: the faster counts
                p = min(line.pop(), p, key=lambda p: p.ms)
            line.append(p)
        return lines, ", ".join(stands_in)

    # -- keeping -----------------------------------------------------------------------------

    def save(self, path: Path | str | None = None) -> Path:
        """Write it, by default where :func:`load_policy` looks; returns the path.

        Raises
        ------
        LabError
            if the file cannot be written.
        """
        path = Path(path) if path is not None else policy_file(self.machine)
        held = {
            "schema": SCHEMA, "machine": self.machine, "launch": self.launch,
            "notes": list(self.notes), "points": [asdict(p) for p in self.points],
        }  # fmt: skip
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(held, indent=1), "utf-8")
            draft.replace(path)
        except OSError as error:
            raise LabError(
                f"The policy could not be written: {error}. Pass save() another path, or set "
                "LABKIT_CACHE to a folder of yours."
            ) from error
        return path


@dataclass(frozen=True)
class _Allowed:
    """What a caller lets a policy choose among."""

    dtypes: Iterable[str] | None
    backends: Iterable[str] | None
    max_error: float | None

    def __post_init__(self) -> None:
        for name in ("dtypes", "backends"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if value is None:
                continue
            if not isinstance(value, Iterable):
                raise ArgumentError(
                    f"{name}_allowed", value, f"is a {type(value).__name__}.",
                    "Pass names, such as ('float16', 'bfloat16') or ('flash', 'ours').",
                )  # fmt: skip
            object.__setattr__(self, name, tuple(value))
        for dtype in self.dtypes or ():
            check_choice("dtypes_allowed", dtype, _DTYPES)
        if self.max_error is not None:
            check_positive_number("max_error", self.max_error)

    def __call__(self, point: Point) -> bool:
        return (
            (self.dtypes is None or point.dtype in self.dtypes)
            and (self.backends is None or point.backend in self.backends)
            and (self.max_error is None or point.error <= self.max_error)
        )

    def words(self) -> str:
        parts = [", ".join(self.dtypes)] if self.dtypes is not None else []
        parts += [", ".join(self.backends)] if self.backends is not None else []
        parts += [f"error ≤ {self.max_error:g}"] if self.max_error is not None else []
        return "; ".join(parts) or "all"


def crossing(gain: dict[int, float]) -> Crossing:
    """From which length a gain, by length, stays above 1."""
    lengths = sorted(gain)
    last = gain[lengths[-1]]
    slower = [n for n in lengths if gain[n] <= 1]
    if not slower:
        return Crossing(lengths[0], None, lengths[0], last)
    after = slower[-1]
    if after == lengths[-1]:
        return Crossing(None, after, None, last)
    by = lengths[lengths.index(after) + 1]
    share = math.log(gain[after]) / (math.log(gain[after]) - math.log(gain[by]))
    meet = math.exp(math.log(after) + share * (math.log(by) - math.log(after)))
    return Crossing(round(meet), after, by, last)


def _around(line: Sequence[Point], n: int) -> tuple[Point, ...]:
    """The measured points on both sides of n; one if n itself was measured."""
    exact = tuple(p for p in line if p.seq_len == n)
    if exact:
        return exact
    below = [p for p in line if p.seq_len < n][-1:]
    above = [p for p in line if p.seq_len > n][:1]
    return (*below, *above)


def _time_at(line: Sequence[Point], n: int) -> float | None:
    """ms at that length: measured, or between two that were; None outside of them."""
    around = _around(line, n)
    if len(around) == 1:
        return around[0].ms if around[0].seq_len == n else None
    a, b = around
    share = math.log(n / a.seq_len) / math.log(b.seq_len / a.seq_len)
    return math.exp(math.log(a.ms) + share * (math.log(b.ms) - math.log(a.ms)))


def _meet(before: Sequence[Point], after: Sequence[Point], low: int, high: int) -> int:
    """Where the lines of two winners cross between two lengths; the upper one if one ends."""
    times = [_time_at(line, n) for line in (before, after) for n in (low, high)]
    if None in times:
        return high
    (a, b), (c, d) = times[:2], times[2:]
    at_low, at_high = math.log(a / c), math.log(b / d)
    if at_low == at_high:
        return high
    share = min(1.0, max(0.0, at_low / (at_low - at_high)))
    return round(math.exp(math.log(low) + share * math.log(high / low)))


# -- files -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a policy of this machine says it was measured on."""
    from labkit import records

    found = records.environment()
    return {
        "card": found["gpu"] or found["cpu"] or "unknown",
        "device": "cuda" if found["gpu"] else "cpu",
        "driver": found["driver"],
        "torch": found["torch"],
        "triton": found["triton"],
        "cuda": found["cuda"],
        "cudnn": found["cudnn"],
        "kernels": _kernels(),
    }


def _kernels() -> str | None:
    """labkit's own kernels, as a hash: a time of other kernels is no time of these."""
    try:
        from labkit.flash.tuning import _kernels_version
    except ImportError:
        return None
    return _kernels_version()


def _folder() -> Path:
    folder = os.environ.get("LABKIT_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "labkit"


def policy_file(of: dict[str, Any] | None = None) -> Path:
    """Where the policy of a machine, by default this one, is kept."""
    from labkit.records import machine_slug

    of = of if of is not None else machine()
    card = machine_slug(str(of["card"]))
    return _folder() / f"policy-{card}-torch{of['torch']}-triton{of['triton']}.json"


def load_policy(path: Path | str | None = None) -> Policy | None:
    """The policy that was measured on this card with these versions; None if there is none.

    A file from another card, driver or version, or a broken one, is left as it is and not used;
    a :class:`PolicyIgnored` warning says so.

    Parameters
    ----------
    path : a file; by default :func:`policy_file`.
    """
    here = machine()
    if path is not None:
        return _read(Path(path), here, missing="There is no such file")
    own = policy_file(here)
    if own.exists():
        return _read(own, here)
    for other in sorted(_folder().glob("policy-*.json")):
        _read(other, here)  # says what is there and why it does not serve
    return None


def _ignore(path: Path, why: str) -> None:
    warnings.warn(
        f"{path}: {why}. It is ignored; `python -m labkit policy --measure` makes a new one.",
        PolicyIgnored, stacklevel=4,
    )  # fmt: skip


def _read(path: Path, here: dict[str, Any], missing: str = "cannot be read") -> Policy | None:
    try:
        held = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return _ignore(path, missing)
    except (OSError, ValueError) as error:
        return _ignore(path, f"is broken ({type(error).__name__}: {str(error)[:80]})")
    if not isinstance(held, dict) or held.get("schema") != SCHEMA:
        return _ignore(path, f"is not a policy of the form {SCHEMA}")
    try:
        there = dict(held["machine"])
        points = tuple(_point(p) for p in held["points"])
        policy = Policy(there, points, tuple(map(str, held["notes"])), str(held["launch"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return _ignore(path, f"is broken ({type(error).__name__}: {str(error)[:80]})")
    if not points:
        return _ignore(path, "holds no measured point")
    for name in _SAME:
        if there.get(name) != here.get(name):
            return _ignore(
                path, f"was measured with {name} {there.get(name)}, here it is {here.get(name)}"
            )
    return policy


def _point(held: dict[str, Any]) -> Point:
    point = Point(**held)
    for name in ("seq_len", "batch", "heads", "kv_heads", "head_dim"):
        if type(getattr(point, name)) is not int or getattr(point, name) < 1:
            raise ValueError(f"{name} is {getattr(point, name)!r}")
    for name, kind in (("causal", bool), ("training", bool), ("backend", str), ("dtype", str)):
        if type(getattr(point, name)) is not kind:
            raise ValueError(f"{name} is {getattr(point, name)!r}")
    if point.dtype not in _DTYPES:
        raise ValueError(f"dtype is {point.dtype!r}")
    for name in ("ms", "spread_ms", "error"):
        value = getattr(point, name)
        if isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value!r}")
    if point.ms == 0:
        raise ValueError("ms is 0")
    return point
