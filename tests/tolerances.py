"""How far a result may be from the reference: the rounding policy as code.

Every tolerance is a bound for each element, computed from the reference's own numbers; no constant is a guess and none
may be loosened in a test. In units of the unit roundoff u (2^-24 in float32, 2^-53 in float64):

*hard* adds up the worst case of every rounding, to first order: it can never be exceeded by a correct program.

*sharp*, what tests assert, adds the same roundings as independent errors. An error uniform on [-c, c] is sub-Gaussian
with variance proxy c^2 / 3, so a sum of them exceeds t sigma, sigma^2 = sum c^2, with probability below
2 exp(-3 t^2 / 2). With t = `SIGMAS` = 4 this is 7.6e-11 for each element; a defect that doubles the rounding error
comes near the bound, and one of eight times its size crosses it. Sharp is never above hard.

How the errors of one operation reach the result, and that a rounding felt in several places is the same in all of them,
is first-order differentiation. It is done by carrying `SAMPLES` = 64 vectors of errors +-c through the derivatives of
the block; sigma is their root mean square at the result (so it is c exactly where a single rounding is left, and is
else known to 1 / sqrt(2 * 64) = 9%, which t has room for: the true deviation of a uniform error is c / sqrt(3)). The
signs are drawn from a fixed seed: a bound is the same number every time.

Both follow one model of the arithmetic, the derivations of whose constants are here:

- Every operation rounds once (1 u of its result) or, below the smallest normal number, is off by that number, for
  devices that flush to zero.
- A sum of d terms: in the worst case d - 1 roundings of sum |t|. As independent errors, the variance is the sum of the
  squares of the partial sums. Its mean over all orders of the terms, with Q = sum t^2 and S = sum t, is
  Q ((d + 1) / 6 - 1 / d) + S^2 (d + 1) / 3, since a partial sum of k terms has the mean square
  k / d Q + k (k - 1) / (d (d - 1)) (S^2 - Q). Beyond `BLOCK` = 512 terms (BLAS kernels stop at 256 to 384, pairwise
  sums at 128) blocks are summed first and then their sums. Products add Q (sum |t| in the worst case).
- `EXP` = 4: exp is within 4 u (measured in float32 on 800,000 arguments: NumPy 3.45, PyTorch 1.05; CUDA documents 2
  ulp, which are 2 to 4 u); `EXP_SHARP` = 2, because such errors reach their maximum at few arguments (root mean
  square 0.79 and 0.42 u).
- `ACT` = 5: x (1 + f(z)) / 2 with f erf or tanh is off by 5 u |x|: the roundings of z (2 u for erf, 6 for tanh)
  through z f'(z) (at most 0.48 and 0.45), f itself (4 u of 1 for our own erf, 2 for tanh) and the sum (2 u), all
  three halved, and the last product (1 u). `ACT_SHARP` = 1: they are not at their worst at one argument (measured in
  float32 on 150,000: 3.05 at most, root mean square 0.44). SiLU, by a sigmoid, is off by 7 u |f| (exp 4, sum, quotient
  and product 1 each), sharp 3 (root of 2^2 + 3, rounded up; measured 4.49, root mean square 0.89).
- `LOG` = 2: log of a number of elements is within 2 u (measured in float32 up to 2^22: NumPy 1.07, PyTorch and JAX
  1.00); tanh within `TANH` = 2 u (measured on 2,000,000 arguments within 6: NumPy 1.83, PyTorch 1.00); both 1 u sharp.
- A norm is two-pass: roundings of the differences from the first feature (so that a common offset costs nothing), of
  their mean, the differences from it, squares, their sum, eps, root, quotient. What the root takes from the errors of
  its row is in the derivative, (delta_ik - 1/d - y_i y_k / d) / root.
- A softmax is max-subtracted and divides once, at the end. Errors e_j of the scores change the result o by
  sum p_j (v_j - o) e_j to first order, however big the common part of e_j, and by at most exp(2 max |e|) times that;
  never by more than the range of the values. For a single key the result is its value, without a rounding.
- Equal rows of a set are given equal errors, as a program makes them.
- Two softmax states that are merged (resampler) round their factors: one exp of a difference of maxima, at most
  m - s_j, and a product and a sum each in numerator and denominator.
- Half precision (float16, bfloat16): float32 throughout, on inputs that convert exactly, and one rounding at the end,
  half a unit in the last place of the half type.

What comes in the model as a first-order term with a coefficient that itself depends on the error (relu at 0, the
curvature of an activation, a norm of a nearly constant row) takes the coefficient at its largest within the error.
"""

import math

import numpy as np
import oracle

SIGMAS = 4.0
BLOCK = 512
SAMPLES = 64
EXP, EXP_SHARP = 4.0, 2.0
ACT, ACT_SHARP = 5.0, 1.0
SILU, SILU_SHARP = 7.0, 3.0
LOG = TANH = 2.0
TANH_CURVATURE = 0.77  # second derivative of tanh, at its largest 4 / 27^(1/2)
MAX_CURVATURE = 0.8  # second derivative at 0, its largest: gelu and gelu_tanh 2 phi(0) = 0.798, silu 0.5

_U = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
_TINY = {"float16": 2.0**-126, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
_HALF = {"float16": (10, -24), "bfloat16": (7, -133)}  # bits after the point, exponent of the smallest number


def dtype_name(dtype):
    """Name the floating type of any of the backends."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    name = str(name).rsplit(".", 1)[-1]
    if name not in _U:
        raise TypeError(f"no rounding policy for {dtype!r}")
    return name


def unit_roundoff(dtype):
    """Give the unit roundoff of the arithmetic in which a type is calculated (float32 for the half types)."""
    return _U[dtype_name(dtype)]


def product(a, b):
    """Multiply matrices, without asking NumPy for the floating-point flags.

    OpenBLAS raises some for lanes that it pads a small matrix with and then discards.
    """
    with np.errstate(all="ignore"):
        return a @ b


def half_rounding(value, dtype):
    """Half a unit in the last place of a half-precision result; 0 for the other types."""
    if dtype_name(dtype) not in _HALF:
        return np.zeros(np.shape(value))
    bits, lowest = _HALF[dtype_name(dtype)]
    magnitude = np.abs(np.where(np.isfinite(value), value, 0.0))
    exponent = np.frexp(magnitude)[1] - 1
    return np.where(magnitude > 0, 0.5 * np.exp2(np.maximum(exponent - bits, lowest).astype(float)), 0.0)


# Errors carried along with the numbers.


def _sum_variance(squares, total2, d):
    """Variance of the additions of d terms in a random order, from their sum of squares and the square of their sum."""
    if d < 2:
        return np.zeros(np.shape(squares))
    if d <= BLOCK:
        return squares * ((d + 1) / 6 - 1 / d) + total2 * (d + 1) / 3
    share = (BLOCK - 1) / (d - 1)
    blocks = (1 - share) * squares + share * total2
    inner = squares * ((BLOCK + 1) / 6 - 1 / BLOCK) + blocks * (BLOCK + 1) / 3
    return inner + _sum_variance(blocks, total2, -(-d // BLOCK))


class Tracked:
    """An array of values `v`, the worst cases `h` of their errors and samples `t` of their errors, in units of u.

    `t` has one axis more, the first, of `SAMPLES` or, where there is no error, of one sample that is 0.
    """

    def __init__(self, v, h=None, t=None):
        self.v = v
        self.h = np.zeros(v.shape) if h is None else h
        self.t = np.zeros((1, *v.shape)) if t is None else t

    shape = property(lambda self: self.v.shape)
    sigma = property(lambda self: np.sqrt((self.t**2).mean(axis=0)))

    def __iter__(self):
        return iter(self.v)

    def __getitem__(self, key):
        return Tracked(self.v[key], self.h[key], self.t[(slice(None), *(key if isinstance(key, tuple) else (key,)))])

    def copy(self):
        return Tracked(self.v.copy(), self.h.copy(), np.broadcast_to(self.t, (SAMPLES, *self.shape)).copy())

    def __setitem__(self, key, other):
        self.v[key], self.h[key] = other.v, other.h
        self.t[(slice(None), *(key if isinstance(key, tuple) else (key,)))] = other.t

    def reshape(self, *shape):
        return Tracked(self.v.reshape(*shape), self.h.reshape(*shape), self.t.reshape(self.t.shape[0], *shape))


class ErrorAnalysis(oracle.Oracle):
    """The oracle's blocks over `Tracked` arrays: float64 values, and the error of a program in arithmetic of unit u."""

    def __init__(self, u, tiny, activation=None, eps=None, scale=None, merges=0):
        super().__init__(oracle.FSUM, activation, eps, scale)
        self.u, self.tiny, self.merges = u, tiny / u, merges
        self.random = np.random.default_rng(0)

    def signs(self, shape):
        return 1.0 - 2.0 * self.random.integers(0, 2, (SAMPLES, *shape), dtype=np.int8)

    def fresh(self, size, rows):
        """Draw new errors of the given sizes (n, d); equal rows get equal errors, as they do in a program."""
        signs = self.signs(size.shape)
        first = rows[:, :1].astype(np.float32)
        if np.unique(first).size < len(rows):
            _, index, group = np.unique(rows.astype(np.float32), axis=0, return_index=True, return_inverse=True)
            signs = signs[:, index[group.reshape(-1)]]
        return signs * size

    def error(self, x):
        """The error that must be reckoned with, in absolute units, where a coefficient depends on it."""
        return self.u * np.minimum(SIGMAS * x.sigma, x.h)

    def lift(self, array):
        return Tracked(np.array(array, dtype=np.float64))

    def concatenate(self, parts, axis=0):
        samples = max(part.t.shape[0] for part in parts)
        t = [np.broadcast_to(part.t, (samples, *part.shape)) for part in parts]
        v, h = (np.concatenate([getattr(part, k) for part in parts], axis=axis) for k in "vh")
        return Tracked(v, h, np.concatenate(t, axis=axis + 1))

    def add(self, x, y):
        v = x.v + y.v
        return Tracked(v, x.h + y.h + np.abs(v), x.t + y.t + self.fresh(v, v))

    def linear(self, x, p):
        d = x.shape[1]
        w = p.weight.v.reshape(d, -1)
        v = x.v @ w
        products = x.v**2 @ w**2
        t = x.t @ w + self.fresh(np.sqrt(products + _sum_variance(products, v * v, d)), v)
        h = x.h @ np.abs(w) + d * (np.abs(x.v) @ np.abs(w) + self.tiny)
        if not oracle.absent(p.bias):
            v = v + p.bias.v.reshape(-1)
            h, t = h + np.abs(v), t + self.fresh(v, v)
        return Tracked(v, h, t)

    def norm(self, x, p):
        if oracle.absent(p):
            return x
        d, layer = x.shape[1], float(type(p).__name__ == "LayerNorm")

        def row_mean(e):
            return e.mean(axis=-1, keepdims=True)

        shift = x.v - x.v[:, :1] if layer else np.zeros(x.shape)
        mean = row_mean(shift)
        centred = shift - mean if layer else x.v
        root = np.sqrt(row_mean(centred**2) + self.eps)
        y = centred / root
        # The differences from the first feature, their mean, and the differences from that.
        squares = d * row_mean(shift**2)
        noise = np.sqrt(squares + _sum_variance(squares, (d * mean) ** 2, d)) / d
        t = x.t + self.fresh(shift, x.v)
        t = t - layer * row_mean(t) + self.fresh(noise, x.v) + self.fresh(mean, x.v) + layer * self.fresh(centred, x.v)
        h = x.h + np.abs(shift)
        h = h + layer * (row_mean(h) + d * row_mean(np.abs(shift)) + np.abs(mean) + np.abs(centred))
        # Half the relative error of the mean square (squares, sum, quotient and eps), and the root: one for the row.
        fourth = d * row_mean(centred**4)
        power = d * row_mean(centred**2)
        noise = np.sqrt((fourth + _sum_variance(fourth, power**2, d)) / (d * root**2) ** 2 / 4 + 2 / 4 + 1)
        ratio = row_mean(y * t) / root + self.fresh(noise, x.v)
        worst = row_mean(np.abs(y) * h) / root + (d + 2) / 2 + 1
        grow = 1 + self.error(Tracked(centred, h, t)).max(axis=1, keepdims=True, initial=0.0) / root
        limit = 2 * math.sqrt(d) / self.u
        t = np.clip(grow * (t / root - y * ratio + self.fresh(y, x.v)), -limit / SIGMAS, limit / SIGMAS)
        h = np.minimum(grow * (h / root + np.abs(y) * (worst + 1)), limit) + self.tiny
        if not oracle.absent(p.scale):
            y = y * p.scale.v
            h, t = h * np.abs(p.scale.v) + np.abs(y), t * p.scale.v + self.fresh(y, x.v)
        if layer and not oracle.absent(p.bias):
            y = y + p.bias.v
            h, t = h + np.abs(y), t + self.fresh(y, x.v)
        return Tracked(y, h, t)

    def act(self, x):
        z, name = x.v, self.activation
        f = np.asarray(super().act(z), dtype=np.float64).reshape(z.shape)
        worst, sharp = self.u * x.h, self.error(x)
        if name == "relu":
            return Tracked(f, np.where(z > -worst, x.h, 0.0), np.where(z > -sharp, x.t, 0.0))
        if name == "squared_relu":
            slope, curvature, own, own_sharp = 2 * np.maximum(z, 0), 2.0, f, f
        else:
            slope, curvature = self.slope(z), MAX_CURVATURE
            own, own_sharp = ACT * np.abs(z), ACT_SHARP * np.abs(z)
            if name == "silu":
                # exp(-x) overflows where x * exp(x) is still a number; the result is then 0.
                own, own_sharp = SILU * np.abs(f) + np.abs(z) * self.tiny, SILU_SHARP * np.abs(f)
        steep = np.where(slope < 0, -1.0, 1.0) * (np.abs(slope) + curvature * sharp)
        h = x.h * (np.abs(slope) + curvature * worst) + own + self.tiny
        return Tracked(f, h, steep * x.t + self.fresh(own_sharp, z))

    def slope(self, z):
        if self.activation == "silu":
            sigmoid = 0.5 * (1 + np.tanh(z / 2))
            return sigmoid * (1 + z * (1 - sigmoid))
        # The two GELUs have the same slope to 5e-3, which does not matter to an error.
        below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z.reshape(-1)]).reshape(z.shape)
        return below + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    def multiply(self, x, y):
        v = x.v * y.v
        h = x.h * np.abs(y.v) + y.h * np.abs(x.v) + self.u * x.h * y.h + np.abs(v) + self.tiny
        return Tracked(v, h, x.t * y.v + x.v * y.t + self.u * x.t * y.t + self.fresh(v, v))

    def mean(self, x):
        """A sum of n terms, and a quotient that is exact where n is a power of two."""
        n = max(x.shape[0], 1)
        total = x.v.sum(axis=0, keepdims=True)
        noise = np.sqrt(_sum_variance((x.v**2).sum(axis=0, keepdims=True), total**2, n))
        v, own = total / n, float(n & (n - 1) > 0)
        t = (x.t.sum(axis=1, keepdims=True) + self.fresh(noise, total)) / n + own * self.fresh(v, v)
        h = (x.h + (n - 1) * np.abs(x.v) + self.tiny).sum(axis=0, keepdims=True) / n + own * np.abs(v)
        return Tracked(v, h, t)

    def gate(self, x, gate):
        g = np.tanh(gate.v)[None]
        return self.multiply(x, Tracked(g, TANH * np.abs(g), self.signs(g.shape) * g))

    def log_counts(self, counts):
        v = np.log(np.maximum(np.asarray(counts, dtype=np.float64), 1)).reshape(-1, 1)
        return Tracked(v, LOG * v, self.fresh(v, v))

    def one_plus_tanh(self, x):
        f = np.tanh(x.v)
        worst, sharp = (1 - f * f + TANH_CURVATURE * error for error in (self.u * x.h, self.error(x)))
        h = np.minimum(worst * x.h, 2 / self.u) + TANH * np.abs(f) + np.abs(1 + f) + self.tiny
        limit = 2 / self.u / SIGMAS
        return Tracked(1 + f, h, np.clip(sharp * x.t, -limit, limit) + self.fresh(f, x.v) + self.fresh(1 + f, x.v))

    def softmax(self, q, k, visible, bias):
        return self.attend(q, k, Tracked(np.eye(k.shape[0])), visible, bias)

    def attend(self, q, k, v, visible, bias, merges=0):
        scale = float(self.head_scale(k.shape[1]))
        product = q.v * scale
        # A product for each number, and the scale itself, rounded once for all.
        t = q.t * scale + self.fresh(product, product) + self.signs((1, 1)) * product
        q = Tracked(product, q.h * abs(scale) + 2 * np.abs(product) + self.tiny, t)
        out = Tracked(np.zeros((q.shape[0], v.shape[1]))).copy()
        for i in range(q.shape[0]):
            seen = visible[i]
            if seen.any():
                seen_bias = None if bias is None else bias.v[seen]
                out[i] = self.attend_row(q[i], k[seen], v[seen], seen_bias, merges + self.merges)
        return out

    def attend_row(self, q, k, v, bias, merges):
        n, d = k.shape
        if n == 1 and not merges:
            return v[0]  # exp(0) = 1 and 1 * v / 1 are exact
        terms = k.v * q.v
        products, size = (terms**2).sum(axis=1), np.abs(terms).sum(axis=1)
        dot = terms.sum(axis=1)
        score = dot if bias is None else dot + bias
        below = score.max() - score
        below = np.where(np.isfinite(below), below, 0.0)
        p = np.exp(-below) / np.exp(-below).sum()
        o = p @ v.v
        away = np.abs(v.v - o)
        e, p_v = p[:, None] * away, p @ np.abs(v.v)

        noise = products + _sum_variance(products, dot * dot, d) + below**2 + EXP_SHARP**2
        h = (d + 1) * size + d * self.tiny + below + EXP + k.h @ np.abs(q.v)
        keys = k.v
        if bias is not None:
            noise, h, keys = noise + score**2, h + np.abs(score), np.c_[keys, bias]
        t = k.t @ q.v + q.t @ k.v.T + self.fresh(np.sqrt(noise)[:, None], keys)[..., 0]
        sharp = self.u * SIGMAS * np.sqrt((t**2).mean(axis=0)).max()
        worst = self.u * (h + np.abs(k.v) @ q.h).max()
        h = e.T @ h + np.abs((p[:, None] * (v.v - o)).T @ k.v) @ q.h
        t = (t * p) @ (v.v - o)
        if merges:
            t = t + merges * self.signs(o.shape) * (e.T @ np.hypot(EXP_SHARP, below))
            h = h + merges * (e.T @ (EXP + below))
        limit = away.max(axis=0) / self.u
        t = np.clip(t * math.exp(min(2 * sharp, 300)), -limit / SIGMAS, limit / SIGMAS)
        h = np.minimum(h * math.exp(min(2 * worst, 300)), limit)

        squares = p**2 @ v.v**2
        normaliser = _sum_variance((p**2).sum(), 1.0, n)
        noise = squares + _sum_variance(squares, o * o, n) + o * o * (normaliser + 1 + 4 * merges)
        noise = np.sqrt(noise) + self.tiny * away.sum(axis=0)
        h = h + p @ v.h + (n + 2 * merges) * p_v + (n + 2 * merges) * np.abs(o) + self.tiny * (away.sum(axis=0) + n)
        return Tracked(o, h, t + np.einsum("j,kjc->kc", p, v.t) + self.signs(o.shape) * noise)

    def fourier_features(self, positions, num_bands, max_resolution, concat_position=True, order="grouped"):
        """Errors of an angle: pi, the frequency (linspace, 3), two products and pi's own rounding: 6 u, sharp 2."""
        scalar = oracle.Oracle()
        values = scalar.fourier_features(positions.v, num_bands, max_resolution, concat_position, order)
        values = np.asarray(values, dtype=np.float64)
        axes = positions.shape[1]
        tops = max_resolution if isinstance(max_resolution, list | tuple) else [max_resolution] * axes
        angles = [math.pi * positions.v[:, [axis]] * np.linspace(1, tops[axis] / 2, num_bands) for axis in range(axes)]
        own = [positions.v[:, [axis]] * 0 for axis in range(axes)] if concat_position else []
        if order == "grouped":
            parts = [*own, *angles, *angles]
        else:
            parts = [part for axis in range(axes) for part in (angles[axis], angles[axis], *own[axis : axis + 1])]
        return self.turned(values, np.concatenate(parts, axis=1), 6.0, 2.0)

    def sincos_features(self, positions, dim, temperature=10000.0):
        """Errors of an angle: the frequency, rounded to the dtype, and the product, 1 u each.

        The frequency itself is calculated in float64: the quotient in the exponent, felt log(temperature) times as
        much, the power and its inverse, 1 u of float64 each.
        """
        scalar = oracle.Oracle()
        values = np.asarray(scalar.sincos_features(positions.v, dim, temperature), dtype=np.float64)
        count, axes = dim // (2 * positions.shape[1]), positions.shape[1]
        frequencies = np.tile(temperature ** -(np.arange(count) / count), 2)
        angles = [positions.v[:, [axis]] * frequencies for axis in range(axes)]
        steep, double = abs(math.log(temperature)), 2.0**-53 / self.u
        hard, sharp = 2 + (2 + steep) * double, math.sqrt(2 + (2 + steep**2) * double**2)
        return self.turned(values, np.concatenate(angles, axis=1), hard, sharp)

    def turned(self, values, angle, hard, sharp):
        """The sines and cosines of angles that are off by so many of their own u; sine and cosine of libm: 2 u."""
        angle = np.abs(angle)
        slope = np.sqrt(np.maximum(1 - values**2, 0.0))

        def error(c):
            return np.minimum(slope * c * angle + self.u * (c * angle) ** 2, 2 / self.u) + 2 * np.abs(values)

        # Where nothing turns, a position is copied and the sine and cosine of 0 are exact.
        h, t = (np.where(angle > 0, e, 0.0) for e in (error(hard), self.signs(values.shape) * error(sharp)))
        return Tracked(values, h, t)


def bounds(name, *arrays, params=(), dtype, activation=None, eps=None, scale=None, merges=0, **options):
    """Give the values in float64 and the sharp and hard bounds of a block, element by element, in absolute units.

    Parameters
    ----------
    name, *arrays, params, activation, eps, scale, **options
        As `oracle.evaluate` takes them.
    dtype : dtype or str
        The type of the result, from any backend.
    merges : int
        How many merges of states an element passes through in every attention: of C parts of a set, merged as a
        balanced tree, ceil(log2(C)).

    Returns
    -------
    value, sharp, hard : numpy.ndarray
        The value is only good to float64: `reference` takes the oracle's.
    """
    u, tiny = _U[dtype_name(dtype)], _TINY[dtype_name(dtype)]
    engine = ErrorAnalysis(u, tiny, activation, eps, scale, merges)
    with np.errstate(all="ignore"):
        batch, results = oracle.run(engine, name, arrays, params, **options)
        parts = [[getattr(result, k) for result in results] for k in ("v", "sigma", "h")]
        parts = [np.array(part) for part in parts]
        value, sigma, h = (part[: math.prod(batch)].reshape(batch + part.shape[1:]) for part in parts)
        count = sum(oracle.to_float64(array).size for array in arrays)
        leaves = []
        oracle.map_tree(lambda leaf: leaves.append(math.prod(leaf.shape)), params)
        floor = np.where(h > 0, (count + sum(leaves)) * tiny + 2.0**-53 * np.abs(value), 0.0)
        hard = u * h + floor
        # Squares that underflow say nothing of numbers below 1e-150 or so, which only float64 has; hard serves there.
        sharp = np.where(sigma > 1e-135, np.fmin(u * SIGMAS * sigma + floor, hard), hard)
        # An element with no error at all, such as one of a masked row, is 0 in any type.
        sharp, hard = (b + np.where(b > 0, half_rounding(np.abs(value) + b, dtype), 0.0) for b in (sharp, hard))
    return value, sharp, hard


def reference(name, *arrays, params=(), dtype, exact=None, hard=False, merges=0, **options):
    """Give the oracle's value of a block and its bound, element by element, in absolute units.

    Parameters
    ----------
    name, *arrays, params, **options
        As `oracle.evaluate` takes them.
    dtype : dtype or str
        The type of the result, from any backend.
    exact : bool, optional
        Whether the reference calculates with 50 digits. Without it, it does for float64, which float64 cannot judge.
    hard : bool
        Whether to give the worst-case bound in place of the sharp one.
    merges : int
        As for `bounds`.

    Returns
    -------
    value, bound : numpy.ndarray
    """
    value, sharp, worst = bounds(name, *arrays, params=params, dtype=dtype, merges=merges, **options)
    exact = dtype_name(dtype) == "float64" if exact is None else exact
    value = oracle.evaluate(name, *arrays, params=params, exact=exact, **options)
    return value, worst if hard else sharp


def attention_bound(
    q, k, v, *, scale=None, visible=None, bias=None, dtype, hard=False, merges=0, q_error=0.0, k_error=0.0, v_error=0.0
):
    """Bound the error of one head's softmax attention by the written-out first-order formula.

    |error| <= u [sum_j p_j |v_j - o| (lambda_d sigma_j + (m - s_j) + c_exp) + g sum_j p_j |v_j|], where p are the
    weights, s the scores, m their maximum and sigma_j = scale sum_i |q_i k_ji|. The weights p_j |v_j - o| keep it
    tight: a row that one key dominates, equal values and a single key get next to nothing, and the error of m itself
    drops out, because numerator and denominator share it.

    Hard, the first-order worst case: lambda_d = d + 2 (d products, d - 1 sums, the scaling of q and of its scale: one
    of them is in d's slack), c_exp = 4, g = 2 (b + ceil(n / b)) + 3 with b = 128, or 2 n + 3 if n < 128 (two sums, a
    product and a quotient). Sharp, with independent errors: lambda_d = 2 sqrt(d) + 1, c_exp = 4,
    g = 2 log2(n + 1) + 3. Every merge of two states adds c_exp + 3.

    Parameters
    ----------
    q, k, v : array
        Queries (..., m, d), keys (..., n, d), values (..., n, c): the projected ones, if they were projected.
    scale : float, optional
        Without it 1 / sqrt(d).
    visible : array, optional
        Boolean, broadcasts against (..., m, n).
    bias : array, optional
        Broadcasts against (..., m, n).
    dtype : dtype or str
        The type of the result.
    hard : bool
        Whether to give the worst case.
    merges : int
        Number of merged states on the way.
    q_error, k_error, v_error : array or float
        Errors of q, k and v in units of u: (d + 1) |x| |W|, and |bias| once, for a projection from width d.

    Returns
    -------
    numpy.ndarray
        Absolute, of shape (..., m, c).
    """
    q, k, v = map(oracle.to_float64, (q, k, v))
    d, n, u = q.shape[-1], k.shape[-2], unit_roundoff(dtype)
    scale = 1 / math.sqrt(d) if scale is None else scale
    kt = np.swapaxes(k, -1, -2)
    sigma = product(abs(scale) * np.abs(q), np.abs(kt))
    q_error, k_error = np.broadcast_to(q_error, q.shape), np.broadcast_to(k_error, k.shape)
    carried = abs(scale) * (product(q_error, np.abs(kt)) + product(np.abs(q), np.swapaxes(k_error, -1, -2)))
    s = product(scale * q, kt)
    if bias is not None:
        s = s + oracle.to_float64(bias)
        carried = carried + np.abs(s)
    seen = np.broadcast_to(True if visible is None else np.asarray(visible, dtype=bool), s.shape)
    m = np.where(seen, s, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    below = np.where(seen, np.where(np.isfinite(m), m, 0.0) - np.where(seen, s, 0.0), 0.0)
    p = np.where(seen, np.exp(-below), 0.0)
    p = p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    o, size = product(p, v), product(p, np.abs(v))
    if hard:
        slope, g = d + 2, 2 * n + 3 if n < 128 else 2 * (128 + -(-n // 128)) + 3
    else:
        slope, g = 2 * math.sqrt(d) + 1, 2 * math.log2(n + 1) + 3
    weight = p * (slope * sigma + carried + np.where(np.isfinite(below), below, 0.0) + EXP)
    away = np.abs(v[..., None, :, :] - o[..., :, None, :])
    total = (weight[..., None] * away).sum(axis=-2) + (g + merges * (EXP + 3)) * size
    total = total + product(p, np.broadcast_to(v_error, v.shape))
    bound = u * total + n * _TINY[dtype_name(dtype)] * seen.any(axis=-1, keepdims=True)
    return bound + half_rounding(np.abs(o) + bound, dtype) * seen.any(axis=-1, keepdims=True)


# Comparison.

_RATIOS = {}


def assert_close(actual, value, bound, label, *, nan=False):
    """Fail unless every element is within its bound.

    Parameters
    ----------
    actual : array
        What was calculated, from any backend.
    value, bound : array
        The reference and its bound. An infinite value must be met exactly.
    label : str
        Under which the largest error / bound is recorded.
    nan : array or bool
        Where a NaN is declared: there, and nowhere else, both sides must be NaN.
    """
    actual, value = oracle.to_float64(actual), np.asarray(value, dtype=np.float64)
    assert actual.shape == value.shape, f"{label}: shape {actual.shape}, wanted {value.shape}"
    bound, nan = np.broadcast_to(bound, value.shape), np.broadcast_to(nan, value.shape)
    for side, array in (("result", actual), ("reference", value)):
        wrong = np.isnan(array) != nan
        assert not wrong.any(), f"{label}: NaN misplaced in the {side} at {_first(wrong)}"
    assert not (np.isnan(bound) & ~nan).any(), f"{label}: NaN in the bound"
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where((actual == value) | nan, 0.0, np.abs(actual - value))
        ratio = np.where(error == 0, 0.0, error / bound)
    worst = float(ratio.max(initial=0.0))
    _RATIOS[label] = max(_RATIOS.get(label, 0.0), worst)
    at = _first(ratio == worst) if ratio.size else ()
    assert worst <= 1.0, (
        f"{label}: {int((ratio > 1).sum())} of {ratio.size} elements beyond the bound; "
        f"largest error / bound {worst:.3g} at {at}: {actual[at]!r}, wanted {value[at]!r} +- {bound[at]:.3g}"
    )


def _first(where):
    return tuple(int(i) for i in np.argwhere(where)[0])


def worst_ratios():
    """Give the largest error / bound seen under each label."""
    return dict(sorted(_RATIOS.items()))


def report():
    """Write the largest ratios as lines for the end of a test session; a tolerance that hides faults is marked."""
    return [f"{ratio:8.3f}  {label}{'' if ratio >= 0.02 else '  (loose)'}" for label, ratio in worst_ratios().items()]


def tight(label, at_least=0.02):
    """Fail if nothing under a label has come near its bound: such a tolerance would hide faults."""
    worst = _RATIOS.get(label, 0.0)
    assert worst >= at_least, f"{label}: largest error / bound only {worst:.3g}"


def planted(value, bound, factor=8.0):
    """Give the value with one error planted, of `factor` bounds, where the bound is largest."""
    value = np.array(value, dtype=np.float64)
    bound = np.broadcast_to(bound, value.shape)
    at = _first(bound == bound.max())
    value[at] += factor * bound[at]
    return value


def assert_sensitive(value, bound, label):
    """Fail unless an error of eight bounds is refused and one of half a bound passes. Records nothing."""
    kept = dict(_RATIOS)
    try:
        assert_close(planted(value, bound, 0.5), value, bound, label)
        try:
            assert_close(planted(value, bound, 8.0), value, bound, label)
        except AssertionError:
            return
        raise AssertionError(f"{label}: an error of eight bounds passes")
    finally:
        _RATIOS.clear()
        _RATIOS.update(kept)


# Gradients.


def gradient(function, x, noise=None):
    """Differentiate by central differences in float64.

    The step is h = eps^(1/3) max(1, |x_i|), which balances the two errors. A central difference is off by
    h^2 / 6 times the third derivative, so those with h and 2 h differ by h^2 / 2 times it, which is three times the
    truncation error of the first. It is taken in full: room for the third derivative to vary by that factor within the
    step. To it comes what the rounding of f does to the quotient: noise / h.

    Parameters
    ----------
    function : callable
        From a float64 array like `x` to a number; smooth within 2 h of `x` (no relu near 0).
    x : numpy.ndarray
        Float64.
    noise : float, optional
        Absolute error of one value of the function, such as the sum of the bounds of what it adds up. Without it 64 u
        |f|, which stands in for some dozens of roundings where nothing cancels; a loss that cancels must give its own.

    Returns
    -------
    gradient, tolerance : numpy.ndarray
        Of the shape of `x`.
    """
    x = np.array(x, dtype=np.float64)
    slope, tolerance = np.zeros(x.shape), np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        h = 2.0 ** round(math.log2(np.finfo(np.float64).eps ** (1 / 3) * max(1.0, abs(x[index]))))
        values = {}
        for step in (-2, -1, 1, 2):
            moved = x.copy()
            moved[index] += step * h
            values[step] = float(function(moved)), moved[index]
        near = (values[1][0] - values[-1][0]) / (values[1][1] - values[-1][1])
        far = (values[2][0] - values[-2][0]) / (values[2][1] - values[-2][1])
        size = max(abs(f) for f, _ in values.values())
        slope[index] = near
        tolerance[index] = abs(far - near) + (64 * 2.0**-53 * size if noise is None else noise) / h
    return slope, tolerance
