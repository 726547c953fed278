"""LiveMetrics: what a training loop logs of a progression, and when each of it is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from torch import nn

from ..errors import ConfigError
from ..modules import Member
from . import metrics
from .progression import Progression

ALWAYS = ("stompp_frozen_fraction", "stompp_stage", "stompp_stage_fraction", "stompp_flip_ratio")
"""The metrics that every record has; the others are sampled."""


@dataclass
class Sample:
    """What a sampled metric looks at, between backward() and the optimizer's step.

    stage: number, from 0, of the stage that is freezing or next to freeze; flow: `gradient_flow(model)`;
    clipped_inputs: the share that the forward pass had (see `ClippedInputs`).
    """

    model: nn.Module
    stage: int
    flow: metrics.Flow
    clipped_inputs: float

    @cached_property
    def norms(self) -> tuple[float | None, float | None]:
        """`norms_around` that stage."""
        return metrics.norms_around(self.model, self.stage, self.flow)


Metric = Callable[[Sample], float | None]

SAMPLED: dict[str, Metric] = {
    "stompp_clipped_weights": lambda sample: metrics.clipped_weights(sample.model),
    "stompp_clipped_inputs": lambda sample: sample.clipped_inputs,
    "stompp_blocked_share": lambda sample: metrics.blocked_unfrozen(sample.model, sample.flow),
    "stompp_blocked_upstream": lambda sample: metrics.blocked_upstream(sample.model, sample.flow),
    "stompp_grad_norm_before": lambda sample: sample.norms[0],
    "stompp_grad_norm_behind": lambda sample: sample.norms[1],
}
"""The sampled metrics, by the names under which they are logged; one that gives None is left out. A metric of your own
is a function and a row here: `SAMPLED["stompp_mine"] = mine`."""


class LiveMetrics:
    """The metrics of a run, by the names under which they are logged.

        live = LiveMetrics(progression)
        for step, batch in enumerate(loader):
            progression.step(step)
            live.begin(step)
            model(**batch).loss.backward()
            live.sample()
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                print(live.record())

    Always there, read from Python numbers: stompp_frozen_fraction (of all binary weights), stompp_stage (number from 1
    of the stage that is freezing, or next to freeze), stompp_stage_fraction (frozen share of that stage). Measured
    once a record, from weights: stompp_flip_ratio (since the last record). Measured in every `every`-th step, from
    weights, gradients and inputs, and averaged over those since the last record (a record without one has none):
    stompp_clipped_weights, stompp_clipped_inputs, stompp_blocked_share (of unfrozen weights), stompp_blocked_upstream
    (of weights before the stage), stompp_grad_norm_before and stompp_grad_norm_behind (of all weights before the stage
    that is freezing or next to freeze, and behind it; left out where there are none; as the optimizer gets them, after
    clipping). See `metrics` for what each one means, and examples/benchmarks/metrics_cost.py for what each costs.

    Args:
        progression: what drives the model.
        every: steps from one sample to the next, from step 0 on; 0 for none.

    Raises:
        ConfigError: `every` is no number of steps.
    """

    def __init__(self, progression: Progression, every: int = 50) -> None:
        check_every(every)
        self._progression, self._every = progression, every
        self._flips = metrics.FlipRatio(progression.model)
        self._inputs: metrics.ClippedInputs | None = None
        self._samples: list[dict[str, float]] = []
        self._stages: dict[int, list[Member]] = {}
        for entry in progression.plan.entries:
            self._stages.setdefault(entry.stage, []).append(progression.layers[entry.name])

    def begin(self, step: int) -> None:
        """Before the forward pass of a step, after `progression.step(step)`."""
        self.end()
        if self._every and step % self._every == 0:
            self._inputs = metrics.ClippedInputs(self._progression.model)

    def sample(self) -> None:
        """After backward() and before the optimizer's step; does nothing in a step that is not sampled."""
        if self._inputs is None:
            return
        model = self._progression.model
        stage = self._progression.stage_in_transition()[0] - 1
        sample = Sample(model, stage, metrics.gradient_flow(model), self._inputs.read())
        found = {name: value for name, metric in SAMPLED.items() if (value := metric(sample)) is not None}
        self._samples.append(found)
        self._inputs = None

    def cheap(self) -> dict[str, float]:
        """Those that cost next to nothing, as they stand."""
        stage = self._progression.stage_in_transition()[0]
        return {
            "stompp_frozen_fraction": metrics.frozen_share(list(self._progression.layers.values())),
            "stompp_stage": stage,
            "stompp_stage_fraction": metrics.frozen_share(self._stages[stage - 1]),
        }

    def record(self) -> dict[str, float]:
        """All metrics as they stand; begins the next record."""
        samples, self._samples = self._samples, []
        names = {name: None for sample in samples for name in sample}
        means = {name: fmean(sample[name] for sample in samples if name in sample) for name in names}
        return {**self.cheap(), "stompp_flip_ratio": self._flips.update(), **means}

    def end(self) -> None:
        """Remove the hooks of a step that was begun and never sampled."""
        if self._inputs is not None:
            self._inputs.read()
            self._inputs = None


def check_every(every: int) -> None:
    """Raise ConfigError unless `every` is a number of steps."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ConfigError(f"metrics_every={every!r} must be a number of steps, or 0 for no sampled metrics.")
