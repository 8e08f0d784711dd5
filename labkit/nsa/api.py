r"""The functions that users call: Native Sparse Attention whole, and each of its branches alone.

.. math::
    o_t = g^{\mathrm{cmp}}_t\,\mathrm{Attn}(q_t, \tilde K, \tilde V)
        + g^{\mathrm{slc}}_t\,\mathrm{Attn}(q_t, K_{I_t}, V_{I_t})
        + g^{\mathrm{swa}}_t\,\mathrm{Attn}(q_t, K_{t-W+1:t}, V_{t-W+1:t})

(Yuan et al. 2025, equation 5.)  The first branch attends to one compressed key per block, the
second to the blocks :math:`I_t` that scored best in the first, the third to the W last keys.
``semantics.py`` says what each choice means; ``checks.py`` refuses what does not fit before
anything is launched.

Layout: q ``[B, M, HQ, D]``, k ``[B, N, H, D]``, v ``[B, N, H, V]``.  Query i stands beside key
i + N − M.  With ``cu_seqlens`` B is 1, M = N, and each sequence sees only itself.

Taught in chapter 13 (the kernels).
"""

from __future__ import annotations

from typing import Any

import torch

from labkit.errors import ArgumentError, check_positive_int
from labkit.flash import api as flash_api
from labkit.flash.ops import check_not_forward_mode
from labkit.nsa import checks, ops
from labkit.nsa.call import Call
from labkit.nsa.gates import combine
from labkit.nsa.pooling import block_bounds, compressed_bounds, pool_mean
from labkit.nsa.semantics import FORCED, check_forced
from labkit.nsa.shared_query import share
from labkit.shapes import check_scale

__all__ = [
    "attend",
    "nsa_compressed_attention",
    "nsa_func",
    "nsa_selected_attention",
    "nsa_window_attention",
    "select_blocks",
]


def nsa_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g_cmp: torch.Tensor | None,
    g_slc: torch.Tensor | None,
    g_swa: torch.Tensor | None,
    *,
    block_counts: int = 16,
    block_size: int = 64,
    window_size: int = 512,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_attn_weights: bool = False,
    forced: tuple[int, int] = FORCED,
    precision: str | None = None,
):
    """Native Sparse Attention: three branches, and their gated sum.

    Parameters
    ----------
    q : torch.Tensor
        ``[B, M, HQ, D]``; float16, bfloat16 (not in the interpreter) or float32; D from 16 to
        256.
    k, v : torch.Tensor
        ``[B, N, H, D]`` and ``[B, N, H, V]`` with N ≥ M; H divides HQ into groups of 1 to 64.
    g_cmp, g_slc, g_swa : torch.Tensor or None
        gates of compression, selection and window, ``[B, M, HQ]``, in q's dtype or float32.  Any
        numbers: a sigmoid belongs before.  None turns a branch off.
    block_counts : int
        blocks that a query reads, the forced ones among them (n in the paper).  Where fewer
        exist, it reads what there is.
    block_size : int
        tokens of a block: 16, 32, 64 or 128; also the tokens of a compressed key.
    window_size : int
        keys that the window shows, the query's own included; 0 makes that branch give 0.
    scale : float
        multiplies QKᵀ; default 1/√D.
    cu_seqlens : torch.Tensor
        ``[sequences + 1]`` int32 or int64, where each sequence starts, from 0 to M.  It is read
        on the host, which waits for the device.
    return_attn_weights : bool
        also return what the weights can be made of again (see below).
    forced : (int, int)
        how many first blocks and how many last ones, up to its own, every query reads.
    precision : str
        how float32 is multiplied; as for ``labkit.flash.flash_attention``.

    Returns
    -------
    torch.Tensor or tuple
        o ``[B, M, HQ, V]`` in q's dtype, or ``(o, weights)`` with

        - ``weights["compression"]``: ``lse`` ``[B, HQ, M]`` and ``block_indices``
          ``[B, M, H, block_counts]``, the blocks that its scores chose,
        - ``weights["selection"]``: the same two for the chosen blocks,
        - ``weights["sliding_window"]``: ``lse`` and ``window_size``,
        - ``weights["gating_weights"]``: ``g_cmp``, ``g_slc``, ``g_swa`` as they were given.

        A branch that is off has ``lse`` None; without compression and selection there are no
        ``block_indices`` either.

    Raises
    ------
    ArgumentError
        naming the argument, if shapes, dtypes, devices, sizes or options do not fit.
    DoubleBackwardError, ForwardModeError
        if a second derivative is taken, or one in forward mode.
    MissingDependencyError, NoGpuError
        if nothing here can run the kernels; ``labkit.nsa.naive_nsa_with_compression`` runs
        everywhere.

    Notes
    -----
    Differentiable once in q, k, v and the gates; the choice of blocks has no gradient.  Nothing
    of size M × (N / block_size) is stored.  The result is the same to the bit each time; where no
    gradient is wanted it may be another by rounding, for on Hopper the branches are then added up
    before they are rounded.
    """
    gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
    asked = ("nsa_func", block_counts, block_size, window_size, scale, forced, precision)
    key = _key(asked, q, k, v, g_cmp, g_slc, g_swa, cu_seqlens)
    known = _checked.get(key) if key else None
    if known is None:
        checks.check_qkv(q, k, v)
        checks.check_gates(q, **gates)
        block_size = checks.check_block_size(block_size)
        call, window = _call(
            q, k, cu_seqlens, scale=scale, precision=precision, block_size=block_size,
            block_counts=block_counts, forced=forced,
        ), checks.check_window(window_size)  # fmt: skip
        _check_runs(q, k, v)
        _remember(key, (call, window), q, k, v)
    else:
        call, window = known
    o, weights = attend(q, k, v, gates, call, window, weights=return_attn_weights)
    return (o, weights) if return_attn_weights else o


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: dict[str, torch.Tensor | None],
    call: Call,
    window: int,
    *,
    compressed: tuple[torch.Tensor, torch.Tensor] | None = None,
    weights: bool = False,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The branches whose gates are there, and their sum; arguments are not checked.

    ``compressed`` holds compressed keys and values ``[B, C, H, ·]`` where they are known already;
    otherwise they are means of blocks.
    """
    outs, found, out = {}, {}, None
    inputs = (q, k, v, *(g for g in gates.values() if g is not None))
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    q, q_slc, q_swa = share(q, 3)
    if gates["g_swa"] is not None and not graded:
        outs["g_swa"], found["lse_swa"] = _attend_window(q_swa, k, v, call, window)
    if gates["g_cmp"] is not None or gates["g_slc"] is not None:
        if compressed is None:
            cu = call.cu
            compressed = tuple(
                pool_mean(x, call.length, call.stride, cu_seqlens=cu) for x in (k, v)
            )
        o, found["lse_cmp"] = ops.attend_compressed(q, *compressed, call)
        if gates["g_cmp"] is not None:
            outs["g_cmp"] = o
        if gates["g_slc"] is not None or weights:
            found["blocks"] = ops.select(q, compressed[0], found["lse_cmp"], call)
    if gates["g_slc"] is not None:
        selected, others = (q_slc, k, v, found["blocks"], call), list(outs)
        if others and not graded:
            # Its kernel may add up all branches on its way out, so the others are there by now;
            # with gradients to come the window is not.
            added = ops.add_selected(
                *selected, [outs[n] for n in others], [gates[n] for n in ("g_slc", *others)]
            )
            out, found["lse_slc"] = added or (None, None)
        if out is None:
            outs["g_slc"], found["lse_slc"] = ops.attend_selected(*selected)
    if gates["g_swa"] is not None and graded:
        # Last, because autograd then takes it first: what it kept is given back before the
        # selection asks for its workspace.
        outs["g_swa"], found["lse_swa"] = _attend_window(q_swa, k, v, call, window)
    if out is None:
        names = [n for n in ("g_cmp", "g_slc", "g_swa") if n in outs]
        out = combine([outs[n] for n in names], [gates[n] for n in names])
    if not weights:
        return out, {}
    blocks = found.get("blocks")
    return out, {
        "compression": {"lse": found.get("lse_cmp"), "block_indices": blocks},
        "selection": {"lse": found.get("lse_slc"), "block_indices": blocks},
        "sliding_window": {"lse": found.get("lse_swa"), "window_size": window},
        "gating_weights": dict(gates),
    }


# -- the branches alone ----------------------------------------------------------------------------


def nsa_selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    block_counts: int | torch.Tensor | None = None,
    block_size: int = 64,
    *,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    precision: str | None = None,
):
    """Attention of each query to the blocks that it chose.

    Parameters
    ----------
    q, k, v, scale, cu_seqlens, precision
        as for :func:`nsa_func`.
    block_indices : torch.Tensor
        ``[B, M, H, S]`` int32 or int64: numbers of blocks, in each sequence from 0; −1 is a slot
        that is not used.  A block named twice counts once.  Keys after the query are not seen,
        even if their block is named.  The numbers are checked on the host, which waits for the
        device, but not while a CUDA graph is captured.
    block_counts : int or torch.Tensor
        use only so many of the slots, the first ones; one number or ``[B, M, H]``.  None: all.
    block_size : int
        tokens of a block: 16, 32, 64 or 128.
    return_lse : bool
        also return LSE, the natural logarithm of the sum of exponentials.

    Returns
    -------
    torch.Tensor or tuple
        o ``[B, M, HQ, V]``, or ``(o, lse)`` with lse ``[B, HQ, M]`` float32.  A query with
        nothing to read has o = 0, lse = −∞ and zero gradients.

    Raises
    ------
    ArgumentError
        as for :func:`nsa_func`, and for blocks that do not exist.
    """
    # What is in a tensor is checked each time, so there is less to remember than in nsa_func.
    key = _key(("selected", block_size, scale, precision), q, k, v, cu_seqlens)
    call = _checked.get(key) if key else None
    if call is None:
        checks.check_qkv(q, k, v)
        block_size = checks.check_block_size(block_size)
        call = _call(q, k, cu_seqlens, scale=scale, precision=precision, block_size=block_size)
        _check_runs(q, k, v)
        _remember(key, call, q, k, v)
    blocks = checks.check_block_indices(block_indices, q, k, call.block_size, call.cu)
    counts = checks.check_block_counts(block_counts, blocks, q)
    o, lse = ops.attend_selected(q, k, v, first_slots(blocks, counts), call)
    return (o, lse) if return_lse else o


def first_slots(blocks: torch.Tensor, counts: int | torch.Tensor | None) -> torch.Tensor:
    """Only the first ``counts`` slots of each choice."""
    if counts is None:
        return blocks
    if isinstance(counts, int):
        return blocks[..., :counts].contiguous()
    slot = torch.arange(blocks.shape[3], device=blocks.device)
    return torch.where(slot < counts[..., None], blocks, -1)


def nsa_compressed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int = 64,
    stride: int | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    compress: Any = None,
    return_lse: bool = False,
    precision: str | None = None,
):
    """Attention to one compressed key per block of tokens.

    Parameters
    ----------
    q, k, v, scale, cu_seqlens, precision
        as for :func:`nsa_func`.
    block_size, stride : int
        tokens of a compressed key, and from one to the next; stride is block_size unless given.
        Any positive integers.
    compress : collections.abc.Callable
        ``compress(k, v)``, or ``compress(k, v, cu_seqlens)``, gives compressed keys and values,
        as ``labkit.nsa.TokenCompression`` does; its ``length`` and ``stride`` take the place of
        the two above.  None takes means.
    return_lse : bool
        also return LSE.

    Returns
    -------
    torch.Tensor or tuple
        o ``[B, M, HQ, V]``, or ``(o, lse)`` with lse ``[B, HQ, M]`` float32.  A query that stands
        before the end of the first block has o = 0, lse = −∞ and zero gradients.

    Raises
    ------
    ArgumentError
        as for :func:`nsa_func`.
    """
    checks.check_qkv(q, k, v)
    block_size = check_positive_int("block_size", block_size)
    if compress is not None:
        block_size = getattr(compress, "length", block_size)
        stride = getattr(compress, "stride", stride)
    length, stride = checks.check_lengths(block_size, stride, block_size)
    call = _call(q, k, cu_seqlens, scale=scale, precision=precision, length=length, stride=stride)
    _check_runs(q, k, v)
    if compress is None:
        compressed = [pool_mean(x, length, stride, cu_seqlens=call.cu) for x in (k, v)]
    else:
        if not callable(compress):
            raise ArgumentError(
                "compress", compress, "cannot be called.",
                "Pass a function of (k, v), such as a labkit.nsa.TokenCompression.",
            )  # fmt: skip
        compressed = compress(k, v) if call.cu is None else compress(k, v, call.cu)
        _check_made(compressed, q, v, call)
    o, lse = ops.attend_compressed(q, *compressed, call)
    return (o, lse) if return_lse else o


def _check_made(compressed, q, v, call: Call) -> None:
    """What a caller's own pooling gave: as many keys and values as there are complete blocks."""
    if not isinstance(compressed, (tuple, list)) or len(compressed) != 2:
        raise ArgumentError(
            "compress", type(compressed).__name__, "is what it gave.",
            "Let it return a pair, compressed keys and compressed values.",
        )  # fmt: skip
    count = _complete(call)
    for x, width in zip(compressed, (q.shape[3], v.shape[3]), strict=True):
        shape = (q.shape[0], count, v.shape[2], width)
        tensor = isinstance(x, torch.Tensor)
        if not tensor or tuple(x.shape) != shape or x.dtype != q.dtype or x.device != q.device:
            value = f"{tuple(x.shape)} {x.dtype} {x.device}" if tensor else type(x).__name__
            raise ArgumentError(
                "compress", value,
                "is what it gave, not one compressed key or value per complete block.",
                f"Let it return {shape} in q's dtype, where q lies.",
            )  # fmt: skip


def _complete(call: Call) -> int:
    """Compressed keys of all sequences together: kernels rely on it, and read no others."""
    return call.compressed if call.cu is None else int(call.cu_cmp[-1])


def nsa_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    precision: str | None = None,
):
    """Attention of each query to the last ``window_size`` keys, its own included.

    Parameters
    ----------
    q, k, v, window_size, scale, cu_seqlens, precision
        as for :func:`nsa_func`; the kernels are ``labkit.flash``'s.
    return_lse : bool
        also return LSE.

    Returns
    -------
    torch.Tensor or tuple
        o ``[B, M, HQ, V]``, or ``(o, lse)`` with lse ``[B, HQ, M]`` float32; 0 and −∞ for a
        window of 0.

    Raises
    ------
    ArgumentError
        as for :func:`nsa_func`.
    """
    checks.check_qkv(q, k, v)
    window = checks.check_window(window_size)
    call = _call(q, k, cu_seqlens, scale=scale, precision=precision)
    _check_runs(q, k, v)
    o, lse = _attend_window(q, k, v, call, window)
    if window == 0:  # one number, seen many times: a caller may want to write
        o, lse = o.contiguous(), lse.contiguous()
    return (o, lse) if return_lse else o


class _Nothing(torch.autograd.Function):
    """What a window of 0 gives: zeros that take no memory, LSE −∞, and gradients of 0."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        b, m, hq, _ = q.shape
        lse = q.new_full((), float("-inf"), dtype=torch.float32).expand(b, hq, m)
        return q.new_zeros(()).expand(b, m, hq, v.shape[3]), lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


def _attend_window(q, k, v, call: Call, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The window branch: ``labkit.flash`` on views of the same memory."""
    if not torch.compiler.is_compiling():
        check_not_forward_mode(q, k, v, what="labkit.nsa", instead=ops.INSTEAD)
    if window == 0:
        return _Nothing.apply(q, k, v)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = flash_api._run(
        *heads_first, call.cu, call.cu, call.max_q, call.max_k, True, call.scale, window,
        call.precision, True,
    )  # fmt: skip
    return o.transpose(1, 2), lse


def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_counts: int = 16,
    block_size: int = 64,
    length: int | None = None,
    stride: int | None = None,
    forced: tuple[int, int] = FORCED,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_len: int | None = None,
    precision: str | None = None,
) -> torch.Tensor:
    """Which blocks each query reads: the forced ones, and those that scored best.

    A block's importance is the probability that the group's heads give to the compressed keys
    that overlap it (equations 9 and 10 of the paper).  Scores and choice are one kernel.

    Parameters
    ----------
    q : torch.Tensor
        ``[B, M, HQ, D]``.
    k_cmp : torch.Tensor
        ``[B, C, H, D]`` compressed keys; with cu_seqlens ``[1, ΣC, H, D]``.
    lse : torch.Tensor
        ``[B, HQ, M]`` float32, of :func:`nsa_compressed_attention` on the same.
    block_counts, block_size, forced, scale, cu_seqlens, precision
        as for :func:`nsa_func`.
    length, stride : int
        tokens of a compressed key and from one to the next; block_size unless given.
    seq_len : int
        how many keys there are; M unless given.  In decoding there are more than queries.

    Returns
    -------
    torch.Tensor
        ``[B, M, H, block_counts]`` int32: ascending, then −1 in slots that are left.  Of blocks
        that are equally important the lower number is taken.

    Raises
    ------
    ArgumentError
        naming the argument that does not fit.
    """
    checks.check_compressed(k_cmp, q)
    checks.check_lse(lse, q)
    block_size = checks.check_block_size(block_size)
    length, stride = checks.check_lengths(length, stride, block_size)
    n = q.shape[1] if seq_len is None else check_positive_int("seq_len", seq_len)
    if n < q.shape[1]:
        raise ArgumentError(
            "seq_len", n, f"is less than q's {q.shape[1]} queries.",
            "Pass the number of keys; the last query stands beside the last key.",
        )  # fmt: skip
    if cu_seqlens is not None and n != q.shape[1]:
        raise ArgumentError(
            "seq_len", n, f"is not q's {q.shape[1]}, and with cu_seqlens every key has its query.",
            "Leave it out.",
        )  # fmt: skip
    call = _call(
        q, q, cu_seqlens, scale=scale, precision=precision, block_size=block_size, length=length,
        stride=stride, block_counts=block_counts, forced=forced, seq_len=n,
    )  # fmt: skip
    if k_cmp.shape[1] != (count := _complete(call)):
        raise ArgumentError(
            "k_cmp.shape", tuple(k_cmp.shape),
            f"has {k_cmp.shape[1]} compressed keys; {n} tokens make {count} of {length}, "
            f"one every {stride}" + ("." if cu_seqlens is None else " within their sequences."),
            "Pass what pool_mean(k, length, stride, cu_seqlens=…) gives; seq_len, if there are "
            "fewer queries than keys.",
        )  # fmt: skip
    _check_runs(q, k_cmp, lse)
    return ops.select(q, k_cmp, lse, call)


# -- checks, once for each kind of call ------------------------------------------------------------


def _call(
    q, k, cu_seqlens, *, scale, precision, block_size=64, length=None, stride=None,
    block_counts=1, forced=FORCED, seq_len=None,
) -> Call:  # fmt: skip
    """Checked options, and where sequences, their blocks and compressed keys start."""
    length = block_size if length is None else length
    stride = length if stride is None else stride
    if isinstance(block_counts, torch.Tensor) and block_counts.dim() > 0:
        raise ArgumentError(
            "block_counts.shape", tuple(block_counts.shape), "is not one number for all queries.",
            "Pass an int; labkit.nsa.nsa_selected_attention takes a count for each query.",
        )  # fmt: skip
    initial, local = check_forced(forced)
    how: dict[str, Any] = {
        "scale": check_scale(scale, q.shape[3]),
        "precision": checks.check_precision(precision, q.dtype),
        "block_size": block_size, "length": length, "stride": stride,
        "count": check_positive_int("block_counts", block_counts),
        "initial": initial, "local": local,
        "max_q": q.shape[1], "max_k": k.shape[1] if seq_len is None else seq_len,
    }  # fmt: skip
    if cu_seqlens is not None:
        how["cu"], longest = checks.check_offsets(cu_seqlens, q, k)
        how["max_q"] = how["max_k"] = longest
        how["cu_cmp"] = compressed_bounds(how["cu"], length, stride)
        how["cu_blocks"] = block_bounds(how["cu"], block_size)
    return Call(**how)


_checked: dict[tuple, Any] = {}


def _key(asked: tuple, *tensors: Any) -> tuple | None:
    """What the checks of a call depend on, None if they must be made: a short call is mostly host
    time.  Offsets are read each time."""
    if tensors[-1] is not None or torch.compiler.is_compiling():
        return None
    if any(isinstance(x, torch.Tensor) for x in asked):
        return None  # a number in a tensor may be another one next time
    try:
        faces = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in tensors[:-1])
        # 1, 1.0 and True are equal and have one hash
        kinds = tuple(tuple(map(type, x)) if type(x) is tuple else type(x) for x in asked)
        key = (faces, asked, kinds)
        hash(key)
    except (AttributeError, TypeError):  # not tensors, or an option that cannot be hashed
        return None
    return key


def _remember(key: tuple | None, value: Any, *tensors: torch.Tensor) -> None:
    if key is not None and ops.nobody_listens(*tensors):
        if len(_checked) > 4096:
            _checked.clear()
        _checked[key] = value


def _check_runs(*tensors: torch.Tensor) -> None:
    if ops.nobody_listens(*tensors):  # nothing is launched on fake or meta tensors
        checks.check_can_run(*tensors)
