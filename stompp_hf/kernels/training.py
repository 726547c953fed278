"""Calls of the compiled part that training alone makes: the masked mix in one pass, and what its gradients need.

Everything here equals plain torch bit for bit, but for what in torch depends on where in a vector an entry lies: the
sign of a zero, and whether a NaN weight is inside its clip. What is not on a CPU, not float32 or not laid out for it
gives None.
"""

import ctypes
import math
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from .choosing import choice, trains_with

ABOVE, INSIDE, PASSING = 1, 2, 4
"""Flags of an entry: u >= b; within the clip; where the surrogate passes its gradient."""
UNFROZEN, EVERY, BOTH, FROZEN = 1, 2, 3, 4
"""What a gradient is, from clipped = g * 1[inside] and passed = k * g: (1 - M) * clipped, clipped,
(1 - M) * clipped + M * passed, M * passed."""


class _Mixing(ctypes.Structure):
    """Mixing of mix.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("u", "real", "threshold", "scale", "grad", "mask", "code", "levels")),
        *((name, c_void_p) for name in ("y", "to_u", "to_real", "to_scale", "to_threshold")),
        *((name, c_int64) for name in ("outer", "features", "inner")),
        *((name, c_float) for name in ("low", "high", "offset", "width")),
        *((name, c_int) for name in ("scale_step", "mask_of_entries", "flags", "windowed", "rule")),
    )


def mix(
    u: Tensor, real: Tensor | None, scale: Tensor, threshold: Tensor | None, mask: Tensor, edges: tuple[float, float],
    offset: float = 0.0, flags: int = 0, window: float | None = None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """y = M * scale * (offset + sign(u - b)) + (1 - M) * clip(real or u, *edges), and a byte of `flags` an entry.

    None where plain torch is to do it.

    Args:
        u, real: one shape and layout.
        scale, threshold: one a feature, or a single scale.
        mask: one a feature, booleans; or one an entry of a contiguous u, as bits (`mask_bits.pack_mask`).
        edges: of the clip; infinite ones for none.
        flags: which of ABOVE, INSIDE and PASSING are wanted.
        window: PASSING is |u - b| < window * |scale|, or, for None, the inside of the clip.
    """
    if not trains_with(u, real, scale, threshold, mask=mask) or (real is not None and not _side_by_side(u, real)):
        return None
    entries = mask.dtype is torch.uint8
    single = scale.numel() == 1
    shape = scale.shape if entries else mask.shape
    sizes = _sizes(u, shape)
    if (
        sizes is None
        or (entries and not _has_bits(u, mask))
        or not mask.is_contiguous()
        or not (single or (scale.shape == shape and scale.is_contiguous()))
        or not (threshold is None or (threshold.shape == shape and threshold.is_contiguous()))
    ):
        return None
    y = torch.empty_like(u)
    code = torch.empty_like(u, dtype=torch.uint8) if flags else None
    call = _Mixing(
        u=u.data_ptr(), real=_address(real), threshold=_address(threshold), scale=scale.data_ptr(),
        mask=mask.data_ptr(), code=_address(code), y=y.data_ptr(), low=edges[0], high=edges[1], offset=offset,
        width=window or 0.0, scale_step=int(not single), mask_of_entries=int(entries), flags=flags,
        windowed=int(window is not None),
    )  # fmt: skip
    _run("stompp_mix", call, sizes)
    return y, code


def mix_backward(
    grad: Tensor, code: Tensor | None, mask: Tensor, flags: int, rule: int | None, real: bool, terms: float | None,
    threshold: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
    """The gradient of u by a rule, that of `real`, and the terms of the scale's and the threshold's gradients.

    None where plain torch is to do it.

    Args:
        grad: dL/dy.
        code, flags: as `mix` gave and took them.
        mask: as for `mix`, one a feature.
        rule: UNFROZEN, EVERY, BOTH or FROZEN; None for no gradient of u.
        real: whether the gradient of `real` is made, by UNFROZEN.
        terms: the offset, for g * (sign(u - b) + offset); None for no such terms.
        threshold: whether k * g is made.
    """
    sizes = _sizes(grad, mask.shape) if trains_with(grad, mask=mask) and mask.is_contiguous() else None
    if sizes is None or (code is not None and not _side_by_side(grad, code)):
        return None
    wanted = (rule is not None, real, terms is not None, threshold)
    to = tuple(torch.empty_like(grad) if one else None for one in wanted)
    call = _Mixing(
        grad=grad.data_ptr(), code=_address(code), mask=mask.data_ptr(), to_u=_address(to[0]), to_real=_address(to[1]),
        to_scale=_address(to[2]), to_threshold=_address(to[3]), flags=flags, rule=rule or 0, offset=terms or 0.0,
    )  # fmt: skip
    _run("stompp_mix_backward", call, sizes)
    return to  # type: ignore[return-value]


def mix_weight_backward(
    grad: Tensor, weight: Tensor, mask: Tensor, edges: tuple[float, float] | None, rule: int | None, terms: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """The gradient of a weight by a rule, and M * g * sign(w), the terms of its scale's; None as above.

    Args:
        grad: dL/dy.
        weight, mask: as for `mix`, the mask one an entry, as bits.
        edges: of the clip, or None for none.
        rule: as for `mix_backward`.
        terms: whether the scale's terms are made.
    """
    if not trains_with(grad, weight, mask=mask) or not _side_by_side(grad, weight) or not _has_bits(grad, mask):
        return None
    to_weight = None if rule is None else torch.empty_like(grad)
    to_scale = torch.empty_like(grad) if terms else None
    low, high = (0.0, 0.0) if edges is None else edges
    call = _Mixing(
        grad=grad.data_ptr(), u=weight.data_ptr(), mask=mask.data_ptr(), to_u=_address(to_weight), rule=rule or 0,
        to_scale=_address(to_scale), low=low, high=high, flags=0 if edges is None else INSIDE, mask_of_entries=1,
    )  # fmt: skip
    _run("stompp_mix_weight_backward", call, (1, 1, grad.numel()))
    return to_weight, to_scale


def signs(
    x: Tensor, threshold: Tensor | None, scale: Tensor, wants_signs: bool, window: float | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """sign(x - b) > 0 and |x - b| < window * |scale|, booleans, each if wanted; None as above.

    Args:
        x: any shape.
        threshold: one a feature, in a shape that broadcasts over x.
        scale: a single one.
        wants_signs: whether the signs are made.
        window: in units of the scale; None makes no window.
    """
    if not trains_with(x, threshold, scale) or (threshold is not None and not threshold.is_contiguous()):
        return None
    sizes = _sizes(x, torch.Size(()) if threshold is None else threshold.shape)
    if sizes is None or scale.numel() != 1:
        return None
    above = torch.empty_like(x, dtype=torch.bool) if wants_signs else None
    near = None if window is None else torch.empty_like(x, dtype=torch.bool)
    call = _Mixing(
        u=x.data_ptr(), threshold=_address(threshold), scale=scale.data_ptr(), levels=_address(above),
        code=_address(near), offset=0.5, width=window or 0.0,  # -1 + 0.5 and 1 + 0.5 as whole numbers are 0 and 1
    )  # fmt: skip
    if wants_signs or window is not None:
        _run("stompp_levels", call, sizes)
    return above, near


def through_window(grad: Tensor, window: Tensor) -> bool:
    """grad *= window in place, for booleans, and whether it was done: torch would write them as numbers first."""
    dense = grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last)
    if (
        window.dtype is not torch.bool
        or not trains_with(grad)
        or grad.numel() == 0
        or not dense
        or not _side_by_side(grad, window)
    ):
        return False
    call = _Mixing(grad=grad.data_ptr(), code=window.data_ptr(), to_u=grad.data_ptr())
    _run("stompp_through_window", call, (1, 1, grad.numel()))
    return True


def _sizes(u: Tensor, shape: torch.Size) -> tuple[int, int, int] | None:
    """u as (outer, features, inner) in memory, where `shape`, which broadcasts to u, has the features; None if not."""
    if u.is_contiguous():
        size, shape = tuple(u.shape), torch.Size((*[1] * (u.dim() - len(shape)), *shape))
    elif u.dim() == len(shape) + 1 == 4 and u.is_contiguous(memory_format=torch.channels_last):
        size = tuple(u.shape[i] for i in (0, 2, 3, 1))
        shape = torch.Size((1, *shape[1:], shape[0]))
    else:
        return None
    if len(shape) != len(size) or u.numel() == 0:
        return None
    own = [i for i, n in enumerate(shape) if n != 1]
    first, last = (own[0], own[-1] + 1) if own else (0, 0)
    if size[first:last] != tuple(shape[first:last]):
        return None
    return math.prod(size[:first]), math.prod(size[first:last]), math.prod(size[last:])


def _side_by_side(u: Tensor, other: Tensor) -> bool:
    """Whether entries of two tensors with the same shape lie at the same places of their memory."""
    return u.shape == other.shape and u.stride() == other.stride()


def _has_bits(u: Tensor, mask: Tensor) -> bool:
    """Whether a mask is one bit for each entry, in the order in which these lie in memory."""
    in_order = mask.is_contiguous() and u.is_contiguous()
    return in_order and mask.dtype is torch.uint8 and mask.numel() == (u.numel() + 7) // 8


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(name: str, call: _Mixing, sizes: tuple[int, int, int]) -> None:
    call.outer, call.features, call.inner = sizes
    getattr(choice().native, name)(ctypes.byref(call), torch.get_num_threads())
