"""BinaryConv2dSame: timm's Conv2dSame, whose padding depends on the size of its input (TensorFlow's "same")."""

from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding

from .conv import BinaryConv
from .packed import PackedLayer, register_packed
from .registry import register


@register
class BinaryConv2dSame(BinaryConv, Conv2dSame):
    """Conv2d with TensorFlow's padding; x is (batch, in_channels, height, width)."""

    plain_class, dims = Conv2dSame, 2

    def pads(self, size: torch.Size) -> tuple[tuple[int, int], ...]:
        layer: Any = self
        sizes = zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True)
        totals = [get_same_padding(length, kernel, stride, dilation) for length, kernel, stride, dilation in sizes]
        return tuple((total // 2, total - total // 2) for total in totals)


@register_packed
class PackedConv2dSame(PackedLayer, BinaryConv2dSame):
    """A packed Conv2dSame."""

    binary_class = BinaryConv2dSame
