"""A maximum over windows, one dimension after the other: on a CPU torch takes the entries of a window one by one."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import is_eager
from ..modules.activations import Changed


class SeparableMaxPool2d(Changed, nn.MaxPool2d):
    """nn.MaxPool2d as maxima of whole rows, then of columns.

    Forward:  the same numbers, NaN included; where a window's largest entries are zeros of both signs, the sign of the
              result may be another.
    Source:   this library's choice. In torch 2.13 a pool of 64 x 112 x 112 numbers takes longer on a CPU than every
              binary convolution of a ResNet-18 together, and this takes a tenth of it.
    """

    plain_class = nn.MaxPool2d

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module is a pool that this can compute."""
        return type(module) is nn.MaxPool2d and module.dilation in (1, (1, 1)) and not (
            module.ceil_mode or module.return_indices
        )  # fmt: skip

    def unfuse(self) -> None:
        self.restore()

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        kernel, stride, padding = (_pair(value) for value in (self.kernel_size, self.stride, self.padding))
        if not is_eager() or not _is_plain(input, kernel, padding):
            return nn.MaxPool2d.forward(self, input)  # type: ignore[no-any-return]
        (above, beside), x = padding, input
        if above or beside:
            x = F.pad(x, (beside, beside, above, above), value=float("-inf"))
        for dim, k, s in zip((-2, -1), kernel, stride, strict=True):
            x = reduce(torch.maximum, x.unfold(dim, k, s).unbind(-1))
        return x.contiguous()


def _is_plain(x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether rows lie side by side, and there is nothing that torch is to complain about."""
    if not (x.is_cpu and x.is_floating_point() and x.dim() in (3, 4) and x.is_contiguous() and x.numel() > 0):
        return False
    sizes = zip(x.shape[-2:], kernel, padding, strict=True)
    return not x.requires_grad and all(2 * p <= k <= n + 2 * p for n, k, p in sizes)


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
