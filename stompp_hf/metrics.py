"""Numbers that tell how a binary network's training goes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .modules import FROZEN, TRANSITION, BinaryLayer
from .plan import binary_layers, get_plan
from .sharding import local, summed, whole

SAMPLE = 65_536
"""Entries of one weight that the flip ratio looks at; larger weights are sampled evenly."""


def frozen_fraction(model: nn.Module) -> float:
    """Share of the binary layers' weight entries that are frozen now, between 0 and 1 (target share in a window)."""
    layers = binary_layers(model).values()
    frozen = sum(layer.frozen_share * layer.weight.numel() for layer in layers)
    return float(frozen / sum(layer.weight.numel() for layer in layers))


def _signs(layer: BinaryLayer) -> Tensor:
    weight = local(layer.weight).reshape(-1)
    return weight[:: -(-layer.weight.numel() // SAMPLE)] >= 0


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
        counts = torch.zeros(2, dtype=torch.int64)
        for index, layer in enumerate(self._layers):
            now, then = _signs(layer), self._then[index]
            self._then[index] = now
            if layer.frozen_share > 0.0 or layer.stage_state == TRANSITION:
                counts += torch.tensor([int(torch.count_nonzero(now != then.to(now.device))), now.numel()])
        flipped, total = summed(counts, self._layers[0].weight).tolist()
        return flipped / total if total else 0.0


@dataclass
class LayerFlow:
    """What reached one layer's weight: the norm of its gradient, and the share of entries that got none (0 to 1)."""

    norm: float
    blocked: float


def gradient_flow(model: nn.Module) -> dict[str, LayerFlow]:
    """What the last backward pass brought to every binary layer, by name, in execution order.

    Read it between backward() and the optimizer's step or zero_grad(). norm: the Euclidean norm of dL/dw; blocked: the
    share of the entries of w whose gradient is missing or exactly 0.
    Source: the blockade is Smith and Islam's (2026); this measure of it is this library's choice.
    """
    layers = binary_layers(model)
    flow = {}
    for name in sorted(layers, key={entry.name: entry.position for entry in get_plan(model).entries}.__getitem__):
        grad = layers[name].weight.grad
        if grad is None:
            flow[name] = LayerFlow(0.0, 1.0)
        else:
            grad = whole(grad)
            blocked = 1.0 - float(torch.count_nonzero(grad)) / grad.numel()
            flow[name] = LayerFlow(float(grad.norm()), blocked)
    return flow


def blocked_upstream(model: nn.Module) -> float:
    """Share of the weight entries upstream of the stage in transition that got no gradient, between 0 and 1.

    Upstream means: executed before the first layer of that stage. 0 where nothing is upstream or in transition. In
    forward order what is upstream is frozen, and STE-free it is meant to be blocked; in reverse order it is what has
    still to learn. See `gradient_flow` for when to read it.
    """
    layers = binary_layers(model)
    flow = gradient_flow(model)
    names = list(flow)
    moving = [index for index, name in enumerate(names) if layers[name].stage_state == TRANSITION]
    above = names[: moving[0]] if moving else []
    total = sum(layers[name].weight.numel() for name in above)
    return sum(flow[name].blocked * layers[name].weight.numel() for name in above) / total if total else 0.0


def blocked_unfrozen(model: nn.Module) -> float:
    """Share of the weight entries that are not frozen yet and still got no gradient, between 0 and 1.

    This is the damage of a blockade: in reverse order the early layers are cut off before they have learnt, in
    forward order they are not. See `gradient_flow` for when to read it.
    """
    waiting = blocked = 0.0
    for layer in binary_layers(model).values():
        if layer.stage_state == FROZEN:
            continue
        grad = None if layer.weight.grad is None else whole(layer.weight.grad)
        mask = layer.weight_mask
        like = layer.stompp_state.new_ones(layer.weight.shape, dtype=layer.weight.dtype)
        free = like if mask is None else 1.0 - mask
        waiting += float(free.sum())
        blocked += float((free if grad is None else free * (grad == 0)).sum())
    return blocked / waiting if waiting else 0.0
