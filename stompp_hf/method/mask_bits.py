"""The mask of a weight as bits, 8 entries a byte: it is kept for as long as the weight is in transition.

Entry i, in the order of the weight's shape, is bit i % 8 of byte i // 8, as in `sign_bits` and `flag_bits`. Nobody else
knows this layout but the compiled mix, which reads the bits themselves, and `SoftRefreshMask`, which writes them.
"""

import torch
from torch import Tensor

from .flag_bits import unpack_flags
from .sign_bits import pack_bits, unpack_bits


def empty_mask(shape: torch.Size, device: torch.device) -> Tensor:
    """Bits of a mask in which nothing is frozen, uint8 (ceil(n / 8),)."""
    return torch.zeros(-(-shape.numel() // 8), dtype=torch.uint8, device=device)


def pack_mask(mask: Tensor) -> Tensor:
    """A mask, of booleans or of numbers that are 0 where nothing is frozen, as bits: uint8 (ceil(n / 8),)."""
    return pack_bits(mask.bool().flatten())


def unpack_mask(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack_mask`: booleans of a shape."""
    return unpack_flags(bits, (shape, torch.empty(shape, device="meta").stride()))


def mask_as(dtype: torch.dtype, bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask as numbers, 0 and 1, of a dtype and a shape."""
    return unpack_bits(bits, shape.numel(), dtype, 0.0).view(shape)


def rows_of_mask(bits: Tensor, shape: torch.Size, ids: Tensor) -> Tensor:
    """Bits of the mask of the rows that indices name, for the mask of a table."""
    rows, width = shape
    if width % 8:  # a row may begin within a byte
        return pack_mask(mask_as(torch.uint8, bits, shape)[ids])
    return bits.view(rows, width // 8)[ids].flatten()
