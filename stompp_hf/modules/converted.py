"""Converted: what every module that this library changed in place answers for itself, so that nobody asks its class."""

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..integrations.torch import buffers_of, parameters_of

if TYPE_CHECKING:
    Module = nn.Module
else:
    Module = object


class Converted(Module):
    """A module whose `__class__` was changed. By default it has no tensors of its own, and its products are real."""

    own_names: ClassVar[tuple[str, ...]] = ()
    """The parameters and buffers that it has beside those of its plain class; absent, or None, where it needs none."""
    is_packed: ClassVar[bool] = False
    """Whether it is frozen for good, without latent weights."""

    def own_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that binarization added, by name."""
        held = {**parameters_of(self), **buffers_of(self)}
        return {name: held[name] for name in self.own_names if held.get(name) is not None}

    def is_without_own(self, state_dict: Any, prefix: str, missing_keys: list[str]) -> bool:
        """Whether a state dict is of the plain model: own tensors keep their values, and to miss them is no error."""
        own = {prefix + name for name in self.own_names}
        if own & state_dict.keys():
            return False
        missing_keys[:] = [key for key in missing_keys if key not in own]
        return True

    @property
    def latent(self) -> Tensor | None:
        """The latent weight, if it has one now."""
        return None

    @property
    def fan_in(self) -> int:
        """How many binary weights an output of its product sums over; 0 where it has none."""
        return 0

    def binary_tensors(self) -> list[Tensor]:
        """Its own tensors, and its latent weight: what becomes binary, and what that is scaled and shifted by."""
        latent = self.latent
        return [*self.own_tensors().values(), *([] if latent is None else [latent])]

    @property
    def always_real(self) -> bool:
        """Whether it computes in full precision for good: a baseline."""
        return False

    def damage(self, has_nan: bool = True) -> str | None:
        """What is wrong with tensors that have the right shapes, or None; has_nan=False: none of its own holds NaN."""
        return None

    def taken(self, has_nan: bool = True) -> str | None:
        """Go by tensors that were put in from outside, as they are now; takes and returns what `damage` does."""
        return self.damage(has_nan)

    def expected_sizes(self) -> dict[str, tuple[Tensor, int]]:
        """Tensors whose size follows from the weight's, with that size, by what they are called."""
        return {}

    def unfuse(self) -> None:
        """Undo what was done to it for inference alone, in place; nothing, where nothing was."""

    def binary_weights_in(self, name: str) -> int:
        """How many binary weights one of its tensors stands for."""
        return 0

    def packed_bytes(self, name: str, tensor: Tensor) -> int | None:
        """Bytes that one of its tensors takes in a packed checkpoint; None where it is stored as what is real."""
        return None
