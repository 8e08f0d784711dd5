r"""The patterns: which query sees which key, as arithmetic on their positions.

A pattern is a predicate.  ``allowed(i, j)`` says whether the query at position i sees the key at
position j, for numbers and for tensors of positions.  Nothing else of it is stored, so the same
predicate fills a matrix, sorts blocks, and runs inside a kernel:

.. math::
    \text{Local}(W) &: |i - j| < W \\
    \text{Strided}(s, W) &: |i - j| < W \;\text{ or }\; s \mid i - j \\
    \text{Random}(r) &: j = i \;\text{ or }\; j \text{ is one of } r \text{ draws of } i \\
    \text{Clustered}(c) &: \text{cluster}(i) = \text{cluster}(j) \\
    \text{Hierarchical}(W, L) &: |i - j| < W \;\text{ or }\;
        2^{l-1} W \le |i - j| < 2^l W,\; 2^l \mid j,\; 1 \le l \le L

Whether the future is hidden as well (``causal``) is asked where a pattern is used.  Query number
t of Nq stands at position t + Nk − Nq: the last query stands beside the last key.  Each pattern
lets a query see the key at its own position.

The strided pattern is the Sparse Transformer's (Child et al. 2019), random keys beside a query's
own are BigBird's (Zaheer et al. 2020), attention within clusters is the Routing Transformer's
(Roy et al. 2021), and keys that get fewer with the distance are the LogSparse Transformer's
(Li et al. 2019).

The draws come from a hash of the positions, in 32-bit integers that do not overflow: a predicate
that a kernel evaluates can hold no state, and has to give the same everywhere.

Loads torch only for an explicit assignment to clusters and a new order of tokens.  Taught in
chapter 11 (a mask saves nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral
from typing import Any, ClassVar

from labkit.errors import ArgumentError, check_choice, check_positive_int

__all__ = [
    "PATTERNS",
    "Blocked",
    "Clustered",
    "Hierarchical",
    "Local",
    "Pattern",
    "Random",
    "Reordered",
    "Strided",
    "pattern",
]

# A prime below 2^15 with remainder 2 by 3: then x → x³ permutes the numbers below it, and no
# product of two of them leaves 31 bits.
_PRIME = 32717


def _mix(x: Any) -> Any:
    """A permutation of 0 … _PRIME − 1 that is not linear."""
    return x * x % _PRIME * x % _PRIME


def _hash(i: Any, j: Any, seed: int) -> Any:
    """Below 2^30, from two positions ≥ 0 and a seed: two mixes of the pair, side by side."""
    a, b = seed % _PRIME, (seed // _PRIME) % _PRIME
    # i // _PRIME: so that the draws do not repeat themselves after _PRIME positions
    x = _mix((i % _PRIME * 25717 + (i // _PRIME) * 8123 + a + 1) % _PRIME)
    high = _mix((x + j % _PRIME * 12553 + b) % _PRIME)
    low = _mix((x * 31 + j % _PRIME * 7919 + (j // _PRIME) * 101 + a + 17) % _PRIME)
    return high * _PRIME + low


class Pattern:
    """Base of all patterns; one of your own defines ``allowed``.

    Attributes
    ----------
    name : what ``labkit.patterns.pattern`` and error messages call it.
    sees_own : whether every query is known to see the key at its own position.
    """

    name: ClassVar[str] = "pattern"
    sees_own: ClassVar[bool] = False

    def allowed(self, i: Any, j: Any, keys: int | None = None) -> Any:
        """Whether the query at position i sees the key at position j.

        Parameters
        ----------
        i, j : int or torch.Tensor
            positions, broadcast against each other.  Use arithmetic, comparisons and ``&``, ``|``
            only: FlexAttention compiles this into its kernel.
        keys : int
            how many keys there are; ``Random`` and ``Clustered`` need to know.

        Returns
        -------
        bool or torch.Tensor
        """
        raise NotImplementedError(f"{type(self).__name__} does not define allowed(i, j, keys)")

    def predicate(self, keys: int, device: Any = None) -> Callable[[Any, Any], Any]:
        """``allowed`` for so many keys, as a function of i and j with its tables on ``device``."""
        return lambda i, j: self.allowed(i, j, keys)

    def in_blocks(self, block: int) -> Blocked:
        """The same pattern drawn on a grid of ``block`` × ``block`` squares; see ``Blocked``."""
        return Blocked(self, block)

    def ahead(self, keys: int, device: Any = None) -> Callable[[Any, Any], Any]:
        """What ``causal`` hides: whether the key at j lies ahead of the query at i."""
        return lambda i, j: j > i

    def order(self, seq_len: int) -> tuple[int, ...] | None:
        """An order of the tokens that brings together what sees each other; None if unknown."""
        return None

    def reordered(self, seq_len: int) -> Reordered:
        """The same pattern over tokens in that order: as many scores, in fewer blocks.

        Raises
        ------
        ArgumentError
            if there is no such order.
        """
        tokens = self.order(seq_len)
        if tokens is None:
            raise ArgumentError(
                "pattern", self, "has no order of its tokens that brings its scores together.",
                "Draw it on a grid of blocks: pattern.in_blocks(128).",
            )  # fmt: skip
        return Reordered(self, tokens)

    # -- what it looks like, and what it costs ---------------------------------------------------

    def dense_mask(
        self, seq_len_q: int, seq_len_k: int | None = None, causal: bool = False, device: Any = None
    ) -> Any:
        """The pattern as a matrix, ``[seq_len_q, seq_len_k]`` bool: True where a key is seen.

        This is the polarity of ``scaled_dot_product_attention``.  It takes one byte per score.
        """
        from labkit.patterns.masks import dense_mask

        return dense_mask(self, seq_len_q, seq_len_k, causal=causal, device=device)

    def blocks(
        self,
        seq_len_q: int,
        block: int = 128,
        causal: bool = False,
        *,
        seq_len_k: int | None = None,
        device: Any = None,
    ) -> Any:
        """Each square of ``block`` × ``block`` scores: 0 empty, 1 partial, 2 full.

        Returns
        -------
        torch.Tensor
            ``[⌈Nq/block⌉, ⌈Nk/block⌉]`` int8.  At the edges those scores count that exist.
        """
        from labkit.patterns.masks import blocks

        return blocks(self, seq_len_q, block, causal=causal, seq_len_k=seq_len_k, device=device)

    def block_mask(
        self,
        seq_len_q: int,
        seq_len_k: int | None = None,
        causal: bool = False,
        device: Any = None,
        block: int = 128,
    ) -> Any:
        """FlexAttention's ``BlockMask`` of this pattern."""
        from labkit.patterns.masks import block_mask

        return block_mask(self, seq_len_q, seq_len_k, causal=causal, device=device, block=block)

    def statistics(self, seq_len: int, **options: Any) -> Any:
        """Density, FLOPs and bytes: ``labkit.patterns.costs.statistics``."""
        from labkit.patterns.costs import statistics

        return statistics(self, seq_len, **options)


@dataclass(frozen=True)
class Local(Pattern):
    """Keys nearer than ``window``: causal, the last ``window`` keys, the own one included.

    The same as ``window`` of ``labkit.flash.flash_attention``.
    """

    window: int = 256
    name: ClassVar[str] = "local"
    sees_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, window=check_positive_int("window", self.window))

    def allowed(self, i, j, keys=None):
        return abs(i - j) < self.window


@dataclass(frozen=True)
class Strided(Pattern):
    """Every ``stride``-th key, counted from the query, and the keys nearer than ``window``."""

    stride: int = 64
    window: int = 1
    name: ClassVar[str] = "strided"
    sees_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, stride=check_positive_int("stride", self.stride))
        _set(self, window=check_positive_int("window", self.window))

    def allowed(self, i, j, keys=None):
        strided = (i - j) % self.stride == 0
        return strided if self.window == 1 else strided | (abs(i - j) < self.window)

    def order(self, seq_len):
        """Tokens of one remainder together: without a window they see each other only."""
        if self.window > 1:
            return None
        return tuple(t for first in range(self.stride) for t in range(first, seq_len, self.stride))


@dataclass(frozen=True)
class Random(Pattern):
    """``per_row`` keys at random for each query, and its own.

    The keys are cut into ``per_row`` stretches of equal length, and each query draws one key of
    each: so the draws are all different, and every key is as likely as another.  They are drawn
    from all keys; ``causal`` then hides those that lie ahead, and an early query is left with
    few.  All heads draw the same.
    """

    per_row: int = 64
    seed: int = 0
    name: ClassVar[str] = "random"
    sees_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, per_row=check_positive_int("per_row", self.per_row))
        _set(self, seed=_check_seed(self.seed))

    def allowed(self, i, j, keys=None):
        keys = _check_keys(keys, self)
        draws = min(self.per_row, keys)
        if keys * draws >= 2**31:
            raise ArgumentError(
                "per_row", self.per_row, f"times {keys} keys leaves 32 bits.",
                "Use fewer draws, or a grid of blocks: Random(…).in_blocks(128).",
            )  # fmt: skip
        stretch = j * draws // keys
        first = (stretch * keys + draws - 1) // draws
        length = (stretch * keys + keys + draws - 1) // draws - first
        # A query before the first key has a negative position; what it draws is of no account.
        drawn = first + _hash(abs(i), stretch, self.seed) % length
        return (j == drawn) | (j == i)


@dataclass(frozen=True)
class Clustered(Pattern):
    """Keys of the query's own cluster.

    Parameters
    ----------
    clusters : how many; tokens are then assigned at random, by ``seed``.
    assignment : or the cluster of each token, a list or tensor of integers, one per key.  The
        clusters of a model come from its content, for example as the nearest of some centres.
    """

    clusters: int = 16
    assignment: tuple[int, ...] | None = None
    seed: int = 0
    name: ClassVar[str] = "clustered"
    sees_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, clusters=check_positive_int("clusters", self.clusters))
        _set(self, seed=_check_seed(self.seed))
        if self.assignment is not None:
            given = getattr(self.assignment, "tolist", lambda: self.assignment)()
            chosen = tuple(given) if isinstance(given, Iterable) else ()
            if not chosen or not all(
                isinstance(c, Integral) and not isinstance(c, bool) and -(2**31) <= c < 2**31
                for c in chosen
            ):
                raise ArgumentError(
                    "assignment", _short(chosen) if chosen else given, "is not a list of clusters.",
                    "Pass one integer for each key, of 32 bits.",
                )  # fmt: skip
            chosen = tuple(int(c) for c in chosen)
            _set(self, assignment=chosen, clusters=len(set(chosen)))

    def __hash__(self) -> int:
        return hash((self.clusters, self.seed, len(self.assignment or ())))

    def predicate(self, keys, device=None):
        if self.assignment is None:
            return lambda i, j: self.allowed(i, j, keys)
        self._check_length(keys)
        table = _table(self.assignment, str(device or "cpu"))
        # Negative positions stand before the first key: they are nobody's.
        return lambda i, j: (table[i.clamp(0, keys - 1)] == table[j.clamp(0, keys - 1)]) & (i >= 0)

    def allowed(self, i, j, keys=None):
        keys = _check_keys(keys, self)
        if self.assignment is None:
            clusters = [_hash(abs(x), 0, self.seed) % self.clusters for x in (i, j)]
            return (clusters[0] == clusters[1]) & (i >= 0)
        import torch

        tensors = [x for x in (i, j) if isinstance(x, torch.Tensor)]
        device = tensors[0].device if tensors else "cpu"
        i, j = (torch.as_tensor(x, device=device) for x in (i, j))
        answer = self.predicate(keys, device)(i, j)
        return answer if tensors else bool(answer)

    def order(self, seq_len):
        """Tokens of one cluster together, in their order."""
        if self.assignment is not None:
            self._check_length(seq_len)
            cluster = self.assignment.__getitem__
        else:

            def cluster(t):
                return _hash(t, 0, self.seed) % self.clusters

        return tuple(sorted(range(seq_len), key=cluster))

    def _check_length(self, keys: int) -> None:
        if len(self.assignment) != keys:
            raise ArgumentError(
                "assignment", _short(self.assignment),
                f"assigns {len(self.assignment)} tokens, and there are {keys} keys.",
                "Pass one cluster for each key.",
            )  # fmt: skip


@dataclass(frozen=True)
class Hierarchical(Pattern):
    """All keys near by, and fewer the further away: each level doubles reach and spacing.

    Level l = 1 … ``levels`` holds the distances from 2^(l−1) · ``window`` to 2^l · ``window``, and
    of them the keys whose position 2^l divides.  Each level adds window / 2 keys to a row (on
    either side), so a row's keys grow with the logarithm of how far it sees.
    """

    window: int = 64
    levels: int = 4
    name: ClassVar[str] = "hierarchical"
    sees_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, window=check_positive_int("window", self.window))
        _set(self, levels=check_positive_int("levels", self.levels))
        if self.window << self.levels >= 2**31:
            raise ArgumentError(
                "levels", self.levels, f"of a window of {self.window} reach beyond 32 bits.",
                "Use fewer levels: each doubles the reach.",
            )  # fmt: skip

    def allowed(self, i, j, keys=None):
        distance = abs(i - j)
        seen = distance < self.window
        for level in range(1, self.levels + 1):
            near, far = self.window << (level - 1), self.window << level
            seen = seen | ((distance >= near) & (distance < far) & (j % (1 << level) == 0))
        return seen


@dataclass(frozen=True)
class Blocked(Pattern):
    """A pattern whose positions are blocks of tokens: what hardware can leave out.

    ``Blocked(Random(4), 128)`` draws four blocks of 128 keys for each block of 128 queries; the
    numbers of the inner pattern (window, stride, draws) count blocks.  A block is seen whole or
    not at all, but for the future that ``causal`` hides.
    """

    inner: Pattern
    block: int = 128
    name: ClassVar[str] = "blocked"

    def __post_init__(self) -> None:
        _check_inner(self.inner)
        _set(self, block=check_positive_int("block", self.block))

    @property
    def sees_own(self) -> bool:
        return self.inner.sees_own

    def allowed(self, i, j, keys=None):
        keys = None if keys is None else -(-keys // self.block)
        return self.inner.allowed(i // self.block, j // self.block, keys)

    def predicate(self, keys, device=None):
        inner = self.inner.predicate(-(-keys // self.block), device)
        return lambda i, j: inner(i // self.block, j // self.block)


@dataclass(frozen=True)
class Reordered(Pattern):
    """A pattern over tokens that lie in another order; ``tokens[place]`` is who stands there.

    Who sees whom stays: i and j are places here, and the inner pattern and ``causal`` are asked
    about the tokens that stand there.

    Raises
    ------
    ArgumentError
        if ``inner`` is no pattern, or ``tokens`` does not name each of 0 … N − 1 once.
    """

    inner: Pattern
    tokens: tuple[int, ...]
    name: ClassVar[str] = "reordered"

    def __post_init__(self) -> None:
        _check_inner(self.inner)
        given = getattr(self.tokens, "tolist", lambda: self.tokens)()
        tokens = tuple(given) if isinstance(given, Iterable) else ()
        numbers = all(isinstance(t, Integral) and not isinstance(t, bool) for t in tokens)
        if not tokens or not numbers or sorted(tokens) != list(range(len(tokens))):
            raise ArgumentError(
                "tokens", _short(tokens) if tokens else given, "is not an order of tokens.",
                "Name each of 0 … N − 1 once, or use pattern.reordered(seq_len).",
            )  # fmt: skip
        _set(self, tokens=tuple(int(t) for t in tokens))

    @property
    def sees_own(self) -> bool:
        return self.inner.sees_own

    def __hash__(self) -> int:
        return hash((self.inner, len(self.tokens)))  # on each call: not over all tokens

    def _at(self, keys: int, device: Any) -> Callable[[Any], Any]:
        if keys != len(self.tokens):
            raise ArgumentError(
                "tokens", _short(self.tokens), f"orders {len(self.tokens)} tokens, of {keys}.",
                "Reorder the pattern for this length: pattern.reordered(seq_len).",
            )  # fmt: skip
        table = _table(self.tokens, str(device or "cpu"))
        return lambda place: table[place.clamp(0, keys - 1)]

    def predicate(self, keys, device=None):
        at, inner = self._at(keys, device), self.inner.predicate(keys, device)
        return lambda i, j: inner(at(i), at(j))

    def __repr__(self) -> str:
        return f"Reordered({self.inner!r}, {len(self.tokens)} tokens)"  # thousands, spelt out

    def allowed(self, i, j, keys=None):
        import torch

        tensors = [x for x in (i, j) if isinstance(x, torch.Tensor)]
        device = tensors[0].device if tensors else "cpu"
        i, j = (torch.as_tensor(x, device=device) for x in (i, j))
        answer = self.predicate(len(self.tokens) if keys is None else keys, device)(i, j)
        return answer if tensors else bool(answer)

    def ahead(self, keys, device=None):
        at = self._at(keys, device)
        return lambda i, j: at(j) > at(i)


#: name → class, with defaults for every parameter
PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls for cls in (Local, Strided, Random, Clustered, Hierarchical)
}


def pattern(which: Pattern | str) -> Pattern:
    """The pattern of that name with its default parameters; a pattern is returned as it is.

    Raises
    ------
    ArgumentError
        if it is neither; the message lists the known names.
    """
    if isinstance(which, Pattern):
        if type(which).__hash__ is None:
            raise ArgumentError(
                "pattern", which, "has no hash: what is made of it could not be found again.",
                "Make its class a frozen dataclass: @dataclass(frozen=True).",
            )  # fmt: skip
        return which
    if not isinstance(which, str):
        raise ArgumentError(
            "pattern", which, f"is a {type(which).__name__}.",
            f"Pass a pattern such as labkit.patterns.Local(256), or a name: {', '.join(PATTERNS)}.",
        )  # fmt: skip
    return PATTERNS[check_choice("pattern", which, PATTERNS)]()


# -- checks ------------------------------------------------------------------------------------


def _set(self: Any, **values: Any) -> None:
    known = {f.name for f in fields(self)}
    for name, value in values.items():
        assert name in known
        object.__setattr__(self, name, value)


def _check_inner(inner: Any) -> None:
    if not isinstance(inner, Pattern):
        raise ArgumentError(
            "inner", inner, "is not a pattern.", "Pass an object such as Random(4)."
        )  # fmt: skip


def _check_seed(seed: Any) -> int:
    return 0 if seed == 0 and not isinstance(seed, bool) else check_positive_int("seed", seed)


def _check_keys(keys: int | None, which: Pattern) -> int:
    if keys is None:
        raise ArgumentError(
            "keys", None, f"is needed: {which.name} depends on how many keys there are.",
            "Call allowed(i, j, keys).",
        )  # fmt: skip
    return check_positive_int("keys", keys)


def _short(values: tuple) -> str:
    return str(values) if len(values) <= 8 else f"({', '.join(map(str, values[:8]))}, …)"


def _table(assignment: tuple[int, ...], device: str) -> Any:
    return (_kept_table if lasting() else _new_table)(assignment, device)


@lru_cache(maxsize=32)
def _kept_table(assignment: tuple[int, ...], device: str) -> Any:
    import torch

    with torch.inference_mode(False):  # a later backward pass has to be able to save it
        return _new_table(assignment, device)


def _new_table(assignment: tuple[int, ...], device: str) -> Any:
    import torch

    return torch.tensor(assignment, dtype=torch.int32, device=device)


def lasting() -> bool:
    """Whether a tensor that is made now may be kept: it has data, and no transformation owns it.

    Made under FakeTensorMode it is fake, and under ``torch.func.grad`` it is a wrapper that is
    nothing once the gradient is there; while ``torch.compile`` traces it is part of a graph.
    """
    import torch

    if torch.compiler.is_dynamo_compiling():
        return False
    one = torch.empty(0)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(one)
    return type(one) is torch.Tensor and not one.is_meta and not wrapped
