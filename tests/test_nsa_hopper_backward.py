"""The backward kernels written by hand for Hopper: compiled here without a card, right on one.

What only a Hopper card can run is replaced here by PyTorch that reads the same lists, lines and
items; everything before and after it is the code itself.
"""

from __future__ import annotations

import re
from collections import Counter
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
from nsa_cases import Case, call_of, check_backward, choose, make, truth

from labkit.flash import gluon
from labkit.nsa import hopper_backward
from labkit.nsa.call import Call

CALL = Call(scale=0.1, max_q=300, max_k=300)

# -- what the kernels compute, in PyTorch ----------------------------------------------------------


def gathered(grid, q, dout, k, v, lines, shares, order, items, split, dk_parts, dv_parts, dk, dv,
             *numbers, D, G, **_):  # fmt: skip
    """``dkdv_kernel``: the same steps with the same numbers."""
    *strides, low, heads, chunks, pieces, each, slots, n_k, slope, scale = numbers
    # The copy engine sees what is described; the rows of small groups are read and written alone.
    assert all(isinstance(x, torch.Tensor) == (G < 8) for x in (q, dout, lines, shares))
    q, dout, lines, shares = (x if G < 8 else x.base for x in (q, dout, lines, shares))
    k, v = (x.base for x in (k, v))
    assert strides == [s // 8 for x in (q, dout) for s in x.stride()[:3]]
    assert G < 8 or lines.stride(0) % 4 == 0
    assert dk.is_contiguous() and dv.is_contiguous()
    n = 64 // G
    order, dk_parts, dv_parts = order.flatten(), *(x.view(-1, 64, D) for x in (dk_parts, dv_parts))
    for x in range(grid[0]):
        near, (lo, hi, key, own) = x // pieces, items[x].tolist()
        alone, own = own >> 16, own & 0xFFFF
        which = low + near
        batch, head = divmod(which // chunks, heads)
        steps = -(-max(hi - lo, 0) // n)
        base = hi - max(steps, 1) * n
        assert 0 <= lo <= hi <= each and base < hi  # asked for ahead, even where nothing is to do
        masked = -(-(lo + own - base) // n)
        tiles = [torch.zeros(64, D) for _ in range(2)]
        for tile, source in zip(tiles, (k, v), strict=True):
            rows = source[batch, key : key + 64, head]
            tile[: len(rows)] = rows.float()
        sums = torch.zeros(2, 2, 64, D)
        for step in range(steps):
            e = base + step * n
            chosen = [int(order[which * each + max(e + j, lo)]) for j in range(n)]
            group = slice(head * G, head * G + G)
            rows, grads = (
                torch.cat([t[batch, c // slots, group] for c in chosen]).float() for t in (q, dout)
            )
            columns = e * G + torch.arange(64)
            if G < 8:  # not the copy engine, which gives zeros beyond the edge
                columns = columns.clamp(lo * G)
            three = lines[near * 3 : near * 3 + 3, columns.clamp(0, lines.shape[1] - 1)]
            lse, at, delta = torch.where((columns >= 0) & (columns < lines.shape[1]), three, 0.0)
            p = torch.exp2(tiles[0] @ rows.T * slope - lse)
            if step < masked:
                there = e + torch.arange(64) // G >= lo
                p = torch.where(((key + torch.arange(64))[:, None] <= at) & there, p, 0.0)
            ds = p * (tiles[1] @ grads.T - delta)
            sums[0, step % 2] += ds @ rows
            sums[1, step % 2] += p @ grads
            if not split:
                share = (ds.T @ tiles[0] * scale).view(n, G, D).to(shares.dtype)
                for j in range(n):
                    if e + j >= lo:
                        shares[(near - which % chunks) * each + chosen[j]] = share[j]
        if steps and alone:
            rows = slice(key, min(key + 64, n_k))
            for out, total in ((dk, sums[0].sum(0) * scale), (dv, sums[1].sum(0))):
                out[batch, rows, head] = total[: rows.stop - key].to(out.dtype)
        elif steps:
            dk_parts[x], dv_parts[x] = sums.sum(1)


def along_unions(grid, q, dout, k, v, dq, lse, delta, blocks, members, counts, split,
                 heads, nq, tiles, cap, own, slope, scale, *, D, G, **_):  # fmt: skip
    """``dq_kernel``: tile by tile, block by block of its union."""
    q, dout, k, v, dq = (x.base for x in (q, dout, k, v, dq))
    n = 128 // G
    for x in range(grid[0] if split else 0):
        bh, tile = x // tiles, tiles - 1 - x % tiles
        batch, head = divmod(bh, heads)
        rows, group = slice(tile * n, min(tile * n + n, nq)), slice(head * G, head * G + G)
        i = torch.arange(nq)[rows]
        total = torch.zeros(len(i), G, D)
        for u in range(int(counts[batch, head, tile])):
            block, chose = (int(t[batch, head, tile, u]) for t in (blocks, members))
            keys, values = (t[batch, block * 64 : block * 64 + 64, head].float() for t in (k, v))
            s = q[batch, rows, group].float() @ keys.T
            p = torch.exp2(s * slope - lse[batch, rows, group, None] * hopper_backward.LOG2E)
            seen = block * 64 + torch.arange(len(keys)) <= (i + own)[:, None]
            seen = seen & ((chose >> (i - tile * n)) & 1).bool()[:, None]
            dp = dout[batch, rows, group].float() @ values.T - delta[batch, rows, group, None]
            total += torch.where(seen[:, None], p * dp, 0.0) @ keys
        dq[batch, rows, group] = (total * scale).to(dq.dtype)


class Replaced:
    def __init__(self, function) -> None:
        self.function = function

    def __getitem__(self, grid):
        return lambda *tensors, **options: self.function(grid, *tensors, **options)


@pytest.fixture
def here(monkeypatch):
    """The two kernels in PyTorch, the rest in the interpreter."""
    if gluon.MISSING:
        pytest.skip(f"no Gluon here: {gluon.MISSING}")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels themselves are judged")
    monkeypatch.setattr(hopper_backward, "dkdv_kernel", Replaced(gathered))
    monkeypatch.setattr(hopper_backward, "dq_kernel", Replaced(along_unions))


SMALL = dict(d=64, block=64, dtype="float16")
CASES = [
    # several pieces and ranges; batch of two and an offset; sequences of one batch
    (Case(70, group=16, slots=2, pattern="messy", **SMALL), "fused", dict(workspace=1, piece=256)),
    (Case(6, 70, group=32, slots=2, batch=2, **SMALL), "split", {}),
    (Case(75, group=8, slots=2, lengths=(66, 0, 9), pattern="messy", **SMALL), None, {}),
    # rows that do not fill a box; an odd number of entries; entries of a piece bounded
    (Case(70, group=1, heads=2, slots=3, pattern="messy", **SMALL), None, dict(workspace=1)),
    (Case(33, 97, group=2, slots=3, batch=2, **SMALL), None, dict(piece=64)),
    (Case(6, 70, group=4, heads=2, slots=2, **SMALL), "split", {}),
    (Case(75, group=4, slots=2, lengths=(66, 0, 9), pattern="messy", **SMALL), None, {}),
]


@pytest.mark.parametrize(("case", "road", "options"), CASES, ids=str)
def test_lists_lines_and_sums_make_the_gradients(here, case, road, options):
    """Every row finds its query, every share its place, every partial sum its block."""
    check_backward(case, lambda *a: hopper_backward.backward(*a, road=road, **options))


@pytest.mark.parametrize("group", [1, 8])
def test_a_gradient_that_begins_between_two_sixteen_bytes_is_copied(here, monkeypatch, group):
    """As a part of another tensor's gradient may: dense, and yet nothing for 16 bytes at a time."""
    seen = []

    def look(grid, q, dout, *tensors, **options):
        seen.append(dout if group < 8 else dout.base)
        gathered(grid, q, dout, *tensors, **options)

    def shifted(dout, *rest):
        moved = torch.empty(dout.numel() + 3, dtype=dout.dtype)[3:].view(dout.shape).copy_(dout)
        assert moved.is_contiguous() and moved.data_ptr() % 16
        return hopper_backward.backward(moved, *rest)

    monkeypatch.setattr(hopper_backward, "dkdv_kernel", Replaced(look))
    check_backward(Case(70, group=group, slots=2, **SMALL), shifted)
    assert seen and all(x.data_ptr() % 16 == 0 for x in seen)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(200, group=1, heads=2, slots=3, pattern="messy", **SMALL), {}),
        (Case(200, group=1, slots=3, pattern="messy", **SMALL), dict(piece=64)),
        (Case(200, group=2, slots=3, **SMALL), dict(workspace=1)),
        (Case(97, 333, group=16, slots=3, batch=2, **SMALL), dict(piece=1024)),
        (Case(200, group=4, slots=3, lengths=(66, 0, 134), **SMALL), {}),
    ],
    ids=str,
)
def test_pieces_know_their_own_queries_and_whether_they_are_alone(here, monkeypatch, case, options):
    """Too many own queries would only cost time, and a mark that is never set would too."""
    pieces = []

    def look(grid, *tensors, **options):
        gathered(grid, *tensors, **options)
        (order, items), (low, _, chunks, per_list, each, slots) = tensors[6:8], tensors[19:25]
        order = order.reshape(-1, each)
        for x, (lo, hi, key, own) in enumerate(items[: grid[0]].tolist()):
            if lo < hi:
                chosen = order[low + x // per_list, lo:hi]
                pieces.append((low + x // per_list, chunks, key, own, chosen // slots))

    monkeypatch.setattr(hopper_backward, "dkdv_kernel", Replaced(look))
    q, k, v, dout, dlse, chosen = make(case)
    call = call_of(case)
    given = (dout, dlse, q, k, v, torch.zeros_like(q), torch.zeros_like(dlse), chosen, call)
    hopper_backward.backward(*given, road="fused", **options)
    lists = Counter((which, key) for which, _, key, _, _ in pieces)
    for which, chunks, key, own, queries in pieces:
        partly = queries + call.offset < key + 63  # they stand before the block's last key
        assert own & 0xFFFF == partly.sum()
        assert not (partly[1:] & ~partly[:-1]).any(), "own queries come first"
        alone = lists[which, key] == 1 and chunks == 1 and case.lengths is None
        assert own >> 16 == alone
    # What the cases are for: marked or not, with own queries or without.
    marked = {own >> 16 for _, _, _, own, _ in pieces}
    assert marked == ({0} if case.lengths or "workspace" in options else
                      {0, 1} if options else {1})  # fmt: skip


def test_the_road_follows_from_how_much_neighbours_share():
    """A number on the device: no host has to wait for it."""
    for pattern, slots, split in (("all", 4, 1), ("random", 8, 0)):
        case = Case(256, 4096, group=8, slots=slots, block=64, pattern=pattern)
        torch.manual_seed(0)
        chosen, call = choose(case), call_of(case)
        turned = hopper_backward._turn(chosen, call, 4096, 8, 64, 2**30, 8192)
        union, flag = hopper_backward._split(chosen, turned, call, 4096, 8, None)
        assert flag.tolist() == [split], pattern
        assert union[2].sum() * 128 >= (chosen >= 0).sum() * 8  # rows multiplied and asked for
        for road, wanted in (("fused", 0), ("split", 1)):
            _, flag = hopper_backward._split(chosen, turned, call, 4096, 8, road)
            assert flag.tolist() == [wanted]


# -- without a card ------------------------------------------------------------------------------

#: compiles what ``backward`` would launch, on empty CPU tensors
CHILD = """
import json, sys, torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from labkit.flash import _resources_child as child
from labkit.nsa import hopper_backward, lists
from labkit.nsa.call import Call
JITFunction.run = child._compile_only
lists.backend = lambda: "gpu"
child.wanted.update(("dkdv_kernel", "dq_kernel", "items_kernel", "sums_kernel"))
driver.set_active(child.Elsewhere(90))
for d, group in json.load(sys.stdin):
    child.compiled.clear()
    q, k = (torch.empty(1, 300, h, d, dtype=torch.bfloat16) for h in (2 * group, 2))
    call = Call(scale=0.1, max_q=300, max_k=300)
    chosen = torch.zeros(1, 300, 2, 4, dtype=torch.int32)
    hopper_backward.backward(
        q, None, q, k, k, q, torch.empty(1, 2 * group, 300), chosen, call, road="split"
    )
    found = {}
    for name, kernel in child.compiled:
        usage, sass = child._read_binary(kernel.asm["cubin"], name in ("dkdv_kernel", "dq_kernel"))
        found[name] = (usage, sass, kernel.metadata.shared)
    print(json.dumps(found))
"""

WANTED = [(128, 16)]


@pytest.fixture(scope="module")
def compiled():
    """{(head_dim, group): {kernel: (usage, SASS, bytes of shared memory)}}."""
    return compiled_elsewhere(CHILD, WANTED)


@pytest.mark.slow
def test_the_kernels_fit_the_card(compiled):
    for name, kernels in compiled.items():
        assert set(kernels) == {"dkdv_kernel", "dq_kernel", "items_kernel", "sums_kernel"}
        for kernel, (usage, _, shared) in kernels.items():
            numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
            assert shared <= 227 * 1024, (name, kernel)
            # Five products at head_dim 128 leave no register for some addresses: numbers that stay
            # the same through the loop are read back from the stack.  Nothing else may go there.
            spilled = int(numbers["STACK"]) + int(numbers["LOCAL"])
            assert spilled <= (192 if (name[0], kernel) == (128, "dkdv_kernel") else 0), kernel
            if kernel in ("dkdv_kernel", "dq_kernel"):
                # two consumers and the others: what every warp starts with
                assert int(numbers["REG"]) * 128 * 3 <= 65536, (name, kernel)


@pytest.mark.slow
def test_products_are_wgmma_and_what_they_should_be(compiled):
    for (d, _), kernels in compiled.items():
        # Steps of 16 of the sum: Sᵀ and dPᵀ over d, dV, dK and dQ over 64; two consumers.
        split, fused = 2 * d // 16 + 2 * 4, 2 * d // 16 + 3 * 4
        assert kernels["dkdv_kernel"][1].count("HGMMA.") == 2 * (split + fused)
        first, loop, last = 2 * d // 16, 2 * d // 16 + 4, 4
        assert kernels["dq_kernel"][1].count("HGMMA.") == 2 * (first + loop + last)
        for kernel in ("dkdv_kernel", "dq_kernel"):
            sass = kernels[kernel][1]
            assert not re.search(r"\bHMMA\.", sass)
            assert "UTMALDG" in sass and "UTMASTG" in sass and sass.count("USETMAXREG") >= 3


def test_without_a_hopper_card_there_is_a_reason(monkeypatch):
    q = torch.zeros(1, 300, 16, 128, dtype=torch.bfloat16)
    for thing in (q, None):
        assert hopper_backward.supports(thing, q, q, CALL) is False
    check_off_hopper(monkeypatch, lambda *qkv: hopper_backward.why_not(*qkv, CALL), q)


def test_reasons_name_what_is_wrong_with_the_tensors(monkeypatch):
    """What they say of tensors on a Hopper card, said here by pretending that this is one."""
    pretend(monkeypatch)

    def why(q, k=None, v=None, **call):
        k = q[:, :, :2] if k is None else k
        tensors = (x.as_subclass(OnHopper) for x in (q, k, k if v is None else v))
        return hopper_backward.why_not(*tensors, replace(CALL, **call))

    good = torch.zeros(2, 33, 32, 64, dtype=torch.float16)
    check_unreadable(why, good, good[:, :, :2])
    assert why(torch.zeros(2, 32, 33, 128, dtype=torch.bfloat16).transpose(1, 2)) is None
    assert "head_dim" in why(good[..., :32]) and "head_dim" in why(good, v=good[:, :, :2, :32])
    assert "block_size" in why(good, block_size=32) and "block_size" in why(good, block_size=128)
    for group in (3, 5, 12, 128):
        assert "group" in why(good[:, :, :1].repeat(1, 1, group, 1), good[:, :, :1])
    for group in (1, 2, 4, 8, 16, 32, 64):
        assert why(good[:, :, :1].repeat(1, 1, group, 1), good[:, :, :1]) is None
    long = torch.zeros(1, 1, 1, 64, dtype=torch.float16).expand(1, 2**24, 1, 64)
    assert "float32 counts" in why(good[:1, :, :16], long)


# -- on a card -------------------------------------------------------------------------------------

MATRIX = [
    Case(m, n, group=group, heads=2, d=d, block=64, slots=6, pattern=pattern, dtype=dtype)
    for m, n, group, d, pattern, dtype in (
        (1, 1, 16, 128, "random", "bfloat16"), (63, 63, 8, 64, "messy", "float16"),
        (65, 65, 16, 128, "messy", "bfloat16"), (130, 900, 32, 128, "messy", "float16"),
        (500, 500, 64, 64, "random", "bfloat16"), (1000, 1000, 16, 64, "messy", "bfloat16"),
        (1024, 1024, 8, 128, "random", "bfloat16"), (700, 700, 16, 128, "all", "float16"),
    )
]  # fmt: skip
MATRIX += [
    Case(300, group=16, d=128, block=64, slots=3, lengths=(100, 0, 1, 199), dtype="bfloat16"),
    Case(300, group=16, d=64, block=64, slots=3, pattern="nothing", dtype="float16"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("road", ["fused", "split", None])
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_gradients_on_a_hopper_card(case, road):
    q, k, v, *_ = make(case, "cuda")
    why = hopper_backward.why_not(q, k, v, call_of(case, "cuda"))
    if why == "not a Hopper card":
        pytest.skip(why)
    assert why is None
    check_backward(case, lambda *a: hopper_backward.backward(*a, road=road), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("road", ["fused", "split"])
def test_gradients_are_the_same_to_the_bit_each_time(road):
    case = Case(3000, group=16, heads=2, d=128, block=64, slots=16, dtype="bfloat16")
    q, k, v, dout, dlse, chosen = make(case, "cuda")
    call = call_of(case, "cuda")
    if not hopper_backward.supports(q, k, v, call):
        pytest.skip(hopper_backward.why_not(q, k, v, call))
    o, lse = truth(case, q, k, v, chosen, torch.float32)
    tensors = (dout, dlse, q, k, v, o.to(q.dtype), lse, chosen, call)
    first = hopper_backward.backward(*tensors, road=road)
    for _ in range(20):
        again = hopper_backward.backward(*tensors, road=road)
        assert all(map(torch.equal, again, first))
