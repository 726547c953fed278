"""BinaryEmbedding: nn.Embedding with binary rows. What enters it are indices, so it has no binary input."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import kernels
from ..config import StoMPPConfig
from ..method.layer_product import LinearProduct
from ..method.mask_bits import rows_of_mask
from ..method.mixing import hard, mix_weight, through_weight
from ..method.surrogates import Rule, Surrogate
from ..method.weight_scales import is_grouped, spread
from .binary_layer import BinaryLayer


class _FrozenRows(torch.autograd.Function):
    """s * sign(w) of each index; STE-free, the table gets an undefined gradient instead of one full of zeros."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, scale: Tensor, ids: Tensor, padding: int, clip: float | None, surrogate: Surrogate
    ) -> Tensor:
        ctx.save_for_backward(weight, ids, scale)
        ctx.padding, ctx.clip, ctx.surrogate = padding, clip, surrogate
        return hard(F.embedding(ids, weight)).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, ids, scale = ctx.saved_tensors
        grad_weight = grad_scale = None
        if ctx.needs_input_grad[0] and ctx.surrogate.passes:
            passed = grad
            if ctx.surrogate.weight is not Rule.EVERYTHING:
                passed = through_weight(ctx.surrogate, grad, F.embedding(ids, weight), scale, ctx.clip)
            grad_weight = torch.ops.aten.embedding_dense_backward(passed, ids, weight.shape[0], ctx.padding, False)
        if ctx.needs_input_grad[1]:
            grad_scale = hard(F.embedding(ids, weight)).mul_(grad).sum_to_size(scale.shape)
        return grad_weight, grad_scale, *[None] * 4


class BinaryEmbedding(BinaryLayer, nn.Embedding):
    """A table whose rows become binary entry by entry.

    Scales: one a row ("channel"), one for the table ("tensor"), or one for each group of entries of a row ("group").

    Forward, with w and s the row and the scale of each index: pending: w, the plain layer; in transition:
    `mix_weight(w)`; frozen: s * sign(w), exactly.
    Backward: as in `mix_weight`, summed over the indices that name a row. The row of padding_idx gets no gradient, nor
    does its scale, as in nn.Embedding; where it is all zeros it stays so (sign(0) = +1 would make padding a token like
    any other), else it becomes binary like the rest.
    Shape: ids of any shape, to (*ids, embedding_dim).
    Source: BiT and BiBERT binarize embeddings; the scales, and the rule for padding, are this library's choice.
    """

    plain_class = nn.Embedding
    product = LinearProduct()  # never multiplied with: it says that rows are channels
    padding_idx: int | None

    @classmethod
    def convert(cls, module: nn.Module, config: StoMPPConfig, *unused: Any) -> "BinaryLayer":
        """Turn an nn.Embedding into this class, in place, and return it."""
        if config.binary_activations:
            config = dataclasses.replace(config, binarize="weights", attention="keep")
        return super().convert(module, config)

    @staticmethod
    def unfit(module: nn.Module) -> str | None:
        """Why a module cannot be converted, or None."""
        if type(module) is not nn.Embedding:
            return f"{type(module).__name__} is no nn.Embedding (exact type only)"
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"its option {option} has no binary form"
        return None

    def _row_scales(self) -> Tensor:
        """s, (rows, 1) or (rows, groups); 0 for a padding row of zeros."""
        scales = self._learnt_scale()
        scales = scales if is_grouped(scales) else scales.expand(self.num_embeddings).unsqueeze(1)
        if self.padding_idx is None:
            return scales
        alive = torch.ones_like(scales)
        alive[self.padding_idx] = self.padding_row_lives().to(alive.dtype)
        return scales * alive

    def _spread(self, scales: Tensor) -> Tensor:
        """Scales of rows, to broadcast over these."""
        grouped = is_grouped(self.weight_scale)
        return spread(scales, self.stompp_config.group_size, self.embedding_dim) if grouped else scales

    def _scales_of(self, ids: Tensor) -> Tensor:
        """s of the rows that indices name, to broadcast over these."""
        return self._spread(F.embedding(ids, self._row_scales(), self.padding_idx))

    def padding_row_lives(self) -> Tensor:
        """Whether the padding row is not all zeros, as a boolean tensor of one element."""
        return (self.weight.detach()[self.padding_idx] != 0).any()

    def _unfrozen(self, x: Tensor) -> Tensor:
        clip = self.stompp_config.weight_clip if self.stompp_config.binary_weights else None
        rows: Tensor = nn.Embedding.forward(self, x)  # type: ignore[arg-type]
        rows = self.with_idle(rows)
        return rows if clip is None else F.hardtanh(rows, -clip, clip)

    def _in_transition(self, x: Tensor) -> Tensor:
        if self.weight_mask_bits is None:
            raise RuntimeError("an embedding in transition has no mask; its state is set by Progression.step(step)")
        return mix_weight(
            F.embedding(x, self.weight, self.padding_idx),
            self._scales_of(x),
            rows_of_mask(self.weight_mask_bits, self.weight.shape, x),
            self._edges_now()[2],
            self.surrogate,
        )

    def _frozen(self, x: Tensor) -> Tensor:
        scale = self._scales_of(x)
        padding = -1 if self.padding_idx is None else self.padding_idx
        arguments = (self.weight, scale, x, padding, self.weight_edge, self.surrogate)
        return kernels.apply(_FrozenRows, *arguments)  # type: ignore[no-any-return]

    def bits(self) -> tuple[list[int], list[int]]:
        return super().bits()[0], []  # it reads indices

    def packed_bytes(self, name: str, tensor: Tensor) -> int | None:
        size = super().packed_bytes(name, tensor)
        marks_padding = name == "weight" and self.padding_idx is not None  # a byte that says whether that row lives
        return size if size is None else size + marks_padding

    def binary_weight(self) -> Tensor:
        return hard(self.weight.detach()) * self._spread(self._row_scales().detach())
