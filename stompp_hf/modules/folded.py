"""BatchNorms whose affine map a packed layer computes: they pass their input on."""

from typing import Any

from torch import Tensor, nn

from ..errors import PackingError
from .activations import Changed


class FoldedBatchNorm(Changed):
    """A BatchNorm that was folded into the layer before it; its own tensors stay, for `restore` and for saving."""

    training: bool

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        if self.training:
            raise PackingError(
                f"this {self.plain_class.__name__} was folded by fuse_for_inference and cannot train: call "
                "model.eval(), or stompp_hf.unfuse(model) first."
            )
        return input


class FoldedBatchNorm1d(FoldedBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d, folded."""

    plain_class = nn.BatchNorm1d


class FoldedBatchNorm2d(FoldedBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d, folded."""

    plain_class = nn.BatchNorm2d


class FoldedBatchNorm3d(FoldedBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d, folded."""

    plain_class = nn.BatchNorm3d


FOLDED: dict[type[nn.Module], Any] = {
    cls.plain_class: cls for cls in (FoldedBatchNorm1d, FoldedBatchNorm2d, FoldedBatchNorm3d)
}
