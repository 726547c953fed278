"""Binary convolutions: nn.Conv1d, Conv2d and Conv3d with a binary weight and, in a BNN, a binary input."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..method.conv_product import ConvProduct
from .binary_layer import BinaryLayer
from .registry import register


class BinaryConv(BinaryLayer):
    """y = (s * a) * conv(sign(x - b), sign(w)) + bias once frozen; see `BinaryLayer` for the way there.

    Padding with zeros puts a third value between -1 and +1 (conv_padding="zero", as in full precision and in the
    paper's framework), or pads with the upper level as everywhere else (conv_padding="one", as larq does; unfrozen
    channels still pad with 0). With the levels {0, 2a} a zero is the lower level itself, and nothing is a third value.
    """

    dims: ClassVar[int]

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def pads(self, size: torch.Size) -> tuple[tuple[int, int], ...]:
        """Padding before and after each dimension of an input of spatial `size`."""
        flat = self._reversed_padding_repeated_twice
        return tuple((flat[2 * i], flat[2 * i + 1]) for i in reversed(range(len(flat) // 2)))

    @property
    def product(self) -> ConvProduct:  # type: ignore[override]
        """The product, where the size of the input does not matter."""
        return ConvProduct(self.stride, ((0, 0),) * self.dims, self.dilation, self.groups, self.padding_mode)

    def _product_of(self, x: Tensor) -> ConvProduct:
        return ConvProduct(self.stride, self.pads(x.shape[-self.dims :]), self.dilation, self.groups, self.padding_mode)

    @property
    def _pads_with_one(self) -> bool:
        return self.stompp_config.conv_padding == "one" and self.padding_mode == "zeros"

    def _pad_level(self) -> float:
        binary = self.activation_scale is not None
        return 1.0 + self.activation_offset if binary and self._pads_with_one else 0.0


@register
class BinaryConv1d(BinaryConv, nn.Conv1d):
    """Conv1d; x is (batch, in_channels, length)."""

    plain_class, dims = nn.Conv1d, 1


@register
class BinaryConv2d(BinaryConv, nn.Conv2d):
    """Conv2d; x is (batch, in_channels, height, width)."""

    plain_class, dims = nn.Conv2d, 2


@register
class BinaryConv3d(BinaryConv, nn.Conv3d):
    """Conv3d; x is (batch, in_channels, depth, height, width)."""

    plain_class, dims = nn.Conv3d, 3
