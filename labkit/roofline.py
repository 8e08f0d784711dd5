r"""Floating-point operations and bytes of attention, step by step, and the roofline they meet.

Taught in chapter 04 (is it the arithmetic or the bytes?).

A kernel that does :math:`F` operations and moves :math:`M` bytes has the intensity
:math:`I = F/M`.  A machine that does :math:`\pi` operations and moves :math:`\beta`
bytes per second cannot run it faster than

.. math:: R(I) = \min(\pi,\ \beta I),
          \qquad T \ge \max\left(\frac{F}{\pi}, \frac{M}{\beta}\right)

(Williams, Waterman and Patterson, 2009).  Both sides are here: :func:`steps` counts
:math:`F` and :math:`M` of each kernel as exact closed forms, :class:`Roofline` holds
:math:`\pi` and :math:`\beta`, from a data sheet or measured.

What is counted, and what is not
--------------------------------
* A product of :math:`[m, k]` by :math:`[k, n]` is :math:`2mkn` operations: a multiply-add
  is two.  torch's ``FlopCounterMode`` counts the same, and the tests hold us to it.
* Softmax is counted as 5 operations per score: compare for the maximum, subtract,
  exponential, add to the sum, divide.  That is a convention.  The exponential does not
  run where the other four do, so :attr:`Step.exps` counts it a second time, for the
  special-function units.
* ``bytes`` is compulsory traffic: each input of the kernel read once, each output written
  once.  What a kernel reads twice and misses the cache comes on top; what the L2 cache still
  holds from the kernel before comes off.  Chapter 04 measures both.
* The rate of a step that contains a matrix product counts the products alone
  (:attr:`Step.flops`), as every published TFLOP/s of attention does; the rest of its
  arithmetic stands beside it in :attr:`Step.vector`.

Symbols of the forms: ``B`` batch, ``H`` query heads, ``Hkv`` key-value heads, ``Nq`` and ``Nk``
lengths, ``d`` and ``dv`` head dimensions, ``e`` bytes per element, ``Tq`` query blocks of
``bm`` rows each.

Imports: errors, dtypes, units, closed_form; labkit.hardware when a card is named.  No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from labkit.closed_form import Form, symbols
from labkit.dtypes import dtype_name, itemsize
from labkit.errors import (
    ArgumentError,
    check_choice,
    check_positive_int,
    check_positive_number,
)
from labkit.units import format_rate, significant

__all__ = [
    "SOFTMAX_FLOPS",
    "SPECIAL_PER_CLOCK",
    "Cost",
    "Point",
    "Ratio",
    "Roofline",
    "Step",
    "TimeBounds",
    "card_or_none",
    "problem",
    "special_rate",
    "steps",
    "total",
]

#: Operations per score that softmax is counted as: max, subtract, exp, add, divide.
SOFTMAX_FLOPS = 5

#: Results per clock and SM of the special-function units (MUFU: exp2, log2, 1/x, sin …): 16 on
#: compute capability 7.0 to 10.0 (CUDA C++ Programming Guide, throughput of native arithmetic
#: instructions).  FlashAttention-3 (Shah et al., 2024) turns it into 3.9 T/s for an H100.
SPECIAL_PER_CLOCK = 16

_B, _H, _HKV, _NQ, _NK, _D, _DV, _E, _TQ, _BM = symbols("B H Hkv Nq Nk d dv e Tq bm")
_LSE_BYTES = 4  # kept in float32 whatever the inputs are


# -- sizes ---------------------------------------------------------------------------------
def problem(
    *,
    seq_len: int,
    head_dim: int = 64,
    heads: int = 1,
    batch: int = 1,
    dtype: Any = "bfloat16",
    kv_heads: int | None = None,
    seq_len_k: int | None = None,
    head_dim_v: int | None = None,
    block_m: int = 128,
) -> dict[str, int]:
    """One attention problem as the symbols of the forms.

    Parameters
    ----------
    seq_len, seq_len_k : queries and keys per head; ``seq_len_k`` defaults to ``seq_len``.
    head_dim, head_dim_v : columns of Q and K, and of V and O (defaults to ``head_dim``).
    heads, kv_heads : query heads and key-value heads (grouped-query attention when fewer).
    batch : sequences.
    dtype : element type of Q, K, V, S, P and O.
    block_m : query rows that one program of a fused kernel holds; only the re-read traffic of
        fused attention depends on it.

    Returns
    -------
    dict
        ``B H Hkv Nq Nk d dv e Tq bm``, all int.

    Raises
    ------
    ArgumentError
        if a size is not a positive integer, or ``heads`` is not a multiple of ``kv_heads``.

    >>> sizes = problem(seq_len=512, head_dim=64, dtype="float16")
    >>> sizes["Nk"], sizes["e"], sizes["Tq"]
    (512, 2, 4)
    """
    out = {
        "B": check_positive_int("batch", batch),
        "H": check_positive_int("heads", heads),
        "Hkv": check_positive_int("kv_heads", heads if kv_heads is None else kv_heads),
        "Nq": check_positive_int("seq_len", seq_len),
        "Nk": check_positive_int("seq_len_k", seq_len if seq_len_k is None else seq_len_k),
        "d": check_positive_int("head_dim", head_dim),
        "dv": check_positive_int("head_dim_v", head_dim if head_dim_v is None else head_dim_v),
        "e": itemsize(dtype),
        "bm": check_positive_int("block_m", block_m),
    }
    if out["H"] % out["Hkv"]:
        raise ArgumentError(
            "kv_heads",
            kv_heads,
            f"does not divide heads = {heads}.",
            "Pass a divisor: each key-value head serves the same number of query heads.",
        )
    out["Tq"] = -(-out["Nq"] // out["bm"])
    return out


# -- a quotient of two forms ------------------------------------------------------------------
@dataclass(frozen=True)
class Ratio:
    r"""An exact quotient of two closed forms: an arithmetic intensity, or its limit.

    >>> N, d, e = symbols("N d e")
    >>> intensity = Ratio(2 * N**2 * d, (2 * N * d + N**2) * e)
    >>> intensity(N=512, d=64, e=2)
    Fraction(256, 5)
    >>> print(intensity.latex(), "and", intensity.limit("N").latex())
    \frac{2\,N\,d}{N\,e + 2\,d\,e} and \frac{2\,d}{e}
    """

    numerator: Form
    denominator: Form

    def __call__(self, **sizes: int) -> Fraction:
        """The exact value in FLOP/byte (or whatever the two forms count)."""
        return Fraction(self.numerator(**sizes)) / Fraction(self.denominator(**sizes))

    def limit(self, name: str) -> Ratio | None:
        """What is left as ``name`` grows without bound; None when the quotient grows with it.

        A quotient that tends to zero gives a ratio with numerator 0.
        """
        top, bottom = self.numerator.degree(name), self.denominator.degree(name)
        if top > bottom:
            return None
        if top < bottom:
            return Ratio(Form(0), Form(1))
        return Ratio(self.numerator.leading(name), self.denominator.leading(name)).reduced()

    def reduced(self) -> Ratio:
        """The same quotient without the powers and integer factors that all terms share."""
        terms = [*self.numerator.terms.items(), *self.denominator.terms.items()]
        if not self.numerator.terms:
            return self
        names = {n for powers, _ in terms for n, _ in powers}
        shared = {n: min(dict(p).get(n, 0) for p, _ in terms) for n in names}
        scale = math.lcm(*(c.denominator for _, c in terms))
        common = math.gcd(*(int(c * scale) for _, c in terms))

        def divide(form: Form) -> Form:
            out = {}
            for powers, c in form.terms.items():
                left = ((n, p - shared[n]) for n, p in powers)
                out[tuple((n, p) for n, p in left if p)] = c * scale / common
            return Form(out)

        return Ratio(divide(self.numerator), divide(self.denominator))

    def latex(self, names: dict[str, str] | None = None) -> str:
        """LaTeX source of the reduced quotient."""
        short = self.reduced()
        if short.denominator == 1:
            return short.numerator.latex(names)
        return rf"\frac{{{short.numerator.latex(names)}}}{{{short.denominator.latex(names)}}}"


# -- steps ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """The counts of one step at one size: operations, exponentials, bytes, FLOP/byte."""

    key: str
    name: str
    flops: int
    matmul: int
    vector: int
    exps: int
    bytes: int
    intensity: float


@dataclass(frozen=True)
class Step:
    """One kernel, or a sum of kernels, as closed forms.

    Attributes
    ----------
    key : ASCII identifier: ``scores scale mask softmax output naive fused …``.
    name : what a figure writes beside its point.
    kernel : what PyTorch launches for it on a GPU.
    matmul : operations in matrix products.
    vector : every other operation, exponentials included, by the convention of the module.
    exps : exponentials, which only the special-function units compute.
    reads, writes : bytes by tensor, each counted once.
    causal : True when row ``i`` attends to keys ``j <= i + Nk - Nq`` (aligned bottom right).
    """

    key: str
    name: str
    kernel: str
    matmul: Form = field(default_factory=Form)
    vector: Form = field(default_factory=Form)
    exps: Form = field(default_factory=Form)
    reads: dict[str, Form] = field(default_factory=dict)
    writes: dict[str, Form] = field(default_factory=dict)
    causal: bool = False

    @property
    def unit(self) -> str:
        """``"tensor"`` when the step holds a matrix product, else ``"vector"`` (CUDA cores)."""
        return "tensor" if self.matmul.terms else "vector"

    @property
    def flops(self) -> Form:
        """The operations that its rate is quoted in: products alone where there are any."""
        return self.matmul if self.matmul.terms else self.vector

    @property
    def bytes(self) -> Form:
        """Bytes in and out, each tensor once."""
        return sum([*self.reads.values(), *self.writes.values()], Form(0))

    @property
    def ratio(self) -> Ratio:
        """The intensity as an exact quotient of forms, FLOP/byte."""
        return Ratio(self.flops, self.bytes)

    @property
    def square(self) -> Ratio:
        """The intensity for ``Nq = Nk = N``, ``dv = d``, ``Hkv = H``: the chapter's equations."""
        n, d, h = symbols("N d H")
        # Tq stays: it counts blocks, and is a size of its own
        swap = {"Nq": n, "Nk": n, "dv": d, "Hkv": h}
        return Ratio(self.flops.substitute(**swap), self.bytes.substitute(**swap)).reduced()

    def at(self, **sizes: Any) -> Cost:
        """Exact counts at the sizes that :func:`problem` takes.

        Raises
        ------
        ArgumentError
            as :func:`problem` does; and for a causal step with more queries than keys, whose
            first rows attend to nothing.
        """
        values = self._values(sizes)
        flops, moved = self.flops(**values), self.bytes(**values)
        return Cost(
            self.key,
            self.name,
            flops,
            self.matmul(**values),
            self.vector(**values),
            self.exps(**values),
            moved,
            float(Fraction(flops) / Fraction(moved)),
        )

    def intensity(self, **sizes: Any) -> float:
        """FLOP/byte at the sizes that :func:`problem` takes; :attr:`ratio` is the exact form."""
        return float(self.ratio(**self._values(sizes)))

    def limit(self, **sizes: Any) -> float:
        """The intensity as ``seq_len`` grows without bound, FLOP/byte; ``inf`` if it grows too.

        ``seq_len`` may be left out; the other sizes are those of :func:`problem`, with as many
        keys as queries.
        """
        values = self._values({**sizes, "seq_len": sizes.get("seq_len", 1), "seq_len_k": None})
        n = symbols("N")[0]
        along = {"Nq": n, "Nk": n, "Tq": n / values["bm"]}
        rest = {name: value for name, value in values.items() if name not in along}
        swap = {**along, **rest}
        quotient = Ratio(self.flops.substitute(**swap), self.bytes.substitute(**swap)).limit("N")
        return math.inf if quotient is None else float(quotient())

    def reached(self, **sizes: Any) -> float:
        """The share of the limit that the intensity has reached, 0 to 1 (0 for a limit of inf).

        For S = QKᵀ and for PV it is 1 / (1 + 2 d / N): 0.8 at N = 8 d.
        """
        limit = self.limit(**sizes)
        return 0.0 if math.isinf(limit) else self.intensity(**sizes) / limit

    def to_json(self) -> dict[str, Any]:
        """Key, name, unit and the forms, as the interactive figures read them."""
        forms = {k: getattr(self, k).to_json() for k in ("flops", "vector", "exps", "bytes")}
        return {"key": self.key, "name": self.name, "unit": self.unit, **forms}

    def _values(self, sizes: dict[str, Any]) -> dict[str, int]:
        values = problem(**sizes)
        if self.causal and values["Nq"] > values["Nk"]:
            raise ArgumentError(
                "seq_len_k",
                values["Nk"],
                f"is less than seq_len = {values['Nq']} in a causal step.",
                "Pass at least as many keys as queries: the count has no form for empty rows.",
            )
        return values


def total(parts: Iterable[Step], key: str, name: str) -> Step:
    """Kernels launched one after the other as one step: operations and bytes add up.

    A tensor that one kernel writes and the next reads is counted both times: that is what
    separate kernels do.
    """
    parts = list(parts)
    if not parts:
        raise ArgumentError("parts", parts, "is empty.", "Pass at least one Step.")

    def add(forms: Iterable[Form]) -> Form:
        return sum(forms, Form(0))

    def merge(side: str) -> dict[str, Form]:
        out: dict[str, Form] = {}
        for part in parts:
            for tensor, form in getattr(part, side).items():
                out[tensor] = out.get(tensor, Form(0)) + form
        return out

    return Step(
        key,
        name,
        " + ".join(part.kernel for part in parts),
        add(p.matmul for p in parts),
        add(p.vector for p in parts),
        add(p.exps for p in parts),
        merge("reads"),
        merge("writes"),
        any(p.causal for p in parts),
    )


def steps(
    method: str = "naive",
    causal: bool = False,
    *,
    direction: str = "forward",
    scale_kernel: bool = True,
) -> list[Step]:
    r"""The kernels of attention, in the order in which they are launched.

    Parameters
    ----------
    method :
        ``"naive"``: one kernel per step, S and P in memory, as eager PyTorch runs it.  A
        causal mask costs one more pass and saves no operation: the products compute the
        whole square.

        ``"fused"``: one kernel with compulsory traffic: read Q, K and V once, write O and
        the LSE.  Causal counts the visible pairs only, :math:`N_q N_k - N_q(N_q-1)/2`.

        ``"fused_reread"``: the same arithmetic with the traffic between L2 and the SMs: each
        program holds ``block_m`` query rows and reads all the keys and values that its rows
        see, so K and V pass :math:`T_q = \lceil N_q / block_m \rceil` times for each *query*
        head.  The bytes that reach HBM lie between ``"fused"`` and this.  The causal form is
        exact where ``block_m`` divides ``seq_len``, else above by less than a block per head.
    direction :
        ``"backward"`` gives the gradient.  Naive: four products, from the P that forward kept.
        Fused: five, because S is computed again from Q and K (Dao et al., 2022).
    scale_kernel :
        whether S · scale is a kernel of its own (eager ``q @ k.mT * scale``); False when the
        scale is folded into Q or into the product.  Naive only.

    Returns
    -------
    list of Step
        add them up with :func:`total`.

    Raises
    ------
    ArgumentError
        for an unknown ``method`` or ``direction``.

    >>> [step.key for step in steps("naive", causal=True)]
    ['scores', 'scale', 'mask', 'softmax', 'output']
    >>> steps()[0].at(seq_len=512, head_dim=64, dtype="float16").intensity
    51.2
    """
    check_choice("method", method, ("naive", "fused", "fused_reread"))
    check_choice("direction", direction, ("forward", "backward"))
    build = {"forward": _forward, "backward": _backward}[direction]
    return build(method, causal, scale_kernel)


# Sizes in bytes; products of forms, so that a wrong factor shows in the tests of every step.
_Q = _B * _H * _NQ * _D * _E
_K = _B * _HKV * _NK * _D * _E
_V = _B * _HKV * _NK * _DV * _E
_O = _B * _H * _NQ * _DV * _E
_PAIRS = _B * _H * _NQ * _NK
_S = _PAIRS * _E
_ROWS = _B * _H * _NQ
# Row i sees i + 1 + Nk − Nq keys; summed over i it is the trapezium below.
_VISIBLE = _B * _H * (_NQ * _NK - (_NQ * _NQ - _NQ) / 2)
_SCORES, _PV = 2 * _D, 2 * _DV  # operations per pair


def _forward(method: str, causal: bool, scale_kernel: bool) -> list[Step]:
    if method == "naive":
        n2 = _PAIRS
        out = [
            Step(
                "scores", "S = QKᵀ", "bmm", n2 * _SCORES, reads={"Q": _Q, "K": _K}, writes={"S": _S}
            )
        ]
        if scale_kernel:
            out.append(
                Step("scale", "S · scale", "mul", vector=n2, reads={"S": _S}, writes={"S": _S})
            )
        if causal:
            # one byte per pair of positions, shared by every batch element and head
            mask = {"S": _S, "mask": _NQ * _NK}
            out.append(Step("mask", "mask", "masked_fill", vector=n2, reads=mask, writes={"S": _S}))
        out.append(
            Step(
                "softmax",
                "P = softmax(S)",
                "softmax",
                vector=n2 * SOFTMAX_FLOPS,
                exps=n2,
                reads={"S": _S},
                writes={"P": _S},
            )
        )
        out.append(
            Step("output", "O = PV", "bmm", n2 * _PV, reads={"P": _S, "V": _V}, writes={"O": _O})
        )
        return out
    pairs = _VISIBLE if causal else _PAIRS
    lse = _LSE_BYTES * _ROWS
    reads = {"Q": _Q, "K": _K, "V": _V}
    if method == "fused_reread":
        # Keys that the programs of one head read, all query blocks together.  Causal: block t of
        # Tq sees bm·t keys and the Nk − Nq older ones; t summed from 1 to Tq.
        keys = _TQ * _NK
        if causal:
            keys = _BM * (_TQ * _TQ + _TQ) / 2 + _TQ * (_NK - _NQ)
        reads = {"Q": _Q, "K": _B * _H * keys * _D * _E, "V": _B * _H * keys * _DV * _E}
    return [
        Step(
            method,
            "fused" if method == "fused" else "fused, K and V re-read",
            "scaled_dot_product_attention",
            pairs * (_SCORES + _PV),
            pairs * (SOFTMAX_FLOPS + 1),  # + 1: the scale
            pairs,
            reads,
            {"O": _O, "LSE": lse},
            causal,
        )
    ]


def _backward(method: str, causal: bool, scale_kernel: bool) -> list[Step]:
    if method == "naive":
        n2 = _PAIRS
        p, dp, ds = {"P": _S}, {"dP": _S}, {"dS": _S}
        out = [
            Step("dv", "dV = PᵀdO", "bmm", n2 * _PV, reads={**p, "dO": _O}, writes={"dV": _V}),
            Step("dp", "dP = dO Vᵀ", "bmm", n2 * _PV, reads={"dO": _O, "V": _V}, writes=dp),
            # multiply, add to the row sum, subtract, multiply
            Step(
                "ds",
                "dS = P ⊙ (dP − rowsum)",
                "softmax_backward",
                vector=n2 * 4,
                reads={**p, **dp},
                writes=ds,
            ),
        ]
        if causal:
            mask = {**ds, "mask": _NQ * _NK}
            out.append(Step("dmask", "mask", "masked_fill", vector=n2, reads=mask, writes=ds))
        if scale_kernel:
            out.append(Step("dscale", "dS · scale", "mul", vector=n2, reads=ds, writes=ds))
        out += [
            Step("dq", "dQ = dS K", "bmm", n2 * _SCORES, reads={**ds, "K": _K}, writes={"dQ": _Q}),
            Step("dk", "dK = dSᵀQ", "bmm", n2 * _SCORES, reads={**ds, "Q": _Q}, writes={"dK": _K}),
        ]
        return out
    if method == "fused_reread":
        raise ArgumentError(
            "method",
            method,
            "has no backward form here.",
            "Pass 'fused': chapter 09 counts what each backward kernel re-reads.",
        )
    pairs = _VISIBLE if causal else _PAIRS
    rows = _LSE_BYTES * _ROWS
    return [
        Step(
            "fused_backward",
            "fused backward",
            "scaled_dot_product_attention backward",
            # S again, dP, dV, dQ, dK: three products over d columns, two over dv
            pairs * (3 * _SCORES + 2 * _PV),
            # scale, subtract LSE, exponential, subtract delta, multiply
            pairs * 5,
            pairs,
            {"Q": _Q, "K": _K, "V": _V, "O": _O, "dO": _O, "LSE": rows, "delta": rows},
            {"dQ": _Q, "dK": _K, "dV": _V, "delta": rows},
            causal,
        )
    ]


# -- the machine ---------------------------------------------------------------------------
def special_rate(sm_count: int, clock_hz: float) -> float:
    """Exponentials per second that the special-function units of a GPU can deliver.

    ``sm_count × 16 × clock_hz``: for an H100 SXM (132 SMs at 1.83 GHz) 3.9 × 10¹² per second,
    the figure of the FlashAttention-3 paper.  Compared with a peak of the tensor cores, take
    the clock of that peak (``Card.tensor_clock_hz``): both units run on one clock.

    >>> f"{special_rate(132, 1.83e9):.2e}"
    '3.86e+12'
    """
    sms = check_positive_int("sm_count", sm_count)
    return sms * SPECIAL_PER_CLOCK * check_positive_number("clock_hz", clock_hz)


def card_or_none(gpu: str | None) -> Any:
    """The card of that name in ``labkit.hardware``, or None if it is not in the table."""
    if gpu is None:
        return None
    from labkit.hardware import card

    try:
        return card(gpu)
    except ArgumentError:
        return None


@dataclass(frozen=True)
class TimeBounds:
    """Bounds on the time of a step, seconds.

    Attributes
    ----------
    lower : everything overlaps perfectly: the longest of the parts.
    upper : nothing overlaps: their sum.  A kernel may still be slower: a bound on what the
        ceilings alone explain, not on what code can do badly.
    parts : seconds by resource: ``memory``, ``tensor``, ``vector``, ``special``.
    """

    lower: float
    upper: float
    parts: dict[str, float]

    @property
    def limited_by(self) -> str:
        """The resource with the longest time."""
        return max(self.parts, key=lambda name: self.parts[name])

    def __add__(self, other: TimeBounds) -> TimeBounds:
        names = dict.fromkeys([*self.parts, *other.parts])
        parts = {n: self.parts.get(n, 0.0) + other.parts.get(n, 0.0) for n in names}
        return TimeBounds(self.lower + other.lower, self.upper + other.upper, parts)


@dataclass(frozen=True)
class Point:
    """A measured kernel: what it did, and how long it took.

    Attributes
    ----------
    name : label.
    flops, bytes : counted, not measured, unless said so.
    seconds : measured, the median.
    """

    name: str
    flops: float
    bytes: float
    seconds: float

    def __post_init__(self) -> None:
        for argument in ("flops", "bytes", "seconds"):
            check_positive_number(argument, getattr(self, argument))

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / self.seconds

    @property
    def bandwidth(self) -> float:
        """B/s at which the counted bytes went."""
        return self.bytes / self.seconds

    def residual(self, roofline: Roofline) -> float:
        """Measured time over the lower bound: 1 is on the roof, 2 is half of what it allows.

        Below 1 the point lies above the roof, and a count or a ceiling is wrong: bytes that the
        cache served, or a peak measured too low.
        """
        return self.seconds / roofline.time(self.flops, self.bytes).lower


@dataclass(frozen=True)
class Roofline:
    """Two ceilings and what they allow.

    Parameters
    ----------
    peak_flops : FLOP/s of the units that do the work (matrix products in one dtype).
    bandwidth : B/s of the memory that feeds them.
    label : what a legend writes.
    source : ``"spec"`` or ``"measured"``.
    vector_flops : FLOP/s outside matrix products (CUDA cores, float32), where known.
    special_rate : exponentials per second, where known; at the clock of ``peak_flops``.

    Raises
    ------
    ArgumentError
        if a ceiling is not a positive number, or ``source`` is neither of the two.

    >>> a100 = Roofline(312e12, 2.0e12, "A100")
    >>> a100.ridge, a100.bound(64), a100.attainable(64) / 1e12
    (156.0, 'memory', 128.0)
    """

    peak_flops: float
    bandwidth: float
    label: str = ""
    source: str = "spec"
    vector_flops: float | None = None
    special_rate: float | None = None

    def __post_init__(self) -> None:
        check_positive_number("peak_flops", self.peak_flops)
        check_positive_number("bandwidth", self.bandwidth)
        check_choice("source", self.source, ("spec", "measured"))
        for argument in ("vector_flops", "special_rate"):
            if getattr(self, argument) is not None:
                check_positive_number(argument, getattr(self, argument))

    @classmethod
    def from_card(cls, card: Any, dtype: Any = "bfloat16") -> Roofline:
        """The data sheet's roofline of a card (a ``labkit.hardware.Card`` or its name).

        Raises
        ------
        ArgumentError
            if the card is unknown, or has no peak for ``dtype``; the message lists those it has.
        """
        if isinstance(card, str):
            from labkit.hardware import card as find

            card = find(card)
        name = dtype_name(dtype)
        if name not in card.peak:
            raise ArgumentError(
                "dtype",
                name,
                f"has no peak in the data sheet of {card.name}.",
                f"Known for it: {', '.join(card.peak)}.",
            )
        return cls(
            card.peak[name],
            card.memory_bandwidth,
            f"{card.name}, {name}, data sheet",
            "spec",
            card.peak.get("float32"),
            special_rate(card.sm_count, card.tensor_clock_hz),
        )

    @classmethod
    def from_record(
        cls, record: Any, dtype: Any = "bfloat16", *, gpu: str | None = None
    ) -> Roofline:
        """The ceilings that the experiment ``roofline`` measured.

        Reads the keys ``copy_peak`` (B/s) and ``matmul_peak_<dtype>`` (FLOP/s) of a
        ``labkit.records.Record``, or of a fresh ``labkit.experiments.Result``.  The vector peak
        and the exponential rate are not measured: they are the data sheet's, when the GPU is in
        ``labkit.hardware``.  ``gpu`` is its name; a record knows it, a fresh result does not.

        Raises
        ------
        RecordError
            if the record lacks a key (raised by the record).
        """
        name = dtype_name(dtype)
        gpu = gpu or getattr(record, "machine", {}).get("gpu")
        card = card_or_none(gpu)
        return cls(
            record.value(f"matmul_peak_{name}"),
            record.value("copy_peak"),
            f"{gpu or 'this machine'}, {name}, measured",
            "measured",
            card.peak.get("float32") if card else None,
            special_rate(card.sm_count, card.tensor_clock_hz) if card else None,
        )

    @property
    def ridge(self) -> float:
        """FLOP/byte at which both ceilings allow the same: peak over bandwidth."""
        return self.peak_flops / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """FLOP/s within reach at this intensity: ``min(peak, bandwidth × intensity)``."""
        return min(self.peak_flops, self.bandwidth * check_positive_number("intensity", intensity))

    def bound(self, intensity: float) -> str:
        """``"memory"`` below the ridge, ``"compute"`` from the ridge on."""
        return "memory" if check_positive_number("intensity", intensity) < self.ridge else "compute"

    def explain(self, intensity: float) -> str:
        """One sentence: the bound, and why.

        >>> Roofline(312e12, 2.0e12).explain(64).split("; ")[0]
        'memory-bound: 64 FLOP/byte is 0.41 of the ridge at 156'
        """
        share = significant(intensity / self.ridge, 2)
        top = format_rate(self.attainable(intensity), "FLOP/s")
        peak = format_rate(self.peak_flops, "FLOP/s")
        ridge = significant(self.ridge)
        if self.bound(intensity) == "memory":
            return (
                f"memory-bound: {significant(intensity)} FLOP/byte is {share} of the ridge at "
                f"{ridge}; {top} of {peak} in reach."
            )
        return (
            f"compute-bound: {significant(intensity)} FLOP/byte is {share} times the ridge at "
            f"{ridge}; the bytes leave all {peak} within reach."
        )

    def time(self, flops: float, bytes: float, *, exps: float = 0, vector: float = 0) -> TimeBounds:
        """Bounds on the time of one kernel, seconds.

        Parameters
        ----------
        flops : operations at ``peak_flops``.
        bytes : bytes at ``bandwidth``.
        exps : exponentials at ``special_rate``, counted when the rate is known.
        vector : other operations at ``vector_flops``, counted when that is known.  The peak is
            quoted in fused multiply-adds; a lone add or compare runs at half of it, so this part
            stays a lower bound.
        """
        parts = {"memory": bytes / self.bandwidth, "tensor": flops / self.peak_flops}
        if vector and self.vector_flops is not None:
            parts["vector"] = vector / self.vector_flops
        if exps and self.special_rate is not None:
            parts["special"] = exps / self.special_rate
        return TimeBounds(max(parts.values()), sum(parts.values()), parts)

    def time_of(self, step: Step | Sequence[Step], **sizes: Any) -> TimeBounds:
        """Bounds on one step, or on kernels run one after the other (bounds add up).

        The exponentials leave the vector count when their own ceiling is known, so that no
        operation is charged twice.  A step without a product runs at ``vector_flops`` where that
        is known, at ``peak_flops`` otherwise.  ``sizes`` are those of :func:`problem`.
        """
        if not isinstance(step, Step):
            bounds = [self.time_of(part, **sizes) for part in step]
            if not bounds:
                raise ArgumentError("step", step, "is empty.", "Pass at least one Step.")
            return sum(bounds[1:], bounds[0])
        cost = step.at(**sizes)
        vector = cost.vector - (cost.exps if self.special_rate is not None else 0)
        flops = cost.matmul
        if self.vector_flops is None and not cost.matmul:
            flops, vector = vector, 0
        return self.time(flops, cost.bytes, exps=cost.exps, vector=vector)

    def plot(self, points: Sequence[Point] = (), **options: Any) -> Any:
        """The roofline figure with measured points (``labkit.plots.roofline``)."""
        from labkit import plots

        return plots.roofline([self], points, **options)
