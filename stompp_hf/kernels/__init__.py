"""1-bit products in compiled C: which part of it is used, and its calls. Plain torch is always there instead."""

from .calls import DTYPES, EXACT, conv, fits, linear, memory_format, output_size, real_linear, sizes_fit, unpack
from .native import Choice, choice, describe, switched_off, use

__all__ = [
    "DTYPES",
    "EXACT",
    "Choice",
    "choice",
    "conv",
    "describe",
    "fits",
    "linear",
    "memory_format",
    "output_size",
    "real_linear",
    "sizes_fit",
    "switched_off",
    "unpack",
    "use",
]
