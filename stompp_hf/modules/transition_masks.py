"""The masks that a member holds while its stage is in transition: which of its entries are frozen now."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..method.mask_bits import empty_mask
from ..method.masks import SoftRefreshMask
from ..method.windows import Place


class TransitionMasks:
    """Masks, the draws that they follow from, and where they are held; dropped outside a transition.

    They are no buffers: nothing saves or broadcasts them, since step and share say what they are.
    """

    mask_names: ClassVar[tuple[str, ...]]
    """Masks that it has during a transition: attributes that are booleans then, and None at other times."""
    masks_in_bits: ClassVar[tuple[str, ...]] = ()
    """Those of them that are made when asked, of the bits (`mask_bits`) in an attribute of this name and `_bits`."""

    place: Place
    _draws: dict[str, SoftRefreshMask]

    def masked_tensors(self) -> dict[str, torch.Size]:
        """Shapes of the masks that a transition needs, by their names."""
        raise NotImplementedError

    def draw_masks(self, step: int, share: float, refresh_rate: int, device: torch.device) -> None:
        """Make the masks those of a step, a share p of frozen entries, and a refresh rate r."""
        for name, shape in self.masked_tensors().items():
            if name not in self._draws or self._draws[name].refresh_rate != refresh_rate:  # of another total of steps
                label = f"{self.place.label}.{name}"
                self._draws[name] = SoftRefreshMask(shape.numel(), self.place.mask_seed, label, refresh_rate)
            home = self._home(name)
            mask = getattr(self, home)
            if mask is None or mask.device != device:
                in_bits = name in self.masks_in_bits
                mask = empty_mask(shape, device) if in_bits else torch.zeros(shape, dtype=torch.bool, device=device)
                setattr(self, home, mask)
            self._draws[name].fill(mask, step, share)

    def drop_masks(self) -> None:
        """Hold no masks and no draws."""
        vars(self).update(dict.fromkeys(map(self._home, self.mask_names)), _draws={})

    def held_masks(self) -> dict[str, Tensor | None]:
        """What the attributes hold that masks are in."""
        return {home: getattr(self, home, None) for home in map(self._home, self.mask_names)}

    def move_masks(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move the masks as the tensors of a module move; what they hold are no numbers, whatever dtype those get."""
        for home, mask in self.held_masks().items():
            if mask is not None:
                setattr(self, home, move(mask).to(mask.dtype))

    def _home(self, mask: str) -> str:
        """The attribute that holds a mask."""
        return f"{mask}_bits" if mask in self.masks_in_bits else mask
