"""1-bit products on a GPU: their call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .calls import check


def linear(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`kernels.linear` on a GPU: the same arguments, and bit for bit what torch gives on that device.

    Raises:
        ShapeError: the sizes do not fit together.
    """
    check(x.shape[-1], x.shape[-1], threshold, bits, scale, shift)
    triton_linear: Any = importlib.import_module(".triton_linear", __package__)
    return triton_linear.linear(x, threshold, bits, scale, shift, dtype)  # type: ignore[no-any-return]
