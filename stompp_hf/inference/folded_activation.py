"""Activations whose output is only cut into signs: the layers behind cut their input, and they pass it on."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PackingError
from ..method.mixing import hard_above
from ..modules.activations import DROPPABLE, Changed, changed_classes
from ..modules.followed_affine import FollowedAffine


class FoldedActivation(Changed):
    """A GELU or the like, which the layers behind it make part of their thresholds."""

    def unfuse(self) -> None:
        self.restore()

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        return input


FOLDED = changed_classes(FoldedActivation, "Folded", DROPPABLE)

TOLERANCE = 8 * torch.finfo(torch.float32).eps
"""How near to its threshold an activation's value is where its sign may differ, in parts of the numbers' sizes."""
LARGEST = torch.finfo(torch.float32).max
_FAR = torch.logspace(1.3, 38, 32)
GRID = torch.cat((torch.linspace(-16.0, 16.0, 257), _FAR, -_FAR))
"""Numbers at which every threshold is proven."""
VALUES_AT_ONCE = 2**22


class FollowedActivation(FollowedAffine):
    """Scale and shift of a layer, and where it cuts its input u instead of f(u), for the activation f before it.

    Forward:  sign(f(u) - b) = sign(max(u - high, low - u)), for an f that falls, and then rises: GELU, SiLU, Mish. In
              float32; an input of another dtype goes through f.
    Tensors:  fused_cut (2, features) float32, high and low, of the layer; no checkpoint holds it.
    Source:   this library's choice.
    """

    def __init__(self, activation: Any, affine: FollowedAffine) -> None:
        super().__init__()
        self.activation, self.other = activation, affine

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.activation, self.other)

    def make(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        return self.other.make(layer)

    def sources(self, layer: Any) -> list[tuple[Any, str]]:
        own = [] if layer.activation_threshold is None else [(layer, "activation_threshold")]
        return [*self.other.sources(layer), *own]

    def check(self, layer: Any, scale: Tensor, shift: Tensor | None) -> None:
        self.other.check(layer, scale, shift)

    def begin(self, layer: Any) -> None:
        layer.register_buffer("fused_cut", cut_of(self.activation, layer), persistent=False)

    def _take(self, layer: Any, scale: Tensor, shift: Tensor | None) -> None:
        with torch.inference_mode(False), torch.no_grad():
            cut = cut_of(self.activation, layer)
        if cut is None:
            raise PackingError(
                f"{type(layer).__name__}: with its thresholds of now, the {self.activation.plain_class.__name__} "
                "before it is no part of them: stompp_hf.unfuse(model), then stompp_hf.fuse_for_inference(model) again."
            )
        if not torch.equal(cut, layer.fused_cut):
            layer.fused_cut = cut
        super()._take(layer, scale, shift)

    def entering(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if x.dtype is not torch.float32 or not self.is_known():
            return _plain(self.activation, x), layer.activation_threshold
        cut = layer.fused_cut
        return torch.maximum(x - cut[0], cut[1] - x), None


def fits(module: nn.Module) -> bool:
    """Whether a module is an activation that layers behind it could cut for."""
    return type(module) in FOLDED and not getattr(module, "inplace", False)


def _plain(activation: Any, x: Tensor) -> Tensor:
    """What an activation computes, folded or not."""
    return getattr(activation, "plain_class", type(activation)).forward(activation, x)  # type: ignore[no-any-return]


def cut_of(activation: Any, layer: Any) -> Tensor | None:
    """Where a layer cuts u for the signs of f(u) - b: high and low, (2, features) float32; None where that is not so.

    Thresholds are found by bisection of torch's own f, whose rounding is in them. They are proven at `GRID` and beside
    themselves: signs are those of f(u) - b unless f(u) is within `TOLERANCE` of b, in parts of |u| and |b|.
    """
    b = layer.activation_threshold
    features = layer.product.features(layer._bits())
    b = layer.weight_scale.new_zeros(features, dtype=torch.float32) if b is None else b.detach().float()
    grid = GRID.to(b.device)
    values = _plain(activation, grid)
    if b.is_meta or not bool(values.isfinite().all() & b.isfinite().all()):
        return None
    near = grid[values.argmin()] + torch.linspace(-0.125, 0.125, 1025, device=b.device)
    bottom = near[_plain(activation, near).argmin()]

    def is_above(u: Tensor) -> Tensor:
        return hard_above(_plain(activation, u), b) > 0

    cut = torch.stack((_edge(is_above, bottom, LARGEST, b), _edge(is_above, bottom, -LARGEST, b)))
    cut = torch.where(cut == 0.0, cut.new_tensor([[-0.0], [0.0]]), cut)  # so that no difference is -0
    return cut if _is_cut_well(activation, cut, b, grid) else None


def _edge(is_above: Any, bottom: Tensor, end: float, b: Tensor) -> Tensor:
    """The number nearest to the bottom, towards `end`, from which on f is above; infinite where there is none."""
    inside, outside = _order(bottom).expand_as(b).clone(), _order(b.new_tensor(end)).expand_as(b).clone()
    for _ in range(33):
        middle = torch.div(inside + outside, 2, rounding_mode="floor")
        above = is_above(_number(middle))
        outside, inside = torch.where(above, middle, outside), torch.where(above, inside, middle)
    found = torch.where(is_above(bottom.expand_as(b)), bottom, _number(outside))
    return torch.where(is_above(b.new_tensor(end).expand_as(b)), found, b.new_tensor(end) * 2)


def _order(x: Tensor) -> Tensor:
    """Whole numbers in the order of float32 numbers, one after another."""
    whole = x.view(torch.int32).long()
    return torch.where(whole < 0, -(whole + 2**31), whole)


def _number(order: Tensor) -> Tensor:
    """The number of an order."""
    return torch.where(order < 0, -order - 2**31, order).int().view(torch.float32)


def _is_cut_well(activation: Any, cut: Tensor, b: Tensor, grid: Tensor) -> bool:
    beside = [torch.nextafter(cut, cut.new_tensor(end)) for end in (-LARGEST, LARGEST)]
    own = torch.cat((cut, *beside)).clamp(-LARGEST, LARGEST)
    step = max(1, VALUES_AT_ONCE // (len(grid) + len(own)))
    for some in torch.arange(len(b), device=b.device).split(step):
        u = torch.cat((grid[:, None].expand(-1, len(some)), own[:, some]))
        f, (high, low), at = _plain(activation, u), cut[:, some], b[some]
        differs = hard_above(f, at) != hard_above(torch.maximum(u - high, low - u), None)
        if not bool((~differs | ((f - at).abs() <= TOLERANCE * (u.abs() + at.abs()))).all()):
            return False
    return True
