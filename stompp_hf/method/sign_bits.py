"""Signs as bits, 8 a byte: the storage of packed weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels


def pack_signs(u: Tensor) -> Tensor:
    """The signs of u, 8 a byte; rows are padded to whole bytes.

    Forward:  bit i of byte j of a row is 1 where sign(u[..., 8 j + i]) = +1; sign(0) = sign(-0) = +1; padding is 0
    Shape and dtype: (..., n), any real dtype, to uint8 (..., ceil(n / 8)).
    Source:   the layout is this library's choice.
    """
    if u.is_meta:  # the skeleton of a checkpoint: there is a shape, and nothing to compute
        return torch.empty((*u.shape[:-1], -(-u.shape[-1] // 8)), dtype=torch.uint8, device=u.device)
    return pack_bits(u.detach() >= 0)


def unpack_signs(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_signs`: +1 and -1, contiguous, (..., count) from uint8 (..., ceil(count / 8))."""
    return unpack_bits(bits, count, dtype, -1.0)


def pack_bits(flags: Tensor) -> Tensor:
    """Booleans (..., n) as bits, in the layout of `pack_signs`, where a bit is 1 for true."""
    ones = F.pad(flags.view(torch.uint8), (0, -flags.shape[-1] % 8))
    values = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (ones.unflatten(-1, (ones.shape[-1] // 8, 8)) * values).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int, dtype: torch.dtype, zero: float) -> Tensor:
    """Numbers, 1 where a bit is 1 and `zero` where it is 0, contiguous, (..., count)."""
    if kernels.is_exported():  # shifts are no core operators
        ones = torch.stack([(bits & 2**place) > 0 for place in range(8)], -1)
        return torch.where(ones.flatten(-2)[..., :count], 1.0, zero).to(dtype)
    places, bytes_ = torch.arange(8, device=bits.device), torch.arange(256, device=bits.device)
    table = torch.where(((bytes_[:, None] >> places) & 1) > 0, 1.0, zero).to(dtype)  # the 8 numbers of each byte
    return F.embedding(bits.int(), table).flatten(-2)[..., :count].contiguous()


def count_ones(bits: Tensor) -> Tensor:
    """Number of ones in each row, int64: (...,) from uint8 (..., bytes)."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(-1, dtype=torch.int64)


@dataclass
class SignBits:
    """The signs of a weight as bits.

    bits: uint8 (channels, ceil(weights of one output channel / 8)), a row for each output channel; shape: that of the
    weight; channel_dim: its dimension of output channels.
    """

    bits: Tensor
    shape: torch.Size
    channel_dim: int = 0

    @classmethod
    def of(cls, weight: Tensor, channel_dim: int) -> "SignBits":
        """The signs of a latent weight."""
        return cls(pack_signs(weight.movedim(channel_dim, 0).flatten(1)), weight.shape, channel_dim)

    @property
    def row(self) -> list[int]:
        """Shape of the weights of one output channel."""
        return [size for dim, size in enumerate(self.shape) if dim != self.channel_dim]

    @property
    def fan_in(self) -> int:
        """Number of weights of one output channel."""
        return math.prod(self.row)

    def signs(self, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
        """sign(w) of output channels [first, last), laid out as the weight is, contiguous."""
        bits = self.bits[first:last]
        native = dtype == torch.float32 and kernels.route(bits, dtypes=(torch.uint8,)) is kernels.Route.NATIVE
        rows = kernels.unpack(bits, self.fan_in) if native else unpack_signs(bits, self.fan_in, dtype)
        return rows.unflatten(1, self.row).movedim(0, self.channel_dim).contiguous()

    def row_sums(self, dtype: torch.dtype) -> Tensor:
        """Sum of the signs of each output channel, (channels,), exact; kept with the bits."""
        if kernels.is_exported():
            return unpack_signs(self.bits, self.fan_in, dtype).sum(-1)
        make = lambda: (2 * count_ones(self.bits) - self.fan_in).to(dtype)  # noqa: E731
        return kernels.derived(self.bits, f"row sums {dtype}", make)

    def has_stray_bits(self) -> bool:
        """Whether any bit behind the end of a row is 1: `row_sums` would count it."""
        used = self.fan_in % 8
        return used > 0 and bool((self.bits[:, -1] >> used).any())
