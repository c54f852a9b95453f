"""Faulty calls are refused before any arithmetic, on every backend, with an error that says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import cases
import faults
import hypothesis.strategies as st
import numpy as np
import pytest
import shapes
from backends import BACKENDS, Backend
from cases import BATCH, DIM, DIM_Y, HEADS, Case, M, N
from hypothesis import given

import setattn
from setattn import (
    ArgumentError,
    CheckpointError,
    DTypeError,
    LayerNorm,
    Linear,
    MaskError,
    NamespaceError,
    OptionError,
    ParameterError,
    ShapeError,
)

ALL = {name: cases.make(name) for name in cases.NAMES}
UNMASKED = {name: dataclasses.replace(case, masks={}) for name, case in ALL.items()}
ONE_OF_EACH = {case.function: case for case in reversed(ALL.values())}

MODULES = [m for name, m in sys.modules.items() if name.startswith("setattn.") and "evaluate" in vars(m)]


@contextlib.contextmanager
def no_arithmetic() -> Iterator[None]:
    """Fail where a call gets past its checks."""

    def evaluate(*_: Any) -> None:
        pytest.fail("the call was let through to its arithmetic")

    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "evaluate", evaluate)
        yield


class Untouchable(np.ndarray):
    """An array with a shape and a dtype that nothing can be computed from."""

    def __array_ufunc__(self, ufunc, *_, **__):
        pytest.fail(f"{ufunc} was called")

    def __array_function__(self, function, *_, **__):
        pytest.fail(f"{function} was called")


class Foreign(np.ndarray):
    """A NumPy array that :func:`convert` leaves as it is."""


def arguments(case: Case) -> list[str]:
    """Return the names of the arguments of a case's function."""
    return list(inspect.signature(getattr(setattn, case.function)).parameters)


def convert(part: Any, to_array: Any) -> Any:
    """Convert the plain NumPy arrays of an argument, and leave all else as it is."""
    if isinstance(part, tuple):
        parts = [convert(p, to_array) for p in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return to_array(part) if type(part) is np.ndarray else part


def found_at(names: dict[str, Any], argument: str) -> Any:
    """Return what stands at a path such as ``params.encoder[0].seeds``."""
    root, rest = re.fullmatch(r"(\w+)(.*)", argument).groups()
    part = names[root]
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", rest):
        part = getattr(part, name) if name else part[int(index)]
    return part


def check_error(error: ArgumentError, function: str, names: dict[str, Any]) -> None:
    """Check an error against the arguments of the call it came from."""
    assert isinstance(error, ValueError | TypeError)
    assert error.function == function
    message = str(error)
    assert "\n" not in message
    assert message.startswith(f"{function}: argument '{error.argument}' ")
    assert message.endswith(f"; wanted {error.wanted}")
    assert len(message) < 400
    assert re.match(r"\w*", error.argument)[0] in inspect.signature(getattr(setattn, function)).parameters
    part, got = found_at(names, error.argument), error.got
    kind = f"a {type(part).__qualname__}"
    if isinstance(error, ShapeError | MaskError) and isinstance(got, tuple):
        assert got == tuple(part.shape)
        assert str(tuple(part.shape)) in message
    elif isinstance(error, ShapeError):
        assert isinstance(got, int)
        assert isinstance(part, tuple) or got in part.shape
    elif isinstance(error, DTypeError):
        assert got == part.dtype
    elif isinstance(error, NamespaceError):
        assert got in (kind, "None") or got.startswith(("an array of ", "on device "))
        assert (got == "None") <= (part is None)
    elif isinstance(error, ParameterError) and got == "absent in every entry":
        assert part
        assert not any(part)
    elif isinstance(error, ParameterError):
        absent = isinstance(part, tuple) and not part
        assert got == ("None" if part is None else "absent" if absent else kind)
    else:
        assert isinstance(error, OptionError)
        assert got in (repr(part), part) or got in map(repr, part)


def refused(
    backend: Backend,
    case: Case,
    kind: type[ArgumentError],
    argument: str,
    *,
    arrays: tuple[Any, ...] | None = None,
    params: Any = None,
    **keywords: Any,
) -> ArgumentError:
    """Make a call in float32 with something changed, and return the error it is refused with."""
    arrays = case.arrays if arrays is None else arrays
    trees = () if case.params is None else (case.params if params is None else params,)
    positional = convert((*arrays, *trees), lambda a: backend.asarray(a, "float32"))
    keywords = case.masks | case.options | keywords
    keywords = {key: convert(value, lambda a: backend.asarray(a, "float32")) for key, value in keywords.items()}
    with no_arithmetic(), pytest.raises(kind) as caught:
        getattr(setattn, case.function)(*positional, **keywords)
    error = caught.value
    assert error.argument == argument
    check_error(error, case.function, dict(zip(arguments(case), positional, strict=False)) | keywords)
    return error


def resized(a: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return an array with another size on one axis."""
    sizes = list(a.shape)
    sizes[axis] = size
    return np.resize(a, sizes)


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_wrong_width(backend):
    for name, case in UNMASKED.items():
        for i, a in enumerate(case.arrays if case.params is not None else ()):
            arrays = (*case.arrays[:i], resized(a, -1, a.shape[-1] + 1), *case.arrays[i + 1 :])
            error = refused(backend, case, ShapeError, arguments(case)[i], arrays=arrays)
            if name == "perceiver-features":
                assert re.search(r"\(\.\.\., 10\) to match .* of shape \(13,\) with 3 features beside it$", str(error))
            elif name != "attention-bare":
                assert re.search(rf"\(\.\.\., {a.shape[-1]}\) to match params.* of shape \(.*{a.shape[-1]}", str(error))


def test_axes_swapped(backend):
    case = UNMASKED["sab"]
    error = refused(backend, case, ShapeError, "x", arrays=(np.swapaxes(case.arrays[0], -1, -2),))
    assert error.got == (BATCH, DIM, N)


def test_batches_that_differ(backend):
    for case in UNMASKED.values():
        if len(case.arrays) == 1:
            continue
        i = 1 if case.function == "perceiver_io" else 0
        q = case.arrays[i]
        for batch in ((BATCH + 1,), (1,), (1, BATCH), (BATCH, 1)):
            wrong = np.resize(q, (*batch, *q.shape[-2:]))
            arrays = (wrong, case.arrays[1]) if i == 0 else (case.arrays[0], wrong)
            error = refused(backend, case, ShapeError, arguments(case)[i], arrays=arrays)
            assert f"wanted ({BATCH}, {', '.join(map(str, q.shape[-2:]))})" in str(error)


def test_batch_of_queries_without_batch_of_context(backend):
    case = UNMASKED["mab"]
    error = refused(backend, case, ShapeError, "x", arrays=(case.arrays[0], case.arrays[1][0]))
    assert error.wanted == f"({M}, {DIM}), as the other array has shape ({N}, {DIM_Y})"


def test_too_few_axes(backend):
    for case in UNMASKED.values():
        for i, argument in enumerate(arguments(case)[: len(case.arrays)]):
            for shape in ((), (DIM,)) if case.params is not None else ((),):
                arrays = (*case.arrays[:i], np.ones(shape), *case.arrays[i + 1 :])
                assert refused(backend, case, ShapeError, argument, arrays=arrays).got == shape


def test_resampler_features_lack_the_axis_of_an_embedding(backend):
    for name, wanted in (("frames", "frames, n, dim"), ("media-frames", "media, frames, n, dim")):
        case = UNMASKED[f"perceiver_resampler-{name}"]
        error = refused(backend, case, ShapeError, "features", arrays=(case.arrays[0][0, 0],))
        assert error.wanted == f"(..., {wanted})"


def test_resampler_without_embeddings_takes_further_axes_for_batch():
    case = UNMASKED["perceiver_resampler"]
    assert setattn.perceiver_resampler(np.ones((2, 3, N, DIM)), case.params).shape == (2, 3, 5, DIM)


@pytest.mark.parametrize("frames", [1, 2, 6])
def test_frames_are_not_in_the_result(frames):
    case = UNMASKED["perceiver_resampler-frames"]
    assert setattn.perceiver_resampler(np.ones((BATCH, frames, N, DIM)), case.params).shape == (BATCH, 5, DIM)


@pytest.mark.parametrize(
    ("name", "axis", "part"), [("frames", -3, "frame"), ("media", -3, "media"), ("media-frames", -4, "media")]
)
def test_more_frames_or_media_than_rows(backend, name, axis, part):
    case = UNMASKED[f"perceiver_resampler-{name}"]
    rows = getattr(case.params, f"{part}_embedding").shape[0]
    arrays = (resized(case.arrays[0], axis, rows + 1),)
    error = refused(backend, case, ShapeError, "features", arrays=arrays)
    wanted = f"at most {rows} in place of {rows + 1} on its {part} axis, the rows of params.{part}_embedding"
    assert error.wanted == wanted


def test_more_elements_than_positions(backend):
    case = UNMASKED["perceiver_resampler-ip-adapter-mean"]
    rows = case.params.position.shape[0]
    error = refused(backend, case, ShapeError, "features", arrays=(np.ones((BATCH, rows + 1, DIM_Y)),))
    assert error.wanted == f"at most {rows} in place of {rows + 1} on its n axis, the rows of params.position"
    assert case.numpy().shape[:2] == (BATCH, 2 + 5)


def test_positions_are_added_before_the_input_layer(backend):
    case = UNMASKED["perceiver_resampler-ip-adapter-mean"]
    params = case.params._replace(position=np.ones((9, DIM)))
    error = refused(backend, case, ShapeError, "features", params=params)
    assert error.wanted == f"(..., {DIM}) to match params.position of shape (9, {DIM})"


def test_input_that_is_no_layer(backend):
    case = UNMASKED["perceiver_resampler-idefics2-connector"]
    for wrong, got in ((None, "None"), (LayerNorm(), "a LayerNorm")):
        error = refused(backend, case, ParameterError, "params.input", params=case.params._replace(input=wrong))
        assert (error.got, error.wanted[:45]) == (got, "a setattn.Linear or setattn.FeedForward" + error.wanted[39:45])
    ff = case.params.input._replace(output=())
    refused(backend, case, ShapeError, "params.latents", params=case.params._replace(input=ff))


def test_latents_of_the_mean_that_do_not_fit_the_learned_ones(backend):
    case = UNMASKED["perceiver_resampler-ip-adapter-mean"]
    made = case.params.mean_latents
    project = Linear(made.project.weight[..., :5], ())
    params = case.params._replace(mean_latents=made._replace(project=project))
    error = refused(backend, case, ShapeError, "params.mean_latents.project.weight", params=params)
    assert (error.got, error.wanted) == ((DIM, 2, 5), f"(dim_in, p, {DIM}) to match params.latents")
    flat = Linear(np.ones((DIM, 2 * DIM)))
    params = case.params._replace(mean_latents=made._replace(project=flat))
    refused(backend, case, ShapeError, "params.mean_latents.project.weight", params=params)
    refused(
        backend, case, ParameterError, "params.mean_latents", params=case.params._replace(mean_latents=made.project)
    )


def test_one_row_of_time_embedding_is_not_shared_by_all_frames(backend):
    case = UNMASKED["perceiver_resampler-frames"]
    params = case.params._replace(frame_embedding=case.params.frame_embedding[:1])
    refused(backend, case, ShapeError, "features", params=params)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("isab", "inducing_points"),
        ("pma", "seeds"),
        ("attention_pool", "probe"),
        ("perceiver", "latents"),
        ("perceiver_resampler", "latents"),
    ],
)
def test_learned_queries_of_a_wrong_shape(backend, name, field):
    case = UNMASKED[name]
    queries = getattr(case.params, field)
    for wrong in (queries[None], queries[0], queries[:0], queries[:, :0]):
        params = case.params._replace(**{field: wrong})
        assert refused(backend, case, ShapeError, f"params.{field}", params=params).got == wrong.shape
    with pytest.raises(ShapeError, match=field):
        getattr(setattn, name)(*case.arrays, case.params._replace(**{field: resized(queries, 1, DIM + 1)}))


def test_batch_and_number_of_elements_may_be_zero():
    for case in UNMASKED.values():
        for i, a in enumerate(case.arrays):
            for axis in range(a.ndim - 1):
                arrays = (*case.arrays[:i], resized(a, axis, 0), *case.arrays[i + 1 :])
                with contextlib.suppress(shapes.UnfitError):
                    wanted = shapes.infer(case.function, arrays, case.params, case.options)
                    assert dataclasses.replace(case, arrays=arrays).numpy().shape == wanted


def test_no_features(backend):
    for case in UNMASKED.values():
        arrays = (case.arrays[0][..., :0], *case.arrays[1:])
        error = refused(backend, case, ShapeError, arguments(case)[0], arrays=arrays)
        assert "at least one feature" in error.wanted


def test_heads_without_features(backend):
    case = UNMASKED["attention"]
    for part in ("key", "value", "query"):
        p = getattr(case.params, part)
        params = case.params._replace(**{part: Linear(p.weight[..., :0], p.bias[..., :0])})
        error = refused(backend, case, ShapeError, f"params.{part}.weight", params=params)
        assert "with sizes of at least 1" in error.wanted


def test_heads_are_no_multiple_of_key_heads(backend):
    case = UNMASKED["attention-grouped"]
    query = case.params.query._replace(weight=case.params.query.weight[:, :3])
    error = refused(backend, case, ShapeError, "params.query", params=case.params._replace(query=query))
    assert (error.got, error.wanted) == (3, "a multiple of 2, the heads of params.key")


def test_queries_that_heads_do_not_divide(backend):
    case = UNMASKED["attention-bare"]
    error = refused(backend, case, ShapeError, "query", arrays=(np.ones((M, DIM + 1)), case.arrays[1]))
    assert (error.got, error.wanted) == (DIM + 1, "a multiple of head_dim=3, as params.query is absent")


def test_branch_of_another_width_than_its_residual(backend):
    case = UNMASKED["mab"]
    attention = case.params.attention
    output = Linear(attention.output.weight[..., :5], attention.output.bias[:5])
    params = case.params._replace(attention=attention._replace(output=output))
    error = refused(backend, case, ShapeError, "params.attention", params=params)
    assert (error.got, error.wanted) == (5, f"{DIM}, to be added to x")
    params = case.params._replace(ff=case.params.ff._replace(output=()))
    error = refused(backend, case, ShapeError, "params.ff", params=params)
    assert (error.got, error.wanted) == (9, f"{DIM}, to be added to x")


def test_queries_that_are_not_added_may_have_another_width(backend):
    """Only then: the norms and the network that follow are as wide as the attention's output."""
    case = UNMASKED["mab-no-residual"]
    with no_arithmetic(), pytest.raises(ShapeError) as caught:
        case.on(backend, "float32", query_residual=True)
    assert (caught.value.argument, caught.value.got) == ("params.attention", 8)
    assert caught.value.wanted == f"{DIM}, to be added to x"
    params = case.params._replace(output_norm=LayerNorm(np.ones(DIM)))
    error = refused(backend, case, ShapeError, "params.output_norm.scale", params=params)
    assert (error.got, error.wanted) == ((DIM,), "(8,) to match params.attention.output")


# --- parameter trees ------------------------------------------------------------------------------------------------


def test_params_of_another_kind(backend):
    for case in UNMASKED.values():
        for wrong in (list(case.params or ()), tuple(case.params or ()), None, {}, Linear(np.ones((DIM, DIM)))):
            if case.params is not None and type(wrong) is not type(case.params):
                arrays = convert(case.arrays, lambda a: backend.asarray(a, "float32"))
                with no_arithmetic(), pytest.raises(ParameterError) as caught:
                    getattr(setattn, case.function)(*arrays, wrong, **case.options)
                check_error(caught.value, case.function, {"params": wrong})


def test_part_that_must_not_be_absent(backend):
    case = UNMASKED["set_transformer"]
    error = refused(backend, case, ParameterError, "params.pma", params=case.params._replace(pma=()))
    assert (error.got, error.wanted) == ("absent", "a setattn.PMA")


def test_none_for_an_absent_part(backend):
    case = UNMASKED["mab"]
    error = refused(backend, case, ParameterError, "params.project", params=case.params._replace(project=None))
    assert error.wanted == "a setattn.Linear, or () where the part may be absent"
    attention = case.params.attention._replace(key=case.params.attention.key._replace(bias=None))
    params = case.params._replace(attention=attention)
    error = refused(backend, case, NamespaceError, "params.attention.key.bias", params=params)
    assert error.wanted.endswith(", or () where the part may be absent")


def test_latents_that_would_never_meet_the_inputs(backend):
    case = UNMASKED["perceiver"]
    params = case.params._replace(cross_attentions=((), ()))
    refused(backend, case, ParameterError, "params.cross_attentions", params=params)
    case = UNMASKED["perceiver_resampler"]
    refused(backend, case, ParameterError, "params.layers", params=case.params._replace(layers=()))


def test_unknown_keyword_is_pythons_own_error():
    case = UNMASKED["sab"]
    with pytest.raises(TypeError, match="masks"):
        setattn.sab(*case.arrays, case.params, masks=None)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_mask_of_another_shape(backend):
    for case in ALL.values():
        axes = case.masks["mask"].shape if "mask" in case.masks else ()
        for shape in {(), axes[1:], (1, *axes), (*axes, 1), (*axes[:-1], 1), (1, *axes[1:]), axes[::-1]} - {axes}:
            if axes:
                error = refused(backend, case, MaskError, "mask", mask=np.ones(shape, bool))
                assert error.wanted.startswith(f"{axes}, one entry for each ")


def test_mask_never_lands_on_another_axis_of_the_same_size(backend):
    """Where batch, set, queries and heads are of one size, only its number of axes tells what a mask is for."""
    size, rng = 4, np.random.default_rng(0)
    params = setattn.init_attention(size * size, num_heads=size, rng=rng)
    x = rng.normal(size=(size, size, size * size))
    case = Case("attention", (x, x), params)
    for argument, ndim in (("mask", 3), ("mask", 4), ("mask", 1), ("pair_mask", 2), ("pair_mask", 4)):
        refused(backend, case, MaskError, argument, **{argument: np.ones((size,) * ndim, bool)})
    unbatched = Case("attention", (x[0], x[0]), params)
    refused(backend, unbatched, MaskError, "mask", mask=np.ones((HEADS, size), bool))


def test_mask_for_queries_where_keys_are_wanted(backend):
    case = UNMASKED["mab"]
    refused(backend, case, MaskError, "mask", mask=np.ones((BATCH, M), bool))
    refused(backend, case, MaskError, "query_mask", query_mask=np.ones((BATCH, N), bool))
    refused(backend, case, MaskError, "pair_mask", pair_mask=np.ones((BATCH, N, M), bool))


def test_media_locations_of_another_shape(backend):
    case = ALL["gated_cross_attention"]
    refused(backend, case, MaskError, "media_locations", media_locations=np.ones((N,), bool))
    refused(backend, case, MaskError, "media_locations", media_locations=np.ones((BATCH, 3), bool))
    refused(backend, case, MaskError, "mask", mask=np.ones((BATCH, 15), bool))
    refused(backend, case, MaskError, "pair_mask", pair_mask=np.ones((BATCH, N, 15), bool))
    refused(backend, case, MaskError, "pair_mask", pair_mask=np.ones((N, 3), bool))


def test_length_scale_that_does_not_fit(backend):
    """Factors are for heads or for their features; what a network modulates them by is of a head."""
    case, head_dim = UNMASKED["attention-length-pairs"], DIM // HEADS
    scale = case.params.length_scale

    def wrong(kind: type[ArgumentError], argument: str, **parts: Any) -> ArgumentError:
        params = case.params._replace(length_scale=scale._replace(**parts))
        return refused(backend, case, kind, f"params.length_scale.{argument}", params=params)

    def net(*widths: int) -> setattn.FeedForward:
        return setattn.FeedForward(*[Linear(np.ones(pair)) for pair in itertools.pairwise(widths)])

    error = wrong(ShapeError, "base", base=net(1, 6, HEADS + 1))
    assert error.wanted == f"{HEADS}, for each head, or {DIM}, for each of their features"
    wrong(ShapeError, "base", base=Linear(np.ones((1, 2 * DIM))))
    error = wrong(ShapeError, "base.weight", base=Linear(np.ones((2, HEADS))))
    assert error.wanted == "(1, dim_out) to match the logarithm of the number of elements"
    wrong(ShapeError, "base.hidden.weight", base=net(DIM, 6, HEADS))
    wrong(ParameterError, "base", base=())
    wrong(ParameterError, "base", base=LayerNorm(np.ones(HEADS)))
    error = wrong(ShapeError, "query", query=net(head_dim, 6, head_dim - 1))
    assert error.wanted == f"1 or {head_dim}, to match the head_dim of params.key"
    wrong(ShapeError, "query.hidden.weight", query=net(DIM, 6, 1))
    wrong(ParameterError, "query", query=Linear(np.ones((head_dim, 1))))
    refused(backend, case, ParameterError, "params.length_scale", params=case.params._replace(length_scale=scale.base))


def test_bias_of_another_shape(backend):
    case = ALL["attention-pairs-and-bias"]
    for shape in ((N,), (BATCH, 1, N), (BATCH, 1)):
        refused(backend, case, ShapeError, "bias", bias=np.zeros(shape))


def test_key_positions_of_another_shape(backend):
    case = ALL["attention_pool-keys"]
    for shape in ((N,), (1, N, DIM), (BATCH, 1, DIM), (BATCH, N, DIM_Y), (N, DIM_Y), (N + 1, DIM), (1, DIM)):
        error = refused(backend, case, ShapeError, "key_positions", key_positions=np.zeros(shape))
        assert error.wanted == f"({N}, {DIM}), one row for each element, or ({BATCH}, {N}, {DIM})"


def test_more_elements_than_rows_of_a_table_of_positions(backend):
    case = UNMASKED["attention_pool-table"]
    error = refused(backend, case, ShapeError, "x", arrays=(resized(case.arrays[0], -2, N + 3),))
    assert error.wanted == f"at most {N + 2} elements in place of {N + 3}, the rows of params.position"
    case = UNMASKED["attention_pool-all-positions"]
    for field in ("position", "probe_position"):
        table = getattr(case.params, field)
        for wrong in (table[None], table[0], table[:0], table[:, 1:]):
            params = case.params._replace(**{field: wrong})
            assert refused(backend, case, ShapeError, f"params.{field}", params=params).got == wrong.shape
    params = case.params._replace(probe_position=case.params.probe_position[1:])
    error = refused(backend, case, ShapeError, "params.probe_position", params=params)
    assert error.wanted == f"(5, {DIM}) to match params.probe"


def test_features_that_the_axes_do_not_divide(backend):
    error = refused(backend, ALL["sincos_features"], OptionError, "dim", dim=14)
    assert error.wanted == "a positive multiple of 4"


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int32"])
def test_mask_that_is_not_boolean(backend, dtype):
    for case in ALL.values():
        for argument, m in case.masks.items():
            if argument not in faults.NUMBERS:
                error = refused(backend, case, DTypeError, argument, **{argument: m.astype(dtype)})
                # Scores can be added where there is an argument for them, and it has one for each element.
                additive = argument == "mask" and dtype == "float32" and "bias" in arguments(case)
                hint = "; scores to add go to bias" if additive else ""
                assert error.wanted == f"bool, True where an element takes part{hint}"


# --- dtypes, namespaces, devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8", "complex64"])
def test_first_array_of_a_dtype_that_is_not_floating(backend, dtype):
    for case in ONE_OF_EACH.values():
        case = dataclasses.replace(case, masks={})
        arrays = (case.arrays[0].astype(dtype), *case.arrays[1:])
        error = refused(backend, case, DTypeError, arguments(case)[0], arrays=arrays)
        assert error.wanted == "a real floating dtype of 16, 32 or 64 bits"


def test_floating_dtype_of_another_width_is_refused():
    case = UNMASKED["sab"]
    if np.finfo(np.longdouble).bits != 64:
        with pytest.raises(DTypeError, match=r"longdouble|float128|float96"):
            setattn.sab(case.arrays[0].astype(np.longdouble), case.params)
    torch = pytest.importorskip("torch")
    with pytest.raises(DTypeError, match="float8"):
        setattn.sab(torch.ones((N, DIM)).to(torch.float8_e4m3fn), BACKENDS["torch"].params(case.params, "float32"))


TWO_DTYPES = [b.name for b in BACKENDS.values() if len(b.dtypes) > 1]


@pytest.mark.parametrize("backend", TWO_DTYPES, indirect=True)
def test_dtypes_that_differ(backend):
    for case in UNMASKED.values():
        for x, p in (("float32", "float64"), ("float64", "float32")):
            if case.params is not None:
                arrays = convert(case.arrays, lambda a, x=x: backend.asarray(a, x))
                params = convert(case.params, lambda a, p=p: backend.asarray(a, p))
                with no_arithmetic(), pytest.raises(DTypeError) as caught:
                    getattr(setattn, case.function)(*arrays, params, **case.options)
                check_error(caught.value, case.function, {"params": params})
                assert p in str(caught.value.got)
                assert x in caught.value.wanted


@pytest.mark.parametrize("backend", TWO_DTYPES, indirect=True)
def test_second_array_of_another_dtype(backend):
    case = UNMASKED["mab"]
    x, y = backend.asarray(case.arrays[0], "float32"), backend.asarray(case.arrays[1], "float64")
    with no_arithmetic(), pytest.raises(DTypeError) as caught:
        setattn.mab(x, y, backend.params(case.params, "float32"))
    check_error(caught.value, "mab", {"y": y})


def test_arrays_of_two_libraries(backend):
    """Where everything else fits, the one foreign array is named, with both libraries."""
    if backend.module == "numpy":
        pytest.importorskip("array_api_strict")
        given, own, strict = "array_api_strict", "numpy", BACKENDS["strict"]
        foreign = functools.partial(strict.asarray, dtype="float32")
    else:
        given, own = "numpy", backend.xp.__name__.removesuffix(".numpy").removesuffix(".array")

        def foreign(a: np.ndarray) -> np.ndarray:
            return (a if a.dtype == bool else np.float32(a)).view(Foreign)

    case = ALL["mab"]
    value = case.params.attention.value
    value = value._replace(bias=foreign(value.bias))
    params = case.params._replace(attention=case.params.attention._replace(value=value))
    errors = [
        refused(backend, case, NamespaceError, "y", arrays=(case.arrays[0], foreign(case.arrays[1]))),
        *[refused(backend, case, NamespaceError, key, **{key: foreign(m)}) for key, m in case.masks.items()],
    ]
    if backend.name != "dask":  # whose parameters may be what its chunks are
        errors.append(refused(backend, case, NamespaceError, "params.attention.value.bias", params=params))
    for error in errors:
        assert error.got == f"an array of {given}"
        assert error.wanted == f"an array of {own}, as the first argument is"


LIBRARIES = [b.name for b in BACKENDS.values() if b.module not in ("numpy", "dask.array")]


@pytest.mark.parametrize("backend", LIBRARIES, indirect=True)
def test_weights_of_numpy_with_arrays_of_another_library(backend):
    case = UNMASKED["set_transformer"]
    params = setattn.map_params(lambda a: np.float32(a).view(Foreign), case.params)
    error = refused(backend, case, NamespaceError, "params.encoder[0].inducing_points", params=params)
    assert error.got == "an array of numpy"


def test_things_that_are_no_arrays(backend):
    for case in ONE_OF_EACH.values():
        for i, argument in enumerate(arguments(case)[: len(case.arrays)]):
            none = () if argument == "queries" else (("None", None),)  # the learned ones, or the inputs
            for _, wrong in (*faults.no_arrays(np.float32(case.arrays[i])), *none):
                arrays = (*case.arrays[:i], wrong, *case.arrays[i + 1 :])
                refused(backend, case, NamespaceError, argument, arrays=arrays)
        for argument, m in case.masks.items():
            for _, wrong in faults.no_arrays(m):
                refused(backend, case, NamespaceError, argument, **{argument: wrong})


def test_no_arrays_among_the_parameters(backend):
    case = UNMASKED["mab"]
    for what, wrong in faults.no_arrays(np.float32(case.params.ff.hidden.weight)):
        if what != "a non-empty tuple":
            params = case.params._replace(ff=case.params.ff._replace(hidden=Linear(wrong)))
            refused(backend, case, NamespaceError, "params.ff.hidden.weight", params=params)


def test_arrays_of_objects_and_data_frames():
    case = UNMASKED["sab"]
    with pytest.raises(DTypeError, match="dtype object"):
        setattn.sab(case.arrays[0].astype(object), case.params)
    pandas = pytest.importorskip("pandas")
    with pytest.raises(NamespaceError, match="DataFrame"):
        setattn.sab(pandas.DataFrame(case.arrays[0][0]), case.params)


def spoiled_one_by_one(backend: Backend, spoil: Any) -> Iterator[tuple[str, ArgumentError]]:
    """Spoil an array after another of a call that has them in all places; return what is at fault, and the error."""
    case = ALL["attention-pairs-and-bias"]
    arrays, params, masks = case.trees(backend, "float32")
    key = params.key._replace(weight=spoil(params.key.weight))
    calls = {
        "query": ((spoil(arrays[0]), arrays[1]), params, masks),
        "context": ((arrays[0], spoil(arrays[1])), params, masks),
        "params.key.weight": (arrays, params._replace(key=key), masks),
    }
    calls |= {key: (arrays, params, masks | {key: spoil(m)}) for key, m in masks.items()}
    for argument, trees in calls.items():
        with no_arithmetic(), pytest.raises(NamespaceError) as caught:
            case.call(*trees)
        assert caught.value.argument == argument
        assert "\n" not in str(caught.value)
        yield caught.value
    with pytest.raises(NamespaceError, match=f"holding {re.escape(caught.value.got)}; wanted"):
        setattn.convert_params(Linear(spoil(arrays[1])), np)


def _nested(a):
    torch = sys.modules["torch"]
    return torch.nested.nested_tensor([a.reshape(-1), a.reshape(-1)[1:]], layout=torch.jagged)


KINDS_OF_TORCH = {
    "sparse": (lambda a: a.to_sparse(), "a tensor of layout torch.sparse_coo"),
    "rows": (lambda a: a.reshape(-1, a.shape[-1]).to_sparse_csr(), "a tensor of layout torch.sparse_csr"),
    "nested": (lambda a: sys.modules["torch"].nested.nested_tensor([a[0], a[1][1:]]), "a nested tensor"),
    "jagged": (_nested, "a nested tensor"),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse .* in beta state:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("kind", KINDS_OF_TORCH)
def test_tensors_that_are_not_dense(backend, kind):
    spoil, got = KINDS_OF_TORCH[kind]
    for error in spoiled_one_by_one(backend, spoil):
        assert error.got == got


class Duck:
    """The array of a library that Dask takes for one."""

    __array_function__ = __array_ufunc__ = None
    ndim = 2

    def __init__(self, dtype: Any) -> None:
        self.shape, self.dtype = (0,), np.dtype(dtype)


@pytest.mark.parametrize("backend", ["dask"], indirect=True)
@pytest.mark.parametrize("kind", [np.ma.MaskedArray, np.matrix, Duck])
def test_chunks_of_dask_that_are_no_plain_arrays(backend, kind):
    def spoil(a):
        a = backend.xp.asarray(a).copy()
        a._meta = Duck(a.dtype) if kind is Duck else np.empty((0, 0), a.dtype).view(kind)
        return a

    for error in spoiled_one_by_one(backend, spoil):
        assert error.got == f"an array of dask with chunks of {kind.__name__}"
    masked = backend.xp.ma.masked_array(backend.xp.ones((N, DIM)), False)
    with backend.lazily(), pytest.raises(NamespaceError, match="chunks of MaskedArray"):
        setattn.sab(masked, backend.params(ALL["sab"].params, "float64"))


def test_devices_of_array_api_strict_that_differ():
    strict = pytest.importorskip("array_api_strict")
    case, here, there = ALL["mab"], BACKENDS["strict"], BACKENDS["strict-device1"]
    attention = case.params.attention
    value = attention.value._replace(bias=there.asarray(attention.value.bias, "float32"))
    params = case.params._replace(attention=attention._replace(value=value))
    errors = [
        refused(here, case, NamespaceError, "y", arrays=(case.arrays[0], there.asarray(case.arrays[1], "float32"))),
        refused(here, case, NamespaceError, "params.attention.value.bias", params=params),
    ]
    errors += [refused(here, case, NamespaceError, key, **{key: there.asarray(m)}) for key, m in case.masks.items()]
    for error in errors:
        assert error.got == f"on device {strict.Device('device1')}"
        assert error.wanted == f"device {strict.Device('CPU_DEVICE')}, as the first argument is"


def test_devices_of_torch_that_differ():
    torch = pytest.importorskip("torch")
    case, backend = ALL["mab"], BACKENDS["torch"]
    meta = functools.partial(torch.asarray, device="meta")
    y = meta(backend.asarray(case.arrays[1], "float32"))
    error = refused(backend, case, NamespaceError, "y", arrays=(case.arrays[0], y))
    assert (error.got, error.wanted) == ("on device meta", "device cpu, as the first argument is")
    refused(backend, case, NamespaceError, "mask", mask=meta(backend.asarray(case.masks["mask"])))
    params = setattn.map_params(meta, backend.params(case.params, "float32"))
    error = refused(backend, case, NamespaceError, "params.attention.key.weight", params=params)
    assert error.got == "on device meta"


TWO_DEVICES_OF_JAX = """
import jax, numpy as np, setattn
params = setattn.convert_params(setattn.init_mab(4, num_heads=2, rng=0), jax.numpy)
x = jax.numpy.ones((3, 4), dtype=jax.numpy.float32)
here, there = (jax.device_put(x, device) for device in jax.devices())
assert setattn.sab(there, params).devices() == there.devices()
try:
    setattn.sab(here, jax.device_put(params, jax.devices()[1]))
except setattn.NamespaceError as error:
    print(error)
"""


def test_devices_of_jax_that_differ():
    """JAX moves what was not put anywhere; what was put on different devices is refused."""
    pytest.importorskip("jax")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", TWO_DEVICES_OF_JAX]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "params.attention.key.weight" in done.stdout
    assert re.search(r"is on device \S*1; wanted device \S*0,", done.stdout)


def test_calls_need_no_values():
    """On torch's meta device arrays have shapes and dtypes alone."""
    torch = pytest.importorskip("torch")
    for case in ALL.values():
        positional = case.arrays if case.params is None else (*case.arrays, case.params)
        keywords = {key: torch.asarray(m).to("meta") for key, m in case.masks.items()} | case.options
        out = getattr(setattn, case.function)(*convert(positional, lambda a: torch.asarray(a).to("meta")), **keywords)
        assert tuple(out.shape) == shapes.infer(case.function, case.arrays, case.params, case.masks | case.options)


def test_jax_without_float64_keeps_float32():
    jax = pytest.importorskip("jax")
    case = ALL["attention"]
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64():
        assert case.on(BACKENDS["jax"], "float32").dtype == np.float32


def test_dask_sizes_must_be_known():
    da = pytest.importorskip("dask.array")
    case, backend = ALL["attention"], BACKENDS["dask"]
    y, mask = backend.asarray(case.arrays[1], "float32"), backend.asarray(case.masks["mask"])
    chosen = da.any(mask, axis=1)
    query, params = backend.asarray(case.arrays[0][0], "float32"), backend.params(case.params, "float32")
    for argument, first, second in (("context", y[chosen], mask), ("mask", y, mask[chosen])):
        with no_arithmetic(), pytest.raises(ShapeError) as caught:
            setattn.attention(query, first, params, mask=second)
        assert caught.value.argument == argument
        assert "compute_chunk_sizes()" in caught.value.wanted


def test_dask_is_not_computed_by_a_call():
    dask = pytest.importorskip("dask")

    def scheduler(*_: Any, **__: Any) -> None:
        pytest.fail("a graph was computed")

    with dask.config.set(scheduler=scheduler):
        for case in ONE_OF_EACH.values():
            out = case.on(BACKENDS["dask"], "float32")
            assert out.shape == shapes.infer(case.function, case.arrays, case.params, case.masks | case.options)


@pytest.mark.parametrize("chunks", [1, 5])
def test_dask_chunks_may_split_the_features(chunks):
    da = pytest.importorskip("dask.array")
    case, backend = ALL["sab"], BACKENDS["dask"]
    x, mask = da.from_array(case.arrays[0], chunks=(1, 3, chunks)), backend.asarray(case.masks["mask"])
    out = setattn.sab(x, backend.params(case.params, "float64"), mask=mask, **case.options)
    with backend.active():
        np.testing.assert_allclose(backend.numpy(out), case.numpy(), rtol=1e-12, atol=1e-12)


# --- options --------------------------------------------------------------------------------------------------------


def test_options_out_of_range(backend):
    for case in ONE_OF_EACH.values():
        for option in set(arguments(case)) & set(faults.WRONG_OPTIONS):
            for value in faults.WRONG_OPTIONS[option]:
                wrong = value.view(Foreign) if type(value) is np.ndarray else value
                refused(backend, case, OptionError, option, **{option: wrong})


def test_numbers_that_overflow_in_what_is_computed_in(backend, dtype):
    """Half precision is computed in float32; in float64, which holds every number of Python, all are taken."""
    case = UNMASKED["attention-head-layernorm"]
    trees = case.trees(backend, dtype)
    for option, value in (("scale", 1e39), ("eps", 1e300), ("eps", np.float64(3.5e38)), ("scale", 10**39)):
        call = functools.partial(dataclasses.replace(case, options={option: value}).call, *trees)
        if dtype == "float64":
            assert call().dtype == backend.dtype(dtype)
            continue
        with no_arithmetic(), pytest.raises(OptionError) as caught:
            call()
        check_error(caught.value, case.function, {option: value})
        assert caught.value.wanted == "a number of at most 3.4028235e+38, the largest of float32, which is computed in"


@pytest.mark.parametrize("value", [float(np.finfo(np.float32).max), 1e-300, 5e-324])
def test_numbers_at_the_edge_of_float32_are_taken(backend, value):
    """What is too small for float32 is 0 in it."""
    case = ALL["attention-head-layernorm"]
    with np.errstate(all="ignore"):
        case.on(backend, "float32", scale=value, eps=value)


def test_resolutions_say_that_there_may_be_a_sequence(backend):
    case = ALL["fourier_features"]
    for wrong in (np.array([7.0, 9.0, 11.0]).view(Foreign), [7, 9], "224", (7, 0, 9), None):
        error = refused(backend, case, OptionError, "max_resolution", max_resolution=wrong)
        assert error.wanted == "a finite number greater than 0, or a sequence of 3, one for each axis"
    refused(backend, case, OptionError, "max_resolution", max_resolution=(7, 1e39, 9))


def test_every_keyword_is_tried():
    keywords = {
        p.name
        for function in ONE_OF_EACH
        for p in inspect.signature(getattr(setattn, function)).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    assert keywords == set(faults.WRONG_OPTIONS) | set(faults.MASKS) | set(faults.NUMBERS)


def test_depth_must_use_every_part(backend):
    error = refused(backend, ALL["perceiver"], OptionError, "depth", depth=1)
    assert error.wanted == "an integer of at least 2, to use every part"


def test_numbers_of_numpy_do_not_widen_the_result(backend):
    case = ALL["attention-head-layernorm"]
    for option in ("eps", "scale"):
        plain = case.on(backend, "float32", **{option: 2.0})
        for number in (np.float64, np.int64):
            out = case.on(backend, "float32", **{option: number(2)})
            assert out.dtype == plain.dtype
            np.testing.assert_array_equal(backend.numpy(out), backend.numpy(plain))


def test_integers_of_numpy_and_sequences_are_taken():
    case = ALL["perceiver"]
    np.testing.assert_array_equal(case.numpy(depth=np.int64(3)), case.numpy(depth=3))
    case = ALL["fourier_features"]
    np.testing.assert_array_equal(case.numpy(num_bands=np.uint8(4), max_resolution=[7, 9.0, 11]), case.numpy())


# --- inside a trace -------------------------------------------------------------------------------------------------


TRACED = ["width", "axes", "batch", "float mask", "mask shape", "mixed dtypes", "dtype of params", "node", "option"]


def faulty(what: str, backend: Backend) -> tuple[Any, tuple[Any, ...]]:
    """Return a function of arrays, parameters and masks of which one thing is wrong, and what to call it with."""
    case, options = ALL["mab"], {}
    (x, y), params, masks = case.trees(backend, "float32")
    if what == "width":
        y = y[..., 1:]
    elif what == "axes":
        x = x[0, 0]
    elif what == "batch":
        x = x[:1]
    elif what == "float mask":
        masks |= {"mask": backend.asarray(case.masks["mask"].astype("float32"), "float32")}
    elif what == "mask shape":
        masks |= {"mask": masks["mask"][:, 1:]}
    elif what == "mixed dtypes":
        y = backend.asarray(case.arrays[1], "float64")
    elif what == "dtype of params":
        params = backend.params(case.params, "float64")
    elif what == "node":
        params = params.attention
    elif what == "option":
        options = {"eps": -1.0}
    return lambda x, y, params, masks: setattn.mab(x, y, params, **masks, **options), (x, y, params, masks)


def eager_error(what: str, backend: Backend) -> ArgumentError:
    call, trees = faulty(what, backend)
    with pytest.raises(ArgumentError) as caught:
        call(*trees)
    return caught.value


def assert_same_error(error: ArgumentError, other: ArgumentError) -> None:
    assert type(error) is type(other)
    assert str(error) == str(other)
    assert vars(other).items() <= vars(error).items()  # JAX adds a note


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
@pytest.mark.parametrize("what", TRACED)
def test_faults_inside_jit_are_the_same_errors(backend, what):
    error, (call, trees) = eager_error(what, backend), faulty(what, backend)
    with no_arithmetic(), pytest.raises(ArgumentError) as caught:
        importlib.import_module("jax").jit(call)(*trees)
    assert_same_error(caught.value, error)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("what", TRACED)
def test_faults_inside_torch_compile_are_the_same_errors(backend, what):
    """With ``fullgraph=True``, which PyTorch lets no exception out of but its own, all of ours stands in its text."""
    torch, error, (call, trees) = backend.xp, eager_error(what, backend), faulty(what, backend)
    torch.compiler.reset()
    with pytest.raises(ArgumentError) as caught:
        torch.compile(call, backend="eager")(*trees)
    assert_same_error(caught.value, error)
    torch.compiler.reset()
    with pytest.raises(importlib.import_module("torch._dynamo").exc.Unsupported) as caught:
        torch.compile(call, fullgraph=True, backend="eager")(*trees)
    parts = (error.function, error.argument, error.got, error.wanted)
    assert f"raised exception {type(error).__name__}({', '.join(map(repr, parts))}" in str(caught.value)


# --- every single fault ---------------------------------------------------------------------------------------------


def is_wrong(mutant: faults.Mutant) -> bool:
    if mutant.wrong:
        return True
    try:
        shapes.infer(mutant.function, mutant.arrays, mutant.params, mutant.keywords)
    except shapes.UnfitError:
        return True
    return False


def converted(mutant: faults.Mutant, to_array: Any) -> faults.Mutant:
    keywords = {
        key: convert(value, to_array) if key in (*faults.MASKS, *faults.NUMBERS) else value
        for key, value in mutant.keywords.items()
    }
    arrays, params = convert(mutant.arrays, to_array), convert(mutant.params, to_array)
    return dataclasses.replace(mutant, arrays=arrays, params=params, keywords=keywords)


@pytest.mark.parametrize("name", cases.NAMES)
def test_every_single_fault_is_refused_and_all_else_has_the_shape_foreseen(name):
    counts = {True: 0, False: 0}
    for mutant in faults.mutants(ALL[name]):
        wrong = is_wrong(mutant)
        counts[wrong] += 1
        if wrong:
            untouchable = converted(mutant, lambda a: a.view(Untouchable))
            with pytest.raises(ArgumentError) as caught:
                untouchable.call()
            check_error(caught.value, mutant.function, untouchable.names())
        else:
            wanted = shapes.infer(mutant.function, mutant.arrays, mutant.params, mutant.keywords)
            assert mutant.call().shape == wanted, mutant
    assert counts[True] > 30
    assert counts[False] > 3


@functools.cache
def wrong_mutants(name: str) -> list[faults.Mutant]:
    return [m for m in faults.mutants(ALL[name]) if "dtype" not in m.what and is_wrong(m)]


@given(data=st.data())
def test_single_faults_are_refused_on_every_backend(backend, data):
    mutant = data.draw(st.sampled_from(wrong_mutants(data.draw(st.sampled_from(cases.NAMES)))))
    if "another library" in mutant.what and backend.module == "array_api_strict":
        return
    there = converted(mutant, lambda a: backend.asarray(a, "float32"))
    with no_arithmetic(), pytest.raises(ArgumentError) as caught:
        there.call()
    check_error(caught.value, mutant.function, there.names())


@given(name=st.sampled_from(cases.NAMES), data=st.data())
def test_arrays_of_any_shape_are_refused_or_give_the_shape_foreseen(name, data):
    """One array or mask of a shape that may share sizes with any other axis."""
    case = ALL[name]
    target = data.draw(st.sampled_from([*range(len(case.arrays)), *case.masks]))
    shape = tuple(data.draw(st.lists(st.integers(0, 13), max_size=5)))
    arrays, keywords = list(case.arrays), case.masks | case.options
    if isinstance(target, int):
        arrays[target] = np.full(shape, 0.5)
    else:
        keywords[target] = np.ones(shape, dtype=case.masks[target].dtype)
    params = () if case.params is None else (case.params,)
    try:
        wanted = shapes.infer(case.function, arrays, case.params, keywords)
    except shapes.UnfitError:
        with no_arithmetic(), pytest.raises(ArgumentError):
            getattr(setattn, case.function)(*arrays, *params, **keywords)
    else:
        assert getattr(setattn, case.function)(*arrays, *params, **keywords).shape == wanted


# --- the errors themselves ------------------------------------------------------------------------------------------


def test_one_family():
    kinds = [ShapeError, MaskError, DTypeError, NamespaceError, ParameterError, OptionError, CheckpointError]
    flat = {kind for kind in ArgumentError.__subclasses__() if kind.__module__ == "setattn"}  # streams have one more
    assert flat == set(kinds)
    for kind in kinds:
        assert issubclass(kind, ValueError) != issubclass(kind, TypeError)


@pytest.mark.parametrize("kind", ArgumentError.__subclasses__())
def test_errors_are_pickled_and_copied_whole(kind):
    error = kind("mab", "y", (2, 5, 10), "(..., 12)", "shape")
    assert str(error) == "mab: argument 'y' has shape (2, 5, 10); wanted (..., 12)"
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_long_values_are_cut_and_put_on_one_line():
    error = OptionError("sab", "eps", repr(np.ones((40, 40))), "a number")
    assert "\n" not in str(error)
    assert len(str(error)) < 200


MESSAGES = {
    "mab: argument 'y' has shape (2, 5, 11); wanted (..., 10) to match params.attention.key.weight of shape "
    "(10, 4, 3)": {"arrays": (np.ones((2, M, DIM)), np.ones((2, 5, 11)))},
    "mab: argument 'x' has shape (12,); wanted (..., m, dim)": {"arrays": (np.ones(DIM), np.ones((N, DIM_Y)))},
    "mab: argument 'x' has shape (3, 3, 12); wanted (2, 3, 12), as the other array has shape (2, 7, 10), or (3, 12) "
    "for all of the batch": {"arrays": (np.ones((3, M, DIM)), np.ones((2, N, DIM_Y)))},
    "mab: argument 'mask' has shape (2, 3); wanted (2, 7), one entry for each element of y": {
        "mask": np.ones((BATCH, M), bool)
    },
    "mab: argument 'mask' has dtype float64; wanted bool, True where an element takes part": {
        "mask": np.ones((BATCH, N))
    },
    "mab: argument 'y' has dtype float32; wanted float64, as the first argument has": {
        "arrays": (np.ones((BATCH, M, DIM)), np.ones((BATCH, N, DIM_Y), np.float32))
    },
    "mab: argument 'x' is a list; wanted an array of a supported library": {"arrays": ([1.0], np.ones((N, DIM_Y)))},
    "mab: argument 'y' is a list; wanted an array of numpy": {"arrays": (np.ones((M, DIM)), [1.0])},
    "mab: argument 'activation' is 'tanh'; wanted one of 'relu', 'squared_relu', 'gelu', 'gelu_tanh', 'silu'": {
        "activation": "tanh"
    },
    "mab: argument 'eps' is 0.0; wanted a finite number greater than 0": {"eps": 0.0},
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message):
    change = dict(MESSAGES[message])
    case = UNMASKED["mab"]
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        setattn.mab(*change.pop("arrays", case.arrays), case.params, **change)


def test_shapes_are_plain_tuples_on_torch():
    torch = pytest.importorskip("torch")
    with pytest.raises(ShapeError, match=r"has shape \(12,\);") as caught:
        setattn.sab(torch.ones(DIM), ALL["sab"].params)
    assert type(caught.value.got) is tuple


def test_parameters_are_told_apart_by_path():
    case = UNMASKED["set_transformer"]
    block = case.params.encoder[1]
    norm = LayerNorm(np.ones(5), np.ones(DIM))
    wrong = case.params._replace(
        encoder=(case.params.encoder[0], block._replace(mab_set=block.mab_set._replace(output_norm=norm)))
    )
    message = (
        "set_transformer: argument 'params.encoder[1].mab_set.output_norm.scale' has shape (5,); "
        "wanted (12,) to match the output of params.encoder[0].mab_set"
    )
    with pytest.raises(ShapeError, match=re.escape(message)):
        setattn.set_transformer(*case.arrays, wrong)


# --- what has fitted before -----------------------------------------------------------------------------------------


def spoiled(tree: Any) -> Iterator[Any]:
    """Yield a tree of parameters with something wrong, for each of its nodes and leaves in turn."""
    if not isinstance(tree, tuple):
        yield from (tree[..., None], tree[..., :-1], tree.astype("float64"), tree.tolist(), None, (tree,))
        return
    if tree:
        yield from (None, list(tree), tree[:-1])
    for i, part in enumerate(tree):
        for other in spoiled(part):
            parts = (*tree[:i], other, *tree[i + 1 :])
            yield type(tree)(*parts) if hasattr(tree, "_fields") else parts


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "mab",
        "sab",
        "isab",
        "pma",
        "set_transformer",
        "cross_attention",
        "latent_transformer",
        "gated_cross_attention",
    ],
)
def test_what_fitted_before_lets_nothing_else_through(monkeypatch, name):
    """Checks that are not made again for a tree like one that fitted are made for every other, with the same error."""
    case = ONE_OF_EACH[name].map(lambda a: a.astype("float32"))

    def outcome(params: Any) -> str:
        try:
            return str(case.call(case.arrays, params, {}).tobytes())
        except ArgumentError as error:
            return f"{type(error)} {error}"

    fitting: set[Any] = set()
    monkeypatch.setattr(setattn._parts, "_fitting", fitting)
    refused = 0
    for params in spoiled(case.params):
        fitting.clear()
        alone = outcome(params)
        fitting.clear()
        outcome(case.params)
        assert len(fitting) == 1
        assert outcome(params) == outcome(params) == alone
        refused += alone.startswith("<class")
    assert refused > 20


def test_what_fitted_is_told_apart_by_options_and_widths():
    """A tree that fits one width or one option is checked again for another."""
    case = ONE_OF_EACH["mab"].map(lambda a: a.astype("float32"))
    (x, y), params = case.arrays, case.params
    setattn.mab(x, y, params)
    for arrays in ((x[..., :-1], y), (x, y[..., :-1])):
        with pytest.raises(ShapeError, match=r"to match params\.attention"):
            setattn.mab(*arrays, params)
    output = Linear(params.attention.output.weight[..., :5])
    narrow = setattn.MAB(params.attention._replace(output=output))
    setattn.mab(x, y, narrow, query_residual=False)
    with pytest.raises(ShapeError, match="to be added to x"):
        setattn.mab(x, y, narrow)


def test_little_is_remembered(monkeypatch):
    """What is remembered of parameters that fitted has a limit, and holds no array."""
    fitting: set[Any] = set()
    monkeypatch.setattr(setattn._parts, "_fitting", fitting)
    for width in range(1, 2 * setattn._parts._MOST):
        setattn.sab(np.ones((1, width), np.float32), setattn.MAB(bare(width)))
    assert 1 <= len(fitting) <= setattn._parts._MOST

    def parts(a: Any) -> Iterator[Any]:
        yield from (part for b in a for part in parts(b)) if isinstance(a, tuple) else (a,)

    assert not any(isinstance(part, np.ndarray) for part in parts(tuple(fitting)))


def bare(width: int) -> setattn.Attention:
    weight = Linear(np.ones((width, 1, width), np.float32))
    return setattn.Attention((), weight, weight)
