"""The product of a linear layer in plain torch, as sums of int8: torch adds those faster than float32 on an x86-64."""

import platform

import torch
from torch import Tensor

from .. import kernels
from ..integrations.torch import int_mm
from .sign_bits import SignBits

TILE = 2**22
"""Weights that are unpacked at a time (4 MiB of int8)."""
MACHINES = ("x86_64", "AMD64")
"""Where torch has oneDNN's products of int8; elsewhere it may sum them one by one."""


def int8_product(signs: Tensor, bits: SignBits) -> Tensor | None:
    """z = signs @ sign(w).T, exact; None where float32 is to be taken.

    Forward:  z = 2 * (signs @ ones.T) - sum(signs), `ones` 1 where sign(w) = +1 and 0 where it is -1
    Shapes:   (..., K) of +1 and -1, bits of N output channels; (..., N) in the dtype of `signs`.
    Source:   this library's choice. Bits of one place of all bytes come first, then those of the next, so that a weight
              is two passes over whole rows; and the input stands in the same order. The bytes in columns are kept with
              the bits, and take as much.
    """
    listened = not kernels.is_eager()
    if listened or not signs.is_cpu or platform.machine() not in MACHINES or not torch.backends.mkldnn.is_available():
        return None
    columns = kernels.derived(bits.bits, "columns", lambda: bits.bits.t().contiguous())
    width, outputs = columns.shape
    flat = signs.reshape(-1, signs.shape[-1])
    flat = torch.nn.functional.pad(flat, (0, 8 * width - flat.shape[1])) if flat.shape[1] % 8 else flat
    # Operands are made anew: sizes of 1 may have any stride, by which _int_mm of torch 2.13 reads what is not there.
    rows = torch.empty((len(flat), 8, width), dtype=torch.int8, device=flat.device)
    rows = rows.copy_(flat.view(-1, width, 8).transpose(1, 2)).flatten(1)
    sums = rows.sum(-1, keepdim=True, dtype=torch.int32)
    places, tiles = torch.arange(8, dtype=torch.uint8, device=flat.device)[:, None, None], []
    for part in columns.split(max(1, TILE // (8 * width)), 1):
        ones = torch.empty((8, *part.shape), dtype=torch.uint8, device=flat.device)
        torch.bitwise_right_shift(part, places, out=ones).bitwise_and_(1)
        z = int_mm(rows, ones.view(torch.int8).flatten(0, 1))
        tiles.append(z.mul_(2).sub_(sums).to(signs.dtype))
    z = tiles[0] if len(tiles) == 1 else torch.cat(tiles, -1)
    return z.view(*signs.shape[:-1], outputs)
