"""Notices a binarized model that is trained while nothing advances its progression: it would stay real to the end."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..console import warn_once
from ..integrations.torch import remove_all
from ..modules import BinaryLayer
from .members import members, planned_models

logger = logging.getLogger(__name__)

SAMPLE = 64
"""Entries of a weight by which it is known whether it has learnt."""


class _Watch:
    """Looks at the first latent weight that a gradient reaches, until it has moved or somebody drives the model."""

    def __init__(self, model: nn.Module, weights: list[Tensor]) -> None:
        self._watched: tuple[Tensor, Tensor] | None = None
        self._grads = {id(weight): weight.register_post_accumulate_grad_hook(self._note) for weight in weights}
        self._saving = model.register_state_dict_pre_hook(_say_it)

    def _note(self, weight: Tensor) -> None:
        if self._watched is None:
            self._watched = weight, _sample(weight)
            for key, handle in self._grads.items():
                if key != id(weight):
                    handle.remove()
        elif self.learnt():
            self.stop()
            _warn(weight)

    def learnt(self) -> bool:
        return self._watched is not None and not torch.equal(_sample(self._watched[0]), self._watched[1])

    def stop(self) -> None:
        remove_all([*self._grads.values(), self._saving])


_watches: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()


def watch(model: nn.Module) -> None:
    """Watch a model that was binarized or loaded, and has stages that are still to freeze.

    A latent weight that moves between two gradients is being trained: that is said with the second one, and at the
    latest when the model is saved. A gradient that nobody steps on is none of its business.
    Cost: nothing once `attended`; until then a look at 64 numbers of one weight in each backward pass.
    """
    for root in planned_models(model).values():
        attended(root)
        found = [m for m in members(root).values() if isinstance(m, BinaryLayer) and not (m.is_packed or m.is_settled)]
        learning = [m.weight for m in found if m.weight.requires_grad and not m.weight.is_meta]
        if learning:
            _watches[root] = _Watch(root, learning)


def attended(model: nn.Module) -> None:
    """Somebody drives the model, or it is not to be driven: nothing is watched any more."""
    if (found := _watches.pop(model, None)) is not None:
        found.stop()


def _sample(weight: Tensor) -> Tensor:
    values = weight.detach().reshape(-1)
    return values[:: -(-values.numel() // SAMPLE)].clone()


def _say_it(model: nn.Module, *_: Any) -> None:
    """Before a state dict is made; a function, so that models can be pickled and copied."""
    if (found := _watches.get(model)) is not None and found.learnt():
        attended(model)
        _warn(model)


def _warn(about: Any) -> None:
    warn_once(
        logger, about,
        "this binarized model is trained, and nothing advances its progression: no stage freezes. With Trainer: "
        "Trainer(model, ..., callbacks=[StoMPPTrainerCallback()]). In a loop of your own: progression = "
        "stompp_hf.Progression(model, total_steps), and progression.step(step) before each step. To train in full "
        "precision at first: StoMPPConfig(start=0.2).",
    )  # fmt: skip
