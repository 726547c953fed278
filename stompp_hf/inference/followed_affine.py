"""What the scale and shift of a fused layer, y = scale * z + shift, were made of."""

from typing import Any

import torch
from torch import Tensor

from ..errors import PackingError
from ..integrations.torch import Seen, buffers_of, is_watched, parameters_of
from ..kernels import countable
from .folded_batchnorm import fold, is_folded_well

Sources = tuple[tuple[dict[str, Any], str, Tensor | None, Seen | None], ...]
"""Where each tensor is kept, its name there, the tensor, and as what it was seen."""


class FollowedAffine:
    """Keeps a fused layer's scale and shift true to the tensors that they are made of.

    Those are the layer's own, and those of a BatchNorm that was folded into it. Whatever changes them (a checkpoint, an
    optimizer, a swap of `.data`, another tensor in their place), the next call sees it and makes scale and shift anew:
    a fused layer computes what the packed one does. A copy looks at its own tensors. A compiled or exported graph holds
    what the last eager call saw, or `load_state_dict` brought.
    Source: this library's choice.
    """

    def __init__(self, norm: Any = None) -> None:
        self.norm = norm
        self.seen: Sources | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FollowedAffine, (self.norm,)

    def affine(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Scale and shift of a layer as it is now.

        Raises:
            PackingError: a BatchNorm cannot be folded any more.
        """
        if torch.compiler.is_compiling():
            return (layer.fused_scale, layer.fused_shift) if self.seen is not None else _made(layer, self.norm)
        if not self.is_fresh():
            found = made(layer, self.norm)
            if is_watched():  # maybe by tensors that are gone when nobody listens any more
                return found
            self._take(layer, *found)
        return layer.fused_scale, layer.fused_shift

    def is_fresh(self) -> bool:
        """Whether no tensor has changed."""
        return self.seen is not None and all(
            home.get(name) is tensor and (tensor is None or was is None or was.is_still(tensor))
            for home, name, tensor, was in self.seen
        )

    def _take(self, layer: Any, scale: Tensor, shift: Tensor | None) -> None:
        if not (_equal(scale, layer.fused_scale) and _equal(shift, layer.fused_shift)):
            if self.norm is not None and not is_folded_well(layer, scale, shift, self.norm):
                raise PackingError(
                    f"{type(layer).__name__}: the {type(self.norm).__name__} in it has other values now, which round "
                    "too differently: stompp_hf.unfuse(model), then stompp_hf.fuse_for_inference(model) again."
                )
            layer.fused_scale, layer.fused_shift = scale, shift
        self.look(layer)

    def look(self, layer: Any) -> None:
        """Take the tensors as they are now for what scale and shift were made of."""
        of = [(layer, name) for name in ("weight_scale", "activation_scale", "bias")]
        if layer.activation_offset:
            of.append((layer, "weight_bits"))
        if self.norm is not None:
            of += [(self.norm, name) for name in ("running_mean", "running_var", "weight", "bias")]
        for module in (layer, self.norm) if self.norm is not None else (layer,):
            for home in (buffers_of(module), parameters_of(module)):
                home.update({name: countable(tensor) for name, tensor in home.items()})
        seen = []
        for module, name in of:
            home = buffers_of(module) if name in buffers_of(module) else parameters_of(module)
            seen.append((home, name, home[name], None if home[name] is None else Seen(home[name])))
        self.seen = tuple(seen)


def made(layer: Any, norm: Any = None) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of a layer, with a BatchNorm in them where there is one: new tensors, without a gradient."""
    with torch.inference_mode(False), torch.no_grad():
        scale, shift = _made(layer, norm)
        return scale.clone(), None if shift is None else shift.clone()


def _made(layer: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    scale, shift = layer.scale_and_shift()
    return (scale, shift) if norm is None else fold(scale, shift, norm)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype is b.dtype and a.device == b.device and torch.equal(a, b)
