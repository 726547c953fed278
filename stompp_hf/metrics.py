"""Numbers that tell how a binary network's training goes."""

import torch
from torch import Tensor, nn

from .modules import TRANSITION, BinaryLayer
from .plan import binary_layers

SAMPLE = 65_536
"""Entries of one weight that the flip ratio looks at; larger weights are sampled evenly."""


def frozen_fraction(model: nn.Module) -> float:
    """Share of the binary layers' weight entries that are frozen now, between 0 and 1 (target share in a window)."""
    layers = binary_layers(model).values()
    frozen = sum(layer.frozen_share * layer.weight.numel() for layer in layers)
    return float(frozen / sum(layer.weight.numel() for layer in layers))


def _signs(layer: BinaryLayer) -> Tensor:
    weight = layer.weight.detach().reshape(-1)
    return weight[:: -(-weight.numel() // SAMPLE)] >= 0


class FlipRatio:
    """Share of the frozen layers' weights whose sign changed since the last look.

    Forward: mean over the entries of all layers that are frozen or in transition of 1[sign(w now) != sign(w then)],
    on at most SAMPLE evenly spaced entries a layer. STE-free, only entries that are not frozen can flip.
    Source:  the flip ratio is a metric of the field (larq); the sampling is this library's choice.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(binary_layers(model).values())
        self._then = [_signs(layer) for layer in self._layers]

    def update(self) -> float:
        """The ratio since the last call (or since creation), between 0 and 1; 0 while nothing is frozen."""
        flipped = total = 0
        for index, layer in enumerate(self._layers):
            now, then = _signs(layer), self._then[index]
            self._then[index] = now
            if layer.frozen_share > 0.0 or layer.stage_state == TRANSITION:
                flipped += int(torch.count_nonzero(now != then.to(now.device)))
                total += now.numel()
        return flipped / total if total else 0.0
