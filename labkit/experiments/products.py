r"""Do speed-ups multiply?  Flash's and half precision's, their product and both together.

With T the time of one call, "o" the original (S and P written, float32), "f" flash in float32,
"h" the original in half precision and "fh" both,

.. math::
    a = T_o / T_f, \qquad b = T_o / T_h, \qquad
    \text{product} = a\,b, \qquad \text{direct} = T_o / T_{fh} .

Taken from flash, the second factor is another number, :math:`b_f = T_f / T_{fh}`, and
:math:`a\,b_f` is the direct speed-up by definition: nothing can be learnt from it.

A call is attention A and the rest R (projections, norms, feed-forward), and the GPU's time is
their sum.  Flash changes A alone, half precision both.  The product differs from the direct
speed-up for two reasons, and their factors multiply to the whole:

*inside*
    :math:`(A_o/A_f)(A_o/A_h) / (A_o/A_{fh})`: within attention the two do not act on different
    things.  Half of the bytes of S is no gain for a kernel that does not write S, and tensor
    cores are no gain for one that waits for memory.
*mixing*
    what is left: the same product for :math:`A_{fh} := A_f A_h / A_o`, that is if they did
    multiply inside.  This part is Amdahl's law, since a is diluted by a rest that is large
    beside a float32 attention and b shrinks.

``parts``
    all of it at each N, for torch's SDPA and for ``labkit.flash``; Amdahl's prediction of both
    flash times from the attention alone and the rest of the naive layers.
``training``
    forward and backward in float32 and with autocast: source 001 multiplied a forward speed-up
    with a training speed-up.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claims C19, C21.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labkit.errors import check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments._jobs import first_line
from labkit.experiments.flash_forward import _timed
from labkit.experiments.layer_forward import (
    CONFIGS,
    SIZES,
    _distance,
    _untuned,
    _weights,
    call,
    network,
    oracle,
    timed_or_noted,
    within_budget,
)
from labkit.experiments.scaling import _one_thread

__all__ = [
    "CHAPTERS",
    "CLAIMED",
    "FLASH",
    "NEEDS_GPU",
    "PARTS",
    "TITLE",
    "decompose",
    "run",
]

TITLE = "Do speed-ups multiply? Flash and half precision, one by one and together"
CHAPTERS = ("10",)
NEEDS_GPU = False

PARTS = ("parts", "training")
#: what plays flash: (in float32, in half precision)
FLASH = {"sdpa": ("sdpa", "sdpa_half"), "flash": ("flash", "flash_half")}
#: source 001 at N = 1024: flash in the forward pass, half in training, their product
CLAIMED = {"a": 2.7, "b": 2.0, "product": 5.4}
_SAMPLES = 15
#: nothing is begun after so many seconds
_BUDGET_S = 45


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cpu":
        # half precision on a CPU says nothing about a GPU: only the shape of the result is shown
        return {
            "work": [("parts", ("report", n)) for n in (64, 128)], "flash": ("sdpa",),
            "batch": 1, "rep_ms": 10, "min_samples": 3,
        }  # fmt: skip
    if quick:
        # without the kernels of labkit.flash: compiling them takes longer than the rest
        return {
            "work": [("parts", ("report", 512)), ("parts", ("report", 2048)),
                     ("training", (1024,))],
            "flash": ("sdpa",), "rep_ms": 12,
        }  # fmt: skip
    # what the claim is about first
    work = [("parts", ("report", n)) for n in (1024, 4096, 512, 2048)]
    work += [("training", (1024,)), ("parts", ("realistic", 4096)), ("parts", ("report", 8192))]
    work += [("training", (2048,)), ("parts", ("report", 256)), ("training", (512,))]
    return {
        "work": [*work, ("training", (4096,))], "flash": tuple(FLASH), "rep_ms": 20,
        # labkit.flash in IEEE float32 takes as long as all others together
        "flash_to": 4096,
    }  # fmt: skip


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] | None = None,
) -> Result:
    """Measure the parts that this device can.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    parts : some of :data:`PARTS`; by default all.

    Returns
    -------
    Result
        Keys end in ``.<size>.<flash>.n<N>``, ``<flash>`` one of :data:`FLASH`: ``a``, ``b``,
        ``b_flash``, ``product``, ``direct``, ``product_over_direct``, of one call on an idle
        device; with ``_gpu`` behind the first word, what :func:`decompose` returns, of the GPU
        alone.
        ``share.<size>.<config>.n<N>``: attention's share of the GPU's time.
        ``training.<what>.n<N>``: ``a``, ``b``, ``direct``, and ``mixed`` (forward a × training b).
        ``rows``: one per measured function, ``part`` as in the list above or ``"attention"``.
    """

    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    plan = _plan(quick, device)
    for part in parts or ():
        check_choice("part", part, PARTS)
    work = [w for w in plan["work"] if parts is None or w[0] in parts]
    result = Result()
    do = {
        "parts": functools.partial(_parts, result, plan, device),
        "training": functools.partial(_training, result, plan, device),
    }
    with _one_thread(device), _untuned():
        within_budget(result, work, do, _BUDGET_S, progress)
    _summarise(result)
    return result


def _half(name: str, device: str) -> Any:
    """On a CPU bfloat16 stands in: float16 products are emulated there."""
    from dataclasses import replace

    config = CONFIGS[name]
    half = config.dtype == "float16" and device == "cpu"
    return replace(config, dtype="bfloat16") if half else config


def _names(plan: Mapping[str, Any], n: int) -> list[str]:
    kinds = [k for k in plan["flash"] if k != "flash" or n <= plan["flash_to"]]
    return ["original", "original_half", *(name for kind in kinds for name in FLASH[kind])]


def _parts(result: Result, plan: dict[str, Any], device: str, size: str, n: int) -> None:
    """Whole layers and attention alone, every configuration, in turns."""
    import torch

    shape = {**SIZES[size], "seq_len": n}
    shape["batch"] = plan.get("batch", shape["batch"])
    base = _weights(plan, size, device)
    generator = torch.Generator(device).manual_seed(n)
    x = torch.randn(shape["batch"], n, shape["dim"], device=device, generator=generator)
    options = {"device": device, "rep_ms": plan["rep_ms"], "warmup_ms": 5}
    options |= {"max_samples": _SAMPLES}
    options["min_samples"] = plan.get("min_samples", 7 if n <= 4096 else 4)
    with torch.no_grad():
        expected, state = oracle(base, x), base.state_dict()
        whole, errors = {}, {}
        for name in _names(plan, n):
            config = _half(name, device)
            try:
                whole[name] = call(network(shape, config, device, state), config, x)
                errors[name] = _distance(whole[name](), expected)
            except Exception as error:
                whole.pop(name, None)
                result.notes.append(f"{name}, {size}, N = {n}: {first_line(error)}")
        for launch in ("included", "hidden") if device == "cuda" else ("included",):
            timings = timed_or_noted(result, whole, launch=launch, **options)
            for name in timings:
                row = {"part": "parts", "size": size, "name": name, **shape, "launch": launch}
                result.rows.append(_timed(row | {"error": errors[name]}, timings[name]))
        if device == "cpu":
            return
        alone = {name: _attention(_half(name, device), x, shape["heads"]) for name in whole}
        timings = timed_or_noted(result, alone, launch="hidden", **options)
        for name in timings:
            row = {"part": "attention", "size": size, "name": name, **shape, "launch": "hidden"}
            result.rows.append(_timed(row, timings[name]))


def _attention(config: Any, x: Any, heads: int) -> Callable[[], Any]:
    """The attention of one layer by itself, on tensors laid out as the projections leave them."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from labkit.dtypes import torch_dtype
    from labkit.flash import flash_attention
    from labkit.naive import naive_attention

    generator = torch.Generator(x.device).manual_seed(1)
    q, k, v = (
        torch.randn(x.shape, device=x.device, generator=generator)
        .to(torch_dtype(config.dtype)).unflatten(-1, (heads, -1)).transpose(1, 2)
        for _ in range(3)
    )  # fmt: skip
    function = {
        "naive": naive_attention, "sdpa": scaled_dot_product_attention, "flash": flash_attention,
    }[config.backend]  # fmt: skip
    return functools.partial(function, q, k, v)


def _training(result: Result, plan: dict[str, Any], device: str, n: int) -> None:
    """Forward and backward of the layers that stand for the report's: float32 and autocast,
    original and SDPA."""
    import torch

    shape = {**SIZES["report"], "seq_len": n}
    x = torch.randn(shape["batch"], n, shape["dim"], device=device)
    state = _weights(plan, "report", device).state_dict()
    functions: dict[str, Callable[[], Any]] = {}
    for name, backend, autocast in (
        ("original", "original", False), ("original_autocast", "original", True),
        ("sdpa", "sdpa", False), ("sdpa_autocast", "sdpa", True),
    ):  # fmt: skip
        model = network(shape, CONFIGS[backend], device, state).train()
        functions[name] = functools.partial(_step, model, x, autocast)
    timings = timed_or_noted(
        result, functions, device=device, launch="included", rep_ms=plan["rep_ms"], warmup_ms=10,
        min_samples=7, max_samples=_SAMPLES,
    )  # fmt: skip
    for name in timings:
        row = {"part": "training", "size": "report", "name": name, **shape, "launch": "included"}
        result.rows.append(_timed(row, timings[name]))


def _step(model: Any, x: Any, autocast: bool) -> None:
    """Gradients of a mean of squares; the loss is scaled as a GradScaler begins."""
    import torch

    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast(x.device.type, torch.float16, enabled=autocast):
        loss = model(x).float().square().mean()
    (loss * 2.0**16 if autocast else loss).backward()


# -- what pages quote ------------------------------------------------------------------------------


def decompose(whole: Mapping[str, float], alone: Mapping[str, float], layers: int) -> dict:
    """The speed-ups, their product, and why it is not the direct one.

    Parameters
    ----------
    whole : time of the whole stack: ``"o"``, ``"f"``, ``"h"``, ``"fh"``.
    alone : the same of the attention of one layer.
    layers : how many there are in the stack.

    Returns
    -------
    dict
        ``a``, ``b``, ``b_flash``, ``product``, ``direct``, ``product_over_direct``; ``mixing`` and
        ``inside``, which multiply to the last; ``inside_attention``, the product over direct of
        the attention alone; ``a_predicted`` and ``predicted`` (direct), by Amdahl's law, and
        ``predicted_over_direct``.
    """
    attention = {name: layers * t for name, t in alone.items()}
    # the rest is what is left of the layers that write S: once in float32, once in half
    rest = max(0.0, whole["o"] - attention["o"])
    rest_half = max(0.0, whole["h"] - attention["h"])
    out = _factors(whole)
    both = attention["f"] * attention["h"] / attention["o"]

    def modelled(fh: float) -> dict[str, float]:
        return _factors({
            "o": attention["o"] + rest, "f": attention["f"] + rest,
            "h": attention["h"] + rest_half, "fh": fh + rest_half,
        })  # fmt: skip

    out["mixing"] = modelled(both)["product_over_direct"]
    out["inside"] = out["product_over_direct"] / out["mixing"]
    out["inside_attention"] = attention["fh"] / both
    found = modelled(attention["fh"])
    out["a_predicted"], out["predicted"] = found["a"], found["direct"]
    out["predicted_over_direct"] = out["predicted"] / out["direct"]
    return out


def _factors(t: Mapping[str, float]) -> dict[str, float]:
    a, b, direct = t["o"] / t["f"], t["o"] / t["h"], t["o"] / t["fh"]
    return {
        "a": a, "b": b, "b_flash": t["f"] / t["fh"], "product": a * b, "direct": direct,
        "product_over_direct": a * b / direct,
    }  # fmt: skip


_SAYS = {
    "a": "original over flash, both float32",
    "b": "original over original in half precision",
    "b_flash": "flash over flash in half precision",
    "product": "a · b",
    "direct": "original over flash in half precision",
    "product_over_direct": "a · b over the direct speed-up",
    "mixing": "a · b over direct, if speed-ups multiplied inside attention: Amdahl's law",
    "inside": "the other factor of a · b over direct: inside attention they do not multiply",
    "inside_attention": "a · b over direct of the attention alone",
    "predicted": "direct, from attention alone and the rest of the layers that write S",
    "predicted_over_direct": "predicted over measured direct speed-up",
    "a_predicted": "a, predicted by Amdahl's law from the attention alone",
}


def _summarise(result: Result) -> None:
    for size in SIZES:
        rows = result.select(part="parts", size=size)
        for n in sorted({row["seq_len"] for row in rows}):
            where = f"{size} size, N = {n}"
            called, gpu, alone = (
                {r["name"]: r["median_ms"] / 1e3 for r in found}
                for found in (
                    result.select(part="parts", size=size, seq_len=n, launch="included"),
                    result.select(part="parts", size=size, seq_len=n, launch="hidden"),
                    result.select(part="attention", size=size, seq_len=n),
                )
            )
            for name in alone:
                if name in gpu:
                    share = SIZES[size]["layers"] * alone[name] / gpu[name]
                    how = f"attention alone over the whole, the GPU's time, {name}, {where}"
                    result.add(f"share.{size}.{name}.n{n}", share, "1", how)
            for kind, (single, both) in FLASH.items():
                names = {"o": "original", "f": single, "h": "original_half", "fh": both}
                end = f"{size}.{kind}.n{n}"
                if set(names.values()) <= set(called):
                    found = _factors({key: called[name] for key, name in names.items()})
                    for key, value in found.items():
                        how = f"{_SAYS[key]}; {kind}, one call on an idle device, {where}"
                        result.add(f"{key}.{end}", value, "1", how)
                if set(names.values()) <= set(gpu) and set(names.values()) <= set(alone):
                    found = decompose(
                        {key: gpu[name] for key, name in names.items()},
                        {key: alone[name] for key, name in names.items()},
                        SIZES[size]["layers"],
                    )
                    for key, value in found.items():
                        how = f"{_SAYS[key]}; {kind}, the GPU alone, {where}"
                        result.add(f"{key}_gpu.{end}", value, "1", how)
    _summarise_training(result)


def _summarise_training(result: Result) -> None:
    rows = result.select(part="training")
    for n in sorted({row["seq_len"] for row in rows}):
        t = {r["name"]: r["median_ms"] / 1e3 for r in result.select(part="training", seq_len=n)}
        names = {
            "o": "original", "f": "sdpa", "h": "original_autocast", "fh": "sdpa_autocast",
        }  # fmt: skip
        if not set(names.values()) <= set(t):
            continue
        how = f"forward and backward, half by autocast, report's size, N = {n}"
        for name in t:
            result.add(f"training.time.{name}.n{n}", t[name], "s", f"median of {name}, {how}")
        found = _factors({key: t[name] for key, name in names.items()})
        for key, value in found.items():
            result.add(f"training.{key}.n{n}", value, "1", f"{_SAYS[key]}; {how}")
        if f"a.report.sdpa.n{n}" in result:
            mixed = result.value(f"a.report.sdpa.n{n}") * found["b_flash"]
            says = "a of the forward pass · b of the training step with flash, as source 001 does"
            result.add(f"training.mixed.n{n}", mixed, "1", f"{says}; report's size, N = {n}")
            over = mixed / found["direct"]
            result.add(f"training.mixed_over_direct.n{n}", over, "1", f"{says}, over direct; {how}")
