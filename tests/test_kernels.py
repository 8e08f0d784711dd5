"""labkit.kernels: exact results, honest byte counts, and what torch's tools see of them.

On a machine without a GPU the kernels run in Triton's interpreter (conftest).
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from labkit import kernels
from labkit.errors import ArgumentError, NoGpuError

GPU = torch.cuda.is_available()
needs_interpreter = pytest.mark.skipif(GPU, reason="about the interpreter")


def int32(shape, device):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32).to(device)


# -- copy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (17,), (4096,), (3, 5, 7), (128 * 64 + 1,)])
def test_copy_is_bit_equal(dtype, shape, device):
    x = torch.randn(shape).mul(50).to(dtype).to(device)
    y = kernels.copy(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(x, y)


def test_copy_keeps_nan_and_infinity(device):
    x = torch.tensor([float("nan"), float("inf"), -0.0], device=device)
    assert torch.equal(kernels.copy(x).view(torch.int32), x.view(torch.int32))


def test_copy_reads_an_unaligned_slice(device):
    base = torch.arange(1000, dtype=torch.float16, device=device)
    assert torch.equal(kernels.copy(base[1:]), base[1:])


# -- read_sum -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["l1", "l2"])
@pytest.mark.parametrize("n", [1, 2047, 2048, 4 * 2048, 5 * 2048 + 3])
@pytest.mark.parametrize("repeats", [1, 4])
def test_read_sum_is_exact_modulo_two_to_the_32(n, repeats, level, device):
    x = int32((n,), device)
    expected = int(x.sum(dtype=torch.int64)) * repeats % 2**32
    assert int(kernels.read_sum(x, repeats, level=level)) == expected


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_read_sum_by_blocks_reads_the_same_elements(blocks, device):
    x = int32((15 * 1000,), device)
    expected = int(x.sum(dtype=torch.int64)) * 4 % 2**32
    assert int(kernels.read_sum(x, 4, blocks=blocks, programs=3)) == expected


def test_read_sum_visits_every_element_in_every_round(device):
    # one element set: lost in any round, the sum is short
    for position in (0, 2048, 3 * 2048 + 5, 8 * 2048 - 1):
        x = torch.zeros(8 * 2048, dtype=torch.int32, device=device)
        x[position] = 1
        assert int(kernels.read_sum(x, 6, programs=4)) == 6


@pytest.mark.parametrize("programs", [1, 2, 3, 6, 132, 1056, 2112])
def test_every_program_reads_every_chunk_in_turn(programs):
    from labkit.kernels.buffer_read import _stride

    step = _stride(programs)
    assert {r * step % programs for r in range(programs)} == set(range(programs))


# -- pointer_chase --------------------------------------------------------------------------


def test_chain_is_one_cycle_through_every_line():
    chain = kernels.make_chain(64 * 128, device="cpu", seed=3)
    seen, index = [], 0
    for _ in range(64):
        seen.append(index)
        index = int(chain[index])
    assert index == 0  # back at the start after all nodes, not before
    assert sorted(seen) == list(range(0, 64 * 32, 32))
    assert seen != sorted(seen)  # not in memory order, which a prefetcher would guess


def test_chain_depends_on_the_seed_only():
    assert torch.equal(kernels.make_chain(8192, seed=1), kernels.make_chain(8192, seed=1))
    assert not torch.equal(kernels.make_chain(8192, seed=1), kernels.make_chain(8192, seed=2))


@pytest.mark.parametrize("level", ["l1", "l2"])
@pytest.mark.parametrize("steps", [1, 7, 64, 100])
def test_pointer_chase_arrives_where_python_does(steps, level, device):
    chain = kernels.make_chain(32 * 128, device=device)
    nodes, index = chain.tolist(), 128
    for _ in range(steps):
        index = nodes[index]
    assert int(kernels.pointer_chase(chain, steps, start=128, level=level)) == index


@needs_interpreter
def test_the_interpreter_has_no_counters_and_says_so(device):
    chain = kernels.make_chain(1024, device=device)
    assert kernels.clocked_chase(chain, 5)[1:].tolist() == [-1, -1]


@pytest.mark.gpu
def test_counters_agree_with_each_other():
    chain = kernels.make_chain(2**25)
    kernels.clocked_chase(chain, 1000)
    _, cycles, nanoseconds = kernels.clocked_chase(chain, 100_000).tolist()
    assert 50 < cycles / 100_000 < 5000
    assert 0.2 < cycles / nanoseconds < 4  # GHz


# -- shared_gather --------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [1, 2, 32])
def test_rotation_moves_every_lane_by_its_steps(ways, device):
    table = kernels.rotation_table(1024, device)
    start = kernels.conflict_start(2, 2048, 1024, ways=ways, device=device)
    assert torch.equal(kernels.shared_gather(table, start, 9), (start + 9) % 1024)


def test_gather_follows_any_table(device):
    table = torch.randperm(1024).to(torch.int32).to(device)
    start = torch.randint(0, 1024, (3, 1024), dtype=torch.int32).to(device)
    expected = start.long()
    for _ in range(3):
        expected = table.long()[expected]
    assert torch.equal(kernels.shared_gather(table, start, 3).long(), expected)


@pytest.mark.parametrize("ways", [1, 2, 4, 8, 16, 32])
def test_conflict_start_puts_that_many_lanes_in_one_bank(ways):
    start = kernels.conflict_start(1, 8192, 1024, ways=ways)[0].view(-1, 32, 4)
    for k in range(4):  # one load instruction of each warp
        for warp in start[:, :, k]:
            assert len(set(warp.tolist())) == 32  # 32 words, none broadcast
            assert torch.bincount(warp % 32).max() == ways


SASS = """
import collections, json, re
from triton.compiler import ASTSource, compile
from triton.backends.compiler import GPUTarget
from labkit.kernels import buffer_read, gemm, latency, shared_memory

def sass(kernel, types, constants, aligned, **options):
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    text = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["sass"]
    return dict(collections.Counter(re.findall(r"\\b((?:LD|ST|HGMMA|SHFL)[A-Z]*[.\\w]*)", text)))

print(json.dumps({
    "gather": sass(
        shared_memory.gather_kernel,
        {"table": "*i32", "start": "*i32", "out": "*i32", "steps": "i32"},
        {"TABLE": 1024, "LANES": 8192}, ["table", "start", "out"],
        num_warps=shared_memory.NUM_WARPS,
    ),
    "read": sass(
        buffer_read.read_kernel,
        {"x": "*i32", "partial": "*i64", "n": "i32", "chunk": "i32", "blocks": "i32",
         "rounds": "i32", "step": "i32"},
        {"CACHE": ".cg", "EVEN": True, "BLOCK": buffer_read.BLOCK}, ["x", "partial", "n", "chunk"],
        num_warps=buffer_read.NUM_WARPS,
    ),
    "chase": sass(
        latency.chase_kernel,
        {"next_index": "*i32", "out": "*i64", "start": "i32", "steps": "i32"},
        {"CACHE": ".cg", "COUNTERS": True}, ["next_index", "out"], num_warps=1, num_stages=1,
    ),
    "matmul": sass(
        gemm.matmul_kernel.fn.fn,
        {"a": "*bf16", "b": "*bf16", "c": "*bf16", "M": "i32", "N": "i32", "K": "i32",
         "stride_am": "i32", "stride_bk": "i32"},
        {"stride_ak": 1, "stride_bn": 1, "EVEN_K": True, "PRECISION": "ieee",
         **gemm._HALF[0].kwargs},
        ["a", "b", "c", "M", "N", "K", "stride_am", "stride_bk"],
        num_warps=gemm._HALF[0].num_warps, num_stages=gemm._HALF[0].num_stages,
    ),
}))
"""


@pytest.fixture(scope="module")
def hopper_instructions():
    """Instructions of each kernel compiled for compute capability 9.0 (needs no GPU)."""
    import json
    import os

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SASS], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def count(instructions: dict[str, int], pattern: str) -> int:
    return sum(n for name, n in instructions.items() if re.fullmatch(pattern, name))


def test_gather_moves_the_bytes_it_says(hopper_instructions):
    """One step: the table stored once, one word loaded per lane, nothing by shuffle."""
    gather, threads = hopper_instructions["gather"], 32 * 8
    stored = count(gather, r"STS\.128") * 16 * threads + count(gather, "STS") * 4 * threads
    loaded = count(gather, "LDS") * 4 * threads
    assert (stored, loaded) == (4 * 1024, 4 * 8192)
    assert stored + loaded == kernels.shared_gather_bytes(1024, 8192, programs=1, steps=1)
    assert count(gather, "SHFL.*") == 0


def test_reads_are_16_bytes_wide_and_go_past_l1(hopper_instructions):
    read = hopper_instructions["read"]
    wide = count(read, r"LDG\.E\.128\.STRONG\.GPU")
    assert wide >= 4 and wide == count(read, "LDG.*")


def test_chase_has_no_load_but_the_dependent_one(hopper_instructions):
    chase = hopper_instructions["chase"]
    assert count(chase, "LDG.*") == count(chase, r"LDG\.E\.STRONG\.GPU") > 0


def test_matmul_uses_hoppers_matrix_instruction_and_spills_nothing(hopper_instructions):
    matmul = hopper_instructions["matmul"]
    assert count(matmul, r"HGMMA.*BF16.*") > 0
    assert count(matmul, "LDL.*|STL.*") == 0


# -- matmul ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (32, 32, 32), (33, 17, 65), (64, 96, 128), (5, 70, 31)]
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
)
def test_matmul_error_is_no_larger_than_rounding(m, n, k, dtype, device):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    ours = kernels.matmul(a.to(device), b.to(device)).cpu().double()
    exact = a.double() @ b.double()
    # |error| ≤ unit round-off of the output + that of the k float32 sums (Higham, §3.5)
    size = a.double().abs() @ b.double().abs()
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + (k + 1) * 2.0**-24 * size
    assert ((ours - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


def test_matmul_takes_any_strides(device):
    a, b = torch.randn(40, 24).to(device), torch.randn(24, 72).to(device)
    expected = kernels.matmul(a, b)
    assert torch.equal(kernels.matmul(a.t().contiguous().t(), b), expected)
    assert torch.equal(kernels.matmul(a, b.t().contiguous().t()), expected)
    wide = torch.randn(80, 48, device=device)
    wide[::2, ::2] = a
    assert torch.equal(kernels.matmul(wide[::2, ::2], b), expected)


def test_matmul_does_not_read_past_the_end_of_k(device):
    # The rows of `a` are views into a buffer whose next column is NaN.
    buffer = torch.full((20, 40), float("nan"), device=device)
    buffer[:, :37] = 1.0
    product = kernels.matmul(buffer[:, :37], torch.ones(37, 9, device=device))
    assert torch.equal(product, torch.full((20, 9), 37.0, device=device))


def test_matmul_gradient_matches_torch(device):
    a = torch.randn(9, 12, device=device, requires_grad=True)
    b = torch.randn(12, 7, device=device, requires_grad=True)
    g = torch.randn(9, 7, device=device)
    ours = torch.autograd.grad(kernels.matmul(a, b), (a, b), g)
    exact = torch.autograd.grad(a.double() @ b.double(), (a, b), g.double())
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@needs_interpreter
def test_bfloat16_is_refused_where_the_interpreter_would_multiply_raw_bits():
    a = torch.ones(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="16-bit integers"):
        kernels.matmul(a, a)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "low", "high"), [("ieee", 0, 1e-6), ("tf32", 1e-5, 1e-3)])
def test_float32_precision_is_what_was_asked_for(precision, low, high):
    a, b = torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    exact = a.double() @ b.double()
    error = (kernels.matmul(a, b, precision=precision).double() - exact).norm() / exact.norm()
    assert low < error < high


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(1024, 1024, 1024), (1000, 777, 333), (128, 4096, 64)])
def test_matmul_of_real_size_on_the_gpu(m, n, k, dtype):
    a = torch.randn(m, k, device="cuda", dtype=dtype)
    b = torch.randn(k, n, device="cuda", dtype=dtype)
    exact = a.double() @ b.double()
    error = (kernels.matmul(a, b).double() - exact).norm() / exact.norm()
    assert error < {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype]


@pytest.mark.gpu
def test_addresses_past_two_to_the_31_elements():
    n = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    x = torch.zeros(n, dtype=torch.int8, device="cuda")
    x[-5:] = torch.arange(1, 6, dtype=torch.int8)
    assert kernels.copy(x)[-5:].tolist() == [1, 2, 3, 4, 5]


# -- what torch's own tools see -------------------------------------------------------------


def calls(device):
    """(operator, arguments) of each kernel at a small size."""
    for name in NAMES:
        getattr(kernels, name)  # the operators are registered when their file is loaded
    chain = kernels.make_chain(1024, device=device)
    table = kernels.rotation_table(1024, device)
    start = kernels.conflict_start(1, 1024, 1024, device=device)
    a, b = torch.randn(16, 24, device=device), torch.randn(24, 40, device=device)
    ops = torch.ops.labkit
    return {
        "copy": (ops.copy, (torch.randn(40, device=device),)),
        "read_sum": (ops.read_sum, (int32((100,), device), 2, "l2", 0, 5)),
        "pointer_chase": (ops.pointer_chase, (chain, 5, 0, "l2", True)),
        "shared_gather": (ops.shared_gather, (table, start, 2, True)),
        "matmul": (ops.matmul, (a, b, "ieee")),
    }


NAMES = ["copy", "read_sum", "pointer_chase", "shared_gather", "matmul"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    operator, arguments = calls(device)[name]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not (name == "pointer_chase" and device == "cuda"):
        # compares two runs; on a GPU a chase also returns the clocks, which no two runs share
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=utils)


@pytest.mark.parametrize("name", ["copy", "matmul"])
def test_opcheck_with_gradients(name, device):
    operator, arguments = calls(device)[name]
    needing = [
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]
    torch.library.opcheck(operator, tuple(needing))


@pytest.mark.parametrize("name", NAMES)
def test_fake_result_has_the_shape_of_the_real_one(name, device):
    operator, arguments = calls(device)[name]
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = operator(*faked)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_fake_tensors_pass_through_the_public_functions(device):
    with FakeTensorMode():
        big = torch.empty(2**20, 2**20, dtype=torch.float16, device=device)  # 2 TiB
        assert kernels.matmul(big, big).shape == (2**20, 2**20)
        assert kernels.copy(big).shape == big.shape


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_keeps_the_kernels_whole(backend, device):
    def f(a, b):
        return kernels.matmul(kernels.copy(a), b) + 1

    a, b = torch.randn(8, 8, device=device), torch.randn(8, 8, device=device)
    torch.testing.assert_close(torch.compile(f, backend=backend, fullgraph=True)(a, b), f(a, b))


def test_flops_are_counted(device):
    a, b = torch.randn(16, 24, device=device), torch.randn(24, 40, device=device)
    with FlopCounterMode(display=False) as counter:
        kernels.matmul(a, b)
        kernels.copy(a)
    assert counter.get_total_flops() == 2 * 16 * 24 * 40
    with FlopCounterMode(display=False) as torch_counter:
        a @ b
    assert counter.get_total_flops() == torch_counter.get_total_flops()


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: kernels.copy([1.0]), "x"),
        (lambda: kernels.copy(torch.empty(0)), "x"),
        (lambda: kernels.copy(torch.zeros(3, dtype=torch.complex64)), "x"),
        (lambda: kernels.copy(torch.zeros(4, 4).t()[1:]), "x"),
        (lambda: kernels.read_sum(torch.zeros(4)), "x"),
        (lambda: kernels.read_sum(torch.zeros(4, dtype=torch.int32), 0), "repeats"),
        (lambda: kernels.read_sum(torch.zeros(4, dtype=torch.int32), level="l3"), "level"),
        (lambda: kernels.read_sum(torch.zeros(4, dtype=torch.int32), blocks=3), "blocks"),
        (lambda: kernels.pointer_chase(torch.zeros(4, dtype=torch.int64), 1), "next_index"),
        (lambda: kernels.pointer_chase(torch.zeros(4, dtype=torch.int32), 1.5), "steps"),
        (lambda: kernels.pointer_chase(torch.zeros(4, dtype=torch.int32), 1, start=4), "start"),
        (lambda: kernels.make_chain(100), "size_bytes"),
        (lambda: kernels.make_chain(2**40), "size_bytes"),
        (lambda: kernels.matmul(torch.zeros(2, 3), torch.zeros(2, 3)), "b"),
        (lambda: kernels.matmul(torch.zeros(2, 3), torch.zeros(3, 2).half()), "b"),
        (lambda: kernels.matmul(torch.zeros(2, 3, 4), torch.zeros(3, 2)), "a"),
        (lambda: kernels.matmul(torch.zeros(2, 3).double(), torch.zeros(3, 2).double()), "a"),
        (
            lambda: kernels.matmul(torch.zeros(2, 2), torch.zeros(2, 2), precision="bf16"),
            "precision",
        ),
        (
            lambda: kernels.shared_gather(
                torch.zeros(100, dtype=torch.int32), torch.zeros(1, 128, dtype=torch.int32), 1
            ),
            "table",
        ),
        (
            lambda: kernels.shared_gather(
                torch.zeros(1024, dtype=torch.int32), torch.zeros(1, 512, dtype=torch.int32), 1
            ),
            "start",
        ),
        (lambda: kernels.conflict_start(1, 1024, 1024, ways=3), "ways"),
    ],
)
def test_bad_input_is_named_before_a_launch(call, argument):
    with pytest.raises(ArgumentError) as error:
        call()
    assert error.value.argument == argument


def test_a_chain_that_leaves_its_buffer_is_refused(device):
    chain = torch.tensor([1, 2, 9, 0], dtype=torch.int32, device=device)
    with pytest.raises(ArgumentError, match="outside its 4 elements"):
        kernels.pointer_chase(chain, 3)


def test_a_table_that_leaves_itself_is_refused(device):
    table = kernels.rotation_table(1024, device)
    start = torch.full((1, 1024), 1024, dtype=torch.int32, device=device)
    with pytest.raises(ArgumentError, match=r"outside the table's 1024 entries"):
        kernels.shared_gather(table, start, 1)


@pytest.mark.gpu
def test_a_cpu_tensor_is_refused_on_a_gpu_machine():
    with pytest.raises(ArgumentError, match=r"\.to\('cuda'\)"):
        kernels.copy(torch.zeros(4))


# -- where kernels can run ------------------------------------------------------------------


def run_python(code: str, env: dict[str, str], *path: str) -> subprocess.CompletedProcess:
    env = env | ({"PYTHONPATH": ":".join(path)} if path else {})
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


def test_importing_the_package_loads_neither_torch_nor_triton(clean_env):
    code = "import labkit.kernels, sys; print({'torch', 'triton'} & set(sys.modules))"
    assert run_python(code, clean_env).stdout.strip() == "set()"


@needs_interpreter
def test_without_gpu_and_interpreter_the_error_says_how_to_switch_it_on(clean_env):
    code = "import torch, labkit.kernels as k; k.copy(torch.zeros(4))"
    message = run_python(code, clean_env).stderr
    assert NoGpuError.__name__ in message and "TRITON_INTERPRET=1" in message


@needs_interpreter
def test_the_switch_works_before_triton_and_explains_itself_after(clean_env):
    code = (
        "import labkit.kernels as k; print(k.use_interpreter_if_no_gpu(), k.backend());"
        "import torch; print(k.copy(torch.arange(3)).tolist())"
    )
    assert run_python(code, clean_env).stdout.split("\n")[:2] == ["True interpreter", "[0, 1, 2]"]
    late = "import triton, labkit.kernels as k; k.use_interpreter_if_no_gpu()"
    assert "Triton was imported before" in run_python(late, clean_env).stderr


def test_without_triton_the_error_says_what_still_works(clean_env, tmp_path):
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import labkit.kernels as k; print(k.use_interpreter_if_no_gpu())\n"
        "try: k.copy\n"
        "except ImportError as error: print(type(error).__name__, error)\n"
    )
    lines = run_python(code, clean_env).stdout
    assert lines.startswith("False\nMissingDependencyError labkit.kernels.copy needs triton")
    assert "pip install triton" in lines and "labkit.naive" in lines


@needs_interpreter
def test_the_interpreter_does_less_and_gives_the_same_bits(monkeypatch):
    """What ``_hasten_interpreter`` leaves out or remembers is what changes nothing."""
    from triton import language as tl
    from triton.runtime import interpreter

    from labkit.flash import flash_attention

    def attend():
        leaves = [x.clone().requires_grad_() for x in tensors]
        o, lse = flash_attention(*leaves, causal=True, return_lse=True)
        return o, lse, *torch.autograd.grad(o, leaves, torch.ones_like(o))

    tensors = torch.randn(3, 1, 2, 40, 16).half().unbind()
    looked, look = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *a: looked.append(a[0]) or look(*a))
    quick, few = attend(), len(looked)
    assert tl.core.is_builtin(tl.load), "what a launch replaced is there again"
    assert interpreter.interpreter_builder.options.sanitize_overflow is False
    for name in ("_patch_lang", "_get_np_dtype"):
        monkeypatch.setattr(interpreter, name, getattr(interpreter, name).__wrapped__)
    for cls in (tl.block_type, tl.tensor):
        monkeypatch.setattr(cls, "__init__", cls.__init__.__wrapped__)
    options = interpreter.InterpreterOptions()
    assert options.debug is False  # and with it every assertion about overflow
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    slow = attend()
    assert all(torch.equal(a, b) for a, b in zip(quick, slow, strict=True))
    assert 0 < few < (len(looked) - few) / 4
