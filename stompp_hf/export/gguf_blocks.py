"""Weights as the rows of blocks that llama.cpp reads, made from signs and scales without a float weight in between.

A block of Q1_0 holds 128 weights: a float16 d, then 16 bytes; weight j is bit j % 8 of byte j / 8, 1 for +d and 0 for
-d. Those bytes are what `pack_signs` writes. A block of Q4_0 holds 32 as (q - 8) * d, and one of Q8_0 as q * d.
Rounding a scale to float16 is all that any of them loses.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..method.sign_bits import unpack_signs

Q1_0, Q4_0, Q8_0, F16, F32 = "Q1_0", "Q4_0", "Q8_0", "F16", "F32"
BLOCKS = {Q1_0: 128, Q4_0: 32, Q8_0: 32}
"""Consecutive inputs that share a d."""
FLOATS = {F16: torch.float16, F32: torch.float32}
LARGEST_Q4, LARGEST_Q8 = 7, 127
SMALLEST_NORMAL = 2.0**-14
"""Of float16: below it a scale loses digits."""
Rows = np.ndarray[Any, Any]


@dataclass
class RealWeight:
    """A real tensor, float32 on the CPU."""

    values: Tensor
    rounded: ClassVar[str] = "values"
    """What becomes float16."""

    def __getitem__(self, rows: Tensor) -> "RealWeight":
        return RealWeight(self.values[rows])

    def fits(self, kind: str) -> bool:
        """Whether a row is whole blocks."""
        return self.values.shape[-1] % BLOCKS.get(kind, 1) == 0

    def stored(self, kind: str) -> Rows:
        """The tensor as `kind`: floats of its shape, or the bytes of its blocks."""
        if kind in FLOATS:
            return self.values.to(FLOATS[kind]).numpy()
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(self.values.numpy(), GGMLQuantizationType[kind])


@dataclass
class Int8Weight:
    """Rows of whole numbers, int8 (rows, dim), times a step, (rows, 1); as Q8_0 they stay the same numbers."""

    numbers: Tensor
    step: Tensor
    rounded: ClassVar[str] = "step"

    def __getitem__(self, rows: Tensor) -> "Int8Weight":
        return Int8Weight(self.numbers[rows], self.step[rows])

    def fits(self, kind: str) -> bool:
        """Whether a row is whole blocks."""
        return self.numbers.shape[1] % BLOCKS.get(kind, 1) == 0

    def stored(self, kind: str) -> Rows:
        """The rows as `kind`: floats, or the bytes of Q8_0's blocks."""
        if kind in FLOATS:
            return (self.numbers * self.step).to(FLOATS[kind]).numpy()
        blocks = self.numbers.unflatten(1, (-1, BLOCKS[Q8_0]))
        return _blocks(self.step.expand(-1, blocks.shape[1]), blocks.view(torch.uint8))


@dataclass
class BinaryWeight:
    """A weight s * sign(w), a row an output channel.

    bits: uint8 (out, ceil(fan_in / 8)); scale: (out, groups); group_size: inputs that share one, all of them if one
    scale is a row's.
    """

    bits: Tensor
    scale: Tensor
    fan_in: int
    group_size: int
    rounded: ClassVar[str] = "scale"

    def __getitem__(self, rows: Tensor) -> "BinaryWeight":
        return BinaryWeight(self.bits[rows], self.scale[rows], self.fan_in, self.group_size)

    def fits(self, kind: str) -> bool:
        """Whether a row is whole blocks, and no block spans two groups."""
        size = BLOCKS.get(kind, 1)
        return self.fan_in % size == 0 and (self.group_size % size == 0 or self.group_size >= self.fan_in)

    def stored(self, kind: str) -> Rows:
        """The rows as `kind`: bytes (out, bytes a row) of blocks, or floats (out, fan_in)."""
        if kind in FLOATS:
            signs = unpack_signs(self.bits, self.fan_in, torch.float32)
            return (signs * self._scales(1)).to(FLOATS[kind]).numpy()
        scales = self._scales(BLOCKS[kind])
        if kind == Q1_0:
            return _blocks(scales, self.bits.unflatten(1, (-1, BLOCKS[kind] // 8)))
        signs = unpack_signs(self.bits, self.fan_in, torch.float32).to(torch.int8).unflatten(1, (-1, BLOCKS[kind]))
        if kind == Q8_0:
            return _blocks(scales / LARGEST_Q8, (LARGEST_Q8 * signs).view(torch.uint8))
        numbers = (8 + LARGEST_Q4 * signs).view(torch.uint8)
        half = BLOCKS[kind] // 2
        return _blocks(scales / LARGEST_Q4, numbers[..., :half] | numbers[..., half:] << 4)

    def _scales(self, size: int) -> Tensor:
        """A scale for each block of `size` inputs, (out, fan_in / size)."""
        return self.scale[:, torch.arange(0, self.fan_in, size) // self.group_size]


Held = RealWeight | Int8Weight | BinaryWeight


def _blocks(d: Tensor, data: Tensor) -> Rows:
    """d in float16 in front of the bytes of each block: (rows, blocks) and uint8 (rows, blocks, n)."""
    halves = d.half().contiguous().unsqueeze(-1).view(torch.uint8)  # little-endian, as all that torch is built for
    return torch.cat((halves, data), dim=-1).flatten(1).numpy()
