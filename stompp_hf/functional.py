"""The maths of StoMPP on plain tensors: hard, soft, and the masked mix of the two with its gradients.

No modules and no state here. Written with `copysign` and `lerp` instead of `where`, because a masked select
with a random mask costs several plain copies on a CPU, and nothing is saved that the caller does not keep anyway.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Surrogate = Literal["zero", "ste", "clipped_ste"]


def hard(u: Tensor) -> Tensor:
    """Binary value of each entry, as a new tensor.

    Forward:  hard(u) = sign(u), with sign(0) = sign(-0) = +1
    Backward: none; the mixes below own their gradients.
    Shape and dtype: those of `u` (any float dtype; the sign does not depend on it). A NaN becomes +1 or -1.
    Source:   Smith and Islam (2026); the value at 0 is this library's choice.
    """
    return torch.copysign(u.new_ones(()), u + 0.0)  # adding 0 turns -0 into +0


def soft(u: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """Clipped value of each entry.

    Forward:  soft(u) = clip(u, low, high); with both None, u itself
    Source:   Smith and Islam (2026), who clip at -1 and 1.
    """
    return u if low is None else torch.clamp(u, low, high)


def inside(u: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor | None:
    """1 strictly between the clip's edges, 0 elsewhere (at an edge the gradient is 0); None if there is no clip."""
    return None if low is None else ((u > low) & (u < high)).to(u.dtype)


def _through(grad: Tensor, mask: Tensor, within: Tensor | None, surrogate: str) -> Tensor:
    """(1 - M) * within * g + M * k * g, for the surrogate's k; masks hold 0 and 1, so every product is exact."""
    if surrogate == "zero":
        passed = 1.0 - mask
        return grad * (passed if within is None else passed * within)
    if within is None:
        return grad
    return grad * (torch.maximum(within, mask) if surrogate == "ste" else within)


class _MixWeight(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, scale: Tensor, mask: Tensor, clip: Tensor | None, surrogate: str
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, mask, clip)
        ctx.surrogate = surrogate
        low = None if clip is None else -clip
        return torch.lerp(soft(weight, low, clip), hard(weight).mul_(scale), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale, mask, clip = ctx.saved_tensors
        grad_weight = grad_scale = None
        if ctx.needs_input_grad[0]:
            within = inside(weight, None if clip is None else -clip, clip)
            grad_weight = _through(grad, mask, within, ctx.surrogate)
        if ctx.needs_input_grad[1]:
            grad_scale = (mask * grad * hard(weight)).sum_to_size(scale.shape)
        return grad_weight, grad_scale, None, None, None


def mix_weight(weight: Tensor, scale: Tensor, mask: Tensor, clip: Tensor | None, surrogate: Surrogate) -> Tensor:
    """Weight of a stage in transition: frozen entries binary, the others real.

    Forward:  w' = M * s * sign(w) + (1 - M) * clip(w, -c, c)
    Backward: dL/dw = (1 - M) * g * 1[-c < w < c] + M * k * g, g = dL/dw'
              k = 0 (`zero`, STE-free), 1 (`ste`) or 1[-c < w < c] (`clipped_ste`); never multiplied by the scale
              dL/ds = sum of M * g * sign(w) over the entries that share s
    Source:   Smith and Islam (2026) for s = c = 1; scale, clip range and the clipped surrogate are this library's.

    Args:
        weight: latent weight, any shape, float.
        scale: s, broadcastable to `weight` ((out, 1) for a linear layer), float.
        mask: M, shape and dtype of `weight`, entries 0 and 1.
        clip: c, broadcastable to `weight`, or None for no clip.
        surrogate: what frozen entries pass back.
    """
    return _MixWeight.apply(weight, scale, mask, clip, surrogate)


class _MixActivation(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        u: Tensor,
        scale: Tensor,
        threshold: Tensor | None,
        mask: Tensor,
        low: Tensor | None,
        high: Tensor | None,
        offset: float,
        surrogate: str,
    ) -> Tensor:
        ctx.save_for_backward(u, scale, threshold, mask, low, high)
        ctx.offset, ctx.surrogate = offset, surrogate
        levels = hard(u if threshold is None else u - threshold)
        levels = levels.add_(offset).mul_(scale) if offset else levels.mul_(scale)
        return torch.lerp(soft(u, low, high), levels, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        u, scale, threshold, mask, low, high = ctx.saved_tensors
        wants_u, wants_scale, wants_threshold = ctx.needs_input_grad[:3]
        grad_u = grad_scale = grad_threshold = None
        within = inside(u, low, high)
        if wants_u:
            grad_u = _through(grad, mask, within, ctx.surrogate)
        frozen = grad * mask if wants_scale or wants_threshold else grad
        if wants_scale:
            levels = hard(u if threshold is None else u - threshold).add_(ctx.offset)
            grad_scale = (frozen * levels).sum_to_size(scale.shape)
        if wants_threshold and ctx.surrogate != "zero":
            if ctx.surrogate == "clipped_ste" and within is not None:
                frozen = frozen * within
            grad_threshold = -frozen.sum_to_size(threshold.shape)
        return grad_u, grad_scale, grad_threshold, None, None, None, None, None


def mix_activation(
    u: Tensor,
    scale: Tensor,
    threshold: Tensor | None,
    mask: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    offset: float,
    surrogate: Surrogate,
) -> Tensor:
    """Input of a layer of a stage in transition: frozen features binary, the others real.

    Forward:  u' = M * (o + a * sign(u - b)) + (1 - M) * clip(u, low, high), with o = offset * a
              offset 0 gives the levels {-a, a}, offset 1 gives {0, 2a}
    Backward: dL/du = (1 - M) * g * 1[low < u < high] + M * k * g, g = dL/du'
              dL/da = sum of M * g * (sign(u - b) + offset);  dL/db = - sum of M * k * g
              k as in `mix_weight`; STE-free, b gets no gradient and keeps its calibrated value
    Source:   Smith and Islam (2026) for a = high = 1, low = -1, b = o = 0; the rest is this library's choice.

    Args:
        u: input, any shape, float.
        scale: a, broadcastable to `u`.
        threshold: b, broadcastable to `u`, or None for 0.
        mask: M, broadcastable to `u`, dtype of `u`, entries 0 and 1.
        low, high: clip range, broadcastable to `u`; both None for no clip.
        offset: 0.0 or 1.0, in units of the scale.
        surrogate: what frozen features pass back.
    """
    return _MixActivation.apply(u, scale, threshold, mask, low, high, offset, surrogate)
