"""The forms that packed members take while a graph of the model is recorded: plain operators, and no autograd function.

A recorded graph must compute what the packed layer does wherever it runs, so each step is an operator of which every
runtime has the same idea: >= for signs (an exact comparison: no difference that could underflow), a table look-up for
bits, and sums of whole numbers.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..method.attention_product import Operand
from ..method.conv_product import ConvProduct
from ..method.weight_scales import is_grouped, spread
from ..modules.attention import BinaryAttention
from ..modules.packed import PackedAttention, PackedEmbedding, PackedLayer
from ..modules.stage_member import Member
from .integer_products import ExportedProduct, choice_above, exported_product, signed_codes, unsigned_codes
from .onnx_operators import BLOCK, matmul_2_bits, matmul_integer

SIGN_TABLE, CODE_TABLE = "sign_table", "code_table"
"""Names of buffers, one for all members: the 8 signs of each byte, and their 8 codes of 2 bits."""

_Module = TypeVar("_Module", bound=nn.Module)


def sign_table() -> Tensor:
    """The 8 signs of each byte, int8 (256, 8), in the order of `pack_signs`."""
    bytes_, places = torch.arange(256)[:, None], torch.arange(8)
    return ((bytes_ >> places & 1) * 2 - 1).to(torch.int8)


def code_table() -> Tensor:
    """For each byte the 2 bytes, uint8 (256, 2), in which a sign is the 2 bits 2 + sign(w), the first the lowest."""
    codes = (sign_table().long() + 2).unflatten(1, (2, 4)) << 2 * torch.arange(4)
    return codes.sum(-1).to(torch.uint8)


@dataclass(frozen=True)
class Form:
    """How products are written (`export_onnx` says what each option does), and the tables of the graph."""

    integers: bool
    stored_as_bits: bool
    two_bits: bool
    signs: Tensor
    codes: Tensor


class _Exported(PackedLayer):
    form: Form

    def _unpacked(self, bits: Tensor, count: int) -> Tensor:
        """+1 and -1, int8 (..., count), from bits (..., bytes)."""
        table: Tensor = getattr(self, SIGN_TABLE)
        return F.embedding(bits.int(), table).flatten(-2)[..., :count]


class ExportedLayer(_Exported):
    """A packed layer, recorded.

    Forward:  z = product(sign(x - b), sign(w)), exact;  y = z * (s * a) + (bias + s * a * offset * row sums)
              with a real input: y = product(x, sign(w)) * s + bias
              with a scale a group: y = product(sign(x - b) + offset, s * sign(w)) * a + bias; linear layers sum in
              float64, as `grouped_product` does, and convolutions, which runtimes lack in it, in float32
    """

    scale: Tensor
    shift: Tensor | None
    weight_signs: Tensor
    written: ExportedProduct

    def begin(self, form: Form) -> None:
        """Compute scale and shift once, as the frozen layer computes them, and choose how the product is written."""
        self.form = form
        scale, shift = self.scale_and_shift()
        every = scale.detach().expand(self.weight_bits.shape[0]).clone()
        self.register_buffer("scale", every, persistent=False)
        self.register_buffer("shift", None if shift is None else shift.detach(), persistent=False)
        in_integers = form.integers and self._is_binary and not self._is_grouped
        self.written = exported_product(self.product, self.weight_shape, in_integers)
        if not form.stored_as_bits and not self._in_two_bits:
            operand = self.written.weight(self._rows()).contiguous()
            self.register_buffer("weight_signs", operand, persistent=False)

    @property
    def _is_binary(self) -> bool:
        return self.activation_scale is not None

    @property
    def _is_grouped(self) -> bool:
        return is_grouped(self.weight_scale)

    @property
    def _in_two_bits(self) -> bool:
        fits = not self._is_grouped or self.stompp_config.group_size % BLOCK == 0
        return self.form.two_bits and fits and not self._is_binary and not isinstance(self.product, ConvProduct)

    def _rows(self) -> Tensor:
        """sign(w), int8 (out, in, taps)."""
        bits = self._bits()
        features = self.weight_shape[self.product.feature_dim]
        return self._unpacked(bits.bits, bits.fan_in).unflatten(1, (features, bits.fan_in // features))

    def _operand(self) -> Tensor:
        return self.written.weight(self._rows()) if self.form.stored_as_bits else self.weight_signs

    def binary_weight(self) -> Tensor:
        signs = ExportedProduct(self.written.kernel).weight(self._rows()).float()
        return signs.movedim(0, self.product.channel_dim) * self._weight_shaped(self.weight_scale.detach())

    def _frozen(self, x: Tensor) -> Tensor:
        product = self._product_of(x)
        if isinstance(product, ConvProduct) and x.dim() == len(product.stride) + 1:
            return self._frozen(x.unsqueeze(0)).squeeze(0)
        if self._is_grouped and not self._in_two_bits:
            y = self._by_groups(x, product)
        elif self._is_binary:
            threshold = self.activation_threshold
            threshold = None if threshold is None else product.per_feature(threshold, x)
            z = self.written.sums(x, threshold, self._operand(), product, self._pad_level() - self.activation_offset)
            y = self.written.scaled(z, self.scale, product)
        elif self._in_two_bits:
            y = self._by_two_bits(x)
        else:
            z = product(x, self._operand().float().movedim(0, product.channel_dim))
            y = z * product.per_channel(self.scale, z)
        return y if self.shift is None else y + product.per_channel(self.shift, y)

    def _by_groups(self, x: Tensor, product: Any) -> Tensor:
        weight = self._operand().float().movedim(0, product.channel_dim) * self._weight_shaped(self.weight_scale)
        if not self._is_binary:
            return product(x, weight)  # type: ignore[no-any-return]
        exact = torch.float32 if isinstance(product, ConvProduct) else torch.float64
        at = self.activation_threshold
        at = None if at is None else product.per_feature(at, x)
        codes = choice_above(x, at, self.activation_offset - 1, self.activation_offset + 1, exact)
        z = product(codes, weight.to(exact), self._pad_level()).float()
        return z * product.per_channel(self.scale, z)

    def _by_two_bits(self, x: Tensor) -> Tensor:
        table: Tensor = getattr(self, CODE_TABLE)
        blocks = -(-x.shape[-1] // BLOCK)
        bits = F.pad(self.weight_bits, (0, blocks * BLOCK // 8 - self.weight_bits.shape[1]))
        codes = F.embedding(bits.int(), table).flatten(1).unflatten(1, (blocks, BLOCK // 4))
        if self._is_grouped:
            scale = spread(self.weight_scale, self.stompp_config.group_size // BLOCK, blocks)
        else:
            scale = self.scale[:, None].expand(-1, blocks)
        return matmul_2_bits(x, codes, scale.contiguous())


class ExportedEmbedding(_Exported, PackedEmbedding):
    """A packed embedding, recorded: the bytes of a row are looked up first, and then their signs."""

    scale: Tensor

    def begin(self, form: Form) -> None:
        """Compute the rows' scales once."""
        self.register_buffer("scale", self._row_scales().detach(), persistent=False)

    def _frozen(self, x: Tensor) -> Tensor:
        rows = self._unpacked(F.embedding(x, self.weight_bits), self.embedding_dim)
        return rows.float() * self._spread(F.embedding(x, self.scale))

    def binary_weight(self) -> Tensor:
        return self._unpacked(self.weight_bits, self.embedding_dim).float() * self._spread(self.scale)


class ExportedAttention(PackedAttention):
    """Binary attention, recorded: the same sums as `binary_matmul`."""

    form: Form

    def _product(self, left: Operand, right: Operand, factor: Tensor | None = None) -> Tensor:
        if self.form.integers:
            codes, zero = unsigned_codes(left.u, left.threshold), int(1 - left.offset)
            if factor is not None:  # 0 or 1
                codes = torch.where(factor > 0.0, codes, torch.tensor(zero, dtype=torch.uint8))
            z = matmul_integer(codes, signed_codes(right.u, right.threshold), zero).float()
        else:
            codes = choice_above(left.u, left.threshold, left.offset - 1, left.offset + 1, torch.float32)
            codes = codes if factor is None else codes * factor
            z = codes.matmul(choice_above(right.u, right.threshold, -1, 1, torch.float32)).round()
        return z * (left.scale * right.scale)

    def _levels(self, operand: Operand) -> Tensor:
        low, high = operand.offset - 1, operand.offset + 1
        return choice_above(operand.u, operand.threshold, low, high, torch.float32) * operand.scale


def export_form(member: Member, form: Form) -> None:
    """Give a packed member, in place, the form to be recorded. There is no way back: do it to a copy."""
    changed: Any = member
    if isinstance(member, BinaryAttention):
        changed.__class__, changed.form = ExportedAttention, form
        return
    written = ExportedEmbedding if isinstance(member, PackedEmbedding) else ExportedLayer
    changed.__class__ = type(f"Exported{type(member).__name__}", (written, type(member)), {})
    changed.register_buffer(SIGN_TABLE, form.signs, persistent=False)
    changed.register_buffer(CODE_TABLE, form.codes, persistent=False)
    changed.begin(form)
