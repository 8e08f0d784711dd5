"""A tape without data: forward and backward of a network, as tensors that are made and freed.

Autograd keeps what the backward pass will ask for, runs the operators again in reverse order,
and adds gradients where they meet.  Here the same rules run on sizes instead of tensors: a buffer
has a size in symbols, a part of the budget that it belongs to, and a count of who holds it.  When
nobody does it is freed, as in torch.  What results is every *moment* at which something is made:
how many buffers of each part and size are alive just then.

A size is a product, written as its factors: ``"T C e"`` is batch · seq_len · dim · bytes per
element.  Whoever asks for bytes or forms says what the symbols are.

Imports: nothing.  No torch.  Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["PARTS", "Buffer", "Moment", "Tape", "Tensor"]

#: the parts of a budget, in the order in which they are shown
PARTS = ("weights", "gradients", "optimizer", "activations", "scores", "workspace")


class Buffer:
    """Bytes that live as long as somebody holds them."""

    __slots__ = ("name", "part", "refs", "size")

    def __init__(self, name: str, size: str, part: str) -> None:
        self.name, self.size, self.part, self.refs = name, size, part, 0


class Tensor:
    """A buffer and what is known of it: bytes per element, whether a gradient is asked for."""

    __slots__ = ("buffer", "grad", "item")

    def __init__(self, buffer: Buffer, item: str, grad: bool) -> None:
        self.buffer, self.item, self.grad = buffer, item, grad


@dataclass(frozen=True)
class Moment:
    """What is alive when something has just been made.

    ``where`` is ``(phase, layer, count)``; ``alive`` says how many buffers of each part and size
    there are.
    """

    where: tuple[str, int, int]
    name: str
    alive: dict[tuple[str, str], int]


@dataclass
class _Node:
    inputs: Sequence[Tensor]
    output: Tensor
    saved: list[Buffer]
    run: Callable[[Buffer], Sequence[Buffer | None]]
    where: tuple[str, int]
    #: whether ``run`` lets go of the gradient that it is given
    consumes: bool


class Tape:
    """Buffers alive, moments noted, and the nodes that a backward pass will visit.

    Parameters
    ----------
    records : whether autograd records: saved tensors are held and nodes are kept.
    in_place : whether two gradients that meet are added in place, as torch does with real
        tensors; on fake ones it makes a third (``labkit.memory.tracing``).
    """

    def __init__(self, *, records: bool, in_place: bool = True) -> None:
        self.records, self.in_place = records, in_place
        self.alive: dict[tuple[str, str], int] = {}
        self.moments: list[Moment] = []
        self.nodes: list[_Node] = []
        self.phase, self.layer, self._counts = "", 0, {}
        self._running: _Node | None = None

    # -- buffers -----------------------------------------------------------------------
    def at(self, phase: str, layer: int = 0) -> None:
        """What is noted from here on belongs to this phase and layer."""
        self.phase, self.layer = phase, layer

    def make(self, name: str, size: str, part: str = "workspace") -> Buffer:
        """A new buffer, held once by its maker; size ``""`` is none at all."""
        buffer = Buffer(name, size, part)
        buffer.refs = 1
        if not size:
            return buffer
        self._count(buffer, +1)
        place = (self.phase, self.layer)
        self._counts[place] = count = self._counts.get(place, 0) + 1
        self.moments.append(Moment((*place, count), name, dict(self.alive)))
        return buffer

    def _count(self, buffer: Buffer, change: int) -> None:
        if not buffer.size:
            return
        key = (buffer.part, buffer.size)
        left = self.alive.get(key, 0) + change
        if left:
            self.alive[key] = left
        else:
            del self.alive[key]

    def hold(self, buffer: Buffer) -> Buffer:
        buffer.refs += 1
        return buffer

    def drop(self, *buffers: Buffer | Tensor | None) -> None:
        """Let go of each; who is held by nobody is freed."""
        for one in buffers:
            if one is None:
                continue
            buffer = one.buffer if isinstance(one, Tensor) else one
            if buffer.refs < 1:
                raise AssertionError(f"{buffer.name} is freed already")
            buffer.refs -= 1
            if buffer.refs == 0:
                self._count(buffer, -1)

    def brief(self, name: str, size: str, part: str = "workspace") -> None:
        """Made and freed at once: what an operator needs while it runs."""
        self.drop(self.make(name, size, part))

    def _keep(self, buffer: Buffer) -> Buffer:
        """Hold it for the backward pass: what was passing counts as an activation from now on."""
        if buffer.part == "workspace":
            self._count(buffer, -1)
            buffer.part = "activations"
            self._count(buffer, +1)
        return self.hold(buffer)

    # -- autograd ----------------------------------------------------------------------
    def node(
        self,
        inputs: Sequence[Tensor],
        output: Tensor,
        saved: Sequence[Buffer],
        run: Callable[[Buffer], Sequence[Buffer | None]],
        *,
        consumes: bool = False,
    ) -> Tensor:
        """Record one operator.

        ``run`` takes the gradient of the output and returns one gradient for each input, newly
        made or held once more.  With ``consumes`` it lets go of what it was given itself.
        """
        output.grad = self.records and any(x.grad for x in inputs)
        if self.records:
            kept = [self._keep(buffer) for buffer in saved]
            place = (self.phase, self.layer)
            self.nodes.append(_Node(inputs, output, kept, run, place, consumes))
        return output

    def release(self) -> None:
        """Let go of what the node that is running has kept, before it has finished."""
        saved, self._running.saved = self._running.saved, []
        self.drop(*saved)

    def backward(
        self, output: Tensor, gradient: Buffer, wanted: Tensor | None = None
    ) -> Buffer | None:
        """Visit the nodes in reverse order; gradients of inputs meet where they were shared.

        Returns the gradient of ``wanted``, a tensor that no node made.
        """
        waiting: dict[Tensor, Buffer] = {output: gradient}
        while self.nodes:
            node = self.nodes.pop()
            self.at("backward", node.where[1])
            arrived = waiting.pop(node.output, None)
            self._running = node
            gradients = node.run(arrived) if arrived is not None else ()
            if not node.consumes:
                self.drop(arrived)
            self.drop(*node.saved)
            for tensor, new in zip(node.inputs, gradients, strict=False):
                if new is None:
                    continue
                if not tensor.grad:
                    self.drop(new)
                    continue
                old = waiting.get(tensor)
                if old is None:
                    waiting[tensor] = new
                    continue
                if self.in_place:
                    self.drop(new)
                else:
                    waiting[tensor] = self.make("sum of gradients", new.size)
                    self.drop(old, new)
        return waiting.pop(wanted, None)
