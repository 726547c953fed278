"""The bilinear product of a layer, apart from its bias: what a binary layer needs to know about its plain class.

A later layer class (a convolution, a packed layer) joins with a `Product` of its own; the frozen path and the mixes
are written once, against this interface.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Route
from .sign_bits import SignBits

Affine = tuple[Tensor | None, Tensor | None]
"""scale and shift, one an output channel or a single one; None for 1 and 0."""


def affine(
    weight_scale: Tensor, activation_scale: Tensor | None, bias: Tensor | None, row_sums: Tensor | None, offset: float
) -> tuple[Tensor, Tensor | None]:
    """What follows the product of a frozen layer, y = scale * z + shift: s * a, and bias + s * a * offset * row_sums.

    In this order of operations, everywhere. Each is (out,) or (1,); row_sums is None where the offset is 0.
    """
    scale = weight_scale if activation_scale is None else weight_scale * activation_scale
    if row_sums is None:
        return scale, bias
    own = scale * (row_sums * offset)
    return scale, own if bias is None else bias + own


class Product(Protocol):
    """z = product(x, w), its two gradients, and where channels and features are."""

    channel_dim: int
    """Dimension of the weight that holds the output channels."""
    feature_dim: int
    """Dimension of the weight that holds the input features (those of one group, for a convolution)."""
    groups: int
    """Number of groups of a convolution; 1 for everything else."""

    def features(self, weight: Tensor | SignBits) -> int:
        """Number of input features (channels, for a convolution)."""

    def __call__(self, x: Tensor, weight: Tensor, pad: float = 0.0) -> Tensor:
        """z, without bias; `pad` is what stands around x where the layer pads with a constant."""

    def route(self, x: Tensor, bits: SignBits, *others: Tensor | None) -> Route:
        """The way of this product (see `kernels.route`)."""

    def by_kernel(
        self, x: Tensor, threshold: Tensor | None, bits: SignBits, affine: "Affine", dtype: torch.dtype, pad: float,
        way: Route | None = None,
    ) -> Tensor | None:  # fmt: skip
        """scale * product(sign(x - b), sign(w)) + shift by a kernel, without a gradient; None where the way (None: ask
        `route`) is another, or where torch is to say what is wrong with the shape of x."""

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """dL/dx from dL/dz, for an x of `shape`."""

    def grad_weight(self, grad: Tensor, x: Tensor, shape: torch.Size, pad: float = 0.0) -> Tensor:
        """dL/dw from dL/dz, for a weight of `shape`."""

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> Sequence[Tensor | None]:
        """dL/dx and dL/dw, each if wanted, bit for bit as autograd makes them; of what `ready` gave."""

    def ready(self, x: Tensor, level: Tensor | None = None) -> tuple["Product", Tensor]:
        """x with the padding that the operation cannot make itself, and the product of what is given: itself, or one
        that pads no more; `level`, one a channel, is what stands in the padding (0 without)."""

    def rows(self, x: Tensor) -> Tensor:
        """x as (positions, features)."""

    def places(self, x: Tensor) -> torch.Size:
        """Shape of the positions: that of x without its features."""

    def per_channel(self, values: Tensor, z: Tensor) -> Tensor:
        """`values`, one an output channel (or a single one), in a shape that broadcasts over z."""

    def per_feature(self, values: Tensor, x: Tensor) -> Tensor:
        """`values`, one an input feature (or a single one), in a shape that broadcasts over x."""

    def channel_sums(self, z: Tensor) -> Tensor:
        """Sum of z over everything but its output channels, (out,)."""

    def feature_sums(self, x: Tensor) -> Tensor:
        """Sum of x over everything but its input features, (in,)."""


class LinearProduct:
    """nn.Linear: z = x @ w.T, with w of shape (out_features, in_features)."""

    channel_dim = 0
    feature_dim = 1
    groups = 1

    def features(self, weight: Tensor | SignBits) -> int:
        return weight.shape[self.feature_dim]

    def __call__(self, x: Tensor, weight: Tensor, pad: float = 0.0) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    def route(self, x: Tensor, bits: SignBits, *others: Tensor | None) -> Route:
        return kernels.route(x, bits.bits, *others, fan_in=self.features(bits), triton=True)

    def by_kernel(
        self, x: Tensor, threshold: Tensor | None, bits: SignBits, affine: Affine, dtype: torch.dtype, pad: float,
        way: Route | None = None,
    ) -> Tensor | None:  # fmt: skip
        way = self.route(x, bits, threshold, *affine) if way is None else way
        call = {Route.NATIVE: kernels.linear, Route.TRITON: kernels.gpu.linear}.get(way)
        if call is None or x.shape[-1:] != (self.features(bits),):
            return None
        return call(x, threshold, bits.bits, *affine, dtype)

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return grad.matmul(weight)

    def grad_weight(self, grad: Tensor, x: Tensor, shape: torch.Size, pad: float = 0.0) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).t().mm(x.reshape(-1, x.shape[-1]))

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> list[Tensor | None]:
        rows = grad.reshape(-1, grad.shape[-1])  # a matrix as it lies: matmul may take another sum for a transposed one
        of_x = self.grad_input(rows, weight, x.shape).reshape(x.shape) if wanted[0] else None
        return [of_x, self.grad_weight(grad, x, weight.shape) if wanted[1] else None]

    def ready(self, x: Tensor, level: Tensor | None = None) -> tuple[Product, Tensor]:
        return self, x

    def per_channel(self, values: Tensor, z: Tensor) -> Tensor:
        return values

    per_feature = per_channel  # both come last

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def places(self, x: Tensor) -> torch.Size:
        return x.shape[:-1]

    def channel_sums(self, z: Tensor) -> Tensor:
        return self.rows(z).sum(0)

    feature_sums = channel_sums


class TransposedLinearProduct(LinearProduct):
    """transformers' Conv1D: z = x @ w, with w of shape (in_features, out_features)."""

    channel_dim = 1
    feature_dim = 0

    def __call__(self, x: Tensor, weight: Tensor, pad: float = 0.0) -> Tensor:
        return x.matmul(weight)

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return grad.matmul(weight.t())

    def grad_weight(self, grad: Tensor, x: Tensor, shape: torch.Size, pad: float = 0.0) -> Tensor:
        return x.reshape(-1, x.shape[-1]).t().mm(grad.reshape(-1, grad.shape[-1]))
