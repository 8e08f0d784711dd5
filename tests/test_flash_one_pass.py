"""The backward with atomic additions, which chapter 09 measures: right, or refused by name."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_within_low_precision_error, gradients_f64, gradients_plain

from labkit.errors import ArgumentError
from labkit.flash import flash_attention
from labkit.flash.one_pass import one_pass
from labkit.flash.tuning import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Config(16, 32, 4, 1)


def problem(n=64, d=16, heads=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(1, heads, n, d, generator=g).to(dtype) for _ in range(4))
    return [t.to(DEVICE) for t in (q, k, v, dout)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", [SMALL, Config(32, 16, 4, 1)])
def test_gradients_err_no_more_than_plain_attention(causal, dtype, config):
    q, k, v, dout = problem(dtype=dtype)
    out, lse = flash_attention(q, k, v, causal=causal, return_lse=True)
    ours = one_pass(q, k, v, out, lse, dout, causal=causal, config=config)
    oracle = gradients_f64(q, k, v, dout, causal=causal)
    plain = gradients_plain(q, k, v, dout, causal=causal)
    for name, mine, true, simple in zip(("dq", "dk", "dv"), ours, oracle, plain, strict=True):
        assert_within_low_precision_error(mine, true, simple, what=name)


def test_scale_is_used():
    q, k, v, dout = problem()
    out, lse = flash_attention(q, k, v, scale=0.7, return_lse=True)
    ours = one_pass(q, k, v, out, lse, dout, scale=0.7, config=SMALL)
    for mine, true in zip(ours, gradients_f64(q, k, v, dout, scale=0.7), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    q, k, v, dout = problem(n=48)
    lse = torch.zeros(1, 2, 48, device=DEVICE)
    with pytest.raises(ArgumentError, match="no multiple of 16 and 32"):
        one_pass(q, k, v, q, lse, dout, config=SMALL)
    q, k, v, dout = problem()
    with pytest.raises(ArgumentError, match=r"dout\.shape"):
        one_pass(q, k, v, q, lse, dout[:, :1], config=SMALL)
    with pytest.raises(ArgumentError, match=r"k\.shape"):
        one_pass(q, k[:, :1], v[:, :1], q, lse, dout, config=SMALL)


@pytest.mark.gpu
def test_runs_at_the_size_that_is_measured():
    q, k, v, dout = problem(n=1024, d=128, dtype=torch.bfloat16)
    out, lse = flash_attention(q, k, v, return_lse=True)
    oracle, plain = gradients_f64(q, k, v, dout), gradients_plain(q, k, v, dout)
    for descriptors in (False, True):
        if descriptors and torch.cuda.get_device_capability() < (9, 0):
            continue
        config = Config(64, 64, 4, 2, descriptors)
        ours = one_pass(q, k, v, out, lse, dout, config=config)
        for mine, true, simple in zip(ours, oracle, plain, strict=True):
            assert_within_low_precision_error(mine, true, simple)
