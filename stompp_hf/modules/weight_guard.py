"""A frozen layer's weight is nobody else's to replace: what counts of it are its signs, beside a scale of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightError
from ..integrations.torch import parameters_of
from .converted import Converted


class KeptWeight(Converted):
    """A layer that refuses, once it has frozen entries, to have its weight replaced by another one or taken away.

    Tools that look for nn.Linear read `.weight` as if it were what the layer computes with: they fold a BatchNorm into
    it (fuse_conv_bn_eval), or make a real layer of it and throw this one away (optimum-quanto). Both end here.

    Raises:
        WeightError: see above. Loading a state dict, and writing into the weight, are no replacement.
    """

    _is_loading = False

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        own = parameters_of(self).get(name)
        if own is not None and own is not param and not (own.is_meta or self._is_loading):
            taken = param is None and name in ("weight", *self.own_names)
            replaced = param is not None and name == "weight" and not _equal(own, param)
            if (taken or replaced) and getattr(self, "has_frozen", False):
                raise WeightError(_refusal(self, name, "taken away from" if taken else "replaced in"))
        if name == "weight" and own is None and isinstance(getattr(type(self), name, None), property):
            raise WeightError(_refusal(self, name, "replaced in"))  # packed: there is none
        super().register_parameter(name, param)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._is_loading = True
        try:
            super()._load_from_state_dict(*args)
        finally:
            del self._is_loading


def _equal(own: Tensor, other: Tensor) -> bool:
    """Whether another parameter is the same weight, on another device perhaps."""
    plain = type(other) is nn.Parameter and other.shape == own.shape and not other.is_meta
    return plain and torch.equal(own.detach().to(other.device, other.dtype), other.detach())


def _refusal(layer: Any, name: str, what: str) -> str:
    return (
        f"{name} was to be {what} a frozen {type(layer).__name__}. It computes with the signs of its weight and a "
        "scale: whatever reads the weight as a real layer's (to fuse, to quantize, to convert) would compute something "
        "else. To fold BatchNorms: pack_model(model), then fuse_for_inference(model, batch); for a real model: "
        "restore_model(model) first; for other latents: write them, layer.weight.data.copy_(...)."
    )
