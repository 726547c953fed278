"""The product of a convolution, in one to three dimensions."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..kernels import Route
from .layer_product import Affine
from .sign_bits import SignBits

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass
class ConvProduct:
    """z = conv(pad(x), w), with x of shape (batch, in_channels, *size) or (in_channels, *size).

    Padding that copies x (reflect, replicate, circular) commutes with sign(): the code stays binary. Padding with a
    constant is up to the caller's `pad`. Even padding with zeros is left to the convolution itself.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, one pair a dimension
    dilation: tuple[int, ...]
    groups: int
    mode: str = "zeros"

    channel_dim: int = field(default=0, init=False)
    feature_dim: int = field(default=1, init=False)

    def features(self, weight: Tensor | SignBits) -> int:
        return weight.shape[1] * self.groups

    def __call__(self, x: Tensor, weight: Tensor, pad: float = 0.0) -> Tensor:
        convolution = _CONVOLUTIONS[len(self.stride)]
        native = self._native_padding(pad)
        x = x if native is not None else self.padded(x, pad)
        return convolution(x, weight, None, self.stride, native or 0, self.dilation, self.groups)

    def route(self, x: Tensor, bits: SignBits, *others: Tensor | None) -> Route:
        return kernels.route(x, bits.bits, *others, fan_in=bits.fan_in)

    def by_kernel(
        self, x: Tensor, threshold: Tensor | None, bits: SignBits, affine: Affine, dtype: torch.dtype, pad: float,
        way: Route | None = None,
    ) -> Tensor | None:  # fmt: skip
        way = self.route(x, bits, threshold, *affine) if way is None else way
        if way is not Route.NATIVE:
            return None
        if self.mode != "zeros" and any(map(any, self.padding)):
            return self.bare().by_kernel(self.padded(x, pad), threshold, bits, affine, dtype, 0.0, way)
        dims = len(self.stride)
        if x.dim() == dims + 1:
            y = self.by_kernel(x.unsqueeze(0), threshold, bits, affine, dtype, pad, way)
            return None if y is None else y.squeeze(0)
        if x.dim() != dims + 2 or x.shape[1] != self.features(bits):
            return None
        if min(kernels.output_size(x.shape[2:], bits.shape[2:], self.stride, self.padding, self.dilation)) < 1:
            return None  # the convolution itself says what is wrong
        scale, shift = affine
        return kernels.conv(
            x, threshold, bits.bits, scale, shift, dtype, bits.shape[2:], self.stride, self.padding, self.dilation,
            self.groups, int(pad),
        )  # fmt: skip

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        x = weight.new_empty(1).expand(shape)  # only its shape is looked at
        native = self._native_padding(0.0)
        if native is not None:
            return self.gradients(grad, x, weight, (True, False), native)[0]  # type: ignore[return-value]
        with torch.enable_grad():
            inner = weight.new_zeros(shape).requires_grad_()
            outer = self.padded(inner, 0.0)
        outer_grad = self.bare().gradients(grad, outer.detach(), weight, (True, False))[0]
        return torch.autograd.grad(outer, inner, outer_grad)[0]

    def grad_weight(self, grad: Tensor, x: Tensor, shape: torch.Size, pad: float = 0.0) -> Tensor:
        native = self._native_padding(pad)
        x = x if native is not None else self.padded(x, pad)
        weight, native = grad.new_empty(1).expand(shape), native or (0,) * len(self.stride)
        return self.gradients(grad, x, weight, (False, True), native)[1]  # type: ignore[return-value]

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool], padding: tuple[int, ...] | None = None
    ) -> list[Tensor | None]:
        padding = self._native_padding(0.0) if padding is None else padding
        single, none = grad.dim() == len(self.stride) + 1, [0] * len(self.stride)
        if single:
            grad, x = grad.unsqueeze(0), x.unsqueeze(0)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, padding, self.dilation, False, none, self.groups, [*wanted, False]
        )
        return [grad_x.squeeze(0) if single and wanted[0] else grad_x, grad_weight]

    def _native_padding(self, pad: float) -> tuple[int, ...] | None:
        """The padding as the convolution itself takes it; None where it cannot."""
        even = all(before == after for before, after in self.padding)
        constant = self.mode == "zeros" and pad == 0.0
        if even and (constant or not any(before for before, _ in self.padding)):
            return tuple(before for before, _ in self.padding)
        return None

    def padded(self, x: Tensor, pad: float) -> Tensor:
        """x with its padding around it; `pad` is the constant, where it is one."""
        around = [size for pair in reversed(self.padding) for size in pair]
        return F.pad(x, around, value=pad) if self.mode == "zeros" else F.pad(x, around, mode=self.mode)

    def ready(self, x: Tensor, level: Tensor | None = None) -> tuple["ConvProduct", Tensor]:
        if level is None:
            return (self, x) if self._native_padding(0.0) is not None else (self.bare(), self.padded(x, 0.0))
        ring = 1.0 - self.padded(torch.ones_like(x.detach()[:1]), 0.0)  # 1 where the padding is
        return self.bare(), self.padded(x, 0.0) + ring * level

    def bare(self) -> "ConvProduct":
        """The same product of an x that is padded already."""
        return replace(self, padding=((0, 0),) * len(self.stride))

    def per_channel(self, values: Tensor, z: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * len(self.stride))

    per_feature = per_channel  # both stand before the sizes

    def rows(self, x: Tensor) -> Tensor:
        channels = x.dim() - len(self.stride) - 1
        return x.movedim(channels, -1).reshape(-1, x.shape[channels])

    def places(self, x: Tensor) -> torch.Size:
        channels = x.dim() - len(self.stride) - 1
        return x.shape[:channels] + x.shape[channels + 1 :]

    def channel_sums(self, z: Tensor) -> Tensor:
        channels = z.dim() - len(self.stride) - 1
        return z.sum([dim for dim in range(z.dim()) if dim != channels])

    feature_sums = channel_sums
