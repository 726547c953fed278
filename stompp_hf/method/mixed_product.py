"""The product of a layer in transition: its mixed operands are made again in the backward pass instead of kept.

They follow from the input, the latent weight, scales and masks, which are there anyway, in one pass each. Kept, a mixed
weight is as large as the weight; and layers that read one tensor (queries, keys and values) would each keep a mixed
input of their own, where this way they keep that one tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..integrations.torch import is_view
from .layer_product import Product
from .mixing import Edge, mix_activation, mix_weight
from .surrogates import Surrogate


@dataclass
class Mixture:
    """How the operands of a layer are mixed, apart from tensors.

    product: the layer's; edges: low and high of the activation, c of the weight; offset: 0.0 for the levels
    {-a, a}, 1.0 for {0, 2a}; pad: what stands around frozen channels of a convolution's padded input, in units of a (0
    around the others); surrogate: what frozen entries pass back; width: `surrogate_width`; over_weight: brings scales
    into a shape that broadcasts over the weight.
    """

    product: Product
    edges: tuple[Edge, Edge, Edge]
    offset: float
    pad: float
    surrogate: Surrogate
    width: float
    over_weight: Callable[[Tensor], Tensor]

    def operands(
        self, x: Tensor, real: Tensor | None, weight: Tensor, weight_scale: Tensor, weight_mask_bits: Tensor,
        scale: Tensor | None, threshold: Tensor | None, mask: Tensor | None,
    ) -> tuple[Product, Tensor, Tensor]:  # fmt: skip
        """What multiplies them, x' and w', with gradients; x itself in place of x' where it has no scale."""
        product, (low, high, clip), level = self.product, self.edges, None
        mixed_weight = mix_weight(weight, self.over_weight(weight_scale), weight_mask_bits, clip, self.surrogate)
        if scale is not None and mask is not None:
            x = x.to(weight.dtype)  # here: what is kept is x as it came
            at = None if threshold is None else product.per_feature(threshold, x)
            x = mix_activation(x, scale, at, mask, low, high, self.offset, self.surrogate, real, self.width)
            level = scale * self.pad * mask if self.pad else None
        return *product.ready(x, level), mixed_weight


class _MixedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixture: Mixture, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*tensors)
        ctx.mixture = mixture
        product, x, weight = mixture.operands(*(None if t is None else t.detach() for t in tensors))  # type: ignore[arg-type]
        y: Tensor = product(x, weight)
        return y.clone() if is_view(y) else y  # of one sample: what comes next may add to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        with torch.enable_grad():
            tensors = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(saved, needs, strict=True)]
            product, *operands = ctx.mixture.operands(*tensors)
        wanted = [operand.requires_grad for operand in operands]
        # Autocast rounds both operands; the type of the output says to what.
        found = product.gradients(grad, *(operand.detach().to(grad.dtype) for operand in operands), wanted)
        ends = [(end, g.to(end.dtype)) for end, g in zip(operands, found, strict=True) if end.requires_grad]
        begins = [t for t in tensors if t is not None and t.requires_grad]
        outer, inner = zip(*ends, strict=True)
        grads = iter(torch.autograd.grad(outer, begins, inner, allow_unused=True))
        return None, *(next(grads) if own else None for own in needs)


def mixed_product(mixture: Mixture, *tensors: Tensor | None) -> Tensor:
    """y = product(x', w') of a layer in transition, without bias.

    Forward:  x' = `mix_activation(x)`, or x where the input stays real; w' = `mix_weight(w)`
    Backward: dL/dx' and dL/dw' by the product's own gradients, from there as the mixes say
    Source:   this library's choice. A compiled graph keeps or makes again what its compiler thinks best.

    Args:
        mixture: how.
        tensors: x, f(x) for an absorbed activation f, w, s, the weight's mask as bits, a, b, and the input's mask; None
            for what is not there.
    """
    if not torch.compiler.is_compiling():
        return kernels.apply(_MixedProduct, mixture, *tensors)  # type: ignore[no-any-return]
    product, x, weight = mixture.operands(*tensors)  # type: ignore[arg-type]
    return product(x, weight)
