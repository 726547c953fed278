"""A lower learning rate for what is still real: fine-tuned features survive until their stage's turn comes."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .hold_frozen import around_steps


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
    """
    parameters = list(parameters)

    def keep(own: set[int]) -> list[Any]:
        now = step()
        return [(p, p.detach().clone()) for p, first in parameters if now < first and id(p) in own]

    def shorten(kept: list[Any]) -> None:
        for parameter, value in kept:
            if factor == 0.0:
                parameter.copy_(value)  # also where the optimizer made it infinite
            else:
                parameter.lerp_(value, 1.0 - factor)

    return around_steps(optimizer, step, keep, shorten)
