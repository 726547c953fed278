"""BinaryLinear and BinaryConv1D: linear layers with a binary weight and, in a BNN, a binary input.

nn.Linear stores its weight output by input; transformers' Conv1D (GPT-2 and its kin), a linear layer too, input by
output.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..method.layer_product import LinearProduct, TransposedLinearProduct
from .binary_layer import BinaryLayer
from .registry import register


@register
class BinaryLinear(BinaryLayer, nn.Linear):
    """y = (s * a) * (sign(x - b) @ sign(w).T) + bias once frozen; see `BinaryLayer` for the way there."""

    plain_class = nn.Linear
    product = LinearProduct()


@register
class BinaryConv1D(BinaryLayer, Conv1D):
    """y = (s * a) * (sign(x - b) @ sign(w)) + bias once frozen; see `BinaryLayer` for the way there."""

    plain_class = Conv1D
    product = TransposedLinearProduct()

    def forward(self, x: Tensor) -> Tensor:  # named as in Conv1D
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {self.stompp_config.binarize}, {self.stage_state}"
