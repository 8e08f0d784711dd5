"""Compiles flash kernels for a card that is not here; runs as a process of its own.

``resources.py`` starts it without TRITON_INTERPRET: Triton decides when it is imported whether
``@triton.jit`` compiles or interprets, and a notebook on a CPU has decided for the interpreter.

What is compiled must be what is launched, to the last specialised argument.  So the launch code
of labkit itself runs, on empty CPU tensors, with three things replaced: Triton's driver, which
says which card there is; the card's properties; and the launch, which stops after compiling.

Reads requests as JSON from standard input and writes one JSON object per line.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction


class Elsewhere:
    """A driver without a device: enough of one to compile for ``sm_<number>``."""

    def __init__(self, number: int) -> None:
        self.target = GPUTarget("cuda", number, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # the key under which a kernel keeps its binaries

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


compiled: list[tuple[str, object]] = []
wanted: set[str] = set()
_run = JITFunction.run


def _compile_only(self, *args, grid, warmup, **kwargs):
    # Nothing is returned: the caller of a launch must not find a kernel that it could launch again.
    if self.fn.__name__ in wanted:
        compiled.append((self.fn.__name__, _run(self, *args, grid=grid, warmup=True, **kwargs)))


def _tensors(r: dict) -> tuple[torch.Tensor, ...]:
    dtype = getattr(torch, r["dtype"])
    q, k = ((1, h, r["seq_len"], r["head_dim"]) for h in (2 * r["group"], 2))
    return tuple(torch.empty(shape, dtype=dtype) for shape in (q, k, k))


def _step(r: dict) -> None:
    from labkit.flash import steps
    from labkit.flash.steps import _host

    _host.check_can_launch = lambda *tensors: "gpu"
    tiles = r["tiles"]
    module = next(step for step in steps.STEPS if step.key == r["kernel"]).module
    if tiles is None and hasattr(module, "tiles_for"):
        itemsize = 4 if r["dtype"] == "float32" else 2
        tiles = module.tiles_for(r["head_dim"], itemsize, r["shared_limit"])
    r["tiles"] = tiles or module.TILES
    module.forward(*_tensors(r), causal=r["causal"], tiles=tiles)


def _production(r: dict) -> None:
    """A launch of ``labkit.flash.launch`` as the card would get it."""
    from labkit.flash import launch, tuning

    launch.card = lambda x: (r["number"], r["shared_limit"], r["sms"], r["l2_bytes"])
    launch.check_can_launch = lambda *tensors: "gpu"
    launch.forget_plans()  # a plan was made for the card before
    q, k, v = _tensors(r)
    n, d, causal = r["seq_len"], r["head_dim"], r["causal"]
    call = launch.Call(causal, 0.125, None, r["precision"], n, n)
    problem = tuning.Problem(
        kind=r["kernel"], dtype=r["dtype"], precision=r["precision"], head_dim=d, head_dim_v=d,
        rows=n, cols=n, heads=1024, causal=causal, windowed=False,
        descriptors=r["number"] >= 90, by_hand="compiled without a card", arch=r["number"],
        shared_limit=r["shared_limit"], sms=r["sms"],
    )  # fmt: skip
    config = tuning.Config(**r["tiles"]) if r["tiles"] else tuning.default(problem)
    r["tiles"] = {name: x for name, x in vars(config).items() if name != "by_hand" or x}
    r["estimate"] = tuning.shared_bytes(config, problem)
    if r["kernel"] == "forward":
        launch.forward(q, k, v, call, config=config, splits=1)
    else:
        rows = torch.empty(q.shape[:3], dtype=torch.float32)
        launch.backward(q, None, q, k, v, q, rows, call, dkdv_config=config, dq_config=config)


def _tool(tool: str, *args: str) -> str:
    import subprocess

    path = getattr(knobs.nvidia, tool).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _read_binary(cubin: bytes, disassemble: bool) -> tuple[str, str]:
    """What cuobjdump says of a binary: resources, and the SASS if asked for.

    Disassembling takes as long as compiling, so its text is kept where Triton keeps the binary.
    """
    kept = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        if not disassemble:
            return usage, ""
        known = kept.get_file("labkit.sass")
        if known is not None:
            return usage, Path(known).read_text("utf-8")
        sass = _tool("cuobjdump", "-sass", str(path))
        kept.put(sass, "labkit.sass", binary=False)
        return usage, sass


def _answer(r: dict) -> dict:
    driver.set_active(Elsewhere(r["number"]))
    compiled.clear()
    step = r["kernel"] in ("v1", "v2", "v3", "v4")
    wanted.clear()
    wanted.add("forward_kernel" if step else f"{r['kernel']}_kernel")
    (_step if step else _production)(r)
    name, kernel = compiled[-1]
    usage, sass = _read_binary(kernel.asm["cubin"], r["disassemble"])
    return {
        "function": name,
        "tiles": r["tiles"],
        "estimate": r.get("estimate"),
        "shared": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "usage": usage,
        "sass": sass,
        "ptx": kernel.asm["ptx"],
    }


def _why(error: BaseException) -> str:
    """The innermost message: a kernel's error names the call, its cause the line that failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:2000]}"


def main() -> None:
    """Answer each request on standard input."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # a compiler that prints must not spoil the answers
    JITFunction.run = _compile_only
    for request in json.load(sys.stdin):
        try:
            answer = _answer(request)
        except Exception as error:  # one kernel that does not compile is an answer too
            answer = {"error": _why(error)}
        with suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
