"""What one packed layer hands the next: signs as bits, where numbers in between are not worth writing.

A sum z of a layer becomes the sign of the next one's input, sign(scale * z + shift - b). Every operation on the way,
with its rounding, keeps order, so that this sign changes once, from one whole number to the next: see `Cut`.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from .calls import WORD, call, check, conv_weights, make_shape, output_size, words_of
from .native import LANES


@dataclass(frozen=True)
class Cut:
    """Where sums become signs: +1 where z >= least, or the other way round where a bit of flips is 1.

    least: float32, one an output; flips: int32, a bit an output, the first in the lowest of a word.
    """

    least: Tensor
    flips: Tensor


@dataclass(frozen=True)
class Signs:
    """Bits of numbers of a shape: int32 words, rows of features, or planes [batch][word][pixel] of a convolution."""

    words: Tensor
    shape: torch.Size


def whole_words(channels: int, groups: int) -> bool:
    """Whether a convolution can take bits of, or give, so many channels: its groups have words of their own."""
    return groups == 1 or channels // groups % WORD == 0


def _new(shape: Sequence[int], features: int) -> Signs:
    every = math.prod(shape) // shape[features] * words_of(shape[features])
    return Signs(torch.empty(every + LANES, dtype=torch.int32), torch.Size(shape))  # panels read behind the end


def linear(
    x: Tensor | Signs, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None,
    to: torch.dtype | Cut,
) -> Tensor | Signs:  # fmt: skip
    """As `kernels.linear`, where x may be signs (and its threshold none), and y, by a cut for scale and shift."""
    features, threads = x.shape[-1], torch.get_num_threads()
    shape = (*x.shape[:-1], bits.shape[0])
    data, threshold = _data(x, threshold)
    y, scale, shift = _result(shape, -1, to, scale, shift)
    check(features, features, threshold, bits, scale, None if isinstance(to, Cut) else shift)
    tail = (math.prod(shape[:-1]), features, bits.shape[0], threads)
    call("stompp_linear", data, threshold, bits.contiguous(), scale, shift, _data(y, None)[0], *tail)
    return y


def conv(
    x: Tensor | Signs, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None,
    to: torch.dtype | Cut, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[tuple[int, int]],
    dilation: Sequence[int], groups: int, pad: int,
) -> Tensor | Signs:  # fmt: skip
    """As `kernels.conv`, for contiguous x and y, where x may be signs, and y; see `linear` and `whole_words`."""
    channels, taps = x.shape[1] // groups, math.prod(kernel)
    for side, count in ((x, x.shape[1]), (to, bits.shape[0])):
        if isinstance(side, Signs | Cut) and not whole_words(count, groups):
            raise ShapeError(f"{count} channels as bits, in {groups} groups that have no words of their own.")
    fits = len(x.shape) == len(kernel) + 2
    shape = (x.shape[0], bits.shape[0], *(output_size(x.shape[2:], kernel, stride, padding, dilation) if fits else ()))
    if not fits or min(shape) < 1:
        raise ShapeError(f"a packed convolution with a kernel of {tuple(kernel)}: {tuple(x.shape)} does not fit.")
    data, threshold = _data(x, threshold)
    y, scale, shift = _result(shape, 1, to, scale, shift)
    check(x.shape[1], channels * taps, threshold, bits, scale, None if isinstance(to, Cut) else shift)
    weights = conv_weights(bits, channels, taps)
    sizes = make_shape(x.shape, shape, kernel, stride, padding, dilation, groups, pad)
    tail = (ctypes.byref(sizes), torch.get_num_threads())
    call("stompp_conv", data, threshold, weights, scale, shift, _data(y, None)[0], *tail)
    return y


def _data(x: Tensor | Signs, threshold: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (x.words, None) if isinstance(x, Signs) else (x.contiguous(), threshold)


def _result(
    shape: Sequence[int], features: int, to: torch.dtype | Cut, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | Signs, Tensor | None, Tensor | None]:
    """What is filled, and what stands for scale and shift."""
    if not isinstance(to, Cut):
        return torch.empty(shape, dtype=to), scale, shift
    outputs = shape[features]
    if to.least.shape != (outputs,) or to.flips.shape != (words_of(outputs),) or to.flips.dtype is not torch.int32:
        raise ShapeError(f"a cut of {tuple(to.least.shape)} and {tuple(to.flips.shape)} entries for {outputs} outputs.")
    return _new(shape, features), to.least, to.flips
