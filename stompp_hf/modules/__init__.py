"""Binary layers, by the plain class that they replace."""

from .attention import BinaryAttention as BinaryAttention
from .binary_layer import BinaryLayer as BinaryLayer
from .conv import BinaryConv1d as BinaryConv1d, BinaryConv2d as BinaryConv2d, BinaryConv3d as BinaryConv3d
from .embedding import BinaryEmbedding as BinaryEmbedding
from .layer_state import OWN_TENSORS as OWN_TENSORS
from .linear import BinaryConv1D as BinaryConv1D, BinaryLinear as BinaryLinear
from .registry import BINARY_CLASSES as BINARY_CLASSES, binary_class_of as binary_class_of, register as register
from .stage_member import FROZEN as FROZEN, PENDING as PENDING, TRANSITION as TRANSITION, Member as Member
