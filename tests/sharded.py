"""JAX with four devices: run by test_devices.py in a process of its own, as JAX has to be told before it starts."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from dataclasses import replace

import cases
import numpy as np
import pytest
import streams
import test_transforms
import tolerances

import setattn
from setattn import streaming

jax = pytest.importorskip("jax")
jnp = jax.numpy
AxisType, Mesh, NamedSharding, P = (
    jax.sharding.AxisType,
    jax.sharding.Mesh,
    jax.sharding.NamedSharding,
    jax.sharding.PartitionSpec,
)

DEVICES = np.array(jax.devices())
pytestmark = [
    pytest.mark.skipif(len(DEVICES) != 4, reason="run by test_devices.py, where JAX has four devices"),
    pytest.mark.parametrize("backend", ["jax"], indirect=True),
]

GATHERED = ("sab", "latent_transformer", "set_transformer-sab", "set_transformer-no-residual")
NAMES = [name for name in (*cases.NAMES, *cases.OWN_TESTS) if name not in GATHERED]

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)


def mesh_of(**axes):
    """A mesh whose axes are left to the compiler."""
    count = math.prod(axes.values())
    return Mesh(DEVICES[:count].reshape(tuple(axes.values())), tuple(axes))


def explicit_mesh(**axes):
    """A mesh whose axes are a part of types."""
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Explicit,) * len(axes),
        devices=DEVICES[: math.prod(axes.values())],
    )


class Sharded:
    """A case whose set, or the frames or media it comes in, has one part for each device."""

    def __init__(self, name, dtype, mesh, **of_axes):
        case, of_axes = cases.make(name).rounded(dtype), of_axes or {"set": mesh.shape["set"]}
        self.mesh, self.dtype, n = mesh, dtype, mesh.shape["set"]
        x = case.arrays[case.elements]
        self.tokens = x.dtype.kind == "i"
        self.before = int("frames" in name or case.masks_media)
        if self.tokens:
            arrays = tuple(a[:, :n] if i == case.elements else a for i, a in enumerate(case.arrays))
            case = replace(case, arrays=arrays, masks={key: m[:, :n] for key, m in case.masks.items()})
        else:
            case = case.resized(elements=n, before=self.before)
        self.case = case

    def put(self, a, axis=None):
        """Lay an array over the devices, by the batch if the mesh has an axis for it, and by one axis more."""
        spec = [None] * a.ndim
        if axis is not None:
            spec[axis] = "set"
            if "batch" in self.mesh.shape and -axis < a.ndim:
                spec[0] = "batch"
        return jax.device_put(a, NamedSharding(self.mesh, P(*spec)))

    def trees(self, backend):
        """Convert what the case is called with; only what has a part for each element is sharded."""
        case = self.case
        arrays, params, masks = case.trees(backend, self.dtype)
        at = -1 if self.tokens else -2 - self.before
        arrays = tuple(self.put(a, at if i == case.elements else None) for i, a in enumerate(arrays))
        axes = {"mask": -1 - self.before, "bias": -1, "pair_mask": -1, "key_positions": -2}
        masks = {key: self.put(m, axes.get(key)) for key, m in masks.items()}
        return arrays, setattn.map_params(self.put, params), masks

    def reference(self, merges=0):
        """The oracle's value, and the bound."""
        keywords = inspect.signature(getattr(setattn, self.case.function)).parameters
        options = {key: keywords[key].default for key in ("activation", "eps") if key in keywords}
        params = () if self.case.params is None else self.case.params
        return tolerances.reference(
            self.case.function,
            *self.case.arrays,
            params=params,
            dtype=self.dtype,
            merges=merges,
            **(options | self.case.masks | self.case.options),
        )


def sharded(name, dtype="float32", mesh=mesh_of):
    """Shard a case over four devices, or over two where it has no four parts."""
    return Sharded(name, dtype, mesh(set=2 if "frames" in name or name.startswith("gated") else 4))


def compiled(function, *arguments):
    """Compile without optimising, which takes longer than it gains here."""
    return jax.jit(function, compiler_options=test_transforms.UNOPTIMISED).lower(*arguments).compile()


def collectives(program):
    """Count the collectives of a compiled program by name, in arrays: several may go together."""
    found = Counter()
    for shapes, name in COLLECTIVE.findall(program.as_text()):
        found[name] += len(re.findall(r"\w+\[[\d,]*\]", shapes))
    return found


def bytes_reduced(program):
    """Add up the sizes of all arrays of 32 bits that are reduced."""
    text = " ".join(shapes for shapes, name in COLLECTIVE.findall(program.as_text()) if name == "all-reduce")
    return sum(4 * math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"f32\[([\d,]+)\]", text))


# --- every case -----------------------------------------------------------------------------------------------------


def has_table(params):
    """Say whether there is a table with a row for each place, frame or medium, of which it may have more."""
    tables = ("position", "features", "frame_embedding", "media_embedding")
    if isinstance(params, tuple) and any(len(getattr(params, name, ())) for name in tables):
        return True
    return isinstance(params, tuple) and any(map(has_table, params))


def collectives_of(backend, call):
    """Compile a call and run it; the value is right, and what its program sends is returned."""
    trees = call.trees(backend)
    program = compiled(call.case.call, *trees)
    value, bound = call.reference()
    tolerances.assert_close(np.asarray(program(*trees)), value, bound, f"{call.case.function} sharded")
    return collectives(program)


@pytest.mark.parametrize("name", NAMES)
def test_the_set_is_sharded(backend, name):
    """Whatever the function: the value is right, and nothing is gathered."""
    call = sharded(name)
    allowed = {"all-reduce", "collective-permute"} if has_table(call.case.params) else {"all-reduce"}
    assert set(collectives_of(backend, call)) <= allowed


@pytest.mark.parametrize("name", GATHERED)
def test_where_all_elements_are_asked_they_are_gathered(backend, name):
    assert collectives_of(backend, sharded(name))["all-gather"]


@pytest.mark.parametrize("name", [n for n in cases.ONE_EACH if n not in GATHERED and "features" not in n])
def test_gradients(backend, name):
    """The gradient of everything, sharded, is the slope; nothing is gathered for it."""
    call = sharded(name, "float64")
    case, slope = call.case, test_transforms.slope_of(call.case, *call.reference())
    (arrays, params, masks), boolean = call.trees(backend), {}
    if not masks.keys() & set(test_transforms.NUMBERS):
        masks, boolean = {}, masks

    def total(arrays, params, masks, boolean):
        return (slope[0] * case.call(arrays, params, masks | boolean)).sum()

    program = compiled(jax.grad(total, argnums=(0, 1, 2)), arrays, params, masks, boolean)
    gradients = program(arrays, params, masks, boolean)
    test_transforms.assert_slope_of(
        f"{case.function} sharded", slope, test_transforms.leaf_numbers(*gradients, np.asarray)
    )
    assert not collectives(program)["all-gather"]


# --- what travels ---------------------------------------------------------------------------------------------------

DIM, HEADS = 32, 4


def examples():
    """The examples of the page: a function of a set and a mask, parameters, attentions over the set, bytes reduced."""
    given = {"num_heads": HEADS, "rng": 0}
    encoder = {"num_inducing": 16, "num_encoders": 2}
    latents = setattn.convert_params(setattn.init_cross_attention(DIM, DIM, **given), jnp)
    z = jnp.ones((4, DIM), jnp.float32)
    return {
        "pma": (setattn.pma, setattn.init_pma(DIM, num_seeds=4, **given), 1, 2176),
        "attention_pool": (setattn.attention_pool, setattn.init_attention_pool(DIM, num_probes=4, **given), 1, 2176),
        "cross_attention": (lambda x, p, mask=None: setattn.cross_attention(z, x, p, mask=mask), latents, 1, 2176),
        "isab": (setattn.isab, setattn.init_isab(DIM, num_inducing=16, **given), 1, 8704),
        "set_transformer": (
            setattn.set_transformer,
            setattn.init_set_transformer(DIM, DIM, 4, **given, **encoder),
            3,
            17952,
        ),
        "perceiver": (
            setattn.perceiver,
            setattn.init_perceiver(DIM, DIM, num_latents=8, num_layers=1, **given),
            1,
            1088,
        ),
        "perceiver_resampler": (
            setattn.perceiver_resampler,
            setattn.init_perceiver_resampler(DIM, num_latents=8, num_layers=2, **given),
            2,
            8704,
        ),
    }


def example(name, n=1024, batch=1):
    function, params, attentions, size = examples()[name]
    rng = np.random.default_rng(0)
    x, mask = jnp.asarray(rng.normal(size=(batch, n, DIM)), jnp.float32), jnp.asarray(rng.random((batch, n)) < 0.7)
    return (
        (lambda x, mask, p: function(x, p, mask=mask)),
        x,
        mask,
        setattn.convert_params(params, jnp),
        attentions,
        size,
    )


@pytest.mark.parametrize("name", list(examples()))
@pytest.mark.parametrize("masked", [False, True])
def test_three_reductions_for_each_attention(backend, name, masked):
    """Of the size that the page says, in programs as they are optimised."""
    function, x, mask, params, attentions, size = example(name)
    mesh = mesh_of(set=4)
    x, mask = (jax.device_put(a, NamedSharding(mesh, P(None, "set"))) for a in (x, mask if masked else None))
    program = jax.jit(function).lower(x, mask, params).compile()
    assert collectives(program) == {"all-reduce": 3 * attentions}
    assert bytes_reduced(program) == size
    assert jax.tree.leaves(program.output_shardings)[0].is_equivalent_to(
        NamedSharding(mesh, P(None, "set") if name == "isab" else P()), 3
    )


@pytest.mark.parametrize("name", ["isab", "pma", "set_transformer"])
def test_sets_over_some_devices_and_elements_over_others(backend, name):
    """Where both are sharded, a device has the states of its own sets; where the sets are, nothing travels."""
    function, x, mask, params, attentions, size = example(name, batch=4)
    mesh = mesh_of(batch=2, set=2)
    args = [jax.device_put(a, NamedSharding(mesh, P("batch", "set"))) for a in (x, mask)]
    program = jax.jit(function).lower(*args, params).compile()
    assert collectives(program) == {"all-reduce": 3 * attentions}
    assert bytes_reduced(program) == 2 * size
    assert np.allclose(program(*args, params), function(x, mask, params), atol=1e-5)
    args = [jax.device_put(a, NamedSharding(mesh_of(batch=4), P("batch"))) for a in (x, mask)]
    program = jax.jit(function).lower(*args, params).compile()
    assert not collectives(program)


def test_rows_that_ask_a_small_set(backend):
    """Queries are sharded without a word."""
    x = jax.device_put(jnp.ones((2, 1024, DIM)), NamedSharding(mesh_of(set=4), P(None, "set")))
    y, params = jnp.ones((2, 8, DIM)), setattn.convert_params(setattn.init_mab(DIM, num_heads=HEADS, rng=0), jnp)
    assert not collectives(jax.jit(setattn.mab).lower(x.astype("float32"), y.astype("float32"), params).compile())


def test_memory_is_divided(backend):
    """Four devices hold a quarter of the intermediate results each."""
    function, x, mask, params, *_ = example("isab", n=2**16)
    sharding = NamedSharding(mesh_of(set=4), P(None, "set"))
    sizes = [
        jax.jit(function).lower(*args, params).compile().memory_analysis().temp_size_in_bytes
        for args in ((x, mask), (jax.device_put(x, sharding), jax.device_put(mask, sharding)))
    ]
    assert sizes[1] <= 0.3 * sizes[0]


def test_outside_of_jit(backend):
    """Sharded arrays need not be compiled; they are not cut into blocks, which would be sent around."""
    function, x, mask, params, *_ = example("isab", n=4096)
    sharding = NamedSharding(mesh_of(set=4), P(None, "set"))
    y = function(jax.device_put(x, sharding), jax.device_put(mask, sharding), params)
    assert y.sharding.is_equivalent_to(sharding, 3)
    assert np.allclose(y, function(x, mask, params), atol=1e-5)


# --- explicit axes --------------------------------------------------------------------------------------------------

# Tables beside the elements, of which there is no telling how they are sharded.
REFUSED = ("perceiver-whole", "perceiver-features", "inputs-as-queries", *(n for n in NAMES if n.startswith("tokens")))


TYPED = (
    *(name for name in cases.ONE_EACH if name not in GATHERED),
    *("attention-pairs-and-bias", "attention-grouped", "attention-length-pairs", "mab-pre-norm", "set_transformer"),
    *("attention_pool-all-positions", "perceiver_resampler-frames", "perceiver_resampler-ip-adapter-mean"),
)


@pytest.mark.parametrize("name", TYPED)
def test_explicit_axes(backend, name):
    """Where the sharding is a part of types, JAX is told how each product is sharded."""
    call = sharded(name, mesh=explicit_mesh)
    trees = call.trees(backend)
    value, bound = call.reference()
    y = compiled(call.case.call, *trees)(*trees)
    tolerances.assert_close(np.asarray(y), value, bound, f"{call.case.function} explicit")


@pytest.mark.parametrize("name", [*REFUSED, *GATHERED])
def test_explicit_axes_that_do_not_fit(backend, name):
    """What JAX refuses is said in the library's words, with the way round, which is the one that is shown."""
    call = sharded(name, mesh=explicit_mesh)
    trees = call.trees(backend)
    with pytest.raises(setattn.NamespaceError) as caught:
        jax.jit(call.case.call).lower(*trees)
    said = "one of arrays that are sharded over explicit axes in ways that do not fit; wanted axes of AxisType.Auto"
    assert re.fullmatch(
        rf"{call.case.function}: argument '[\w.]+' is {said}: see jax.sharding.auto_axes", str(caught.value)
    )
    value, bound = call.reference()
    with jax.set_mesh(call.mesh):
        y = jax.sharding.auto_axes(call.case.call, out_sharding=P(*[None] * value.ndim))(*trees)
    tolerances.assert_close(np.asarray(y), value, bound, f"{call.case.function} explicit")


def test_explicit_types(backend):
    """The rows of a result are where their elements are, and gradients where what they belong to is."""
    function, x, mask, params, *_ = example("isab", batch=2)
    mesh = explicit_mesh(batch=2, set=2)
    x, mask = (jax.device_put(a, NamedSharding(mesh, P("batch", "set"))) for a in (x, mask))
    assert str(jax.typeof(function(x, mask, params))) == "float32[2@batch,1024@set,32]"
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda x, p: jnp.sum(function(x, mask, p) ** 2), (0, 1)))
        of_x, of_params = gradient(x, params)
        expected = gradient(*jax.device_get((x, params)))
    assert str(jax.typeof(of_x)) == "float32[2@batch,1024@set,32]"
    assert np.allclose(of_x, expected[0], atol=1e-3)
    assert np.allclose(of_params.inducing_points, expected[1].inducing_points, atol=1e-3)


# --- a program for each device --------------------------------------------------------------------------------------


def by_devices(call):
    """Compute a case by the states of all devices."""
    case, mesh = call.case, call.mesh
    queries = case.arrays[1 - case.elements] if len(case.arrays) == 2 else None
    options = case.options | ({} if queries is None else {"queries": jnp.asarray(queries, call.dtype)})
    batch = case.arrays[case.elements].shape[:-2]
    lengths = jnp.asarray(case.masks["mask"].sum(axis=-1)) if "mask" in case.masks else mesh.shape["set"]

    def over_all(state):
        return streaming.all_reduce(
            state,
            max=lambda a: jax.lax.pmax(jax.lax.stop_gradient(a), "set"),
            sum=lambda a: jax.lax.psum(a, "set"),
        )

    def on_each(arrays, params, masks):
        x, mask = arrays[case.elements], masks.get("mask")
        state = streaming.create(case.function, params, batch=batch, length=lengths, **options)
        for _ in range(len(state._work.passes.attentions) - 1):
            state = streaming.advance(over_all(streaming.update(state, x, mask=mask)))
        state = over_all(streaming.update(state, x, mask=mask))
        if state._work.passes.rows is None:
            return streaming.finish(state)
        return streaming.rows(streaming.advance(state), x, mask=mask)[1]

    rows = case.function == "isab"
    arrays = tuple(P(None, "set") if i == case.elements else P() for i in range(len(case.arrays)))
    masks = {key: P(None, "set") for key in case.masks}
    return jax.shard_map(on_each, mesh=mesh, in_specs=(arrays, P(), masks), out_specs=P(None, "set") if rows else P())


BY_DEVICES = (*streams.FUNCTIONS, "mab-official", "isab-length", "perceiver_resampler-length")


@pytest.mark.parametrize("name", [name for name in BY_DEVICES if name in streams.NAMES])
def test_states_of_devices(backend, name):
    """Each device makes a state of its own element, which of the second set takes no part, and they are merged."""
    call = sharded(name)
    trees = call.trees(backend)
    program = compiled(by_devices(call), *trees)
    value, bound = call.reference(merges=2)
    tolerances.assert_close(np.asarray(program(*trees)), value, bound, f"{call.case.function} by devices")
    passes = len(streams.Streamed(call.case).create()._work.passes.attentions)
    assert collectives(program) == {"all-reduce": 2 * passes}


@pytest.mark.parametrize("name", ["isab", "set_transformer", "perceiver_resampler"])
def test_gradients_through_states(backend, name):
    """The gradient of what is merged is the slope."""
    call = sharded(name, "float64")
    slope = test_transforms.slope_of(call.case, *call.reference())
    arrays, params, masks = call.trees(backend)

    def total(arrays, params, masks):
        return (slope[0] * by_devices(call)(arrays, params, masks)).sum()

    gradients = compiled(jax.grad(total, argnums=(0, 1)), arrays, params, masks)(arrays, params, masks)
    found = test_transforms.leaf_numbers(*gradients, {}, np.asarray)
    test_transforms.assert_slope_of(f"{call.case.function} by devices", slope, found)
