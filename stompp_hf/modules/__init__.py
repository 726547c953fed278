"""Binary layers, by the plain class that they replace."""

from .base import FROZEN, OWN_TENSORS, PENDING, TRANSITION, BinaryLayer
from .conv1d_transformers import BinaryConv1D
from .linear import BinaryLinear
from .registry import BINARY_CLASSES, register

__all__ = [
    "BINARY_CLASSES",
    "FROZEN",
    "OWN_TENSORS",
    "PENDING",
    "TRANSITION",
    "BinaryConv1D",
    "BinaryLayer",
    "BinaryLinear",
    "register",
]
