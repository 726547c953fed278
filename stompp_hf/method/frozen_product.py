"""The product of a fully frozen layer: exact plus-minus-one operands first, one affine map after it.

The product of signs is a sum of integers, exact in float32 in any order, so training, packed storage and kernels
agree bit for bit; scaling the operands instead would round, and one rounding flips a sign further down.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..kernels import training
from .flag_bits import Kept, Layout, pack_flags, unpack_flags, unpack_levels
from .layer_product import Product, affine
from .mixing import Edge, hard, hard_above, inside, through_weight
from .packed_product import packed_product
from .sign_bits import SignBits
from .surrogates import Rule, Surrogate


class _FrozenProduct(torch.autograd.Function):
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
    ) -> Tensor:
        binary_input, shape = activation_scale is not None, weight.shape
        others = [dim for dim in range(len(shape)) if dim != product.channel_dim]
        latents = weight if isinstance(weight, Tensor) else None
        # What the backward pass needs, and no more: an STE-free layer with fixed scales saves nothing at all.
        needs = ctx.needs_input_grad
        passes = surrogate.passes
        makes_grad_weight = passes and needs[1]  # the scales' gradients come from it then, else from z
        keeps_z = (needs[2] or needs[3]) and not makes_grad_weight
        keeps_x = makes_grad_weight and not binary_input
        wants_k = binary_input and (needs[0] or needs[4])

        operand = y = kept_z = row_sums = None
        way, signs = kernels.Route.TORCH, weight
        if binary_input:
            way, signs = _for_kernel(x, threshold, weight, product)
        if isinstance(signs, Tensor):
            operand, signs = signs_above(x, threshold, product) if binary_input else x, hard(signs)
        if offset:
            row_sums = signs.row_sums(x.dtype) if isinstance(signs, SignBits) else signs.sum(others)
        scale, shift = affine(weight_scale, activation_scale, bias, row_sums, offset)
        if isinstance(signs, SignBits) and not keeps_z:
            y = product.by_kernel(x.detach(), threshold, signs, (scale, shift), x.dtype, pad - offset, way)
        if y is None:
            if isinstance(signs, SignBits):
                z = packed_product(x, threshold, binary_input, signs, product, pad - offset)
            else:
                z = product(operand, signs, pad - offset)  # type: ignore[arg-type]
            if binary_input and len(shape) > 2 and z.device.type != "cpu":
                z = z.round_()  # cuDNN may pick an algorithm (Winograd, FFT) that is off an integer by its last bits
            if keeps_z:
                short = binary_input and shape.numel() < 2**15 * shape[product.channel_dim]
                kept_z = z.to(torch.int16) if short else z  # a sum of fewer than 2**15 signs
            y = z * product.per_channel(scale, z) if kept_z is z else z.mul_(product.per_channel(scale, z))
            y = y if shift is None else y.add_(product.per_channel(shift, z))

        above = factor = above_layout = factor_layout = None
        if activation_scale is not None:
            at = None if threshold is None else product.per_feature(threshold, x)
            edges = (*clips[:2], width)
            wanted = (makes_grad_weight, wants_k)
            kept = kept_of_input(x, operand, at, activation_scale, edges, *wanted, surrogate)
            (above, above_layout), (factor, factor_layout) = kept
        ctx.save_for_backward(
            x if keeps_x else None,
            above,
            latents if (passes or not binary_input) and (needs[0] or needs[1] or needs[4]) else None,
            weight_scale,
            activation_scale,
            kept_z,
            row_sums,
            factor,
        )
        ctx.clips, ctx.layouts = clips, (above_layout, factor_layout)
        ctx.product, ctx.offset, ctx.pad, ctx.surrogate = product, offset, pad, surrogate
        ctx.binary_input, ctx.shapes, ctx.others = binary_input, (x.shape, shape), others
        ctx.bits, ctx.narrow = None if latents is not None else weight, narrow
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, above, weight, s, a, z, row_sums, factor = ctx.saved_tensors
        wants_x, wants_weight, wants_s, wants_a, wants_threshold, wants_bias = ctx.needs_input_grad[:6]
        product, offset, passes = ctx.product, ctx.offset, ctx.surrogate.passes
        shaped = [-1 if dim == product.channel_dim else 1 for dim in range(len(ctx.shapes[1]))]
        wide, narrow = grad.dtype, ctx.narrow or grad.dtype
        grad_x = grad_weight = grad_s = grad_a = grad_threshold = None
        per_channel: Any = None  # dL/d(s a)

        needs_signs = (wants_x or wants_threshold) and (passes or not ctx.binary_input)
        weight_signs = hard(weight) if weight is not None else None
        if ctx.bits is not None and needs_signs:
            weight_signs = ctx.bits.signs(grad.dtype)
        if weight_signs is not None and wants_weight and passes:
            operand = unpack_levels(above, ctx.layouts[0], narrow, offset) if ctx.binary_input else x.to(narrow)
            grad_weight = product.grad_weight(grad.to(narrow), operand, ctx.shapes[1], ctx.pad).to(wide)
            if wants_s or wants_a:
                per_channel = (grad_weight * weight_signs).sum(ctx.others)
            if ctx.binary_input:
                grad_weight = grad_weight.mul_(a)
            grad_weight = through_weight(ctx.surrogate, grad_weight, weight, s.reshape(shaped), ctx.clips[2])
        elif wants_s or wants_a:
            z = z.to(grad.dtype)
            z = z if row_sums is None else z + product.per_channel(row_sums * offset, z)
            per_channel = product.channel_sums(grad * z)
        if wants_s:
            grad_s = (per_channel if a is None else per_channel * a).sum_to_size(s.shape)
        if wants_a:
            grad_a = (per_channel * s).sum().reshape(a.shape)
        if weight_signs is not None and needs_signs:
            binary_weight = weight_signs.mul_(s.reshape(shaped)).to(narrow)
            grad_x = product.grad_input(grad.to(narrow), binary_weight, ctx.shapes[0]).to(wide)
            if factor is not None:
                grad_x = through_kept(ctx.surrogate, grad_x, factor, ctx.layouts[1])
            if wants_threshold:
                grad_threshold = -product.feature_sums(grad_x)
        grad_bias = product.channel_sums(grad) if wants_bias else None
        return (grad_x if wants_x else None), grad_weight, grad_s, grad_a, grad_threshold, grad_bias, *[None] * 7


FEW_CHANNELS, FEW_PLACES = 8, 64
"""Convolutions of fewer channels a group, or over fewer places, are faster in plain torch."""


def _for_kernel(
    x: Tensor, threshold: Tensor | None, weight: Any, product: Product
) -> tuple[kernels.Route, Tensor | SignBits]:
    """The way of the product, and the weight for it: signs as bits, or a latent weight where plain torch multiplies.

    The bits of latents are made anew in each call: that is less than plain torch takes for signs as numbers, and
    nothing can be stale.
    """
    if isinstance(weight, SignBits):
        return product.route(x, weight, threshold), weight
    shape, channel = weight.shape, product.channel_dim
    if not kernels.choosing.trains_with(x, weight, threshold) or not weight.is_contiguous():
        return kernels.Route.TORCH, weight
    if len(shape) > 2 and (shape[1] < FEW_CHANNELS or x.numel() < FEW_PLACES * shape[1] * product.groups):
        return kernels.Route.TORCH, weight

    def pack() -> Tensor:
        return kernels.pack(weight.detach() if channel else weight.detach().flatten(1), transposed=channel == 1)

    # For convolutions the kernel makes more of them, which is not needed while they stay as they are.
    bits = SignBits(kernels.unchanged(weight, "sign bits", pack) if len(shape) > 2 else pack(), shape, channel)
    return product.route(x, bits, threshold), bits


def kept_of_input(
    x: Tensor, operand: Tensor | None, threshold: Tensor | None, scale: Tensor, edges: tuple[Edge, Edge, float],
    keeps_signs: bool, keeps_k: bool, surrogate: Surrogate,
) -> tuple[Kept, Kept]:  # fmt: skip
    """For the backward pass, a bit an entry: sign(x - b), and k, which has more bits only where it is a number.

    Args:
        x: the input.
        operand: sign(x - b), where it was made already.
        threshold: b, in a shape that broadcasts over x, or None for 0.
        scale: a.
        edges: low and high of the clip, and `surrogate_width`.
        keeps_signs, keeps_k: which of the two are wanted.
        surrogate: says what k is.
    """
    near = edges[2] if keeps_k and surrogate.activation is Rule.NEAR else None
    above, k = training.signs(x, threshold, scale, keeps_signs, near) or (None, None)
    if keeps_signs and above is None:
        above = (hard_above(x, threshold) if operand is None else operand) > 0
    if keeps_k and k is None:
        k = surrogate.of_activation(x, threshold, scale, *edges)
    return pack_flags(above), pack_flags(k)


def through_kept(surrogate: Surrogate, grad: Tensor, kept: Tensor, layout: Layout | None) -> Tensor:
    """k * g of frozen activations, from the k that was kept; g is overwritten."""
    if surrogate.activation is Rule.INSIDE:
        return inside(grad, unpack_levels(kept, layout, grad.dtype), -1.0, 2.0)  # as the clip's own gradient has it
    k = unpack_flags(kept, layout)
    return grad if training.through_window(grad, k) else grad.mul_(k)


def signs_above(x: Tensor, threshold: Tensor | None, product: Product) -> Tensor:
    return hard_above(x, None if threshold is None else product.per_feature(threshold, x))


def frozen_product(
    x: Tensor, weight: Tensor | SignBits, weight_scale: Tensor, activation_scale: Tensor | None,
    threshold: Tensor | None, bias: Tensor | None, clips: tuple[Edge, Edge, Edge], product: Product, offset: float,
    pad: float, surrogate: Surrogate, width: float = 1.0, narrow: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Output of a layer whose entries are all frozen.

    Forward:  z = product(sign(x - b), sign(w));  y = (s * a) * z + (bias + (s * a) * offset * rowsum(sign(w)))
              around a padded x stands the code pad - offset, so z keeps whole numbers and the row sums hold everywhere
              with real inputs (BWN): z = product(x, sign(w));  y = s * z + bias
    Backward: with u' and w' the binary operands and g' their gradients: dL/dx = k * g', dL/dw = k * g' (the surrogate
              is never multiplied by the scale); dL/ds, dL/da and dL/db as in METHOD's closed form, s and a from w'
              and its gradient where that is made, else from z: without a product of their own. STE-free (k = 0) both
              products of the backward pass are skipped and undefined gradients returned: never detach the layer
              instead, DDP would wait for it.
    Source:   the rule is Smith and Islam's (2026); scales, thresholds, and scaling after the product are this
              library's choice.

    Args:
        x: input, (..., in_features) or (batch, in_channels, *size), float32 or float64.
        weight: latent weight, same dtype, or the signs of a packed one, which gets no gradient.
        weight_scale: s, (out,) or (1,).
        activation_scale: a, (1,); None leaves the input real.
        threshold: b, one a feature (in,), or None for 0.
        bias: (out,), or None.
        clips: low and high of the activation, c of the weight; for a surrogate that reads them.
        product: the layer's product.
        offset: 0.0 for the levels {-a, a}, 1.0 for {0, 2a}.
        pad: what stands around a convolution's padded input, in units of a: 0.0, or the upper level, 1.0 + offset.
        surrogate: what frozen entries pass back.
        width: `surrogate_width`, in units of the activation scale.
        narrow: what the operands of the backward pass's two products are rounded to, as autocast rounds those of a
            plain layer (their sums are not); None for no rounding. The forward pass is exact always.
    """
    numbers = (clips, product, offset, pad, surrogate, width, narrow)
    tensors = (x, weight, weight_scale, activation_scale, threshold, bias)
    return kernels.apply(_FrozenProduct, *tensors, *numbers)  # type: ignore[no-any-return]
