"""BinaryLinear: nn.Linear with a binary weight and, in a BNN, a binary input."""

from torch import nn

from ..method.layer_product import LinearProduct
from .binary_layer import BinaryLayer
from .registry import register


@register
class BinaryLinear(BinaryLayer, nn.Linear):
    """y = (s * a) * (sign(x - b) @ sign(w).T) + bias once frozen; see `BinaryLayer` for the way there."""

    plain_class = nn.Linear
    product = LinearProduct()
