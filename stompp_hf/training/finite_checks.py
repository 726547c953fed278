"""What sign() hides: a NaN or an infinity among latent weights or activations has a sign as well."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..integrations.sharding import everywhere, local
from ..integrations.torch import remove_all
from ..modules import Member
from ..surgery.members import weighted


def check_latents(layers: Mapping[str, Member], step: int) -> None:
    """Raise NonFiniteError if a latent weight is NaN or infinite."""
    for name, layer in weighted(layers).items():
        if not everywhere(torch.isfinite(local(layer.weight)).all(), layer.weight):
            raise NonFiniteError(
                f"the latent weight of {name} is not finite (step {step}). Lower the learning rate, "
                "or clip gradients (max_grad_norm); then resume from the last checkpoint."
            )


class _Look:
    """A layer's hook. It keeps its answer, one for all calls, where a copy of the layer keeps its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.finite: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        now = torch.isfinite(x.detach()).all()  # read one step later: no wait
        self.finite = now if self.finite is None else self.finite & now

    def taken(self) -> Tensor | None:
        finite, self.finite = self.finite, None
        return finite


class InputChecks:
    """Looks in one step whether what enters the layers is finite, and says so in the next."""

    def __init__(self) -> None:
        self._looks: list[_Look] = []
        self._handles: list[Any] = []

    @property
    def are_on(self) -> bool:
        """Whether the inputs of this step are looked at."""
        return bool(self._handles)

    def arm(self, layers: Mapping[str, Member]) -> None:
        """Look at what enters these layers until they are disarmed."""
        self._looks = [_Look(name) for name in layers]
        hooks = zip(layers.values(), self._looks, strict=True)
        self._handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer, look in hooks]

    def disarm(self) -> None:
        """Look no more; what was seen can still be read."""
        remove_all(self._handles)

    def read(self, step: int) -> None:
        """Raise NonFiniteError if an input that was looked at was not finite."""
        for name, finite in [(look.name, look.taken()) for look in self._looks]:
            if finite is not None and not bool(finite):
                raise NonFiniteError(
                    f"the input of {name} was not finite near step {step}; sign() would hide it. Lower "
                    "the learning rate, or check the data; then resume from the last checkpoint."
                )
