r"""A transformer layer whose attention can be exchanged without touching its weights.

.. math::
    y &= x + \mathrm{Attention}(\mathrm{LayerNorm}(x)) \\
    \mathrm{layer}(x) &= y + \mathrm{FeedForward}(\mathrm{LayerNorm}(y))

LayerNorm stands before each part (Xiong et al. 2020), the feed-forward part is two linear maps
with an exact GELU between them, and every linear map has a bias.  There are no positions: a
causal layer tells the past from the future, and the order within the past not at all.  The
experiments measure time, bytes and error, for which positions do not matter.

With ``gate=True`` a sparse pattern and dense attention are both computed and mixed, by a weight
for each token and head that is predicted from the token itself:

.. math::
    w = \sigma(\mathrm{LayerNorm}(x)\, W_m) \in (0, 1)^{H}, \qquad
    o = w \odot o_{\text{sparse}} + (1 - w) \odot o_{\text{dense}}

It costs dense attention and the sparse one on top, whatever w is.

Taught in chapters 10 (fp32, fp16, which kernel, and who decides) and 11 (a mask saves nothing).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.layers.attention import (
    BACKENDS,
    attend,
    check_available,
    check_flex,
    check_pattern,
)
from labkit.nsa.semantics import FORCED, check_forced

__all__ = ["AttentionLayer"]

#: what weights and x may be
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: what the option ``nsa`` may hold, and what holds unless it does
NSA_OPTIONS: dict[str, Any] = {
    "block_size": 64,
    "block_counts": 16,
    "window_size": 512,
    "forced": FORCED,
    "implementation": "kernels",
}


class AttentionLayer(nn.Module):
    """Pre-norm transformer layer: ``[B, N, dim]`` → ``[B, N, dim]``.

    Parameters
    ----------
    dim : int
        features of a token.
    num_heads : int
        query heads; divides ``dim``.
    backend : str
        how attention is computed: one of ``labkit.layers.BACKENDS``.
    num_kv_heads : int
        KV heads, shared by query heads in groups; ``num_heads`` unless given.
    causal : bool
        a token sees itself and what came before.
    pattern : labkit.patterns.definitions.Pattern or str
        which keys a query sees besides; None for all.
    window : int
        short for ``pattern=labkit.patterns.Local(window)``.
    sparse : str
        ``"mask"``: every score is computed, most are hidden.  ``"blocks"``: blocks that nobody
        sees are left out.  None: what the backend has, a mask where it has both.
    gate : bool
        mix the pattern with dense attention by a predicted weight.
    ff_mult : int
        width of the feed-forward part in multiples of ``dim``.
    checkpoint : bool
        keep x only, and compute the layer again in the backward pass (Chen et al. 2016).
    nsa : dict
        options of backend ``"nsa"``: ``block_size`` 64, ``block_counts`` 16, ``window_size``
        512, ``forced`` (1, 2), ``implementation`` ``"kernels"`` or ``"reference"``.
    precision : str
        how our kernels multiply float32: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.
    device, dtype
        of the parameters.

    Raises
    ------
    ArgumentError
        naming the argument that does not fit, here or, for what depends on the input, in
        ``forward`` before anything is launched.

    Notes
    -----
    The parameters are ``norm1``, ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, ``norm2``,
    ``ff.0`` and ``ff.2`` whatever the backend is.  ``"nsa"`` has ``gates`` besides, and
    ``gate=True`` has ``mixer``.  A state dict loads strictly across all of them: where ``gates``
    or ``mixer`` are missing they stay as they are, and where they are not needed they are left.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        backend: str = "flash",
        num_kv_heads: int | None = None,
        causal: bool = True,
        pattern: Any = None,
        window: int | None = None,
        sparse: str | None = None,
        gate: bool = False,
        ff_mult: int = 4,
        checkpoint: bool = False,
        nsa: dict[str, Any] | None = None,
        precision: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_kv_heads = _check_heads(dim, num_heads, num_kv_heads)
        self.head_dim = self.dim // self.num_heads
        self.backend = check_choice("backend", backend, BACKENDS)
        self.causal, self.gate, self.checkpoint = bool(causal), bool(gate), bool(checkpoint)
        self.ff_mult = check_positive_int("ff_mult", ff_mult)
        self.pattern = _check_window(pattern, window)
        self.sparse = sparse
        self._how = check_pattern(self.backend, self.pattern, self.sparse)
        self._can_run: set[tuple] = set()
        self.precision = precision
        if precision is not None:
            check_choice("precision", precision, ("ieee", "tf32x3", "tf32"))
        self.nsa = _check_nsa(self.backend, nsa, self.causal, self.num_heads, self.num_kv_heads)
        if self.gate and self.pattern is None:
            raise ArgumentError(
                "gate", gate, "has nothing to mix: dense attention is all there is.",
                'Pass a pattern as well, or a window; backend "nsa" has gates of its own.',
            )  # fmt: skip
        _check_dtype(dtype)

        made = {"device": device, "dtype": dtype}
        kv_dim = self.num_kv_heads * self.head_dim
        self.norm1 = nn.LayerNorm(self.dim, **made)
        self.q_proj = nn.Linear(self.dim, self.dim, **made)
        self.k_proj = nn.Linear(self.dim, kv_dim, **made)
        self.v_proj = nn.Linear(self.dim, kv_dim, **made)
        self.out_proj = nn.Linear(self.dim, self.dim, **made)
        self.norm2 = nn.LayerNorm(self.dim, **made)
        self.ff = nn.Sequential(
            nn.Linear(self.dim, self.ff_mult * self.dim, **made),
            nn.GELU(),
            nn.Linear(self.ff_mult * self.dim, self.dim, **made),
        )
        # Made last: the other weights drawn from one seed are the same for every backend.
        if self.backend == "nsa":
            self.gates = nn.Linear(self.dim, 3 * self.num_heads, **made)
        if self.gate:
            self.mixer = nn.Linear(self.dim, self.num_heads, **made)
        self.register_load_state_dict_pre_hook(_fit_optional)

    # -- the layer ---------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, dim]`` → ``[B, N, dim]``.

        Raises
        ------
        ArgumentError
            if x does not fit, or the backend cannot run on it.
        """
        self._check(x)
        if self.checkpoint and torch.is_grad_enabled():
            # Nothing here draws random numbers, so there is no state of a generator to keep.
            return recompute(self._layer, x, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x)

    def _layer(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.ff(self.norm2(x))

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        """Projections, attention, and the projection back; x is normalised already."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.backend == "nsa":
            return self.out_proj(self._attend_nsa(q, k, v, x).flatten(-2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, N, head_dim], views
        how = {"backend": self.backend, "causal": self.causal, "precision": self.precision}
        o = attend(q, k, v, **how, pattern=self.pattern, sparse=self.sparse)
        if self.gate:
            w = self.mixer(x).sigmoid().transpose(1, 2).unsqueeze(-1)  # [B, heads, N, 1]
            o = w * o + (1 - w) * attend(q, k, v, **how)
        return self.out_proj(o.transpose(1, 2).flatten(-2))

    def _attend_nsa(self, q, k, v, x) -> torch.Tensor:
        """NSA of q ``[B, N, H, D]`` and k, v ``[B, N, Hkv, D]``; labkit.nsa has seq_len first."""
        # g_cmp, g_slc, g_swa: [B, N, H] each
        gates = self.gates(x).sigmoid().unflatten(-1, (3, self.num_heads)).unbind(-2)
        o = self.nsa
        # What is added up in which dtype is the algorithm's choice, and not autocast's.
        with torch.autocast(x.device.type, enabled=False):
            if o["implementation"] == "reference":
                from labkit.nsa import naive_nsa_with_compression

                return naive_nsa_with_compression(
                    q, k, v, *gates, o["block_counts"], o["block_size"], o["window_size"],
                    forced=o["forced"],
                )  # fmt: skip
            from labkit.nsa import nsa_func

            return nsa_func(
                q, k, v, *gates, block_counts=o["block_counts"], block_size=o["block_size"],
                window_size=o["window_size"], forced=o["forced"],
                precision=self.precision if q.dtype == torch.float32 else None,
            )  # fmt: skip

    # -- the same weights, computed otherwise ------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that make a layer like this one."""
        return {
            "backend": self.backend, "num_kv_heads": self.num_kv_heads, "causal": self.causal,
            "pattern": self.pattern, "sparse": self.sparse, "gate": self.gate,
            "ff_mult": self.ff_mult, "checkpoint": self.checkpoint,
            "nsa": self.nsa, "precision": self.precision,
        }  # fmt: skip

    def to_backend(self, backend: str, **changes: Any) -> AttentionLayer:
        """A new layer with a copy of these weights that computes attention by ``backend``.

        ``changes`` are other options to change, such as ``checkpoint=True``.  ``gates`` and
        ``mixer`` that this layer lacks are new; what is frozen here is frozen there.

        Raises
        ------
        ArgumentError
            as for the layer itself.
        """
        options = changed(self.options, backend, changes)
        like = self.q_proj.weight
        layer = AttentionLayer(
            self.dim, self.num_heads, **options, device=like.device, dtype=like.dtype
        )
        layer.load_state_dict(self.state_dict())
        learns = {name: p.requires_grad for name, p in self.named_parameters()}
        for name, p in layer.named_parameters():
            p.requires_grad_(learns.get(name, True))
        return layer.train(self.training)

    def extra_repr(self) -> str:
        said = [f"backend={self.backend!r}", f"num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            said.append(f"num_kv_heads={self.num_kv_heads}")
        said.append(f"causal={self.causal}")
        if self.pattern is not None:
            said.append(f"pattern={self.pattern}, sparse={self.sparse!r}, gate={self.gate}")
        if self.checkpoint:
            said.append("checkpoint=True")
        return ", ".join(said)

    # -- checks ------------------------------------------------------------------------------------

    def _check(self, x: torch.Tensor) -> None:
        """Refuse what cannot be, before anything is launched."""
        if torch.compiler.is_compiling():
            return  # not to be traced; torch checks shapes and dtypes, our operators what runs
        weight = self.q_proj.weight
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[-1] != self.dim:
            shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ArgumentError(
                "x.shape", shape, "is not what this layer attends over.",
                f"Pass [batch, seq_len, {self.dim}].",
            )  # fmt: skip
        if 0 in x.shape:
            raise ArgumentError(
                "x.shape", tuple(x.shape), "has a size of 0.",
                f"Pass [batch, seq_len, {self.dim}], each at least 1.",
            )  # fmt: skip
        if x.device != weight.device:
            raise ArgumentError(
                "x.device", str(x.device), f"is not where the weights are, {weight.device}.",
                "Move one of them with .to(device).",
            )  # fmt: skip
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        if x.dtype != weight.dtype and not (autocast and _mix(x.dtype, weight.dtype, kind)):
            remedy = "Convert x or the layer with .to(dtype)"
            if not autocast and _mix(x.dtype, weight.dtype, kind):
                remedy += ", or run under torch.autocast"
            raise ArgumentError(
                "x.dtype", _name(x.dtype), f"is not that of the weights, {_name(weight.dtype)}.",
                f"{remedy}.",
            )  # fmt: skip
        if not _is_plain(x):
            return  # fake and meta tensors are traced: nothing runs
        computes_in = weight.dtype
        if autocast and weight.dtype != torch.float64:
            computes_in = torch.get_autocast_dtype(kind)
        records = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
        asked = (self.backend, self._how, x.device, computes_in, records)
        if asked not in self._can_run:  # asking takes the host longer than a short sequence
            self._check_backend(x.device, computes_in, records)
            self._can_run.add(asked)

    def _check_backend(self, device: torch.device, dtype: torch.dtype, records: bool) -> None:
        """Refuse a backend that cannot run on such tensors."""
        if self.backend == "nsa" and self.nsa["implementation"] == "reference":
            return
        if self._how == "flex":
            check_flex(device, records, self.head_dim)
        if self._how != "flex" or self.gate:  # with a gate dense attention is computed besides
            check_available(self.backend, device, dtype, head_dim=self.head_dim)


def changed(options: dict[str, Any], backend: str, changes: dict[str, Any]) -> dict[str, Any]:
    """``options`` for another backend: what only the old one has is left."""
    options = {**options, "backend": backend, **changes}
    if "window" in changes:
        options["pattern"] = changes.get("pattern")
    if "sparse" not in changes:
        options["sparse"] = None
    if "nsa" not in changes and backend != "nsa":
        options["nsa"] = None
    return options


# -- checks, one by one ----------------------------------------------------------------------------


def _check_heads(dim: Any, num_heads: Any, num_kv_heads: Any) -> tuple[int, int, int]:
    dim = check_positive_int("dim", dim)
    num_heads = check_positive_int("num_heads", num_heads)
    if dim % num_heads:
        near = [h for h in range(1, dim + 1) if dim % h == 0]
        near = sorted(sorted(near, key=lambda h: abs(h - num_heads))[:3])
        raise ArgumentError(
            "num_heads", num_heads, f"does not divide dim = {dim}.",
            f"Use a number of heads that does, such as {', '.join(map(str, near))}.",
        )  # fmt: skip
    if num_kv_heads is None:
        return dim, num_heads, num_heads
    num_kv_heads = check_positive_int("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ArgumentError(
            "num_kv_heads", num_kv_heads, f"does not divide num_heads = {num_heads}.",
            "Use a number of KV heads that divides the number of query heads.",
        )  # fmt: skip
    return dim, num_heads, num_kv_heads


def _check_dtype(dtype: Any) -> None:
    if dtype in (None, *FLOATS):
        return
    why = "is no float dtype."
    if not isinstance(dtype, torch.dtype):
        why = f"is a {type(dtype).__name__}, not a torch.dtype."
    elif dtype.is_floating_point:
        why = "is for storage: no backend here computes in it."
    raise ArgumentError("dtype", dtype, why, f"Pass {', '.join(map(str, FLOATS))}.")


def _check_window(pattern: Any, window: Any) -> Any:
    """The pattern that ``pattern`` or ``window`` stands for, or None."""
    if pattern is None and window is None:
        return None
    from labkit.patterns import Local
    from labkit.patterns import pattern as find

    if window is None:
        return find(pattern)
    if pattern is not None:
        raise ArgumentError(
            "window", window, f"was given beside pattern = {pattern!r}.",
            "Pass one of them; window=W is short for pattern=Local(W).",
        )  # fmt: skip
    return Local(window)


def _check_nsa(
    backend: str, nsa: dict[str, Any] | None, causal: bool, num_heads: int, num_kv_heads: int
) -> dict[str, Any] | None:
    """All options of NSA, checked; None for another backend."""
    if backend != "nsa":
        if nsa is not None:
            raise ArgumentError(
                "nsa", nsa, f"holds options of another backend than {backend!r}.",
                'Leave it out, or pass backend="nsa".',
            )  # fmt: skip
        return None
    if not causal:
        raise ArgumentError(
            "causal", causal, "is not what backend 'nsa' computes: it chooses among past blocks.",
            "Pass causal=True, or another backend.",
        )  # fmt: skip
    from labkit.nsa import checks

    if nsa is not None and not isinstance(nsa, dict):
        raise ArgumentError(
            "nsa", nsa, f"is a {type(nsa).__name__}, not a dict.",
            f"Pass a dict of options, of {', '.join(NSA_OPTIONS)}.",
        )  # fmt: skip
    for name in nsa or {}:
        check_choice("nsa", name, NSA_OPTIONS)
    o = {**NSA_OPTIONS, **(nsa or {})}
    o["forced"] = check_forced(o["forced"])
    o["block_counts"] = check_positive_int("block_counts", o["block_counts"])
    o["window_size"] = checks.check_window(o["window_size"])
    check_choice("implementation", o["implementation"], ("kernels", "reference"))
    o["block_size"] = check_positive_int("block_size", o["block_size"])
    if o["implementation"] == "kernels":
        o["block_size"] = checks.check_block_size(o["block_size"])
        if num_heads // num_kv_heads > 64:
            raise ArgumentError(
                "num_kv_heads", num_kv_heads, f"leaves {num_heads // num_kv_heads} query heads to "
                "each KV head, and a tile of the kernels has room for 64.",
                "Use more KV heads.",
            )  # fmt: skip
    return o


def _fit_optional(layer, state_dict, prefix, *unused) -> None:
    """Let a state dict with or without ``gates`` and ``mixer`` fit: see the class."""
    for name in ("gates", "mixer"):
        own, start = getattr(layer, name, None), f"{prefix}{name}."
        given = [key for key in state_dict if key.startswith(start)]
        if own is None:
            for key in given:
                del state_dict[key]
        elif not given:
            state_dict.update({start + key: x for key, x in own.state_dict().items()})


def _mix(x: torch.dtype, weight: torch.dtype, kind: str) -> bool:
    """Whether autocast takes x and the weights together, which differ.

    It leaves float64 as it is, and a CPU's LayerNorm has no float32 x on half-precision weights.
    """
    if torch.float64 in (x, weight) or x not in FLOATS:
        return False
    return weight == torch.float32 or kind != "cpu"


def _is_plain(x: torch.Tensor) -> bool:
    """Whether work on ``x`` is launched: no fake tensor, no meta tensor, nobody traces."""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
