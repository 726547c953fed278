"""Whether sizes and types of a packed product fit together: what C and Triton take on trust."""

import torch
from torch import Tensor

from ..errors import ShapeError


def sizes_fit(
    features: int, fan_in: int, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None
) -> bool:
    """Whether sizes and types are what C takes on trust. Written out: it is part of every call."""
    outputs = bits.shape[0]
    return not (
        bits.dtype is not torch.uint8
        or bits.shape[1] != (fan_in + 7) // 8
        or (threshold is not None and (threshold.numel() != features or threshold.dtype is not torch.float32))
        or (scale is not None and (scale.numel() not in (1, outputs) or scale.dtype is not torch.float32))
        or (shift is not None and (shift.numel() not in (1, outputs) or shift.dtype is not torch.float32))
    )


def check(
    features: int, fan_in: int, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None
) -> None:
    """Raise ShapeError where `sizes_fit` does not hold."""
    if not sizes_fit(features, fan_in, threshold, bits, scale, shift):
        sizes = [None if t is None else (t.numel(), t.dtype) for t in (threshold, scale, shift)]
        raise ShapeError(
            f"a packed product of {features} features, {fan_in} weights an output channel: bits of shape "
            f"{tuple(bits.shape)} and type {bits.dtype}, with {sizes} thresholds, scales and shifts, do not fit."
        )
