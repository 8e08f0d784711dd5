"""Explorer of chapter 12: what one query of Native Sparse Attention reads.

The sequence lies from left to right, and each lane shows what one branch reads of it for the
query at the cursor.  How many keys that are, their bytes and their operations are those of
``labkit.nsa.model``, written as expressions.  *Which* blocks a query chooses depends on the data;
the figure spreads as many as it would choose over those that it could.
"""

from __future__ import annotations

from typing import Any

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.explorers.core import Explorer, choice
from labkit.nsa.model import Shape

__all__ = ["FORCED", "nsa_reads"]

#: which blocks every query reads: key, words, (first ones, last ones)
FORCED = {
    "first and last": ("first, previous, current", (1, 2)),
    "current": ("current only", (0, 1)),
}
_STOPS = {
    "N": [2**k * f // 2 for k in range(8, 21) for f in (2, 3)][:-1],
    "p": [0, *(2**k * f // 4 - 1 for k in range(8, 21) for f in (4, 5, 6, 7))][:-3],
    "L": [8, 16, 32, 64, 128, 256, 512],
    "S": [1, 2, 3, 4, 8, 12, 16, 24, 32, 64, 128],
    "W": [0, 16, 64, 128, 256, 512, 1024, 2048, 4096],
}
_LIMITS = {"N": (1, 2**20), "p": (0, 2**20 - 1), "L": (1, 2**16), "S": (1, 256), "W": (0, 2**20)}


def _whole(name: str, argument: str, value: int) -> dict[str, Any]:
    low, high = _LIMITS[name]
    if not (low == 0 and value == 0 and value is not False):
        check_positive_int(argument, value)
    if value > high:
        raise ArgumentError(argument, value, "is beyond the explorer.", f"Pass at most {high}.")
    return {
        "kind": "size",
        "name": name,
        "label": argument,
        "value": int(value),
        "min": low,
        "max": high,
        "stops": _STOPS[name],
    }


def nsa_reads(
    *,
    seq_len: int = 8192,
    position: int = 6000,
    block_size: int = 64,
    block_counts: int = 16,
    window_size: int = 512,
    forced: str = "first and last",
    heads: int = 64,
    kv_heads: int = 4,
    head_dim: int = 128,
    dtype: Any = "bfloat16",
) -> Explorer:
    """Blocks, window and compressed keys that one query reads, and their bytes beside dense.

    Parameters
    ----------
    seq_len, block_size, block_counts, window_size, forced : where the controls start; ``forced``
        is one of ``FORCED``.
    position : of the query, from 0; beyond the end it is the last one.
    heads, kv_heads, head_dim, dtype : fixed; bytes and operations are theirs.

    Returns
    -------
    Explorer
        quantities ``<branch>_keys``, ``<branch>_bytes`` and ``<branch>_flops`` for ``dense``,
        ``compression``, ``topk``, ``selection``, ``window`` and ``total``; ``slots``, ``forced``
        and ``ratio`` (bytes of dense over bytes of all branches).

    Raises
    ------
    ArgumentError
        for a size out of range, or an unknown ``forced`` or dtype.
    """
    check_choice("forced", forced, FORCED)
    fixed = Shape(
        seq_len=1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )  # what it refuses is refused here
    seen: dict[str, Any] = {
        "dense": ["+", "t", 1],
        "compression": ["//", ["+", "t", 1], "L"],
        "topk": "compression_keys",
        "selection": ["+", ["*", ["-", "slots", 1], "L"], ["-", ["+", "t", 1], ["*", "b", "L"]]],
        "window": ["min", "W", ["+", "t", 1]],
    }
    quantities: dict[str, Any] = {
        "t": ["min", "p", ["-", "N", 1]],
        "b": ["//", "t", "L"],
        "slots": ["min", "S", ["+", "b", 1]],
        # the local blocks come first where there are too few slots or blocks
        "local": ["min", "last", ["+", "b", 1], "S"],
        "initial": ["min", "first", ["-", ["+", "b", 1], "local"], ["-", "S", "local"]],
        "forced": ["+", "initial", "local"],
        "free": ["-", "slots", "forced"],
        "candidates": ["-", ["+", "b", 1], "forced"],
    }
    for name, keys in seen.items():
        width = "D" if name == "topk" else "DV"
        quantities[f"{name}_keys"] = keys
        quantities[f"{name}_bytes"] = ["*", f"{name}_keys", "H", width, "e"]
        quantities[f"{name}_flops"] = ["*", 2, f"{name}_keys", "HQ", width]
    branches = [name for name in seen if name != "dense"]
    for what in ("bytes", "flops"):
        quantities[f"total_{what}"] = ["+", *(f"{name}_{what}" for name in branches)]
        quantities[f"{what}_ratio"] = ["/", f"dense_{what}", f"total_{what}"]
        for name in [*branches, "total"]:
            share = f"{name}_{what}_share"
            quantities[share] = ["/", f"{name}_{what}", f"dense_{what}"]
    quantities["total_keys"] = [
        "+", "compression_keys", "selection_keys", "window_keys",
    ]  # fmt: skip
    for i in (1, 2, 3):
        quantities[f"tick_{i}"] = ["//", ["*", "N", i], 4]

    lanes = [
        {
            "label": "dense: every key",
            "note": "{dense_keys:int} keys, {dense_bytes:bytes}",
            "bars": [{"bar": "comb", "start": 0, "step": "L", "end": ["+", "t", 1], "style": "e"}],
        },
        {
            "label": "compression: block means",
            "note": "{compression_keys:int} keys, {compression_bytes:bytes}",
            "bars": [
                {"bar": "comb", "start": 0, "step": "L", "end": ["*", "compression_keys", "L"],
                 "style": "c"},
            ],
        },
        {
            "label": "selection: blocks",
            "note": "{selection_keys:int} keys, {selection_bytes:bytes}",
            "bars": [
                {"bar": "scatter", "first": "initial", "candidates": "candidates",
                 "chosen": "free", "step": "L", "seed": "t", "style": "a"},
                {"bar": "comb", "start": 0, "step": "L", "end": ["*", "initial", "L"],
                 "style": "b"},
                {"bar": "comb", "start": ["*", ["-", ["+", "b", 1], "local"], "L"], "step": "L",
                 "end": ["+", "t", 1], "style": "b"},
            ],
        },
        {
            "label": "window",
            "note": "{window_keys:int} keys, {window_bytes:bytes}",
            "bars": [
                {"bar": "comb", "start": ["-", ["+", "t", 1], "window_keys"], "step": "N",
                 "end": ["+", "t", 1], "style": "d"},
            ],
        },
    ]  # fmt: skip
    labels = {
        "compression": "compression",
        "topk": "top-k (keys again)",
        "selection": "selection",
        "window": "window",
        "total": "all branches",
    }
    rows = [["dense", "{dense_keys:int}", "{dense_bytes:bytes}", "{dense_flops:flop}", "100 %"]]
    rows += [
        [label, f"{{{name}_keys:int}}", f"{{{name}_bytes:bytes}}", f"{{{name}_flops:flop}}",
         f"{{{name}_bytes_share:percent}}"]
        for name, label in labels.items()
    ]  # fmt: skip
    return Explorer(
        {
            "title": "What does one query read?",
            "about": f"{heads} query heads over {kv_heads} KV heads of {head_dim}, {fixed.dtype}. "
            "Every query of this block reads the orange blocks; the blue ones it chose: here only "
            "their number is true, and where they lie depends on the data.",
            "controls": [
                _whole("N", "seq_len", seq_len),
                _whole("p", "query at", position),
                _whole("L", "block_size", block_size),
                _whole("S", "blocks", block_counts),
                _whole("W", "window", window_size),
                choice(
                    "forced",
                    "always read",
                    forced,
                    [
                        (key, words, {"first": first, "last": last})
                        for key, (words, (first, last)) in FORCED.items()
                    ],
                ),
            ],
            "constants": {
                "HQ": fixed.heads,
                "H": fixed.kv_heads,
                "D": fixed.head_dim,
                "DV": fixed.head_dim + fixed.v,
                "e": fixed.e,
            },
            "forms": {},
            "quantities": quantities,
            "figure": {
                "kind": "reads",
                "keys": "N",
                "query": "t",
                "label": "query {t:int}",
                "lanes": lanes,
                "ticks": [
                    ["0", 0.0, "start"],
                    ["{tick_1:int}", 0.25, "middle"],
                    ["{tick_2:int}", 0.5, "middle"],
                    ["{tick_3:int}", 0.75, "middle"],
                    ["{N:int} tokens", 1.0, "end"],
                ],
                "height": {"wide": 248, "narrow": 222},
            },
            "summary": [
                "cat",
                "Query {t:int} of {N:int} tokens",
                ["if", ["<", "t", "p"], " (the last one)", ""],
                " sees {dense_keys:int} keys. Selection reads {selection_keys:int} of them in "
                "{slots:int} blocks, {forced:int} of which every query of its block reads; the "
                "window reads {window_keys:int}, compression {compression_keys:int} means. ",
                [
                    "if",
                    ["<", "total_bytes", "dense_bytes"],
                    "Together {total_bytes:bytes}: dense attention would read {bytes_ratio:sig} "
                    "times as much.",
                    "Together {total_bytes:bytes}, and dense attention reads {dense_bytes:bytes}: "
                    "so near to the start nothing is saved.",
                ],
            ],
            "table": {
                "head": ["branch", "keys", "bytes", "operations", "bytes of dense"],
                "rows": rows,
            },
        }
    )
