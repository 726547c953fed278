"""1-bit products in compiled C, on a GPU in Triton: what of it is used, and its calls. Plain torch is always there."""

from . import gpu
from .calls import conv, fits, linear, memory_format, output_size, real_linear, unpack
from .handed import Cut, Signs
from .native import Choice, choice, describe, switched_off, use

__all__ = [
    "Choice",
    "Cut",
    "Signs",
    "choice",
    "conv",
    "describe",
    "fits",
    "gpu",
    "linear",
    "memory_format",
    "output_size",
    "real_linear",
    "switched_off",
    "unpack",
    "use",
]
