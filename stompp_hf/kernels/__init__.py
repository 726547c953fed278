"""1-bit products in compiled C: which part of it is used, and its calls. Plain torch is always there instead."""

from .calls import conv, fits, linear, memory_format, output_size, real_linear, unpack
from .native import Choice, choice, describe, switched_off, use
from .training import levels, mix, mix_backward, mix_weight_backward, pack, trains_with

__all__ = [
    "Choice",
    "choice",
    "conv",
    "describe",
    "fits",
    "levels",
    "linear",
    "memory_format",
    "mix",
    "mix_backward",
    "mix_weight_backward",
    "output_size",
    "pack",
    "real_linear",
    "switched_off",
    "trains_with",
    "unpack",
    "use",
]
