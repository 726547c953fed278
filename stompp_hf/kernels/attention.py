"""Calls of the compiled part for the two products inside attention, bit for bit what plain torch gives.

What is no float32 on a CPU, wants a gradient or is watched (`choosing.route`) gives None.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from ..errors import KernelError
from .choosing import EXACT, choice, trains_with

_Strides = c_int64 * 4


class _Product(ctypes.Structure):
    """AttentionProduct of kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("left", "right", "left_threshold", "right_threshold", "scale")),
        ("added", c_void_p * 2),
        *((name, c_void_p) for name in ("excluded", "y")),
        *((name, c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "size")),
        *((name, _Strides) for name in ("left_strides", "right_strides")),
        ("added_strides", _Strides * 2),
        *((name, _Strides) for name in ("excluded_strides", "y_strides")),
        *((name, c_float) for name in ("scaling", "least")),
    )


def scores(
    query: Tensor, key: Tensor, query_threshold: Tensor | None, key_threshold: Tensor | None, scale: Tensor,
    scaling: float, added: Sequence[Tensor] = (), excluded: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """y = (sign(q - b) @ sign(k - c).T) * scale * scaling + added, and the lowest number where an entry is excluded.

    None where plain torch is to do it.

    Args:
        query: (batch, key heads, groups, queries, size).
        key: (batch, key heads, 1, keys, size).
        query_threshold: b, one a feature of each head, (key heads, groups, 1, size), or None for 0.
        key_threshold: c, (key heads, 1, 1, size), or None for 0.
        scale: one a head, (key heads, groups, 1, 1).
        scaling: a number more, the same for all.
        added: at most two tensors that broadcast to y, one added after the other.
        excluded: booleans that broadcast to y, (batch, key heads, groups, queries, keys).
    """
    thresholds, size = (query_threshold, key_threshold), query.shape[-1]
    if not _takes(query, key, *thresholds, scale, *added, excluded=excluded) or len(added) > 2 or size >= EXACT:
        return None
    y = query.new_empty((*query.shape[:-1], key.shape[-2]))
    call, kept = _call(query, key, thresholds, scale, y, excluded)
    for index, tensor in enumerate(added):
        own = _whole_rows(tensor.expand(y.shape))
        kept.append(own)
        call.added[index], call.added_strides[index] = own.data_ptr(), _strides(own)
    call.size, call.scaling = size, scaling
    _run("stompp_attention_scores", call, query)
    return y


def values(
    probability: Tensor, value: Tensor, probability_threshold: Tensor, value_threshold: Tensor | None, scale: Tensor,
    least: float, excluded: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """y = (p' @ sign(v - c)) * scale, p' = 1 + sign(p - b), and 0 where p < least or an entry is excluded.

    None where plain torch is to do it. A NaN in p is 0.

    Args:
        probability: (batch, key heads, groups, queries, keys).
        value: (batch, key heads, 1, keys, size).
        probability_threshold: b, one a head, (key heads, groups, 1, 1).
        value_threshold: c, one a feature of each key head, (key heads, 1, 1, size), or None for 0.
        scale: one a head, (key heads, groups, 1, 1).
        least: the smallest p that is not nothing.
        excluded: as for `scores`.

    Returns:
        y as (batch, queries, heads, size), contiguous.
    """
    thresholds, size = (probability_threshold, value_threshold), value.shape[-1]
    if not _takes(probability, value, *thresholds, scale, excluded=excluded) or value.shape[-2] >= EXACT:
        return None
    batch, heads, groups, queries, _ = probability.shape
    y = probability.new_empty((batch, queries, heads * groups, size))
    call, _ = kept = _call(
        probability, value, thresholds, scale, y.view(batch, queries, heads, groups, size).permute(0, 2, 3, 1, 4), excluded
    )
    call.size, call.least = size, least
    _run("stompp_attention_values", call, probability)
    del kept
    return y


def _takes(left: Tensor, right: Tensor, *others: Tensor | None, excluded: Tensor | None) -> bool:
    return trains_with(left, right, *others, mask=excluded) and right.numel() > 0


def _call(
    left: Tensor, right: Tensor, thresholds: tuple[Tensor | None, Tensor | None], scale: Tensor, y: Tensor,
    excluded: Tensor | None,
) -> tuple[_Product, list[Tensor | None]]:  # fmt: skip
    """What is called, and the tensors that have to live as long."""
    left, right = _whole_rows(left), _whole_rows(right)
    first, second = (None if t is None else t.contiguous() for t in thresholds)
    scale = scale.contiguous()
    hidden = None if excluded is None else _whole_rows(excluded.expand(*left.shape[:-1], right.shape[-2]))
    call = _Product(
        left=left.data_ptr(), right=right.data_ptr(), scale=scale.data_ptr(), y=y.data_ptr(),
        left_threshold=None if first is None else first.data_ptr(),
        right_threshold=None if second is None else second.data_ptr(),
        batch=left.shape[0], heads=left.shape[1], groups=left.shape[2], queries=left.shape[3], keys=right.shape[-2],
        left_strides=_strides(left), right_strides=_strides(right), y_strides=_strides(y),
    )  # fmt: skip
    if hidden is not None:
        call.excluded, call.excluded_strides = hidden.data_ptr(), _strides(hidden)
    return call, [left, right, first, second, scale, hidden]


def _whole_rows(x: Tensor) -> Tensor:
    """The same numbers, side by side in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> ctypes.Array[c_int64]:
    return _Strides(*x.stride()[:4])


def _run(name: str, call: _Product, x: Tensor) -> None:
    if getattr(choice().native, name)(ctypes.byref(call), torch.get_num_threads()):
        raise KernelError(f"{name}: no memory for an input of shape {tuple(x.shape)}; use a smaller batch.")
