"""CommittedSigns: notices that a frozen sign moved, whoever moved it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..integrations.sharding import local, part_for, summed
from ..modules import FROZEN, BinaryLayer

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Kept:
    """Of one layer: the frozen +1 of each row and of each column, and, where all is frozen, the sum of the bits."""

    rows: Tensor
    columns: Tensor
    bits: Tensor | None


class CommittedSigns:
    """Counts the frozen +1 of each row and each column of a weight, and compares them one step later.

    A sign that moves changes two counts; to go unseen, four must move at the corners of a rectangle. Weights that are
    frozen whole are counted again only where the sum of their bits changed. Kept are two numbers a row and a column.
    Cost a step: one sum over what is frozen, two counts of the stage in transition, and one wait for the device.
    Source: this library's choice.
    """

    def __init__(self, layers: dict[str, BinaryLayer]) -> None:
        self._layers = layers
        self._kept: dict[str, _Kept] = {}
        self._at: int | None = None

    def moved(self, step: int) -> list[str]:
        """Before the model goes to `step`: names of the layers in which a sign that was frozen is another one now.

        Only that step and the next are held to what was noted: whoever jumps, or has loaded other weights, begins anew.
        """
        follows = self._at is not None and self._at <= step <= self._at + 1
        if not follows or any(layer.step != self._at for layer in self._layers.values()):
            self._kept.clear()
            self._at = None
            return []
        suspects = self._everywhere({name: self._differs(name) for name in self._kept})
        return self._everywhere({name: self._counts_differ(name) for name in suspects})

    def note(self, step: int) -> None:
        """Once the model stands at `step`: what is frozen from now on."""
        if step == self._at:
            return
        self._at = step
        for name, layer in self._layers.items():
            if not layer.has_frozen:
                self._kept.pop(name, None)
            elif name not in self._kept or self._kept[name].bits is None:
                self._kept[name] = _Kept(*_counts(layer), _bits(layer) if layer.stage_state == FROZEN else None)

    def _differs(self, name: str) -> Tensor:
        kept = self._kept[name]
        if kept.bits is None:
            return self._counts_differ(name)
        before, kept.bits = kept.bits, _bits(self._layers[name])
        return before.to(kept.bits.device) != kept.bits

    def _counts_differ(self, name: str) -> Tensor:
        kept, (rows, columns) = self._kept[name], _counts(self._layers[name])
        return (kept.rows.to(rows.device) != rows).any() | (kept.columns.to(rows.device) != columns).any()

    def _everywhere(self, changed: dict[str, Tensor]) -> list[str]:
        """The names whose flag is set, on any process where weights are sharded."""
        if not changed:
            return []
        flags = list(changed.values())
        found = torch.stack([flag.to(flags[0].device) for flag in flags]).to(torch.int32)
        found = summed(found, self._layers[next(iter(changed))].weight)
        return [name for name, flag in zip(changed, found.tolist(), strict=True) if flag]


def _counts(layer: BinaryLayer) -> tuple[Tensor, Tensor]:
    signs = local(layer.weight) >= 0
    mask = layer.weight_mask
    if mask is not None:
        signs &= part_for(mask, layer.weight)
    ones = signs.flatten(1).view(torch.uint8)
    return ones.sum(1, dtype=torch.int32), ones.sum(0, dtype=torch.int32)


def _bits(layer: BinaryLayer) -> Tensor:
    """The sum of a weight's bits, taken as whole numbers of 8 bytes where that goes: they are added fastest."""
    values = local(layer.weight).reshape(-1)
    words = 8 // values.element_size()
    wide = values.numel() % words == 0 and values.storage_offset() % words == 0
    return values.view(torch.int64 if wide else _INTEGERS[values.element_size()]).sum(dtype=torch.int64)
