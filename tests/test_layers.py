"""One layer, five backends, the same weights; judged by a layer that is written by the book."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_within_low_precision_error, hidden_pairs
from torch.nn import functional as F

from labkit.errors import ArgumentError
from labkit.layers import (
    BACKENDS,
    AttentionLayer,
    TransformerModel,
    attend,
    available,
)
from labkit.patterns import Clustered, Hierarchical, Local, Random, Strided

DENSE = ("naive", "tiled", "flash", "sdpa")
NSA = {"block_size": 16, "block_counts": 2, "window_size": 8}
REFERENCE = {**NSA, "implementation": "reference"}
DIM, HEADS = 32, 2


def layer(backend="sdpa", *, dim=DIM, heads=HEADS, seed=0, spread=3.0, **options):
    """A layer with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    made = AttentionLayer(dim, heads, backend=backend, **options)
    with torch.no_grad():
        for p in (made.q_proj.weight, made.k_proj.weight):
            p.mul_(spread)
        for name, p in made.named_parameters():
            if name.startswith("norm"):
                p.add_(0.2 * torch.randn_like(p))
    return made


def by_the_book(x, weights, *, heads, causal, seen=None, gated=False):
    """The layer from its equations, in the dtype of x: shares no line with labkit."""

    def linear(name, y):
        return F.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, y):
        return F.layer_norm(y, y.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(hidden):
        s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        p = torch.softmax(s.masked_fill(hidden, float("-inf")), dim=-1)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    n, width = x.shape[1], x.shape[2] // heads
    y = norm("norm1", x)
    q, k, v = (linear(f"{c}_proj", y).unflatten(-1, (-1, width)) for c in "qkv")
    k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
    hidden = hidden_pairs(n, n, causal=causal, device=x.device)
    o = attention(hidden if seen is None else hidden | ~seen)
    if gated:
        w = torch.sigmoid(linear("mixer", y))[..., None]
        o = w * o + (1 - w) * attention(hidden)
    x = x + linear("out_proj", o.flatten(2))
    return x + linear("ff.2", F.gelu(linear("ff.0", norm("norm2", x))))


def results(run, x, weights, dout):
    """Output, gradient of x and of each weight, by name."""
    leaves = {"x": x, **weights}
    out = run(x, weights)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def check_against_f64(made, x, *, seen=None, factor=3.0):
    """Output and every gradient within the error of the same layer by the book in its dtype."""
    how = {"heads": made.num_heads, "causal": made.causal, "seen": seen, "gated": made.gate}
    dout = torch.randn_like(x)

    def by_book(dtype):
        weights = {n: p.detach().to(dtype).requires_grad_() for n, p in made.named_parameters()}
        return results(
            lambda x, w: by_the_book(x, w, **how), x.to(dtype).requires_grad_(), weights,
            dout.to(dtype),
        )  # fmt: skip

    ours = results(
        lambda x, w: made(x), x.clone().requires_grad_(), dict(made.named_parameters()), dout
    )
    oracle, plain = by_book(torch.float64), by_book(x.dtype)
    for name, value in ours.items():
        terms = oracle["v_proj.bias"].abs().max()
        if oracle[name].abs().max() <= 1e-13 * terms:
            # Nothing depends on it: softmax does not see what all keys have in common, and of a
            # single key nothing at all.  What is left of a sum is rounding, of its terms' size.
            assert value.abs().max() <= 8 * torch.finfo(x.dtype).eps * terms, name
            continue
        assert_within_low_precision_error(
            value, oracle[name], plain[name], factor=2.0 if name == "output" else factor, what=name
        )


# -- they agree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["naive", "tiled", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "n", "kv", "causal"),
    [
        (torch.float64, 97, 1, True),
        (torch.float32, 1, 2, True),
        (torch.float32, 97, 1, True),
        (torch.float32, 65, 2, False),
        (torch.float16, 97, 1, True),
        (torch.float16, 33, 2, False),
    ],
)
def test_backend_computes_the_layer_and_its_gradients(backend, dtype, n, kv, causal):
    made = layer(backend, num_kv_heads=kv, causal=causal).to(dtype)
    check_against_f64(made, torch.randn(1, n, DIM, dtype=dtype))


@pytest.mark.parametrize(("kv", "causal"), [(1, True), (2, False)])
def test_flash_computes_the_layer_and_its_gradients(device, kv, causal):
    made = layer("flash", num_kv_heads=kv, causal=causal).to(device)
    check_against_f64(made, torch.randn(1, 19, DIM, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "kv", "causal"), [(1, 4, True), (333, 2, True), (512, 4, False)])
def test_backend_computes_the_layer_and_its_gradients_on_a_gpu(backend, dtype, n, kv, causal):
    made = layer(backend, dim=256, heads=4, num_kv_heads=kv, causal=causal, spread=1.5)
    check_against_f64(made.to("cuda", dtype), torch.randn(2, n, 256, device="cuda", dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_backends_agree_under_autocast(dtype):
    x = torch.randn(2, 65, DIM)
    exact = layer("naive").double()(x.double()).detach()
    errors = {}
    for backend in ("naive", "tiled", "sdpa"):
        with torch.autocast("cpu", dtype):
            out = layer(backend)(x)
        assert out.dtype == torch.float32  # the residual stream stays wide
        errors[backend] = (out - exact).abs().max().item()
    # one rounding of each product: more than float32 makes, and of the same size everywhere
    eps = torch.finfo(dtype).eps
    assert all(eps / 20 < error < 4 * eps for error in errors.values()), errors
    assert max(errors.values()) < 2 * min(errors.values()), errors


def test_autocast_does_not_reach_into_the_tiles():
    q, k, v = (3 * torch.randn(1, 2, 70, 16).half() for _ in range(3))
    alone = attend(q, k, v, backend="tiled")
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(attend(q, k, v, backend="tiled"), alone)


def test_nsa_with_its_window_alone_is_dense_attention():
    made = layer("nsa", nsa={**REFERENCE, "window_size": 64}, num_kv_heads=1).double()
    with torch.no_grad():
        made.gates.weight.zero_()
        made.gates.bias.copy_(torch.tensor([-1e3, -1e3, 1e3]).repeat_interleave(HEADS))
    dense = made.to_backend("naive")
    x, dout = torch.randn(2, 2, 33, DIM, dtype=torch.float64)
    ours, theirs = (dict(m.named_parameters()) for m in (made, dense))
    assert set(ours) - set(theirs) == {"gates.weight", "gates.bias"}
    ours = results(lambda x, w: made(x), x.clone().requires_grad_(),
                   {n: ours[n] for n in theirs}, dout)  # fmt: skip
    theirs = results(lambda x, w: dense(x), x.clone().requires_grad_(), theirs, dout)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=name)


def test_nsa_kernels_compute_what_the_reference_does(device):
    made = layer("nsa", dim=16, heads=1, nsa=NSA).to(device)
    x = torch.randn(1, 35, 16, device=device)
    reference = made.to_backend("nsa", nsa=REFERENCE)
    assert reference.nsa["implementation"] == "reference"
    with torch.no_grad():
        exact = reference.double()(x.double())
        plain, ours = reference.float()(x), made(x)
    assert (plain - made.to_backend("sdpa")(x)).abs().max() > 0.01  # it is another function
    assert_within_low_precision_error(ours, exact, plain)


@pytest.mark.parametrize("pattern", [None, Strided(5, window=3)], ids=str)
def test_tiled_keeps_nothing_that_grows_with_the_square(pattern):
    n = 256
    biggest = {}
    for backend in ("naive", "tiled"):
        made, sizes = layer(backend, heads=4, pattern=pattern), []

        def pack(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made(torch.randn(1, n, DIM))
        biggest[backend] = max(sizes)
    assert biggest["naive"] == 4 * n * n
    assert biggest["tiled"] == 4 * DIM * n  # the widest activation of the feed-forward part


@pytest.mark.parametrize("pattern", [None, Local(7), Strided(5, window=3)], ids=str)
def test_derivatives_of_a_function_go_through_tiled(pattern):
    q, k, v, dout = torch.randn(4, 1, 2, 35, 16)

    def value(q, k, v):
        return (attend(q, k, v, backend="tiled", pattern=pattern) * dout).sum()

    found = torch.func.grad(value, argnums=(0, 1, 2))(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for a, b in zip(found, torch.autograd.grad(value(*leaves), leaves), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="vmap support"):
        torch.func.vmap(lambda q: value(q, k, v))(q[None])


def test_causal_attention_of_the_last_queries_aligns_with_the_last_keys():
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (5, 12, 12))
    expected = attend(q, k, v, backend="naive")
    for backend in ("tiled", "sdpa"):
        torch.testing.assert_close(attend(q, k, v, backend=backend), expected)
    unseeing = attend(k, q, q, backend="naive")  # 12 queries, 5 keys: seven of them see nothing
    assert not unseeing[:, :, :7].any()
    assert unseeing[:, :, 7:].any()
    for backend in ("tiled", "sdpa"):
        torch.testing.assert_close(attend(k, q, q, backend=backend), unseeing)


# -- patterns --------------------------------------------------------------------------------------

WAYS = [("naive", "mask"), ("sdpa", "mask"), ("tiled", "blocks")]
CASES = [
    (Local(7), False),
    (Strided(5, window=3), True),
    (Random(4), False),
    (Clustered(4), False),
    (Hierarchical(4, 3), False),
]


@pytest.mark.parametrize(("backend", "sparse"), WAYS)
@pytest.mark.parametrize(("pattern", "gate"), CASES, ids=str)
def test_pattern_hides_what_it_says(backend, sparse, pattern, gate):
    n, causal = 49, pattern.name != "clustered"
    made = layer(backend, pattern=pattern, sparse=sparse, gate=gate, causal=causal)
    seen = pattern.dense_mask(n, causal=causal)
    everything = n * (n + 1) // 2 if causal else n * n
    assert n < seen.sum() < everything
    check_against_f64(made, torch.randn(1, n, DIM), seen=seen)


def test_window_of_the_kernel_is_the_local_pattern(device):
    made = layer("flash", window=4).to(device)
    assert made.pattern == Local(4)
    seen = Local(4).dense_mask(19, causal=True, device=device)
    check_against_f64(made, torch.randn(1, 19, DIM, device=device), seen=seen)


def test_blocks_through_flex_attention():
    made = layer("flash", pattern="strided")
    assert made._how == layer("sdpa", window=4, sparse="blocks")._how == "flex"
    x = torch.randn(1, 70, DIM)
    with torch.no_grad():
        torch.testing.assert_close(made(x), made.to_backend("naive")(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match=r'no backward pass on a CPU.*backend="tiled"'):
        made(x)


def test_heads_too_narrow_for_flex_attention_are_sent_to_a_backend():
    from labkit.layers.attention import check_flex

    check_flex(torch.device("cuda"), True, 16)
    check_flex(torch.device("cpu"), False, 8)
    with pytest.raises(ArgumentError, match=r'16 or wider, not of 8.*backend="tiled"'):
        check_flex(torch.device("cuda"), False, 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "flash", "window": 4, "sparse": "mask"}, "sparse.*flash.*sdpa"),
        ({"backend": "tiled", "window": 4, "sparse": "mask"}, "sparse.*tiled.*sdpa"),
        ({"backend": "naive", "window": 4, "sparse": "blocks"}, "sparse.*naive.*mask"),
        ({"backend": "nsa", "window": 4}, "pattern.*chooses its keys itself.*window_size"),
        ({"backend": "sdpa", "pattern": "lokal"}, "lokal.*Did you mean 'local'.*strided"),
        ({"backend": "sdpa", "pattern": 3}, "pattern.*local, strided"),
        ({"backend": "sdpa", "pattern": "local", "window": 4}, "window.*one of them"),
        ({"backend": "sdpa", "window": 0}, "window"),
        ({"backend": "sdpa", "sparse": "tiles"}, "sparse.*mask, blocks"),
        ({"backend": "sdpa", "sparse": "mask"}, "sparse.*there is none.*a window"),
        ({"backend": "sdpa", "gate": True}, "gate.*nothing to mix"),
    ],
)
def test_pattern_that_cannot_be_is_refused(options, says):
    with pytest.raises(ArgumentError, match=says):
        AttentionLayer(DIM, HEADS, **options)


# -- weights ---------------------------------------------------------------------------------------

KINDS = [
    {"backend": "naive"},
    {"backend": "tiled", "window": 4},
    {"backend": "flash"},
    {"backend": "sdpa", "window": 4, "gate": True},
    {"backend": "nsa", "nsa": REFERENCE},
]


@pytest.mark.parametrize("of", KINDS, ids=lambda o: o["backend"])
@pytest.mark.parametrize("into", KINDS, ids=lambda o: o["backend"])
def test_state_dicts_load_strictly_across_backends(of, into):
    theirs = TransformerModel(DIM, HEADS, 2, num_kv_heads=1, **of).state_dict()
    ours = TransformerModel(DIM, HEADS, 2, num_kv_heads=1, **into)
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    loaded = ours.load_state_dict(theirs, strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    for name, p in ours.state_dict().items():
        assert torch.equal(p, theirs.get(name, before[name])), name
    shared = {"norm1", "q_proj", "k_proj", "v_proj", "out_proj", "norm2", "ff.0", "ff.2"}
    extra = {"nsa": {"gates"}, "sdpa": {"mixer"}}.get(into["backend"], set())
    parts = {n.removeprefix("layers.0.").rpartition(".")[0] for n in before if "layers.0" in n}
    assert parts == shared | extra
    assert {n for n in theirs if n not in before} <= {
        f"layers.{i}.{part}.{p}" for i in (0, 1) for part in ("gates", "mixer")
        for p in ("weight", "bias")
    }  # fmt: skip


def test_half_a_gate_or_another_size_does_not_load():
    made = AttentionLayer(DIM, HEADS, backend="nsa", nsa=REFERENCE)
    state = made.state_dict()
    del state["gates.bias"]
    with pytest.raises(RuntimeError, match=r"gates\.bias"):
        made.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"k_proj\.weight"):
        AttentionLayer(DIM, HEADS, num_kv_heads=1).load_state_dict(made.state_dict())
    with pytest.raises(RuntimeError, match=r"extra"):
        made.load_state_dict({**made.state_dict(), "extra": torch.zeros(1)})


def test_one_seed_gives_the_same_weights_to_every_backend():
    states = []
    for options in KINDS:
        torch.manual_seed(3)
        states.append(AttentionLayer(DIM, HEADS, **options).state_dict())
    for state in states[1:]:
        assert all(torch.equal(p, state[name]) for name, p in states[0].items())


def test_to_backend_copies_weights_and_keeps_options():
    model = TransformerModel(
        DIM, HEADS, 2, backend="naive", window=5, causal=False, num_kv_heads=1, checkpoint=True,
        ff_mult=2, dtype=torch.float64,
    ).eval()  # fmt: skip
    other = model.to_backend("tiled")
    first = other.layers[0]
    assert (first.backend, first.pattern, first.causal) == ("tiled", Local(5), False)
    assert (first.num_kv_heads, first.checkpoint, first.ff_mult) == (1, True, 2)
    assert not other.training
    x = torch.randn(1, 17, DIM, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x))
    with torch.no_grad():
        other.layers[1].ff[2].bias.add_(1)
    assert not torch.equal(other(x), model(x))  # a copy: the old model is what it was
    changed = model.to_backend("sdpa", window=9, checkpoint=False).layers[1]
    assert (changed.pattern, changed.checkpoint) == (Local(9), False)
    nsa = model.to_backend("nsa", pattern=None, causal=True, nsa=REFERENCE)
    assert nsa.to_backend("naive").layers[0].nsa is None
    assert nsa.layers[0].to_backend("nsa").nsa["implementation"] == "reference"


def test_to_backend_keeps_what_each_layer_is_and_what_is_frozen():
    model = TransformerModel(DIM, HEADS, 2, backend="sdpa", dtype=torch.float64)
    model.layers[1] = model.layers[1].to_backend("sdpa", window=4)
    model.layers[0].requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    other = model.to_backend("naive")
    assert [layer.pattern for layer in other.layers] == [None, Local(4)]
    x = torch.randn(1, 17, DIM, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x))
    learns = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert learns[0] == learns[1]
    gated = model.layers[0].to_backend("sdpa", window=4, gate=True)
    assert gated.mixer.weight.requires_grad and not gated.q_proj.weight.requires_grad


def test_copies_and_pickles_compute_the_same_and_load_every_state_dict():
    import copy
    import pickle

    x = torch.randn(1, 17, DIM)
    dense = AttentionLayer(DIM, HEADS, backend="sdpa").state_dict()
    for options in ({"backend": "nsa", "nsa": REFERENCE}, {"window": 4, "gate": True}):
        made = AttentionLayer(DIM, HEADS, **{"backend": "sdpa", **options})
        out = made(x)
        for same in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(same(x), out)
            same.load_state_dict(dense, strict=True)
            assert not torch.equal(same(x), out)
        assert torch.equal(made(x), out)


def test_models_of_the_experiments():
    with torch.device("meta"):
        report, realistic = TransformerModel.report(), TransformerModel.realistic(backend="sdpa")
    assert (report.dim, report.layers[0].head_dim, len(report.layers)) == (256, 64, 2)
    assert (realistic.dim, realistic.layers[1].head_dim, realistic.backend) == (1024, 64, "sdpa")
    per_layer = 12 * 256**2 + 9 * 256 + 4 * 256  # four projections, 4 · dim wide; biases; norms
    assert sum(p.numel() for p in report.parameters()) == 2 * per_layer + 2 * 256


# -- checkpointing and compiling -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["naive", "tiled", "sdpa"])
def test_checkpoint_keeps_the_input_only_and_changes_no_gradient(backend):
    x = torch.randn(2, 33, DIM)
    gradients, kept = [], []
    for checkpoint in (False, True):
        made, sizes = layer(backend, checkpoint=checkpoint), []

        def pack(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            out = made(x.clone().requires_grad_())
        kept.append(sum(sizes))
        out.square().sum().backward()
        gradients.append([p.grad for p in made.parameters()])
    assert kept[1] == x.numel() < kept[0] / 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def check_compiled_equals_eager(made, x, **options):
    eager = made(x)
    eager.square().sum().backward()
    gradients = [p.grad for p in made.parameters()]
    made.zero_grad()
    torch._dynamo.reset()
    try:
        out = torch.compile(made, fullgraph=True, **options)(x)
        out.square().sum().backward()
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(out, eager)
    for (name, p), gradient in zip(made.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, msg=name)


@pytest.mark.parametrize(
    ("backend", "options"),
    [("tiled", {"window": 4}), ("sdpa", {"num_kv_heads": 1, "checkpoint": True})],
)
def test_layer_compiles_into_one_graph(backend, options):
    made = layer(backend, **options)
    check_compiled_equals_eager(made, torch.randn(1, 17, DIM), backend="aot_eager")


def test_layer_of_our_kernels_compiles_into_one_graph(device):
    made = layer("flash").to(device)
    check_compiled_equals_eager(made, torch.randn(1, 5, DIM, device=device), backend="aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *((backend, {}) for backend in (*DENSE, "nsa")),
        ("nsa", {"nsa": REFERENCE}),
        ("tiled", {"pattern": Strided(5, window=3)}),
        ("sdpa", {"pattern": Random(6), "sparse": "blocks"}),
    ],
)
def test_layer_compiles_with_inductor(backend, options):
    made = layer(backend, dim=64, **options).to("cuda", torch.float32)
    x = torch.randn(2, 130, 64, device="cuda")
    eager = made(x)
    torch._dynamo.reset()
    out = torch.compile(made, fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-4)


def test_the_reference_of_nsa_asks_no_tensor_what_it_holds():
    """Or ``torch.compile(fullgraph=True)`` could not follow it (on a GPU it does, above)."""
    from labkit.memory import trace

    assert trace(layer("nsa", nsa=REFERENCE), torch.randn(1, 35, DIM)).peak > 0


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "flesh"}, r"backend = 'flesh'.*Did you mean 'flash'\?.*naive, tiled"),
        ({"num_heads": 3}, "num_heads = 3.*dim = 32.*such as 1, 2, 4"),
        ({"num_kv_heads": 3, "num_heads": 4}, "num_kv_heads = 3.*num_heads = 4"),
        ({"dim": 0}, "dim = 0"),
        ({"ff_mult": 0}, "ff_mult"),
        ({"dtype": torch.int32}, "dtype.*float"),
        ({"dtype": torch.float8_e5m2}, "dtype.*for storage.*float16"),
        ({"dtype": "float16"}, "dtype = 'float16'.*is a str.*torch.float16"),
        ({"backend": "nsa", "nsa": "reference"}, "nsa = 'reference'.*not a dict.*block_size"),
        ({"backend": "nsa", "nsa": {**REFERENCE, "block_size": 0}}, "block_size = 0"),
        ({"precision": "tf16"}, "precision.*ieee"),
        ({"backend": "nsa", "causal": False}, "causal.*past"),
        ({"backend": "nsa", "nsa": {"blocks": 3}}, "nsa.*block_size"),
        ({"backend": "nsa", "nsa": {"block_size": 17}}, "block_size = 17"),
        ({"backend": "nsa", "dim": 130, "num_heads": 130, "num_kv_heads": 1}, "num_kv_heads.*64"),
        ({"backend": "naive", "nsa": NSA}, "nsa.*another backend"),
    ],
)
def test_option_that_does_not_fit_is_refused(options, says):
    with pytest.raises(ArgumentError, match=says):
        AttentionLayer(**{"dim": DIM, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(3, DIM), r"x\.shape = \(3, 32\).*\[batch, seq_len, 32\]"),
        (torch.zeros(1, 3, DIM + 1), r"x\.shape"),
        (torch.zeros(1, 0, DIM), r"x\.shape.*size of 0"),
        (torch.zeros(1, 3, DIM, dtype=torch.float16), r"x\.dtype = 'float16'.*float32.*autocast"),
        (torch.zeros(1, 3, DIM, dtype=torch.int64), r"x\.dtype"),
        (torch.zeros(1, 3, DIM, device="meta"), r"x\.device = 'meta'.*cpu"),
        ([1, 2], r"x\.shape = 'list'"),
    ],
)
def test_input_that_does_not_fit_is_refused(x, says):
    with pytest.raises(ArgumentError, match=says):
        layer("naive")(x)


@pytest.mark.parametrize(
    ("weights", "x", "autocast", "says"),
    [
        (torch.float64, torch.float32, False, r"float64\. Convert x or the layer.*\(dtype\)\.$"),
        (torch.float64, torch.float32, True, r"x\.dtype = 'float32'.*float64"),
        (torch.float32, torch.float64, True, r"x\.dtype = 'float64'.*float32"),
        (torch.bfloat16, torch.float32, True, r"x\.dtype = 'float32'.*bfloat16"),
        (torch.float32, torch.bfloat16, True, None),
        (torch.float64, torch.float64, True, None),
    ],
)
def test_dtypes_that_autocast_does_not_mix_are_refused(weights, x, autocast, says):
    made, x = layer("naive", dtype=weights), torch.zeros(1, 3, DIM, dtype=x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if says is None:
            assert made(x).shape == x.shape
            return
        with pytest.raises(ArgumentError, match=says):
            made(x)


def test_attend_has_no_gates():
    q = torch.zeros(1, 2, 5, 16)
    with pytest.raises(ArgumentError, match="q = 'str'"):
        attend("q", q, q, pattern="strided", sparse="blocks")
    with pytest.raises(ArgumentError, match=r"backend = 'nsa'.*gates.*AttentionLayer"):
        attend(q, q, q, backend="nsa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_operator_of_a_compiled_layer_refuses_what_the_interpreter_multiplies_wrongly():
    attend(*3 * [torch.ones(1, 1, 5, 16)], backend="flash")  # the operator is there
    q = torch.ones(1, 1, 5, 16, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="raw bits"):  # which no check of ours stands before
        torch.ops.labkit.flash_forward(q, q, q, None, None, 5, 5, True, 0.25, None, "ieee")


def test_available_says_why_not():
    assert set(BACKENDS) == {*DENSE, "nsa"}
    for backend in ("naive", "tiled", "sdpa"):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            assert available(backend, "cpu", dtype) is None
    assert "float64" in available("flash", dtype=torch.float64)
    assert "head_dim from 16 to 256, not 8" in available("flash", head_dim=8)
    assert "storage" in available("sdpa", "cpu", torch.float8_e5m2)
    assert "no float" in available("naive", "cpu", torch.int8)
    with pytest.raises(ArgumentError, match="dtype = 'float16'"):
        available("sdpa", "cpu", "float16")
    with pytest.raises(ArgumentError, match="Known: naive, tiled, flash, sdpa, nsa"):
        available("cudnn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_that_cannot_run_names_the_nearest_that_can(monkeypatch):
    from labkit.kernels import runtime

    x = torch.randn(1, 5, DIM)
    assert available("flash", "cpu") is None  # through the interpreter
    assert "raw bits" in available("flash", "cpu", torch.bfloat16)
    assert "no GPU" in available("sdpa", "cuda")
    with (
        pytest.raises(ArgumentError, match=r"raw bits.*nearest that can is backend='sdpa'"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer("flash")(x)
    with pytest.raises(ArgumentError, match=r"float64.*backend='sdpa'"):
        layer("flash", dtype=torch.float64)(x.double())
    monkeypatch.setattr(runtime, "_interpreter_on", lambda: False)
    for backend in ("flash", "nsa"):
        with pytest.raises(ArgumentError, match=r"cannot run here: torch sees no GPU.*sdpa"):
            layer(backend)(x)
    with pytest.raises(ArgumentError, match=r"implementation.*reference"):
        layer("nsa")(x)
    assert layer("nsa", nsa=REFERENCE)(x).shape == x.shape  # needs no kernel
    monkeypatch.setattr(runtime, "_interpreter_on", lambda: False)
    monkeypatch.setattr(runtime, "_gpu_visible", lambda: True)
    assert "tensors lie on cpu" in available("flash", "cpu")
    monkeypatch.setattr("labkit.layers.attention.find_spec", lambda name: None)
    assert "not installed" in available("flash", "cpu")


def test_a_trace_without_data_asks_for_no_gpu(monkeypatch):
    from labkit.kernels import runtime
    from labkit.memory import trace

    monkeypatch.setattr(runtime, "_interpreter_on", lambda: False)
    made = layer("flash")
    x = torch.randn(1, 64, DIM)
    peaks = {b: trace(made.to_backend(b), x).peak for b in ("flash", "naive")}
    assert 0 < peaks["flash"] < peaks["naive"]


def test_import_loads_no_torch():
    import os
    import subprocess
    import sys

    code = (
        "import sys, labkit.layers; labkit.layers.layer_budget; "
        "print('torch' in sys.modules, 'triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False", "False"]
