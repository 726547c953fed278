"""torch.compile beside a progression: which steps run eager, and how many graphs a model may have.

A compiled graph holds one state of the layers in it. Steps that look at activations (starting values, the check for
non-finite ones) put hooks on layers for one step; they run eager, for graphs do not notice new hooks.

torch's settings are those of the whole process, and so is what this module remembers of them.
"""

import sys
from typing import Any

from torch import nn

from .attention_interface import configs_of
from .errors import ConfigError

GRAPHS_A_MEMBER = 4
"""Pending, in transition, frozen, and one to spare."""

_LIMITS = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
_before: dict[str, Any] = {}
_eager: list[Any] = []


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


def begin_step(members: int, looks: bool) -> None:
    """Before a step of a model with so many members; `looks`: there are hooks on layers in this step.

    Raises the limit of recompilations to what the states need, and lets torch raise an error where it is reached all
    the same: its default is to go on eager, in silence. Does nothing where torch.compile was never loaded.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    if not _before:
        _before.update({name: getattr(dynamo.config, name) for name in _LIMITS})
    limit = 16 + GRAPHS_A_MEMBER * members
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, limit)
    dynamo.config.accumulated_recompile_limit = max(dynamo.config.accumulated_recompile_limit, 16 * limit)
    dynamo.config.fail_on_recompile_limit_hit = True
    if looks and not _eager:
        _eager.append(dynamo.set_stance("force_eager"))
    elif not looks:
        _compile_again()


def _compile_again() -> None:
    while _eager:
        _eager.pop().__exit__(None, None, None)  # the stance that was set before


def end() -> None:
    """Put every setting back."""
    _compile_again()
    for name, value in _before.items():
        setattr(sys.modules["torch._dynamo"].config, name, value)
    _before.clear()


def forget_graphs() -> None:
    """Compile anew at the next call: hooks were added or removed, which graphs do not notice."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
