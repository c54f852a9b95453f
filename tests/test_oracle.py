"""The oracle against itself in two arithmetics, against numbers worked out by hand, and against other libraries."""

import math

import numpy as np
import oracle
import pytest

from setattn import (
    ISAB,
    MAB,
    PMA,
    Attention,
    AttentionPool,
    CrossAttention,
    FeedForward,
    GatedCrossAttention,
    LayerNorm,
    Linear,
    MeanLatents,
    Perceiver,
    PerceiverIO,
    Resampler,
    RMSNorm,
    SelfAttention,
    SetTransformer,
)

ACTIVATIONS = "relu", "squared_relu", "gelu", "gelu_tanh", "silu"


class Draw:
    """Random arrays and parts of parameter trees."""

    def __init__(self, seed=0, kind="layer", bias=True):
        self.rng, self.kind, self.bias = np.random.default_rng(seed), kind, bias

    def array(self, *shape):
        return self.rng.normal(size=shape)

    def mask(self, *shape):
        return self.rng.random(shape) < 0.7

    def linear(self, dim, *out):
        return Linear(self.array(dim, *out) / math.sqrt(dim), self.array(*out) if self.bias else ())

    def norm(self, dim):
        scale = 1 + 0.3 * self.array(dim)
        if self.kind == "none":
            return ()
        return RMSNorm(scale) if self.kind == "rms" else LayerNorm(scale, self.array(dim) if self.bias else ())

    def ff(self, dim, gate=False, two=True):
        hidden = dim + 3 if two else dim
        return FeedForward(
            self.linear(dim, hidden), self.linear(hidden, dim) if two else (), self.linear(dim, hidden) if gate else ()
        )

    def attention(self, dim, context, heads=2, kv_heads=1, head_dim=3, value_dim=2, head_norm=False, out=None):
        return Attention(
            self.linear(dim, heads, head_dim),
            self.linear(context, kv_heads, head_dim),
            self.linear(context, kv_heads, value_dim),
            Linear(self.array(heads, value_dim, out or dim), self.array(out or dim) if self.bias else ()),
            self.norm(head_dim) if head_norm else (),
            self.norm(head_dim) if head_norm else (),
        )

    def mab(self, dim_x, dim_y, dim, gate=False, pre=False):
        return MAB(
            self.attention(dim, dim_y),
            self.ff(dim, gate),
            self.linear(dim_x, dim) if dim_x != dim else (),
            self.norm(dim) if pre else (),
            self.norm(dim_y) if pre else (),
            () if pre else self.norm(dim),
            self.norm(dim) if pre else (),
            () if pre else self.norm(dim),
        )

    def cross(self, dim, context, gate=False):
        norms = self.norm(dim), self.norm(context), self.norm(dim)
        return CrossAttention(self.attention(dim, context), self.ff(dim, gate), *norms)

    def layer(self, dim):
        return SelfAttention(self.attention(dim, dim), self.ff(dim), self.norm(dim), self.norm(dim))

    def perceiver(self, inputs, dim):
        return Perceiver(
            self.array(3, dim), (self.cross(dim, inputs), ()), ((self.layer(dim), self.layer(dim)), (self.layer(dim),))
        )

    def resampler(self, dim_in, dim, frames=False, media=False):
        return Resampler(
            self.array(3, dim),
            (self.cross(dim, dim), self.cross(dim, dim)),
            self.array(4, dim) if frames else (),
            self.array(3, dim) if media else (),
            self.linear(dim_in, dim),
            self.linear(dim, 5),
            self.norm(5),
        )

    def long_resampler(self, dim_in, dim, frames=False, media=False):
        """A resampler with a network first, a table of positions and latents of the mean."""
        network = FeedForward(self.linear(dim_in, 7), self.linear(7, dim), self.linear(dim_in, 7))
        made = MeanLatents(self.linear(dim, 2, dim), self.norm(dim))
        p = self.resampler(dim_in, dim, frames, media)
        return p._replace(input=network, position=self.array(3, dim_in), mean_latents=made)


def cases(d):
    """Arrays, parameters and options of every block."""
    x, y = d.array(2, 5, 6), d.array(2, 4, 6)
    own, other = d.mask(2, 5), d.mask(2, 4)
    other[0] = False
    bias = np.where(d.mask(2, 4), d.array(2, 4), -np.inf)
    yield "linear", (x,), d.linear(6, 5), {}
    yield "norm", (x,), d.norm(6), {}
    for gate, two in ((False, True), (True, True), (False, False), (True, False)):
        yield "feed_forward", (x,), d.ff(6, gate, two), {}
    for heads, kv_heads in ((1, 1), (3, 1), (2, 2)):
        p = d.attention(6, 6, heads, kv_heads, head_norm=heads > 1)
        yield "attention", (x, y), p, {"mask": other, "pair_mask": d.mask(2, 5, 4)}
        yield "attention", (x, y), p._replace(output=()), {"bias": d.array(2, 4), "scale": 2.5}
        yield (
            "attention",
            (x, y),
            p._replace(query=(), key=d.linear(6, kv_heads, 6 // heads), key_norm=(), query_norm=()),
            {"bias": bias},
        )
        yield "attention_weights", (x, y), p, {"mask": other, "bias": bias}
        yield "attention_weights", (x, y), p, {"scale": 1.7}
    for pre in (False, True):
        yield "mab", (x, y), d.mab(6, 6, 4, gate=True, pre=pre), {"mask": other, "query_mask": own}
        yield "mab", (x, y), d.mab(6, 6, 6, pre=pre)._replace(ff=()), {"pair_mask": d.mask(2, 5, 4)}
        yield "sab", (x,), d.mab(6, 6, 4, pre=pre), {"mask": own}
        isab = ISAB(d.array(3, 4), d.mab(4, 6, 4, pre=pre), d.mab(6, 4, 4, pre=pre))
        yield "isab", (x,), isab, {"mask": own}
        yield "isab", (x,), isab, {"mask": own, "query_residual": False}
        pma = PMA(d.array(2, 4), d.mab(4, 6, 4, pre=pre), d.ff(6))
        yield "pma", (x,), pma, {"mask": own}
        encoder = isab, d.mab(4, 4, 6, pre=pre)
        yield "set_transformer", (x,), SetTransformer(encoder, pma, (d.mab(4, 4, 4),), d.linear(4, 3)), {"mask": own}
    pool = AttentionPool(d.array(2, 6), d.attention(6, 6), d.ff(6), *(d.norm(6) for _ in range(4)), d.linear(6, 3))
    yield "attention_pool", (x,), pool, {"mask": own}
    yield "attention_pool", (x,), pool._replace(ff=(), output=()), {}
    placed = pool._replace(input=d.linear(3, 6), position=d.array(7, 6), probe_position=d.array(2, 6))
    yield "attention_pool", (d.array(2, 5, 3),), placed, {"mask": own, "key_positions": d.array(2, 5, 6)}
    for residual in (True, False):
        yield "cross_attention", (x, y), d.cross(6, 6, gate=True), {"mask": other, "query_residual": residual}
    yield "latent_transformer", (x,), (d.layer(6), d.layer(6)), {}
    yield "perceiver", (x,), d.perceiver(6, 4), {"mask": own, "depth": 3}
    yield "perceiver", (x,), d.perceiver(6, 4)._replace(latent_transformers=()), {"query_residual": False}
    perceiver_io = PerceiverIO(d.perceiver(6, 4), d.cross(5, 4), d.linear(5, 2))
    for residual in (True, False):
        yield "perceiver_io", (x, d.array(2, 3, 5)), perceiver_io, {"mask": own, "decoder_residual": residual}
    for frames, media in ((False, False), (True, False), (False, True), (True, True)):
        shape = (2, *(3,) * media, *(4,) * frames, 2, 6)
        p = d.resampler(6, 4, frames, media)
        yield "perceiver_resampler", (d.array(*shape),), p, {"mask": d.mask(*shape[:-1])}
        p = d.long_resampler(6, 4, frames, media)
        yield "perceiver_resampler", (d.array(*shape),), p, {"mask": d.mask(*shape[:-1])}
    gated = GatedCrossAttention(d.cross(6, 5), d.array(6), d.array(1))
    for immediate in (True, False):
        options = {"mask": d.mask(2, 3, 2), "media_locations": d.mask(2, 5), "immediate": immediate}
        yield "gated_cross_attention", (x, d.array(2, 3, 2, 5)), gated, options
    yield "gated_cross_attention", (x, d.array(2, 3, 2, 5)), gated, {}


@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
def test_both_arithmetics_agree(kind):
    for i, (name, arrays, params, options) in enumerate(cases(Draw(1, kind, bias=kind != "rms"))):
        options = {"activation": ACTIVATIONS[i % 5], "eps": 1e-5, **options}
        rounded = oracle.evaluate(name, *arrays, params=params, **options)
        exact = oracle.evaluate(name, *arrays, params=params, exact=True, **options)
        np.testing.assert_allclose(rounded, exact, rtol=1e-10, atol=1e-13, err_msg=name)


def test_both_arithmetics_agree_on_fourier_features():
    positions = np.random.default_rng(0).uniform(-1, 1, size=(2, 3, 2))
    for order in ("grouped", "per_axis"):
        for resolution in (8, (8, 20)):
            options = {"num_bands": 4, "max_resolution": resolution, "order": order}
            rounded = oracle.evaluate("fourier_features", positions, **options)
            exact = oracle.evaluate("fourier_features", positions, exact=True, **options)
            assert rounded.shape == (2, 3, 18)
            np.testing.assert_allclose(rounded, exact, rtol=0, atol=1e-13)


def test_fourier_features_by_hand():
    # Frequencies 1 and 2, so the angles are pi / 2 and pi, then pi / 6 and pi / 3.
    x = np.array([[0.5, 1 / 6]])
    root = math.sqrt(3) / 2
    options = {"num_bands": 2, "max_resolution": 4}
    grouped = oracle.evaluate("fourier_features", x, **options)
    np.testing.assert_allclose(grouped, [[0.5, 1 / 6, 1, 0, 0.5, root, 0, -1, root, 0.5]], atol=1e-15)
    per_axis = oracle.evaluate("fourier_features", x, order="per_axis", **options)
    np.testing.assert_allclose(per_axis, [[1, 0, 0, -1, 0.5, 0.5, root, root, 0.5, 1 / 6]], atol=1e-15)
    bare = oracle.evaluate("fourier_features", x, concat_position=False, order="per_axis", **options)
    np.testing.assert_allclose(bare, [[1, 0, 0, -1, 0.5, root, root, 0.5]], atol=1e-15)
    one = oracle.evaluate("fourier_features", x[:, :1], num_bands=1, max_resolution=10)
    np.testing.assert_allclose(one, [[0.5, 1, 0]], atol=1e-15)


def test_both_arithmetics_agree_on_sincos_features():
    positions = np.random.default_rng(0).uniform(0, 40, size=(2, 3, 2))
    for options in ({"dim": 12}, {"dim": 4, "temperature": 7.0}):
        rounded = oracle.evaluate("sincos_features", positions, **options)
        exact = oracle.evaluate("sincos_features", positions, exact=True, **options)
        assert rounded.shape == (2, 3, options["dim"])
        np.testing.assert_allclose(rounded, exact, rtol=0, atol=1e-13)


def test_sincos_features_by_hand():
    # Frequencies 1 and 1 / 3, so the angles are pi / 2 and pi / 6, then 2 pi and 2 pi / 3.
    x, root = np.array([[math.pi / 2, 2 * math.pi]]), math.sqrt(3) / 2
    out = oracle.evaluate("sincos_features", x, dim=8, temperature=9.0)
    np.testing.assert_allclose(out, [[1, 0.5, 0, root, 0, root, 1, -0.5]], atol=1e-15)


@pytest.mark.parametrize("exact", [False, True])
def test_attention_by_hand(exact):
    # Scores ln 3 and 0 at scale 1: weights 3/4 and 1/4; values are the context itself, times two.
    one = np.ones((1, 1, 1))
    p = Attention(Linear(one), Linear(one), Linear(2 * one), Linear(one, np.array([10.0])))
    query, context = np.array([[1.0], [0.0]]), np.array([[math.log(3)], [0.0]])
    weights = oracle.evaluate("attention_weights", query, context, params=p, exact=exact)
    np.testing.assert_allclose(weights, [[[0.75, 0.25], [0.5, 0.5]]], rtol=1e-15)
    out = oracle.evaluate("attention", query, context, params=p, exact=exact)
    np.testing.assert_allclose(out, 10 + math.log(3) * np.array([[1.5], [1.0]]), rtol=1e-15)
    # Nothing takes part: the weighted sum is 0, and the output projection's bias is left.
    out = oracle.evaluate("attention", query, context, params=p, mask=np.zeros(2, dtype=bool), exact=exact)
    np.testing.assert_array_equal(out, [[10.0], [10.0]])
    out = oracle.evaluate("attention", query, context[:0], params=p, exact=exact)
    np.testing.assert_array_equal(out, [[10.0], [10.0]])


def test_heads_are_grouped_in_order():
    # Four query heads, two key heads; value head g gives the number g + 1 whatever it sees.
    value = Linear(np.zeros((1, 2, 1)), np.array([[1.0], [2.0]]))
    p = Attention(Linear(np.ones((1, 4, 1))), Linear(np.ones((1, 2, 1))), value)
    out = oracle.evaluate("attention", np.ones((1, 1)), np.arange(3.0)[:, None], params=p)
    np.testing.assert_allclose(out, [[1, 1, 2, 2]], rtol=1e-15)


def test_norms_by_hand():
    x = np.array([[1.0, 3.0], [5.0, 5.0]])
    layer = oracle.evaluate("norm", x, params=LayerNorm(np.array([2.0, 3.0]), np.array([1.0, 1.0])), eps=3.0)
    np.testing.assert_array_equal(layer, [[0.0, 2.5], [1.0, 1.0]])
    rms = oracle.evaluate("norm", x, params=RMSNorm(np.array([1.0, 2.0])), eps=11.0)
    np.testing.assert_array_equal(rms, [[0.25, 1.5], [5 / 6, 5 / 3]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relu", 0.0),
        ("squared_relu", 0.0),
        ("gelu", -0.15865525393145705),
        ("gelu_tanh", -0.15880800939172324),
        ("silu", -0.2689414213699951),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_activations_at_minus_one(name, value, exact):
    p = FeedForward(Linear(np.eye(1)))
    out = oracle.evaluate(
        "feed_forward", np.array([[-1.0], [0.0], [-1e4], [1e4]]), params=p, activation=name, exact=exact
    )
    top = 1e8 if name == "squared_relu" else 1e4
    np.testing.assert_allclose(out, [[value], [0], [0], [top]], rtol=1e-15)


def test_single_elements():
    # With one element attention gives its value; the block is then x + 2 y, doubled by a feed-forward of relu.
    one = np.ones((1, 1, 1))
    p = MAB(Attention(Linear(one), Linear(one), Linear(2 * one), Linear(one)), FeedForward(Linear(np.eye(1))))
    out = oracle.evaluate("mab", np.array([[3.0]]), np.array([[4.0]]), params=p, activation="relu")
    np.testing.assert_array_equal(out, [[22.0]])
    np.testing.assert_array_equal(oracle.evaluate("sab", np.array([[3.0]]), params=p, activation="relu"), [[18.0]])


def test_gated_block_by_hand():
    one = np.ones((1, 1, 1))
    cross = CrossAttention(Attention(Linear(one), Linear(one), Linear(one), Linear(one, np.array([7.0]))))
    p = GatedCrossAttention(cross, np.array([np.inf]), np.array([0.0]))
    x, media = np.zeros((4, 1)), np.array([[[1.0]], [[2.0]]])
    locations = np.array([False, True, True, True])

    def run(**options):
        return oracle.evaluate("gated_cross_attention", x, media, params=p, **options)[:, 0]

    # The first token precedes all media, the fourth follows a third that is not there: neither sees anything.
    np.testing.assert_array_equal(run(media_locations=locations), [0, 8, 9, 0])
    np.testing.assert_array_equal(run(media_locations=locations, immediate=False), [0, 8, 8.5, 8.5])
    np.testing.assert_array_equal(run(media_locations=locations, mask=np.array([[False], [True]])), [0, 0, 9, 0])
    np.testing.assert_array_equal(run(), [8.5] * 4)


@pytest.mark.parametrize("exact", [False, True])
def test_latents_of_the_mean_by_hand(exact):
    one = np.ones((1, 1, 1))
    silent = CrossAttention(Attention(Linear(one), Linear(one), Linear(0 * one), Linear(one)))
    made = MeanLatents(Linear(np.array([[[2.0], [-1.0]]]), np.array([[0.0], [1.0]])))
    p = Resampler(np.array([[5.0]]), (silent,), position=np.array([[10.0], [-20.0], [30.0], [40.0]]), mean_latents=made)
    features, mask = np.array([[1.0], [2.0], [3.0]]), np.array([True, True, False])

    def run(p, mask=mask):
        options = {"activation": "relu", "eps": 1e-5, "exact": exact}
        return oracle.evaluate("perceiver_resampler", features, params=p, mask=mask, **options)[:, 0]

    np.testing.assert_array_equal(run(p), [-7, 4.5, 5])  # of the mean of 11 and -18
    np.testing.assert_array_equal(run(p._replace(input=FeedForward(Linear(np.ones((1, 1)))))), [11, -4.5, 5])
    np.testing.assert_array_equal(run(p, np.zeros(3, dtype=bool)), [0, 1, 5])


def test_empty_axes_and_batches():
    d = Draw(2)
    p = d.mab(6, 5, 4)
    options = {"params": p, "activation": "relu", "eps": 1e-5}
    assert oracle.evaluate("mab", d.array(2, 0, 6), d.array(2, 3, 5), **options).shape == (2, 0, 4)
    assert oracle.evaluate("mab", d.array(0, 7, 6), d.array(0, 3, 5), **options).shape == (0, 7, 4)
    empty = oracle.evaluate("mab", x := d.array(2, 7, 6), d.array(2, 0, 5), **options)
    masked = oracle.evaluate("mab", x, np.full((2, 3, 5), np.nan), mask=np.zeros((2, 3), dtype=bool), **options)
    np.testing.assert_array_equal(empty, masked)
    resampler = d.resampler(6, 4, media=True)
    out = oracle.evaluate("perceiver_resampler", np.zeros((2, 0, 3, 6)), params=resampler, activation="gelu", eps=1e-5)
    assert out.shape == (2, 0, 3, 5)


def test_masked_elements_are_not_read():
    for name, arrays, params, options in cases(Draw(3)):
        mask = options.get("mask")
        if mask is None or name == "gated_cross_attention":
            continue
        options = {"activation": "gelu", "eps": 1e-5, **options}
        context = 1 if len(arrays) == 2 and name != "perceiver_io" else 0
        spoilt = list(arrays)
        spoilt[context] = np.where(mask[..., None], arrays[context], np.nan)
        clean = oracle.evaluate(name, *arrays, params=params, **options)
        np.testing.assert_array_equal(oracle.evaluate(name, *spoilt, params=params, **options), clean, err_msg=name)


def test_a_missing_option_is_an_error():
    d = Draw(4)
    with pytest.raises(KeyError):
        oracle.evaluate("mab", d.array(2, 4), d.array(2, 4), params=d.mab(4, 4, 4), eps=1e-5)
    with pytest.raises(TypeError):
        oracle.evaluate("mab", d.array(2, 4), d.array(2, 4), params=d.mab(4, 4, 4), activation="relu")


def test_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(2, n, 3, 4)) for n in (5, 6, 6))  # batch, elements, heads, width
    mask = rng.random((2, 5, 6)) < 0.7
    as_heads = [torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*as_heads, attn_mask=torch.from_numpy(mask)[:, None])
    eye = Linear(np.eye(12).reshape(12, 3, 4))
    out = oracle.evaluate(
        "attention",
        q.reshape(2, 5, 12),
        np.concatenate([k.reshape(2, 6, 12), v.reshape(2, 6, 12)], axis=-1),
        params=Attention(eye, *(Linear(np.roll(np.eye(24, 12), shift, axis=0).reshape(24, 3, 4)) for shift in (0, 12))),
        pair_mask=mask,
    )
    np.testing.assert_allclose(out, wanted.transpose(1, 2).reshape(2, 5, 12).numpy(), rtol=0, atol=1e-14)

    x, scale, bias = rng.normal(size=(5, 12)), rng.normal(size=12), rng.normal(size=12)
    tensors = [torch.from_numpy(a) for a in (x, scale, bias)]
    layer = torch.nn.functional.layer_norm(tensors[0], (12,), *tensors[1:], eps=1e-3)
    np.testing.assert_allclose(
        oracle.evaluate("norm", x, params=LayerNorm(scale, bias), eps=1e-3), layer.numpy(), rtol=0, atol=1e-14
    )
    rms = torch.nn.functional.rms_norm(tensors[0], (12,), tensors[1], eps=1e-3)
    np.testing.assert_allclose(
        oracle.evaluate("norm", x, params=RMSNorm(scale), eps=1e-3), rms.numpy(), rtol=0, atol=1e-14
    )
    functional = torch.nn.functional
    for name, function in {
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "silu": functional.silu,
    }.items():
        out = oracle.evaluate("feed_forward", x, params=FeedForward(Linear(np.eye(12))), activation=name)
        np.testing.assert_allclose(out, function(tensors[0]).numpy(), rtol=0, atol=1e-14)


def test_against_torch_transformer_layer():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def array(tensor, *shape):
        return tensor.detach().numpy().reshape(*shape) if shape else tensor.detach().numpy()

    def linear(module):
        return Linear(array(module.weight).T, array(module.bias))

    def norm(module):
        return LayerNorm(array(module.weight), array(module.bias))

    attention = layer.self_attn
    projections = [
        Linear(array(w).T.reshape(8, 2, 4), array(b, 2, 4))
        for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    ]
    out = Linear(array(attention.out_proj.weight).T.reshape(2, 4, 8), array(attention.out_proj.bias))
    params = SelfAttention(
        Attention(*projections, out),
        FeedForward(linear(layer.linear1), linear(layer.linear2)),
        norm(layer.norm1),
        norm(layer.norm2),
    )
    value = oracle.evaluate("latent_transformer", x.numpy(), params=(params,), activation="gelu", eps=layer.norm1.eps)
    np.testing.assert_allclose(value, layer(x).detach().numpy(), rtol=0, atol=1e-13)
