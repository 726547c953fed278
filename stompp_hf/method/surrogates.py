"""Surrogate gradients: what frozen entries pass back, one small class each.

A surrogate of your own is one class, registered before a configuration names it:

    @register_surrogate("approx_sign")
    class ApproxSign(Surrogate):
        def of_activation(self, u, threshold, scale, low, high, width):
            v = u if threshold is None else u - threshold
            return (2.0 - 2.0 * (v / scale).abs()).clamp(min=0.0)

    StoMPPConfig(frozen_gradient="approx_sign")
"""

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from .mixing import Edge


class Rule(enum.Enum):
    """Factors k that compiled C knows."""

    NOTHING = "0"
    EVERYTHING = "1"
    INSIDE = "1[low < u < high], the gradient of the clip"
    NEAR = "1[|u - b| < width * |a|]"


class Surrogate:
    """k, with which a frozen entry passes a gradient g back, as k * g; never multiplied by the entry's scale.

    It has no state: one object serves every layer. Its functions run without autograd, and return k in a shape that
    broadcasts over u: numbers, booleans (kept for the backward pass, these take a bit an entry), or None for 1.
    """

    passes: bool = True
    """Whether frozen entries pass anything at all. If not (STE-free), they are held, and backward skips products."""
    weight: Rule | None = None
    activation: Rule | None = None
    """As what compiled C knows k; None: by the functions below, in plain torch."""
    reads_clip: bool = True
    """Whether k depends on the clip's edges."""

    def of_weight(self, weight: "Tensor", scale: "Tensor", clip: "Edge") -> "Tensor | None":
        """k of a weight with the scale s and the clip c (None: not clipped)."""
        return None

    def of_activation(
        self, u: "Tensor", threshold: "Tensor | None", scale: "Tensor", low: "Edge", high: "Edge", width: float
    ) -> "Tensor | None":
        """k of what enters a layer, with threshold b (None: 0), scale a, its clip, and `surrogate_width`."""
        return None


SURROGATES: dict[str, Surrogate] = {}
"""Surrogates by the names that `StoMPPConfig(frozen_gradient=...)` takes."""


def register_surrogate(name: str) -> Callable[[type[Surrogate]], type[Surrogate]]:
    """Class decorator: add a surrogate under a name. Defining the same class once more replaces it.

    Raises:
        ConfigError: the name is that of another class.
    """

    def register(cls: type[Surrogate]) -> type[Surrogate]:
        known: Any = type(SURROGATES.get(name, cls()))
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"the surrogate {name!r} is registered already: {known.__qualname__}. Use another name.")
        SURROGATES[name] = cls()
        return cls

    return register


@register_surrogate("zero")
class Zero(Surrogate):
    """k = 0: STE-free (Smith and Islam, 2026)."""

    passes, reads_clip = False, False
    weight = activation = Rule.NOTHING


@register_surrogate("ste")
class Ste(Surrogate):
    """k = 1, the identity (StoMPP+STE of Smith and Islam, 2026)."""

    reads_clip = False
    weight = activation = Rule.EVERYTHING


@register_surrogate("clipped_ste")
class ClippedSte(Surrogate):
    """k = 1[low < u < high]; this library's choice."""

    weight = activation = Rule.INSIDE

    def of_weight(self, weight: "Tensor", scale: "Tensor", clip: Any) -> "Tensor | None":
        return None if clip is None else weight.abs() < clip

    def of_activation(
        self, u: "Tensor", threshold: "Tensor | None", scale: "Tensor", low: Any, high: Any, width: float
    ) -> "Tensor | None":
        return None if low is None else (u > low) & (u < high)


@register_surrogate("windowed_ste")
class WindowedSte(Surrogate):
    """k = 1[|u - b| < width * |a|] for activations, 1 for weights; this library's choice."""

    reads_clip = False
    weight, activation = Rule.EVERYTHING, Rule.NEAR

    def of_activation(
        self, u: "Tensor", threshold: "Tensor | None", scale: "Tensor", low: Any, high: Any, width: float
    ) -> "Tensor | None":
        distance = u if threshold is None else u - threshold
        return distance.abs() < scale.abs() * width
