"""Perceivers whose inputs are tokens or are their own queries; learned queries.

What holds of all cases is tested in the other files, for embeddings of real inputs as well. Here is what they cannot
have: arrays of integers, and queries that are no argument.
"""

from __future__ import annotations

import importlib
import tracemalloc

import cases
import numpy as np
import oracle
import pytest
import tolerances

import setattn
from setattn import InputEmbedding, Linear, MeanHead, Plan, _blocks

every_case = pytest.mark.parametrize("name", cases.OWN_TESTS)
TOKENS = [name for name in cases.OWN_TESTS if name.startswith("tokens")]
OWN_QUERIES = [name for name in cases.OWN_TESTS if name.endswith("as-queries")]
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def run(case, backend, dtype="float32"):
    trees = case.trees(backend, dtype)
    with backend.lazily():
        out = case.call(*trees)
    return backend.numpy(out)


def with_inputs(case, x):
    return cases.replace(case, arrays=(x, *case.arrays[1:]))


def garbage(case):
    """Fill what is masked with what is in no table, or with NaN and infinities."""
    x, mask = case.arrays[0], case.masks["mask"]
    if x.dtype.kind == "f":
        return with_inputs(case, np.where(mask[..., None], x, np.resize([np.nan, np.inf, -np.inf, 3e38], x.shape)))
    return with_inputs(case, np.where(mask, x, np.resize([-1, 11, 2**31 - 1, -(2**31)], x.shape)))


# --- values ---------------------------------------------------------------------------------------------------------


@every_case
def test_same_as_the_reference(backend, dtype, name):
    """Every backend is within rounding of the reference, and computes nothing early."""
    case, value, bound = cases.expected(name, dtype)
    out = run(case, backend, dtype)
    assert str(out.dtype) == dtype or dtype == "bfloat16"
    tolerances.assert_close(out, value, bound, f"{case.function} {dtype}")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@every_case
def test_bounds_can_fail(name, dtype):
    """An error of eight times the bound would be seen."""
    _, value, bound = cases.expected(name, dtype)
    tolerances.assert_sensitive(value, bound, name)


@pytest.mark.parametrize("size", [1, 2, 5])
@every_case
def test_every_block_size_is_within_the_bound(name, size):
    """The rows of the tables go with the blocks of the elements, and with those of the queries."""
    case, value, bound = cases.expected(name, "float32")
    out = case.numpy("float32", plan=Plan(block_size=size, threads=1 + (size == 2)))
    tolerances.assert_close(out, value, bound, f"blocks of {case.function}")


@pytest.mark.parametrize("budget", [1, 2_000, 6_000])
@every_case
def test_every_cache_is_within_the_bound(monkeypatch, name, budget):
    """Whatever a block may take, of rows, of elements or of whole sets."""
    case, value, bound = cases.expected(name, "float32")
    monkeypatch.setattr(_blocks, "block_bytes", lambda x, xp: budget)
    monkeypatch.setattr(_blocks, "LEAST", 1)
    tolerances.assert_close(case.numpy("float32"), value, bound, f"blocks of {case.function}")


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "dask", "strict"], indirect=True)
@pytest.mark.parametrize("integer", INTEGERS)
def test_every_integer_dtype(backend, integer):
    """Tokens may be integers of any kind."""
    case, value, bound = cases.expected("tokens", "float32")
    out = run(with_inputs(case, case.arrays[0].astype(integer)), backend)
    tolerances.assert_close(out, value, bound, f"tokens of {integer}")


@pytest.mark.parametrize("name", ["tokens", "inputs-as-queries"])
def test_no_batch(name):
    """One set alone is the first of its batch."""
    case = cases.make(name)
    params, (x,), masks = case.params, case.arrays, case.masks
    alone = case.call((x[0],), params, {"mask": masks["mask"][0]})
    np.testing.assert_allclose(alone, case.call((x,), params, masks)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TOKENS)
def test_no_batch_on_threads(name):
    """Tokens of one set are one axis, whose blocks may go to several threads."""
    pytest.importorskip("threadpoolctl")
    case = cases.make(name)
    arrays, masks = [a[0] for a in case.arrays], {key: mask[0] for key, mask in case.masks.items()}
    spread = cases.replace(case, options=case.options | {"plan": Plan(block_size=2, threads=2)})
    np.testing.assert_allclose(
        spread.call(arrays, case.params, masks), case.call(arrays, case.params, masks), rtol=1e-12, atol=1e-12
    )


def test_a_head_is_what_follows_the_latents():
    """The head of a Perceiver is the linear layer of the norm of the mean."""
    case = cases.make("perceiver-whole")
    latents = setattn.perceiver(*case.arrays, case.params._replace(head=()), **case.masks)
    head = case.params.head
    mean = latents.mean(axis=1)
    normed = (mean - mean.mean(axis=1, keepdims=True)) / np.sqrt(mean.var(axis=1, keepdims=True) + 1e-5)
    expected = (normed * head.norm.scale + head.norm.bias) @ head.output.weight + head.output.bias
    np.testing.assert_allclose(case.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_embedded_inputs_are_the_inputs_of_the_bare_model():
    """A table, a projection and positions do what is done by hand."""
    case = cases.make("tokens-projected")
    (x, queries), p = case.arrays, case.params
    e = p.encoder.input
    y = e.tokens[x] @ e.project.weight + e.project.bias
    y = np.concatenate([y, np.broadcast_to(e.features[:7], (2, 7, 5))], axis=-1)
    bare = p._replace(encoder=p.encoder._replace(input=()))
    expected = setattn.perceiver_io(y, queries, bare, **case.masks)
    np.testing.assert_allclose(case.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_queries_that_are_given_take_the_place_of_learned_ones():
    """Learned queries are for calls that bring none."""
    case = cases.make("learned-queries")
    (x,), p = case.arrays, case.params
    q = np.linspace(-1, 1, 18).reshape(2, 9)
    given = setattn.perceiver_io(x, q, p)
    np.testing.assert_array_equal(given, setattn.perceiver_io(x, q, p._replace(queries=())))
    np.testing.assert_array_equal(
        setattn.perceiver_io(x, None, p), setattn.perceiver_io(x, p.queries, p._replace(queries=()))
    )


# --- masks ----------------------------------------------------------------------------------------------------------


@every_case
def test_garbage_under_masks(backend, name):
    """Whatever is masked changes no bit, and has a row of zeros where it is a query."""
    case = cases.make(name)
    with np.errstate(over="ignore"):
        out = run(case, backend)
        assert run(garbage(case), backend).tobytes() == out.tobytes()
    if name in OWN_QUERIES:
        assert not out[~case.masks["mask"]].any()
        assert out[case.masks["mask"]].all()


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "dask", "strict"], indirect=True)
@every_case
def test_full_and_empty_masks(backend, name):
    """A full mask is no mask; an empty one is the empty set, or zeros where the inputs are the queries."""
    case = cases.make(name)
    x = case.arrays[0]
    unmasked = cases.replace(case, masks={})
    full, empty = ({"mask": np.full((2, 7), value)} for value in (True, False))
    assert run(cases.replace(case, masks=full), backend).tobytes() == run(unmasked, backend).tobytes()
    nothing = run(with_inputs(unmasked, x[:, :0]), backend)
    masked = run(cases.replace(case, masks=empty), backend)
    if name in OWN_QUERIES:
        assert nothing.shape == (2, 0, 8)
        assert not masked.any()
    else:
        assert masked.tobytes() == nothing.tobytes()
    assert np.isfinite(masked).all()


@every_case
def test_nothing(backend, name):
    """Neither sets nor elements need be there."""
    case = cases.make(name)
    empty = cases.replace(case, arrays=tuple(a[:0] for a in case.arrays), masks={"mask": case.masks["mask"][:0]})
    assert run(empty, backend).size == 0


@pytest.mark.parametrize("token", [-1, 11, 100])
@pytest.mark.parametrize("name", TOKENS)
def test_a_token_outside_the_table(backend, name, token):
    """A token that is not in the table makes its set NaN, and no other, on every backend."""
    case = cases.make(name)
    x = case.arrays[0].copy()
    x[1, 3] = token
    full = {"mask": np.ones((2, 7), dtype=bool)}
    before = run(cases.replace(case, masks=full), backend)
    out = run(cases.replace(with_inputs(case, x), masks=full), backend)
    assert np.isnan(out[1]).all()
    assert out[0].tobytes() == before[0].tobytes()


def test_a_large_token_is_not_taken_for_a_small_one():
    """No conversion to a shorter integer brings a token back into the table."""
    case = cases.make("tokens")
    for dtype in ("int64", "uint64", "uint32"):
        x = case.arrays[0].astype(dtype)
        x[:, 0] = 2**32 + 3 if dtype != "uint32" else 2**32 - 3
        assert np.isnan(setattn.perceiver(x, case.params)).all()


def test_masked_rows_of_tables_are_not_looked_at():
    """An infinity in a row that only masked elements have changes nothing."""
    case = cases.make("perceiver-whole")
    mask = np.arange(7) != 2
    e = case.params.input
    spoiled = [a.copy() for a in (e.position, e.features)]
    for a in spoiled:
        a[2] = np.inf
    params = case.params._replace(input=e._replace(position=spoiled[0], features=spoiled[1]))
    masks = {"mask": np.broadcast_to(mask, (2, 7))}
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(case.call(case.arrays, params, masks), case.call(case.arrays, case.params, masks))


# --- transforms -----------------------------------------------------------------------------------------------------


def slope(name):
    """A direction in the floating arrays, weights of a sum, and the slope of the sum with its tolerance."""
    case, value, bound = cases.expected(name, "float64")
    rng = np.random.default_rng(7)
    weights, direction = rng.normal(size=value.shape), case.map(lambda a: rng.normal(size=a.shape))

    def moved(t):
        steps = iter(numbers(direction))
        return float(np.sum(weights * case.map(lambda a: a + t[0] * next(steps)).numpy()))

    (derivative,), (tolerance,) = tolerances.gradient(moved, np.zeros(1), noise=float(np.sum(np.abs(weights) * bound)))
    return case, weights, numbers(direction), derivative, tolerance


def numbers(case):
    found = []
    case.map(lambda a: found.append(a) or a)
    return found


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@every_case
def test_autograd(backend, name):
    """PyTorch's gradient is the slope, and the same with garbage under the mask."""
    torch = backend.xp
    case, weights, direction, derivative, tolerance = slope(name)

    def gradients(case):
        arrays, params, masks = case.trees(backend, "float64")
        leaves = []

        def track(a):
            a = a.clone().requires_grad_() if a.dtype.is_floating_point else a
            leaves.extend([a] if a.requires_grad else [])
            return a

        out = case.call(tuple(map(track, arrays)), setattn.map_params(track, params), masks)
        return [g.numpy() for g in torch.autograd.grad((torch.asarray(weights) * out).sum(), leaves)]

    found = gradients(case)
    total = sum(float(np.sum(g * d)) for g, d in zip(found, direction, strict=True))
    tolerances.assert_close(np.asarray(total), derivative, tolerance, "gradient of an embedding")
    for g, other in zip(found, gradients(garbage(case)), strict=True):
        assert g.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
@every_case
def test_jax(backend, name):
    """JAX compiles, differentiates and vectorises."""
    jax = importlib.import_module("jax")
    case, weights, direction, derivative, tolerance = slope(name)
    arrays, params, masks = case.trees(backend, "float64")
    call = jax.jit(case.call, compiler_options={"xla_backend_optimization_level": 0})
    out = call(arrays, params, masks)
    np.testing.assert_allclose(out, case.call(arrays, params, masks), rtol=1e-12, atol=1e-12)
    axes = (tuple(0 for _ in arrays), None, {"mask": 0})
    np.testing.assert_allclose(jax.vmap(call, in_axes=axes)(arrays, params, masks), out, rtol=1e-12, atol=1e-12)
    gradient = jax.jit(jax.grad(lambda p: (weights * case.call(arrays, p, masks)).sum()))(params)
    found = [np.asarray(a) for a in jax.tree.leaves(gradient)]
    own = [d for d, a in zip(direction, numbers(case), strict=True) if not any(a is x for x in case.arrays)]
    assert len(found) == len(own)
    assert all(np.isfinite(g).all() for g in found)
    if all(a.dtype.kind != "f" for a in case.arrays):
        total = sum(float(np.sum(g * d)) for g, d in zip(found, own, strict=True))
        tolerances.assert_close(np.asarray(total), derivative, tolerance, "gradient of an embedding")


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@every_case
def test_torch_compile(backend, name):
    """PyTorch makes one graph of it, and vectorises it."""
    torch, (case, value, bound) = backend.xp, cases.expected(name, "float32")
    trees = case.trees(backend, "float32")
    torch.compiler.reset()
    out = torch.compile(case.call, fullgraph=True, backend="eager")(*trees)
    tolerances.assert_close(out, value, bound, f"{case.function} float32")
    axes = (tuple(0 for _ in case.arrays), None, {"mask": 0})
    out = torch.func.vmap(case.call, in_dims=axes)(*trees)
    tolerances.assert_close(out, value, bound, f"{case.function} float32")


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_set():
    """Neither embedded inputs nor queries are held whole."""
    p = setattn.init_perceiver_io(64, 16, 64, 1, num_latents=4, num_layers=1, num_heads=1, rng=0)
    n = 100_000
    rng = np.random.default_rng(0)
    embedding = InputEmbedding(rng.normal(size=(50, 64)).astype(np.float32))
    p = p._replace(encoder=p.encoder._replace(input=embedding))
    x = rng.integers(0, 50, size=n)
    tracemalloc.start()
    try:
        out = setattn.perceiver_io(x, None, p)
        extra = tracemalloc.get_traced_memory()[1] - out.nbytes
    finally:
        tracemalloc.stop()
    assert extra < 16 * 2**20  # a block, and a third; the embedded inputs alone would be 24


# --- errors ---------------------------------------------------------------------------------------------------------

F32 = np.float32
X = np.zeros((2, 7, 10), F32)
T = np.zeros((2, 7), np.int64)


def tree(**parts):
    """A Perceiver of inputs of width 10 with an embedding."""
    params = setattn.init_perceiver(10, 8, num_latents=3, num_layers=1, num_heads=2, rng=0)
    return params._replace(input=InputEmbedding(**parts))


def zeros(*shape):
    return np.zeros(shape, F32)


@pytest.mark.parametrize(
    ("x", "params", "message"),
    [
        (X, tree(position=zeros(6, 10)), "'inputs' has shape (2, 7, 10); wanted at most 6 elements in place of 7, "
         "the rows of params.input.position"),
        (T, tree(tokens=zeros(5, 10), position=zeros(6, 10)), "'inputs' has shape (2, 7); wanted at most 6 elements in "
         "place of 7, the rows of params.input.position"),
        (X, tree(position=zeros(7, 9)), "'inputs' has shape (2, 7, 10); wanted (..., 9) to match params.input.position "
         "of shape (7, 9)"),
        (T, tree(tokens=zeros(5, 10), position=zeros(7, 9)), "'params.input.position' has shape (7, 9); wanted "
         "(rows, 10) to match params.input.tokens"),
        (X, tree(tokens=zeros(5, 10)), "'inputs' has dtype float32; wanted an integer dtype, as params.input.tokens is "
         "a table to look them up in"),
        (T, tree(), "'inputs' has dtype int64; wanted a real floating dtype of 16, 32 or 64 bits"),
        (T[0, 0], tree(tokens=zeros(5, 10)), "'inputs' is a int64; wanted an array of numpy"),
        (np.asarray(3), tree(tokens=zeros(5, 10)), "'inputs' has shape (); wanted (..., n)"),
        (T, tree(tokens=zeros(10)), "'params.input.tokens' has shape (10,); wanted (vocabulary, dim)"),
        (T, tree(tokens=zeros(0, 10)), "'params.input.tokens' has shape (0, 10); wanted (vocabulary, dim) with sizes "
         "of at least 1"),
        (T, tree(tokens=None), "'params.input.tokens' is a NoneType; wanted an array of a supported library"),
        (T, tree(tokens=zeros(5, 10).astype(float)), "'params.latents' has dtype float32; wanted float64, as "
         "params.input.tokens has"),
        (T, tree(tokens=zeros(5, 9)), "'params.cross_attentions[0].context_norm.scale' has shape (10,); wanted (9,) to "
         "match params.input.tokens"),
        (X, tree(features=zeros(7, 2)), "'inputs' has shape (2, 7, 10); wanted (..., 8) to match "
         "params.cross_attentions[0].context_norm.scale of shape (10,) with 2 features beside it"),
        (X, tree(features_project=Linear(zeros(10, 10))), "'params.input.features_project' is a Linear; wanted (), as "
         "params.input.features is absent"),
        (X, tree()._replace(input=None), "'params.input' is None; wanted a setattn.InputEmbedding, or () where the "
         "part may be absent"),
        (X, tree()._replace(head=Linear(zeros(8, 2))), "'params.head' is a Linear; wanted a setattn.MeanHead"),
        (X, tree()._replace(head=MeanHead(())), "'params.head.output' is absent; wanted a setattn.Linear"),
        (X, tree()._replace(head=MeanHead(Linear(zeros(9, 2)))), "'params.head.output.weight' has shape (9, 2); wanted "
         "(8, dim_out) to match params.latents"),
        (X, tree()._replace(output_norm=setattn.init_norm(9)), "'params.output_norm.scale' has shape (9,); wanted (8,) "
         "to match params.latents"),
    ],
)  # fmt: skip
def test_errors(x, params, message):
    """What does not fit is named, with what was wanted."""
    with pytest.raises(setattn.ArgumentError) as caught:
        setattn.perceiver(x, params)
    assert str(caught.value) == f"perceiver: argument {message}"


def test_errors_of_perceiver_io():
    """A head has no place in an encoder; the inputs are queries only if they fit the decoder."""
    params = setattn.init_perceiver_io(10, 8, 6, 2, num_latents=3, num_layers=1, num_heads=2, rng=0)

    def refused(queries, params, mask=None, x=X):
        with pytest.raises(setattn.ArgumentError) as caught:
            setattn.perceiver_io(x, queries, params, mask=mask)
        return str(caught.value).removeprefix("perceiver_io: argument ")

    headed = params._replace(encoder=params.encoder._replace(head=MeanHead(Linear(zeros(8, 2)))))
    assert refused(zeros(4, 6), headed) == (
        "'params.encoder.head' is a MeanHead; wanted (), as the decoder attends to the latents"
    )
    assert refused(None, params) == (
        "'params.decoder.query_norm.scale' has shape (6,); wanted (10,) to match the inputs, which are the queries "
        "where there are none"
    )
    assert refused(None, params._replace(queries=zeros(4, 5))) == (
        "'params.decoder.query_norm.scale' has shape (6,); wanted (5,) to match params.queries"
    )
    assert refused(None, params._replace(queries=zeros(4))) == "'params.queries' has shape (4,); wanted (o, dim)"
    tokens = params._replace(encoder=params.encoder._replace(input=InputEmbedding(zeros(5, 10))))
    assert refused(zeros(3, 4, 6), tokens, x=T) == (
        "'queries' has shape (3, 4, 6); wanted (2, 4, 6), as the other array has shape (2, 7), or (4, 6) for all of "
        "the batch"
    )
    assert refused(zeros(4, 6), tokens, np.ones((2, 6), bool), T) == (
        "'mask' has shape (2, 6); wanted (2, 7), one entry for each element of inputs"
    )


def test_the_oracle_shares_the_embedding_with_nobody():
    """The reference embeds as the library does, from 50 digits."""
    case = cases.make("tokens-projected")
    value = oracle.evaluate(
        case.function, *case.arrays, params=case.params, exact=True, activation="gelu", eps=1e-5, **case.masks
    )
    np.testing.assert_allclose(case.numpy(), value, rtol=1e-11, atol=1e-12)
