"""Booleans that wait for the backward pass, 8 a byte, in the order in which they lie in memory.

A frozen layer asks no more of its input than a sign and whether the surrogate lets the gradient through, where a plain
layer keeps 32 bits. Eight booleans are a word of 64 bits, which two operations of torch turn into a byte, on any
device. A compiled graph keeps booleans: what it saves, and what it computes again, is up to its compiler.
"""

import torch
from torch import Tensor

from .sign_bits import SignBits

Layout = tuple[torch.Size, tuple[int, ...]]
"""Shape and strides of the booleans that bits stand for."""
Kept = tuple[Tensor | None, Layout | None]
"""What stands for booleans, and their layout where these are bits."""

_EACH = 0x0101010101010101  # a one in each byte
_GATHER = 0x0102040810204080  # times bytes of 0 and 1: the lowest bit of byte i becomes bit 56 + i
_PICK = 0x8040201008040201 - 2**64  # bit i of byte i
_CARRY = 0x7F7F7F7F7F7F7F7F  # added to a byte that is not 0, it sets the highest bit


def pack_flags(flags: Tensor | None) -> Kept:
    """Booleans as bits, uint8 (ceil(n / 8),), and their layout; anything else as it is, with None."""
    if flags is None or flags.dtype is not torch.bool or torch.compiler.is_compiling():
        return flags, None
    if flags.stride() != torch.empty_like(flags).stride():
        flags = flags.contiguous()  # expanded, or a part of something larger
    flat = flags.as_strided((flags.numel(),), (1,)).view(torch.uint8)
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.cat((flat, flat.new_zeros(-flat.numel() % 8)))
    words = flat.view(torch.int64) * _GATHER
    return words.bitwise_right_shift_(56).to(torch.uint8), (flags.shape, flags.stride())


def unpack_flags(bits: Tensor, layout: Layout | None) -> Tensor:
    """The inverse of `pack_flags`."""
    if layout is None:
        return bits
    words = bits.to(torch.int64).mul_(_EACH).bitwise_and_(_PICK)
    words = words.add_(_CARRY).bitwise_right_shift_(7).bitwise_and_(_EACH)
    return words.view(torch.bool).as_strided(*layout)


def unpack_levels(bits: Tensor, layout: Layout | None, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """The flags as numbers: 1 + offset where they are true, and -1 + offset elsewhere."""
    if layout is None:
        levels = bits.to(dtype).mul_(2.0).sub_(1.0)
    else:
        count = torch.Size((1, layout[0].numel()))
        levels = SignBits(bits.unsqueeze(0), count).signs(dtype).as_strided(*layout)
    return levels.add_(offset) if offset else levels
