"""torch.compile beside a progression: which calls run eager, and how many graphs a model may have.

A compiled graph holds one state of the layers in it. Steps that look at activations (starting values, the check for
non-finite ones) put hooks on layers for one step; they run eager, for graphs do not notice new hooks.

torch's settings are those of the whole process. They are changed for the length of a call of something compiled, and
for nobody else.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..integrations.torch import anything_is_compiled, compiled_call, compiled_wrappers, compiling
from ..integrations.transformers import attention_of
from ..surgery.attention_interface import configs_of

GRAPHS_A_MEMBER = 4
"""Pending, in transition, frozen, and one to spare."""


def refuse_untraceable(model: nn.Module) -> None:
    """Raise ConfigError for attention whose backward pass torch.compile cannot trace without a gradient."""
    names = {attention_of(config) or "eager" for config in configs_of(model)} - {"eager", "stompp_eager"}
    if names:
        raise ConfigError(
            f"frozen_gradient='zero' under torch.compile: frozen layers pass no gradient, and torch cannot trace the "
            f"backward pass of {', '.join(sorted(names))} attention without one. Load the model with "
            "attn_implementation='eager', or use a surrogate, as in frozen_gradient='windowed_ste'."
        )


class Held:
    """The compiled calls of a model, each of which runs under the settings that a progression needs.

    The limit of recompilations is what the states need, and torch raises an error where it is reached all the same: its
    default is to go on eager, in silence. Calls of a step with hooks on layers run eager.

    Args:
        model: what is trained; torch.compile may have been given it, a part of it, or what wraps it.
        members: how many members it has.
    """

    def __init__(self, model: nn.Module, members: int) -> None:
        self._model, self._limit, self._looks = model, 16 + GRAPHS_A_MEMBER * members, False
        self._searched, self._held = False, list[Callable[[], None]]()

    def renew(self, looks: bool) -> None:
        """Before a step; `looks`: there are hooks on layers in this step."""
        self._looks = looks
        if not self._searched and anything_is_compiled():
            self._held = [_around(module, self._settings) for module in self._compiled()]
        self._searched = True

    def _compiled(self) -> list[nn.Module]:
        """The compiled modules in the model, and the wrappers that torch.compile put around it or parts of it."""
        inside = set(self._model.modules())
        found = [module for module in inside if compiled_call(module) is not None]
        return found + [one for one in compiled_wrappers() if not inside.isdisjoint(one.modules())]

    def _settings(self) -> Any:
        return compiling(self._limit, eager=self._looks)

    def release(self) -> None:
        """Let go of the calls."""
        for undo in self._held:
            undo()
        self._searched, self._held = False, []


def _around(module: Any, settings: Callable[[], Any]) -> Callable[[], None]:
    """Run a compiled module's calls under settings; returns what undoes it."""
    name = compiled_call(module) or "forward"
    call = getattr(module, name)

    @functools.wraps(call)
    def held(*args: Any, **kwargs: Any) -> Any:
        with settings():
            return call(*args, **kwargs)

    object.__setattr__(module, name, held)

    def undo() -> None:
        if getattr(module, name, None) is held:
            object.__setattr__(module, name, call)

    return undo
