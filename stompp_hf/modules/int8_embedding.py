"""Int8Embedding: a real table stored as whole numbers, a byte each; only the rows that are asked for become floats."""

from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers import mark_initialized
from .converted import Converted

HALF = (torch.float16, torch.bfloat16)
LARGEST = 127


class Int8Embedding(Converted, nn.Embedding):
    """An nn.Embedding whose rows are whole numbers times a step, fixed: it has no parameter.

    Forward:  step[x] * q[x], with step = max|w| / 127 of a row and q = round(w / step)
    Shape and dtype: ids of any shape, to (*ids, embedding_dim) in the dtype that the table had.
    Tensors: weight_int8 int8 (rows, dim); weight_step float32 (rows, 1), in half precision too. `weight`, read-only, is
    made on the fly.
    Source: this library's choice.
    """

    own_names = ("weight_int8", "weight_step")
    weight_int8: Tensor
    weight_step: Tensor
    output_dtype: torch.dtype

    @classmethod
    def convert(cls, module: nn.Embedding) -> "Int8Embedding":
        """Turn an nn.Embedding into this class, in place, and return it."""
        table: Any = module
        weight = table.weight.detach()
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        step = weight.to(exact).abs().amax(1, keepdim=True) / LARGEST
        numbers = (weight / step.clamp_min(torch.finfo(exact).tiny)).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        del table.weight
        table.__class__ = cls
        table.output_dtype = weight.dtype
        table.register_buffer("weight_int8", numbers)
        table.register_buffer("weight_step", step)
        mark_initialized(table)  # init_weights() would look at its weight
        return table  # type: ignore[no-any-return]

    def restore(self) -> nn.Embedding:
        """Turn it back into an nn.Embedding, in place, with the rows that it computes, in the dtype of the step."""
        weight = self.weight_int8 * self.weight_step
        plain: Any = self
        for name in (*self.own_names, "output_dtype"):
            delattr(plain, name)
        plain.__class__ = nn.Embedding
        plain.weight = nn.Parameter(weight)
        return plain  # type: ignore[no-any-return]

    weight: Any = property(lambda self: self.rows(slice(None)), doc="step * q, read-only: a new tensor at each call.")

    def rows(self, x: Any) -> Tensor:
        """The rows of these indices."""
        return (self.weight_int8[x] * self.weight_step[x]).to(self.output_dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        step = self.weight_step
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device=step.device)).dtype
        result = super()._apply(fn, recurse)
        if self.weight_step.dtype in HALF:
            self.weight_step = step.to(self.weight_step.device)
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"
