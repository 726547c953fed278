"""BatchNorms whose affine map a packed layer computes: they pass their input on."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PackingError
from ..modules.activations import Changed, changed_classes
from ..modules.followed_affine import FollowedAffine


class FoldedBatchNorm(Changed):
    """A BatchNorm that was folded into the layer before it; its own tensors stay, for `restore` and for saving."""

    training: bool

    def unfuse(self) -> None:
        self.restore()

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        if self.training:
            raise PackingError(
                f"this {self.plain_class.__name__} was folded by fuse_for_inference and cannot train: call "
                "model.eval(), or stompp_hf.unfuse(model) first."
            )
        return input


FOLDED = changed_classes(FoldedBatchNorm, "Folded", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))

TOLERANCE = 8 * torch.finfo(torch.float32).eps
"""By how much a folded BatchNorm may differ, in parts of the sum of the sizes of its terms."""
VALUES_AT_ONCE = 2**22


class FollowedBatchNorm(FollowedAffine):
    """Scale and shift of a layer with a BatchNorm in them: they follow its tensors, too."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.norm,)

    def make(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        scale, shift = layer.scale_and_shift()
        return fold(scale, shift, self.norm)

    def sources(self, layer: Any) -> list[tuple[Any, str]]:
        own = [(self.norm, name) for name in ("running_mean", "running_var", "weight", "bias")]
        return [*super().sources(layer), *own]

    def check(self, layer: Any, scale: Tensor, shift: Tensor | None) -> None:
        if not is_folded_well(layer, scale, shift, self.norm):
            raise PackingError(
                f"{type(layer).__name__}: the {type(self.norm).__name__} in it has other values now, which round "
                "too differently: stompp_hf.unfuse(model), then stompp_hf.fuse_for_inference(model) again."
            )


def fold(scale: Tensor, shift: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift with a BatchNorm in them, in the dtype of the scale."""
    own = torch.zeros_like(scale) if shift is None else shift
    factor, offset = _affine_of(norm)
    shifts = (own.double() - norm.running_mean.double()) * factor + offset
    return (scale.double() * factor).to(scale.dtype), shifts.to(scale.dtype)


def _affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.double()
    return factor, torch.zeros_like(factor) if norm.bias is None else norm.bias.double()


def is_folded_well(layer: Any, scales: Tensor, shifts: Tensor | None, norm: Any) -> bool:
    """Whether folded scales and shifts give what the layer and its BatchNorm give, for every sum that there can be."""
    scale, shift = layer.scale_and_shift()
    own = torch.zeros_like(scale) if shift is None else shift
    factor, offset = _affine_of(norm)
    every = layer._bits().fan_in
    z = torch.arange(-every, every + 1, dtype=torch.float32, device=scales.device)
    step = max(1, VALUES_AT_ONCE // len(z))
    for channels in torch.arange(len(scales)).split(step):
        s, t = ((value if value.numel() == 1 else value[channels]).float() for value in (scale, own))
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, var, weight, bias = (None if value is None else value[channels].float() for value in tensors)
        before = z[:, None] * s + t
        after = torch.nn.functional.batch_norm(before, mean, var, weight, bias, False, 0.0, norm.eps)
        terms = z[:, None].abs() * s.abs() + t.abs() + norm.running_mean[channels].abs()
        sizes = terms * factor[channels].float().abs() + offset[channels].float().abs()
        found = z[:, None] * scales[channels] + shifts[channels]  # type: ignore[index]
        if not bool(((found - after).abs() <= TOLERANCE * sizes).all()):  # also where anything is NaN
            return False
    return True
