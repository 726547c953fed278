"""A slow reference of the method, written from its description alone: one entry at a time, in Python's own floats.

Tensors are nested lists (matrices are lists of rows), sums are exact (`math.fsum`), and nothing of the library is
used. "No clip" is a clip at infinity; no threshold is a threshold of 0.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

Vector = list[float]
Matrix = list[list[float]]


# ---- one entry ----


def sign(u: float) -> float:
    return 1.0 if u >= 0.0 else -1.0  # -0.0 >= 0.0 is true


def clip(u: float, low: float, high: float) -> float:
    return min(max(u, low), high)


def within(u: float, low: float, high: float) -> float:
    return 1.0 if low < u < high else 0.0


def surrogate(kind: str, u: float, low: float, high: float, b: float = 0.0, reach: float = math.inf) -> float:
    """k: what a frozen entry passes back; the window of a weight has no end."""
    near = 1.0 if abs(u - b) < reach else 0.0
    return {"zero": 0.0, "ste": 1.0, "clipped_ste": within(u, low, high), "windowed_ste": near}[kind]


def gradient(
    g: float, u: float, low: float, high: float, m: float, kind: str, b: float = 0.0, reach: float = math.inf
) -> float:
    """dL/du of one entry of a weight or an activation."""
    return (1.0 - m) * g * within(u, low, high) + m * surrogate(kind, u, low, high, b, reach) * g


# ---- the weight mix: w' = M * s * sign(w) + (1 - M) * clip(w, -c, c), s one a row ----


def mix_weight(w: Matrix, s: Vector, mask: Matrix, c: float) -> Matrix:
    return [
        [m * s_i * sign(v) + (1.0 - m) * clip(v, -c, c) for v, m in zip(row, masks, strict=True)]
        for row, masks, s_i in zip(w, mask, s, strict=True)
    ]


def mix_weight_gradients(g: Matrix, w: Matrix, mask: Matrix, c: float, kind: str) -> tuple[Matrix, Vector]:
    """dL/dw and dL/ds."""
    rows = list(zip(g, w, mask, strict=True))
    grad_w = [[gradient(g_i, v, -c, c, m, kind) for g_i, v, m in zip(*row, strict=True)] for row in rows]
    grad_s = [math.fsum(m * g_i * sign(v) for g_i, v, m in zip(*row, strict=True)) for row in rows]
    return grad_w, grad_s


# ---- the activation mix: u' = M * (o + a * sign(u - b)) + (1 - M) * clip(u, lo, hi), M and b one a column ----


def mix_activation(u: Matrix, a: float, b: Vector, mask: Vector, low: float, high: float, offset: float) -> Matrix:
    """`offset` is o / a: 0 or 1."""
    return [
        [
            m * (offset * a + a * sign(v - b_i)) + (1.0 - m) * clip(v, low, high)
            for v, b_i, m in zip(row, b, mask, strict=True)
        ]
        for row in u
    ]


def mix_activation_gradients(
    g: Matrix, u: Matrix, b: Vector, mask: Vector, low: float, high: float, offset: float, kind: str, reach: float
) -> tuple[Matrix, float, Vector]:
    """dL/du, dL/da and dL/db; `reach` is the surrogate's window, width * a."""
    rows = list(zip(g, u, strict=True))
    columns = range(len(b))
    grad_u = [[gradient(g_r[i], u_r[i], low, high, mask[i], kind, b[i], reach) for i in columns] for g_r, u_r in rows]
    grad_a = math.fsum(mask[i] * g_r[i] * (sign(u_r[i] - b[i]) + offset) for g_r, u_r in rows for i in columns)
    grad_b = [
        -math.fsum(mask[i] * surrogate(kind, u_r[i], low, high, b[i], reach) * g_r[i] for g_r, u_r in rows)
        for i in columns
    ]
    return grad_u, grad_a, grad_b


# ---- a whole layer: y = u' @ w'.T + bias ----


def linear(u: Matrix, w: Matrix, bias: Vector | None) -> Matrix:
    """Rows of u, rows of w: y[r][o] = sum_i u[r][i] * w[o][i] + bias[o]."""
    shift = bias or [0.0] * len(w)
    return [
        [
            math.fsum(v * w_i for v, w_i in zip(row, channel, strict=True)) + b
            for channel, b in zip(w, shift, strict=True)
        ]
        for row in u
    ]


def linear_gradients(g: Matrix, u: Matrix, w: Matrix) -> tuple[Matrix, Matrix, Vector]:
    """dL/du, dL/dw and dL/dbias from g = dL/dy."""
    rows, channels, features = range(len(u)), range(len(w)), range(len(w[0]))
    grad_u = [[math.fsum(g[r][o] * w[o][i] for o in channels) for i in features] for r in rows]
    grad_w = [[math.fsum(g[r][o] * u[r][i] for r in rows) for i in features] for o in channels]
    grad_bias = [math.fsum(g[r][o] for r in rows) for o in channels]
    return grad_u, grad_w, grad_bias


# ---- the progression ----


def frozen_fraction(schedule: str, t: float) -> float:
    return {
        "cubic": t * t * t,
        "quadratic": t * t,
        "linear": t,
        "flipped_quadratic": 1.0 - (1.0 - t) * (1.0 - t),
        "cosine": (1.0 - math.cos(math.pi * t)) / 2.0,
    }[schedule]


def window(start: float, end: float, stage: int, stages: int) -> tuple[float, float]:
    """First share of the run that belongs to the window of a stage, and first share that no longer does."""
    return start + (end - start) * stage / stages, start + (end - start) * (stage + 1) / stages


# ---- a convolution in any number of dimensions: arrays are dictionaries from index tuples to numbers ----

Index = tuple[int, ...]
Array = dict[Index, float]


@dataclass(frozen=True)
class Geometry:
    """A convolution without its numbers; `before` and `after` are its padding on the two sides of each dimension."""

    weight: Index  # output channels, input channels of a group, and the kernel's sizes
    size: Index
    stride: Index
    dilation: Index
    before: Index
    after: Index
    groups: int
    mode: str

    def out_size(self) -> Index:
        sides = zip(self.size, self.weight[2:], self.stride, self.dilation, self.before, self.after, strict=True)
        return tuple((n + b + a - d * (k - 1) - 1) // s + 1 for n, k, s, d, b, a in sides)


@functools.cache
def taps(shape: Geometry) -> list[tuple[Index, Index, int, Index | None]]:
    """For every output entry and every weight that it meets: the input channel and position, or None: padding."""
    found = []
    outs, ins, *kernel = shape.weight
    for p, k in itertools.product(indices(*shape.out_size()), indices(*kernel)):
        places = [
            looks(p[i] * shape.stride[i] + k[i] * shape.dilation[i] - shape.before[i], size, shape.mode)
            for i, size in enumerate(shape.size)
        ]
        inside = tuple(place for place in places if place is not None)
        for o, j in indices(outs, ins):
            channel = o // (outs // shape.groups) * ins + j
            found.append(((o, *p), (o, j, *k), channel, inside if len(inside) == len(places) else None))
    return found


def looks(position: int, size: int, mode: str) -> int | None:
    """Which input entry stands at a position that may lie outside; None: a constant."""
    if 0 <= position < size:
        return position
    if mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    return {"zeros": None, "replicate": 0 if position < 0 else size - 1, "circular": position % size}[mode]


def sums(terms: Iterable[tuple[Index, float]], keys: Iterable[Index]) -> Array:
    """Exact sums of the terms that share a key; 0 where a key has none."""
    found: dict[Index, list[float]] = {key: [] for key in keys}
    for key, term in terms:
        found[key].append(term)
    return {key: math.fsum(values) for key, values in found.items()}


def indices(*sizes: int) -> list[Index]:
    return list(itertools.product(*map(range, sizes)))


def conv(u: Array, w: Array, pad: Vector, shape: Geometry, batch: int) -> Array:
    """u is (batch, channel, *position); `pad` stands around each of its channels."""
    terms = (
        ((n, *out), w[tap] * (pad[c] if q is None else u[(n, c, *q)]))
        for out, tap, c, q in taps(shape) for n in range(batch)
    )  # fmt: skip
    return sums(terms, indices(batch, shape.weight[0], *shape.out_size()))


def conv_gradients(
    g: Array, u: Array, w: Array, pad: Vector, shape: Geometry, batch: int
) -> tuple[Array, Array, Array]:
    """dL/du, dL/dw, and dL/dpad with the channels as keys, from g = dL/dz."""
    grad_u, grad_w, grad_pad = [], [], []
    for out, tap, c, q in taps(shape):
        for n in range(batch):
            g_out = g[(n, *out)]
            grad_w.append((tap, g_out * (pad[c] if q is None else u[(n, c, *q)])))
            if q is None:
                grad_pad.append(((c,), g_out * w[tap]))
            else:
                grad_u.append(((n, c, *q), g_out * w[tap]))
    return sums(grad_u, u), sums(grad_w, w), sums(grad_pad, indices(len(pad)))


# ---- an activation f that a layer absorbed: real entries compute with f(u), binary ones with u ----


def absorbed(kind: str | None, u: float) -> tuple[float, float]:
    """f(u) and f'(u)."""
    if kind is None:
        return u, 1.0
    if kind == "Hardswish":
        slope = 0.0 if u <= -3.0 else 1.0 if u >= 3.0 else u / 3.0 + 0.5
        return u * clip(u + 3.0, 0.0, 6.0) / 6.0, slope
    return clip(u, 0.0, {"ReLU": math.inf, "ReLU6": 6.0}[kind]), within(u, 0.0, {"ReLU": math.inf, "ReLU6": 6.0}[kind])


# ---- one attention head with binary operands: y = (f * p') v', p = softmax(t * q' k'^T + bias), all in rows ----


@dataclass
class Site:
    """One operand, (rows, columns), with its scale, thresholds and mask (one a column), clip and o / a."""

    u: Matrix
    a: float
    b: Vector
    mask: Vector
    low: float = -math.inf
    high: float = math.inf
    offset: float = 0.0
    reach: float = math.inf

    def mixed(self) -> Matrix:
        return mix_activation(self.u, self.a, self.b, self.mask, self.low, self.high, self.offset)

    def gradients(self, g: Matrix, kind: str) -> tuple[Matrix, float, Vector]:
        return mix_activation_gradients(
            g, self.u, self.b, self.mask, self.low, self.high, self.offset, kind, self.reach
        )


def times(left: Matrix, right: Matrix) -> Matrix:
    return [[math.fsum(x * y for x, y in zip(row, column, strict=True)) for column in flip(right)] for row in left]


def flip(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def softmax(rows: Matrix) -> Matrix:
    """Entries of -inf get 0; so does a row of nothing else."""
    result = []
    for row in rows:
        top = max(row)
        powers = [0.0 if s == -math.inf else math.exp(s - top) for s in row]
        total = math.fsum(powers) or 1.0
        result.append([power / total for power in powers])
    return result


def attention(
    q: Site, k: Site, v: Site, p: Site, scaling: float, bias: Matrix, g: Matrix, kind: str
) -> tuple[Matrix, Matrix, dict[str, tuple[Matrix, float, Vector]]]:
    """y, p', and for each operand the gradients of u, a and b; `bias` is -inf where an entry is excluded.

    Of `p` only the values are read: its u is what comes out of the softmax.
    """
    scores = [[scaling * s for s in row] for row in times(q.mixed(), flip(k.mixed()))]
    weights = softmax([[s + b for s, b in zip(*rows, strict=True)] for rows in zip(scores, bias, strict=True)])
    p = dataclasses.replace(p, u=weights)
    inside = [[float(w > 0.0) for w in row] for row in weights]
    binary = [[x * f for x, f in zip(*rows, strict=True)] for rows in zip(p.mixed(), inside, strict=True)]
    grads = {"value": v.gradients(times(flip(binary), g), kind)}
    passed = [[x * f for x, f in zip(*r, strict=True)] for r in zip(times(g, flip(v.mixed())), inside, strict=True)]
    grads["probability"] = p.gradients(passed, kind)
    back = []
    for w, d in zip(weights, grads["probability"][0], strict=True):  # the softmax
        mean = math.fsum(x * y for x, y in zip(w, d, strict=True))
        back.append([scaling * x * (y - mean) for x, y in zip(w, d, strict=True)])
    grads["query"] = q.gradients(times(back, k.mixed()), kind)
    grads["key"] = k.gradients(times(flip(back), q.mixed()), kind)
    return times(binary, v.mixed()), binary, grads
