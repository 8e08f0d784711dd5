"""Who chose what: the unions and the turned lists against Python's dictionaries."""

from __future__ import annotations

import re

import pytest
import torch
from hopper_reasons import compiled_elsewhere
from nsa_cases import Case, call_of, choose, offsets, positions

from labkit.nsa import lists

GPU = torch.cuda.is_available()

CASES = [
    Case(1, slots=1), Case(7, slots=3, heads=2), Case(64, 114, slots=4, pattern="messy"),
    Case(130, slots=3, block=32, batch=2, heads=2, pattern="messy"),
    Case(40, pattern="nothing"), Case(33, pattern="first", slots=2), Case(65, slots=5, block=64),
    Case(130, lengths=(5, 0, 60, 1, 64), slots=4, heads=2, pattern="messy"),
]  # fmt: skip


def counted(case: Case, chosen) -> list[list[list[dict[int, int]]]]:
    """Per batch, head and query: block → the first slot that names it, of those that count."""
    own = (positions(case) // case.block).tolist()
    out = []
    for rows in chosen.cpu().tolist():
        heads = []
        for h in range(case.heads):
            picks = []
            for i, row in enumerate(rows):
                pick = {}
                for slot, block in enumerate(row[h]):
                    if 0 <= block <= own[i]:
                        pick.setdefault(block, slot)
                picks.append(pick)
            heads.append(picks)
        out.append(heads)
    return out


def sequences(case: Case) -> list[tuple[int, int, int]]:
    """First query, one past the last, and first block of each sequence."""
    if case.lengths is None:
        return [(0, case.m, 0)]
    ends, blocks = offsets(case.lengths).tolist(), offsets(case.lengths, block=case.block).tolist()
    return list(zip(ends, ends[1:], blocks, strict=False))


def keys(case: Case) -> int:
    return case.n or case.m


@pytest.mark.parametrize("tile", [1, 4, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_union_holds_each_chosen_block_once_and_names_who_chose_it(case, tile, device):
    torch.manual_seed(1)
    chosen, call = choose(case, device), call_of(case, device)
    blocks, members, counts = (x.tolist() for x in lists.unions(chosen, tile, call, keys(case)))
    for b, picks in enumerate(counted(case, chosen)):
        for h, picks_h in enumerate(picks):
            x = 0
            for begin, end, _ in sequences(case):
                for first in range(begin, begin + call.max_q, tile):
                    want: dict[int, int] = {}
                    for i in range(first, min(first + tile, end)):
                        for block in picks_h[i]:
                            want[block] = want.get(block, 0) | 1 << (i - first)
                    n = counts[b][h][x]
                    assert blocks[b][h][x][:n] == sorted(want)
                    got = [m % 2**32 for m in members[b][h][x]]
                    assert got[:n] == [want[c] for c in sorted(want)]
                    assert set(blocks[b][h][x][n:]) <= {-1} and set(got[n:]) <= {0}
                    x += 1
            assert x == len(counts[b][h])


#: more than 32 blocks, which need several words; more than 256
MANY = [
    Case(257, block=5, slots=3, pattern="messy"), Case(70, 530, block=1, slots=6, pattern="messy"),
    Case(160, slots=40, block=4, pattern="all"),
    Case(365, lengths=(5, 0, 290, 70), slots=5, block=1, pattern="messy"),
]  # fmt: skip


@pytest.mark.parametrize(("queries", "groups"), [(64, 3), (16, 2)])
@pytest.mark.parametrize("case", CASES + MANY, ids=str)
def test_union_by_group_names_who_chose_a_block_in_words_of_each_group(
    case, queries, groups, device
):
    torch.manual_seed(1)
    chosen, call = choose(case, device), call_of(case, device)
    found = lists.unions_by_group(chosen, queries, groups, call)
    blocks, members, counts = (x.tolist() for x in found)
    tile, bits = queries * groups, min(queries, 32)
    for b, picks in enumerate(counted(case, chosen)):
        for h, picks_h in enumerate(picks):
            x = 0
            for begin, end, _ in sequences(case):
                for first in range(begin, begin + call.max_q, tile):
                    want: dict[int, list[int]] = {}
                    who: dict[int, int] = {}
                    for i in range(first, min(first + tile, end)):
                        word, bit = divmod(i - first, bits)
                        for block in picks_h[i]:
                            want.setdefault(block, [0] * (tile // bits))[word] |= 1 << bit
                            who[block] = who.get(block, 0) | 1 << (i - first) // queries
                    n = counts[b][h][x]
                    assert [c % 2**24 for c in blocks[b][h][x][:n]] == sorted(want)
                    assert [c >> 24 for c in blocks[b][h][x][:n]] == [who[c] for c in sorted(who)]
                    got = [[word % 2**32 for word in words] for words in members[b][h][x][:n]]
                    assert got == [want[c] for c in sorted(want)]
                    x += 1
            assert x == len(counts[b][h])


def turned(case: Case, picks, row: int, first: int = 0, last: int = 10**9, *, slots=False):
    """Queries ``first … last`` that chose the block of table row ``row``, ascending."""
    for begin, end, block in sequences(case):
        for i in range(max(begin, first), min(end, last)):
            slot = picks[i].get(row - block)
            if slot is not None and row >= block:
                yield i * case.slots + slot if slots else i


@pytest.fixture(params=[False, True], ids=["sorted", "counted"])
def counting(request, monkeypatch):
    """Both ways to turn lists; tiles are small here, so that a list has several."""
    monkeypatch.setattr(lists, "COUNTING", request.param)
    monkeypatch.setattr(lists, "_LEAST", 2**6)
    monkeypatch.setattr(lists, "_MOST", 2**6)
    return request.param


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_block_lists_its_queries_in_order(case, dtype, counting, device):
    torch.manual_seed(2)
    chosen, call = choose(case, device).to(dtype), call_of(case, device)
    order, starts = (x.tolist() for x in lists.by_block(chosen, call, keys(case)))
    rows = lists.block_rows(call, keys(case))
    assert rows >= sum(-(-n // case.block) for n in case.lengths or [keys(case)])
    for b, picks in enumerate(counted(case, chosen)):
        for h, picks_h in enumerate(picks):
            at = starts[b][h]
            assert len(at) == rows + 1 and at[0] == 0
            for row in range(rows):
                assert order[b][h][at[row] : at[row + 1]] == list(turned(case, picks_h, row))
            assert set(order[b][h][at[rows] :]) <= {-1}
            assert len(order[b][h]) == case.m * case.slots


@pytest.mark.parametrize("chunk", [16, 50, 1000])
def test_ranges_of_queries_have_lists_of_their_own_and_name_the_slots(chunk, counting, device):
    torch.manual_seed(3)
    for case in (CASES[3], CASES[7]):
        chosen, call = choose(case, device), call_of(case, device)
        length = min(chunk, case.m)
        order, starts, used = lists.by_slot(chosen, call, keys(case), length)
        for b, picks in enumerate(counted(case, chosen)):
            for h, picks_h in enumerate(picks):
                for r in range(starts.shape[2]):
                    at = starts[b, h, r].tolist()
                    found = order[b, h, r].tolist()
                    for row in range(len(at) - 1):
                        want = turned(case, picks_h, row, r * length, (r + 1) * length, slots=True)
                        assert found[at[row] : at[row + 1]] == list(want)
                    flags = torch.zeros(length * case.slots, dtype=torch.int8)
                    flags[[x - r * length * case.slots for x in found[: at[-1]]]] = 1
                    assert torch.equal(used[b, h, r].cpu(), flags)


def by_hand(case: Case, chosen, length: int):
    """``order``, ``starts``, ``used`` of ranges of ``length`` queries, by comparing everything."""
    ranges = -(-case.m // length)
    x = torch.full((case.batch, case.heads, ranges * length, case.slots), -1, device=chosen.device)
    x[:, :, : case.m] = chosen.transpose(1, 2)
    own = torch.full((ranges * length,), -1, device=x.device)
    own[: case.m] = positions(case, x.device) // case.block
    same = x[..., :, None] == x[..., None, :]
    left = torch.ones(case.slots, case.slots, dtype=torch.bool, device=x.device).tril(-1)
    fine = (x >= 0) & (x <= own[:, None]) & ~(same & left).any(-1)
    rows = -(-keys(case) // case.block)
    x, fine = (y.reshape(case.batch, case.heads, ranges, -1) for y in (x, fine))
    entry = torch.arange(ranges * length * case.slots, device=x.device).view(ranges, -1)
    order, starts = torch.full_like(x, -1), torch.zeros(*x.shape[:3], rows + 1, device=x.device)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
        b, h, r = at
        found = [entry[r][fine[b, h, r] & (x[b, h, r] == row)] for row in range(rows)]
        starts[b, h, r, 1:] = torch.tensor([len(y) for y in found]).cumsum(0)
        found = torch.cat(found)
        order[b, h, r, : len(found)] = found
    return order.int(), starts.int(), fine.to(torch.int8)


#: case, range, choices of a tile: slots that are no power of two, one slot, more blocks than that
TILED = [
    (Case(133, slots=5, block=16, batch=2, pattern="messy"), 133, 2**7),
    (Case(233, slots=5, block=32, heads=2, pattern="messy"), 140, 2**6),
    (Case(190, 700, slots=16, block=8, pattern="messy"), 190, 2**8),
    (Case(260, slots=1, block=2, pattern="messy"), 131, 2**6),
    (Case(97, 1500, slots=9, block=1, pattern="messy"), 50, 2**6),
    (Case(70, slots=33, block=1, pattern="all"), 70, 2**7),
    # more tiles than are summed at once
    (Case(270, slots=2, block=32, pattern="messy"), 270, 2**3),
]  # fmt: skip


@pytest.mark.parametrize(("case", "length", "width"), TILED, ids=str)
def test_counting_makes_the_lists_that_comparing_makes(case, length, width, device, monkeypatch):
    monkeypatch.setattr(lists, "COUNTING", True)
    monkeypatch.setattr(lists, "_LEAST", width)
    monkeypatch.setattr(lists, "_MOST", width)
    torch.manual_seed(5)
    chosen, call = choose(case, device), call_of(case, device)
    # heads before positions, and slots that do not lie side by side
    chosen = chosen.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    want = by_hand(case, chosen, length)
    assert case.pattern == "all" or (want[2] == 0).any()
    for got, expected in zip(lists.by_slot(chosen, call, keys(case), length), want, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    if length == case.m:
        order, starts = lists.by_block(chosen, call, keys(case))
        queries = torch.where(want[0] < 0, -1, want[0] // case.slots)
        assert torch.equal(order, queries[:, :, 0]) and torch.equal(starts, want[1][:, :, 0])


def test_a_query_may_name_one_block_in_all_its_slots(device, monkeypatch):
    monkeypatch.setattr(lists, "COUNTING", True)
    monkeypatch.setattr(lists, "_LEAST", 2**6)
    case = Case(64, slots=6, block=16)
    chosen, call = torch.zeros(1, 64, 1, 6, dtype=torch.int32, device=device), call_of(case, device)
    order, starts, used = lists.by_slot(chosen, call, 64, 64)
    assert order.flatten().tolist() == [*range(0, 64 * 6, 6), *[-1] * (64 * 5)]
    assert starts.flatten().tolist() == [0, 64, 64, 64, 64]
    assert used.flatten().tolist() == [1, 0, 0, 0, 0, 0] * 64


def test_the_network_that_is_compiled_sorts_too(device, monkeypatch):
    """Not the one that the interpreter is spared from."""
    monkeypatch.setattr(lists, "backend", lambda: "gpu")
    monkeypatch.setattr(lists, "_LEAST", 2**5)
    monkeypatch.setattr(lists, "_MOST", 2**5)
    case = Case(20, slots=3, block=2, pattern="messy")
    torch.manual_seed(6)
    chosen, call = choose(case, device), call_of(case, device)
    want = by_hand(case, chosen, 20)
    for got, expected in zip(lists.by_slot(chosen, call, 20, 20), want, strict=True):
        assert torch.equal(got, expected)


def test_lists_are_counted_where_a_tile_fits_and_rows_are_few(monkeypatch):
    call, varlen = call_of(Case(64)), call_of(Case(64, lengths=(60, 4)))
    assert lists._counts(128, 16, call) == GPU  # the interpreter sorts
    monkeypatch.setattr(lists, "backend", lambda: "gpu")
    assert lists._counts(2048, 16, call) and not lists._counts(2**17, 16, call)
    assert not lists._counts(128, 16, varlen) and not lists._counts(128, 2**12, call)
    monkeypatch.setattr(lists, "COUNTING", False)
    assert not lists._counts(128, 16, call)
    widths = [lists._log_width(rows, slots) for rows, slots in ((1, 1), (512, 16), (4096, 16))]
    assert widths == [9, 10, 10] and lists._log_width(1, 1025) == 11


def test_every_list_is_cut_into_pieces_that_cover_it_once(device):
    starts = torch.tensor([[0, 5, 5, 21, 22], [0, 0, 0, 0, 24]], dtype=torch.int32, device=device)
    owner, first = lists.parts(starts, 8, 24)
    assert first.tolist() == [[0, 1, 1, 3, 4], [0, 0, 0, 0, 3]]
    assert owner.tolist() == [[0, 2, 2, 3, 4, 4, 4], [3, 3, 3, 4, 4, 4, 4]]
    assert owner.dtype == first.dtype == torch.int32


#: compiles what ``by_slot`` would launch, on empty CPU tensors
CHILD = """
import json, sys, torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from labkit.flash import _resources_child as child
from labkit.nsa import lists
from labkit.nsa.call import Call
JITFunction.run = child._compile_only
lists.backend = lambda: "gpu"
child.wanted.update(["tile_kernel", "shift_kernel", "place_kernel"])
driver.set_active(child.Elsewhere(90))
for m, slots in json.load(sys.stdin):
    child.compiled.clear()
    chosen = torch.zeros(1, m, 1, slots, dtype=torch.int32)
    lists.by_slot(chosen, Call(scale=0.1, max_q=m, max_k=m), m, m)
    usage = [child._read_binary(kernel.asm["cubin"], False)[0] for _, kernel in child.compiled]
    print(json.dumps(usage))
"""


@pytest.mark.slow
def test_counting_spills_nothing():
    """For the smallest tile and the next, in which warps work together."""
    for name, usages in compiled_elsewhere(CHILD, [(8192, 16), (32768, 16)]).items():
        assert len(usages) == 3
        for usage in usages:
            numbers = dict(re.findall(r"\b(STACK|LOCAL):(\d+)", usage))
            assert numbers == {"STACK": "0", "LOCAL": "0"}, (name, usage)


@pytest.mark.gpu
def test_lists_never_wait_for_the_host():
    case = Case(4096, heads=4, slots=16, block=64)
    chosen, call = choose(case, "cuda"), call_of(case, "cuda")
    lists.unions(chosen, 16, call, case.m), lists.by_block(chosen, call, case.m)
    assert lists._counts(64, 16, call)
    lists.unions_by_group(chosen, 64, 3, call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        union = lists.unions(chosen, 16, call, case.m)
        wide = lists.unions_by_group(chosen, 64, 3, call)
        order, starts = lists.by_block(chosen, call, case.m)
        lists.parts(starts, 64, case.m * case.slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(union[2].max()) > 0 and int(wide[2].max()) > 0 and int(order.max()) == case.m - 1
