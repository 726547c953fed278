"""The forms that packed members take while a graph of the model is recorded: plain operators, and no autograd function.

A recorded graph must compute what the packed layer does wherever it runs, so each step is an operator of which every
runtime has the same idea: >= and Where for signs (an exact comparison: no difference that could underflow), a table
look-up for bits, and Round after every sum of signs.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import BinaryAttention
from .binary_matmul import Operand
from .member import Member
from .packed import PackedAttention, PackedEmbedding, PackedLayer

SIGN_TABLE = "sign_table"
"""Name of the buffer, one for all members, that holds the 8 signs of each byte."""

_Module = TypeVar("_Module", bound=nn.Module)


def sign_table() -> Tensor:
    """The 8 signs of each byte, int8 (256, 8), in the order of `pack_signs`."""
    bytes_, places = torch.arange(256)[:, None], torch.arange(8)
    return ((bytes_ >> places & 1) * 2 - 1).to(torch.int8)


def signs_above(u: Tensor, threshold: Tensor | None, offset: float = 0.0) -> Tensor:
    """offset + sign(u - b), with sign(0) = +1, as a choice between two constants; NaN counts as -1."""
    above = u >= (0.0 if threshold is None else threshold)
    return torch.where(above, u.new_full((), offset + 1.0), u.new_full((), offset - 1.0))


class _Exported(PackedLayer):
    def _unpacked(self, bits: Tensor, count: int) -> Tensor:
        """+1 and -1, float32 (..., count), from bits (..., bytes)."""
        table: Tensor = getattr(self, SIGN_TABLE)
        return F.embedding(bits.int(), table).flatten(-2)[..., :count].float()

    def _signs(self) -> Tensor:
        """sign(w), laid out as the weight is."""
        bits = self._bits()
        return self._unpacked(bits.bits, bits.fan_in).unflatten(1, bits.row).movedim(0, bits.channel_dim)

    def binary_weight(self) -> Tensor:
        return self._signs() * self._weight_shaped(self.weight_scale)


class ExportedLayer(_Exported):
    """A packed layer, recorded.

    Forward:  z = round(product(where(x >= b, 1, -1), sign(w)));  y = z * (s * a) + (bias + s * a * offset * row sums)
              with a real input: y = product(x, sign(w)) * s + bias
    Source:   z is a sum of whole numbers, so rounding changes nothing; it keeps a runtime's optimizer from folding the
              scale into the weight, which would make the sum inexact, and undoes an inexact convolution (Winograd).
    """

    scale: Tensor
    shift: Tensor | None

    def begin(self) -> None:
        """Compute scale and shift once, as the frozen layer computes them."""
        scale, shift = self.weight_scale.detach(), None if self.bias is None else self.bias.detach()
        if self.activation_scale is not None:
            scale = scale * self.activation_scale.detach()
        if self.activation_scale is not None and self.activation_offset:
            lift = scale * (self._bits().row_sums(scale.dtype) * self.activation_offset)
            shift = lift if shift is None else shift + lift
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def _frozen(self, x: Tensor) -> Tensor:
        product, weight = self._product_of(x), self._signs()
        if self.activation_scale is None:
            z = product(x, weight)
        else:
            threshold = self.activation_threshold
            codes = signs_above(x, None if threshold is None else product.per_feature(threshold, x))
            z = product(codes, weight, self._pad_level() - self.activation_offset).round()
        y = z * product.per_channel(self.scale, z)
        return y if self.shift is None else y + product.per_channel(self.shift, y)


class ExportedEmbedding(_Exported, PackedEmbedding):
    """A packed embedding, recorded: the bytes of a row are looked up first, and then their signs."""

    scale: Tensor

    def begin(self) -> None:
        """Compute the rows' scales once."""
        self.register_buffer("scale", self._row_scales().detach(), persistent=False)

    def _frozen(self, x: Tensor) -> Tensor:
        return self._unpacked(F.embedding(x, self.weight_bits), self.embedding_dim) * F.embedding(x, self.scale)


class ExportedAttention(PackedAttention):
    """Binary attention, recorded: the same sums as `binary_matmul`."""

    def _product(self, left: Operand, right: Operand, factor: Tensor | None = None) -> Tensor:
        codes = signs_above(left.u, left.threshold, left.offset)
        codes = codes if factor is None else codes * factor
        z = codes.matmul(signs_above(right.u, right.threshold)).round()
        return z * (left.scale * right.scale)

    def _levels(self, operand: Operand) -> Tensor:
        return signs_above(operand.u, operand.threshold, operand.offset) * operand.scale


def export_form(member: Member, table: Tensor) -> None:
    """Give a packed member, in place, the form to be recorded. There is no way back: do it to a copy."""
    changed: Any = member
    if isinstance(member, BinaryAttention):
        changed.__class__ = ExportedAttention
        return
    form = ExportedEmbedding if isinstance(member, PackedEmbedding) else ExportedLayer
    changed.__class__ = type(f"Exported{type(member).__name__}", (form, type(member)), {})
    changed.register_buffer(SIGN_TABLE, table, persistent=False)
    changed.begin()
