"""When a member of a plan freezes: its place among the others, and the window of steps that follows from it."""

from collections.abc import Iterable
from dataclasses import dataclass

from .schedules import frozen_fraction

PENDING, TRANSITION, FROZEN = "pending", "transition", "frozen"

PAPER_REFRESH_RATE = 100
"""r of Smith and Islam (2026), whose stages freeze within thousands of steps."""


@dataclass(frozen=True)
class Window:
    """The steps [begin, end) in which a layer freezes; empty (begin == end): straight from pending to frozen."""

    begin: int
    end: int

    def state(self, step: int) -> tuple[str, float]:
        """State at `step`, and the share of the window that has passed."""
        if step < self.begin:
            return PENDING, 0.0
        if step >= self.end:
            return FROZEN, 1.0
        return TRANSITION, (step - self.begin) / (self.end - self.begin)

    @property
    def observed_at(self) -> int:
        """The training step whose inputs set the activation values: the last one with nothing frozen yet."""
        return self.begin if self.end > self.begin or self.begin == 0 else self.begin - 1


def stage_edges(stages: Iterable[Iterable[Window]]) -> dict[int, int]:
    """How many stages are frozen at each step at which the first one begins or one has just ended.

    stages: the windows of the members of each stage, in the order in which these freeze.
    """
    inside = [list(windows) for windows in stages]
    first = {min(w.begin for windows in inside for w in windows): 0} if inside else {}
    return {**first, **{max(w.end for w in windows): number for number, windows in enumerate(inside, 1)}}


@dataclass(frozen=True)
class Place:
    """What a member knows of its plan: all that its state at a step follows from, beside the run's total.

    Part `index` of `count` equal parts of the run between `start` and `end`, its schedule, and what its masks are drawn
    from: `label` is its name without the model's `base_model_prefix`, which AutoModel drops. never: nothing freezes.
    refresh_rate None: see `refresh`.
    """

    index: int = 0
    count: int = 1
    start: float = 0.0
    end: float = 0.0
    schedule: str = "cubic"
    refresh_rate: int | None = None
    mask_seed: int = 0
    label: str = ""
    fingerprint: int = 0
    never: bool = False

    def window(self, total: int) -> Window:
        """The window in a run of `total` steps, in whole steps."""
        if self.never:
            return Window(total + 1, total + 1)
        return Window(*(self._edge(total, self.index + i) for i in (0, 1)))

    def refresh(self, total: int) -> int:
        """r in a run of `total` steps: the one that was asked for, or a fifth of the window, up to the paper's 100.

        So every entry is redrawn about five times before it is frozen for good, however short the run.
        """
        window = self.window(total)
        return self.refresh_rate or min(PAPER_REFRESH_RATE, max(1, (window.end - window.begin) // 5))

    def _edge(self, total: int, part: int) -> int:
        return round(total * (self.start + (self.end - self.start) * part / self.count))

    def state(self, step: int, total: int) -> tuple[str, float]:
        """State and target frozen fraction at `step` of `total`; pending while the total is not known (0)."""
        if not total:
            return PENDING, 0.0
        state, t = self.window(total).state(step)
        return state, frozen_fraction(self.schedule, t) if state == TRANSITION else t
