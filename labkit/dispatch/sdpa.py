"""Which backend ``torch.nn.functional.scaled_dot_product_attention`` (SDPA) takes, and why.

SDPA is one function with several kernels behind it.  On each call torch goes through its backends
in an order of priority and takes the first whose conditions the inputs meet.  On a GPU:

=============  ===================================================================================
``cudnn``      cuDNN's fused kernels; float16 and bfloat16.  First in the order on cards of compute
               capability 9 and 10 with a recent cuDNN; elsewhere behind ``math``, and so never
               taken unasked
``flash``      FlashAttention-2; float16 and bfloat16, no attn_mask
``efficient``  the fused kernels that came from xFormers; also float32, also with an attn_mask
``math``       products and a softmax, S and P in memory; takes everything
=============  ===================================================================================

On a CPU there are two, ``flash_cpu`` and ``math``.  :func:`explain` asks torch which it would
take, and each of the others why not; :func:`force` takes the choice out of torch's hands.

Three traps of torch 2.11, met by the code below:

- torch learns the order of the card at the first choice on it.  Read earlier, the order is
  another.  Set earlier (``sdpa_kernel(…, set_priority=True)``), it is overruled by that first
  choice, and what is put back after is not the card's: cuDNN, first before, is then last.
- A condition that fails says so in a warning, some of them once in a process only.
- ``torch.backends.cuda.can_use_flash_attention(…, debug=True)`` and its sisters give their reasons
  past Python's warnings, to the terminal.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claim C24.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.backends import cuda as flags
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function

from labkit.errors import ArgumentError, check_choice

__all__ = ["ASKS", "SDPA", "Explanation", "Refusal", "explain", "force"]

#: name of the range around a call that computes nothing: a profile is not to take it for one
ASKS = "labkit::asks"
#: the backends that SDPA has on a GPU, by the names used here
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
#: torch has one switch for the flash kernels of GPUs and CPUs
_SWITCH = {**SDPA, "flash_cpu": SDPBackend.FLASH_ATTENTION}
_NAMES = {int(value): name for name, value in SDPA.items()}
_ON_CPU = ("flash_cpu", "math")


@dataclass(frozen=True)
class Refusal:
    """Why a backend cannot take the inputs.

    Attributes
    ----------
    why : in short.
    torch : torch's own sentence; empty where torch refuses without one.
    """

    why: str
    torch: str = ""

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class Explanation:
    """What SDPA would do with some inputs.

    Attributes
    ----------
    would_run : the backend that torch takes: ``"flash"``, ``"cudnn"``, ``"efficient"`` or
        ``"math"`` on a GPU, ``"flash_cpu"`` or ``"math"`` on a CPU; None if every backend that
        could is switched off, and the call would raise.
    order : the backends in the order in which torch asks them.
    refused : backend to the reasons, for those that cannot take the inputs or are switched off.
        torch stops at the first condition that fails, so there may be more than are listed.
    inputs : the inputs in words.
    """

    would_run: str | None
    order: tuple[str, ...]
    refused: dict[str, tuple[Refusal, ...]] = field(default_factory=dict)
    inputs: str = ""

    @property
    def could_run(self) -> tuple[str, ...]:
        """The backends that take these inputs, in torch's order; the first is the one it takes."""
        return tuple(name for name in self.order if name not in self.refused)

    @property
    def fused(self) -> bool:
        """Whether S and P stay out of memory."""
        return self.would_run not in (None, "math")

    def __str__(self) -> str:
        lines = [f"{self.inputs}: {self.would_run or 'nothing'} runs."]
        width = max((len(name) for name in (*self.order, *self.refused)), default=0)
        for name in (*self.order, *(n for n in self.refused if n not in self.order)):
            if name in self.refused:
                what = "refuses: " + "; ".join(str(r) for r in self.refused[name])
            else:
                what = "runs" if name == self.would_run else "could run"
            lines.append(f"  {name:<{width}}  {what}")
        return "\n".join(lines)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Explanation:
    """Ask torch which backend ``scaled_dot_product_attention`` would take, without running it.

    The switches that are set now (``force``, ``sdpa_kernel``, ``torch.backends.cuda.enable_*``)
    count, and so does ``requires_grad``, as it does in the call.

    Parameters
    ----------
    q, k, v, attn_mask, is_causal, dropout_p, scale, enable_gqa
        as for ``torch.nn.functional.scaled_dot_product_attention``:
        ``[batch, heads, seq_len, head_dim]``, on one device, of one dtype.

    Returns
    -------
    Explanation

    Raises
    ------
    ArgumentError
        for inputs that the call itself would not take.
    """
    call = _Call(q, k, v, attn_mask, is_causal, dropout_p, scale, enable_gqa)
    call.check()
    would_run = call.choice()  # first: on its first call torch learns the card's order
    order = call.order()
    refused = {}
    for name in (*order, *(n for n in SDPA if n not in order and n != "flash")):
        if reasons := call.refusals(name):
            refused[name] = reasons
    return Explanation(would_run, order, refused, call.words())


@contextmanager
def force(
    *backends: str, inputs: Sequence[torch.Tensor] | None = None, **options: Any
) -> Iterator[None]:
    """Let SDPA take only these backends, in this order; the switches are restored after.

    A context manager over ``torch.nn.attention.sdpa_kernel``, which takes the place of
    ``torch.backends.cuda.sdp_kernel``.  The old one is deprecated, and it leaves cuDNN switched on
    unless told otherwise: its ``enable_flash=True, enable_math=False,
    enable_mem_efficient=False`` does not mean flash on a card where torch prefers cuDNN.

    Under ``torch.compile`` put it around the compiled function, not into it.

    Parameters
    ----------
    backends : ``"flash"``, ``"cudnn"``, ``"efficient"``, ``"math"``; on a CPU ``"flash_cpu"`` (or
        ``"flash"``: torch has one switch for both) and ``"math"``.
    inputs : ``(q, k, v)``: refuse them at once if none of the backends takes them.
    options : with ``inputs``, the other arguments of the call, as for :func:`explain`.

    Raises
    ------
    ArgumentError
        for an unknown backend; for ``inputs`` that none of them takes; and in place of torch's
        "No available kernel" for a call in the block that none takes.  It says why.
    """
    if not backends:
        raise ArgumentError("backends", (), "is empty.", f"Name one of {', '.join(_SWITCH)}.")
    for name in backends:
        check_choice("backend", name, _SWITCH)
    if inputs is None and options:
        raise ArgumentError(
            next(iter(options)), next(iter(options.values())), "is given without inputs.",
            "Pass inputs=(q, k, v) with it.",
        )  # fmt: skip
    chosen = list(dict.fromkeys(_SWITCH[name] for name in backends))
    if len(chosen) > 1 and torch.cuda.is_available():
        _learn_order()
    with sdpa_kernel(chosen, set_priority=len(chosen) > 1), _hearing() as heard:
        if inputs is not None:
            _refuse_at_once(backends, inputs, options)
        try:
            yield
        except RuntimeError as error:
            if not _none_available(error):
                raise
            whys = [
                f"{name}: {', '.join(map(_short, lines))}"
                for name in backends
                if (lines := _of(name, heard))
            ]
            # torch's words where a device has none of them
            viable = "No viable backend" in str(error)
            nothing = "none of them runs on this device" if viable else "torch says no more"
            raise _cannot(backends, "; ".join(whys) or nothing, None) from error


# -- one call -------------------------------------------------------------------------------------


@dataclass
class _Call:
    """The arguments of one call, and what torch says of them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn_mask: torch.Tensor | None
    is_causal: bool
    dropout_p: float
    scale: float | None
    enable_gqa: bool

    @property
    def on_gpu(self) -> bool:
        return self.q.device.type == "cuda"

    def check(self) -> None:
        """Refuse what the call itself would refuse, whatever backend it took."""
        for name in ("q", "k", "v"):
            x = getattr(self, name)
            if not isinstance(x, torch.Tensor):
                raise ArgumentError(
                    name, type(x).__name__, "is not a torch tensor.", "Pass a tensor."
                )
            if x.dim() < 2:
                raise ArgumentError(
                    f"{name}.shape", tuple(x.shape), f"has {x.dim()} dimensions.",
                    "Use [batch, heads, seq_len, head_dim].",
                )  # fmt: skip
            for what in ("dtype", "device"):
                if getattr(x, what) != getattr(self.q, what):
                    raise ArgumentError(
                        f"{name}.{what}", str(getattr(x, what)),
                        f"differs from q's {getattr(self.q, what)}.",
                        f"Convert it: {name}.to(q.{what}).",
                    )  # fmt: skip
        if self.attn_mask is not None and self.is_causal:
            raise ArgumentError(
                "is_causal", True, "cannot go with an attn_mask: torch takes one of the two.",
                "Put the causal mask into attn_mask.",
            )  # fmt: skip
        if self.attn_mask is not None and self.attn_mask.dim() < 2:
            raise ArgumentError(
                "attn_mask.shape", tuple(self.attn_mask.shape), "has less than 2 dimensions.",
                "Use [Nq, Nk], or [1, Nk] for the same keys in every row.",
            )  # fmt: skip
        if not 0 <= self.dropout_p <= 1:
            raise ArgumentError(
                "dropout_p", self.dropout_p, "is not a probability.", "Pass 0 to 1."
            )
        if self.q.device.type not in ("cuda", "cpu"):
            raise ArgumentError(
                "q.device", str(self.q.device), "is neither a GPU nor a CPU.",
                "Ask about tensors on one of the two.",
            )  # fmt: skip
        heads, kv_heads = (x.shape[-3] if x.dim() > 2 else 1 for x in (self.q, self.k))
        if 1 not in (heads, kv_heads) and heads != kv_heads and not self.enable_gqa:
            raise ArgumentError(
                "enable_gqa", False, f"does not go with {heads} query heads and {kv_heads} KV "
                "heads.", "Pass enable_gqa=True.",
            )  # fmt: skip
        self._try()

    def _try(self) -> None:
        """Make the call on tensors without data: torch's choice of a backend checks less than
        the call does, and math takes whatever one of the others takes."""
        if any(x.is_nested for x in (self.q, self.k, self.v)):
            return

        def bare(x):
            return None if x is None else torch.empty(x.shape, dtype=x.dtype, device="meta")

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), record_function(ASKS):
            try:
                torch.nn.functional.scaled_dot_product_attention(
                    bare(self.q), bare(self.k), bare(self.v), bare(self.attn_mask),
                    dropout_p=self.dropout_p, is_causal=self.is_causal, scale=self.scale,
                    enable_gqa=self.enable_gqa,
                )  # fmt: skip
            except (RuntimeError, IndexError) as error:
                said = str(error).strip().splitlines()[0].rstrip(". ")
                raise ArgumentError(
                    "inputs", self.words(), f"do not go together. torch: {said}.",
                    "Use q [batch, heads, Nq, head_dim], k and v [batch, KV heads, Nk, …], and an "
                    "attn_mask, bool or of q's dtype, that broadcasts to [batch, heads, Nq, Nk].",
                ) from None  # fmt: skip

    def ask(self) -> int:
        """torch's own choice, as the index of a backend; raises RuntimeError if there is none."""
        return torch._fused_sdp_choice(
            self.q, self.k, self.v, self.attn_mask, self.dropout_p, self.is_causal,
            scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip

    def choice(self) -> str | None:
        """The backend that torch takes; None if the call would raise."""
        try:
            with _hearing():
                name = _NAMES.get(self.ask())
        except RuntimeError as error:
            if _none_available(error):
                return None
            raise
        return "flash_cpu" if name == "flash" and not self.on_gpu else name

    def order(self) -> tuple[str, ...]:
        """The backends in the order in which torch asks them."""
        if not self.on_gpu:
            return _ON_CPU
        known = getattr(torch._C, "_get_sdp_priority_order", lambda: [1, 2, 0, 3])()
        return tuple(_NAMES[index] for index in known if index in _NAMES)

    def refusals(self, name: str) -> tuple[Refusal, ...]:
        """Why this backend cannot take the call; empty if it can."""
        off = () if _enabled(name) else (Refusal("switched off", ""),)
        if name == "math":
            return off
        if not self.on_gpu and name != "flash_cpu":
            return (Refusal("runs on a GPU only", ""), *off)
        # Alone: a backend that is switched off says that and nothing else, and when none is left
        # torch gives each one's reasons.  (can_use_flash_attention and its sisters give them too,
        # but past Python's warnings, straight to the terminal.)
        with sdpa_kernel(_SWITCH[name]), _hearing() as heard:
            try:
                self.ask()
                return off
            except RuntimeError as error:
                if not _none_available(error):
                    raise
        found = [Refusal(_short(text), text) for text in _of(name, heard)]
        return (*off, *(found or [Refusal(self._unsaid())]))

    def _unsaid(self) -> str:
        """torch says nothing where it does not like a mask."""
        mask = self.attn_mask
        if mask is not None and mask.requires_grad:
            return "takes no attn_mask that needs a gradient"
        if mask is not None:
            return f"takes no attn_mask of shape {list(mask.shape)}"
        return "torch does not say why"

    def words(self) -> str:
        """The inputs in one line."""
        name = str(self.q.dtype).removeprefix("torch.")
        words = [f"q {list(self.q.shape)} {name} on {self.q.device.type}"]
        if self.k.shape != self.q.shape:
            words.append(f"k {list(self.k.shape)}")
        if self.v.shape != self.k.shape:
            words.append(f"v {list(self.v.shape)}")
        if self.is_causal:
            words.append("causal")
        if self.attn_mask is not None:
            mask = str(self.attn_mask.dtype).removeprefix("torch.")
            words.append(f"attn_mask {list(self.attn_mask.shape)} {mask}")
        if self.dropout_p:
            words.append(f"dropout {self.dropout_p:g}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v)):
            words.append("with gradients")
        return ", ".join(words)


def _none_available(error: RuntimeError) -> bool:
    """Whether torch's error says that no backend that is switched on takes the call."""
    return "No available kernel" in str(error) or "No viable backend" in str(error)


def _of(name: str, heard: Sequence[str]) -> list[str]:
    """Of all that torch said, what it said of one backend: it heads each one's reasons."""
    begins = {"efficient": "memory efficient", "flash_cpu": "flash"}.get(name, name)
    mine, lines = False, []
    for text in map(_clean, heard):
        if text.endswith("because:"):
            mine = text.lower().startswith(begins)
        elif mine:
            lines.append(text)
    return list(dict.fromkeys(lines))


def _enabled(name: str) -> bool:
    """Whether that backend is switched on."""
    asked = {"flash_cpu": "flash", "efficient": "mem_efficient"}.get(name, name)
    return getattr(flags, f"{asked}_sdp_enabled")()


def _learn_order() -> None:
    """Have torch set the card's order of priority, which it does at the first choice on a GPU.

    Else the first call would set it over the order that the caller of ``force`` asked for.
    """
    x = torch.empty(1, 1, 8, 8, device="cuda", dtype=torch.float16)
    torch._fused_sdp_choice(x, x, x)


def _refuse_at_once(backends, inputs, options) -> None:
    """Raise unless one of the backends, the only ones switched on now, takes the inputs."""
    asked = explain(*inputs, **options)
    if asked.would_run is not None:
        return
    whys = []
    for name in backends:
        name = "flash_cpu" if name == "flash" and asked.order == _ON_CPU else name
        reasons = [str(r) for r in asked.refused.get(name, ()) if r.why != "switched off"]
        whys.append(f"{name}: {', '.join(reasons) or 'runs on a CPU only'}")
    with sdpa_kernel(list(SDPA.values())):
        instead = explain(*inputs, **options).would_run
    raise _cannot(backends, "; ".join(whys), instead)


def _cannot(backends: Sequence[str], why: str, instead: str | None) -> ArgumentError:
    remedy = (
        f"Use {instead!r}, which takes them." if instead else
        "labkit.dispatch.explain(q, k, v) names the backends that take them; 'math' takes all."
    )  # fmt: skip
    return ArgumentError(
        "backends", ", ".join(backends), f"cannot take these inputs ({why}).", remedy
    )


# -- what torch says ----------------------------------------------------------------------------


@contextmanager
def _hearing() -> Iterator[list[str]]:
    """Collect what SDPA warns of in the block; other warnings pass."""
    heard: list[str] = []
    always = torch.is_warn_always_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_SAID.pattern)
        pass_on = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            if _SAID.match(str(message)):
                heard.append(str(message))
            else:
                pass_on(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        torch.set_warn_always(True)  # some reasons are given once in a process, else
        try:
            yield heard
        finally:
            torch.set_warn_always(always)


#: torch ends a warning of its own with the file it comes from; the choice of a backend is in this
_SAID = re.compile(r"(?s).*\(Triggered internally at .*sdp_utils")


def _clean(text: str) -> str:
    """Without the line of torch's source that a warning ends with."""
    return re.sub(r"\s*\(Triggered internally at .*\)\s*$", "", text, flags=re.DOTALL).strip()


_DTYPES = {
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64",
    "float": "float32", "double": "float64", "c10::Half": "float16", "c10::BFloat16": "bfloat16",
}  # fmt: skip


def _dtypes(found: re.Match) -> str:
    taken = ", ".join(_DTYPES.get(name.strip(), name.strip()) for name in found[1].split(","))
    return f"takes {taken}, not {_DTYPES.get(found[2], found[2])}"


#: torch's sentence to a few words
_SHORT: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"Expected query, key and value to all be of dtype: \{(.*?)\}.*?Query dtype: ([\w:]+)",
     _dtypes),
    (r"runtime disabled", "switched off"),
    (r"does not support non-null attn_mask", "takes no attn_mask"),
    (r"following attn mask shapes", "takes attn_mask [Nq, Nk] or [batch or 1, heads or 1, Nq, Nk]"),
    (r"do not support non-zero dropout", "has no dropout"),
    (r"dropout probability resolution", "takes dropout in steps of 1/16"),
    (r"same last dimension and to be less than or equal to (\d+).*?Query\.size\(-1\): (\d+).*?"
     r"Value\.size\(-1\): (\d+)",
     lambda m: f"takes one head_dim for q, k and v, at most {m[1]}; q has {m[2]}, v has {m[3]}"),
    (r"q,k,v to have the same last dimension.*?Query\.size\(-1\): (\d+).*?"
     r"Value\.size\(-1\): (\d+)",
     lambda m: f"takes one head_dim for q, k and v; q has {m[1]}, v has {m[2]}"),
    (r"head_dim should be no more than (\d+)", lambda m: f"takes head_dim up to {m[1]}"),
    (r"head_dim should be a multiple of (\d+)", lambda m: f"takes head_dim in steps of {m[1]}"),
    (r"last dimension of inputs to be divisible by (\d+)",
     lambda m: f"takes head_dim in steps of {m[1]}"),
    (r"does not support backward with these head dim", "has no backward pass for this head_dim"),
    (r"doesn't support training with head_dim",
     "has no backward pass for this head_dim on this card"),
    (r"is_causal flag when seqlen_q != seqlen_k",
     "takes is_causal only with as many keys as queries"),
    (r"to have the same num_heads", "takes as many KV heads as query heads"),
    (r"grouped query attention", "needs the KV heads to divide the query heads"),
    (r"to have the same batch_size", "takes one batch size for q, k and v"),
    (r"to be 4 dimensional, but got Query dim: (\d+), Key dim: (\d+), Value dim: (\d+)",
     lambda m: f"takes 4 dimensions, not {' and '.join(dict.fromkeys(m.groups()))}"),
    (r"zero seq_len", "takes no empty sequence"),
    (r"key/value sequence length 1", "takes no single key"),
    (r"query sequence length 1", "takes no single query with dropout"),
    (r"to have stride 1", "takes a last dimension without gaps (stride 1)"),
    (r"not deterministic", "is not deterministic, and torch is told to be"),
    (r"aligned to (\d+) bytes|alignment", "takes tensors that start at an aligned address"),
    (r"gpu architectures in the range \[(\w+), (\w+)\].*?sm (\d+)\s*\.\s*(\d+)",
     lambda m: f"runs on {m[1]} to {m[2]}, this card is sm{m[3]}{m[4]}"),
    (r"was not compiled with", "is not in this build of torch"),
    (r"need to be on cuda device|requires a CUDA device", "runs on a GPU only"),
    (r"larger than 65535|greater than 65535|greater than\s+(\d+)",
     "takes batch and heads up to 65535"),
)  # fmt: skip


def _short(text: str) -> str:
    """torch's sentence in a few words; its first line where it is not known."""
    for pattern, words in _SHORT:
        if found := re.search(pattern, text, flags=re.DOTALL | re.IGNORECASE):
            return words if isinstance(words, str) else words(found)
    return text.splitlines()[0][:160]
