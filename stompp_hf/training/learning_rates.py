"""Learning rates of what is pending and of what is binary, as shares of an optimizer's step.

Fine-tuned features are lost at a rate that suits binary layers, and binary layers stand still at one that suits
fine-tuning: signs flip only after many updates in one direction. So a script keeps the rate of its real weights.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..modules import Member
from .hold_frozen import around_steps


@dataclass
class Rate:
    """What of an optimizer's step a parameter makes: `before` its step `begin` has come, and from there on."""

    parameter: nn.Parameter
    begin: int
    before: float
    after: float

    def at(self, step: int) -> float:
        """The share that it makes at a step."""
        return self.before if step < self.begin else self.after


def rates(
    model: nn.Module, members: dict[str, Member], begins: dict[str, int], pending: float, binary: float
) -> list[Rate]:
    """The rate of every trainable parameter.

    A parameter begins when the window of its stage opens. One beside binary layers (a norm, a bias) goes with the
    latest of those in the smallest module around both; one with all of them around (embeddings, a head) with the first.
    From then on latents, scales and thresholds of members have the rate `binary`, and all else the optimizer's.

    Args:
        model: a binarized model.
        members: its members, by name.
        begins: the first step of the window of each member, by name.
        pending: rate of what has not begun.
        binary: rate of members that have begun.
    """
    own = {id(tensor) for member in members.values() for tensor in member.binary_tensors()}
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
        begin = min(near) if len(near) == len(begins) else max(near)
        found.append(Rate(parameter, begin, pending, binary if id(parameter) in own else 1.0))
    return found


def scale_steps(optimizer: Any, found: Iterable[Rate], step: Callable[[], int]) -> list[Any]:
    """Register step hooks on an optimizer: each parameter moves by its share of what the optimizer would do.

    Forward:  theta <- theta + rate * (optimizer(theta) - theta), decay and momentum included
    Source:   this library's choice.
    Cost:     for the time of the step a copy of what has another rate than 1.

    Returns the hooks' handles.
    """
    found = list(found)

    def keep(own: set[int]) -> list[Any]:
        now = step()
        moving = [(rate.parameter, rate.at(now)) for rate in found if id(rate.parameter) in own]
        return [(parameter, rate, parameter.detach().clone()) for parameter, rate in moving if rate != 1.0]

    def scale(kept: list[Any]) -> None:
        for parameter, rate, value in kept:
            if rate == 0.0:
                parameter.copy_(value)  # also where the optimizer made it infinite
            else:
                parameter.lerp_(value, 1.0 - rate)

    return around_steps(optimizer, step, keep, scale)
