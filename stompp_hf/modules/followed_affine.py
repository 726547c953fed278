"""What the scale and shift of a packed layer, y = scale * z + shift, were made of."""

from typing import Any

import torch
from torch import Tensor

from ..integrations.torch import Seen, buffers_of, is_watched, parameters_of
from ..kernels import countable

Sources = tuple[tuple[dict[str, Any], str, Tensor | None, Seen | None], ...]
"""Where each tensor is kept, its name there, the tensor, and as what it was seen."""


class FollowedAffine:
    """Keeps a layer's `fused_scale` and `fused_shift` true to the tensors that they are made of.

    Whatever changes those (a checkpoint, an optimizer, a swap of `.data`, another tensor in their place), the next call
    sees it and makes scale and shift anew. A copy looks at its own tensors. A compiled or exported graph holds what the
    last eager call saw, or `load_state_dict` brought.
    Source: this library's choice.
    """

    def __init__(self) -> None:
        self.seen: Sources | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    # ---- what they are made of ----

    def make(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Scale and shift of a layer as it is."""
        return layer.scale_and_shift()  # type: ignore[no-any-return]

    def sources(self, layer: Any) -> list[tuple[Any, str]]:
        """The modules and names of the tensors that they follow from."""
        of = [(layer, name) for name in ("weight_scale", "activation_scale", "bias")]
        return [*of, (layer, "weight_bits")] if layer.activation_offset else of

    def entering(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the signs are taken of, and their thresholds; called after `affine`."""
        return x, layer.activation_threshold

    def check(self, layer: Any, scale: Tensor, shift: Tensor | None) -> None:
        """Raise PackingError where new values must not stand in for the old ones."""

    def begin(self, layer: Any) -> None:
        """The layer is fused: add what else it needs."""

    # ---- keeping them ----

    def affine(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Scale and shift of a layer as it is now.

        Raises:
            PackingError: see `check`.
        """
        if torch.compiler.is_compiling():
            return (layer.fused_scale, layer.fused_shift) if self.seen is not None else self.make(layer)
        if not self.is_fresh():
            found = self.made(layer)
            if is_watched():  # maybe by tensors that are gone when nobody listens any more
                return found
            self._take(layer, *found)
        return layer.fused_scale, layer.fused_shift

    def made(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Scale and shift of a layer: new tensors, without a gradient."""
        with torch.inference_mode(False), torch.no_grad():
            scale, shift = self.make(layer)
            return scale.clone(), None if shift is None else shift.clone()

    def is_fresh(self) -> bool:
        """Whether no tensor has changed."""
        return self.seen is not None and all(
            home.get(name) is tensor and (tensor is None or was is None or was.is_still(tensor))
            for home, name, tensor, was in self.seen
        )

    def is_known(self) -> bool:
        """Whether the layer's values are of its tensors as they are; in a graph, as the last eager call saw them."""
        return self.seen is not None if torch.compiler.is_compiling() else self.is_fresh()

    def _take(self, layer: Any, scale: Tensor, shift: Tensor | None) -> None:
        known = hasattr(layer, "fused_scale")
        if not (known and _equal(scale, layer.fused_scale) and _equal(shift, layer.fused_shift)):
            self.check(layer, scale, shift)
            layer.fused_scale, layer.fused_shift = scale, shift
        self.look(layer)

    def look(self, layer: Any) -> None:
        """Take the tensors as they are now for what scale and shift were made of."""
        of = self.sources(layer)
        for module in {id(module): module for module, _ in of}.values():
            for home in (buffers_of(module), parameters_of(module)):
                home.update({name: countable(tensor) for name, tensor in home.items()})
        seen = []
        for module, name in of:
            home = buffers_of(module) if name in buffers_of(module) else parameters_of(module)
            seen.append((home, name, home[name], None if home[name] is None else Seen(home[name])))
        self.seen = tuple(seen)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype is b.dtype and a.device == b.device and torch.equal(a, b)
