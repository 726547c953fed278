"""Products of signs as a recorded graph computes them: in whole numbers where that is faster, else in float32.

All give the same sums, exactly. `exported_product` chooses, by what each was measured to cost in onnxruntime.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..method.conv_product import ConvProduct
from ..method.layer_product import Product
from .onnx_operators import conv_integer, matmul_integer, times_scale

ENOUGH_CHANNELS = 64
"""With fewer, copying what lies under a kernel takes longer than the product."""
MANY_CHANNELS = 512
"""From these on the image of a pointwise convolution is small, and it is better turned round than its weight."""


def choice_above(u: Tensor, threshold: Tensor | None, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """high where u >= b, so that sign(0) = +1, else low, also for NaN."""
    above = u >= (0.0 if threshold is None else threshold)
    return torch.where(above, torch.tensor(high, dtype=dtype), torch.tensor(low, dtype=dtype))


def signed_codes(u: Tensor, threshold: Tensor | None) -> Tensor:
    """sign(u - b), int8."""
    return choice_above(u, threshold, -1, 1, torch.int8)


def unsigned_codes(u: Tensor, threshold: Tensor | None) -> Tensor:
    """1 + sign(u - b), uint8; a sum of ones, which takes less time than a choice."""
    ones = (u >= (0.0 if threshold is None else threshold)).to(torch.uint8)
    return ones + ones


@dataclass(frozen=True)
class ExportedProduct:
    """z = product(sign(x - b), sign(w)) in float32, for a kernel of this size (none, for a linear layer).

    The sum is exact. Rounding undoes an inexact convolution (Winograd), and keeps a runtime's optimizer from folding
    the scale that follows into the weight, which would make the sum inexact.
    """

    kernel: tuple[int, ...]

    def weight(self, signs: Tensor) -> Tensor:
        """The second operand, int8 or uint8, from sign(w), int8 (out, in, taps)."""
        return signs.unflatten(2, self.kernel) if self.kernel else signs.squeeze(2)

    def sums(self, x: Tensor, threshold: Tensor | None, weight: Tensor, product: Any, pad: float) -> Tensor:
        """z, of any dtype. threshold: b, to broadcast over x; pad: the code around a padded x, -1, 0 or 1."""
        weight = weight.float().movedim(0, product.channel_dim)
        z: Tensor = product(choice_above(x, threshold, -1, 1, torch.float32), weight, pad)
        return z.round()

    def scaled(self, z: Tensor, scale: Tensor, product: Product) -> Tensor:
        """z * scale, float32; scale (out,)."""
        return z.float() * product.per_channel(scale, z)


class Linear(ExportedProduct):
    """Rows of features: uint8 codes of x times int8 signs of w."""

    def weight(self, signs: Tensor) -> Tensor:
        return signs.squeeze(2).t()

    def sums(self, x: Tensor, threshold: Tensor | None, weight: Tensor, product: Any, pad: float) -> Tensor:
        return matmul_integer(unsigned_codes(x, threshold), weight)


class _Convolution(ExportedProduct):
    def scaled(self, z: Tensor, scale: Tensor, product: Product) -> Tensor:
        return times_scale(z, scale)


class Pointwise(_Convolution):
    """A kernel of one place: uint8 codes of w times int8 signs of x, whose places lie side by side already."""

    def weight(self, signs: Tensor) -> Tensor:
        return (signs.squeeze(2) + 1).to(torch.uint8)

    def sums(self, x: Tensor, threshold: Tensor | None, weight: Tensor, product: Any, pad: float) -> Tensor:
        codes = _padded(x, product, pad, lambda u: signed_codes(u, threshold), 0)
        return matmul_integer(weight, codes.flatten(2)).unflatten(2, codes.shape[2:])


class Unfolded(_Convolution):
    """What lies under the kernel at each place as a row, channels last: uint8 codes of x times int8 signs of w."""

    def weight(self, signs: Tensor) -> Tensor:
        return signs.transpose(1, 2).flatten(1).t()

    def sums(self, x: Tensor, threshold: Tensor | None, weight: Tensor, product: Any, pad: float) -> Tensor:
        image = _padded(x, product, pad, lambda u: unsigned_codes(u, threshold), 1).movedim(1, -1)
        under = [image[window] for window in self._windows(product)]
        return matmul_integer(torch.cat(under, -1), weight).movedim(-1, 1)

    def _windows(self, product: Any) -> Iterator[tuple[slice, ...]]:
        """For each place of the kernel, what it meets of a padded image (batch, *size, channels)."""
        sides = [
            [slice(at * apart, -(count - 1 - at) * apart or None, by) for at in range(count)]
            for count, by, apart in zip(self.kernel, product.stride, product.dilation, strict=True)
        ]
        return itertools.product([slice(None)], *sides)


class Convolved(_Convolution):
    """The runtime's own integer convolution, of uint8 codes of both."""

    def weight(self, signs: Tensor) -> Tensor:
        return (signs + 1).to(torch.uint8).unflatten(2, self.kernel)

    def sums(self, x: Tensor, threshold: Tensor | None, weight: Tensor, product: Any, pad: float) -> Tensor:
        if any(map(any, product.padding)) and (product.mode != "zeros" or pad):
            # An infinity has the code that is asked for. A padding of codes would be lost: onnxscript's optimizer takes
            # one with 0 into the convolution, which pads with its zero point instead.
            x, product = product.padded(x, math.copysign(math.inf, pad)), product.bare()
        codes = unsigned_codes(x, threshold)
        return conv_integer(codes, weight, product.stride, product.padding, product.dilation, product.groups)


def _padded(x: Tensor, product: ConvProduct, pad: float, codes_of: Any, zero: int) -> Tensor:
    """Codes of x with those of its padding around them; zero: the code that stands for 0."""
    if not any(map(any, product.padding)):
        return codes_of(x)  # type: ignore[no-any-return]
    if product.mode == "zeros":
        return product.padded(codes_of(x), int(pad) + zero)
    return codes_of(product.padded(x, pad))  # type: ignore[no-any-return]


def exported_product(product: Product, shape: Sequence[int], in_integers: bool) -> ExportedProduct:
    """How the product of a weight of `shape` is written."""
    kernel = tuple(shape[2:])
    if not isinstance(product, ConvProduct):
        return Linear(()) if in_integers else ExportedProduct(())
    depthwise = product.groups > 1 and shape[1] == 1  # a few numbers a channel are no product of matrices
    if not in_integers or depthwise:
        return ExportedProduct(kernel)
    if product.groups > 1:
        return Convolved(kernel)
    if set(kernel) == set(product.stride) == {1} and shape[1] < MANY_CHANNELS:
        return Pointwise(kernel)
    return Unfolded(kernel) if shape[1] >= ENOUGH_CHANNELS else Convolved(kernel)
