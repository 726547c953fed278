"""1-bit products in compiled C, on a GPU in Triton: what of it is used, and its calls. Plain torch is always there."""

from . import gpu
from .calls import (
    conv,
    inner_loop,
    linear,
    memory_format,
    output_size,
    real_linear,
    unpack,
)
from .choosing import DTYPES, EXACT, QUESTIONS, Route, apply, has_tangent, is_eager, is_watched, route
from .kept import Seen, countable, derived, unchanged
from .native import Choice, choice, describe, switched_off, use
from .sizes import sizes_fit
from .training import levels, mix, mix_backward, mix_weight_backward, pack, through_window, trains_with

__all__ = [
    "DTYPES",
    "EXACT",
    "QUESTIONS",
    "Choice",
    "Route",
    "Seen",
    "apply",
    "choice",
    "conv",
    "countable",
    "derived",
    "describe",
    "gpu",
    "has_tangent",
    "inner_loop",
    "is_eager",
    "is_watched",
    "levels",
    "linear",
    "memory_format",
    "mix",
    "mix_backward",
    "mix_weight_backward",
    "output_size",
    "pack",
    "real_linear",
    "route",
    "sizes_fit",
    "switched_off",
    "through_window",
    "trains_with",
    "unchanged",
    "unpack",
    "use",
]
