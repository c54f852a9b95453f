"""The reference: every block of the library once more, slowly, as loops over plain numbers.

It shares no code with the library. It reads a parameter tree by attribute names and ``type(node).__name__``, takes what
NumPy can read, and gives back float64. Two arithmetics stand behind the same equations: 50 decimal digits (``exact``),
for small cases, and float64 whose sums are rounded once (``math.fsum``), with two-pass norms and softmax, for others.

    value = oracle.evaluate("mab", x, y, params=params, mask=mask, activation="relu", eps=1e-5)
    value = oracle.evaluate("sab", x, params=params, exact=True, activation="relu", eps=1e-5)

A method of `Oracle` is one equation for one set: a set is an (n, dim) array of numbers, a mask a boolean vector. Only
`evaluate` and the table `BLOCKS` at the end know of batches.
"""

import math
from types import SimpleNamespace

import mpmath
import numpy as np

DIGITS = 50
_MP = mpmath.mp.clone()
_MP.dps = DIGITS


def _fsum(terms):
    terms = list(terms)
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # it refuses inf - inf and an overflow on the way, where arithmetic goes on
        return sum(terms)


FSUM = SimpleNamespace(
    number=float,
    total=_fsum,
    dot=lambda a, b: _fsum(s * t for s, t in zip(a, b, strict=True)),
    exp=math.exp,
    sqrt=math.sqrt,
    log=math.log,
    tanh=math.tanh,
    erfc=math.erfc,
    sin=math.sin,
    cos=math.cos,
    pi=math.pi,
)
EXACT = SimpleNamespace(
    number=_MP.mpf,
    total=_MP.fsum,
    dot=lambda a, b: _MP.fdot(zip(a, b, strict=True)),
    exp=_MP.exp,
    sqrt=_MP.sqrt,
    log=_MP.log,
    tanh=_MP.tanh,
    erfc=_MP.erfc,
    sin=_MP.sin,
    cos=_MP.cos,
    pi=+_MP.pi,
)


def absent(part):
    return isinstance(part, tuple) and not part


def to_float64(array):
    """Read an array of any of the backends, bfloat16 included, as float64."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().double().numpy()
    return np.asarray(array).astype(np.float64)


def map_tree(function, tree):
    if isinstance(tree, tuple):
        parts = [map_tree(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree)


class Oracle:
    """The equations for one set, over the numbers of one arithmetic."""

    def __init__(self, arithmetic=FSUM, activation=None, eps=None, scale=None):
        self.a, self.activation, self.eps, self.scale = arithmetic, activation, eps, scale

    # The parts. An analysis of the rounding errors overrides these and `lift`, and inherits the blocks below.

    def lift(self, array):
        with np.errstate(invalid="ignore"):  # a NaN is a number here like any other
            return np.frompyfunc(self.a.number, 1, 1)(np.asarray(array, dtype=object))

    def concatenate(self, parts, axis=0):
        return np.concatenate(parts, axis=axis)

    def linear(self, x, p):
        assert x.shape[1] in np.cumprod(p.weight.shape[:-1])  # heads and their width may be split on either side
        weight = p.weight.reshape(x.shape[1], -1)
        bias = [self.a.number(0)] * weight.shape[1] if absent(p.bias) else p.bias.reshape(weight.shape[1])
        columns = [list(column) for column in weight.T]
        out = np.empty((x.shape[0], len(columns)), dtype=object)
        for i, row in enumerate(x):
            for j, column in enumerate(columns):
                out[i, j] = self.a.dot(list(row), column) + bias[j]
        return out

    def norm(self, x, p):
        if absent(p):
            return x
        kind, width, eps = type(p).__name__, x.shape[1], self.a.number(self.eps)
        out = np.empty(x.shape, dtype=object)
        for i, row in enumerate(x):
            mean = self.a.total(row) / width if kind == "LayerNorm" else self.a.number(0)
            centred = [value - mean for value in row]
            root = self.a.sqrt(self.a.dot(centred, centred) / width + eps)
            for j, value in enumerate(centred):
                value = value / root
                value = value if absent(p.scale) else value * p.scale[j]
                out[i, j] = value if kind == "RMSNorm" or absent(p.bias) else value + p.bias[j]
        return out

    def act(self, x):
        return np.frompyfunc(
            {
                "relu": self.relu,
                "squared_relu": lambda t: self.relu(t) * self.relu(t),
                "gelu": lambda t: t * self.a.erfc(-t / self.a.sqrt(self.a.number(2))) / 2,
                "gelu_tanh": self.gelu_tanh,
                "silu": lambda t: t * self.sigmoid(t),
            }[self.activation],
            1,
            1,
        )(x)

    def relu(self, t):
        return t if t > 0 or t != t else self.a.number(0)

    def sigmoid(self, t):
        e = self.a.exp(-abs(t))  # never overflows
        return (1 if t >= 0 else e) / (1 + e)

    def gelu_tanh(self, t):
        # (1 + tanh(z)) / 2 = sigmoid(2 z), which loses nothing where tanh is near -1.
        z = self.a.sqrt(2 / self.a.pi) * (t + self.a.number("0.044715") * t * t * t)
        return t * self.sigmoid(2 * z)

    def mean(self, x):
        """The mean of the rows (n, d), as one row; of none it is 0."""
        out = np.full((1, x.shape[1]), self.a.number(0), dtype=object)
        for j in range(x.shape[1] if x.shape[0] else 0):
            out[0, j] = self.a.total(x[:, j]) / x.shape[0]
        return out

    def gate(self, x, gate):
        """Scale each feature by tanh of a gate of one number, or of one for each feature."""
        out = np.empty(x.shape, dtype=object)
        for i, j in np.ndindex(x.shape):
            out[i, j] = x[i, j] * self.a.tanh(gate[j % gate.shape[0]])
        return out

    def log_counts(self, counts):
        """Logarithms (m, 1) of numbers of elements; that of none is 0."""
        return np.array([[self.a.log(self.a.number(max(int(n), 1)))] for n in counts], dtype=object).reshape(-1, 1)

    def one_plus_tanh(self, x):
        return np.frompyfunc(lambda t: 1 + self.a.tanh(t), 1, 1)(x)

    def add(self, x, y):
        return x + y

    def multiply(self, x, y):
        return x * y

    def head_scale(self, head_dim):
        return 1 / self.a.sqrt(self.a.number(head_dim)) if self.scale is None else self.a.number(self.scale)

    def softmax(self, q, k, visible, bias):
        """Weights (m, n) of one head; `visible` (m, n) says which elements take part, `bias` (n,) or None."""
        scale = self.head_scale(k.shape[1])
        out = np.full((q.shape[0], k.shape[0]), self.a.number(0), dtype=object)
        for i, query in enumerate(q):
            seen = [j for j in range(k.shape[0]) if visible[i, j]]
            scores = [scale * self.a.dot(list(query), list(k[j])) + (0 if bias is None else bias[j]) for j in seen]
            top = max(scores, default=0)
            weights = [self.a.exp(score - top) for score in scores]
            total = self.a.total(weights)
            for j, weight in zip(seen, weights, strict=True):
                out[i, j] = weight / total
        return out

    def attend(self, q, k, v, visible, bias, merges=0):
        """Weighted sums (m, value_dim) of one head; `merges` only matters to an analysis of the rounding."""
        weights = self.softmax(q, k, visible, bias)
        out = np.empty((q.shape[0], v.shape[1]), dtype=object)
        for i in range(q.shape[0]):
            seen = [j for j in range(k.shape[0]) if visible[i, j]]
            for c in range(v.shape[1]):
                out[i, c] = self.a.dot([weights[i, j] for j in seen], [v[j, c] for j in seen])
        return out

    # The blocks.

    def feed_forward(self, x, p):
        hidden = self.linear(x, p.hidden)
        hidden = self.act(hidden) if absent(p.gate) else self.multiply(self.act(self.linear(x, p.gate)), hidden)
        return hidden if absent(p.output) else self.linear(hidden, p.output)

    def add_feed_forward(self, x, norm, p):
        return x if absent(p) else self.add(x, self.feed_forward(self.norm(x, norm), p))

    def length_factors(self, q, head, heads, counts, p):
        """Scale the queries of a head by what depends on how many elements each of them meets."""
        log_n = self.log_counts(counts)
        base = self.linear(log_n, p.base) if type(p.base).__name__ == "Linear" else self.feed_forward(log_n, p.base)
        width = base.shape[1] // heads
        scaled = self.multiply(q, base[:, head * width : (head + 1) * width])
        return scaled if absent(p.query) else self.multiply(scaled, self.one_plus_tanh(self.feed_forward(q, p.query)))

    def _heads(self, x, y, p, counts):
        """Pairs of a query head and its key head; `y` is what keys come from, `counts` (m,) are numbers of elements."""
        _, kv_heads, head_dim = p.key.weight.shape
        query, key = x if absent(p.query) else self.linear(x, p.query), self.linear(y, p.key)
        heads = query.shape[1] // head_dim
        for h in range(heads):
            g = h // (heads // kv_heads)
            cut = slice(h * head_dim, (h + 1) * head_dim), slice(g * head_dim, (g + 1) * head_dim)
            q = self.norm(query[:, cut[0]], p.query_norm)
            if not absent(p.length_scale):
                q = self.length_factors(q, h, heads, counts, p.length_scale)
            yield g, q, self.norm(key[:, cut[1]], p.key_norm)

    @staticmethod
    def _take_part(x, y, mask, pair_mask, bias):
        """Remove the masked elements, and those of a bias of -inf, so that nothing ever reads them."""
        keep = np.ones(y.shape[0], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        pair = np.ones((x.shape[0], y.shape[0]), dtype=bool) if pair_mask is None else np.asarray(pair_mask, dtype=bool)
        counts = (pair & keep).sum(axis=1)  # which a bias does not change
        if bias is not None:
            keep = keep & np.array([value != -math.inf for value in bias], dtype=bool)
            bias = bias[keep]
        return keep, pair[:, keep], bias, counts

    def attention(self, x, y, p, mask=None, pair_mask=None, bias=None, merges=0, key_positions=None):
        keep, visible, bias, counts = self._take_part(x, y, mask, pair_mask, bias)
        y = y[keep]
        keys = y if key_positions is None else self.add(y, key_positions[keep])
        value, value_dim = self.linear(y, p.value), p.value.weight.shape[2]
        heads = [
            self.attend(q, k, value[:, g * value_dim : (g + 1) * value_dim], visible, bias, merges)
            for g, q, k in self._heads(x, keys, p, counts)
        ]
        out = self.concatenate(heads, axis=1)
        return out if absent(p.output) else self.linear(out, p.output)

    def attention_weights(self, x, y, p, mask=None, pair_mask=None, bias=None):
        keep, visible, bias, counts = self._take_part(x, y, mask, pair_mask, bias)
        zeros = self.lift(np.zeros((x.shape[0], y.shape[0])))
        out = []
        for _, q, k in self._heads(x, y[keep], p, counts):
            weights = zeros.copy()
            weights[:, keep] = self.softmax(q, k, visible, bias)
            out.append(weights)
        return self.concatenate([weights[None] for weights in out])

    def mab(self, x, y, p, mask=None, query_mask=None, pair_mask=None, query_residual=True):
        rows = np.ones(x.shape[0], dtype=bool) if query_mask is None else np.asarray(query_mask, dtype=bool)
        keep = np.ones(y.shape[0], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        pair = np.ones((x.shape[0], y.shape[0]), dtype=bool) if pair_mask is None else np.asarray(pair_mask, dtype=bool)
        x, y, pair = x[rows], y[keep], pair[rows][:, keep]
        x = x if absent(p.project) else self.linear(x, p.project)
        a = self.attention(self.norm(x, p.query_norm), self.norm(y, p.context_norm), p.attention, pair_mask=pair)
        h = self.norm(self.add(x, a) if query_residual else a, p.attention_norm)
        kept = self.norm(self.add_feed_forward(h, p.ff_norm, p.ff), p.output_norm)
        zero = self.lift(np.zeros((1, kept.shape[1])))
        order = np.where(rows, np.cumsum(rows) - 1, kept.shape[0])
        return self.concatenate([kept, zero])[order]

    def sab(self, x, p, mask=None, query_residual=True):
        return self.mab(x, x, p, mask=mask, query_mask=mask, query_residual=query_residual)

    def isab(self, x, p, mask=None, query_residual=True):
        h = self.mab(p.inducing_points, x, p.mab_inducing, mask=mask, query_residual=query_residual)
        return self.mab(x, h, p.mab_set, query_mask=mask, query_residual=query_residual)

    def pma(self, x, p, mask=None, query_residual=True):
        if mask is not None:
            x = x[np.asarray(mask, dtype=bool)]
        x = x if absent(p.ff) else self.feed_forward(x, p.ff)
        return self.mab(p.seeds, x, p.mab, query_residual=query_residual)

    def set_transformer(self, x, p, mask=None, query_residual=True):
        for block in p.encoder:
            x = {"ISAB": self.isab, "MAB": self.sab}[type(block).__name__](x, block, mask, query_residual)
        x = self.pma(x, p.pma, mask, query_residual)
        for block in p.decoder:
            x = self.sab(x, block, query_residual=query_residual)
        return x if absent(p.output) else self.linear(x, p.output)

    def attention_pool(self, x, p, mask=None, key_positions=None):
        keep = np.ones(x.shape[0], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        x = x[keep] if absent(p.input) else self.linear(x[keep], p.input)
        x = x if absent(p.position) else self.add(x, p.position[: keep.size][keep])
        q = self.norm(p.probe, p.query_norm)
        q = q if absent(p.probe_position) else self.add(q, p.probe_position)
        key_positions = None if key_positions is None else key_positions[keep]
        h = self.attention(q, self.norm(x, p.context_norm), p.attention, key_positions=key_positions)
        h = self.norm(self.add_feed_forward(h, p.ff_norm, p.ff), p.output_norm)
        return h if absent(p.output) else self.linear(h, p.output)

    def cross_attention(self, latents, inputs, p, mask=None, query_residual=True):
        if mask is not None:
            inputs = inputs[np.asarray(mask, dtype=bool)]
        h = self.attention(self.norm(latents, p.query_norm), self.norm(inputs, p.context_norm), p.attention)
        return self.add_feed_forward(self.add(latents, h) if query_residual else h, p.ff_norm, p.ff)

    def latent_transformer(self, z, layers):
        for p in layers:
            normed = self.norm(z, p.norm)
            z = self.add_feed_forward(self.add(z, self.attention(normed, normed, p.attention)), p.ff_norm, p.ff)
        return z

    def embed(self, x, p, places):
        """Embed elements (n, dim), or tokens (n,), that stand at some places of a set."""
        if absent(p):
            return x
        if not absent(p.tokens):
            x = p.tokens[[int(token) for token in x]]
        x = x if absent(p.project) else self.linear(x, p.project)
        x = x if absent(p.position) else self.add(x, p.position[places])
        if absent(p.features):
            return x
        features = p.features[places]
        features = features if absent(p.features_project) else self.linear(features, p.features_project)
        return self.concatenate([x, features], axis=1)

    def perceiver(self, inputs, p, mask=None, depth=None, query_residual=True):
        places = np.arange(inputs.shape[0]) if mask is None else np.flatnonzero(mask)
        z = self.encode(self.embed(inputs[places], p.input, places), p, depth, query_residual)
        if absent(p.head):
            return z
        return self.linear(self.norm(self.mean(z), p.head.norm), p.head.output)[0]

    def encode(self, inputs, p, depth, query_residual):
        """Compute the latents from the elements that take part."""
        z, crosses, transformers = p.latents, p.cross_attentions, p.latent_transformers
        for i in range(max(len(crosses), len(transformers)) if depth is None else depth):
            if crosses and not absent(crosses[min(i, len(crosses) - 1)]):
                z = self.cross_attention(z, inputs, crosses[min(i, len(crosses) - 1)], None, query_residual)
            if transformers:
                z = self.latent_transformer(z, transformers[min(i, len(transformers) - 1)])
        return self.norm(z, p.output_norm)

    def perceiver_io(self, inputs, queries, p, mask=None, depth=None, query_residual=True, decoder_residual=False):
        n, own = inputs.shape[0], queries is None and absent(p.queries)
        places = np.arange(n) if mask is None else np.flatnonzero(mask)
        y = self.embed(inputs[places], p.encoder.input, places)
        z = self.encode(y, p.encoder, depth, query_residual)
        q = y if own else p.queries if queries is None else queries
        out = self.cross_attention(q, z, p.decoder, query_residual=decoder_residual)
        out = out if absent(p.output) else self.linear(out, p.output)
        if not own:
            return out
        row = np.full(n, len(places))
        row[places] = np.arange(len(places))
        return self.concatenate([out, self.lift(np.zeros((1, out.shape[1])))])[row]

    def resample(self, frames, medium, p, mask=None):
        """Resample the frames of one medium, a list of sets."""
        x = frames if absent(p.position) else [self.add(frame, p.position[: frame.shape[0]]) for frame in frames]
        if not absent(p.input):
            layer = {"Linear": self.linear, "FeedForward": self.feed_forward}[type(p.input).__name__]
            x = [layer(frame, p.input) for frame in x]
        x = list(x)
        for t, frame in enumerate(x):
            # An embedding is added to every element: row zero, as often as the frame has elements.
            row = np.zeros(frame.shape[0], dtype=int)
            frame = frame if absent(p.frame_embedding) else self.add(frame, p.frame_embedding[t : t + 1][row])
            x[t] = frame if absent(p.media_embedding) else self.add(frame, p.media_embedding[medium : medium + 1][row])
        x = self.concatenate([self.lift(np.zeros((0, p.latents.shape[1]))), *x])
        if mask is not None:
            x = x[np.asarray(mask, dtype=bool).reshape(-1)]
        z = p.latents
        if not absent(p.mean_latents):
            made = self.linear(self.norm(self.mean(x), p.mean_latents.norm), p.mean_latents.project)
            z = self.concatenate([made.reshape(-1, z.shape[1]), z])
        for layer in p.layers:
            q = self.norm(z, layer.query_norm)
            context = self.concatenate([self.norm(x, layer.context_norm), q])
            z = self.add(z, self.attention(q, context, layer.attention, merges=1))
            z = self.add_feed_forward(z, layer.ff_norm, layer.ff)
        return self.norm(z if absent(p.output) else self.linear(z, p.output), p.output_norm)

    def gated_cross_attention(
        self, x, media, p, mask=None, media_locations=None, pair_mask=None, immediate=True, ff_without_media=True
    ):
        """Attend from tokens to media, a list of sets; `mask` (media, n), `pair_mask` (tokens, media)."""
        cross = p.cross_attention
        sizes = [medium.shape[0] for medium in media]
        number = np.repeat(np.arange(1, len(media) + 1), sizes)
        time = None if media_locations is None else np.cumsum(np.asarray(media_locations, dtype=bool))
        visible = np.zeros((x.shape[0], sum(sizes)), dtype=bool)
        for i, j in np.ndindex(visible.shape):
            seen = time is None or (time[i] == number[j] if immediate else time[i] >= number[j])
            seen = seen and (pair_mask is None or bool(pair_mask[i][number[j] - 1]))
            visible[i, j] = seen and (mask is None or bool(np.asarray(mask).reshape(-1)[j]))
        rows, used = visible.any(axis=1), visible.any(axis=0)
        y = self.norm(
            self.concatenate([self.lift(np.zeros((0, cross.attention.key.weight.shape[0]))), *media])[used],
            cross.context_norm,
        )
        a = self.attention(self.norm(x, cross.query_norm), y, cross.attention, pair_mask=visible[:, used])
        zero = self.lift(np.zeros((1, a.shape[1])))
        a = self.concatenate([a, zero])[np.where(rows, np.arange(rows.size), rows.size)]
        h = self.add(x, self.gate(a, p.attention_gate))
        if absent(cross.ff):
            return h
        out = self.add(h, self.gate(self.feed_forward(self.norm(h, cross.ff_norm), cross.ff), p.ff_gate))
        kept = np.arange(rows.size) + np.where(rows | ff_without_media, 0, rows.size)
        return self.concatenate([out, x])[kept]

    def fourier_features(self, positions, num_bands, max_resolution, concat_position=True, order="grouped"):
        axes = positions.shape[1]
        tops = max_resolution if isinstance(max_resolution, list | tuple) else [max_resolution] * axes
        frequencies = []
        for top in map(self.a.number, tops):
            step = (top / 2 - 1) / (num_bands - 1) if num_bands > 1 else self.a.number(0)
            frequencies.append([1 + k * step for k in range(num_bands)])
        rows = []
        for row in positions:
            angles = [[self.a.pi * f * position for f in frequencies[axis]] for axis, position in enumerate(row)]
            sines, cosines = ([[f(t) for t in part] for part in angles] for f in (self.a.sin, self.a.cos))
            own = [[position] if concat_position else [] for position in row]
            if order == "grouped":
                parts = [*own, *sines, *cosines]
            else:
                parts = [part for axis in range(axes) for part in (sines[axis], cosines[axis], own[axis])]
            rows.append([value for part in parts for value in part])
        return np.array(rows, dtype=object).reshape(positions.shape[0], axes * (2 * num_bands + bool(concat_position)))

    def sincos_features(self, positions, dim, temperature=10000.0):
        count = dim // (2 * positions.shape[1])
        periods = [self.a.number(temperature) ** (self.a.number(k) / count) for k in range(count)]
        rows = [
            [f(position / period) for position in row for f in (self.a.sin, self.a.cos) for period in periods]
            for row in positions
        ]
        return np.array(rows, dtype=object).reshape(positions.shape[0], dim)


# How many trailing axes of each argument belong to one call; the axes before them are the batch. The resampler and the
# gated block, whose arguments are lists of sets, are laid out by the two functions below.
BLOCKS = {
    "attention": ((2, 2), {"mask": 1, "pair_mask": 2, "bias": 1}),
    "attention_weights": ((2, 2), {"mask": 1, "pair_mask": 2, "bias": 1}),
    "linear": ((2,), {}),
    "norm": ((2,), {}),
    "feed_forward": ((2,), {}),
    "mab": ((2, 2), {"mask": 1, "query_mask": 1, "pair_mask": 2}),
    "sab": ((2,), {"mask": 1}),
    "isab": ((2,), {"mask": 1}),
    "pma": ((2,), {"mask": 1}),
    "set_transformer": ((2,), {"mask": 1}),
    "attention_pool": ((2,), {"mask": 1, "key_positions": 2}),
    "cross_attention": ((2, 2), {"mask": 1}),
    "latent_transformer": ((2,), {}),
    "perceiver": ((2,), {"mask": 1}),
    "perceiver_io": ((2, 2), {"mask": 1}),
    "perceiver_resampler": ((2,), {"mask": 1}),
    "gated_cross_attention": ((2, 3), {"mask": 2, "media_locations": 1, "pair_mask": 2}),
    "fourier_features": ((1,), {}),
    "sincos_features": ((1,), {}),
}
NUMBERS = ("bias", "key_positions")  # arguments by name that are no masks


def _resampler(engine, features, p, mask=None):
    frames, media = not absent(p.frame_embedding), not absent(p.media_embedding)
    each = [features] if not media else list(features)
    masks = [mask] * len(each) if mask is None or not media else list(mask)
    out = []
    for j, medium in enumerate(each):
        sets = [engine.lift(frame) for frame in (medium if frames else [medium])]
        out.append(engine.resample(sets, j, p, masks[j]))
    if not media:
        return out[0]
    width = (p.latents if absent(p.output) else p.output.weight).shape[1]
    rows = p.latents.shape[0] + (0 if absent(p.mean_latents) else p.mean_latents.project.weight.shape[1])
    return engine.concatenate([engine.lift(np.zeros((0, rows, width))), *[z[None] for z in out]])


def _call(engine, name, arrays, params, options):
    if name == "perceiver_resampler":
        return _resampler(engine, arrays[0], params, **options)
    if name == "gated_cross_attention":
        return engine.gated_cross_attention(
            engine.lift(arrays[0]), [engine.lift(medium) for medium in arrays[1]], params, **options
        )
    if name in ("fourier_features", "sincos_features"):
        return getattr(engine, name)(engine.lift(arrays[0][None]), **options)[0]
    if name == "perceiver_io" and len(arrays) == 1:
        return engine.perceiver_io(engine.lift(arrays[0]), None, params, **options)
    return getattr(engine, name)(*[engine.lift(array) for array in arrays], params, **options)


def run(engine, name, arrays, params=(), **options):
    """Call a block of an engine for every entry of the batch.

    Returns
    -------
    batch : tuple of int
        The batch axes.
    results : list
        One result of the engine for each entry, in C order; for an empty batch, that of an invented entry, which
        has the right shape.
    """
    own, named = BLOCKS[name]
    if name == "perceiver_resampler":
        extra = sum(not absent(part) for part in (params.frame_embedding, params.media_embedding))
        own, named = (2 + extra,), {"mask": 1 + extra}
    if name.startswith("perceiver") and name != "perceiver_resampler":
        model = params.encoder if name == "perceiver_io" else params
        tokens = not absent(model.input) and not absent(model.input.tokens)
        own = (1 if tokens else 2, *own[1:])[: len(arrays)]  # the queries of perceiver_io may be left out
    axes = [*zip(map(to_float64, arrays), own, strict=True)]
    names = [key for key in named if options.get(key) is not None]
    for key in names:
        array = to_float64(options[key]) if key in NUMBERS else np.asarray(options[key]).astype(bool)
        axes.append((array, named[key]))
    batch = np.broadcast_shapes(*[array.shape[: array.ndim - n] for array, n in axes])
    spread = [np.broadcast_to(array, batch + array.shape[array.ndim - n :]) for array, n in axes]
    if 0 in batch:
        spread = [
            np.linspace(0, 1, math.prod(part)).reshape(part)
            for part in ((1,) * len(batch) + array.shape[len(batch) :] for array in spread)
        ]
    params = map_tree(lambda leaf: engine.lift(to_float64(leaf)), params)
    rest = {key: value for key, value in options.items() if key not in named}
    results = []
    for index in np.ndindex(*spread[0].shape[: len(batch)]):
        entry = [array[index] for array in spread]
        given = dict(zip(names, entry[len(arrays) :], strict=True))
        given |= {key: engine.lift(given[key]) for key in NUMBERS if key in given}
        results.append(_call(engine, name, entry[: len(arrays)], params, given | rest))
    return batch, results


def evaluate(name, *arrays, params=(), exact=False, activation=None, eps=None, scale=None, **options):
    """Evaluate a block.

    Parameters
    ----------
    name : str
        A key of `BLOCKS`: the name of the library's function, or ``linear``, ``norm``, ``feed_forward``.
    *arrays : array
        Its positional arrays, in the library's order, but for queries that are None.
    params : tree
        Its parameters.
    exact : bool
        Whether to calculate with 50 digits; otherwise in float64 with sums that are rounded once.
    activation, eps, scale, **options
        Its options. Nothing but `scale` has a default here: one the equation needs and did not get is an error.

    Returns
    -------
    numpy.ndarray
        Float64.
    """
    engine = Oracle(EXACT if exact else FSUM, activation, eps, scale)
    batch, results = run(engine, name, arrays, params, **options)
    values = np.array([to_float64(np.asarray(result, dtype=object)) for result in results])
    return values[: math.prod(batch)].reshape(batch + values.shape[1:])
