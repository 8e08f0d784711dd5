"""Attention to chosen blocks: O and LSE of every road against dense attention in float64.

Without a GPU the kernels run in the interpreter on cases in which each value of each factor
occurs; the full matrix, in which all pairs of values meet, needs a GPU.
"""

from __future__ import annotations

import pytest
import torch
from nsa_cases import Case, call_of, check_forward, make, truth
from triton.runtime.errors import OutOfResources

from labkit.experiments._flash_cases import covering
from labkit.flash.tuning import Config
from labkit.nsa import by_keys, selection

GPU = torch.cuda.is_available()
ROADS = ("queries", "keys")

SMALL = [
    Case(1), Case(15, group=3, d=24, d_v=40, slots=4, dtype="float16"),
    Case(33, group=1, heads=2, pattern="messy"), Case(20, 50, group=8, slots=4, scale=0.7),
    Case(3, 130, group=16, block=64, slots=2, dtype="float16"),
    Case(40, group=5, block=32, slots=4, d=64, strided=True, pattern="messy"),
    Case(60, lengths=(5, 0, 1, 54), group=4, heads=2, slots=4, pattern="messy"),
    Case(9, 140, group=2, block=128, slots=2, d=20, d_v=72), Case(17, 80, group=64, slots=4),
    Case(20, pattern="nothing"), Case(20, pattern="first", batch=2),
    Case(48, pattern="all"), Case(10, 90, block=48, slots=2), Case(4, 70, d=192, d_v=17, slots=4),
]  # fmt: skip

MATRIX = [
    Case(**row, heads=2, d=128, slots=6)
    for row in covering(
        {
            "m": (1, 15, 63, 64, 65, 127, 500, 1024),
            "group": (1, 2, 3, 8, 16, 64),
            "block": (16, 32, 64, 128),
            "dtype": ("bfloat16", "float16", "float32"),
            "pattern": ("random", "messy"),
        }
    )
] + [
    Case(4097, group=group, d=64, block=64, slots=16, dtype="bfloat16") for group in (1, 3, 16)
]  # fmt: skip


def run(road):
    return lambda q, k, v, chosen, call: selection.forward(q, k, v, chosen, call, road=road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_output_and_lse_are_within_twice_the_error_of_plain_attention(case, road, device):
    check_forward(case, run(road), device)


@pytest.mark.gpu
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_full_matrix(case, road):
    check_forward(case, run(road), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_float32_on_tensor_cores(precision, road):
    case = Case(500, group=8, d=128, block=64, slots=5)
    torch.manual_seed(0)
    q, k, v, _, _, chosen = make(case, "cuda")
    o, _ = selection.forward(q, k, v, chosen, call_of(case, "cuda", precision), road=road)
    want, _ = truth(case, q, k, v, chosen)
    ratio = ((o.double() - want).norm() / want.norm()).item()
    assert ratio < (2e-6 if precision == "tf32x3" else 2e-3)


# -- what follows from the definition -------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
def test_what_a_query_did_not_choose_cannot_reach_it(road, device):
    case = Case(40, block=16, slots=2, group=2)
    q, k, v, _, _, _ = make(case, device)
    chosen = torch.full((1, 40, 1, 2), 0, device=device)  # block 0 twice, nothing else
    k[:, 16:] = v[:, 16:] = float("nan")
    o, lse = selection.forward(q, k, v, chosen, call_of(case, device), road=road)
    assert torch.isfinite(o).all() and torch.isfinite(lse).all()


@pytest.mark.parametrize("road", ROADS)
def test_no_query_sees_its_future(road, device):
    case = Case(70, block=16, slots=3, group=2, pattern="messy")
    q, k, v, _, _, chosen = make(case, device)
    call = call_of(case, device)
    o, lse = selection.forward(q, k, v, chosen, call, road=road)
    for t in (0, 15, 40):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, t + 1 :] = 1e4
        later_v[:, t + 1 :] = -1e4
        o2, lse2 = selection.forward(q, later_k, later_v, chosen, call, road=road)
        assert torch.equal(o[:, : t + 1], o2[:, : t + 1])
        assert torch.equal(lse[..., : t + 1], lse2[..., : t + 1])


@pytest.mark.parametrize("road", ROADS)
def test_how_a_choice_is_written_does_not_matter(road, device):
    """Order of the slots, int32 or int64, padding, a block named twice, one that does not exist."""
    case = Case(50, block=16, slots=3, group=2)
    q, k, v, _, _, chosen = make(case, device)
    call = call_of(case, device)
    o, lse = selection.forward(q, k, v, chosen, call, road=road)
    pads = torch.tensor([-1, 99], device=device).expand(1, 50, 1, 2)
    other = torch.cat([pads, chosen.flip(-1), chosen[..., :1]], -1).int()
    o2, lse2 = selection.forward(q, k, v, other, call, road=road)
    torch.testing.assert_close(o2, o, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse2, lse, rtol=1e-5, atol=1e-6)


def test_choice_may_be_a_view(device):
    case = Case(20, block=16, slots=2, heads=2, group=1)
    q, k, v, _, _, chosen = make(case, device)
    call = call_of(case, device)
    view = chosen.transpose(1, 2).contiguous().transpose(1, 2)
    for road in ROADS:
        one, two = (selection.forward(q, k, v, x, call, road=road)[0] for x in (chosen, view))
        assert torch.equal(one, two)


def test_groups_of_lists_and_ranges_of_queries_give_the_same(device, monkeypatch):
    monkeypatch.setattr(by_keys, "RANGE", 16)
    case = Case(90, block=16, slots=3, group=2, heads=2, dtype="float16", pattern="messy")
    q, k, v, _, _, chosen = make(case, device)
    call = call_of(case, device)
    o, lse = by_keys.forward(q, k, v, chosen, call)
    row = 2 * 16 + 4
    for share, ranges, groups in ((1.0, 1, 2), (0.3, 4, 8)):
        workspace = int(90 * 3 * 2 * row * share) + 1
        c = by_keys._configs(q, v)[0]
        turned = by_keys.turn(chosen, call, 90, 2, c, row, 0, workspace)
        assert turned.chunks == ranges and len(list(turned.groups())) == groups
        o2, lse2 = by_keys.forward(q, k, v, chosen, call, workspace=workspace)
        # A row lies elsewhere in its tile: on a GPU that changes nothing, NumPy rounds otherwise.
        same = torch.equal if GPU else torch.testing.assert_close
        assert same(o, o2) is not False and same(lse, lse2) is not False


def test_everybodys_block_is_cut_into_pieces(device, monkeypatch):
    monkeypatch.setattr(by_keys, "PIECE", 32)
    check_forward(Case(70, group=2, pattern="first"), run("keys"), device)


def test_a_configuration_that_does_not_fit_makes_room_for_the_next(monkeypatch):
    monkeypatch.setattr(by_keys, "_chosen", {})
    small, large = Config(16, 16), Config(64, 64)
    ran = []

    def run(config):
        if config is large:
            raise OutOfResources(2**20, 2**17, "shared memory")
        ran.append(config)

    by_keys.best(("a",), [large, small], 1.0, run)
    assert ran == [small] and by_keys._chosen == {}, "small work does not decide for large"
    monkeypatch.setenv("LABKIT_TUNE", "0")
    by_keys.best(("a",), [large, small], 1e15, run)
    assert by_keys._chosen == {("a",): small}
    with pytest.raises(OutOfResources):
        by_keys.best(("b",), [large], 1.0, run)


def test_nothing_to_attend_to_gives_zero(device):
    case = Case(5)
    q, k, v, _, _, chosen = make(case, device)
    for choice in (chosen[..., :0], torch.full_like(chosen, -1)):
        for road in (None, *ROADS):
            o, lse = selection.forward(q, k, v, choice, call_of(case, device), road=road)
            assert (o == 0).all() and torch.isneginf(lse).all()


def test_small_groups_go_by_keys_and_large_ones_by_queries(device, monkeypatch):
    went = []
    monkeypatch.setattr(by_keys, "forward", lambda *a, base: went.append("keys"))
    monkeypatch.setattr(selection, "by_queries", lambda *a: went.append("queries"))
    monkeypatch.setattr(selection, "hopper", lambda module: None)
    for case in (Case(2048, group=2), Case(2048, group=16), Case(10, group=2)):
        q, k, v, _, _, chosen = make(case, device)
        selection.forward(q, k, v, chosen, call_of(case, device))
    assert went == ["keys", "queries", "queries"]


@pytest.mark.gpu
@pytest.mark.parametrize("road", ROADS)
def test_repeats_are_equal_to_the_bit(road):
    case = Case(1024, group=16, d=128, block=64, slots=16, dtype="bfloat16")
    q, k, v, _, _, chosen = make(case, "cuda")
    call = call_of(case, "cuda")
    first = selection.forward(q, k, v, chosen, call, road=road)
    for _ in range(50):
        again = selection.forward(q, k, v, chosen, call, road=road)
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@pytest.mark.parametrize("road", ROADS)
def test_offsets_beyond_32_bits(road):
    """q, k and v are views of tensors with more than 2³¹ elements, read at their far end."""
    n, group, d = 1100, 4, 64
    wide = torch.zeros(1, n, group, 2**31 // (n * group) + 4096, device="cuda", dtype=torch.float16)
    assert wide.numel() > 2**31
    q = wide[..., -d:]
    q.normal_()
    case = Case(n, group=group, d=d, block=64, slots=4, dtype="float16")
    _, k, v, _, _, chosen = make(case, "cuda")
    o, lse = selection.forward(q, k, v, chosen, call_of(case, "cuda"), road=road)
    want, want_lse = selection.forward(
        q.contiguous(), k, v, chosen, call_of(case, "cuda"), road=road
    )
    assert torch.equal(o, want) and torch.equal(lse, want_lse)
