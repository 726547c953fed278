"""The product of a packed layer, and its whole computation as an operator, which torch.compile and torch.export see.

Plain torch is the oracle: it is exact, and makes few float copies of a weight at a time. Eager calls go straight to the
kernel: an operator's own way there costs more than a small layer (`kernels.route` says which it is to be). Where there
is no kernel for a device, the operators compute in plain torch, so that an exported program runs anywhere; and other
backends see those operations instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Route
from .conv_product import ConvProduct
from .int8_product import int8_product
from .layer_product import Affine, LinearProduct, Product
from .mixing import hard_above
from .sign_bits import SignBits

TILE = 2**20
"""Weights that are unpacked at a time (4 MiB of float32)."""


def packed_product(
    x: Tensor, threshold: Tensor | None, binary_input: bool, bits: SignBits, product: Product, pad: float
) -> Tensor:
    """z of a frozen layer whose weight is packed.

    Forward:  z = product(sign(x - b), sign(w)), or product(x, sign(w)) where the input is real
    Shape and dtype: those of the product, in the dtype of x.
    Source:   this library's choice. A binary input makes z a sum of whole numbers, the same in tiles and in int8. Sums
              of real numbers round differently in another shape, so a layer with a real input is unpacked at once, as
              is a grouped convolution, whose weight is small; in either case only for the time of this call.

    Args:
        x: input, float32 or float64.
        threshold: b, one a feature, or None for 0.
        binary_input: whether sign(x - b) enters the product, or x itself.
        bits: sign(w).
        product: the layer's product.
        pad: what stands around a padded x.
    """
    operand = x.detach()
    if binary_input:
        z = product.by_kernel(operand, threshold, bits, (None, None), x.dtype, pad)
        if z is not None:
            return z
        operand = hard_above(x, None if threshold is None else product.per_feature(threshold, x))
        if isinstance(product, LinearProduct) and operand.numel() and operand.shape[-1] == product.features(bits):
            z = int8_product(operand, bits)
            if z is not None:
                return z
    channels = bits.shape[bits.channel_dim]
    step = max(1, TILE // max(1, bits.fan_in))
    if not binary_input or product.groups > 1 or step >= channels:
        return product(operand, bits.signs(x.dtype), pad)
    tiles = [product(operand, bits.signs(x.dtype, i, i + step), pad) for i in range(0, channels, step)]
    behind = product.per_channel(tiles[0].new_empty(1), tiles[0]).dim() - 1  # dimensions of z after its channels
    return torch.cat(tiles, -1 - behind)


def packed_forward(
    x: Tensor, threshold: Tensor | None, bits: SignBits, affine: Affine, dtype: torch.dtype, product: Product,
    pad: float,
) -> Tensor | None:  # fmt: skip
    """y = scale * product(sign(x - b), sign(w)) + shift in the dtype given, or None where only plain torch can.

    Bit for bit what plain torch gives, for every input. There is no gradient.

    Args:
        x: float32, bfloat16 or float16, as the product takes it.
        threshold: b, one a feature, float32, or None for 0.
        bits: sign(w).
        affine: scale and shift, float32.
        dtype: of y: float32, bfloat16 or float16.
        product: the layer's product.
        pad: what stands around a padded x: -1, 0 or 1.
    """
    way = product.route(x, bits, threshold, *affine)
    if dtype not in kernels.DTYPES:
        return None
    if way is not Route.OPERATOR:
        return product.by_kernel(x, threshold, bits, affine, dtype, pad, way)
    if not isinstance(product, ConvProduct):
        return _operator("linear")(x, threshold, bits.bits, *affine, dtype)
    if product.mode != "zeros":
        x, product = product.padded(x, pad), product.bare()
    if x.dim() != len(product.stride) + 2:
        return None
    around = [size for pair in product.padding for size in pair]
    sizes = (list(bits.shape[2:]), list(product.stride), around, list(product.dilation), product.groups, int(pad))
    return _operator("conv")(x, threshold, bits.bits, *affine, dtype, *sizes)


def packed_reference(
    x: Tensor, threshold: Tensor | None, binary_input: bool, bits: SignBits, affine: Affine, dtype: torch.dtype,
    product: Product, pad: float,
) -> Tensor:  # fmt: skip
    """The same in plain torch, on any device; also for a real input (not binary_input), which has no threshold."""
    wide = any(values is not None and values.dtype == torch.float64 for values in affine)
    y = packed_product(x.double() if wide else x.float(), threshold, binary_input, bits, product, pad)
    if binary_input and isinstance(product, ConvProduct) and y.device.type != "cpu":
        y = y.round_()  # as in `frozen_product`
    for values, apply in zip(affine, (y.mul_, y.add_), strict=True):
        if values is not None:
            apply(product.per_channel(values, y))
    return y.to(dtype)


def packed_real_forward(
    x: Tensor, bits: SignBits, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, product: Product
) -> Tensor:
    """y = scale * product(x, sign(w)) + shift of a real input, whose sums may be in another order than torch's."""
    if isinstance(product, ConvProduct):
        return packed_reference(x, None, False, bits, (scale, shift), dtype, product, 0.0)
    if LinearProduct().route(x, bits, scale, shift) is Route.OPERATOR:
        return _operator("real_linear")(x, bits.bits, scale, shift).to(dtype)
    return _real(x, bits.bits, scale, shift).to(dtype)


def _real(x: Tensor, bits: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    signs, y = SignBits(bits, torch.Size((bits.shape[0], x.shape[-1]))), None
    if LinearProduct().route(x, signs, scale, shift) is Route.NATIVE:
        y = kernels.real_linear(x.float(), bits, scale, shift)
    if y is None:
        y = packed_reference(x, None, False, signs, (scale, shift), torch.float32, LinearProduct(), 0.0)
    return y


def _compute(
    x: Tensor, threshold: Tensor | None, bits: SignBits, affine: Affine, dtype: torch.dtype, product: Product,
    pad: float,
) -> Tensor:  # fmt: skip
    with torch.no_grad():  # a graph is run whatever its parameters want
        y = product.by_kernel(x, threshold, bits, affine, dtype, pad)
        return packed_reference(x, threshold, True, bits, affine, dtype, product, pad) if y is None else y


_LIBRARY = torch.library.Library("stompp_hf", "FRAGMENT")


def _exported(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: make what an operator computes another operator, for torch.export.

    torch.compile leaves packed_* whole in every graph. A program of torch.export leaves exported_* whole, and calls the
    kernel; backends that run torch's default decompositions (torch.onnx, ExecuTorch, OpenVINO, AOTInductor) take it
    apart into what plain torch does.
    """

    def decorate(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _LIBRARY.define(f"exported_{name}{torch.library.infer_schema(compute, mutates_args=())}")
        _LIBRARY.impl(f"exported_{name}", compute, "CompositeImplicitAutograd")
        return compute

    return decorate


def _operator(name: str) -> Any:
    return getattr(torch.ops.stompp_hf, f"{'exported' if kernels.is_exported() else 'packed'}_{name}")


@torch.library.custom_op("stompp_hf::packed_linear", mutates_args=())
@_exported("linear")
def packed_linear(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The operator of linear layers: x (..., K), bits uint8 (N, ceil(K / 8)), y (..., N)."""
    signs = SignBits(bits, torch.Size((bits.shape[0], x.shape[-1])))
    return _compute(x, threshold, signs, (scale, shift), dtype, LinearProduct(), 0.0)


@packed_linear.register_fake
def _(x: Tensor, threshold: Any, bits: Tensor, scale: Any, shift: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], bits.shape[0]), dtype=dtype)


@torch.library.custom_op("stompp_hf::packed_conv", mutates_args=())
@_exported("conv")
def packed_conv(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    pad: int,
) -> Tensor:  # fmt: skip
    """The operator of convolutions: x (batch, channels, *size); padding before and after, dimension by dimension."""
    signs = SignBits(bits, torch.Size((bits.shape[0], x.shape[1] // groups, *kernel)))
    product = ConvProduct(tuple(stride), _pairs(padding), tuple(dilation), groups)
    return _compute(x, threshold, signs, (scale, shift), dtype, product, float(pad))


@packed_conv.register_fake
def _(
    x: Tensor, threshold: Any, bits: Tensor, scale: Any, shift: Any, dtype: torch.dtype, kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, pad: int,
) -> Tensor:  # fmt: skip
    size = kernels.output_size(x.shape[2:], kernel, stride, _pairs(padding), dilation)
    y = x.new_empty((x.shape[0], bits.shape[0], *size), dtype=dtype)
    return y.contiguous(memory_format=kernels.memory_format(x, (*kernel, *stride, *dilation)))


@torch.library.custom_op("stompp_hf::packed_real_linear", mutates_args=())
@_exported("real_linear")
def packed_real_linear(x: Tensor, bits: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """The operator of linear layers with a real input: x (..., K), y (..., N) float32."""
    with torch.no_grad():
        return _real(x, bits, scale, shift)


@packed_real_linear.register_fake
def _(x: Tensor, bits: Tensor, scale: Tensor, shift: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], bits.shape[0]), dtype=torch.float32)


def _pairs(flat: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))
