"""A lower learning rate for what is still real: fine-tuned features survive until their stage's turn comes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .hold import hookable


def first_steps(model: nn.Module, begins: dict[str, int]) -> list[tuple[nn.Parameter, int]]:
    """For every trainable parameter, the step from which it learns at the full rate.

    That is when the window of its stage opens. A parameter beside binary layers (a norm, a bias) goes with the latest
    of those in the smallest module around both; one with all of them around (embeddings, a head) with the first.

    Args:
        model: a binarized model.
        begins: the first step of the window of each member, by name.
    """
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.split(".")[:-1]
        near: list[int] = []
        while not near:
            prefix = ".".join(path)
            near = [b for n, b in begins.items() if not prefix or n == prefix or n.startswith(f"{prefix}.")]
            path = path[:-1]
        found.append((parameter, min(near) if len(near) == len(begins) else max(near)))
    return found


def slow_pending(
    optimizer: Any, parameters: Iterable[tuple[nn.Parameter, int]], factor: float, step: Callable[[], int]
) -> list[Any]:
    """Register step hooks on an optimizer: parameters whose step has not come move by `factor` of what it would do.

    Forward:  theta <- theta + factor * (optimizer(theta) - theta), decay and momentum included
    Source:   this library's choice.

    Returns the hooks' handles.

    Raises:
        ConfigError: the optimizer has no step hooks.
    """
    inner = hookable(optimizer, f"pending_lr={factor}", "pending_lr=1.0")
    parameters = list(parameters)
    before: list[tuple[nn.Parameter, Tensor]] = []

    def keep(*_: Any) -> None:
        now = step()
        before[:] = [(p, p.detach().clone()) for p, first in parameters if now < first and p.grad is not None]

    def shorten(*_: Any) -> None:
        with torch.no_grad():
            for parameter, value in before:
                parameter.lerp_(value, 1.0 - factor)
        before.clear()

    return [inner.register_step_pre_hook(keep), inner.register_step_post_hook(shorten)]
