"""ONNX operators that torch has no name for, as they are recorded: products of small whole numbers, summed in int32.

Each is a node of the graph and nothing else: called outside of a recording it gives zeros of the right shape.
One operand of a product is unsigned and holds a sign as {0, 2} with the zero point 1, the other is signed and holds it
as {-1, +1}. Sums are exact. Two signed operands would be too, and several times slower than float32 in onnxruntime, as
are an unsigned image and a signed weight in its ConvInteger.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

BLOCK = 64
"""Weights that share a scale in MatMulNBits: the fastest size at 16 rows and more, and as fast as any at one."""
INT8_INPUTS = 4
"""Its accuracy_level that rounds inputs to int8, row by row. With float32 ones one row takes ten times as long."""


def zero_point(value: int = 1) -> Tensor:
    """A zero point of unsigned codes."""
    return torch.tensor(value, dtype=torch.uint8)


def matmul_integer(left: Tensor, right: Tensor, zero: int = 1) -> Tensor:
    """(left - zero) @ right, int32, of uint8 (..., n, k) and int8 (..., k, m)."""
    leading = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]) if right.dim() > 2 else left.shape[:-2]
    shape = (*leading, left.shape[-2], right.shape[-1])
    zeros = (zero_point(zero),) if zero else ()
    return symbolic("MatMulInteger", (left, right, *zeros), dtype=torch.int32, shape=shape)


def conv_integer(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """conv(x - 1, weight - 1), int32, of uint8 (batch, in, *size) and (out, in / groups, *kernel); padding counts 0."""
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(length + sum(pad) - apart * (count - 1) - 1) // by + 1 for length, count, by, pad, apart in sides]
    attributes: dict[str, Any] = {
        "strides": list(stride),
        "pads": [pad[side] for side in (0, 1) for pad in padding],
        "dilations": list(dilation),
        "group": groups,
    }
    shape = (x.shape[0], weight.shape[0], *size)
    return symbolic("ConvInteger", (x, weight, zero_point(), zero_point()), attributes, dtype=torch.int32, shape=shape)


def times_scale(z: Tensor, scale: Tensor) -> Tensor:
    """float32 z * scale of whole numbers (batch, channels, ...), in one pass over them; scale (channels,)."""
    return symbolic("DequantizeLinear", (z, scale), {"axis": 1}, dtype=torch.float32, shape=z.shape)


def matmul_2_bits(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x @ (scale * (codes - 2)).T by onnxruntime's own operator, with x rounded to int8 row by row.

    Args:
        x: float32 (..., k).
        codes: 2 bits each, uint8 (out, blocks, BLOCK / 4).
        scale: float32 (out, blocks).
    """
    sizes = {"K": x.shape[-1], "N": codes.shape[0]}
    attributes: dict[str, Any] = {**sizes, "bits": 2, "block_size": BLOCK, "accuracy_level": INT8_INPUTS}
    shape = (*x.shape[:-1], codes.shape[0])
    name = "com.microsoft::MatMulNBits"
    return symbolic(name, (x, codes, scale), attributes, dtype=torch.float32, shape=shape, version=1)
