"""Fused layers: packed layers that compute y = scale * product(sign(x - b), sign(w)) + shift, for inference alone.

A packed layer is fused in place (its `__class__` changes), as it was packed, and so it is undone.
"""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ..errors import PackingError
from ..integrations.accelerate import rebind_forward
from ..integrations.torch import buffers_of, has_tangent
from ..method.layer_product import LinearProduct
from ..method.packed_product import packed_forward, packed_real_forward, packed_reference
from ..modules.followed_affine import FollowedAffine
from ..modules.packed import PackedLayer
from ..modules.prechecked_linear import StraightForward
from ..modules.runtime_classes import Made, made_class, name_for
from ..modules.stage_member import Member
from ..modules.subclasses import class_for, forward_of


class FusedLayer(PackedLayer):
    """A packed layer, frozen for good, in which one scale and one shift follow the product.

    Forward:  y = scale * product(sign(x - b), sign(w)) + shift, bit for bit what the packed layer computes, unless a
              BatchNorm is in them; with real inputs, sums may be in another order
    Backward: none.
    Tensors:  fused_scale, fused_shift, which no checkpoint holds, in float32, one an output channel or one.
    Source:   this library's choice.

    Raises:
        PackingError: a gradient is wanted.
    """

    fused: FollowedAffine
    is_for_inference = True

    def unfuse(self) -> None:
        super().unfuse()
        layer: Any = self
        if "fused_cut" in buffers_of(layer):
            del layer.fused_cut
        layer.__class__ = type(self).packed_class  # type: ignore[attr-defined]
        rebind_forward(layer)

    def unpack(self) -> Member:
        layer: Any = self
        layer.unfuse()  # it is of its packed class now
        return layer.unpack()  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        # It is in one state for good, and the quickest layers are not to ask for it.
        return self._frozen(input) if self.observer is None else super().forward(input)

    def _frozen(self, x: Tensor) -> Tensor:
        scale, shift = self.fused.affine(self)
        if (x.requires_grad and torch.is_grad_enabled()) or has_tangent(x):
            raise PackingError(
                f"{type(self).__name__} is fused for inference and gives no gradient: call it under torch.no_grad(), "
                "or stompp_hf.unfuse(model) first."
            )
        x, threshold = self.fused.entering(self, x)
        bits, (dtype, product, pad), kind = self._bits(), self._kind(x), x.device.type
        real, wide = self.activation_scale is None, scale.dtype == torch.float64
        mixed = not x.is_meta and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if mixed else contextlib.nullcontext():
            if real and not wide:
                return packed_real_forward(x, bits, scale, shift, dtype, product)
            if not wide:
                y = packed_forward(x, threshold, bits, (scale, shift), dtype, product, pad)
                if y is not None:
                    return y
            return packed_reference(x, threshold, not real, bits, (scale, shift), dtype, product, pad)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.fused.seen = None


class FusedLinearLayer(StraightForward, FusedLayer):
    """A fused layer of rows of features. In eager mode, it computes without a detour."""


def fuse(layer: Any, scale: Tensor, shift: Tensor | None, following: FollowedAffine | None = None) -> None:
    """Turn a packed layer into its fused class, in place, with scale and shift that `following` made."""
    cls = type(layer)
    for name, value in (("fused_scale", scale), ("fused_shift", shift)):
        layer.__dict__.pop(name, None)  # where an evaluation left one
        layer.register_buffer(name, None if value is None else value.detach().clone(), persistent=False)
    layer.__class__ = fused_class(*(cls.made_from if issubclass(cls, Made) else (cls, cls.plain_class)))
    layer.fused = FollowedAffine() if following is None else following
    layer.fused.begin(layer)
    layer.fused.look(layer)
    rebind_forward(layer)


def fused_class(kind: Any, plain: type) -> Any:
    """The fused class of the packed class `kind`, or of the one that `class_for` made of it for a subclass."""
    packed = kind if plain is kind.plain_class else class_for(kind, plain)
    fused = FusedLinearLayer if isinstance(kind.product, LinearProduct) else FusedLayer
    own: dict[str, Any] = {"packed_class": packed}
    if "input" not in inspect.signature(packed.forward).parameters:
        own["forward"] = forward_of(fused)  # the layer has another name for its input
    name = name_for(kind, plain).replace("Packed", "Fused")
    return made_class(fused_class, kind, plain, name, (fused, packed), **own)
