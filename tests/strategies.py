"""What Hypothesis draws, and how a property is run over it and shown to be able to fail.

Hypothesis draws shapes, masks, options and a seed; NumPy makes the values from the seed, on one of several ladders.
What is drawn is a valid call of one public function, a `Drawn`, whose axes have distinct sizes, but for the deliberate
cases in which they all have the same. A property is a plain function of what was drawn:

    for_all(permuting_changes_nothing, blocks("pma"), seeds)

and the same function must find a defect that is planted in the library:

    rejects(defects.positional(), permuting_changes_nothing, blocks("pma"), seeds)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import cases
import hypothesis
import numpy as np
import pytest
import threadpoolctl
import tolerances
from cases import Case
from hypothesis import strategies as st

import setattn
from setattn import FeedForward, LayerNorm, Linear, RMSNorm
from setattn._params import is_absent

_THREADS = threadpoolctl.ThreadpoolController()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Keep BLAS to one thread, so that the shape of a product decides the order of its sums."""
    with _THREADS.limit(limits=1, user_api="blas"):
        yield


# --- running properties ---------------------------------------------------------------------------------------------


def for_all(check: Callable[..., None], *domains: st.SearchStrategy, share: float = 1.0, examples: tuple = ()) -> None:
    """Run a property over all that is drawn from its domains; `share` of the profile's number of examples.

    `examples` are seeds of earlier failures: tuples of arguments to run first.
    """
    count = max(3, round(share * hypothesis.settings.default.max_examples))

    def run(arguments: tuple) -> None:
        check(*arguments)

    test = hypothesis.given(st.tuples(*domains))(run)
    for example in examples:
        test = hypothesis.example(example)(test)
    hypothesis.settings(max_examples=count)(test)()


def rejects(defect: AbstractContextManager, check: Callable[..., None], *domains: st.SearchStrategy) -> None:
    """Fail unless a property finds a planted defect, within 200 examples."""

    def fails(arguments: tuple) -> bool:
        try:
            check(*arguments)
        except (AssertionError, FloatingPointError):
            return True
        return False

    search = hypothesis.settings(max_examples=200, phases=[hypothesis.Phase.generate], derandomize=True, database=None)
    with defect, np.errstate(all="ignore"), mock.patch.dict(tolerances._RATIOS):  # what a defect does is not recorded
        try:
            hypothesis.find(st.tuples(*domains), fails, settings=search)
        except hypothesis.errors.NoSuchExample:
            pytest.fail(f"{check.__name__} does not notice a planted defect")


# --- comparing ------------------------------------------------------------------------------------------------------


def bits(a: np.ndarray) -> np.ndarray:
    """Return the bit patterns of floating numbers, in which -0 is not 0 and one NaN not another."""
    a = np.ascontiguousarray(a)
    return a.view(f"u{a.dtype.itemsize}")


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Fail unless two arrays are the same, bit for bit."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    differs = bits(a) != bits(b)
    assert not differs.any(), f"{np.count_nonzero(differs)} of {a.size} differ: {a[differs][:3]} and {b[differs][:3]}"


def agree(a: np.ndarray, b: np.ndarray, bound: np.ndarray, label: str) -> None:
    """Fail unless two results of ours differ by no more than the sum of their bounds."""
    assert a.dtype == b.dtype
    tolerances.assert_close(a, b.astype(np.float64), bound, label)


# --- calls ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn(Case):
    """A valid call, whose arrays and parameters already have their dtype."""

    note: str = ""

    def __repr__(self) -> str:
        shapes = " ".join(f"{a.shape}" for a in self.arrays)
        masks = {key: np.asarray(m).astype(int).tolist() for key, m in self.masks.items()}
        return f"<{self.function} of {shapes}, {self.dtype}, {self.note}, {masks}, {self.options}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def dtype(self) -> np.dtype:
        return self.arrays[0].dtype

    @property
    def mask(self) -> np.ndarray | None:
        return self.masks.get("mask")

    @property
    def size(self) -> int:
        """The number of elements of the set."""
        return self.arrays[self.elements].shape[-2]

    def __call__(self, **changed: Any) -> np.ndarray:
        params = [] if self.params is None else [self.params]
        return getattr(setattn, self.function)(*self.arrays, *params, **(self.masks | self.options | changed))

    def with_array(self, position: int, array: np.ndarray) -> Drawn:
        arrays = list(self.arrays)
        arrays[position] = array
        return replace(self, arrays=tuple(arrays))

    def with_elements(self, array: np.ndarray) -> Drawn:
        return self.with_array(self.elements, array)

    def with_masks(self, **masks: np.ndarray | None) -> Drawn:
        kept = {key: m for key, m in (self.masks | masks).items() if m is not None}
        return replace(self, masks=kept)

    def with_params(self, params: Any) -> Drawn:
        return replace(self, params=params)

    def _axes(self) -> tuple[tuple[int, ...], dict[str, int]]:
        """How many axes of each array and mask belong to one set; what is before them is the batch."""
        if self.function == "perceiver_resampler":
            extra = sum(not is_absent(e) for e in (self.params.frame_embedding, self.params.media_embedding))
            return (2 + extra,), {"mask": 1 + extra}
        if self.function == "gated_cross_attention":
            return (2, 3), {"mask": 2, "media_locations": 1, "pair_mask": 2}
        return (2,) * len(self.arrays), {"mask": 1, "query_mask": 1, "pair_mask": 2, "bias": 1, "key_positions": 2}

    @property
    def batch(self) -> tuple[int, ...]:
        return self.arrays[self.elements].shape[: -self._axes()[0][self.elements]]

    def batch_index(self, key: Any) -> Drawn:
        """Index the first batch axis of all that has it; with ``None``, insert one before all that belongs to a set."""
        own, masks = self._axes()

        def index(a: np.ndarray, axes: int) -> np.ndarray:
            return a if a.ndim == axes and self.batch else a[key]

        arrays = tuple(index(a, axes) for a, axes in zip(self.arrays, own, strict=True))
        return replace(self, arrays=arrays, masks={key: index(m, masks[key]) for key, m in self.masks.items()})

    def keywords(self) -> dict[str, Any]:
        """All keyword arguments, with the defaults of those that were not given."""
        parameters = inspect.signature(getattr(setattn, self.function)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        given = defaults | self.masks | self.options
        return {key: value for key, value in given.items() if value is not None or key == "scale"}

    def bound(self, hard: bool = False) -> np.ndarray:
        """The bound of the result's rounding errors."""
        params = () if self.params is None else self.params
        _, sharp, worst = tolerances.bounds(
            self.function, *self.arrays, params=params, dtype=self.dtype, **self.keywords()
        )
        return worst if hard else sharp

    def reference(self, exact: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's value and the bound."""
        params = () if self.params is None else self.params
        return tolerances.reference(
            self.function, *self.arrays, params=params, dtype=self.dtype, exact=exact, **self.keywords()
        )


def made(name: str, dtype: str, seed: int = 0) -> Drawn:
    """Make one of the common cases, all of whose arrays have a dtype."""
    case = cases.make(name, seed)
    masks = {key: m if m.dtype == bool else m.astype(dtype) for key, m in case.masks.items()}
    params = None if case.params is None else setattn.map_params(lambda a: a.astype(dtype), case.params)
    arrays = tuple(a.astype(dtype) for a in case.arrays)
    return Drawn(case.function, arrays, params, masks, case.options, case.elements, f"case {name!r} from seed {seed}")


# --- sizes and values -----------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    batch: tuple[int, ...]
    m: int
    n: int
    heads: int
    kv_heads: int
    dim: int
    dim_y: int
    learned: int
    hidden: int
    dim_out: int
    frames: int
    media: int


ELEMENTS = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 23, 31, 32, 33, 0)
DTYPES = ("float32", "float64")
seeds = st.integers(0, 2**32 - 1)


@st.composite
def sizes(draw: st.DrawFn, least: int = 0, batch: int | None = None, equal: bool = True, most: int = 33) -> Sizes:
    """Draw sizes, all distinct (1 and 0 may come twice), or in one case of eight all equal.

    `least` and `most` are those of the set; `batch` is the number of batch axes.
    """
    if equal and draw(st.integers(0, 7)) == 7:
        k = draw(st.integers(1, 4))
        axes = draw(st.integers(0, 2)) if batch is None else batch
        return Sizes((k,) * axes, k, k, k, k, k, k, k, k, k, k, k)
    used: set[int] = set()

    def pick(pool: tuple[int, ...]) -> int:
        size = draw(st.sampled_from([p for p in pool if p not in used or p < 2]))
        used.add(size)
        return size

    n = pick(tuple(e for e in ELEMENTS if least <= e <= most))
    m = pick((1, 2, 3, 5, 7, 11, 0))
    axes = draw(st.sampled_from((1, 0, 2))) if batch is None else batch
    shape = tuple(pick((2, 3, 1, 4)[: 5 - axes]) for _ in range(axes))
    if axes and batch is None and draw(st.integers(0, 15)) == 15:
        shape = (0, *shape[1:])
    heads = pick((1, 2, 3, 4, 6))
    kv_heads = draw(st.sampled_from([g for g in range(heads, 0, -1) if heads % g == 0]))
    dim = heads * draw(st.sampled_from([w for w in (1, 2, 3, 5) if heads * w not in used or heads * w == 1]))
    used.add(dim)
    return Sizes(
        shape,
        m,
        n,
        heads,
        kv_heads,
        dim,
        dim_y=pick((1, 2, 6, 9, 10, 14)),
        learned=pick((1, 2, 3, 5, 6, 10)),
        hidden=pick((1, 4, 8, 9, 19)),
        dim_out=pick((1, 2, 5, 6, 12, 21)),
        frames=pick((1, 2, 3, 4, 5)),
        media=pick((1, 2, 3, 4, 5, 6)),
    )


LADDERS = ("normal", "ties", "dominant", "equal", "zeros", "power", "grid")
SCALES = (None, 1.0, 3.0, 10.0)


def values(rng: np.random.Generator, shape: tuple[int, ...], ladder: str = "normal") -> np.ndarray:
    """Make values in float64; `grid` and `ties` are exact in float16 and so are sums of a few of them."""
    x = rng.normal(size=shape)
    if ladder == "ties":
        return np.round(x) + 0.0
    if ladder == "grid":
        return np.round(x * 64) / 64 + 0.0
    if ladder == "zeros":
        return np.zeros(shape)
    if ladder == "power":
        return x * 2.0 ** rng.integers(-12, 7)
    if ladder == "equal" and shape[-2]:
        return np.broadcast_to(x[..., :1, :], shape).copy()
    if ladder == "dominant" and shape[-2]:
        x[..., rng.integers(shape[-2]), :] *= 8
    return x


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...], rng: np.random.Generator, some: bool = False) -> np.ndarray | None:
    """Draw a mask: none, full, empty, scattered, lengths, a single element, one item of the batch masked wholly.

    With `some`, there is a mask, and it is scattered.
    """
    kind = draw(st.sampled_from(("none", "scattered", "lengths", "full", "empty", "single", "item")))
    kind = "scattered" if some and kind in ("none", "full", "empty") else kind
    if kind == "none":
        return None
    mask = rng.random(shape) < draw(st.sampled_from((0.7, 0.5, 0.2)))
    if kind == "full":
        mask[...] = True
    elif kind == "empty":
        mask[...] = False
    elif kind == "lengths":
        mask = np.arange(shape[-1]) < rng.integers(0, shape[-1] + 1, size=(*shape[:-1], 1))
    elif kind == "single":
        mask = np.arange(shape[-1]) == rng.integers(0, max(shape[-1], 1), size=(*shape[:-1], 1))
    elif kind == "item" and len(shape) > 1 and shape[0]:
        mask[rng.integers(shape[0])] = False
    return mask


# --- parameters -----------------------------------------------------------------------------------------------------

ACTIVATIONS = ("relu", "squared_relu", "gelu", "gelu_tanh", "silu")
_NORMS = ("layer", "rms", "none")


class Maker:
    """Makes parts of blocks at random, with every parameter away from where it usually starts."""

    def __init__(self, draw: st.DrawFn, s: Sizes, rng: np.random.Generator, lengths: bool = True):
        self.draw, self.s, self.rng, self.lengths = draw, s, rng, lengths

    def one_of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def weight(self, *shape: int, inputs: int | None = None) -> np.ndarray:
        return self.rng.normal(size=shape) / math.sqrt(shape[0] if inputs is None else inputs)

    def linear(self, dim_in: int, dim_out: int, bias: bool | None = None) -> Linear:
        bias = self.one_of(True, False) if bias is None else bias
        return Linear(self.weight(dim_in, dim_out), 0.3 * self.rng.normal(size=dim_out) if bias else ())

    def split_linear(self, dim_in: int, heads: int, width: int) -> Linear:
        return Linear(self.weight(dim_in, heads, width), 0.3 * self.rng.normal(size=(heads, width)))

    def norm(self, dim: int, kind: str | None = None) -> Any:
        kind = self.one_of(*_NORMS) if kind is None else kind
        scale, bias = 1 + 0.2 * self.rng.normal(size=dim), 0.2 * self.rng.normal(size=dim)
        if kind == "layer":
            return self.one_of(LayerNorm(scale, bias), LayerNorm(scale), LayerNorm())
        return RMSNorm(scale) if kind == "rms" else ()

    def feed_forward(self, dim: int, optional: bool = True) -> Any:
        kind = self.one_of("two", "one", "gated", *(["none"] if optional else []))
        if kind == "none":
            return ()
        if kind == "one":
            return FeedForward(self.linear(dim, dim))
        gate = self.linear(dim, self.s.hidden) if kind == "gated" else ()
        return FeedForward(self.linear(dim, self.s.hidden), self.linear(self.s.hidden, dim), gate)

    def length_scale(self, heads: int, head_dim: int) -> Any:
        """A factor that depends on the size of the set, in one case of four; factors are around 1."""
        if not self.lengths or not self.one_of(False, False, False, True):
            return ()
        width = self.one_of(heads, heads * head_dim)
        base = self.linear(1, width)
        if self.one_of(True, False):
            base = FeedForward(self.linear(1, self.s.hidden), self.linear(self.s.hidden, width))
        query = ()
        if self.one_of(True, False):
            hidden = self.linear(head_dim, self.s.hidden)
            query = FeedForward(hidden, self.linear(self.s.hidden, self.one_of(1, head_dim)))
        return setattn.LengthScale(base, query)

    def attention(
        self, dim: int, dim_y: int, dim_out: int | None = None, full: bool = False, bare: bool = False
    ) -> setattn.Attention:
        """An attention from `dim` to `dim_out`; `full` if it is to have all projections, `bare` if no output."""
        s, bias = self.s, self.one_of(True, False)
        official = not full and self.one_of(False, False, True) and dim % s.heads == 0
        head_dim = dim // s.heads if official else self.one_of(1, 2, 3, 5)
        value_dim = self.one_of(1, 2, 4)
        dim_out = dim if dim_out is None else dim_out
        if (official or bare) and dim_out % s.heads == 0:
            value_dim = dim_out // s.heads

        def project(dim_in: int, heads: int, width: int) -> Linear:
            draw = 0.3 * self.rng.normal(size=(heads, width)) if bias else ()
            return Linear(self.weight(dim_in, heads, width), draw)

        head_norm = self.one_of("none", "none", "layer", "rms")
        no_output = bare or (official and dim_out % s.heads == 0 and self.one_of(True, False))
        weight = self.weight(s.heads, value_dim, dim_out, inputs=s.heads * value_dim)
        return setattn.Attention(
            query=() if official else project(dim, s.heads, head_dim),
            key=project(dim_y, s.kv_heads, head_dim),
            value=project(dim_y, s.kv_heads, value_dim),
            output=() if no_output else Linear(weight, 0.3 * self.rng.normal(size=dim_out) if bias else ()),
            query_norm=self.norm(head_dim, head_norm),
            key_norm=self.norm(head_dim, head_norm),
            length_scale=self.length_scale(dim // head_dim if official else s.heads, head_dim),
        )

    def mab(self, dim_x: int, dim_y: int, dim_out: int | None = None) -> setattn.MAB:
        """A block of the model's width, or one whose attention changes it to `dim_out` and adds no queries."""
        dim = self.s.dim
        width = dim if dim_out is None else dim_out
        project = self.linear(dim_x, dim) if dim_x != dim or self.one_of(False, True) else ()
        before, after = self.one_of(("none", "layer"), ("layer", "none"), ("none", "none"), ("rms", "none"))
        return setattn.MAB(
            attention=self.attention(dim, dim_y, dim_out, full=dim_out is not None),
            ff=self.feed_forward(width),
            project=project,
            query_norm=self.norm(dim, before),
            context_norm=self.norm(dim_y, before),
            attention_norm=self.norm(width, after),
            ff_norm=self.norm(width, before),
            output_norm=self.norm(width, after),
        )

    def isab(self, dim_x: int, dim_out: int | None = None) -> setattn.ISAB:
        inducing, dim = self.weight(self.s.learned, self.s.dim, inputs=1), self.s.dim
        between = dim if dim_out is None else dim_out
        return setattn.ISAB(inducing, self.mab(dim, dim_x, dim_out), self.mab(dim_x, between, dim_out))

    def pma(self, dim_x: int, dim_out: int | None = None) -> setattn.PMA:
        seeds = self.weight(self.s.learned, self.s.dim, inputs=1)
        return setattn.PMA(seeds, self.mab(self.s.dim, dim_x, dim_out), self.feed_forward(dim_x))

    def cross_attention(self, dim: int, dim_y: int, dim_out: int | None = None) -> setattn.CrossAttention:
        width = dim if dim_out is None else dim_out
        attention = self.attention(dim, dim_y, width, full=dim_out is not None)
        return setattn.CrossAttention(
            attention, self.feed_forward(width), self.norm(dim), self.norm(dim_y), self.norm(width)
        )

    def self_attentions(self, count: int) -> tuple[setattn.SelfAttention, ...]:
        dim = self.s.dim
        return tuple(
            setattn.SelfAttention(self.attention(dim, dim), self.feed_forward(dim), self.norm(dim), self.norm(dim))
            for _ in range(count)
        )

    def perceiver(self) -> setattn.Perceiver:
        cross = [self.cross_attention(self.s.dim, self.s.dim_y) for _ in range(self.one_of(1, 2))]
        if self.one_of(False, False, True):
            cross.append(())
        latent = [self.self_attentions(1) for _ in range(self.one_of(0, 1, 2))]
        return setattn.Perceiver(self.weight(self.s.learned, self.s.dim, inputs=1), tuple(cross), tuple(latent))


# --- blocks ---------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    arrays: tuple[tuple[int, ...], ...]  # shapes
    params: Any
    masks: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    elements: int = 0


def _queried(m: Maker, dim: int) -> tuple[int, ...]:
    """The shape of queries: with the batch, or shared among it."""
    return (m.s.m, dim) if m.one_of(False, False, True) else (*m.s.batch, m.s.m, dim)


def _attention(m: Maker, bare: bool = False) -> _Parts:
    s, b = m.s, m.s.batch
    params = m.attention(s.dim, s.dim_y, s.dim_out, bare=bare)
    shapes = {"mask": (*b, s.n), "pair_mask": (*b, s.m, s.n)}
    options = {} if is_absent(params.length_scale) else {"activation": m.one_of(*ACTIVATIONS)}
    return _Parts((_queried(m, s.dim), (*b, s.n, s.dim_y)), params, shapes, options, 1)


def _mab(m: Maker) -> _Parts:
    s, b = m.s, m.s.batch
    x = _queried(m, s.dim_out)
    shapes = {"mask": (*b, s.n), "pair_mask": (*b, s.m, s.n), "query_mask": x[:-1]}
    width, options = _residual(m)
    options["activation"] = m.one_of(*ACTIVATIONS)
    return _Parts((x, (*b, s.n, s.dim_y)), m.mab(s.dim_out, s.dim_y, width), shapes, options, 1)


def _residual(m: Maker) -> tuple[int | None, dict[str, Any]]:
    """Choose whether queries are added to an attention, and where they are not, the width it has of its own."""
    residual = m.one_of(True, False)
    return None if residual else m.s.hidden, {"query_residual": residual}


def _of_a_set(dim: str, build: Callable[[Maker], Any], masked: bool = True) -> Callable[[Maker], _Parts]:
    def parts(m: Maker) -> _Parts:
        x = (*m.s.batch, m.s.n, getattr(m.s, dim))
        return _Parts((x,), build(m), {"mask": x[:-1]} if masked else {}, {"activation": m.one_of(*ACTIVATIONS)})

    return parts


def _of_a_set_and_queries(build: Callable[[Maker, int | None], Any]) -> Callable[[Maker], _Parts]:
    def parts(m: Maker) -> _Parts:
        width, options = _residual(m)
        drawn = _of_a_set("dim_y", lambda m: build(m, width))(m)
        return drawn._replace(options=drawn.options | options)

    return parts


def _set_transformer(m: Maker, _: int | None) -> setattn.SetTransformer:
    count, dim = m.one_of(1, 3, 0, 2), m.s.dim_y
    encoder = []
    for _ in range(count):
        encoder.append(m.one_of(m.isab, lambda width: m.mab(width, width))(dim))
        dim = m.s.dim
    decoder = tuple(m.mab(m.s.dim, m.s.dim) for _ in range(m.one_of(0, 1)))
    output = m.linear(m.s.dim, m.s.dim_out) if m.one_of(True, False) else ()
    return setattn.SetTransformer(tuple(encoder), m.pma(dim), decoder, output)


def _attention_pool(m: Maker) -> setattn.AttentionPool:
    s = m.s
    inputs = m.linear(s.dim_y, s.hidden) if m.one_of(False, False, True) else ()
    width = s.dim_y if is_absent(inputs) else s.hidden
    return setattn.AttentionPool(
        probe=m.weight(s.learned, s.dim, inputs=1),
        attention=m.attention(s.dim, width),
        ff=m.feed_forward(s.dim),
        query_norm=m.norm(s.dim),
        context_norm=m.norm(width),
        ff_norm=m.norm(s.dim),
        output_norm=m.norm(s.dim),
        output=m.linear(s.dim, s.dim_out) if m.one_of(True, False) else (),
        input=inputs,
        probe_position=m.weight(s.learned, s.dim, inputs=1) if m.one_of(False, False, True) else (),
    )


def _cross_attention(m: Maker) -> _Parts:
    s, b = m.s, m.s.batch
    options = {"query_residual": m.one_of(True, False), "activation": m.one_of(*ACTIVATIONS)}
    params = m.cross_attention(s.dim, s.dim_y)
    return _Parts((_queried(m, s.dim), (*b, s.n, s.dim_y)), params, {"mask": (*b, s.n)}, options, 1)


def _perceiver(m: Maker) -> _Parts:
    s, params = m.s, m.perceiver()
    least = max(len(params.cross_attentions), len(params.latent_transformers))
    options = {"depth": m.one_of(None, least + 1), "query_residual": m.one_of(True, False)}
    return _Parts(((*s.batch, s.n, s.dim_y),), params, {"mask": (*s.batch, s.n)}, options)


def _perceiver_io(m: Maker) -> _Parts:
    s, inner = m.s, _perceiver(m)
    residual = m.one_of(False, True)
    decoder = m.cross_attention(s.dim_out, s.dim, None if residual else s.hidden)
    output = m.linear(s.dim_out if residual else s.hidden, 7) if m.one_of(True, False) else ()
    params = setattn.PerceiverIO(inner.params, decoder, output)
    options = inner.options | {"decoder_residual": residual}
    return _Parts((*inner.arrays, _queried(m, s.dim_out)), params, inner.masks, options)


def _perceiver_resampler(m: Maker, axes: str | None = None, positions: bool = False) -> _Parts:
    s = m.s
    axes = m.one_of("", "frames", "media", "media frames") if axes is None else axes
    kind = m.one_of("none", "linear", "network")
    inputs = m.linear(s.dim_y, s.dim) if kind == "linear" else ()
    if kind == "network":
        inputs = FeedForward(m.linear(s.dim_y, s.hidden), m.linear(s.hidden, s.dim), m.linear(s.dim_y, s.hidden))
    width = s.dim if is_absent(inputs) else s.dim_y
    made = setattn.MeanLatents(m.split_linear(s.dim, m.one_of(1, 2), s.dim), m.norm(s.dim))
    shape = (*s.batch, *(getattr(s, axis) for axis in axes.split()), s.n, width)
    output = m.linear(s.dim, s.dim_out) if m.one_of(False, True) else ()
    params = setattn.Resampler(
        latents=m.weight(s.learned, s.dim, inputs=1),
        layers=tuple(m.cross_attention(s.dim, s.dim) for _ in range(m.one_of(1, 2))),
        frame_embedding=m.weight(s.frames + m.one_of(0, 2), s.dim, inputs=1) if "frames" in axes else (),
        media_embedding=m.weight(s.media + m.one_of(0, 2), s.dim, inputs=1) if "media" in axes else (),
        input=inputs,
        output=output,
        output_norm=m.norm(s.dim if is_absent(output) else s.dim_out),
        position=m.weight(s.n + m.one_of(1, 3), width, inputs=1) if positions else (),
        mean_latents=made if m.one_of(False, False, True) else (),
    )
    return _Parts((shape,), params, {"mask": shape[:-1]}, {"activation": m.one_of(*ACTIVATIONS)})


def _gated_cross_attention(m: Maker) -> _Parts:
    s, b = m.s, m.s.batch
    width = m.one_of(1, s.dim)
    params = setattn.GatedCrossAttention(
        m.cross_attention(s.dim, s.dim_y), 0.5 + m.weight(width, inputs=1), m.weight(width, inputs=1) - 0.5
    )
    shapes = {"mask": (*b, s.media, s.n), "media_locations": (*b, s.m), "pair_mask": (*b, s.m, s.media)}
    options = {key: m.one_of(True, False) for key in ("immediate", "ff_without_media")}
    options["activation"] = m.one_of(*ACTIVATIONS)
    return _Parts((_queried(m, s.dim), (*b, s.media, s.n, s.dim_y)), params, shapes, options, 1)


_BUILDERS: dict[str, Callable[[Maker], _Parts]] = {
    "attention": _attention,
    "attention_weights": _attention,
    "mab": _mab,
    "sab": _of_a_set_and_queries(lambda m, width: m.mab(m.s.dim_y, m.s.dim_y, width)),
    "isab": _of_a_set_and_queries(lambda m, width: m.isab(m.s.dim_y, width)),
    "pma": _of_a_set_and_queries(lambda m, width: m.pma(m.s.dim_y, width)),
    "set_transformer": _of_a_set_and_queries(_set_transformer),
    "attention_pool": _of_a_set("dim_y", _attention_pool),
    "cross_attention": _cross_attention,
    "latent_transformer": _of_a_set("dim", lambda m: m.self_attentions(m.one_of(1, 3, 2)), masked=False),
    "perceiver": _perceiver,
    "perceiver_io": _perceiver_io,
    "perceiver_resampler": _perceiver_resampler,
    "gated_cross_attention": _gated_cross_attention,
}

BLOCKS = tuple(_BUILDERS)
MASKED = tuple(name for name in BLOCKS if name != "latent_transformer")


@st.composite
def blocks(
    draw: st.DrawFn,
    name: str,
    *,
    least: int = 0,
    most: int = 33,
    batch: int | None = None,
    dtypes: tuple[str, ...] = DTYPES,
    ladders: tuple[str, ...] = LADDERS,
    scales: tuple[float | None, ...] = SCALES,
    some: bool = False,
    only: tuple[str, ...] | None = None,
    lengths: bool = True,
    **details: Any,
) -> Drawn:
    """Draw a valid call of a public function.

    `least` to `most` elements, `batch` axes of batch, `some` elements masked; `only` names the masks that there may be,
    `lengths` says whether the number of elements may matter beside their values, and `details` go to the builder of the
    function's parameters.
    """
    s = draw(sizes(least=least, batch=batch, most=most))
    dtype, ladder, scale = (draw(st.sampled_from(pool)) for pool in (dtypes, ladders, scales))
    seed = draw(seeds)
    rng = np.random.default_rng(seed)
    parts = _BUILDERS[name](Maker(draw, s, rng, lengths), **details)
    ladders_of = [ladder if i == parts.elements else "normal" for i in range(len(parts.arrays))]
    arrays = tuple(values(rng, *one).astype(dtype) for one in zip(parts.arrays, ladders_of, strict=True))
    drawn = {}
    for key, shape in parts.masks.items():
        if only is not None and key not in only:
            continue
        # A second or third kind of mask only now and then, so that most calls still let something through.
        if key in ("mask", "media_locations") or draw(st.integers(0, 2)) == 2:
            mask = draw(masks(shape, rng, some=some and key == "mask"))
            drawn |= {} if mask is None else {key: mask}
    options = parts.options | {"eps": draw(st.sampled_from((1e-5, 1e-6, 1e-3)))}
    if scale is not None:
        options["scale"] = scale / math.sqrt(_head_dim(parts.params))
    options = {key: value for key, value in options.items() if value is not None}
    params = setattn.map_params(lambda a: np.asarray(a).astype(dtype), parts.params)
    note = f"values {ladder!r} from seed {seed}"
    return Drawn(name, arrays, params, drawn, options, parts.elements, note)


def _head_dim(params: Any) -> int:
    """The width of a head of the first attention in a tree, to choose the scale by; 0 if there is none."""
    if isinstance(params, setattn.Attention):
        return params.key.weight.shape[-1]
    widths = map(_head_dim, params) if isinstance(params, tuple) else ()
    return next(filter(None, widths), 0)
