"""The calls of the compiled part that are attention: both products from bits, and torch's softmax between them.

Bit for bit what plain torch gives, but for the sign of a zero. Scores are made and used up a few rows at a time.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .choosing import DTYPES, EXACT, Route, choice, route

SCORES = 2**17
"""Scores that a thread makes at a time, but whole blocks of rows: they and their probabilities stay in its cache."""


class _Attention(ctypes.Structure):
    """Attention of kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_threshold", c_void_p) for name in ("query", "key", "value", "probability")),
        *((name, c_void_p) for name in ("score_scale", "value_scale")),
        ("added", c_void_p * 2),
        *((name, c_void_p) for name in ("excluded", "y", "panels")),
        *((name, c_int64) for name in ("samples", "groups", "heads", "queries", "keys", "size", "value_size")),
        ("query_strides", c_int64 * 4),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("added_strides", c_int64 * 4 * 2),
        ("excluded_strides", c_int64 * 4),
        *((name, c_float) for name in ("scaling", "least")),
    )


def attention(
    operands: Sequence[Tensor], scales: Sequence[Tensor], thresholds: Sequence[Tensor | None], scaling: float,
    least: float, added: Sequence[Tensor] = (), excluded: Tensor | None = None, whole: bool = False,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """y = p' @ v', p' of p = softmax(q' @ k'.T * scaling + added); and p, if it is wanted.

    None where plain torch is to do it: see `choosing.route`. q' = a sign(q - b), and so k' and v'; p' = a (1 +
    sign(p - b)), but 0 where p < least, p is NaN or an entry is excluded. Scales come after the products.

    Args:
        operands: q (batch, heads, queries, size), k and v (batch, key heads, keys, size or value size).
        scales: a of q, k, v and p, one a head.
        thresholds: b of these, (heads, size) or None for 0; of p (heads,).
        scaling: of the scores.
        least: the smallest p that is not nothing.
        added: at most two tensors that broadcast to the scores, (batch, key heads, heads for each of them, queries,
            keys), and are added one after the other.
        excluded: booleans that broadcast to the scores.
        whole: whether p is wanted.

    Returns:
        y (batch, queries, heads, value size), contiguous; p as the scores, or None. Both are float32.

    Raises:
        KernelError: there is no memory.
    """
    query, key, value = operands
    others = (*scales, *thresholds, *added)
    if route(query, key, value, *others, excluded) is not Route.NATIVE:
        return None
    (samples, heads, queries, size), (_, groups, keys, value_size) = query.shape, value.shape
    shape = (samples, groups, heads // groups, queries, keys)
    if not _fits(operands, scales, thresholds, added, excluded, shape) or max(size, keys) >= EXACT or len(added) > 2:
        return None
    if any(t is not None and t.dtype not in DTYPES for t in (key, value, *others)):
        return None
    query, key, value = (_in_rows(x) for x in operands)
    limits = [None if t is None else t.to(torch.float32).contiguous() for t in thresholds]
    of_query, of_key, of_value, of_probability = (scale.to(torch.float32).view(groups, -1) for scale in scales)
    products = [(of_query * of_key).contiguous(), (of_probability * of_value).contiguous()]
    beside = [_in_rows(x.expand(shape)) for x in added]
    hidden = None if excluded is None else _side_by_side(excluded.expand(shape))
    y = query.new_empty((samples, queries, heads, value_size))
    call = _Attention(
        *map(_address, (query, key, value, *limits, *products)), tuple(map(_address, beside)), _address(hidden),
        y.data_ptr(), None, *shape, size, value_size,
        (query.stride(0), shape[2] * query.stride(1), query.stride(1), query.stride(2)),
        key.stride()[:3], value.stride()[:3], tuple(x.stride()[:4] for x in beside),
        () if hidden is None else hidden.stride()[:4], scaling, least,
    )  # fmt: skip
    return y, _run(call, query, whole)


def _run(call: _Attention, query: Tensor, whole: bool) -> Tensor | None:
    """Make panels, and then scores, probabilities and outputs block by block; all probabilities, if they are wanted."""
    native: Any = choice().native
    address, threads = ctypes.byref(call), torch.get_num_threads()
    panels = query.new_empty(native.stompp_attention_panels(address), dtype=torch.uint8)
    call.panels = panels.data_ptr()
    _succeed(native.stompp_attention_pack(address, threads), query)
    blocks = native.stompp_attention_blocks(address)
    rows = native.stompp_attention_rows(address, blocks)
    most = blocks if whole else max(1, threads * SCORES * blocks // (rows * call.keys))
    end = 0
    for first in range(0, blocks, most):
        count, begin = min(most, blocks - first), end
        end = native.stompp_attention_rows(address, first + count)
        scores = query.new_empty((end - begin, call.keys))
        _succeed(native.stompp_attention_scores(address, first, count, scores.data_ptr(), threads), query)
        p = scores.softmax(-1)
        _succeed(native.stompp_attention_values(address, first, count, p.data_ptr(), threads), query)
    return p.view(call.samples, call.groups, call.heads, call.queries, call.keys) if whole else None


def _fits(
    operands: Sequence[Tensor], scales: Sequence[Tensor], thresholds: Sequence[Tensor | None],
    added: Sequence[Tensor], excluded: Tensor | None, shape: tuple[int, ...],
) -> bool:  # fmt: skip
    """Whether sizes are what C takes on trust; if not, plain torch knows what to do with them, or what to say."""
    query, key, value = operands
    samples, groups, each, queries, keys = shape
    size, heads = query.shape[-1], (groups * each, groups, groups, groups * each)
    features = (size, size, value.shape[-1], 1)
    return (
        query.shape == (samples, groups * each, queries, size)
        and key.shape == (samples, groups, keys, size)
        and value.shape[0] == samples
        and thresholds[-1] is not None
        and min(key.numel(), value.numel()) > 0
        and all(scale.numel() == own for scale, own in zip(scales, heads, strict=True))
        and all(
            t is None or t.numel() == own * count for t, own, count in zip(thresholds, heads, features, strict=True)
        )
        and all(_broadcasts(x, shape) for x in added)
        and (excluded is None or (excluded.dtype is torch.bool and _broadcasts(excluded, shape)))
    )


def _broadcasts(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x has this shape when it is used with tensors that have it."""
    before = len(shape) - x.dim()
    return before >= 0 and all(own in (1, wanted) for own, wanted in zip(x.shape, shape[before:], strict=True))


def _in_rows(x: Tensor) -> Tensor:
    """The same numbers, as float32, side by side in the last dimension."""
    return _side_by_side(x.to(torch.float32))


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _succeed(status: int, query: Tensor) -> None:
    if status:
        raise KernelError(f"attention: no memory for queries of shape {tuple(query.shape)}; use a smaller batch.")
