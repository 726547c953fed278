"""BinaryConv1D: transformers' Conv1D (GPT-2 and its kin), a linear layer whose weight is stored in x out."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..method.layer_product import TransposedLinearProduct
from .binary_layer import BinaryLayer
from .registry import register


@register
class BinaryConv1D(BinaryLayer, Conv1D):
    """y = (s * a) * (sign(x - b) @ sign(w)) + bias once frozen; see `BinaryLayer` for the way there."""

    plain_class = Conv1D
    product = TransposedLinearProduct()

    def forward(self, x: Tensor) -> Tensor:  # named as in Conv1D
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {self.stompp_config.binarize}, {self.stage_state}"
