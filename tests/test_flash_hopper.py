"""The kernels written by hand for Hopper: compiled here without a card, right on one that has it.

What only the compiler's log says (products made to wait for each other, registers spilled) decides
whether they are worth having, so it is read off the binary.  Their numbers are judged on a Hopper
card by the case runner of ``labkit.experiments`` and held to its bound.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hopper_reasons import (
    OnHopper,
    check_off_hopper,
    check_unreadable,
    compiled_elsewhere,
    pretend,
)

from labkit.experiments._flash_cases import Case, make
from labkit.flash import hopper, hopper_backward, launch, resources, tuning

KINDS = ("dkdv", "dq")


def problem(kind: str, d: int = 128, **changes) -> tuning.Problem:
    """A large problem of head_dim d on an H200."""
    known = tuning.Problem(
        kind=kind, dtype="bfloat16", precision="ieee", head_dim=d, head_dim_v=d, rows=4096,
        cols=4096, heads=64, causal=False, windowed=False, descriptors=True, by_hand=None,
        arch=90, shared_limit=227 * 1024, sms=132,
    )  # fmt: skip
    return replace(known, **changes)


# -- without a card ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """{(kind, head_dim, order, stages, causal): Resources} of every configuration there is."""
    wanted = {
        (kind, d, c.by_hand, c.block_n, causal): resources._request(
            kind, c, "sm_90", "bfloat16", d, 4096, causal, 2, "ieee", True
        )
        for kind in KINDS
        for d in (64, 128)
        for n, c in enumerate(hopper_backward.candidates(problem(kind, d)))
        for causal in ((False, True) if n == 0 else (True,))  # a mask only adds to it
    }
    found = dict(zip(wanted, resources.reports(list(wanted.values())), strict=True))
    for name, r in found.items():
        assert isinstance(r, resources.Resources), f"{name}: {r}"
    return found


@pytest.mark.slow
def test_every_configuration_fits_the_card(compiled):
    assert {name[:3] for name in compiled} >= {
        ("dkdv", 64, "early"), ("dkdv", 128, "late"),
        ("dq", 64, "early"), ("dq", 128, "early"),
    }  # fmt: skip
    for name, r in compiled.items():
        # 12 warps of which 8 have 240 registers: the cap at the start is a third of all
        assert r.fits and r.registers == 168, name
        assert r.shared_bytes <= r.estimate, name
        assert r.spill_bytes == 0, f"{name}: {r.spill_bytes} bytes"


@pytest.mark.slow
def test_products_are_in_flight_together(compiled):
    """A product that had to wait for itself would bring a wait of its own into the binary."""
    for name, r in compiled.items():
        waits = r.sass.count("WARPGROUP.DEPBAR")
        assert r.counts["wgmma"] >= 48 and 0 < waits <= r.counts["wgmma"] // 4, (name, waits)


@pytest.mark.slow
def test_tiles_come_by_the_copy_engine_and_leave_by_it(compiled):
    for name, r in compiled.items():
        assert r.counts["TMA load"] and r.counts["TMA store"], name
        assert not r.counts["mma.sync"] and not r.counts["cp.async"], name


#: compiles what ``hopper.forward`` would launch, on empty CPU tensors: a plan, stopped after that
CHILD = """
import json, sys, torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from labkit.flash import _resources_child as child, hopper, launch
JITFunction.run = child._compile_only
child.wanted.add("forward_kernel")
driver.set_active(child.Elsewhere(90))
launch.card = lambda x: (90, 227 * 1024, 132, 50 * 2**20)
for d, index, window in json.load(sys.stdin):
    child.compiled.clear()
    q = torch.empty(1, 40, 1500, d, dtype=torch.bfloat16)
    call = launch.Call(True, 0.1, window, "ieee", 1500, 1500)
    config = (hopper.CONFIGS if window is None else hopper._NEAR)[d][index]
    lse = torch.empty(q.shape[:3])
    hopper.plan(q, q, q, q, lse, call, config)(q, q, q, q, lse, call)
    kernel = child.compiled[-1][1]
    usage, sass = child._read_binary(kernel.asm["cubin"], True)
    print(json.dumps([usage, sass, kernel.metadata.shared]))
"""

#: (head_dim, number of the configuration, window): one tile a program, and tiles in turns
FORWARD = [(128, 0, None), (64, 0, 512), (128, 0, 512)]


@pytest.mark.slow
def test_the_forward_kernel_fits_the_card_with_one_tile_and_in_turns():
    for name, (usage, sass, shared) in compiled_elsewhere(CHILD, FORWARD).items():
        d, index, window = name
        near = window is not None
        config = hopper.candidates(problem("forward", d, windowed=near, near=near))[index]
        groups, registers, loader = hopper._GROUPS[config.by_hand]
        numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        assert int(numbers["STACK"]) == int(numbers["LOCAL"]) == 0, f"{name}: spills"
        assert int(numbers["REG"]) * 128 * (groups + 1) <= 65536, name
        assert 128 * (groups * registers + loader) <= 65536, name
        estimate = tuning.shared_bytes(config, problem("forward", d, near=near))
        assert shared <= estimate <= 227 * 1024, name
        products = sass.count("HGMMA.")
        each = (d + config.block_n) // 16  # of a tile of keys; as many waits as products of tiles
        assert products and sass.count("WARPGROUP.DEPBAR") <= 2 * products // each, name
        assert "UTMALDG" in sass and "UTMASTG" in sass, name
        assert not re.search(r"\bHMMA\.", sass), name


def test_candidates_only_where_the_kernels_can_run():
    for kind in KINDS:
        for d in (64, 128):
            found = hopper_backward.candidates(problem(kind, d))
            assert found and all(c.by_hand in ("early", "late") for c in found)
            assert all(
                tuning.shared_bytes(c, problem(kind, d)) <= problem(kind).shared_limit
                for c in found
            )
        for other in (
            problem(kind, 96), problem(kind, head_dim_v=64), problem(kind, dtype="float32"),
            problem("forward"),
        ):  # fmt: skip
            assert hopper_backward.candidates(other) == []


@pytest.mark.parametrize("d", [64, 128])
def test_a_near_window_has_tiles_of_its_own(d):
    """Few keys a row: narrow tiles, whose masked scores are fewer, and a choice kept apart."""
    far = problem("forward", d, windowed=True)
    near = replace(far, near=True)
    assert hopper.candidates(far) == hopper.candidates(problem("forward", d))
    assert hopper.candidates(near)[0].block_n < hopper.candidates(far)[0].block_n
    assert near.key != far.key != problem("forward", d).key

    q, k = (torch.zeros(1, 2, n, d, dtype=torch.float16) for n in (70, 9))
    for window, wanted in ((None, False), (1, True), (tuning.NEAR, True), (tuning.NEAR + 1, False)):
        call = launch.Call(True, 0.1, window, "ieee", 70, 9)
        made = launch._problem("forward", call, q, k, k, 2, 1, True, None)
        assert (made.near, made.windowed) == (wanted, window is not None), window


@pytest.mark.parametrize("module", (hopper, hopper_backward), ids=lambda m: m.__name__)
def test_without_a_hopper_card_there_is_a_reason(monkeypatch, module):
    q = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
    check_off_hopper(monkeypatch, lambda *qkv: module.supports(*qkv, causal=True, window=3), q)


@pytest.mark.parametrize("module", (hopper, hopper_backward), ids=lambda m: m.__name__)
def test_reasons_name_what_is_wrong_with_the_tensors(monkeypatch, module):
    """What they say of tensors on a Hopper card, said here by pretending that this is one."""
    pretend(monkeypatch)

    def why(q, k=None, v=None):
        tensors = (q, q if k is None else k, q if v is None else v)
        tensors = (x.as_subclass(OnHopper) for x in tensors)
        return module.supports(*tensors, causal=False, window=None)

    good = torch.zeros(2, 4, 33, 64, dtype=torch.float16)
    check_unreadable(why, good, good)
    assert why(torch.zeros(2, 33, 4, 64, dtype=torch.bfloat16).transpose(1, 2)) is None
    wrong = good.repeat(1, 1, 1, 4) if module is hopper else good[..., :32]
    assert "head_dim" in why(wrong) and "head_dim" in why(good, good, wrong)


def test_without_gluon_the_modules_still_say_so(clean_env):
    """An older Triton: the import of Gluon fails, the import of the modules does not."""
    code = """
import sys
sys.modules["triton.experimental.gluon"] = None
from labkit.flash import hopper, hopper_backward
print(*(m.supports(*[None] * 3, causal=True, window=None) for m in (hopper, hopper_backward)))
from labkit.nsa import hopper, hopper_backward
for m in hopper, hopper_backward:
    print(m.why_not(*[None] * 4), m.supports(*[None] * 4))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_env,
        cwd=os.getcwd(), timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.count("no Gluon") == 4 and done.stdout.count("False") == 2


# -- on a Hopper card ----------------------------------------------------------------------------

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

#: ragged, causal both ways, groups, windows, rows that see nothing, strides of a model
CASES = [
    Case(1, 1), Case(300, 300, causal=True, heads=4, kv_heads=2, layout="bnhd"),
    Case(129, 257, batch=2, heads=2), Case(257, 129, causal=True, heads=2),
    Case(700, 900, causal=True, heads=6, kv_heads=2, layout="aligned_bounds"),
    Case(3, 799, causal=True), Case(799, 3, causal=True), Case(500, 500, causal=True, window=77),
    Case(500, 400, window=33), Case(90, 300, causal=True, window=10**12),
    Case(400, 650, causal=True, window=130, heads=4, kv_heads=1),
    Case(640, 640, heads=2, scale=-0.1), Case(512, 512, factor=30.0),
]  # fmt: skip


def gradients(case: Case, config_kv=None, config_q=None, tensors=None):
    """o, lse, dq, dk, dv by the hand-written kernels; outputs are NaN before they are written."""
    q, k, v, dout = tensors or make(case, "cuda")
    scale = case.d**-0.5 if case.scale is None else case.scale
    how = {"scale": scale, "causal": case.causal, "window": case.window}
    nan = float("nan")
    o, lse = launch.like(q, v.shape[3]).fill_(nan), torch.full(q.shape[:3], nan, device="cuda")
    hopper.forward(q, k, v, o, lse, **how)
    delta = (dout.float() * o.float()).sum(-1).contiguous()
    dq, dk, dv = (launch.like(x, x.shape[3]).fill_(nan) for x in (q, k, v))
    hopper_backward.backward(
        q, k, v, dout, lse, delta, dq, dk, dv, **how, dkdv_config=config_kv, dq_config=config_q
    )
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def pairs(d: int):
    """Configurations of the two kernels: each of both at least once."""
    kv, q = (hopper_backward.candidates(problem(kind, d)) for kind in KINDS)
    return [(kv[i % len(kv)], q[i % len(q)]) for i in range(max(len(kv), len(q)))]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_every_configuration_is_within_the_bound(case, d):
    from labkit.experiments._flash_worker import judge

    # both dtypes, but not each mask with both: compiling is what takes the time
    case = case.but(d=d, dtype="float16" if case.n_q == 300 or case.factor != 1 else "bfloat16")
    tensors = make(case, "cuda")
    assert hopper_backward.supports(*tensors[:3], causal=case.causal, window=case.window) is None
    for config_kv, config_q in pairs(d):
        got = gradients(case, config_kv, config_q, tensors)
        for name, figures in judge(case, tensors, got).items():
            assert figures["ratio"] <= 1, f"{name} {config_kv} {config_q}: {figures}"


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("window", [1, 64, 300, tuning.NEAR])
@pytest.mark.parametrize("d", [64, 128])
def test_programs_that_take_turns_are_within_the_bound(window, d):
    """More tiles of queries than multiprocessors: each program does several, one after another."""
    from labkit.experiments._flash_worker import judge

    case = Case(1500, 1700, d=d, heads=40, kv_heads=8, causal=window != 300, window=window,
                dtype="bfloat16")  # fmt: skip
    tensors = q, k, v, _ = make(case, "cuda")
    how = {"scale": d**-0.5, "causal": case.causal, "window": window}
    for config in hopper.candidates(problem("forward", d, windowed=True, near=True)):
        assert -(-1500 // config.block_m) * 40 > 2 * 132
        got = {"o": torch.full_like(q, float("nan")), "lse": torch.zeros_like(q[..., 0]).float()}
        for _ in range(3):
            hopper.forward(q, k, v, got["o"], got["lse"], **how, config=config)
        for name, figures in judge(case, tensors, got).items():
            assert figures["ratio"] <= 1, f"{name} {config}: {figures}"


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_fifty_repeats_are_equal_to_the_bit(d, causal):
    case = Case(2000, 2000, d=d, heads=4, batch=4, causal=causal, dtype="bfloat16")
    tensors = make(case, "cuda")
    for config_kv, config_q in pairs(d):
        first = gradients(case, config_kv, config_q, tensors)
        for _ in range(49):
            for name, x in gradients(case, config_kv, config_q, tensors).items():
                assert torch.equal(x, first[name]), f"{name} {config_kv} {config_q}"


@pytest.mark.gpu
@on_hopper
def test_a_plan_serves_other_tensors_of_its_kind():
    case = Case(300, 300, d=128, heads=4, kv_heads=2, causal=True, dtype="bfloat16")
    call = launch.Call(True, 0.1, None, "ieee", 300, 300)
    plans = None
    for _ in range(2):
        q, k, v, dout = (torch.randn_like(x) for x in make(case, "cuda"))
        lse, delta = (torch.randn(1, 4, 300, device="cuda") for _ in range(2))
        grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
        wanted = [x.clone() for x in grads]
        tensors = (q, k, v, dout, lse, delta)
        if plans is None:
            plans = [
                getattr(hopper_backward, f"plan_{kind}")(
                    *tensors, *grads, call, hopper_backward.candidates(problem(kind))[0]
                )
                for kind in KINDS
            ]
        for plan in plans:
            plan(*tensors, *grads, call)
        hopper_backward.backward(*tensors, *wanted, scale=0.1, causal=True)
        for x, y in zip(grads, wanted, strict=True):
            assert torch.equal(x, y) and not x.isnan().any()
