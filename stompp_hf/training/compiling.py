"""torch.compile beside a progression: which calls run eager, and how many graphs a model may have.

A compiled graph holds one state of the layers in it. Steps that look at activations (starting values, the check for
non-finite ones) put hooks on layers for one step; they run eager, for graphs do not notice new hooks.

torch's settings are those of the whole process. They are changed for the length of a call of something compiled, and
for nobody else.
"""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..surgery.attention_interface import configs_of

GRAPHS_A_MEMBER = 4
"""Pending, in transition, frozen, and one to spare."""


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or any module in it, was given to torch.compile."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def refuse_untraceable(model: nn.Module) -> None:
    """Raise ConfigError for attention whose backward pass torch.compile cannot trace without a gradient."""
    names = {config._attn_implementation for config in configs_of(model)} - {"eager", "stompp_eager", None}
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
        if not self._searched and _asked():
            self._held = [_around(module, self._settings) for module in self._compiled()]
        self._searched = True

    def _compiled(self) -> list[nn.Module]:
        """The compiled modules in the model, and the wrappers that torch.compile put around it or parts of it."""
        inside = set(self._model.modules())
        found = [module for module in inside if getattr(module, "_compiled_call_impl", None) is not None]
        wrapper: Any = sys.modules["torch._dynamo"].eval_frame.OptimizedModule
        wrappers = [one for one in gc.get_referrers(wrapper) if type(one) is wrapper]  # a model does not know its own
        return found + [one for one in wrappers if not inside.isdisjoint(one.modules())]

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        dynamo: Any = sys.modules["torch._dynamo"]
        config, limit = dynamo.config, self._limit
        wider = {"recompile_limit": limit, "accumulated_recompile_limit": 16 * limit}
        wider = {name: max(getattr(config, name), value) for name, value in wider.items()}
        stance = dynamo.set_stance("force_eager") if self._looks else contextlib.nullcontext()
        with stance, config.patch(fail_on_recompile_limit_hit=True, **wider):
            yield

    def release(self) -> None:
        """Let go of the calls."""
        for undo in self._held:
            undo()
        self._searched, self._held = False, []


def _asked() -> bool:
    """Whether anything was given to torch.compile in this process: to look for it takes a while."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return dynamo is not None and any(one is not None for one in dynamo.eval_frame.cached_backends.values())


def _around(module: Any, settings: Callable[[], Any]) -> Callable[[], None]:
    """Run a compiled module's calls under settings; returns what undoes it."""
    name = "_compiled_call_impl" if getattr(module, "_compiled_call_impl", None) is not None else "forward"
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


def forget_graphs() -> None:
    """Compile anew at the next call: hooks were added or removed, which graphs do not notice."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
