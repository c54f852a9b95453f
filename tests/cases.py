"""One or more valid calls of every public function on arrays, with all axes of distinct sizes.

Every test that goes through all functions draws from here, so that a new function or variant is tested everywhere by
adding one entry.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import setattn
from setattn import FeedForward, InputEmbedding, LayerNorm, LengthScale, Linear, MeanHead, RMSNorm


@dataclass(frozen=True)
class Case:
    """A call ``function(*arrays, params, **masks, **options)`` with float64 arrays of NumPy.

    ``elements`` is the position of the array whose elements ``mask`` is about, if the function has a mask.
    """

    function: str
    arrays: tuple[np.ndarray, ...]
    params: Any = None
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    elements: int = 0

    def numpy(self, dtype: str = "float64", **changed: Any) -> np.ndarray:
        """Call the function with NumPy arrays."""
        case = self.map(lambda a: a.astype(dtype))
        return replace(case, options=self.options | changed).call(case.arrays, case.params, case.masks)

    def call(self, arrays: Any, params: Any, masks: Any) -> Any:
        """Call the function with arrays of any backend: a pure function of three trees."""
        none = (None,) if self.function == "perceiver_io" and len(self.arrays) == 1 else ()
        positional = () if self.params is None else (params,)
        return getattr(setattn, self.function)(*arrays, *none, *positional, **masks, **self.options)

    def trees(self, backend: Any, dtype: str) -> tuple[Any, Any, dict[str, Any]]:
        """Convert what :meth:`call` takes to a backend."""
        arrays = tuple(backend.asarray(a, dtype) for a in self.arrays)
        params = () if self.params is None else backend.params(self.params, dtype)
        return arrays, params, {key: backend.asarray(mask, dtype) for key, mask in self.masks.items()}

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Case:
        """Apply a function to every floating array: the arrays, the parameters, the bias, in this order."""
        arrays = tuple(function(a) if a.dtype.kind == "f" else a for a in self.arrays)
        params = None if self.params is None else setattn.map_params(function, self.params)
        masks = {key: function(m) if m.dtype.kind == "f" else m for key, m in self.masks.items()}
        return replace(self, arrays=arrays, params=params, masks=masks)

    def rounded(self, dtype: str) -> Case:
        """Round every number to a dtype, so that converting to it is exact; the arrays stay float64."""
        return self.map(lambda a: round_to(a, dtype))

    @property
    def queries(self) -> int | None:
        """The position of the array of queries, if the elements are not their own."""
        return {"perceiver_io": 1}.get(self.function, 0 if self.elements else None)

    @property
    def masks_media(self) -> bool:
        """Whether ``pair_mask`` is over media in place of elements."""
        return self.function == "gated_cross_attention"

    def resized(
        self, *, batch: int | None = None, elements: int | None = None, queries: int | None = None, before: int = 0
    ) -> Case:
        """Keep the first of the batch, of the elements and of the queries, and of their masks.

        ``before`` says how many axes before the elements to cut instead: 1 for the frames or media they come in.
        """

        def cut(a: np.ndarray, axes: dict[int, int | None], batched: bool) -> np.ndarray:
            for axis, size in axes.items():
                a = a if size is None else np.take(a, range(size), axis=axis)
            return a[:batch] if batched else a

        arrays = []
        for i, a in enumerate(self.arrays):
            axes = {-2 - before: elements} if i == self.elements else {-2: queries}
            arrays.append(cut(a, axes, a.ndim > 2))
        of_masks = {
            "mask": {-1 - before: elements},
            "bias": {-1: elements},
            # That of a gated block is over media, which hold the elements.
            "pair_mask": {-1: None if self.masks_media and not before else elements, -2: queries},
            "query_mask": {-1: queries},
            "media_locations": {-1: queries},
            "key_positions": {-2: elements},
        }
        masks = {key: cut(m, of_masks[key], key != "key_positions" or m.ndim > 2) for key, m in self.masks.items()}
        return replace(self, arrays=tuple(arrays), masks=masks)

    def takes_part(self) -> np.ndarray:
        """Say which elements take part in anything."""
        part = np.ones(self.arrays[self.elements].shape[:-1], dtype=bool)
        if "mask" in self.masks:
            part &= self.masks["mask"]
        if self.masks_media:
            sees = self.seen_media()
            return part if sees is None else part & sees.any(axis=-2)[..., None]
        if "pair_mask" in self.masks:
            part &= self.masks["pair_mask"].any(axis=-2)
        return part

    def seen_media(self) -> np.ndarray | None:
        """Say which media the rows of text see in a gated block; ``None`` where all see all."""
        sees = self.masks.get("pair_mask")
        if "media_locations" not in self.masks:
            return sees
        count, media = np.cumsum(self.masks["media_locations"], axis=-1)[..., None], self.arrays[1].shape[-3]
        number = np.arange(1, media + 1)
        placed = count == number if self.options.get("immediate", True) else count >= number
        return placed if sees is None else placed & sees

    def with_garbage(self, values: tuple[float, ...]) -> Case:
        """Fill what takes part in nothing with garbage: elements, their biases and positions, masked queries."""
        arrays, masks, part = list(self.arrays), dict(self.masks), self.takes_part()
        arrays[self.elements] = _fill(arrays[self.elements], part, values)
        if "query_mask" in masks and arrays[0].ndim > 2:
            arrays[0] = _fill(arrays[0], masks["query_mask"], values)
        if "bias" in masks:
            masks["bias"] = _fill(masks["bias"][..., None], part, values)[..., 0]
        if "key_positions" in masks and masks["key_positions"].ndim > 2:
            masks["key_positions"] = _fill(masks["key_positions"], part, values)
        return replace(self, arrays=tuple(arrays), masks=masks)

    def on(self, backend: Any, dtype: str, **changed: Any) -> Any:
        """Call the function with arrays of a backend; NumPy arrays among ``changed`` are converted, too."""
        arrays = [backend.asarray(a, dtype) for a in self.arrays]
        params = [] if self.params is None else [backend.params(self.params, dtype)]
        keywords = {
            key: backend.asarray(value, dtype) if isinstance(value, np.ndarray) else value
            for key, value in (self.masks | self.options | changed).items()
        }
        return getattr(setattn, self.function)(*arrays, *params, **keywords)


def _fill(a: np.ndarray, keep: np.ndarray, values: tuple[float, ...]) -> np.ndarray:
    return np.where(keep[..., None], a, np.resize(np.asarray(values), a.shape))


def round_to(a: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the nearest number of a dtype, in the steps in which a backend's table entry converts."""
    if dtype != "bfloat16":
        return a.astype(dtype).astype("float64")
    bits = a.astype("float32").view("uint32")
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to nearest, ties to even
    return bits.view("float32").astype("float64")


BATCH, M, N, DIM, DIM_Y, HEADS = 2, 3, 7, 12, 10, 4


def perturb(params: Any, rng: np.random.Generator, amount: float = 0.2) -> Any:
    """Move every parameter away from where it starts, so that no bias is 0 and no scale 1; in float64."""
    return setattn.map_params(lambda a: a + amount * rng.normal(size=a.shape), params)


def _gated(dim: int, hidden: int, rng: np.random.Generator) -> FeedForward:
    return setattn.init_feed_forward(dim, hidden=hidden, gate=True, bias=False, rng=rng)


def _coca(rng: np.random.Generator) -> setattn.AttentionPool:
    params = setattn.init_attention_pool(DIM, num_heads=HEADS, num_probes=5, rng=rng)
    norm = setattn.init_norm(DIM)
    return params._replace(ff=(), ff_norm=(), query_norm=norm, context_norm=norm)


def _resampling_pool(rng: np.random.Generator) -> setattn.AttentionPool:
    return _coca(rng)._replace(input=setattn.init_linear(DIM_Y, DIM, rng=rng))


def _idefics2(rng: np.random.Generator) -> setattn.Resampler:
    params = setattn.init_perceiver_resampler(DIM, num_heads=HEADS, num_latents=5, num_layers=2, rng=rng)
    attention = setattn.init_attention(DIM, num_heads=HEADS, num_kv_heads=2, bias=False, head_norm="rms", rng=rng)
    norm = RMSNorm(np.ones(DIM))
    layers = tuple(
        layer._replace(attention=attention, ff=_gated(DIM, 9, rng), query_norm=norm, context_norm=norm, ff_norm=norm)
        for layer in params.layers
    )
    return params._replace(layers=layers, output_norm=norm)


def _ip_adapter(rng: np.random.Generator) -> setattn.Resampler:
    params = setattn.init_perceiver_resampler(DIM, num_heads=HEADS, num_latents=5, num_layers=2, rng=rng)
    return params._replace(
        input=setattn.init_linear(DIM_Y, DIM, rng=rng),
        output=setattn.init_linear(DIM, 8, rng=rng),
        output_norm=LayerNorm(np.ones(8), np.zeros(8)),
    )


def _mean_latents(dim: int, count: int, rng: np.random.Generator) -> setattn.MeanLatents:
    weight = rng.normal(size=(dim, count, dim)) / math.sqrt(dim)
    return setattn.MeanLatents(setattn.Linear(weight, np.zeros((count, dim))), LayerNorm(np.ones(dim), np.zeros(dim)))


def _geglu(params: setattn.CrossAttention, rng: np.random.Generator) -> setattn.CrossAttention:
    return params._replace(ff=setattn.init_feed_forward(DIM, hidden=9, gate=True, rng=rng))


def _no_residual(params: setattn.MAB, dim_x: int, rng: np.random.Generator) -> setattn.MAB:
    """Take queries of another width than the result's, as they need not be added to it."""
    heads, head_dim = params.attention.query.bias.shape
    query = setattn.init_linear(dim_x, heads * head_dim, rng=rng)
    query = setattn.Linear(query.weight.reshape(dim_x, heads, head_dim), query.bias.reshape(heads, head_dim))
    return params._replace(attention=params.attention._replace(query=query))


_Build = Callable[[np.random.Generator], Case]
_CASES: dict[str, _Build] = {}


def _case(name: str) -> Callable[[_Build], _Build]:
    def add(build: _Build) -> _Build:
        _CASES[name] = build
        return build

    return add


def _mask(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw a mask that leaves the first set of a batch partly, and the second one wholly, masked."""
    mask = rng.random(shape) < 0.7
    mask[0, ..., 0] = True
    mask[1] = False
    return mask


def _xy(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(BATCH, M, DIM)), rng.normal(size=(BATCH, N, DIM_Y))


def _set(rng: np.random.Generator, dim: int = DIM) -> np.ndarray:
    return rng.normal(size=(BATCH, N, dim))


def _attention_variants() -> None:
    variants: dict[str, Callable[[np.random.Generator], setattn.Attention]] = {
        "attention": lambda rng: setattn.init_attention(DIM, DIM_Y, num_heads=HEADS, rng=rng),
        "attention-grouped": lambda rng: setattn.init_attention(
            DIM, DIM_Y, num_heads=HEADS, num_kv_heads=2, head_dim=5, value_dim=6, bias=False, head_norm="rms", rng=rng
        ),
        "attention-head-layernorm": lambda rng: setattn.init_attention(
            DIM, DIM_Y, num_heads=HEADS, num_kv_heads=1, head_norm="layer", rng=rng
        ),
        "attention-bare": lambda rng: setattn.init_attention(DIM, DIM_Y, num_heads=HEADS, rng=rng)._replace(
            query=(), output=()
        ),
    }
    for name, build in variants.items():

        def attention(rng: np.random.Generator, build: Any = build) -> Case:
            return Case("attention", _xy(rng), perturb(build(rng), rng), {"mask": _mask(rng, BATCH, N)}, {}, elements=1)

        _CASES[name] = attention


_attention_variants()


@_case("attention-pairs-and-bias")
def _(rng: np.random.Generator) -> Case:
    masks = {"pair_mask": _mask(rng, BATCH, M, N), "mask": rng.random((BATCH, N)) < 0.7, "bias": _set(rng, 1)[..., 0]}
    params = setattn.init_attention(DIM, DIM_Y, num_heads=HEADS, num_kv_heads=2, rng=rng)
    return Case("attention", _xy(rng), perturb(params, rng), masks, {"scale": 0.3}, elements=1)


def _net(dim_in: int, dim_out: int, rng: np.random.Generator) -> FeedForward:
    return FeedForward(setattn.init_linear(dim_in, 6, rng=rng), setattn.init_linear(6, dim_out, rng=rng))


@_case("attention-length")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_attention(DIM, DIM_Y, num_heads=HEADS, rng=rng)
    params = params._replace(length_scale=LengthScale(Linear(np.ones((1, HEADS)))))
    return Case("attention", _xy(rng), perturb(params, rng), {"mask": _mask(rng, BATCH, N)}, {}, elements=1)


@_case("attention-length-pairs")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_attention(DIM, DIM_Y, num_heads=HEADS, num_kv_heads=2, head_norm="rms", rng=rng)
    params = params._replace(length_scale=LengthScale(_net(1, DIM, rng), _net(DIM // HEADS, DIM // HEADS, rng)))
    masks = {"pair_mask": _mask(rng, BATCH, M, N), "mask": rng.random((BATCH, N)) < 0.7, "bias": _set(rng, 1)[..., 0]}
    return Case("attention", _xy(rng), perturb(params, rng), masks, {"activation": "silu"}, elements=1)


@_case("attention_weights")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_attention(DIM, DIM_Y, num_heads=HEADS, num_kv_heads=2, rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("attention_weights", _xy(rng), perturb(params, rng), masks, {}, elements=1)


@_case("mab")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_mab(DIM, num_heads=HEADS, dim_y=DIM_Y, hidden=9, rng=rng)
    masks = {"mask": _mask(rng, BATCH, N), "query_mask": _mask(rng, BATCH, M)}
    return Case("mab", _xy(rng), perturb(params, rng), masks, {}, elements=1)


@_case("mab-pre-norm")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_mab(DIM, num_heads=HEADS, dim_y=DIM_Y, form="pre_norm", norm="rms", rng=rng)
    params = params._replace(ff=_gated(DIM, 9, rng))
    masks = {"pair_mask": _mask(rng, BATCH, M, N)}
    return Case("mab", _xy(rng), perturb(params, rng), masks, {"activation": "silu"}, elements=1)


@_case("mab-official")
def _(rng: np.random.Generator) -> Case:
    x, y = rng.normal(size=(M, 9)), _set(rng, DIM_Y)
    params = setattn.init_mab(DIM, num_heads=HEADS, dim_x=9, dim_y=DIM_Y, form="official", rng=rng)
    options = {"scale": 1 / math.sqrt(DIM)}
    return Case("mab", (x, y), perturb(params, rng), {"mask": _mask(rng, BATCH, N)}, options, elements=1)


@_case("mab-no-ff")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_mab(DIM, num_heads=HEADS, dim_y=DIM_Y, rng=rng)._replace(ff=())
    params = params._replace(attention_norm=LayerNorm(np.ones(DIM)), output_norm=RMSNorm())
    return Case("mab", _xy(rng), perturb(params, rng), {"mask": _mask(rng, BATCH, N)}, {}, elements=1)


@_case("mab-no-residual")
def _(rng: np.random.Generator) -> Case:
    params = _no_residual(setattn.init_mab(8, num_heads=HEADS, dim_y=DIM_Y, hidden=9, rng=rng), DIM, rng)
    arrays, masks = (rng.normal(size=(BATCH, M, DIM)), _set(rng, DIM_Y)), {"mask": _mask(rng, BATCH, N)}
    masks["query_mask"] = _mask(rng, BATCH, M)
    return Case("mab", arrays, perturb(params, rng), masks, {"query_residual": False}, elements=1)


@_case("sab")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_mab(DIM, num_heads=HEADS, hidden=9, rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("sab", (_set(rng),), perturb(params, rng), masks, {"activation": "gelu"})


@_case("isab")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_isab(DIM, num_inducing=5, num_heads=HEADS, rng=rng)
    return Case("isab", (_set(rng),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("isab-official")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_isab(DIM, num_inducing=5, num_heads=HEADS, dim_x=3, form="official", norm="layer", rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("isab", (_set(rng, 3),), perturb(params, rng), masks, {"scale": 1 / math.sqrt(DIM)})


@_case("isab-pre-norm")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_isab(DIM, num_inducing=5, num_heads=HEADS, hidden=9, form="pre_norm", rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("isab", (_set(rng),), perturb(params, rng), masks, {"activation": "gelu_tanh"})


@_case("isab-lucidrains")
def _(rng: np.random.Generator) -> Case:
    first, second = (setattn.init_attention(DIM, num_heads=HEADS, head_dim=5, bias=False, rng=rng) for _ in range(2))
    params = setattn.ISAB(rng.normal(size=(5, DIM)), setattn.MAB(first), setattn.MAB(second))
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("isab", (_set(rng),), perturb(params, rng), masks, {"query_residual": False})


@_case("isab-length")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_isab(DIM, num_inducing=5, num_heads=HEADS, hidden=9, form="pre_norm", rng=rng)
    scale = LengthScale(_net(1, HEADS, rng), _net(DIM // HEADS, 1, rng))
    block = params.mab_inducing
    params = params._replace(mab_inducing=block._replace(attention=block.attention._replace(length_scale=scale)))
    return Case("isab", (_set(rng),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)}, {"activation": "gelu"})


@_case("pma")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_pma(DIM, num_heads=HEADS, num_seeds=5, rng=rng)
    return Case("pma", (_set(rng),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("pma-official")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_pma(DIM, num_heads=HEADS, form="official", rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("pma", (_set(rng),), perturb(params, rng), masks, {"scale": 1 / math.sqrt(DIM)})


@_case("set_transformer")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_set_transformer(3, DIM, 5, num_heads=HEADS, num_inducing=6, num_seeds=4, rng=rng)
    return Case("set_transformer", (_set(rng, 3),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("set_transformer-sab")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_set_transformer(3, DIM, 5, num_heads=HEADS, num_encoders=1, num_decoders=0, rng=rng)
    params = params._replace(output=())
    return Case("set_transformer", (_set(rng, 3),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("set_transformer-no-residual")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_set_transformer(3, DIM, 5, num_heads=HEADS, num_encoders=1, form="pre_norm", rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("set_transformer", (_set(rng, 3),), perturb(params, rng), masks, {"query_residual": False})


@_case("attention_pool")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_attention_pool(DIM, num_heads=HEADS, hidden=9, rng=rng)
    return Case("attention_pool", (_set(rng),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("attention_pool-norms")
def _(rng: np.random.Generator) -> Case:
    params = _coca(rng)._replace(output_norm=setattn.init_norm(DIM), output=setattn.init_linear(DIM, 5, rng=rng))
    return Case("attention_pool", (_set(rng),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("attention_pool-table")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_attention_pool(DIM, num_heads=HEADS, num_probes=5, hidden=9, rng=rng)
    attention = setattn.init_attention(DIM, num_heads=HEADS, head_norm="layer", rng=rng)._replace(query=())
    params = params._replace(attention=attention, position=rng.normal(size=(N + 2, DIM)))
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("attention_pool", (_set(rng),), perturb(params, rng), masks, {"activation": "gelu"})


@_case("attention_pool-keys")
def _(rng: np.random.Generator) -> Case:
    params = _resampling_pool(rng)._replace(
        output_norm=setattn.init_norm(DIM), output=setattn.init_linear(DIM, 9, rng=rng)
    )
    masks = {"mask": _mask(rng, BATCH, N), "key_positions": _set(rng)}
    return Case("attention_pool", (_set(rng, DIM_Y),), perturb(params, rng), masks)


@_case("attention_pool-all-positions")
def _(rng: np.random.Generator) -> Case:
    params = _resampling_pool(rng)._replace(
        attention=setattn.init_attention(DIM, num_heads=HEADS, num_kv_heads=2, head_norm="rms", rng=rng),
        position=rng.normal(size=(N, DIM)),
        probe_position=rng.normal(size=(5, DIM)),
    )
    return Case(
        "attention_pool", (_set(rng, DIM_Y),), perturb(params, rng), {"key_positions": rng.normal(size=(N, DIM))}
    )


@_case("cross_attention")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_cross_attention(DIM, DIM_Y, num_heads=2, rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("cross_attention", _xy(rng), perturb(params, rng), masks, {"activation": "gelu_tanh"}, elements=1)


@_case("cross_attention-geglu")
def _(rng: np.random.Generator) -> Case:
    params = _geglu(setattn.init_cross_attention(DIM, DIM_Y, num_heads=2, rng=rng), rng)
    arrays, masks = (rng.normal(size=(M, DIM)), _set(rng, DIM_Y)), {"mask": _mask(rng, BATCH, N)}
    return Case("cross_attention", arrays, perturb(params, rng), masks, {"query_residual": False}, elements=1)


@_case("latent_transformer")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_latent_transformer(DIM, num_layers=2, num_heads=HEADS, hidden=9, rng=rng)
    return Case("latent_transformer", (_set(rng),), perturb(params, rng))


@_case("perceiver")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver(
        DIM_Y, DIM, num_latents=5, num_layers=1, num_heads=HEADS, num_cross_attentions=2, rng=rng
    )
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("perceiver", (_set(rng, DIM_Y),), perturb(params, rng), masks, {"depth": 3})


@_case("perceiver-shared")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver(DIM_Y, DIM, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("perceiver", (_set(rng, DIM_Y),), perturb(params, rng), masks, {"query_residual": False})


@_case("perceiver-whole")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver(11, DIM, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    embedding = InputEmbedding(
        project=setattn.init_linear(DIM_Y, 6, rng=rng),
        position=np.zeros((8, 6)),
        features=rng.normal(size=(9, 3)),
        features_project=setattn.init_linear(3, 5, rng=rng),
    )
    head = MeanHead(setattn.init_linear(DIM, 4, rng=rng), setattn.init_norm(DIM))
    params = params._replace(input=embedding, output_norm=setattn.init_norm(DIM, kind="rms"), head=head)
    return Case("perceiver", (_set(rng, DIM_Y),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("perceiver-features")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver(DIM_Y + 3, DIM, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    params = params._replace(input=InputEmbedding(features=rng.normal(size=(N, 3))))
    params = params._replace(head=MeanHead(setattn.init_linear(DIM, 4, bias=False, rng=rng)))
    return Case("perceiver", (_set(rng, DIM_Y),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("perceiver_io")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(DIM_Y, DIM, 9, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    arrays = (_set(rng, DIM_Y), rng.normal(size=(M, 9)))
    return Case("perceiver_io", arrays, perturb(params, rng), {"mask": _mask(rng, BATCH, N)}, {"depth": 2})


@_case("perceiver_io-residual")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(DIM_Y, DIM, 9, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    arrays, masks = (_set(rng, DIM_Y), rng.normal(size=(BATCH, M, 9))), {"mask": _mask(rng, BATCH, N)}
    options = {"query_residual": False, "decoder_residual": True}
    return Case("perceiver_io", arrays, perturb(params._replace(output=()), rng), masks, options)


@_case("perceiver_io-embedded")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(DIM_Y, DIM, 9, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    encoder = params.encoder._replace(input=InputEmbedding(position=np.zeros((8, DIM_Y))))
    params = params._replace(encoder=encoder._replace(output_norm=setattn.init_norm(DIM)))
    arrays = (_set(rng, DIM_Y), rng.normal(size=(M, 9)))
    return Case("perceiver_io", arrays, perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("fourier_features")
def _(rng: np.random.Generator) -> Case:
    positions = rng.uniform(-1, 1, size=(BATCH, N, 3))
    return Case("fourier_features", (positions,), options={"num_bands": 4, "max_resolution": (7, 9, 11)})


@_case("fourier_features-per-axis")
def _(rng: np.random.Generator) -> Case:
    options = {"num_bands": 4, "max_resolution": 10.0, "order": "per_axis"}
    return Case("fourier_features", (rng.uniform(-1, 1, size=(BATCH, N, 3)),), options=options)


@_case("sincos_features")
def _(rng: np.random.Generator) -> Case:
    positions = rng.uniform(0, 40, size=(BATCH, N, 2))
    return Case("sincos_features", (positions,), options={"dim": 12})


@_case("sincos_features-temperature")
def _(rng: np.random.Generator) -> Case:
    positions = rng.integers(0, 200, size=(BATCH, N, 3)).astype(float)
    return Case("sincos_features", (positions,), options={"dim": 18, "temperature": 20.0})


def _resampler_variants() -> None:
    axes: dict[str, tuple[int, ...]] = {"": (), "-frames": (3,), "-media": (4,), "-media-frames": (4, 3)}
    for name, shape in axes.items():

        def resampler(rng: np.random.Generator, name: str = name, shape: tuple[int, ...] = shape) -> Case:
            params = setattn.init_perceiver_resampler(
                DIM,
                num_heads=HEADS,
                num_latents=5,
                num_layers=2,
                num_frames=6 if "frames" in name else None,
                num_media=8 if "media" in name else None,
                rng=rng,
            )
            features = rng.normal(size=(BATCH, *shape, N, DIM))
            masks = {"mask": _mask(rng, BATCH, *shape, N)}
            return Case("perceiver_resampler", (features,), perturb(params, rng), masks)

        _CASES[f"perceiver_resampler{name}"] = resampler


_resampler_variants()


@_case("perceiver_resampler-idefics2")
def _(rng: np.random.Generator) -> Case:
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("perceiver_resampler", (_set(rng),), perturb(_idefics2(rng), rng), masks, {"activation": "silu"})


@_case("perceiver_resampler-length")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_resampler(DIM, num_heads=HEADS, num_latents=5, num_layers=1, rng=rng)
    (layer,), scale = params.layers, LengthScale(Linear(np.ones((1, DIM))))
    params = params._replace(layers=(layer._replace(attention=layer.attention._replace(length_scale=scale)),))
    return Case("perceiver_resampler", (_set(rng),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("perceiver_resampler-ip-adapter")
def _(rng: np.random.Generator) -> Case:
    masks = {"mask": _mask(rng, BATCH, N)}
    params = perturb(_ip_adapter(rng), rng)
    return Case("perceiver_resampler", (_set(rng, DIM_Y),), params, masks, {"activation": "gelu"})


@_case("perceiver_resampler-ip-adapter-mean")
def _(rng: np.random.Generator) -> Case:
    position, made = rng.normal(size=(9, DIM_Y)), _mean_latents(DIM, 2, rng)
    params = perturb(_ip_adapter(rng)._replace(position=position, mean_latents=made), rng)
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("perceiver_resampler", (_set(rng, DIM_Y),), params, masks, {"activation": "gelu"})


@_case("perceiver_resampler-idefics2-connector")
def _(rng: np.random.Generator) -> Case:
    params = _idefics2(rng)
    hidden, gate, output = (
        setattn.init_linear(*sizes, bias=False, rng=rng) for sizes in ((DIM_Y, 8), (DIM_Y, 8), (8, DIM))
    )
    params = params._replace(layers=params.layers[:1], input=FeedForward(hidden, output, gate))
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("perceiver_resampler", (_set(rng, DIM_Y),), perturb(params, rng), masks, {"activation": "silu"})


@_case("perceiver_resampler-media-frames-mean")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_resampler(
        DIM, num_heads=HEADS, num_latents=5, num_layers=1, num_frames=6, num_media=8, rng=rng
    )
    params = params._replace(position=rng.normal(size=(8, DIM)), mean_latents=_mean_latents(DIM, 2, rng))
    features, masks = rng.normal(size=(BATCH, 4, 3, N, DIM)), {"mask": _mask(rng, BATCH, 4, 3, N)}
    return Case("perceiver_resampler", (features,), perturb(params, rng), masks)


def _gated_variants() -> None:
    def build(rng: np.random.Generator, vector: bool, masks: tuple[str, ...], options: dict[str, Any]) -> Case:
        params = setattn.init_gated_cross_attention(DIM, DIM_Y, num_heads=HEADS, vector_gates=vector, rng=rng)
        if options.get("activation") == "silu":
            block = params.cross_attention._replace(ff=_gated(DIM, 9, rng), context_norm=RMSNorm(np.ones(DIM_Y)))
            params = params._replace(cross_attention=block)
        params = perturb(params, rng)
        # Gates near 0 would hide an error in what they scale.
        params = params._replace(attention_gate=params.attention_gate + 1, ff_gate=params.ff_gate - 1)
        locations = np.zeros((BATCH, N), dtype=bool)
        locations[0, [1, 2, 5]] = True
        locations[1, [0, 3, 4, 6]] = True
        drawn = {"media_locations": locations, "mask": rng.random((BATCH, 3, 5)) < 0.7}
        if "pair_mask" in masks:
            drawn["pair_mask"] = rng.random((BATCH, N, 3)) < 0.7
            drawn["pair_mask"][0, 2] = False
        media = rng.normal(size=(BATCH, 3, 5, DIM_Y))
        return Case(
            "gated_cross_attention", (_set(rng), media), params, {k: drawn[k] for k in masks}, options, elements=1
        )

    variants: dict[str, tuple[bool, tuple[str, ...], dict[str, Any]]] = {
        "": (False, ("media_locations", "mask"), {}),
        "-previous": (True, ("media_locations",), {"immediate": False, "activation": "gelu"}),
        "-all": (False, ("mask",), {"activation": "silu"}),
        "-pairs": (True, ("pair_mask", "mask"), {"activation": "silu", "ff_without_media": False}),
        "-previous-pairs": (False, ("pair_mask", "media_locations"), {"immediate": False}),
    }
    for name, arguments in variants.items():
        _CASES[f"gated_cross_attention{name}"] = lambda rng, arguments=arguments: build(rng, *arguments)


_gated_variants()

NAMES = tuple(_CASES)


# --- cases of which not every array is a floating one: for tests of their own ---------------------------------------


def _tokens(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 11, size=(BATCH, N))


@_case("tokens")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver(DIM_Y, DIM, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    embedding = InputEmbedding(tokens=rng.normal(size=(11, DIM_Y)), position=np.zeros((N, DIM_Y)))
    masks = {"mask": _mask(rng, BATCH, N)}
    return Case("perceiver", (_tokens(rng),), perturb(params._replace(input=embedding), rng), masks)


@_case("tokens-projected")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(9, DIM, DIM_Y, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    embedding = InputEmbedding(rng.normal(size=(11, 3)), setattn.init_linear(3, 4, rng=rng), (), np.zeros((8, 5)))
    params = params._replace(encoder=params.encoder._replace(input=embedding))
    arrays, masks = (_tokens(rng), rng.normal(size=(BATCH, M, DIM_Y))), {"mask": _mask(rng, BATCH, N)}
    return Case("perceiver_io", arrays, perturb(params, rng), masks)


@_case("tokens-as-queries")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(DIM_Y, DIM, DIM_Y, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    embedding = InputEmbedding(rng.normal(size=(11, DIM_Y)), position=np.zeros((8, DIM_Y)))
    params = params._replace(encoder=params.encoder._replace(input=embedding))
    return Case("perceiver_io", (_tokens(rng),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("inputs-as-queries")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(9, DIM, 9, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    embedding = InputEmbedding(project=setattn.init_linear(DIM_Y, 6, rng=rng), features=rng.normal(size=(8, 3)))
    params = params._replace(encoder=params.encoder._replace(input=embedding))
    masks, options = {"mask": _mask(rng, BATCH, N)}, {"decoder_residual": True}
    return Case("perceiver_io", (_set(rng, DIM_Y),), perturb(params, rng), masks, options)


@_case("inputs-as-they-come-as-queries")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(DIM_Y, DIM, DIM_Y, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    return Case("perceiver_io", (_set(rng, DIM_Y),), perturb(params, rng), {"mask": _mask(rng, BATCH, N)})


@_case("learned-queries")
def _(rng: np.random.Generator) -> Case:
    params = setattn.init_perceiver_io(DIM_Y, DIM, 9, 8, num_latents=5, num_layers=1, num_heads=HEADS, rng=rng)
    params = perturb(params._replace(queries=np.zeros((M, 9))), rng)
    return Case("perceiver_io", (_set(rng, DIM_Y),), params, {"mask": _mask(rng, BATCH, N)}, {"decoder_residual": True})


OWN_TESTS = tuple(name for name in _CASES if name not in NAMES)


def make(name: str, seed: int = 0) -> Case:
    """Make a case from a seed."""
    return _CASES[name](np.random.default_rng([seed, *name.encode()]))


_LIGHT = {
    "set_transformer": "set_transformer-sab",
    "perceiver": "perceiver-shared",
    "perceiver_io": "perceiver_io-residual",
}
ONE_EACH = tuple(dict.fromkeys(_LIGHT.get(make(name).function, make(name).function) for name in NAMES))
"""One case of every function, of the models one with few layers: for what takes long."""


def reference(case: Case, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the value by the oracle of a case as it stands, and the bound for a result of a dtype."""
    import tolerances

    signature = inspect.signature(getattr(setattn, case.function)).parameters
    defaults = {key: signature[key].default for key in ("activation", "eps") if key in signature}
    params = () if case.params is None else case.params
    options = defaults | case.masks | case.options
    return tolerances.reference(case.function, *case.arrays, params=params, dtype=dtype, **options)


@functools.cache
def expected(name: str, dtype: str) -> tuple[Case, np.ndarray, np.ndarray]:
    """Return a case rounded to a dtype, its value and its bound."""
    case = make(name).rounded(dtype)
    return (case, *reference(case, dtype))
