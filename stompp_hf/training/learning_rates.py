"""Learning rates of what is pending and of what is binary, as shares of an optimizer's step.

Fine-tuned features are lost at a rate that suits binary layers, and binary layers stand still at one that suits
fine-tuning: signs flip only after many updates in one direction. So a script keeps the rate of its real weights.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modules import Member
from .hold_frozen import around_steps

FLIPPING_RATE = 0.02
"""The rate that binary layers are brought up to, in units of 1 / sqrt(K), the usual size of a weight of fan-in K.

An optimizer whose steps are as large as its rate, as Adam's, then moves a latent weight by a fiftieth of its size a
step. Where they are smaller (Adafactor scales them by the weight's own size, Muon by its shape), so are these.
"""

PROPORTIONAL = {
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.RMSprop, torch.optim.SGD),
}
"""Classes whose step is the learning rate times something that does not depend on it, decay included."""

PEAK = "stompp_peak_lr"
"""Where a parameter group keeps the largest rate that it had, if no scheduler says it."""


@dataclass
class Rate:
    """What of an optimizer's step a parameter makes: `before` its step `begin` has come, and from there on.

    after None: as much as takes a rate that is lower up to `least`; share: of what `after` or `least` says.
    """

    parameter: nn.Parameter
    begin: int
    before: float
    after: float | None
    least: float = 0.0
    share: float = 1.0

    def at(self, step: int, peak: float) -> float:
        """The share that it makes at a step, under an optimizer whose rate is `peak` before any scheduler lowers it."""
        if step < self.begin:
            return self.before
        if self.after is not None:
            return self.share * self.after
        return self.share * (max(1.0, self.least / peak) if peak > 0.0 else 1.0)


def rates(
    model: nn.Module,
    members: dict[str, Member],
    begins: dict[str, int],
    pending: float,
    binary: float | None,
    scales: float = 1.0,
) -> list[Rate]:
    """The rate of every trainable parameter.

    A parameter begins when the window of its stage opens. One beside binary layers (a norm, a bias) goes with the
    latest of those in the smallest module around both; one with all of them around (embeddings, a head) with the first.
    From then on latents of members have the rate `binary`, their scales and thresholds `scales` times that, and all
    else the optimizer's.

    Args:
        model: a binarized model.
        members: its members, by name.
        begins: the first step of the window of each member, by name.
        pending: rate of what has not begun.
        binary: rate of members that have begun; None: see `FLIPPING_RATE`.
        scales: share of it that scales and thresholds have.
    """
    least = {
        id(tensor): FLIPPING_RATE / math.sqrt(member.fan_in) if member.fan_in else 0.0
        for member in members.values()
        if not member.always_real
        for tensor in member.binary_tensors()
    }
    latents = {id(member.latent) for member in members.values()}
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
        own = id(parameter) in least
        after, reach = (binary, least[id(parameter)]) if own else (1.0, 0.0)
        share = scales if own and id(parameter) not in latents else 1.0
        found.append(Rate(parameter, begin, pending, after, reach, share))
    return found


def peak_rates(optimizer: Any) -> dict[int, float]:
    """The learning rate of each parameter of an optimizer before any scheduler lowers it, by the parameter's id.

    Schedulers leave it in the group's `initial_lr` (OneCycleLR: `max_lr`); without one the largest that was seen
    counts, in a key of our own, which optimizers save. 0 where a step's size is not the rate's: under SGD it is the
    gradient's, and Adafactor may have none.
    """
    found = {}
    normalizes = not isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        now = group.get("lr") if normalizes else None
        if now is None:
            continue
        peak = max(float(value) for value in (now, *(group.get(key, 0.0) for key in ("initial_lr", "max_lr", PEAK))))
        if "initial_lr" not in group:
            group[PEAK] = peak
        found.update({id(parameter): peak for parameter in group["params"]})
    return found


def largest_share(optimizer: Any, found: Iterable[Rate]) -> float:
    """The largest share that any of an optimizer's parameters will make of a step; infinite where nobody knows yet."""
    if not hasattr(optimizer, "param_groups"):
        return math.inf
    peaks = peak_rates(optimizer)
    own = [(rate, peaks[id(rate.parameter)]) for rate in found if id(rate.parameter) in peaks]
    return max((math.inf if peak == 0.0 else rate.at(rate.begin, peak) for rate, peak in own), default=1.0)


def scale_steps(optimizer: Any, found: Iterable[Rate], step: Callable[[], int]) -> list[Any]:
    """Register step hooks on an optimizer: each parameter moves by its share of what the optimizer would do.

    Forward:  theta <- theta + rate * (optimizer(theta) - theta), decay and momentum included
    Source:   this library's choice.
    Cost:     none for `PROPORTIONAL` optimizers, whose groups are split by rate for the time of the step; for others,
              and at a rate of 0, for that time a copy of what has another rate than 1.

    Returns the hooks' handles.
    """
    found = list(found)
    groups: list[dict[str, Any]] = []
    """Those that are split just now."""
    by_groups = type(optimizer) in PROPORTIONAL

    def put_back() -> None:
        if groups:
            optimizer.param_groups, groups[:] = list(groups), []

    def keep(own: set[int]) -> list[Any]:
        put_back()  # what a step that raised left
        now, peaks = step(), peak_rates(optimizer)
        moving = [(r.parameter, r.at(now, peaks.get(id(r.parameter), 0.0))) for r in found if id(r.parameter) in own]
        moving = [(parameter, rate) for parameter, rate in moving if rate != 1.0]
        if by_groups and moving:
            groups[:] = optimizer.param_groups
            optimizer.param_groups = split(groups, {id(parameter): rate for parameter, rate in moving if rate})
            moving = [(parameter, rate) for parameter, rate in moving if not rate]
        return [(parameter, rate, parameter.detach().clone()) for parameter, rate in moving]

    def scale(kept: list[Any]) -> None:
        put_back()
        for parameter, rate, value in kept:
            if rate == 0.0:
                parameter.copy_(value)  # also where the optimizer made it infinite
            else:
                parameter.lerp_(value, 1.0 - rate)

    return around_steps(optimizer, step, keep, scale)


def split(groups: Iterable[dict[str, Any]], rates: dict[int, float]) -> list[dict[str, Any]]:
    """An optimizer's groups with one for each rate: its own learning rate times that of its parameters, by their id."""
    found = []
    for group in groups:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
        found += [{**group, "params": parameters, "lr": group["lr"] * rate} for rate, parameters in parts.items()]
    return found
