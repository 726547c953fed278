"""CommittedSigns: notices that a frozen sign moved, whoever moved it."""

import torch
from torch import Tensor

from .modules import FROZEN, BinaryLayer
from .sharding import local, part_for, summed


class CommittedSigns:
    """Counts the frozen +1 of each row and each column of a weight, and compares them one step later.

    A sign that moves changes two counts; to go unseen, four must move at the corners of a rectangle. Kept are two
    numbers a row and a column; the cost is one pass over the frozen weights each step (two where a stage is in
    transition), and one wait for the device.
    Source: this library's choice.
    """

    def __init__(self, layers: dict[str, BinaryLayer]) -> None:
        self._layers = layers
        self._kept: dict[str, tuple[bool, Tensor, Tensor]] = {}
        self._at: int | None = None

    def moved(self, step: int) -> list[str]:
        """Before the model goes to `step`: names of the layers in which a sign that was frozen is another one now.

        Only the step after the noted one is held to it: whoever jumps, or has loaded other weights, begins anew.
        """
        if step == self._at:
            return []
        names, changes = list(self._kept), []
        follows = self._at is not None and step == self._at + 1
        if not names or not follows or any(layer.step != self._at for layer in self._layers.values()):
            self._kept.clear()
            return []
        for name in names:
            _, *then = self._kept[name]
            now = _counts(self._layers[name])
            changes.append(torch.stack([(a.to(b.device) != b).any() for a, b in zip(then, now, strict=True)]).any())
        found = torch.stack([change.to(changes[0].device) for change in changes]).to(torch.int32)
        found = summed(found, self._layers[names[0]].weight)
        return [name for name, change in zip(names, found.tolist(), strict=True) if change]

    def note(self, step: int) -> None:
        """Once the model stands at `step`: what is frozen from now on."""
        if step == self._at:
            return
        self._at = step
        for name, layer in self._layers.items():
            whole = layer.stage_state == FROZEN
            if not layer.has_frozen:
                self._kept.pop(name, None)
            elif not (whole and name in self._kept and self._kept[name][0]):
                self._kept[name] = (whole, *_counts(layer))


def _counts(layer: BinaryLayer) -> tuple[Tensor, Tensor]:
    """How many frozen signs are +1, in each row of the weight and in each column."""
    signs = local(layer.weight) >= 0
    if layer.weight_mask is not None:
        signs &= part_for(layer.weight_mask, layer.weight) != 0
    ones = signs.flatten(1).view(torch.uint8)
    return ones.sum(1, dtype=torch.int32), ones.sum(0, dtype=torch.int32)
