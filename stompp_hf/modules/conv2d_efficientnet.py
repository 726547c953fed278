"""BinaryEfficientNetDepthwiseConv2d: transformers' own class of an ordinary depthwise convolution."""

from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d

from .conv import BinaryConv
from .packed import PackedLayer, register_packed
from .registry import register


@register
class BinaryEfficientNetDepthwiseConv2d(BinaryConv, EfficientNetDepthwiseConv2d):
    """Conv2d with groups = in_channels; x is (batch, in_channels, height, width)."""

    plain_class, dims = EfficientNetDepthwiseConv2d, 2


@register_packed
class PackedEfficientNetDepthwiseConv2d(PackedLayer, BinaryEfficientNetDepthwiseConv2d):
    """A packed depthwise convolution of EfficientNet."""

    binary_class = BinaryEfficientNetDepthwiseConv2d
