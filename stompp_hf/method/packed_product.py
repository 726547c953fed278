"""The product of a packed layer: in compiled C where it is there and can, else in plain torch, which is the oracle.

Plain torch is exact, and makes few float copies of a weight at a time.
"""

import torch
from torch import Tensor

from .layer_product import Product
from .mixing import hard_above
from .sign_bits import SignBits

TILE = 2**20
"""Weights that are unpacked at a time (4 MiB of float32)."""


def packed_product(
    x: Tensor, threshold: Tensor | None, binary_input: bool, bits: SignBits, product: Product, pad: float
) -> Tensor:
    """z of a frozen layer whose weight is packed.

    Forward:  z = product(sign(x - b), sign(w)), or product(x, sign(w)) where the input is real
    Shape and dtype: those of the product, in the dtype of x.
    Source:   this library's choice. A binary input makes z a sum of whole numbers, the same in tiles. Sums of real
              numbers round differently in another shape, so a layer with a real input is unpacked at once, as is a
              grouped convolution, whose weight is small; in either case only for the time of this call.

    Args:
        x: input, float32 or float64.
        threshold: b, one a feature, or None for 0.
        binary_input: whether sign(x - b) enters the product, or x itself.
        bits: sign(w).
        product: the layer's product.
        pad: what stands around a padded x.
    """
    operand = x.detach()
    if binary_input:
        z = product.by_kernel(operand, threshold, bits, (None, None), x.dtype, pad)
        if z is not None:
            return z
    if binary_input:
        operand = hard_above(x, None if threshold is None else product.per_feature(threshold, x))
    channels = bits.shape[bits.channel_dim]
    step = max(1, TILE // max(1, bits.fan_in))
    if not binary_input or product.groups > 1 or step >= channels:
        return product(operand, bits.signs(x.dtype), pad)
    tiles = [product(operand, bits.signs(x.dtype, i, i + step), pad) for i in range(0, channels, step)]
    behind = product.per_channel(tiles[0].new_empty(1), tiles[0]).dim() - 1  # dimensions of z after its channels
    return torch.cat(tiles, -1 - behind)
