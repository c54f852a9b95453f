"""Parameters from a seed: their shapes and distributions, and the errors about their sizes."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
from tolerances import product

import setattn
from setattn import LayerNorm, Linear, OptionError, RMSNorm

# Every init with arguments of distinct sizes, and a call of the function it is for.
X, Y = np.ones((2, 7, 12), np.float32), np.ones((2, 5, 10), np.float32)
INITS: dict[str, tuple[tuple[int, ...], dict[str, Any], Any]] = {
    "init_linear": ((12, 10), {}, lambda p: product(X, p.weight) + p.bias),
    "init_norm": ((12,), {}, None),
    "init_feed_forward": ((12,), {"hidden": 9, "gate": True}, None),
    "init_attention": (
        (12, 10),
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 3, "value_dim": 5, "head_norm": "layer"},
        lambda p: setattn.attention(X, Y, p),
    ),
    "init_mab": ((12,), {"num_heads": 4, "dim_x": 12, "dim_y": 10, "hidden": 9}, lambda p: setattn.mab(X, Y, p)),
    "init_isab": ((12,), {"num_heads": 4, "num_inducing": 3, "hidden": 9}, lambda p: setattn.isab(X, p)),
    "init_pma": ((12,), {"num_heads": 4, "num_seeds": 3, "hidden": 9}, lambda p: setattn.pma(X, p)),
    "init_set_transformer": (
        (12, 8, 5),
        {"num_heads": 4, "num_inducing": 3, "num_encoders": 2, "num_seeds": 6, "num_decoders": 2, "hidden": 9},
        lambda p: setattn.set_transformer(X, p),
    ),
    "init_attention_pool": (
        (12,),
        {"num_heads": 4, "num_probes": 3, "hidden": 9},
        lambda p: setattn.attention_pool(X, p),
    ),
    "init_cross_attention": (
        (12, 10),
        {"num_heads": 2, "head_dim": 3, "hidden": 9},
        lambda p: setattn.cross_attention(X, Y, p),
    ),
    "init_latent_transformer": (
        (12,),
        {"num_layers": 2, "num_heads": 4, "hidden": 9},
        lambda p: setattn.latent_transformer(X, p),
    ),
    "init_perceiver": (
        (12, 8),
        {
            "num_latents": 3,
            "num_layers": 2,
            "num_heads": 4,
            "num_cross_heads": 2,
            "num_cross_attentions": 2,
            "num_latent_transformers": 2,
            "hidden": 9,
        },
        lambda p: setattn.perceiver(X, p),
    ),
    "init_perceiver_io": (
        (12, 8, 10, 5),
        {
            "num_latents": 3,
            "num_layers": 2,
            "num_heads": 4,
            "num_cross_heads": 2,
            "num_decoder_heads": 4,
            "hidden": 9,
        },
        lambda p: setattn.perceiver_io(X, Y, p),
    ),
    "init_perceiver_resampler": (
        (12,),
        {"num_heads": 4, "num_latents": 3, "num_layers": 2, "head_dim": 5, "hidden": 9, "num_frames": 4},
        lambda p: setattn.perceiver_resampler(X[:, None], p),
    ),
    "init_gated_cross_attention": (
        (12, 10),
        {"num_heads": 4, "head_dim": 5, "hidden": 9, "vector_gates": True},
        lambda p: setattn.gated_cross_attention(X, Y[:, None], p),
    ),
}
SHAPES = {
    "init_attention": (2, 7, 12),
    "init_mab": (2, 7, 12),
    "init_isab": (2, 7, 12),
    "init_pma": (2, 3, 12),
    "init_set_transformer": (2, 6, 5),
    "init_attention_pool": (2, 3, 12),
    "init_cross_attention": (2, 7, 12),
    "init_latent_transformer": (2, 7, 12),
    "init_perceiver": (2, 3, 8),
    "init_perceiver_io": (2, 5, 5),
    "init_perceiver_resampler": (2, 3, 12),
    "init_gated_cross_attention": (2, 7, 12),
}
# Numbers that may be 0, but for those of a resampler
COUNTS = {"num_layers", "num_encoders", "num_decoders"}
SEEDED = [name for name in INITS if name != "init_norm"]


def make(name: str, **changed: Any) -> Any:
    widths, options, _ = INITS[name]
    seed = {"rng": 0} if "rng" in inspect.signature(getattr(setattn, name)).parameters else {}
    return getattr(setattn, name)(*widths, **(seed | options | changed))


def leaves(params: Any) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    setattn.map_params(found.append, params)
    return found


def test_every_init_is_here():
    assert set(INITS) == {name for name in setattn.__all__ if name.startswith("init_")}
    for name, (widths, options, _) in INITS.items():
        parameters = inspect.signature(getattr(setattn, name)).parameters
        given = set(list(parameters)[: len(widths)]) | set(options)
        assert set(parameters) - given <= {"rng", "bias", "form", "norm", "kind", "num_media", "dim_x"}


@pytest.mark.parametrize("name", INITS)
def test_arrays_are_numpys_float32(name):
    arrays = leaves(make(name))
    assert arrays
    for a in arrays:
        assert type(a) is np.ndarray
        assert a.dtype == np.float32
        assert a.flags.c_contiguous
        assert a.flags.writeable
        assert np.isfinite(a).all()
    assert len({a.__array_interface__["data"][0] for a in arrays}) == len(arrays)


@pytest.mark.parametrize("name", SHAPES)
def test_the_function_takes_what_its_init_draws(name):
    out = INITS[name][2](make(name))
    assert out.shape == SHAPES[name]
    assert out.dtype == np.float32


@pytest.mark.parametrize("form", ["post_norm", "pre_norm", "official"])
@pytest.mark.parametrize("norm", ["layer", "rms", "none", None])
def test_forms_and_norms(form, norm):
    options = {"form": form, "norm": norm}
    for name, shape in (("init_mab", (2, 7, 12)), ("init_isab", (2, 7, 12)), ("init_pma", (2, 3, 12))):
        assert INITS[name][2](make(name, **options)).shape == shape
    assert INITS["init_set_transformer"][2](make("init_set_transformer", **options)).shape == (2, 6, 5)
    block = make("init_mab", **options)
    before = (block.query_norm, block.context_norm, block.ff_norm)
    after = (block.attention_norm, block.output_norm)
    none, other = (after, before) if form == "pre_norm" else (before, after)
    kind = {"layer": LayerNorm, "rms": RMSNorm, "none": tuple, None: tuple if form == "official" else LayerNorm}[norm]
    assert set(none) == {()}
    assert {type(n) for n in other} == {kind}
    assert (block.attention.query == () and block.attention.output == ()) == (form == "official")
    assert isinstance(block.project, Linear) == (form == "official")


def test_width_of_x_that_needs_a_projection():
    params = setattn.init_mab(12, num_heads=4, dim_x=9, dim_y=10, rng=0)
    assert params.project.weight.shape == (9, 12)
    assert setattn.mab(np.ones((3, 9), np.float32), Y, params).shape == (2, 3, 12)


def test_parts_that_are_left_out():
    assert setattn.init_linear(3, 2, bias=False).bias == ()
    assert setattn.init_norm(3, kind="none") == ()
    assert setattn.init_norm(3, bias=False).bias == ()
    assert setattn.init_feed_forward(3, rng=0)[1:] == ((), ())
    attention = setattn.init_attention(12, num_heads=4, bias=False, rng=0)
    assert attention.query_norm == attention.key_norm == attention.output.bias == ()
    assert setattn.init_set_transformer(8, 8, 5, num_heads=4, num_encoders=0, num_decoders=0, rng=0).encoder == ()
    resampler = setattn.init_perceiver_resampler(8, rng=0)
    assert resampler.frame_embedding == resampler.media_embedding == ()
    assert setattn.init_perceiver_resampler(8, num_media=3, rng=0).media_embedding.shape == (3, 8)
    assert (
        setattn.init_perceiver_io(6, 8, 7, 2, num_latents=3, num_layers=1, num_heads=2).encoder.cross_attentions[1]
        == ()
    )


# --- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEDED)
def test_seeds(name):
    first = leaves(make(name, rng=5))
    for rng in (5, np.int64(5), np.random.default_rng(5), np.random.PCG64(5), np.random.SeedSequence(5)):
        for a, b in zip(first, leaves(make(name, rng=rng)), strict=True):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
    for rng in (6, None):
        assert any((a != b).any() for a, b in zip(first, leaves(make(name, rng=rng)), strict=True))
    generator = np.random.default_rng(5)
    one, two = leaves(make(name, rng=generator)), leaves(make(name, rng=generator))
    assert any((a != b).any() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", SEEDED)
def test_global_seed_is_neither_used_nor_changed(name):
    state = np.random.get_state()[1].copy()  # noqa: NPY002, the old global state is what is looked at
    make(name)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002, the old global state is what is looked at


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("rng", ["seed", -1, 1.5, [0.5], object()])
def test_wrong_seeds(name, rng):
    with pytest.raises(OptionError, match=f"^{name}: argument 'rng' is .*; wanted a numpy.random.Generator"):
        make(name, rng=rng)


# --- distributions --------------------------------------------------------------------------------------------------

# A false alarm in a million: 5 deviations of the estimate.
DEVIATIONS = 5.0


def check_uniform(a: np.ndarray, bound: float) -> None:
    """Check bounds, mean and variance; the variance of a mean of squares is ``(E[x**4] - E[x**2]**2) / n``."""
    n, a = a.size, a.astype(np.float64)
    assert np.abs(a).max() <= np.float32(bound)
    assert np.abs(a).max() > bound * (1 - 14 / n)  # the chance of no draw in the outer 14/n is exp(-14)
    assert abs(a.mean()) <= DEVIATIONS * bound / math.sqrt(3 * n)
    assert abs((a**2).mean() - bound**2 / 3) <= DEVIATIONS * bound**2 * math.sqrt((1 / 5 - 1 / 9) / n)


def check_normal(a: np.ndarray, deviation: float, kurtosis: float = 3.0) -> None:
    n, a = a.size, a.astype(np.float64)
    assert abs(a.mean()) <= DEVIATIONS * deviation / math.sqrt(n)
    assert abs((a**2).mean() - deviation**2) <= DEVIATIONS * deviation**2 * math.sqrt((kurtosis - 1) / n)


def check_truncated(a: np.ndarray, deviation: float) -> None:
    """Check a normal that is cut at 2 of its own deviations, 0.8796 of which are its final one."""
    pdf, cdf = math.exp(-2.0) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2.0))
    variance = 1 - 4 * pdf / cdf
    fourth = 3 - 4 * pdf * (3 + 4) / cdf
    before = deviation / math.sqrt(variance)
    assert np.abs(a).max() <= np.float32(2 * before)
    assert np.abs(a).max() > 1.95 * before
    check_normal(a, deviation, fourth / variance**2)


def test_linear_is_pytorchs_uniform():
    p = setattn.init_linear(64, 300, rng=0)
    check_uniform(p.weight, 1 / 8)
    check_uniform(p.bias, 1 / 8)
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(64, 300)
    assert abs(layer.weight.detach().numpy().std() / p.weight.std() - 1) < 0.05


def test_attention_counts_all_heads_as_its_width():
    p = setattn.init_attention(64, 36, num_heads=8, head_dim=16, value_dim=32, rng=0)
    check_uniform(p.query.weight, 1 / 8)
    check_uniform(p.key.weight, 1 / 6)
    check_uniform(p.value.bias, 1 / 6)
    check_uniform(p.output.weight, 1 / 16)
    check_uniform(p.output.bias, 1 / 16)


def test_perceiver_is_lecun_normal():
    p = setattn.init_perceiver(48, 64, num_latents=128, num_layers=1, num_heads=4, hidden=256, rng=0)
    check_truncated(p.latents, 0.02 * 0.87962566103423978)
    layer = p.latent_transformers[0][0]
    check_truncated(layer.attention.key.weight, 1 / 8)
    check_truncated(layer.attention.output.weight, 1 / 8)
    check_truncated(layer.ff.output.weight, 1 / 16)
    check_truncated(p.cross_attentions[0].attention.value.weight, 1 / math.sqrt(48))
    assert not layer.attention.key.bias.any()
    assert not layer.ff.hidden.bias.any()


def test_attention_pool_is_xaviers_uniform():
    p = setattn.init_attention_pool(64, num_heads=8, num_probes=32, hidden=128, rng=0)
    check_uniform(p.probe, math.sqrt(6 / 96))
    check_uniform(p.attention.query.weight, math.sqrt(6 / 128))
    check_uniform(p.attention.output.weight, math.sqrt(6 / 128))
    check_uniform(p.ff.output.weight, math.sqrt(6 / 192))
    assert not p.attention.query.bias.any()
    assert not p.ff.output.bias.any()


def test_inducing_points_and_seeds_are_xaviers_uniform():
    check_uniform(setattn.init_isab(64, num_inducing=32, num_heads=4, rng=0).inducing_points, math.sqrt(6 / 96))
    check_uniform(setattn.init_pma(64, num_seeds=32, num_heads=4, rng=0).seeds, math.sqrt(6 / 96))


def test_resampler_is_standard_normal():
    p = setattn.init_perceiver_resampler(64, num_latents=64, num_frames=32, num_media=16, num_layers=1, rng=0)
    for a in (p.latents, p.frame_embedding, p.media_embedding):
        check_normal(a, 1.0)
    check_uniform(p.layers[0].attention.query.weight, 1 / 8)
    assert p.layers[0].ff.hidden.weight.shape == (64, 256)


def test_norms_change_nothing_and_gates_are_closed():
    for kind in ("layer", "rms"):
        p = setattn.init_norm(5, kind=kind)
        assert (p.scale == 1).all()
    assert not setattn.init_norm(5).bias.any()
    params = setattn.init_gated_cross_attention(12, 10, num_heads=4, rng=0)
    assert params.attention_gate.shape == params.ff_gate.shape == (1,)
    x = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    np.testing.assert_array_equal(setattn.gated_cross_attention(x, Y[:, None], params), np.stack([x, x]))


def test_layers_are_drawn_apart():
    layers = setattn.init_latent_transformer(12, num_layers=2, num_heads=4, rng=0)
    assert (layers[0].attention.key.weight != layers[1].attention.key.weight).all()


# --- numbers --------------------------------------------------------------------------------------------------------


def numbers(name: str) -> list[str]:
    words = ("rng", "bias", "gate", "vector_gates", "form", "norm", "kind", "head_norm")
    return [p for p in inspect.signature(getattr(setattn, name)).parameters if p not in words]


def with_number(name: str, argument: str, value: Any) -> Any:
    widths, options, _ = INITS[name]
    function = getattr(setattn, name)
    positional = list(inspect.signature(function).parameters)[: len(widths)]
    if argument in positional:
        at = positional.index(argument)
        return function(*widths[:at], value, *widths[at + 1 :], **options)
    return function(*widths, **(options | {argument: value}))


@pytest.mark.parametrize("name", INITS)
def test_numbers_that_are_no_positive_integers(name):
    optional = {p.name for p in inspect.signature(getattr(setattn, name)).parameters.values() if p.default is None}
    for argument in numbers(name):
        for value in (0, -1, 4.0, True, "4", [4], np.asarray(4), np.float64(4), math.nan, None):
            if value is None and argument in optional:
                continue
            may_be_zero = argument in COUNTS and name != "init_perceiver_resampler"
            if (name, argument, repr(value)) == ("init_set_transformer", "num_encoders", "0"):
                continue  # only where the widths of set and model agree
            if may_be_zero and type(value) is int and value == 0:
                with_number(name, argument, value)
                continue
            with pytest.raises(OptionError) as caught:
                with_number(name, argument, value)
            error = caught.value
            assert (error.function, error.argument, error.got) == (name, argument, repr(value))
            assert error.wanted == f"an integer of at least {int(not may_be_zero)}"
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(name, kind):
    widths, options, _ = INITS[name]
    seed = {"rng": 0} if name in SEEDED else {}
    integers = {key: kind(value) if type(value) is int else value for key, value in options.items()}
    params = getattr(setattn, name)(*map(kind, widths), **integers, **seed)
    for a, b in zip(leaves(params), leaves(make(name)), strict=True):
        np.testing.assert_array_equal(a, b)


HEADED = {
    "init_attention": "num_heads",
    "init_mab": "num_heads",
    "init_isab": "num_heads",
    "init_pma": "num_heads",
    "init_set_transformer": "num_heads",
    "init_attention_pool": "num_heads",
    "init_cross_attention": "num_heads",
    "init_latent_transformer": "num_heads",
    "init_perceiver": "num_heads num_cross_heads",
    "init_perceiver_io": "num_heads num_cross_heads num_decoder_heads",
    "init_perceiver_resampler": "num_heads",
    "init_gated_cross_attention": "num_heads",
}


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, words in HEADED.items() for a in words.split()])
@pytest.mark.parametrize("heads", [7, 13])
def test_heads_that_do_not_divide_the_width(name, argument, heads):
    """Also heads and layers interchanged, and more heads than features."""
    widths, options, _ = INITS[name]
    options = {key: value for key, value in options.items() if key not in ("head_dim", "num_kv_heads", "value_dim")}
    with pytest.raises(OptionError) as caught:
        getattr(setattn, name)(*widths, **(options | {argument: heads}))
    error = caught.value
    assert (error.argument, error.got) == (argument, heads)
    width = int(error.wanted.split("the width ")[1].split(",")[0])
    assert width in (8, 10, 12)
    assert error.wanted == f"a divisor of the width {width}, where this one leaves a remainder of {width % heads}"


def test_heads_of_a_width_of_their_own():
    p = setattn.init_attention(12, num_heads=5, head_dim=3, rng=0)
    assert (p.query.weight.shape, p.output.weight.shape) == ((12, 5, 3), (5, 3, 12))


def test_key_heads_that_do_not_divide_the_heads():
    message = "init_attention: argument 'num_kv_heads' is 3; wanted a divisor of num_heads=4"
    with pytest.raises(OptionError, match=f"^{message}$"):
        setattn.init_attention(12, num_heads=4, num_kv_heads=3)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("init_norm", "kind"),
        ("init_attention", "head_norm"),
        *((f"init_{block}", word) for block in ("mab", "isab", "pma", "set_transformer") for word in ("form", "norm")),
    ],
)
def test_unknown_words(name, option):
    for value in ("batch", "", 1, ["layer"], np.ones(2)):
        with pytest.raises(OptionError) as caught:
            make(name, **{option: value})
        assert (caught.value.function, caught.value.argument) == (name, option)
        assert "one of '" in caught.value.wanted


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("init_linear", "bias"),
        ("init_norm", "bias"),
        ("init_feed_forward", "bias"),
        ("init_feed_forward", "gate"),
        ("init_attention", "bias"),
        ("init_gated_cross_attention", "vector_gates"),
    ],
)
def test_switches(name, option):
    for value in (1, 0, None, "no", np.ones(2)):
        with pytest.raises(OptionError, match=f"^{name}: argument '{option}' is .*; wanted True or False$"):
            make(name, **{option: value})


def test_set_transformer_without_encoders_cannot_change_the_width():
    message = "init_set_transformer: argument 'dim_x' is 3; wanted 8, as there is no encoder to change the width"
    with pytest.raises(OptionError, match=f"^{message}$"):
        setattn.init_set_transformer(3, 8, 5, num_heads=4, num_encoders=0)
