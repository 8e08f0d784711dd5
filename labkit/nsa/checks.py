"""What is checked before a branch of Native Sparse Attention allocates or launches anything.

Layout: q ``[B, M, HQ, D]``, k ``[B, N, H, D]``, v ``[B, N, H, V]``, gates ``[B, M, HQ]``,
block_indices ``[B, M, H, S]``.  Each function names the argument, the value it had, and what would
do.  Two of the checks read tensors on the host, which waits for the device: whether offsets
describe the sequences, and whether block numbers exist.  The second is left out where nobody can
wait: while a CUDA graph is captured, and for tensors without data.

Taught in chapter 13 (the kernels).
"""

from __future__ import annotations

import operator
import weakref
from itertools import pairwise
from typing import Any

import torch

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.kernels.runtime import check_can_launch
from labkit.shapes import Sizes

__all__ = [
    "check_block_counts",
    "check_block_indices",
    "check_block_size",
    "check_can_run",
    "check_compressed",
    "check_gates",
    "check_lengths",
    "check_lse",
    "check_offsets",
    "check_precision",
    "check_qkv",
    "check_tensor",
    "check_window",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_SIZES = (16, 32, 64, 128)
_MIN_WIDTH, _MAX_WIDTH, _MAX_GROUP = 16, 256, 64
_LAYOUT = "[batch, seq_len, heads, head_dim]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_tensor(name: str, x: Any, dims: int, layout: str) -> None:
    """``x`` is a tensor with that many dimensions, none of them empty."""
    if not isinstance(x, torch.Tensor):
        raise ArgumentError(name, type(x).__name__, "is not a torch tensor.", "Pass a tensor.")
    if x.dim() != dims:
        raise ArgumentError(
            f"{name}.shape", _shape(x), f"has {x.dim()} dimensions, {name} has {dims}.",
            f"Pass {layout}.",
        )  # fmt: skip
    if 0 in x.shape:
        raise ArgumentError(
            f"{name}.shape", _shape(x), "has a size of 0.", f"Pass {layout}, each at least 1."
        )


def _check_like_q(name: str, x: torch.Tensor, q: torch.Tensor, *also: torch.dtype) -> None:
    """``x`` has q's dtype, or one of ``also``, and lies where q lies."""
    if x.dtype != q.dtype and x.dtype not in also:
        raise ArgumentError(
            f"{name}.dtype", _name(x.dtype), f"differs from q's {_name(q.dtype)}.",
            f"Convert it: {name}.to(q.dtype).",
        )  # fmt: skip
    _check_device(name, x, q)


def _check_device(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.device != q.device:
        raise ArgumentError(
            f"{name}.device", str(x.device), f"differs from q's {q.device}.",
            f"Move it: {name}.to(q.device).",
        )  # fmt: skip


def _check_width(argument: str, of: str, width: int) -> None:
    if not _MIN_WIDTH <= width <= _MAX_WIDTH:
        raise ArgumentError(
            f"{argument}.shape[-1]", width, f"is a {of} the kernels are not made for.",
            f"Use {_MIN_WIDTH} to {_MAX_WIDTH}; narrower heads can be padded with zeros, others "
            "are labkit.nsa.naive_nsa's.",
        )  # fmt: skip


def check_heads(q: torch.Tensor, k: torch.Tensor, k_name: str = "k") -> None:
    """The query heads are groups around the KV heads, of 1 to 64."""
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ArgumentError(
            f"{k_name}.shape", _shape(k), f"has {kv_heads} heads, which do not divide q's {heads}.",
            "Use a number of KV heads that divides the number of query heads. "
            f"The layout is {_LAYOUT}: transpose(1, 2) if heads come first.",
        )  # fmt: skip
    if heads // kv_heads > _MAX_GROUP:
        raise ArgumentError(
            f"{k_name}.shape", _shape(k),
            f"leaves {heads // kv_heads} query heads to each KV head, and a tile has room for "
            f"{_MAX_GROUP}.",
            "Use more KV heads, or repeat each: a repeated KV head makes its own choice of blocks.",
        )  # fmt: skip


def _check_dtype(q: torch.Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ArgumentError(
            "q.dtype", _name(q.dtype), "cannot be used here.",
            f"Use one of {', '.join(map(_name, DTYPES))}; float64 is labkit.nsa.naive_nsa's.",
        )  # fmt: skip


def check_qkv(q: Any, k: Any, v: Any) -> Sizes:
    """Check the three against each other; return their sizes.

    Raises
    ------
    ArgumentError
        naming the argument, when a shape, dtype or device does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, 4, _LAYOUT)
    _check_dtype(q)
    for name, x in (("k", k), ("v", v)):
        _check_like_q(name, x, q)
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(
                f"{name}.shape", _shape(x), f"has batch {x.shape[0]}, q has {q.shape[0]}.",
                "Pass the same batch for all three.",
            )  # fmt: skip
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(
            "k.shape", _shape(k),
            f"has head_dim {k.shape[3]}, q has {q.shape[3]}: their dot product is not defined.",
            "Pass q and k of the same head_dim (only v's may differ).",
        )  # fmt: skip
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentError(
            "v.shape", _shape(v), f"does not go with k's {_shape(k)}.",
            "Pass one value per key: v.shape[:3] must equal k.shape[:3].",
        )  # fmt: skip
    check_heads(q, k)
    if q.shape[1] > k.shape[1]:
        raise ArgumentError(
            "q.shape", _shape(q),
            f"has {q.shape[1]} queries for {k.shape[1]} keys: the last query stands beside the "
            "last key, so the first would stand before any.",
            f"Pass at most as many queries as keys. The layout is {_LAYOUT}: "
            "transpose(1, 2) if heads come first.",
        )  # fmt: skip
    _check_width("q", "head_dim", q.shape[3])
    _check_width("v", "head_dim_v", v.shape[3])
    return Sizes(
        q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3],
        _name(q.dtype),
    )  # fmt: skip


def check_gates(q: torch.Tensor, **gates: Any) -> None:
    """Each gate is ``[B, M, HQ]`` in q's dtype or float32; None turns its branch off."""
    for name, gate in gates.items():
        if gate is None:
            continue
        if not isinstance(gate, torch.Tensor):
            raise ArgumentError(
                name, type(gate).__name__, "is not a torch tensor.",
                "Pass [batch, seq_len, heads], or None to turn the branch off.",
            )  # fmt: skip
        if gate.shape != q.shape[:3]:
            hint = ""
            if _shape(gate) == (*q.shape[:3], 1):
                hint = f" Here: {name}.squeeze(-1)."
            elif _shape(gate) == (q.shape[0], q.shape[2], q.shape[1]):
                hint = f" Here: {name}.transpose(1, 2)."
            raise ArgumentError(
                f"{name}.shape", _shape(gate), "is not one number per query and head.",
                f"Pass {_shape(q)[:3]}, as q's first three sizes are.{hint}",
            )  # fmt: skip
        _check_like_q(name, gate, q, torch.float32)
    if all(gate is None for gate in gates.values()):
        raise ArgumentError(
            next(iter(gates)), None, "and so are the other gates: every branch is off.",
            "Pass at least one gate.",
        )  # fmt: skip


# -- options ---------------------------------------------------------------------------------------


def check_block_size(block_size: Any) -> int:
    """``block_size`` is one that the kernels have a tile for."""
    block_size = check_positive_int("block_size", block_size)
    if block_size not in BLOCK_SIZES:
        raise ArgumentError(
            "block_size", block_size, "is not a size the kernels have a tile for.",
            f"Use one of {', '.join(map(str, BLOCK_SIZES))}; any other is labkit.nsa.naive_nsa's.",
        )  # fmt: skip
    return block_size


def check_lengths(length: Any, stride: Any, block_size: int) -> tuple[int, int]:
    """Tokens of a compressed key, and from one to the next; None is block_size, and length."""
    length = block_size if length is None else check_positive_int("length", length)
    stride = length if stride is None else check_positive_int("stride", stride)
    if stride > length:
        raise ArgumentError(
            "stride", stride,
            f"is more than the {length} tokens of a compressed key: some would be in none.",
            "Pass a stride of at most the length.",
        )  # fmt: skip
    return length, stride


def check_window(window_size: Any) -> int:
    """``window_size`` is an integer ≥ 0."""
    remedy = "Pass how many keys a query sees, its own included; 0 for none."
    try:
        number = operator.index(window_size)  # an int of NumPy or torch may be 0 as well
    except TypeError:
        number = None
    if number is None or isinstance(window_size, bool):
        kind = type(window_size).__name__
        raise ArgumentError("window_size", window_size, f"is a {kind}, not an integer.", remedy)
    if number < 0:
        raise ArgumentError("window_size", window_size, "is negative.", remedy)
    return number


def check_precision(precision: str | None, dtype: torch.dtype) -> str:
    """How float32 is multiplied: "ieee" unless said otherwise."""
    if precision is None:
        return "ieee"
    check_choice("precision", precision, ("ieee", "tf32x3", "tf32"))
    if dtype != torch.float32:
        raise ArgumentError(
            "precision", precision, f"has no meaning for {_name(dtype)}, whose products are exact.",
            "Leave it out; it chooses how float32 is multiplied.",
        )  # fmt: skip
    return precision


def check_offsets(cu: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``cu_seqlens`` as int32, and the longest sequence; reads it on the host."""
    name = "cu_seqlens"
    if not isinstance(cu, torch.Tensor):
        raise ArgumentError(name, type(cu).__name__, "is not a torch tensor.", "Pass a tensor.")
    if cu.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{name}.dtype", _name(cu.dtype), "is not an integer of 32 or 64 bits.",
            f"Convert it: {name}.to(torch.int32).",
        )  # fmt: skip
    if cu.dim() != 1 or cu.shape[0] < 2:
        raise ArgumentError(
            f"{name}.shape", _shape(cu), "is not a list of offsets.",
            "Pass [sequences + 1]: [0, len_0, len_0 + len_1, …].",
        )  # fmt: skip
    _check_device(name, cu, q)
    if q.shape[0] != 1:
        raise ArgumentError(
            "q.shape", _shape(q), "is a batch, and cu_seqlens describes one row of sequences.",
            "Lay the sequences one after another: [1, total, heads, head_dim].",
        )  # fmt: skip
    if q.shape[1] != k.shape[1]:
        raise ArgumentError(
            "q.shape", _shape(q), f"has another seq_len than k's {k.shape[1]}.",
            "With cu_seqlens every key has its query.",
        )  # fmt: skip
    offsets = cu.tolist()
    if offsets[0] != 0:
        raise ArgumentError(name, offsets[0], "is its first offset.", "Start at 0.")
    lengths = [b - a for a, b in pairwise(offsets)]
    if min(lengths) < 0:
        s = next(s for s, n in enumerate(lengths) if n < 0)
        raise ArgumentError(
            name, offsets[s : s + 2], f"decreases at sequence {s}.", "Pass cumulative lengths."
        )
    if offsets[-1] != q.shape[1]:
        what = "overruns" if offsets[-1] > q.shape[1] else "stops short of"
        raise ArgumentError(
            name, offsets[-1], f"is its last offset, which {what} the {q.shape[1]} tokens of q.",
            "End at q.shape[1].",
        )  # fmt: skip
    return cu.to(torch.int32), max(lengths)


# -- choices of blocks -----------------------------------------------------------------------------


def _can_wait(x: torch.Tensor) -> bool:
    """Whether the host may read ``x`` now."""
    if torch.compiler.is_compiling() or x.is_meta or type(x) is not torch.Tensor:
        return False
    if torch._C._len_torch_dispatch_stack() and torch._guards.detect_fake_mode([x]) is not None:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_integers(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{name}.dtype", _name(x.dtype), "is not an integer of 32 or 64 bits.",
            f"Convert it: {name}.to(torch.int32).",
        )  # fmt: skip
    _check_device(name, x, q)


def check_block_indices(
    blocks: Any, q: torch.Tensor, k: torch.Tensor, block_size: int, cu: torch.Tensor | None = None
) -> torch.Tensor:
    """``block_indices`` as int32: numbers of blocks that exist, −1 for an unused slot."""
    name = "block_indices"
    check_tensor(name, blocks, 4, "[batch, seq_len, kv_heads, slots]")
    wanted = (q.shape[0], q.shape[1], k.shape[2])
    if _shape(blocks)[:3] != wanted:
        hint = ""
        if _shape(blocks)[:3] == (wanted[0], wanted[2], wanted[1]):
            hint = f" Here: {name}.transpose(1, 2)."
        raise ArgumentError(
            f"{name}.shape", _shape(blocks), "does not hold the choice of each query and KV head.",
            f"Pass [{', '.join(map(str, wanted))}, slots]: one choice for each KV head.{hint}",
        )  # fmt: skip
    _check_integers(name, blocks, q)
    if _can_wait(blocks) and not _known(blocks, (k.shape[1], block_size), cu):
        _check_range(blocks, q, k, block_size, cu)
        _know(blocks, (k.shape[1], block_size), cu)
    return blocks.to(torch.int32)


#: the choice that was checked last: the tensor, its version, and what it was checked against
_last: tuple[weakref.ref, int, tuple] | None = None


def _known(blocks: torch.Tensor, against: tuple, cu: torch.Tensor | None) -> bool:
    """Whether these very numbers were checked last: a model's layers may share a choice, and
    waiting for the device costs a short sequence more than its kernel."""
    if _last is None or cu is not None or blocks.is_inference():
        return False
    tensor, version, checked = _last
    return tensor() is blocks and version == blocks._version and checked == against


def _know(blocks: torch.Tensor, against: tuple, cu: torch.Tensor | None) -> None:
    global _last
    if cu is None and not blocks.is_inference():
        _last = (weakref.ref(blocks), blocks._version, against)


def _check_range(blocks, q, k, block_size: int, cu: torch.Tensor | None) -> None:
    """One reduction, read once."""
    name = "block_indices"
    exist = -(-k.shape[1] // block_size)
    remedy = "Number blocks from 0 in each sequence; −1 is a slot that is not used."
    if cu is not None:
        lengths = cu.diff()
        own = torch.repeat_interleave(lengths, lengths, output_size=q.shape[1])
        # how far beyond the last block of its own sequence: at most −1 where it exists
        beyond = blocks - ((own + block_size - 1) // block_size)[None, :, None, None]
        low, high = torch.stack((blocks.amin(), beyond.amax())).tolist()
        if high >= 0:
            value = int(blocks[beyond >= 0].amax())
            raise ArgumentError(name, value, "is no block of its query's sequence.", remedy)
    else:
        low, high = torch.stack(torch.aminmax(blocks)).tolist()
        if high >= exist:
            raise ArgumentError(
                name, high,
                f"is no block: {k.shape[1]} keys make {exist} of {block_size}, 0 to {exist - 1}.",
                remedy,
            )  # fmt: skip
    if low < -1:
        raise ArgumentError(name, low, "is no block and not −1.", remedy)


def check_block_counts(counts: Any, blocks: torch.Tensor, q: torch.Tensor) -> Any:
    """``block_counts``: None, an int up to the number of slots, or an integer tensor of them."""
    name, slots = "block_counts", blocks.shape[3]
    remedy = (
        f"Pass 1 to {slots}, the slots of block_indices, or a tensor [batch, seq_len, kv_heads]."
    )
    if counts is None:
        return None
    if not isinstance(counts, torch.Tensor) or counts.dim() == 0:
        counts = check_positive_int(name, counts)
        if counts > slots:
            raise ArgumentError(
                name, counts, f"is more than the {slots} slots of block_indices.", remedy
            )
        return None if counts == slots else counts
    if counts.shape != blocks.shape[:3]:
        raise ArgumentError(
            f"{name}.shape", _shape(counts), "is not one count for each query and KV head.",
            f"Pass {_shape(blocks)[:3]}, or one int for all.",
        )  # fmt: skip
    _check_integers(name, counts, q)
    if _can_wait(counts):
        low, high = torch.stack(torch.aminmax(counts)).tolist()
        if high > slots:
            raise ArgumentError(
                name, high, f"is more than the {slots} slots of block_indices.", remedy
            )
        if low < 0:
            raise ArgumentError(name, low, "is negative.", remedy)
    return counts


# -- tensors that come from a branch ---------------------------------------------------------------


def check_compressed(k_cmp: Any, q: Any, name: str = "k_cmp") -> None:
    """q ``[B, M, HQ, D]``, and compressed keys ``[B, C, H, D]``; C may be 0."""
    check_tensor("q", q, 4, _LAYOUT)
    _check_dtype(q)
    _check_width("q", "head_dim", q.shape[3])
    short = isinstance(k_cmp, torch.Tensor) and k_cmp.dim() == 4 and k_cmp.shape[1] == 0
    if not (short and k_cmp.shape[2] > 0):  # no complete block is no mistake
        check_tensor(name, k_cmp, 4, "[batch, compressed, kv_heads, head_dim]")
    _check_like_q(name, k_cmp, q)
    if k_cmp.shape[0] != q.shape[0] or k_cmp.shape[3] != q.shape[3]:
        raise ArgumentError(
            f"{name}.shape", _shape(k_cmp), f"does not go with q's {_shape(q)}.",
            "Pass the same batch and head_dim.",
        )  # fmt: skip
    check_heads(q, k_cmp, name)


def check_lse(lse: Any, q: torch.Tensor) -> None:
    """LSE of the compression branch: ``[B, HQ, M]`` float32."""
    check_tensor("lse", lse, 3, "[batch, heads, seq_len]")
    wanted = (q.shape[0], q.shape[2], q.shape[1])
    if _shape(lse) != wanted:
        raise ArgumentError(
            "lse.shape", _shape(lse), "is not one number per head and query.",
            f"Pass {wanted}: heads come before seq_len, as nsa_compressed_attention returns it.",
        )  # fmt: skip
    if lse.dtype != torch.float32:
        raise ArgumentError(
            "lse.dtype", _name(lse.dtype), "is not float32.",
            "Pass the LSE that nsa_compressed_attention returns.",
        )  # fmt: skip
    _check_device("lse", lse, q)


def check_can_run(*tensors: torch.Tensor) -> None:
    """Whether anything here can run the kernels on these tensors."""
    how = check_can_launch("labkit.nsa", *tensors)
    if how == "interpreter" and tensors[0].dtype == torch.bfloat16:
        raise ArgumentError(
            "q.dtype", "bfloat16", "is multiplied as raw bits by Triton's interpreter.",
            "Use float16 or float32 on the CPU.",
        )  # fmt: skip
