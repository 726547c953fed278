"""The product of a fully frozen layer that has a scale for each group of its weights.

Such scales differ along a sum, so they stand inside it, and no kernel of whole numbers gives it. Sums with a binary
input are taken in float64: s has 24 bits of its own, so a sum of thousands of +s and -s is exact as long as the scales
of a row lie within a factor of some 2**15 of each other, in any order, and training, packed storage and other runtimes
agree. Each sum is then rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from .flag_bits import unpack_levels
from .frozen_product import kept_of_input, signs_above, through_kept
from .layer_product import Product
from .mixing import Edge, hard, through_weight
from .sign_bits import SignBits
from .surrogates import Surrogate
from .weight_scales import group_sums, over_weight, scaled


def _signs_of(weight: Tensor | SignBits, dtype: torch.dtype) -> Tensor:
    return weight.signs(dtype) if isinstance(weight, SignBits) else hard(weight)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | SignBits,
        weight_scale: Tensor,
        activation_scale: Tensor | None,
        threshold: Tensor | None,
        bias: Tensor | None,
        clips: tuple[Edge, Edge, Edge],
        product: Product,
        offset: float,
        pad: float,
        surrogate: Surrogate,
        width: float,
        narrow: torch.dtype | None,
        group_size: int,
    ) -> Tensor:
        needs, real = ctx.needs_input_grad, activation_scale is None
        wants_k = needs[0] or needs[4]
        makes_grad_weight = (needs[1] and surrogate.passes) or needs[2] or needs[3]
        makes_grad_x = wants_k and (real or surrogate.passes)
        ctx.signs_of = (group_size, weight.shape, product.channel_dim)
        binary_weight = scaled(_signs_of(weight, x.dtype), weight_scale, group_size, product.channel_dim)

        above = factor = above_layout = factor_layout = None
        if activation_scale is None:
            y = product(x, binary_weight, pad)
        else:
            operand = signs_above(x, threshold, product)
            at = None if threshold is None else product.per_feature(threshold, x)
            edges = (*clips[:2], width)
            wanted = (makes_grad_weight, wants_k)
            kept = kept_of_input(x, operand, at, activation_scale, edges, *wanted, surrogate)
            (above, above_layout), (factor, factor_layout) = kept
            operand = operand.add_(offset) if offset else operand
            y = product(operand.double(), binary_weight.double(), pad).to(x.dtype).mul_(activation_scale)
        y = y if bias is None else y.add_(product.per_channel(bias, y))

        latents = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(
            x if makes_grad_weight and real else None,
            above,
            latents if makes_grad_weight or makes_grad_x else None,
            weight_scale,
            activation_scale,
            factor,
        )
        ctx.bits, ctx.sizes, ctx.clips = weight if latents is None else None, x.shape, clips
        ctx.layouts, ctx.offset = (above_layout, factor_layout), offset
        ctx.makes_grad_weight, ctx.makes_grad_x = makes_grad_weight, makes_grad_x
        ctx.product, ctx.pad, ctx.surrogate, ctx.narrow = product, pad, surrogate, narrow
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, above, latents, s, a, factor = ctx.saved_tensors
        wants_x, wants_weight, wants_s, wants_a, wants_threshold, wants_bias = ctx.needs_input_grad[:6]
        product, surrogate, shape = ctx.product, ctx.surrogate, ctx.signs_of[1]
        wide, narrow = grad.dtype, ctx.narrow or grad.dtype
        wants_weight = wants_weight and surrogate.passes
        grad_x = grad_weight = grad_s = grad_a = grad_threshold = None

        weight = ctx.bits if latents is None else latents
        signs: Any = None if weight is None else _signs_of(weight, wide)
        if ctx.makes_grad_weight:
            operand = x.to(narrow) if a is None else unpack_levels(above, ctx.layouts[0], narrow, ctx.offset)
            grad_weight = product.grad_weight(grad.to(narrow), operand, shape, ctx.pad).to(wide)  # dL/dw' / a
            sums = group_sums(grad_weight * signs, ctx.signs_of[0], product.channel_dim)
            grad_s = sums if a is None else sums * a
            grad_a = None if a is None else (sums * s).sum().reshape(a.shape)
            if wants_weight:
                passed = grad_weight if a is None else grad_weight.mul_(a)
                grad_weight = through_weight(surrogate, passed, latents, over_weight(s, *ctx.signs_of), ctx.clips[2])
        if ctx.makes_grad_x:
            binary_weight = scaled(signs, s, ctx.signs_of[0], product.channel_dim).to(narrow)
            grad_x = product.grad_input(grad.to(narrow), binary_weight, ctx.sizes).to(wide)
            if factor is not None:
                grad_x = through_kept(surrogate, grad_x, factor, ctx.layouts[1])
            grad_threshold = -product.feature_sums(grad_x) if wants_threshold else None
        return (
            grad_x if wants_x else None,
            grad_weight if wants_weight else None,
            grad_s if wants_s else None,
            grad_a if wants_a else None,
            grad_threshold,
            product.channel_sums(grad) if wants_bias else None,
            *[None] * 8,
        )


def grouped_product(
    x: Tensor, weight: Tensor | SignBits, weight_scale: Tensor, activation_scale: Tensor | None,
    threshold: Tensor | None, bias: Tensor | None, clips: tuple[Edge, Edge, Edge], product: Product, offset: float,
    pad: float, surrogate: Surrogate, width: float = 1.0, narrow: torch.dtype | None = None, group_size: int = 128,
) -> Tensor:  # fmt: skip
    """Output of a layer whose entries are all frozen, and which has a scale for each group of its weights.

    Forward:  y = a * product(sign(x - b) + offset, w') + bias, with w' = s * sign(w) and s as in `over_weight`
              with real inputs (BWN): y = product(x, w') + bias
    Backward: as `frozen_product` has it: dL/dx = k * g' and dL/dw = k * g', with g' the gradients of the operands;
              dL/ds = sum of dL/dw' * sign(w) over a group, dL/da = sum of s * dL/ds / a, dL/db = - sum of k * g'.
              With scales that learn, dL/dw' is computed STE-free too: no sum over a row holds them.
    Source:   scales by groups of 128 are those of llama.cpp's Q1_0; how they learn is this library's choice.

    Args:
        x, weight, activation_scale, threshold, bias, clips, product, offset, pad, surrogate, width, narrow: as for
            `frozen_product`.
        weight_scale: s, (out, groups).
        group_size: weights of one output channel that share a scale.
    """
    tensors = (x, weight, weight_scale, activation_scale, threshold, bias)
    numbers = (clips, product, offset, pad, surrogate, width, narrow, group_size)
    return kernels.apply(_GroupedProduct, *tensors, *numbers)  # type: ignore[no-any-return]
