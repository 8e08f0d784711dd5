r"""What fits: the memory of a model and its training step, part by part, in closed form.

Six parts.  With T = batch · seq_len tokens, C = dim, e bytes per element of what is computed
and w of what is stored as a weight,

.. math::
    \text{weights} &= (12 C^2 + 13 C)\,w \text{ per layer (ff\_mult 4, no grouping)} \\
    \text{gradients} &= \text{weights},\qquad \text{optimizer (AdamW)} = 2\,\text{weights} \\
    \text{activations} &\approx 16\,T C e \text{ per layer, kept for the backward pass} \\
    \text{scores} &= B H N^2 e \text{ for every N × N tensor that is alive} \\
    \text{workspace} &= \text{gradients of activations, and what an operator needs meanwhile}

The weights are there all the time, and which of the others are alive together is what decides.
So the layer is written down here once more, equation by equation, on a tape without data
(``labkit.layers.tape``): every tensor that autograd makes, keeps and frees, in torch's order.
The peak is the largest of its moments, exact to the byte against a trace of the layer
(``labkit.memory.trace``).

Some of it nobody expects:

- Under autocast each half-precision product makes half-precision copies of what it reads: of each
  weight matrix once (kept until the step's forward pass ends, and by autograd longer), and of the
  normalised x once for each of q, k and v.  Naive attention then keeps P twice, in float32 for the
  gradient of the softmax and in half for that of the product.
- torch's ``mse_loss`` returns one number in a storage of T · C of them, alive as long as the loss.
- The gradient of a bias is a sum over all tokens, for which CUDA writes partial sums in float32:
  up to eight bytes for each element that is summed.
- A tensor that a checkpoint made again is freed as soon as its one use is over; one that autograd
  kept, when the operator's whole backward is.

Imports: closed_form, errors, units, layers.tape.  No torch.
Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from labkit.closed_form import Form, symbols
from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.layers.tape import PARTS, Buffer, Moment, Tape, Tensor
from labkit.units import format_bytes

__all__ = [
    "BACKENDS",
    "OPTIMIZERS",
    "PARTS",
    "PRECISIONS",
    "SYMBOLS",
    "Budget",
    "Case",
    "closed_form",
    "form_of",
    "kept_per_layer",
    "layer_budget",
    "longest",
    "moments",
    "places",
]

#: backends whose memory is written down here
BACKENDS = ("naive", "flash", "sdpa")
#: precision → bytes of an element computed, bytes of a weight, whether autocast is on
PRECISIONS: dict[str, tuple[int, int, bool]] = {
    "fp32": (4, 4, False),
    "tf32": (4, 4, False),
    "autocast_fp16": (2, 4, True),
    "autocast_bf16": (2, 4, True),
    "fp16": (2, 2, False),
    "bf16": (2, 2, False),
}
#: optimiser → how many tensors as large as the weights it keeps
OPTIMIZERS = {"adamw": 2, "sgd": 0}

#: symbol of the closed forms → what it is
SYMBOLS = {
    "B": "batch", "N": "seq_len", "H": "query heads", "D": "head_dim", "G": "KV heads",
    "F": "ff_mult", "M": "layers beyond the first", "e": "bytes of an element",
    "w": "bytes of a weight",
}  # fmt: skip
#: parameters of a layer that are tensors of their own
_TENSORS = 16


@dataclass(frozen=True)
class Case:
    """What decides which tensors there are (their sizes are decided later).

    Attributes
    ----------
    backend : one of ``BACKENDS``.
    autocast : half-precision products on float32 weights.
    mode : ``"inference"``, ``"training"`` or ``"checkpointed"`` (training, each layer again).
    causal : a mask.
    gather_q, gather_kv : whether naive attention's products copy q, or k and v: the heads of all
        sequences lie evenly spaced only if there is one sequence or one head.
    many_heads, many_kv_heads : more than one.
    cuda : what ATen does there: LayerNorm's statistics are float32, autocast takes the softmax in
        float32, softmax backward holds dP ⊙ P.
    traced : as ``labkit.memory.trace`` sees it: no scratch inside operators, and gradients that
        meet make a third.
    half : elements computed are narrower than float32 (with autocast: always).
    inside : autocast's softmax reads half and writes float32 in one kernel, as CUDA has it for
        float16 and not for bfloat16.
    scaled : a GradScaler multiplies the loss.
    optimizer : one of ``OPTIMIZERS``, or None to leave the step out.
    """

    backend: str
    autocast: bool
    mode: str
    causal: bool = True
    gather_q: bool = True
    gather_kv: bool = True
    many_heads: bool = True
    many_kv_heads: bool = True
    cuda: bool = True
    traced: bool = False
    half: bool = False
    inside: bool = False
    scaled: bool = False
    optimizer: str | None = "adamw"


# -- operators -------------------------------------------------------------------------------------


class _Writer:
    """The operators of the layer, each with what it makes, keeps and frees."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.tape = Tape(records=False, in_place=not case.traced)
        #: bytes per element of what a product makes, and of the stream between the layers
        self.item = "2" if case.autocast else "e"
        self.wide = "4" if case.autocast else "e"
        self.cached: list[Buffer] = []
        self.again = self.stop = False
        self.ready: Buffer | None = None

    def new(self, name: str, count: str, item: str, part: str = "workspace") -> Tensor:
        size = "" if self.stop else f"{count} {item}"
        return Tensor(self.tape.make(name, size, part), item, False)

    def _parameter_gradient(self, name: str, count: str) -> None:
        self.tape.make(name, f"{count} w", "gradients")  # held by the parameter from here on

    def _summed(self, name: str, outer: str) -> None:
        """What CUDA's sum over the tokens, the gradient of a bias, writes in between."""
        if self.case.cuda and not self.case.traced:
            self.tape.brief(f"sums for db {name}", f"sum_{outer.replace(' ', '')}")

    def norm(self, x: Tensor) -> Tensor:
        """LayerNorm: keeps x, and mean and 1/σ of each row."""
        t = self.tape
        stats = "4" if self.case.cuda or self.case.autocast else "e"
        out = self.new("LayerNorm", "T C", self.wide)
        mean, rstd = (t.make(name, f"T {stats}") for name in ("mean", "1/σ"))

        def run(dy: Buffer):
            dx = t.make("d LayerNorm", f"T C {x.item}") if x.grad else None
            self._parameter_gradient("dγ", "C")
            self._parameter_gradient("dβ", "C")
            return (dx,)

        t.node([x], out, [x.buffer, mean, rstd], run)
        t.drop(mean, rstd)
        out.grad = t.records
        return out

    def cast(self, x: Tensor, count: str, item: str, name: str) -> Tensor:
        """x in another element type; nothing is kept."""
        out = self.new(name, count, item)
        back = x.item

        def run(dy: Buffer):
            return (self.tape.make(f"d {name}", f"{count} {back}"),)

        return self.tape.node([x], out, [], run)

    def _half_parameter(self, name: str, count: str) -> Tensor:
        """autocast's half-precision copy of a parameter, remembered until autocast ends."""
        t = self.tape
        out = Tensor(t.make(name, f"{count} 2", "weights"), "2", True)
        self.cached.append(t.hold(out.buffer))

        def run(dy: Buffer):
            self._parameter_gradient(f"d {name}", count)
            return ()

        t.node([], out, [], run)
        out.grad = t.records
        return out

    def linear(self, x: Tensor, inner: str, outer: str, name: str) -> Tensor:
        """x Wᵀ + b for every token: keeps x, and autocast's copy of W."""
        # a tensor that a checkpoint hands out is let go of as soon as it has been used
        t, again = self.tape, self.again
        if not self.case.autocast:
            out = self.new(name, f"T {outer}", self.item)

            def run(dy: Buffer):
                dx = t.make(f"d input of {name}", f"T {inner} {self.item}") if x.grad else None
                self._parameter_gradient(f"dW {name}", f"{inner} {outer}")
                if again:
                    t.release()
                self._summed(name, outer)
                self._parameter_gradient(f"db {name}", outer)
                return (dx,)

            t.node([x], out, [x.buffer], run)
            out.grad = t.records
            return out
        # the arguments are converted from the last to the first
        bias = self._half_parameter(f"b {name}, half", outer)
        weight = self._half_parameter(f"W {name}, half", f"{inner} {outer}")
        y = x
        if x.item != "2":
            y = self.cast(x, f"T {inner}", "2", f"input of {name}, half")
        out = self.new(name, f"T {outer}", self.item)

        def run_half(dy: Buffer):
            dx = t.make(f"d input of {name}", f"T {inner} 2") if y.grad else None
            dw = t.make(f"dW {name}, half", f"{inner} {outer} 2")
            if again:
                t.release()
            self._summed(name, outer)
            db = t.make(f"db {name}, half", f"{outer} 2")
            return dx, dw, db

        t.node([y, weight, bias], out, [y.buffer, weight.buffer], run_half)
        if y is not x:
            t.drop(y)
        t.drop(weight, bias)
        out.grad = t.records
        return out

    def gelu(self, x: Tensor) -> Tensor:
        """GELU: keeps its input."""
        out = self.new("GELU", "T C F", self.item)

        def run(dy: Buffer):
            return (self.tape.make("d GELU", f"T C F {self.item}"),)

        return self.tape.node([x], out, [x.buffer], run)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y: keeps nothing; the gradient goes both ways, in half precision where y was."""
        t = self.tape
        out = self.new("residual", "T C", self.wide)

        def run(dy: Buffer):
            if y.item == self.wide:
                right = t.hold(dy)
            elif self.ready is not None:
                right, self.ready = self.ready, None
            else:
                right = t.make("dy, half", f"T C {y.item}")
            return (t.hold(dy), right)

        return t.node([x, y], out, [], run)

    # -- attention -----------------------------------------------------------------------
    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A kernel that writes O and the LSE, and keeps them with q, k and v."""
        t, item = self.tape, self.item
        out = self.new("O", "T C", item)
        lse = t.make("LSE", "T H 4")
        kept = [q.buffer, k.buffer, v.buffer, out.buffer, lse]

        def run(dout: Buffer):
            widths = {"dQ": "C", "dK": "K", "dV": "K"}
            made = [t.make(name, f"T {width} {item}") for name, width in widths.items()]
            if not self.case.traced:
                t.brief("delta", "T H 4")
                if self.case.backend == "sdpa" and self.case.half:
                    t.brief("dQ in float32", "T C 4")
            return made

        t.node([q, k, v], out, kept, run)
        t.drop(lse)
        return out

    def naive(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``labkit.naive.naive_attention``, out of place."""
        t, case, item = self.tape, self.case, self.item
        mask = self._mask() if case.causal else None

        def scores(name: str, size: str = item) -> Tensor:
            return self.new(name, "S", size, "scores")

        def by_heads(x: Tensor, width: str, name: str, copied: bool) -> Tensor:
            """x as the product wants it; the gradient comes back as it is."""
            y = self.new(name, f"T {width}", item) if copied else self.view(x)
            return t.node([x], y, [], lambda dy: (t.hold(dy),))

        def product(a: Tensor, b: Tensor, out: Tensor, da: str, db: str, part: str) -> Tensor:
            def run(dy: Buffer):
                second = t.make("d second factor", f"{db} {b.item}")
                return t.make("d first factor", f"{da} {a.item}", part), second

            return t.node([a, b], out, [a.buffer, b.buffer], run)

        def step(x: Tensor, y: Tensor, saved=(), size: str = item, scratch: bool = False):
            """One element-wise operation on the scores."""

            def run(dy: Buffer):
                made = t.make(f"d of a step to {y.buffer.name}", f"S {size}", "scores")
                if scratch and case.cuda and not case.traced:
                    t.brief("dP ⊙ P", f"S {y.item}", "scores")
                return (made,)

            return t.node([x], y, saved, run)

        # S = scale · QKᵀ, hidden scores set to −∞
        qh = by_heads(q, "C", "Q by heads", case.gather_q)
        kh = by_heads(k, "K", "Kᵀ by heads", case.gather_kv)
        raw = product(qh, kh, scores("QKᵀ"), "T C", "T K", "workspace")
        t.drop(qh, kh)
        S = step(raw, scores("S"))
        t.drop(raw)
        if mask is not None:
            hidden = step(S, scores("S masked"), [mask])
            t.drop(S)
            S = hidden
        # P = softmax(S)
        if case.autocast and case.cuda and case.inside:
            P = scores("P in float32", "4")
            step(S, P, [P.buffer], "2", scratch=True)
        elif case.autocast and case.cuda:
            exact = step(S, scores("S in float32", "4"), (), "2")
            P = scores("P in float32", "4")
            step(exact, P, [P.buffer], "4", scratch=True)
            t.drop(exact)
        else:
            P = scores("P")
            step(S, P, [P.buffer], scratch=True)
        t.drop(S)
        # O = PV
        factor = P
        if P.item != item:
            factor = step(P, scores("P in half", item), (), "4")
        vh = by_heads(v, "K", "V by heads", case.gather_kv)
        out = self.new("O by heads", "T C", item)
        product(factor, vh, out, "S", "T K", "scores")
        t.drop(vh, P, mask)
        if factor is not P:
            t.drop(factor)
        return out

    def _mask(self) -> Buffer:
        t = self.tape
        rows, columns = t.make("i", "N 8"), t.make("j", "N 8")
        shifted = t.make("i + Nk − Nq", "N 8")
        mask = t.make("mask", "N N", "scores")
        t.drop(rows, columns, shifted)
        return mask

    def view(self, x: Tensor) -> Tensor:
        """Another name for the same bytes."""
        return Tensor(self.tape.hold(x.buffer), x.item, x.grad)

    def heads(self, x: Tensor, width: str, copied: bool) -> Tensor:
        """A projection seen head by head; its gradient may lie otherwise and is copied then."""
        t, y = self.tape, self.view(x)

        def run(dy: Buffer):
            return (t.make("gradient by tokens", f"T {width} {x.item}") if copied else t.hold(dy),)

        t.drop(x)
        return t.node([x], y, [], run)

    def by_tokens(self, o: Tensor) -> Tensor:
        """O of naive attention, copied to ``[batch, seq_len, dim]``."""
        t = self.tape
        out = self.new("O by tokens", "T C", self.item) if self.case.many_heads else self.view(o)

        def run(dy: Buffer):
            if not self.case.gather_q:
                return (t.hold(dy),)
            return (t.make("dO by heads", f"T C {self.item}"),)

        return t.node([o], out, [], run)

    # -- the layer -----------------------------------------------------------------------
    def layer(self, x: Tensor, *, again: bool = False) -> Tensor:
        """``AttentionLayer.forward``; locals are dropped where Python drops them.

        ``again``: by a checkpoint, which stops when it has the last tensor that was kept: the
        last product and the last sum are not made.
        """
        t, naive = self.tape, self.case.backend == "naive"
        h = self.norm(x)
        many, several = self.case.many_heads, self.case.many_kv_heads
        projections = []
        # K's gradient comes as that of Kᵀ, so it is always laid out anew
        for name, width, moved in (("q", "C", many), ("k", "K", True), ("v", "K", several)):
            y = self.linear(h, "C", width, f"{name}_proj")
            projections.append(self.heads(y, width, moved) if naive else y)
        q, k, v = projections
        o = self.naive(q, k, v) if naive else self.fused(q, k, v)
        flat = self.by_tokens(o) if naive else self.view(o)
        if not naive:
            t.node([o], flat, [], lambda dy: (t.hold(dy),))
        y = self.linear(flat, "C", "C", "out_proj")
        t.drop(flat, q, k, v, o, h)
        x1 = self.add(x, y)
        t.drop(y)
        h = self.norm(x1)
        wide = self.linear(h, "C", "C F", "ff.0")
        active = self.gelu(wide)
        t.drop(wide)
        self.stop = again
        y = self.linear(active, "C F", "C", "ff.2")
        t.drop(active, h)
        out = self.add(x1, y)
        self.stop = False
        t.drop(y, x1)
        return out

    def checkpointed(self, x: Tensor) -> Tensor:
        """The layer under ``torch.utils.checkpoint``: keeps x, and makes the rest once more."""
        t = self.tape
        t.records = False
        out = self.layer(x)
        t.records = True

        def run(dy: Buffer):
            later, t.nodes = t.nodes, []
            cached, self.cached = self.cached, []
            if self.case.autocast:  # what the last product waits for, before anything is made again
                self.ready = t.make("dy, half", "T C 2")
            t.at("again", t.layer)
            start = Tensor(x.buffer, x.item, x.grad)
            self.again = True
            end = self.layer(start, again=True)
            self.again = False
            t.drop(*self.cached)
            dx = t.backward(end, dy, start)
            t.nodes, self.cached = later, cached
            return (dx,)

        t.node([x], out, [x.buffer], run, consumes=True)
        out.grad = True
        return out

    # -- the model and its step ----------------------------------------------------------
    def model(self, x: Tensor, layers: int) -> Tensor:
        """``TransformerModel.forward``."""
        t, start = self.tape, x
        for number in range(1, layers + 1):
            t.at("forward", number)
            new = (self.checkpointed if self.case.mode == "checkpointed" else self.layer)(x)
            if x is not start:
                t.drop(x)
            x = new
        t.at("forward", layers + 1)
        out = self.norm(x)
        t.drop(x)
        return out

    def loss(self, y: Tensor, target: Tensor) -> None:
        """The mean square error in float32, the backward pass, and the update in place."""
        t, exact, case = self.tape, "4", self.case
        t.at("loss")
        y32, target32 = y, target
        if not case.autocast and case.half:
            y32 = self.cast(y, "T C", exact, "output in float32")
            t.drop(y)
            target32 = self.cast(target, "T C", exact, "target in float32")
        # torch makes the squares twice, and returns the first, cut to one number, with its storage
        size = exact if case.traced else "T C 4"
        loss = Tensor(t.make("loss", size), exact, True)
        if not case.traced:
            t.brief("squares", size)

        def run(dy: Buffer):
            return (t.make("d loss", f"T C {exact}"),)

        t.node([y32], loss, [y32.buffer, target32.buffer], run)
        t.drop(y32)
        if target32 is not target:
            t.drop(target32)
        t.drop(*self.cached)
        self.cached = []
        if case.scaled:
            loss = t.node([loss], Tensor(t.make("loss · scale", exact), exact, True), [],
                          lambda dy: (t.make("d loss · scale", exact),))  # fmt: skip
        seed = t.make("1", exact)  # its maker holds it to the end
        t.backward(loss, t.hold(seed))
        t.drop(seed)
        t.at("update")
        t.brief("update", exact)  # a fused optimiser needs nothing; this notes the moment


def _events(case: Case, layers: int) -> list[Moment]:
    """Every moment of one step (or one forward pass) of that many layers."""
    w = _Writer(case)
    t = w.tape
    t.at("held")
    for _ in range(layers):
        t.make("weights", "W w", "weights")
    t.make("weights", "R w", "weights")
    x = Tensor(t.make("x", f"T C {w.wide}", "activations"), w.wide, False)
    if case.mode == "inference":
        w.model(x, layers)
        t.drop(*w.cached)
        return t.moments
    if case.optimizer is not None and OPTIMIZERS[case.optimizer]:
        # as many states as the weights have numbers, and a float32 for each tensor: steps made
        for numbers, tensors in [("W", _TENSORS)] * layers + [("R", 2)]:
            for _ in range(OPTIMIZERS[case.optimizer]):
                t.make("optimizer", f"{numbers} w", "optimizer")
            t.make("steps made", f"{4 * tensors}", "optimizer")
    if case.scaled:
        t.make("scale, and good steps in a row", "8", "optimizer")
    target = Tensor(t.make("target", f"T C {w.wide}", "activations"), w.wide, False)
    t.records = True
    y = w.model(x, layers)
    w.loss(y, target)
    return t.moments


# -- closed forms ----------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def moments(case: Case, *, single: bool = False) -> tuple[Moment, ...]:
    """The moments of a step of which one is the peak, whatever the sizes.

    ``single`` is a model of one layer; the others are those of :func:`places`.
    """
    return tuple(_highest(_events(case, 1) if single else [*places(case).values()]))


@lru_cache(maxsize=512)
def places(case: Case) -> dict[tuple[str, str, int], Moment]:
    """Every moment of a step of two layers or more, by phase, layer and number.

    What a layer adds is the same for each, and the first and the last are the extremes, so a model
    of any depth is a straight line through those of two and three layers: the sizes have a factor
    M, the layers beyond the first.  The layer is ``"first"``, ``"last"``, ``"norm"`` (the last
    norm) or ``""`` (none); layers between them are left out.
    """
    two, three = ({_place(m, n): m for m in _events(case, n)} for n in (2, 3))
    found = {}
    for place, m in two.items():
        if place is None:
            continue
        more = three[place].alive
        alive: dict[tuple[str, str], int] = {}
        for key in {**m.alive, **more}:
            part, size = key
            at_two, step = m.alive.get(key, 0), more.get(key, 0) - m.alive.get(key, 0)
            if at_two != step:
                alive[key] = at_two - step
            if step:
                alive[part, f"M {size}"] = step
        found[place] = Moment(m.where, m.name, alive)
    return found


def _place(m: Moment, layers: int) -> tuple[str, str, int] | None:
    """Where a moment is, in words that do not depend on the number of layers; None in between."""
    phase, layer, count = m.where
    last = {layers + 1: "norm", layers: "last"}
    first = {} if phase == "forward" else {1: "first"}
    where = {0: "", **first, **last}.get(layer)
    return None if where is None else (phase, where, count)


def _highest(found: list[Moment]) -> Iterator[Moment]:
    """Those that the next one does not exceed: where something was freed in between."""
    for m, after in zip(found, [*found[1:], None], strict=True):
        if after is None or any(n > after.alive.get(key, 0) for key, n in m.alive.items()):
            yield m


def closed_form(moment: Moment, part: str | None = None) -> Form:
    """Bytes of one part at that moment, or of all, as a form in the symbols of ``SYMBOLS``."""
    total = Form(0)
    for (of, size), count in moment.alive.items():
        if part in (None, of):
            total = total + form_of(size) * count
    return total


@lru_cache(maxsize=1024)
def form_of(size: str) -> Form:
    """A size in closed form; the partial sums of a bias's gradient as for many tokens."""
    b, n, h, d, g, f, m = symbols("B N H D G F M")
    c, k = h * d, g * d
    layer = 2 * c * c + 2 * c * k + 2 * c + 2 * k  # projections and their biases
    layer = layer + 2 * f * c * c + f * c + c + 4 * c  # feed-forward, two norms
    if size.startswith("sum_"):
        # its limit for many rows, where each thread adds as many as it may
        return form_of("T " + " ".join(size.removeprefix("sum_"))) / 2
    named = {"T": b * n, "C": c, "K": k, "S": b * h * n * n, "W": layer, "R": 2 * c, "M": m}
    product = Form(1)
    for factor in size.split():
        one = Form(int(factor)) if factor.isdigit() else named.get(factor)
        product = product * (symbols(factor)[0] if one is None else one)
    return product


#: CUDA's sum over rows: threads of a block, rows that one of them adds at least and at most, what
#: is resident on a card of 132 multiprocessors, and rows below which nothing is shared: with 512
#: the H200 did not (but for one small sum in pure half precision, left out here), with 1,024 it
#: did (record training_step).  See ``_sum_bytes``.
_SUM = {"columns": 128, "least": 64, "most": 1024, "blocks": 132 * 16, "shared": 1024}


def _numbers(sizes: dict[str, int]) -> dict[str, int]:
    """What the factors of a size stand for."""
    out = sizes | {name: form_of(name)(**sizes) for name in ("T", "C", "K", "S", "W", "R")}
    for name, width in (("C", out["C"]), ("K", out["K"]), ("CF", out["C"] * sizes["F"])):
        out[f"sum_{name}"] = _sum_bytes(out["T"], width)
    return out


def _sum_bytes(rows: int, width: int) -> int:
    """Bytes of the float32 partial sums that torch's CUDA sum over ``rows`` writes in between.

    A block of 128 threads sums four columns for each of 32 threads; rows are shared among blocks
    until the card is full or each has 16 rows a thread, and 256 at most.  Every thread of a block
    has a place for each of its partial sums.  Few rows are left to one block, which needs none.
    """
    if rows < _SUM["shared"]:
        return 0
    across = -(-width // _SUM["columns"])
    blocks = min(-(-_SUM["blocks"] // across), -(-rows // _SUM["least"]))
    blocks = max(blocks, -(-rows // _SUM["most"]))
    return 0 if blocks <= 1 else 4 * width * blocks * _SUM["columns"]


def _bytes(size: str, numbers: dict[str, int]) -> int:
    product = 1
    for factor in size.split():
        product *= numbers[factor] if factor in numbers else int(factor)
    return product


def kept_per_layer(case: Case) -> Form:
    """Bytes that autograd keeps of one layer between forward and backward, scores included."""
    at = {}
    for layers in (2, 3):
        before = next(m for m in _events(case, layers) if m.where[0] == "loss")
        at[layers] = closed_form(before, "activations") + closed_form(before, "scores")
    return at[3] - at[2]


# -- what is asked ---------------------------------------------------------------------------------

_PHASES = {
    "forward": "forward pass",
    "loss": "the loss",
    "backward": "backward pass",
    "again": "forward pass made again",
    "update": "the update",
    "held": "before anything runs",
}


@dataclass(frozen=True)
class Budget:
    """Bytes alive at the worst moment, part by part.

    Attributes
    ----------
    parts : bytes by name, in the order of ``PARTS``: ``weights`` (autocast's half-precision copies
        included), ``gradients`` (of weights), ``optimizer``, ``activations`` (kept for the backward
        pass, and x and the target), ``scores`` (every tensor with seq_len² in it), ``workspace``
        (what is in passing).
    total : their sum.
    peak_at : which moment that is, in words.
    case, sizes : what was asked, as the forms take it.
    """

    parts: dict[str, int]
    peak_at: str
    case: Case = field(repr=False)
    sizes: dict[str, int] = field(repr=False)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for export."""
        return {**self.parts, "total": self.total, "peak_at": self.peak_at}

    def __str__(self) -> str:
        rows = [(name, value) for name, value in self.parts.items() if value]
        rows.append(("total", self.total))
        wide = max(len(name) for name, _ in rows)
        lines = [f"{name:<{wide}}  {format_bytes(value):>10}" for name, value in rows]
        return "\n".join([*lines, f"peak: {self.peak_at}"])

    def _repr_html_(self) -> str:
        body = "".join(
            f'<tr><th scope="row">{name}</th><td style="text-align:right">{format_bytes(n)}</td>'
            f'<td style="text-align:right">{100 * n / self.total:.1f} %</td></tr>'
            for name, n in [*self.parts.items(), ("total", self.total)]
        )
        return (
            f'<table class="labkit-memory"><caption>Memory at its peak: {self.peak_at}</caption>'
            '<thead><tr><th scope="col">part</th><th scope="col">bytes</th>'
            f'<th scope="col">share</th></tr></thead><tbody>{body}</tbody></table>'
        )


def layer_budget(
    dim: int,
    num_heads: int,
    num_layers: int,
    seq_len: int,
    batch: int = 1,
    *,
    backend: str = "flash",
    precision: str = "fp32",
    training: bool = False,
    optimizer: str = "adamw",
    checkpoint: bool = False,
    causal: bool = True,
    num_kv_heads: int | None = None,
    ff_mult: int = 4,
    device: str = "cuda",
    traced: bool = False,
) -> Budget:
    """What a ``TransformerModel`` holds at its worst moment: one forward pass, or one step.

    Parameters
    ----------
    dim, num_heads, num_layers, num_kv_heads, ff_mult : int
        of the model.
    seq_len, batch : int
        of what it is given.
    backend : str
        ``"naive"``, ``"flash"`` or ``"sdpa"`` (its fused kernels).
    precision : str
        one of ``PRECISIONS``.
    training : bool
        ``TrainingStep.launch``, from the second step on; else a forward pass without gradients.
    optimizer : str
        ``"adamw"`` or ``"sgd"``, fused: neither needs temporary tensors.
    checkpoint : bool
        each layer is made once more in the backward pass; no difference without training.
    causal : bool
        with a mask, which naive attention writes down.
    device : str
        ``"cuda"`` or ``"cpu"``: they differ in what LayerNorm, autocast and softmax make.
    traced : bool
        as ``labkit.memory.trace`` sees it, not as it is: without what operators make for
        themselves, and with a third tensor where two gradients meet.

    Returns
    -------
    Budget
        without what is torch's own: the CUDA context, cuBLAS's workspace, the allocator's rounding
        (to 512 bytes) and the pieces of its memory that nothing fits into.

    Raises
    ------
    ArgumentError
        for a size that is not a positive integer, heads that do not divide, or an unknown name.

    >>> budget = layer_budget(256, 4, 2, 2048, 4, backend="naive", training=True)
    >>> budget.parts["scores"] > budget.total / 2
    True
    """
    case, sizes = _asked(
        dim, num_heads, num_layers, seq_len, batch, backend=backend, precision=precision,
        training=training, optimizer=optimizer, checkpoint=checkpoint, causal=causal,
        num_kv_heads=num_kv_heads, ff_mult=ff_mult, device=device, traced=traced,
    )  # fmt: skip
    numbers = _numbers(sizes)
    known: dict[str, int] = {}

    def value(size: str) -> int:
        if size not in known:
            known[size] = _bytes(size, numbers)
        return known[size]

    single = sizes["M"] == 0
    _, best = max(
        ((sum(value(size) * n for (_, size), n in m.alive.items()), -i), m)
        for i, m in enumerate(moments(case, single=single))
    )  # the first of equals
    parts = {part: 0 for part in PARTS}
    for (part, size), n in best.alive.items():
        parts[part] += value(size) * n
    phase, layer, _ = best.where
    where = "" if single or layer == 0 else ", first layer" if layer == 1 else ", last layer"
    if layer > (1 if single else 2):
        where = ", last norm"
    return Budget(parts, f"{_PHASES[phase]}{where}: {best.name}", case, sizes)


def longest(
    memory_bytes: int,
    dim: int,
    num_heads: int,
    num_layers: int,
    batch: int = 1,
    **options: Any,
) -> int:
    """The longest seq_len whose budget is within ``memory_bytes``; 0 if none is.

    ``options`` are those of :func:`layer_budget`.

    Raises
    ------
    ArgumentError
        as ``layer_budget`` does.

    >>> short = longest(12 * 2**30, 256, 4, 2, 4, backend="naive")
    >>> longest(12 * 2**30, 256, 4, 2, 4, backend="flash") > 10 * short
    True
    """
    check_positive_int("memory_bytes", memory_bytes)
    case, sizes = _asked(dim, num_heads, num_layers, 1, batch, **options)
    found = moments(case, single=sizes["M"] == 0)

    def fits(n: int) -> bool:
        numbers = _numbers(sizes | {"N": n})
        known = {size: _bytes(size, numbers) for m in found for _, size in m.alive}
        return all(
            sum(known[size] * count for (_, size), count in m.alive.items()) <= memory_bytes
            for m in found
        )

    low, high = 0, 1
    while high < 2**62 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _asked(
    dim: int,
    num_heads: int,
    num_layers: int,
    seq_len: int,
    batch: int,
    *,
    backend: str = "flash",
    precision: str = "fp32",
    training: bool = False,
    optimizer: str = "adamw",
    checkpoint: bool = False,
    causal: bool = True,
    num_kv_heads: int | None = None,
    ff_mult: int = 4,
    device: str = "cuda",
    traced: bool = False,
) -> tuple[Case, dict[str, int]]:
    """The case and the sizes, checked."""
    for name, value in (("dim", dim), ("num_heads", num_heads), ("num_layers", num_layers),
                        ("seq_len", seq_len), ("batch", batch), ("ff_mult", ff_mult)):  # fmt: skip
        check_positive_int(name, value)
    if dim % num_heads:
        raise ArgumentError(
            "num_heads", num_heads, f"does not divide dim = {dim}.",
            "Use a number of heads that does.",
        )  # fmt: skip
    kv = num_heads if num_kv_heads is None else check_positive_int("num_kv_heads", num_kv_heads)
    if num_heads % kv:
        raise ArgumentError(
            "num_kv_heads", kv, f"does not divide num_heads = {num_heads}.",
            "Use a number of KV heads that divides the number of query heads.",
        )  # fmt: skip
    check_choice("backend", backend, BACKENDS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    kind = check_choice("device", str(device).split(":")[0], ("cuda", "cpu"))
    e, w, autocast = PRECISIONS[precision]
    mode = "inference" if not training else "checkpointed" if checkpoint else "training"
    case = Case(
        backend=backend,
        autocast=autocast,
        mode=mode,
        causal=bool(causal),
        gather_q=(batch > 1 and num_heads > 1) or kv < num_heads,
        gather_kv=batch > 1 and kv > 1,
        many_heads=num_heads > 1,
        many_kv_heads=kv > 1,
        cuda=kind == "cuda",
        traced=bool(traced),
        half=e == 2,
        inside=kind == "cuda" and precision == "autocast_fp16",
        scaled=training and precision == "autocast_fp16",
        optimizer=optimizer,
    )
    sizes = {
        "B": batch, "N": seq_len, "H": num_heads, "D": dim // num_heads, "G": kv, "F": ff_mult,
        "M": num_layers - 1, "e": e, "w": w,
    }  # fmt: skip
    return case, sizes
