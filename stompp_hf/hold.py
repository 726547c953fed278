"""Hold frozen latents against the optimizer, so that sign(latent) is the committed sign and nothing has to be saved."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .modules import FROZEN, TRANSITION, BinaryLayer
from .sharding import local, part_for


def hookable(optimizer: Any, option: str, instead: str) -> Any:
    """The optimizer itself, without accelerate's wrapper; raises ConfigError if its steps cannot be hooked."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(inner, "register_step_pre_hook") or not hasattr(inner, "register_step_post_hook"):
        raise ConfigError(
            f"{option} needs an optimizer whose steps can be hooked, and {type(inner).__name__} has no step hooks. Use "
            f"a torch.optim optimizer, or {instead}."
        )
    return inner


def hold_frozen(optimizer: Any, layers: list[BinaryLayer]) -> list[Any]:
    """Register step hooks on an optimizer: fully frozen weights are skipped, frozen entries get their latent back.

    Returns the hooks' handles.

    Raises:
        ConfigError: the optimizer has no step hooks.
    """
    inner = hookable(optimizer, "frozen_gradient='zero'", "frozen_gradient='ste'")
    before: list[tuple[BinaryLayer, Tensor, Tensor]] = []

    def keep(*_: Any) -> None:
        before.clear()
        for layer in layers:
            if layer.stage_state == FROZEN:
                layer.weight.grad = None  # torch optimizers skip it: no inertia, no decay
            elif layer.stage_state == TRANSITION and layer.weight_mask is not None:
                before.append((layer, local(layer.weight).clone(), part_for(layer.weight_mask, layer.weight)))

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            for layer, weight, mask in before:
                local(layer.weight).lerp_(weight, mask)  # exact for a mask of zeros and ones
        before.clear()

    return [inner.register_step_pre_hook(keep), inner.register_step_post_hook(put_back)]


def skip_blocked(optimizer: Any, parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Register hooks that leave parameters alone which no gradient reached, as in one process.

    Those are what stands before a frozen STE-free layer, and scales of pending layers. DistributedDataParallel without
    find_unused_parameters gives them zeros, with which decay and momentum would go on, and Adam would count steps.

    Returns the hooks' handles.

    Raises:
        ConfigError: the optimizer has no step hooks.
    """
    inner = hookable(optimizer, "training on several processes", "train on one")
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    reached: set[int] = set()

    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:  # what the processes add up comes later
            reached.add(id(parameter))

    def skip(*_: Any) -> None:
        for parameter in parameters:
            if id(parameter) not in reached:
                parameter.grad = None
        reached.clear()

    return [
        *(parameter.register_post_accumulate_grad_hook(mark) for parameter in parameters),
        inner.register_step_pre_hook(skip),
    ]
