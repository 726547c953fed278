"""Calls of the compiled part with tensors: CPU, float32, bfloat16 or float16 in and out, no gradient."""

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, ShapeError
from .choosing import DTYPES, choice
from .kept import derived
from .native import Shape

FEW_CHANNELS = 8
"""Groups with fewer channels are summed byte by byte: a word of 32 channels would hold little."""
WORD = 32
"""Bits of a word; a group with fewer channels has narrow taps, several in a word."""
SHORT = 2**15
"""Sums of fewer signs fit into 16 bits."""


def sizes_fit(
    features: int, fan_in: int, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None
) -> bool:
    """Whether sizes and types are what C and Triton take on trust. Written out: it is part of every call."""
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


def linear(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = scale * (sign(x - b) @ sign(w).T) + shift, rounded as torch rounds it: bit for bit.

    Infinities and NaN: sign(x - b) is the sign bit of the difference, as in torch,
    whose sign for a NaN in b itself depends on the CPU.

    Raises:
        ShapeError: the sizes do not fit together.
        KernelError: there is no memory.

    Args:
        x: (..., K).
        threshold: b, (K,) float32, or None for 0.
        bits: sign(w), uint8 (N, ceil(K / 8)).
        scale, shift: float32, (N,) or (1,); None for 1 and 0.
        dtype: of y, (..., N).
    """
    features = x.shape[-1]
    check(features, features, threshold, bits, scale, shift)
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], bits.shape[0]), dtype=dtype)
    tail = (x.numel() // features, features, bits.shape[0], torch.get_num_threads())
    call("stompp_linear", x, threshold, bits.contiguous(), scale, shift, y, *tail)
    return y


def real_linear(x: Tensor, bits: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor | None:
    """y = scale * (x @ sign(w).T) + shift of real inputs, by look-up; None where there is nothing better than torch.

    Sums are not in torch's order: y differs by at most K * 2**-23 * |scale| * sum |x|, K the number of features.

    Args:
        x: (..., K) float32.
        bits, scale, shift: as for `linear`.
    """
    native: Any = choice().native
    return _real("stompp_real_linear", x, bits, scale, shift) if native.stompp_has_real() else None


def lane_linear(x: Tensor, bits: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """y = scale * (x @ sign(w).T) + shift of real inputs, each row summed in 16 lanes (`lane_rows` in kernels.h).

    For one row this is the order of a library that torch may have (MKL), and then y is torch's, bit for bit.

    Args:
        x: (..., K) float32.
        bits, scale, shift: as for `linear`.
    """
    return _real("stompp_lane_linear", x, bits, scale, shift)


def _real(name: str, x: Tensor, bits: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    features = x.shape[-1]
    check(features, features, None, bits, scale, shift)
    x, bits, scale = x.contiguous(), bits.contiguous(), scale.contiguous()
    shift = None if shift is None else shift.contiguous()
    y = x.new_empty((*x.shape[:-1], bits.shape[0]))
    status = getattr(choice().native, name)(
        *(x.data_ptr(), bits.data_ptr(), scale.data_ptr(), int(scale.numel() > 1)),
        *(None if shift is None else shift.data_ptr(), int(shift is not None and shift.numel() > 1), y.data_ptr()),
        *(x.numel() // features, features, bits.shape[0], torch.get_num_threads()),
    )
    _succeed(status, name, x)
    return y


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """The signs of a float32 weight, 8 a byte, as `pack_signs` orders them: (rows, ceil(count / 8)).

    Args:
        weight: (rows, count), contiguous; (count, rows) if transposed.
    """
    rows, count = weight.shape[::-1] if transposed else weight.shape
    bits = torch.empty((rows, (count + 7) // 8), dtype=torch.uint8, device=weight.device)
    native: Any = choice().native
    native.stompp_pack(weight.data_ptr(), rows, count, int(transposed), bits.data_ptr(), torch.get_num_threads())
    return bits


def unpack(bits: Tensor, count: int) -> Tensor:
    """The signs of rows of bits as float32: (rows, count) from uint8 (rows, ceil(count / 8))."""
    signs = torch.empty(bits.shape[0], count, device=bits.device)
    native: Any = choice().native
    native.stompp_unpack(bits.contiguous().data_ptr(), bits.shape[0], count, signs.data_ptr())
    return signs


def conv(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int],
    groups: int, pad: int,
) -> Tensor:  # fmt: skip
    """y = scale * conv(pad(sign(x - b)), sign(w)) + shift, bit for bit; see `linear`.

    Args:
        x: (batch, in_channels, *size) of one to three dimensions; y has the memory format that torch would give it.
        threshold: b, (in_channels,).
        bits: sign(w), uint8 (out_channels, ceil(in_channels / groups * volume of the kernel / 8)).
        padding: before and after, one pair a dimension; pad: what stands there, -1, 0 or 1.
    """
    dims, channels, taps = len(kernel), x.shape[1] // groups, math.prod(kernel)
    check(x.shape[1], channels * taps, threshold, bits, scale, shift)
    if x.dim() != dims + 2 or x.shape[1] % groups or bits.shape[0] % groups:
        raise ShapeError(
            f"a packed convolution in {groups} groups with {bits.shape[0]} outputs: an input of shape {tuple(x.shape)} "
            f"does not fit; it is (batch, channels, *size) with {dims} sizes, and groups divide channels and outputs."
        )
    size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    y = x.new_empty((x.shape[0], bits.shape[0], *size), dtype=dtype)
    shape = make_shape(x.shape, y.shape, kernel, stride, padding, dilation, groups, pad)
    if channels < FEW_CHANNELS and channels * taps < SHORT:
        name, weights = "stompp_small_groups", bits.contiguous()
    else:
        name, weights = "stompp_conv", conv_weights(bits, channels, taps)
    tail = (ctypes.byref(shape), torch.get_num_threads())
    call(name, x.contiguous(), threshold, weights, scale, shift, y, *tail)
    return y.contiguous(memory_format=memory_format(x, (*kernel, *stride, *dilation)))


def make_shape(
    x: Sequence[int], y: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[tuple[int, int]], dilation: Sequence[int], groups: int, pad: int,
) -> Shape:  # fmt: skip
    """The sizes of a convolution, from the shapes of its input and output."""
    shape = Shape(x[0], x[1], y[1], groups)
    filled: dict[str, tuple[Sequence[int], int]] = {
        "inner": (x[2:], 1), "outer": (y[2:], 1), "kernel": (kernel, 1), "stride": (stride, 1),
        "before": ([before for before, _ in padding], 0), "dilation": (dilation, 1),
    }  # fmt: skip
    for name, (values, rest) in filled.items():
        setattr(shape, name, (ctypes.c_int64 * 3)(*[rest] * (3 - len(kernel)), *values))
    shape.pad = pad
    return shape


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> list[int]:
    """The spatial size of a convolution's output."""
    every = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + sum(around) - d * (k - 1) - 1) // s + 1 for n, k, s, around, d in every]


def memory_format(x: Tensor, steps: Sequence[int]) -> torch.memory_format:
    """The memory format in which torch would give a convolution's output: what comes next may sum in that order.

    steps: sizes, strides and dilations of the kernel; with all of them 1, torch 2.13 multiplies matrices in 3D.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d if math.prod(steps) > 1 else None}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def inner_loop(rounds: int) -> int:
    """Run the inner loop alone, on operands in the first cache, on one thread; how many products of signs that were.

    Nothing that calls it is faster: its rate is the ceiling of the kernels on this CPU, with these instructions.
    """
    native: Any = choice().native
    return int(native.stompp_inner_loop(rounds))


def conv_weights(bits: Tensor, channels: int, taps: int) -> Tensor:
    """What stompp_conv takes for a weight: narrow taps take little more than their bits."""
    make = partial(_tap_words, bits, channels, taps)
    kept = taps > 1 or channels >= WORD  # a single narrow tap is copied at once, and its words are mostly empty
    return derived(bits, "tap words", make) if kept else make()


def _tap_words(bits: Tensor, channels: int, taps: int) -> Tensor:
    outputs, wide = bits.shape[0], channels >= WORD
    words = taps * -(-channels // WORD) if wide else -(-channels * taps // WORD)
    result = torch.empty(outputs * (words + (taps if wide and taps > 1 else 0)), dtype=torch.int32, device=bits.device)
    native: Any = choice().native
    native.stompp_tap_words(bits.contiguous().data_ptr(), outputs, channels, taps, result.data_ptr())
    return result


def call(
    name: str, x: Tensor, threshold: Tensor | None, weights: Tensor, scale: Tensor | None, shift: Tensor | None,
    y: Tensor, *tail: Any,
) -> None:  # fmt: skip
    # The tensors keep their names until the call is over, and so their memory.
    threshold, scale, shift = _in_order(threshold), _in_order(scale), _in_order(shift)
    status = getattr(choice().native, name)(
        x.data_ptr(),
        DTYPES[x.dtype],
        None if threshold is None else threshold.data_ptr(),
        weights.data_ptr(),
        None if scale is None else scale.data_ptr(),
        scale is not None and scale.numel() > 1,
        None if shift is None else shift.data_ptr(),
        shift is not None and shift.numel() > 1,
        y.data_ptr(),
        DTYPES[y.dtype],
        *tail,
    )
    _succeed(status, name, x)


def _in_order(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.is_contiguous() else values.contiguous()


def _succeed(status: int, name: str, x: Tensor) -> None:
    if status:
        raise KernelError(f"{name}: no memory for an input of shape {tuple(x.shape)}; use a smaller batch.")
