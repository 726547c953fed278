"""A slow reference of the method, written from its description alone: one entry at a time, in Python's own floats.

Tensors are nested lists (matrices are lists of rows), sums are exact (`math.fsum`), and nothing of the library is
used. "No clip" is a clip at infinity; no threshold is a threshold of 0.
"""

import math

Vector = list[float]
Matrix = list[list[float]]


# ---- one entry ----


def sign(u: float) -> float:
    return 1.0 if u >= 0.0 else -1.0  # -0.0 >= 0.0 is true


def clip(u: float, low: float, high: float) -> float:
    return min(max(u, low), high)


def within(u: float, low: float, high: float) -> float:
    return 1.0 if low < u < high else 0.0


def surrogate(kind: str, u: float, low: float, high: float) -> float:
    """k: what a frozen entry passes back."""
    return {"zero": 0.0, "ste": 1.0, "clipped_ste": within(u, low, high)}[kind]


def gradient(g: float, u: float, low: float, high: float, m: float, kind: str) -> float:
    """dL/du of one entry of a weight or an activation."""
    return (1.0 - m) * g * within(u, low, high) + m * surrogate(kind, u, low, high) * g


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
    g: Matrix, u: Matrix, b: Vector, mask: Vector, low: float, high: float, offset: float, kind: str
) -> tuple[Matrix, float, Vector]:
    """dL/du, dL/da and dL/db."""
    rows = list(zip(g, u, strict=True))
    columns = range(len(b))
    grad_u = [[gradient(g_r[i], u_r[i], low, high, mask[i], kind) for i in columns] for g_r, u_r in rows]
    grad_a = math.fsum(mask[i] * g_r[i] * (sign(u_r[i] - b[i]) + offset) for g_r, u_r in rows for i in columns)
    grad_b = [-math.fsum(mask[i] * surrogate(kind, u_r[i], low, high) * g_r[i] for g_r, u_r in rows) for i in columns]
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
