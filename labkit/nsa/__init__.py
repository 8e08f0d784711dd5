"""Native Sparse Attention (Yuan et al. 2025): reference, Triton kernels, weights, a layer.

=======================  ==============================================================  =======
file                     holds                                                           chapter
=======================  ==============================================================  =======
``semantics.py``         every choice that implementations differ in, and ours           12
``reference.py``         the layer in plain PyTorch, written to be read                  12
``pooling.py``           from tokens to compressed keys and values; overlap weights      12
``model.py``             how many FLOPs and bytes each branch costs                      12, 13
``call.py``              what a call asks for                                            13
``lists.py``             who chose what: unions of neighbours, and the lists turned      13
``agreed.py``            what neighbours agree on, and what is left of the choice        13
``selection.py``         attention to chosen blocks, query by query                      13
``by_keys.py``           the loop turned around: block by block                          13
``selection_backward``   dQ, dK and dV of the selected blocks                            13
``hopper*.py``           the same by hand for Hopper, in Gluon                           13
``compression.py``       attention to compressed keys, forward and backward              13
``topk.py``              scores and the best blocks in one kernel                        13
``gates.py``             the gated sum of the branches                                   13
``ops.py``, ``api.py``   torch operators; the public functions and their checks          13
``layer.py``             a module for a transformer block, and decoding with a cache     13
``weights.py``           which keys each branch looked at, from the LSE                  14
``weights_report``       the same in a few numbers, and checked row by row               14
``half_rate.py``         even positions computed, odd ones copied                        15
``loop.py``              one query after another, as source 000 counts it                15
=======================  ==============================================================  =======

Tensors are ``[batch, seq_len, heads, head_dim]`` here, as in the sources of this part.
Importing this package loads neither torch nor Triton; the first use of a name does.
Taught in chapters 12 (reference), 13 (kernels), 14 (weights) and 15 (half rate).
"""

from __future__ import annotations

from importlib import import_module

from labkit.kernels.runtime import require_triton

_HOME = {
    "NSACache": "layer",
    "NativeSparseAttention": "layer",
    "TokenCompression": "pooling",
    "compute_attention_weights_from_lse": "weights",
    "get_attention_weights_summary": "weights_report",
    "naive_nsa": "reference",
    "naive_nsa_compression": "reference",
    "naive_nsa_compression_varlen": "reference",
    "naive_nsa_with_compression": "reference",
    "nsa_compressed_attention": "api",
    "nsa_func": "api",
    "nsa_selected_attention": "api",
    "nsa_window_attention": "api",
    "pool_mean": "pooling",
    "select_blocks": "api",
    "total_attention_weights": "weights",
    "validate_attention_weights": "weights_report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        if _HOME[name] == "api":  # the reference, the layer and the weights need torch only
            require_triton(f"labkit.nsa.{name} (labkit.nsa.naive_nsa and its family do not)")
        value = getattr(import_module(f"labkit.nsa.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'labkit.nsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
