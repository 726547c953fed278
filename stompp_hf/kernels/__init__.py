"""1-bit products in compiled C, on a GPU in Triton: what of it is used, and its calls. Plain torch is always there."""

from . import gpu
from .calls import (
    DTYPES,
    EXACT,
    conv,
    fits,
    inner_loop,
    linear,
    memory_format,
    output_size,
    real_linear,
    sizes_fit,
    unpack,
)
from .handed import Cut, Signs
from .native import Choice, choice, describe, switched_off, use
from .training import levels, mix, mix_backward, mix_weight_backward, pack, through_window, trains_with

__all__ = [
    "DTYPES",
    "EXACT",
    "Choice",
    "Cut",
    "Signs",
    "choice",
    "conv",
    "describe",
    "fits",
    "gpu",
    "inner_loop",
    "levels",
    "linear",
    "memory_format",
    "mix",
    "mix_backward",
    "mix_weight_backward",
    "output_size",
    "pack",
    "real_linear",
    "sizes_fit",
    "switched_off",
    "through_window",
    "trains_with",
    "unpack",
    "use",
]
