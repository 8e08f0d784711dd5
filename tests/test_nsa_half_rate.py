"""Half rate: what source 000 describes, row by row, and what it leaves of the full form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from labkit.errors import ArgumentError
from labkit.nsa import reference
from labkit.nsa.half_rate import computed_rows, copy_even_rows, source_rows, spread
from labkit.nsa.reference import (
    naive_nsa,
    naive_nsa_compression,
    naive_nsa_compression_varlen,
    naive_nsa_with_compression,
)

CU = torch.tensor([0, 5, 5, 40, 41, 104])


def draw(n, *, batch=1, heads=2, group=2, d=8):
    shapes = [(batch, n, heads * group, d)] + [(batch, n, heads, d)] * 2
    shapes += [(batch, n, heads * group)] * 3
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def by_hand(x, cu_seqlens=None):
    """Odd positions of each sequence replaced, one row at a time."""
    x = x.clone()
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for a, b in pairwise(ends):
        for t in range(1, b - a, 2):
            x[:, a + t] = x[:, a + t - 1]
    return x


@pytest.mark.parametrize("cu_seqlens", [None, CU], ids=["batch", "varlen"])
def test_which_row_is_shown_where(cu_seqlens):
    rows = torch.arange(104)[None]
    shown = source_rows(104, cu_seqlens)
    assert torch.equal(shown, by_hand(rows, cu_seqlens)[0])
    assert torch.equal(copy_even_rows(rows, cu_seqlens), shown[None])
    assert computed_rows(104, cu_seqlens).tolist() == sorted(set(shown.tolist()))


def test_an_odd_length_ends_with_a_computed_row():
    assert source_rows(5).tolist() == [0, 0, 2, 2, 4]
    assert computed_rows(5).tolist() == [0, 2, 4]
    x = torch.randn(2, 5, 3)
    assert torch.equal(spread(x[:, ::2], 5), copy_even_rows(x))


@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_selection_and_window_compute_even_rows_and_copy_them(n):
    q, k, v, _, g_slc, g_swa = draw(n, batch=2)
    chosen = torch.randint(-1, -(-n // 16), (2, n, 2, 3))
    counts = torch.randint(0, 4, (2, n, 2))
    arguments = q, k, v, g_slc, g_swa, chosen, counts, 16, 9
    full = naive_nsa(*arguments)
    torch.testing.assert_close(
        naive_nsa(*arguments, half_rate=True), by_hand(full), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_compression_copies_its_output_and_its_choice(n):
    q, k, v, g_cmp, *_ = draw(n, batch=2)
    chosen, o = naive_nsa_compression(q, k, v, g_cmp, 2, 16, None)
    half_chosen, half = naive_nsa_compression(q, k, v, g_cmp, 2, 16, None, half_rate=True)
    assert torch.equal(half_chosen, by_hand(chosen))
    assert torch.equal(half, by_hand(o))
    if n == 64:  # position 15 completes block 0 and would see it; its copy of position 14 does not
        assert o[:, 15].any() and not half[:, 15].any()


def test_the_whole_layer_is_the_full_one_at_even_positions():
    arguments = draw(63, batch=2)
    full = naive_nsa_with_compression(*arguments, 3, 16, 9)
    half = naive_nsa_with_compression(*arguments, 3, 16, 9, half_rate=True)
    torch.testing.assert_close(half, by_hand(full), rtol=0, atol=1e-14)
    assert not torch.allclose(half[:, 1::2], full[:, 1::2])


def test_each_sequence_begins_with_a_computed_row():
    arguments = draw(104)
    full, chosen = naive_nsa_with_compression(
        *arguments, 3, 16, 9, cu_seqlens=CU, return_block_indices=True
    )
    half, half_chosen = naive_nsa_with_compression(
        *arguments, 3, 16, 9, cu_seqlens=CU, half_rate=True, return_block_indices=True
    )
    torch.testing.assert_close(half, by_hand(full, CU), rtol=0, atol=1e-14)
    assert torch.equal(half_chosen, by_hand(chosen, CU))
    q, k, v, g_cmp, *_ = arguments
    alone, _ = naive_nsa_compression_varlen(q, k, v, g_cmp, 3, 16, None, CU, half_rate=True)
    assert torch.equal(alone, half_chosen)


def test_only_even_rows_are_computed(monkeypatch):
    rows = []
    selected, window = reference._selected, reference._window

    def spy(function):
        def wrapped(q, *arguments, **options):
            rows.append((q.shape[1], options["at"].tolist()))
            return function(q, *arguments, **options)

        return wrapped

    monkeypatch.setattr(reference, "_selected", spy(selected))
    monkeypatch.setattr(reference, "_window", spy(window))
    naive_nsa_with_compression(*draw(21), 2, 16, 9, half_rate=True)
    assert rows == [(11, list(range(0, 21, 2)))] * 2


def test_heads_first_goes_with_half_rate():
    arguments = draw(21)
    half = naive_nsa_with_compression(*arguments, 2, 16, 9, half_rate=True)
    turned = naive_nsa_with_compression(
        *(x.transpose(1, 2) for x in arguments), 2, 16, 9, head_first=True, half_rate=True
    )
    assert torch.equal(turned.transpose(1, 2), half)


def test_a_copy_sends_its_gradient_to_the_row_it_copies():
    leaves = [x.requires_grad_() for x in draw(20)]
    o = naive_nsa_with_compression(*leaves, 2, 16, 9, half_rate=True)
    dout = torch.randn_like(o)
    ours = torch.autograd.grad(o, leaves, dout)
    for name, x in zip(("q", "g_cmp", "g_slc", "g_swa"), (ours[0], *ours[3:]), strict=True):
        assert not x[:, 1::2].any(), f"{name} of an odd position is never read"
    assert ours[0][:, 2::2].any()
    # The full form, where even rows receive what both would: the same gradients.
    full = naive_nsa_with_compression(*leaves, 2, 16, 9)
    both = torch.zeros_like(dout)
    both[:, ::2] = dout[:, ::2] + dout[:, 1::2]
    for a, b in zip(ours, torch.autograd.grad(full, leaves, both), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_an_odd_position_no_longer_sees_itself():
    q, k, v, *gates = draw(20)
    before = naive_nsa_with_compression(q, k, v, *gates, 2, 16, 9, half_rate=True)
    v[:, 7] += 100
    after = naive_nsa_with_compression(q, k, v, *gates, 2, 16, 9, half_rate=True)
    assert torch.equal(after[:, :8], before[:, :8])  # the full form's row 7 changes
    assert not torch.allclose(after[:, 8], before[:, 8])


def test_decoding_has_no_row_to_copy():
    q, k, v, *gates = draw(20)
    last = [x[:, -1:] for x in (q, *gates)]
    with pytest.raises(ArgumentError, match="as many queries as keys, and got 1 and 20"):
        naive_nsa_with_compression(last[0], k, v, *last[1:], 2, 16, 9, half_rate=True)
