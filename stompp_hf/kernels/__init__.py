"""1-bit products in compiled C, on a GPU in Triton: what of it is used, and its calls. Plain torch is always there."""

from . import choosing, gpu, native
from .calls import conv, inner_loop, linear, memory_format, output_size, pack, real_linear, sizes_fit, unpack
from .choosing import (
    DTYPES,
    EXACT,
    QUESTIONS,
    Route,
    apply,
    choice,
    describe,
    has_tangent,
    is_eager,
    is_watched,
    route,
    switched_off,
    trains_with,
    use,
)
from .kept import Seen, countable, derived, unchanged
from .native import Choice
from .training import levels, mix, mix_backward, mix_weight_backward, through_window

__all__ = [
    "DTYPES",
    "EXACT",
    "QUESTIONS",
    "Choice",
    "Route",
    "Seen",
    "apply",
    "choice",
    "choosing",
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
    "native",
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
