r"""A training step in each precision: its time, and its memory by part, predicted and measured.

The stacks are those of ``layer_forward``: two layers at a small size (called ``report``, our choice
where the report states none) and at a realistic one, without a mask.  A step is forward, backward
and a fused AdamW; each configuration is a backend of ``labkit.layers`` with a precision of
``labkit.layers.training``.

``time``
    a step, launches included, as a program that waits for its loss has it; and the GPU alone,
    launches hidden.  All configurations of a length in turns.
``memory``
    the most bytes alive during a step, by part.  On a GPU the allocator's own history says which
    blocks are alive at the peak, autograd's hooks which of them it keeps, and who made a block
    whether it is one of S and P: a shape cannot say, [batch, seq_len, 4 · dim] looks like scores
    where seq_len = 4 · dim.  On a CPU the step is traced on FakeTensors.  Predicted by
    ``labkit.layers.budget``.
``error``
    the gradient of the first layer's ``q_proj`` against the same step in float64.
``claim``
    the three configurations of which source 001 states bytes at 2048 tokens, for several batches:
    it does not say which batch it measured.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claims C19, C20, C22.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from labkit.errors import check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments._jobs import first_line
from labkit.experiments.layer_forward import SIZES, within_budget
from labkit.experiments.scaling import _one_thread
from labkit.layers.budget import PARTS as MEMORY_PARTS

__all__ = [
    "CHAPTERS",
    "CLAIMED_MEMORY",
    "CLAIMED_TIME",
    "CONFIGS",
    "NEEDS_GPU",
    "PARTS",
    "TITLE",
    "a_step",
    "run",
    "traced_peak",
    "weigh",
]

TITLE = "A training step in each precision: time, and memory by part"
CHAPTERS = ("10",)
NEEDS_GPU = False

PARTS = ("time", "memory", "claim")
BACKENDS = ("naive", "sdpa", "flash")
PRECISIONS = ("fp32", "tf32", "autocast_fp16", "autocast_bf16", "fp16", "bf16")
#: every configuration, as ``backend.precision``
CONFIGS = tuple(f"{b}.{p}" for b in BACKENDS for p in PRECISIONS)
#: seq_len → what source 001 states for an RTX 3060: seconds in fp32, in fp16, share saved
CLAIMED_TIME = {
    128: (11.35e-3, 11.18e-3, 0.0),
    256: (9.88e-3, 11.54e-3, 0.0),
    512: (16.45e-3, 14.86e-3, 0.11),
    1024: (41.66e-3, 20.66e-3, 0.50),
}
#: name in source 001 → configuration, bytes that it states at 2048 tokens (its MB are 2²⁰)
CLAIMED_MEMORY = {
    "original": ("naive", "fp32", 750 * 2**20),
    "flash": ("sdpa", "fp32", 250 * 2**20),
    "flash_half": ("sdpa", "fp16", 125 * 2**20),
}
_LAUNCHES = {"included": "time", "hidden": "gpu"}
_SAMPLES = 25
_BUDGET_S = 240


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cpu":
        return {
            "work": [("report", n) for n in (32, 128)], "batch": 1,
            "configs": ("naive.fp32", "sdpa.fp32"),
            "claim": [1], "rep_ms": 10, "min_samples": 3, "oracle_to": 128, "hidden": [],
        }  # fmt: skip
    if quick:
        configs = ("naive.fp32", "naive.autocast_fp16", "naive.fp16", "sdpa.fp32",
                   "sdpa.autocast_fp16", "sdpa.fp16")  # fmt: skip
        return {
            "work": [("report", n) for n in (128, 1024)], "configs": configs,
            "claim": [4], "rep_ms": 30, "min_samples": 4, "oracle_to": 1024, "hidden": [],
        }  # fmt: skip
    left_out = ("naive.autocast_bf16", "naive.bf16", "flash.tf32", "flash.autocast_bf16",
                "flash.bf16")  # fmt: skip
    return {
        # what is quoted first: a busy card may not get to the last
        "work": [*(("report", n) for n in (1024, 128, 512, 2048, 256, 4096)),
                 ("realistic", 2048), ("realistic", 512)],
        "configs": tuple(c for c in CONFIGS if c not in left_out), "claim": [4, 2],
        "rep_ms": 40, "min_samples": 5, "oracle_to": 2048,
        "hidden": [("report", n) for n in (128, 1024, 2048)],
    }  # fmt: skip


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] | None = None,
) -> Result:
    """Time and weigh the steps that this device can make.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    parts : some of :data:`PARTS`; by default all.

    Returns
    -------
    Result
        Keys end in ``.<size>.<backend>.<precision>.n<N>``.  ``time`` and ``gpu`` (s), ``speedup``
        (fp32 of the same backend over it, of ``time``), ``peak`` and ``predicted`` (bytes of model,
        optimiser, batch and step together), ``<part>`` and ``predicted_<part>`` (bytes at that
        moment), ``ratio`` (measured over predicted), ``saved`` (share of the bytes of fp32, same
        backend), ``error`` (relative).  ``claim.<name>.b<batch>`` and ``claim_training.…`` (bytes
        at 2048 tokens, a forward pass and a step).  ``pays.<size>.<backend>.<precision>`` (tokens
        from which on a step is faster than fp32's).  ``context`` (bytes that the driver has taken
        beside torch's allocator).
    """
    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    for part in parts or ():
        check_choice("part", part, PARTS)
    wanted = PARTS if parts is None else tuple(parts)
    plan = _plan(quick, device)
    result = Result()
    work: list[tuple[str, tuple]] = []
    if "claim" in wanted:
        work += [("claim", (batch,)) for batch in plan["claim"]]
    work += [("step", item) for item in plan["work"] if {"time", "memory"} & set(wanted)]
    do = {
        "claim": lambda batch: _claim(result, batch, device),
        "step": lambda size, n: _length(result, plan, wanted, size, n, device),
    }
    with _one_thread(device):
        within_budget(result, work, do, _BUDGET_S, progress)
    _summarise(result)
    if device == "cuda":
        result.add("context", _context(), "bytes", "taken of the card outside torch's allocator")
    result.notes.append(
        "Memory on CUDA: requested bytes, by the allocator's history."
        if device == "cuda"
        else "Memory on a CPU: traced on FakeTensors."
    )
    return result


# -- one step --------------------------------------------------------------------------------------


def a_step(
    size: Mapping[str, int], backend: str, precision: str, device: str, *, batch: int, seq_len: int,
    causal: bool = False, checkpoint: bool = False,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """A ``TrainingStep`` of that size, and x and target in the dtype that it wants.

    Returns
    -------
    ``(step, x, target)``; x and target are ``[batch, seq_len, dim]``.

    Raises
    ------
    ArgumentError
        if the precision or the backend does not exist here.
    """
    import torch

    from labkit.layers import TransformerModel
    from labkit.layers.training import PRECISIONS as DTYPES
    from labkit.layers.training import TrainingStep

    dtype = DTYPES[check_choice("precision", precision, DTYPES)][0]
    torch.manual_seed(0)
    model = TransformerModel(
        size["dim"], size["heads"], size["layers"], backend=backend, causal=causal,
        checkpoint=checkpoint, device=device, dtype=dtype,
    )  # fmt: skip
    # a small rate: the steps are there to be timed, and the numbers should stay numbers
    step = TrainingStep(model, precision=precision, lr=1e-5, on_overflow="skip")
    x, target = (
        torch.randn(batch, seq_len, size["dim"], device=device).to(dtype) for _ in range(2)
    )
    return step, x, target


def _length(
    result: Result, plan: dict[str, Any], wanted: Sequence[str], name: str, seq_len: int,
    device: str,
) -> None:  # fmt: skip
    """All configurations at one size and length."""
    size = SIZES[name]
    batch = plan.get("batch", size["batch"])
    steps, rows = {}, {}
    for config in plan["configs"]:
        backend, precision = config.split(".")
        try:
            made = a_step(size, backend, precision, device, batch=batch, seq_len=seq_len)
            made[0].launch(*made[1:])
        except Exception as error:
            result.notes.append(f"{name} {config} n{seq_len}: {first_line(error)}")
            continue
        steps[config] = made
        rows[config] = {
            "part": "step", "size": name, "backend": backend, "precision": precision,
            "seq_len": seq_len, "batch": batch, **size,
        }  # fmt: skip
    if seq_len <= plan["oracle_to"]:
        _errors(result, steps, rows, device)
    if "time" in wanted and steps:
        _times(result, plan, steps, rows, (name, seq_len), device)
    if "memory" in wanted:
        for config, (step, x, target) in steps.items():
            try:
                rows[config] |= _memory(step, x, target, rows[config], device)
            except Exception as error:
                result.notes.append(f"memory {name} {config} n{seq_len}: {first_line(error)}")
    result.rows += rows.values()


def _errors(result: Result, steps: dict, rows: dict, device: str) -> None:
    """Relative error of the first query projection's gradient, against float64."""
    for config, (step, x, target) in steps.items():
        try:
            exact = _gradient64(step, x, target)
            step.optimizer.zero_grad(set_to_none=True)
            step.backward(step.forward(x, target))
            found = step.model.layers[0].q_proj.weight.grad.double() / step.scale
            rows[config]["error"] = float((found - exact).norm() / exact.norm())
            step.optimizer.zero_grad(set_to_none=True)
        except RuntimeError as error:  # out of memory is one
            result.notes.append(f"error of {config}: {first_line(error)}")


def _gradient64(step: Any, x: Any, target: Any) -> Any:
    """The same gradient in float64, from the same weights and the same batch."""
    import torch

    model = step.model.to_backend("naive")
    model = model.to(torch.float64)
    loss = torch.nn.functional.mse_loss(model(x.double()), target.double())
    loss.backward()
    return model.layers[0].q_proj.weight.grad


# -- time ------------------------------------------------------------------------------------------


def _times(
    result: Result, plan: dict[str, Any], steps: dict, rows: dict, at: tuple, device: str
) -> None:
    """Samples and medians into ``rows``; ``at`` is the size and the length."""

    def launch(made: tuple) -> Callable[[], Any]:
        step, x, target = made
        return lambda: step.launch(x, target)

    functions = {config: launch(made) for config, made in steps.items()}
    for how, column in _LAUNCHES.items():
        if how == "hidden" and at not in plan["hidden"]:
            continue
        timings = _in_turns(result, functions, launch=how, device=device, plan=plan)
        for config, timing in timings.items():
            samples = [round(ms, 5) for ms in timing.samples_ms]
            row = rows[config]
            row[column] = median(samples) / 1e3
            if column == "time":
                row |= {"samples_ms": samples, "median_ms": median(samples),
                        "method": timing.method}  # fmt: skip
            else:
                row["gpu_samples_ms"] = samples


def _in_turns(
    result: Result, functions: Mapping[str, Callable], *, launch: str, device: str,
    plan: Mapping[str, Any],
) -> Mapping[str, Any]:  # fmt: skip
    """Timings by name; one that the timer refuses is left out, and a note says why."""
    from labkit.timing import UnsynchronisedError, time_many

    left = dict(functions)
    while left:
        try:
            return time_many(
                left, device=device, launch=launch, warmup_ms=5, rep_ms=plan["rep_ms"],
                min_samples=plan["min_samples"], max_samples=_SAMPLES,
            )  # fmt: skip
        except UnsynchronisedError as error:
            refused = str(error).split(" ", 1)[0]
            result.notes.append(f"not timed, {launch}: {first_line(error)}")
            if left.pop(refused, None) is None:
                break
    return {}


# -- memory ----------------------------------------------------------------------------------------


def _memory(step: Any, x: Any, target: Any, row: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Predicted and measured bytes of one step, by part."""
    from labkit.layers.budget import layer_budget

    traced = device == "cpu"
    how = {"backend": row["backend"], "precision": row["precision"], "training": True,
           "causal": False}  # fmt: skip
    shape = (row["dim"], row["heads"], row["layers"], row["seq_len"], row["batch"])
    budget = layer_budget(*shape, device=device, traced=traced, **how)
    found: dict[str, Any] = {
        "predicted": budget.total, "peak_at": budget.peak_at,
        **{f"predicted_{part}": n for part, n in budget.parts.items()},
    }  # fmt: skip
    if traced:
        return found | {"peak": traced_peak(row, row["backend"], row["precision"])}
    return found | weigh(step, x, target)


def traced_peak(
    size: Mapping[str, int], backend: str, precision: str, *, training: bool = True,
    batch: int | None = None, seq_len: int | None = None, causal: bool = False,
    checkpoint: bool = False,
) -> int:  # fmt: skip
    """Peak bytes of the second step (or of a forward pass), traced on FakeTensors.

    Model, optimiser and batch are made inside, so that the trace counts them.
    """
    from labkit.memory import trace

    def two_steps():
        step, x, target = a_step(
            size, backend, precision, "cpu", batch=batch or size["batch"],
            seq_len=seq_len or size["seq_len"], causal=causal, checkpoint=checkpoint,
        )  # fmt: skip
        if not training:
            del target
            return _forward(step, x)
        for _ in range(2):  # the first one makes the optimiser's state
            step.optimizer.zero_grad(set_to_none=True)
            step.backward(step.forward(x, target))
            step.optimizer.step()
        return None

    return trace(two_steps).peak


def _forward(step: Any, x: Any) -> Any:
    """A forward pass without gradients in the precision of the step."""
    import torch

    with torch.no_grad(), step.arithmetic(), step.autocast():
        return step.model(x)


def weigh(step: Any, x: Any, target: Any) -> dict[str, Any]:
    """Bytes alive at the peak of one step on a GPU, by part.

    The step must have run before: it makes the optimiser's state, and compiles.  It runs twice
    here: once with nothing but the allocator's counters, which give all totals, and once more with
    its history and hooks, which give the parts.

    Returns
    -------
    dict
        ``peak`` (model, optimiser, batch and step), ``peak_<forward|backward|update>``, the
        parts at the peak, ``kept`` (bytes that the forward pass leaves to the backward pass),
        ``allocated`` and ``reserved`` (growth in blocks, and in memory from the driver).  If the
        allocator's history cannot be read, the parts are missing and ``why`` says so; ``why`` also
        says if hooks changed the total by more than half a percent.
    """
    import torch

    held = _held(step, x, target)
    before = _at_rest(step)
    start = before["requested_bytes.all.current"]
    out: dict[str, Any] = {}
    highest: dict[str, Any] = {}
    loss = _phase(highest, "forward", lambda: step.forward(x, target))
    out["kept"] = torch.cuda.memory_stats()["requested_bytes.all.current"] - start
    _phase(highest, "backward", functools.partial(step.backward, loss))
    del loss
    _phase(highest, "update", step.update)
    for name, stats in highest.items():
        out[f"peak_{name}"] = stats["requested"] - start + sum(held.values())
    out["peak"] = max(out[f"peak_{name}"] for name in highest)
    for stat in ("allocated", "reserved"):
        now = before[f"{stat}_bytes.all.current"]
        out[stat] = max(stats[stat] for stats in highest.values()) - now
    _at_rest(step)
    try:
        parts = _weighed_parts(step, x, target, held)
    except Exception as error:  # the totals stand
        parts = {"why": first_line(error)}
    total = sum(parts.get(part, 0) for part in MEMORY_PARTS)
    if "why" not in parts and abs(total / out["peak"] - 1) > 0.005:
        parts["why"] = f"with hooks the peak was {total} bytes"
    _at_rest(step)
    return out | parts


def _weighed_parts(step: Any, x: Any, target: Any, held: Mapping[str, int]) -> dict[str, Any]:
    """One more step, under the allocator's history."""
    history = _History()
    with history:
        loss = history.forward(step, x, target)
        step.backward(loss)
        history.gradients(step)
        del loss
        step.update()
    return history.parts(held)


def _at_rest(step: Any) -> Mapping[str, int]:
    """The allocator's counters when nothing of a step is left."""
    import torch

    step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_stats()


def _phase(highest: dict, name: str, work: Callable[[], Any]) -> Any:
    import torch

    torch.cuda.reset_peak_memory_stats()
    value = work()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    highest[name] = {
        stat: stats[f"{stat}_bytes.all.peak"] for stat in ("requested", "allocated", "reserved")
    }
    return value


def _bytes(tensors: Any) -> int:
    import torch

    known = {}
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.is_cuda:
            known[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(known.values())


def _held(step: Any, x: Any, target: Any) -> dict[str, int]:
    """Bytes that are there before the step begins, by part."""
    states = [t for state in step.optimizer.state.values() for t in state.values()]
    if step.scaler is not None:
        states += [step.scaler._scale, step.scaler._growth_tracker]
    return {
        "weights": _bytes(step.model.parameters()),
        "optimizer": _bytes(states),
        "activations": _bytes([x, target]),
    }


#: bytes that a tensor of scores may have
Sizes = tuple[int, ...]


class _History:
    """The allocator's history of one step, and what its blocks were for.

    S and P, their copies and their gradients are the blocks of ``batch · heads · seq_len²``
    elements that naive attention made, or the backward pass of what it did.  Others may be as
    large, or have such a shape, and are made elsewhere.  What attention makes beside them has
    head_dim in the place of a seq_len; where a size could be either, there are no parts.
    """

    def __init__(self) -> None:
        self.why = ""
        self.saved: dict[int, str] = {}
        self.grads: set[int] = set()
        self.after_forward = 0
        self.events: list[dict] = []
        #: (first, end, sizes): allocations, by number, among which scores have one of these sizes
        self.attention: list[tuple[int, int, Sizes]] = []
        self._base = 0
        #: numbers of autograd's nodes that attention made, and the sizes of its scores
        self._nodes: list[tuple[int, int, Sizes]] = []

    def __enter__(self) -> _History:
        import torch

        try:
            torch.cuda.memory._record_memory_history("all", context=None, max_entries=500_000)
        except Exception as error:
            self.why = first_line(error)
        self._base = self._allocations()
        return self

    def __exit__(self, *error: object) -> None:
        import torch

        self.events = self._read()
        try:
            torch.cuda.memory._record_memory_history(None)
        except Exception as problem:
            self.why = self.why or first_line(problem)

    def _read(self) -> list[dict]:
        import torch

        if self.why:
            return []
        try:
            traces = torch.cuda.memory._snapshot()["device_traces"]
            events = traces[torch.cuda.current_device()]
        except Exception as error:
            self.why = first_line(error)
            return []
        return [e for e in events if e["action"] in ("alloc", "free_requested", "free")]

    def _allocations(self) -> int:
        """How many there were until now."""
        import torch

        return torch.cuda.memory_stats()["allocation.all.allocated"] - self._base

    def forward(self, step: Any, x: Any, target: Any) -> Any:
        """The forward pass, with every tensor that autograd keeps noted by its storage."""
        from torch.autograd.graph import saved_tensors_hooks

        def pack(t):
            self.saved[t.untyped_storage().data_ptr()] = "activations"
            return t

        with saved_tensors_hooks(pack, lambda t: t), self._watching_attention():
            loss = step.forward(x, target)
        nodes = _graph(loss)
        parameters = {id(p) for p in step.model.parameters()}
        for node in nodes:
            self._weights_of(node, parameters)
        self._watch_backward(nodes)
        self.after_forward = len(self._read())
        return loss

    @contextmanager
    def _watching_attention(self) -> Iterator[None]:
        """Note what naive attention allocates, and which nodes it leaves to autograd."""
        import torch

        from labkit import naive

        real = naive.naive_attention

        def watched(q, k, v, **options):
            node, first = _next_node(), self._allocations()
            out = real(q, k, v, **options)
            # autocast takes the softmax in float32, and the products in half precision
            mixed = torch.is_autocast_enabled(q.device.type)
            bytes_ = {2, 4} if mixed else {q.element_size()}
            others = {each * width for each in bytes_ for width in (q.shape[3], v.shape[3])}
            if others & {each * k.shape[2] for each in bytes_}:
                self.why = f"{k.shape[2]} tokens: scores are as large as q"
            sizes = tuple(each * q.shape[:3].numel() * k.shape[2] for each in bytes_)
            self.attention.append((first, self._allocations(), sizes))
            self._nodes.append((node, _next_node(), sizes))
            return out

        naive.naive_attention = watched
        try:
            yield
        finally:
            naive.naive_attention = real

    def _weights_of(self, node: Any, parameters: set[int]) -> None:
        """The matrix that a linear layer keeps is a weight, or autocast's copy of one."""
        if not node.name().startswith(("AddmmBackward", "MmBackward")):
            return
        source = node.next_functions[-1][0]  # of the second matrix
        while source is not None and not hasattr(source, "variable"):
            if len(source.next_functions) != 1:
                return
            source = source.next_functions[0][0]
        if source is not None and id(source.variable) in parameters:
            kept = node._saved_mat2
            if kept is not None:
                self.saved[kept.untyped_storage().data_ptr()] = "weights"

    def _watch_backward(self, nodes: Sequence[Any]) -> None:
        """Note what the nodes that attention left allocate: until the next node begins."""
        open_: list[tuple[int, Sizes]] = []

        def begins(sizes: Sizes | None, *_: Any) -> None:
            now = self._allocations()
            if open_:
                first, before = open_.pop()
                self.attention.append((first, now, before))
            if sizes is not None:
                open_.append((now, sizes))

        for node in nodes:
            number = node._sequence_nr()
            own = [sizes for first, end, sizes in self._nodes if first <= number < end]
            node.register_prehook(functools.partial(begins, own[0] if own else None))

    def gradients(self, step: Any) -> None:
        self.grads = {
            p.grad.untyped_storage().data_ptr()
            for p in step.model.parameters()
            if p.grad is not None
        }

    def parts(self, held: Mapping[str, int]) -> dict[str, Any]:
        """Bytes of each part at the peak: what was held before, and the blocks alive then."""
        if self.why or not self.events:
            return {"why": f"no history of the allocator: {self.why or 'it is empty'}"}
        alive: dict[int, int] = {}  # address → number of the event that made it
        made_for: dict[int, str] = {}
        live = peak = allocated = 0
        at_peak: list[int] = []
        for number, event in enumerate(self.events):
            if number == self.after_forward:
                for address, maker in alive.items():
                    made_for.setdefault(maker, self.saved.get(address, "workspace"))
            if event["action"] == "alloc":
                alive[event["addr"]] = number
                if self._are_scores(allocated, event["size"]):
                    made_for[number] = "scores"
                allocated += 1
                live += event["size"]
                if live > peak:
                    peak, at_peak = live, list(alive.values())
            elif event["addr"] in alive:
                live -= self.events[alive.pop(event["addr"])]["size"]
        last = {e["addr"]: i for i, e in enumerate(self.events) if e["action"] == "alloc"}
        for address in self.grads & set(last):
            made_for[last[address]] = "gradients"
        out = {part: held.get(part, 0) for part in MEMORY_PARTS}
        for number in at_peak:
            out[made_for.get(number, "workspace")] += self.events[number]["size"]
        return out

    def _are_scores(self, number: int, size: int) -> bool:
        """Whether an allocation, by its number and the bytes asked for, is one of S and P."""
        return any(
            first <= number < end and size in sizes for first, end, sizes in self.attention
        )


def _graph(loss: Any) -> list[Any]:
    """Every node of autograd behind a loss."""
    found: dict[Any, None] = {}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [source for source, _ in node.next_functions]
    return list(found)


def _next_node() -> int:
    """The number of autograd's node that is made now; the next ones have higher ones."""
    import torch

    with torch.enable_grad():
        return torch.ones((), requires_grad=True).clone().grad_fn._sequence_nr()


# -- claim C22 -------------------------------------------------------------------------------------


def _claim(result: Result, batch: int, device: str) -> None:
    """Bytes of the three configurations of source 001 at 2048 tokens."""
    from labkit.layers.budget import layer_budget

    size, seq_len = SIZES["report"], 2048 if device == "cuda" else 512
    for name, (backend, precision, stated) in CLAIMED_MEMORY.items():
        shape = (size["dim"], size["heads"], size["layers"], seq_len, batch)
        how = {"backend": backend, "precision": precision, "causal": False}
        row: dict[str, Any] = {
            "part": "claim", "name": name, "backend": backend, "precision": precision,
            "batch": batch, "seq_len": seq_len, "stated": stated,
        }  # fmt: skip
        for training in (False, True):
            kind = "claim_training" if training else "claim"
            row[f"predicted_{kind}"] = layer_budget(
                *shape, device=device, traced=device == "cpu", training=training, **how
            ).total
            row[kind] = _claimed_peak(size, backend, precision, batch, seq_len, training, device)
            where = f"{seq_len} tokens, batch {batch}, dim 256, 4 heads, 2 layers"
            what = "a training step" if training else "a forward pass"
            key = f"{kind}.{name}.b{batch}"
            result.add(key, row[kind], "bytes", f"peak of {what}, weights included; {where}")
            result.add(f"predicted_{key}", row[f"predicted_{kind}"], "bytes", f"predicted; {where}")
        result.rows.append(row)


def _claimed_peak(size, backend, precision, batch, seq_len, training: bool, device: str) -> int:
    if device == "cpu":
        sizes = {**size, "seq_len": seq_len}
        return traced_peak(sizes, backend, precision, batch=batch, training=training)
    import torch

    step, x, target = a_step(size, backend, precision, device, batch=batch, seq_len=seq_len)
    if training:
        step.launch(x, target)
        return weigh(step, x, target)["peak"]
    _forward(step, x)
    held = _bytes([*step.model.parameters(), x])
    torch.cuda.synchronize()
    start = torch.cuda.memory_stats()["requested_bytes.all.current"]
    highest: dict[str, dict] = {}
    _phase(highest, "forward", lambda: _forward(step, x))
    return highest["forward"]["requested"] - start + held


def _context() -> int:
    """What the driver says is taken, less what torch's allocator holds."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


# -- keys ------------------------------------------------------------------------------------------


def _summarise(result: Result) -> None:
    rows = [r for r in result.rows if r.get("part") == "step"]
    base = {(r["size"], r["backend"], r["seq_len"]): r for r in rows if r["precision"] == "fp32"}
    for row in rows:
        end = f"{row['size']}.{row['backend']}.{row['precision']}.n{row['seq_len']}"
        where = f"{row['size']} size, batch {row['batch']}, {row['seq_len']} tokens"
        first = base.get((row["size"], row["backend"], row["seq_len"]))
        texts = {
            "time": ("s", "a training step, launches included; median"),
            "gpu": ("s", "a training step, the GPU alone; median"),
            "peak": ("bytes", "most bytes alive in a step, model and optimiser included"),
            "predicted": ("bytes", "the same by labkit.layers.budget"),
            "error": ("1", "relative error of a gradient against float64"),
            "kept": ("bytes", "kept between forward and backward"),
            "reserved": ("bytes", "growth of what torch took from the driver"),
        }
        for column, (unit, how) in texts.items():
            if row.get(column) is not None:
                result.add(f"{column}.{end}", row[column], unit, f"{how}; {where}")
        for part in MEMORY_PARTS:
            for column in (part, f"predicted_{part}"):
                if column in row:
                    how = f"bytes of {part} at the peak; {where}"
                    result.add(f"{column}.{end}", row[column], "bytes", how)
        if row.get("peak"):
            how = f"measured peak over predicted; {where}"
            result.add(f"ratio.{end}", row["peak"] / row["predicted"], "1", how)
        if first is None or first is row:
            continue
        for column, key in (("time", "speedup"), ("gpu", "speedup_gpu")):
            if column in row and column in first:
                how = f"fp32 over it, the same backend; {where}"
                result.add(f"{key}.{end}", first[column] / row[column], "1", how)
        if row.get("peak") and first.get("peak"):
            how = f"share of fp32's bytes that is saved; {where}"
            result.add(f"saved.{end}", 1 - row["peak"] / first["peak"], "1", how)
    _pays(result, rows)


def _pays(result: Result, rows: list[dict[str, Any]]) -> None:
    """From which length on a step is faster than fp32's, and stays so."""
    kinds = {(r["size"], r["backend"], r["precision"]) for r in rows if "time" in r}
    for size, backend, precision in sorted(kinds):
        if precision == "fp32":
            continue
        gains = {}
        for row in rows:
            if (row["size"], row["backend"], row["precision"]) == (size, backend, precision):
                key = f"speedup.{size}.{backend}.{precision}.n{row['seq_len']}"
                if key in result.results:
                    gains[row["seq_len"]] = result.results[key]["value"]
        pays = None
        for n in sorted(gains, reverse=True):
            if gains[n] < 1.05:
                break
            pays = n
        if pays is not None:
            how = f"shortest measured length from which on it takes 5 % less than fp32; {backend}"
            result.add(f"pays.{size}.{backend}.{precision}", pays, "tokens", how)
