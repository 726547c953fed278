"""The product of two activations that are both frozen: exact codes first, one scale for each head after it.

The same idea as in `frozen_product`: a product of signs is a sum of integers, exact in float32 in any order, so that
training, packed storage and kernels can agree bit for bit.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from .mixing import hard_above, mix_activation, through_activation
from .surrogates import Surrogate

Edges = tuple[float | None, float | None]


@dataclass
class Operand:
    """An activation with what makes it binary.

    u: (..., n, m), float32 or float64; scale: a, one a head, broadcastable to the leading dimensions with (1, 1)
    behind; threshold: b, broadcastable to u, or None for 0; edges: its clip range; offset: 0.0 for the levels {-a, a},
    1.0 for {0, 2a}; mask: M, broadcastable to u, in a transition; width: `surrogate_width`.
    """

    u: Tensor
    scale: Tensor
    threshold: Tensor | None
    edges: Edges
    offset: float = 0.0
    mask: Tensor | None = None
    width: float = 1.0

    def transposed(self) -> "Operand":
        """The same with its last two dimensions exchanged."""
        threshold, mask = (None if t is None else t.transpose(-1, -2) for t in (self.threshold, self.mask))
        return replace(self, u=self.u.transpose(-1, -2), threshold=threshold, mask=mask)

    def mixed(self, surrogate: Surrogate) -> Tensor:
        """u' in a transition: `mix_activation`."""
        if self.mask is None:
            raise RuntimeError("attention in transition has no mask; its state is set by Progression.step(step)")
        return mix_activation(
            self.u, self.scale, self.threshold, self.mask, *self.edges, self.offset, surrogate, width=self.width
        )

    def binary(self) -> Tensor:
        """u' once frozen, a * (offset + sign(u - b)), without a gradient."""
        return codes_of(self.u, self.threshold, self.offset) * self.scale.detach()


def codes_of(u: Tensor, threshold: Tensor | None, offset: float, factor: Tensor | None = None) -> Tensor:
    """(offset + sign(u - b)) * factor: the levels of u in units of its scale, as a new tensor without a gradient."""
    codes = hard_above(u, threshold)
    codes = codes.add_(offset) if offset else codes
    return codes if factor is None else codes.mul_(factor)


class _BinaryMatmul(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        left: Tensor,
        right: Tensor,
        left_scale: Tensor,
        right_scale: Tensor,
        left_threshold: Tensor | None,
        right_threshold: Tensor | None,
        factor: Tensor | None,
        offset: float,
        edges: tuple[Edges, Edges],
        surrogate: Surrogate,
        width: float,
    ) -> Tensor:
        z = codes_of(left, left_threshold, offset, factor).matmul(codes_of(right, right_threshold, 0.0))
        needs = ctx.needs_input_grad
        passes = surrogate.passes and any(needs[index] for index in (0, 1, 4, 5))
        ctx.save_for_backward(
            left if passes else None,
            right if passes else None,
            left_scale,
            right_scale,
            left_threshold,
            right_threshold,
            factor if passes else None,
            z if needs[2] or needs[3] else None,
        )
        ctx.offset, ctx.edges, ctx.surrogate, ctx.width, ctx.passes = offset, edges, surrogate, width, passes
        return z * (left_scale * right_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        left, right, left_scale, right_scale, left_threshold, right_threshold, factor, z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 6
        if needs[2] or needs[3]:
            both = (grad * z).sum_to_size(torch.broadcast_shapes(left_scale.shape, right_scale.shape))
            found[2] = (both * right_scale).sum_to_size(left_scale.shape) if needs[2] else None
            found[3] = (both * left_scale).sum_to_size(right_scale.shape) if needs[3] else None
        if not ctx.passes:
            return *found, *[None] * 5
        if needs[0] or needs[4]:
            levels = codes_of(right, right_threshold, 0.0).mul_(right_scale)
            passed = grad.matmul(levels.transpose(-1, -2)).sum_to_size(left.shape)
            passed = passed if factor is None else passed.mul_(factor)
            of = (left, left_threshold, left_scale, *ctx.edges[0], ctx.width)
            found[0] = passed = through_activation(ctx.surrogate, passed, *of)
            found[4] = -passed.sum_to_size(left_threshold.shape) if needs[4] else None
        if needs[1] or needs[5]:
            levels = codes_of(left, left_threshold, ctx.offset, factor).mul_(left_scale)
            passed = levels.transpose(-1, -2).matmul(grad).sum_to_size(right.shape)
            of = (right, right_threshold, right_scale, *ctx.edges[1], ctx.width)
            found[1] = passed = through_activation(ctx.surrogate, passed, *of)
            found[5] = -passed.sum_to_size(right_threshold.shape) if needs[5] else None
        return *(value if needed else None for value, needed in zip(found, needs[:6], strict=True)), *[None] * 5


def binary_matmul(left: Operand, right: Operand, surrogate: Surrogate, factor: Tensor | None = None) -> Tensor:
    """Product of two activations whose entries are all frozen.

    Forward:  z = (factor * (offset + sign(l - b))) @ sign(r - c);  y = (a_l * a_r) * z
    Backward: with l' = factor * a_l * (offset + sign(l - b)) and r' = a_r * sign(r - c), and g = dL/dy:
              dL/dl = k * factor * (g @ r'^T), dL/dr = k * (l'^T @ g), k as in `mix_activation`
              (the surrogate is never multiplied by the operand's own scale); dL/db = - sum of dL/dl, and so for c
              dL/da_l = a_r * sum of g * z; dL/da_r = a_l * sum of g * z
              STE-free (k = 0) both products of the backward pass are skipped and undefined gradients returned
    Source:   the rule is Smith and Islam's (2026); scales, thresholds, and scaling after the product are this
              library's choice.

    Args:
        left, right: (..., n, f) and (..., f, m); leading dimensions broadcast. The right one has no offset.
        surrogate: what frozen entries pass back.
        factor: broadcastable to `left`: 0 where an entry is excluded, else a dropout's factor; None for 1.
    """
    tensors = (left.u, right.u, left.scale, right.scale, left.threshold, right.threshold, factor)
    return kernels.apply(_BinaryMatmul, *tensors, left.offset, (left.edges, right.edges), surrogate, left.width)
