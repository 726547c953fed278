"""Binary layers, by the plain class that they replace."""

from .attention import BinaryAttention
from .binary_layer import BinaryLayer
from .conv import BinaryConv1d, BinaryConv2d, BinaryConv3d
from .conv1d_transformers import BinaryConv1D
from .embedding import BinaryEmbedding
from .layer_state import OWN_TENSORS
from .linear import BinaryLinear
from .registry import BINARY_CLASSES, binary_class_of, register
from .stage_member import FROZEN, PENDING, TRANSITION, Member

__all__ = [
    "BINARY_CLASSES",
    "FROZEN",
    "OWN_TENSORS",
    "PENDING",
    "TRANSITION",
    "BinaryAttention",
    "BinaryConv1D",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryEmbedding",
    "BinaryLayer",
    "BinaryLinear",
    "Member",
    "binary_class_of",
    "register",
]
