"""Numbers that tell how a binary network's training goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.sharding import local, summed, whole
from ..integrations.torch import remove_all
from ..modules import FROZEN, TRANSITION, BinaryLayer, Member
from ..surgery.members import binary_layers, get_plan, members, weighted

SAMPLE = 65_536
"""Entries of one weight that the flip ratio looks at; larger weights are sampled evenly."""


def frozen_fraction(model: nn.Module, stage: int | None = None) -> float:
    """Share of the binary layers' weight entries that are frozen now, between 0 and 1 (target share in a window).

    Args:
        model: a binarized model.
        stage: number of a stage, from 0, to look at alone; None for all.
    """
    inside = {entry.name for entry in get_plan(model).entries if stage in (None, entry.stage)}
    return frozen_share([member for name, member in members(model).items() if name in inside])


def frozen_share(found: Sequence[Member]) -> float:
    """The same of these members; attention products, which have no weights, count where there is nothing else."""
    layers = list(weighted(dict(enumerate(found))).values())
    if not layers:
        return sum(member.frozen_share for member in found) / len(found)
    frozen = sum(layer.frozen_share * layer.weight_count for layer in layers)
    return float(frozen / sum(layer.weight_count for layer in layers))


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
        flipped, total = [], 0
        for index, layer in enumerate(self._layers):
            now, then = _signs(layer), self._then[index]
            self._then[index] = now
            if layer.frozen_share > 0.0 or layer.stage_state == TRANSITION:
                flipped.append(torch.count_nonzero(now != then.to(now.device)))
                total += now.numel()
        if not flipped:
            return 0.0
        changed = torch.stack([count.to(flipped[0].device) for count in flipped]).sum()
        counts = torch.stack([changed, changed.new_tensor(total)])
        changes, entries = summed(counts, self._layers[0].weight).tolist()
        return float(changes / entries)


def _numbers(tensors: list[Tensor]) -> list[float]:
    """Single values as numbers, after one wait for their device and not one each."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []


# ---- gradients: read them between backward() and the optimizer's step or zero_grad() ----


@dataclass
class LayerFlow:
    """What reached one layer's weight: the norm of its gradient, and the share of entries that got none (0 to 1)."""

    norm: float
    blocked: float


Flow = dict[str, LayerFlow]


def gradient_flow(model: nn.Module) -> Flow:
    """What the last backward pass brought to every binary layer, by name, in execution order.

    Read it between backward() and the optimizer's step or zero_grad(). norm: the Euclidean norm of dL/dw; blocked: the
    share of the entries of w whose gradient is missing or exactly 0.
    Source: the blockade is Smith and Islam's (2026); this measure of it is this library's choice.
    """
    layers = binary_layers(model)
    positions = {entry.name: entry.position for entry in get_plan(model).entries}
    names = sorted(layers, key=positions.__getitem__)
    grads = {name: whole(grad) for name in names if (grad := layers[name].weight.grad) is not None}
    norms = _numbers([grad.norm() for grad in grads.values()])
    counts = _numbers([torch.count_nonzero(grad) for grad in grads.values()])
    flow = {name: LayerFlow(0.0, 1.0) for name in names}
    for (name, grad), norm, count in zip(grads.items(), norms, counts, strict=True):
        flow[name] = LayerFlow(norm, 1.0 - count / grad.numel())
    return flow


def norms_around(model: nn.Module, stage: int, flow: Flow | None = None) -> tuple[float | None, float | None]:
    """Norms of the gradient of all weights before a stage (nearer the input), and of all behind it.

    Forward: sqrt of the sum of |dL/dw|^2 over the layers that are executed before the first layer of the stage, and
             over those after its last; None where there are none
    Source:  this library's choice.

    Args:
        model: a binarized model.
        stage: number of the stage, from 0.
        flow: `gradient_flow(model)`, where it was taken already.
    """
    flow = gradient_flow(model) if flow is None else flow
    names = list(flow)
    inside = {entry.name for entry in get_plan(model).entries if entry.stage == stage}
    places = [index for index, name in enumerate(names) if name in inside]
    if not places:
        return None, None
    before, behind = names[: places[0]], names[places[-1] + 1 :]
    sums = [sum(flow[name].norm ** 2 for name in part) ** 0.5 if part else None for part in (before, behind)]
    return sums[0], sums[1]


def blocked_upstream(model: nn.Module, flow: Flow | None = None) -> float:
    """Share of the weight entries upstream of the stage in transition that got no gradient, between 0 and 1.

    Upstream means: executed before the first layer of that stage. 0 where nothing is upstream or in transition. In
    forward order what is upstream is frozen, and STE-free it is meant to be blocked; in reverse order it is what has
    still to learn. See `gradient_flow` for when to read it; `flow` is what it gave, where it was called already.
    """
    layers = binary_layers(model)
    flow = gradient_flow(model) if flow is None else flow
    names = list(flow)
    moving = [index for index, name in enumerate(names) if layers[name].stage_state == TRANSITION]
    above = names[: moving[0]] if moving else []
    total = sum(layers[name].weight_count for name in above)
    return sum(flow[name].blocked * layers[name].weight_count for name in above) / total if total else 0.0


def blocked_unfrozen(model: nn.Module, flow: Flow | None = None) -> float:
    """Share of the weight entries that are not frozen yet and still got no gradient, between 0 and 1.

    This is the damage of a blockade: in reverse order the early layers are cut off before they have learnt, in
    forward order they are not. See `gradient_flow` for when to read it; `flow` is what it gave, where it was called
    already.
    """
    flow = gradient_flow(model) if flow is None else flow
    waiting = blocked = 0.0
    partly: list[Tensor] = []
    for name, layer in binary_layers(model).items():
        if layer.stage_state == FROZEN:
            continue
        mask = layer.weight_mask
        if mask is None:
            waiting += layer.weight_count
            blocked += flow[name].blocked * layer.weight_count
            continue
        free, grad = ~mask, layer.weight.grad
        partly.append(torch.count_nonzero(free))
        partly.append(partly[-1] if grad is None else torch.count_nonzero(free & (whole(grad) == 0)))
    numbers = _numbers(partly)
    waiting, blocked = waiting + sum(numbers[::2]), blocked + sum(numbers[1::2])
    return blocked / waiting if waiting else 0.0


# ---- clipping ----


def _clip_now(layer: BinaryLayer, always: float | None, window: tuple[float | None, float | None]) -> Any:
    """The clip range of a layer's real entries now, or None: `always`, and its own once it is in transition."""
    if layer.stage_state == FROZEN:
        return None
    if layer.stage_state == TRANSITION and layer.frozen_share > 0.0:
        return None if window[0] is None else window
    return None if always is None else (-always, always)


def clipped_weights(model: nn.Module) -> float:
    """Share of the real weight entries that a clip changes: |w| > c, between 0 and 1; 0 where nothing is clipped.

    Counted are the entries that are not frozen, in the layers that have a clip now: those in transition, and with
    `weight_clip` those that are pending. A clipped entry gets no gradient, and only weight decay brings it back.
    Source: this library's choice.
    """
    counts: list[Tensor] = []
    for layer in binary_layers(model).values():
        config, edge = layer.stompp_config, layer.weight_edge
        always = config.weight_clip if config.binary_weights else None
        edges = _clip_now(layer, always, (None if edge is None else -edge, edge))
        if edges is not None:
            counts += _outside(whole(layer.weight), edges, layer.weight_mask)
    return _share(counts)


class ClippedInputs:
    """Share of the real entries of the layers' inputs that a clip changes, between 0 and 1; 0 where nothing is clipped.

    Made before a forward pass, it hooks the layers that clip their inputs now; `read` gives the share over the first
    call of each of them, counting the features that are not frozen, and removes the hooks. An absorbed activation f
    stands before the clip: counted are the entries of f(x) that lie outside.
    Source: this library's choice.
    """

    def __init__(self, model: nn.Module) -> None:
        self._counts: list[Tensor] = []
        self._handles: list[Any] = []
        for layer in binary_layers(model).values():
            config = layer.stompp_config
            edges = _clip_now(layer, config.activation_clip, layer.input_edges) if config.binary_activations else None
            if edges is not None:
                self._handles.append(layer.register_forward_pre_hook(self._look(layer, edges), with_kwargs=True))

    def _look(self, layer: BinaryLayer, edges: tuple[float, float]) -> Any:
        waits = True

        def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal waits
            if not waits or module is not layer:  # a copy of the model, a teacher for one, takes hooks along
                return
            waits = False
            with torch.no_grad():
                x = layer._activated(args[0] if args else next(iter(kwargs.values())))
                mask = None if layer.activation_mask is None else layer._placed_mask(x).expand_as(x)
                self._counts += _outside(x, edges, mask)

        return look

    def read(self) -> float:
        """The share; then the object is used up."""
        remove_all(self._handles)
        return _share(self._counts)


def _outside(values: Tensor, edges: tuple[float, float], mask: Tensor | None) -> list[Tensor]:
    """How many entries that no mask freezes lie outside of a range, and how many there are."""
    outside = (values < edges[0]) | (values > edges[1])
    if mask is None:
        return [torch.count_nonzero(outside), outside.new_full((), outside.numel(), dtype=torch.int64)]
    free = ~mask
    return [torch.count_nonzero(outside & free), torch.count_nonzero(free)]


def _share(counts: list[Tensor]) -> float:
    numbers = _numbers(counts)
    total = sum(numbers[1::2])
    return sum(numbers[::2]) / total if total else 0.0
