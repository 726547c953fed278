"""Frozen fraction p(t) of a stage, t in [0, 1] being the share of its window that has passed.

Every schedule is a pure, non-decreasing function with p(0) = 0 and p(1) = 1. The paper uses the cubic one and
finds the others about as good (Smith and Islam, 2026).
"""

import math
from collections.abc import Callable

from ..errors import ConfigError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda t: t**3,
    "quadratic": lambda t: t**2,
    "linear": lambda t: t,
    "flipped_quadratic": lambda t: 1.0 - (1.0 - t) ** 2,
    "cosine": lambda t: 0.5 * (1.0 - math.cos(math.pi * t)),
}


def frozen_fraction(schedule: str, t: float) -> float:
    """Target share of frozen entries at time `t` of a stage's window.

    Forward:  p(t) as named, with t clamped to [0, 1]; cubic: p(t) = t ** 3
    Source:   Smith and Islam (2026); the clamp is this library's choice.

    Args:
        schedule: a key of `SCHEDULES`.
        t: share of the window that has passed, no unit.

    Raises:
        ConfigError: the schedule's name is unknown.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule!r} is unknown; choose one of {', '.join(sorted(SCHEDULES))}.")
    if t <= 0.0:
        return 0.0
    if t >= 1.0:
        return 1.0
    return SCHEDULES[schedule](t)
