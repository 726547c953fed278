"""StopFreezingCallback: freeze stage by stage only as long as the held-out metric stands it."""

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..console import say, warn_once
from ..errors import ConfigError
from ..integrations.sharding import local
from ..method.windows import Window, stage_edges
from ..training.progression import Progression
from .callback import StoMPPTrainerCallback, logger

KEPT = ("full_precision", "good_stages", "stopped", "undone_at")
"""What a resumed run goes on with."""
FALLING = ("loss", "mse", "rmse", "mae", "perplexity", "wer", "cer", "error")
"""Endings of the names of metrics of which less is better."""


class StopFreezingCallback(TrainerCallback, ExportableState):
    """Evaluates when a stage has frozen, and stops the freezing where the metric has fallen too far, or is NaN.

    Then the weights go back to the end of the last good stage, the stages behind it are real for good, and training
    goes on to its end. What comes out is finished: it is saved, packed, fused and exported as any other, with its
    frozen stages in bits and the rest as it was. The optimizer keeps its moments.

    Use:  stompp = StoMPPTrainerCallback()
          callbacks=[stompp, StopFreezingCallback(stompp, drop=0.03, metric="accuracy")]

    Args:
        stompp: the callback that freezes the model; it comes before this one.
        drop: how far the metric may fall, in its own units.
        metric: its name, with or without "eval_"; unset: `metric_for_best_model`.
        full_precision: what it was in full precision; unset: measured when the first window opens.
        greater_is_better: unset: what TrainingArguments say of `metric_for_best_model`, where that is this one; else
            False for names that end as those in `FALLING` do.

    Raises:
        ConfigError: before the first step, if drop is negative, no metric is named, nothing says what full precision is
            worth, or the other callback comes later; at the first edge, if the metric is not evaluated.
    Source: this library's choice.
    Cost: one evaluation a stage, and a copy of the weights on the CPU. A run that was resumed behind the last good
        stage has none, and goes on from the weights that it has.
    """

    def __init__(
        self,
        stompp: StoMPPTrainerCallback,
        drop: float,
        metric: str | None = None,
        full_precision: float | None = None,
        greater_is_better: bool | None = None,
    ) -> None:
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not drop >= 0.0:
            raise ConfigError(f"StopFreezingCallback: drop={drop!r} must be a number of at least 0, as in drop=0.03.")
        self.stompp, self.drop, self.metric = stompp, drop, metric
        self.given, self.greater_is_better = full_precision, greater_is_better
        self._reset()

    def _reset(self) -> None:
        self.full_precision = self.given
        self.good_stages = 0
        self.stopped = False
        self.undone_at: int | None = None
        """The step of the evaluation after which its stage became real again."""
        self._edge: int | None = None
        self._copy: dict[str, torch.Tensor] = {}

    def state(self) -> dict[str, Any]:
        """What Trainer saves with a checkpoint."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in KEPT}}

    @classmethod
    def from_state(cls, state: Any) -> "StopFreezingCallback":
        """Not from a checkpoint alone, which has no model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "StopFreezingCallback reads its own state when a run is resumed: leave "
            "TrainingArguments(restore_callback_states_from_checkpoint=False)."
        )

    # ---- Trainer's events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reset()
        kept = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(kept, dict):  # of the run that is resumed
            for name, value in kept.get("attributes", {}).items():
                setattr(self, name, value)
        name = self.metric or args.metric_for_best_model
        if not name:
            raise ConfigError("StopFreezingCallback: which metric? As in StopFreezingCallback(..., metric='accuracy').")
        self._key = name if name.startswith("eval_") else f"eval_{name}"
        self._sign = 1.0 if self._grows(args) else -1.0
        progression = self.stompp.progression
        if progression is None:
            raise ConfigError("StopFreezingCallback comes behind the other callback: callbacks=[stompp, stop].")
        self._steps = _edges(progression)
        measured = [step for step, done in self._steps.items() if done == 0 and step > state.global_step]
        if self._steps and self.full_precision is None and not measured:
            raise ConfigError(
                "StopFreezingCallback: no step of this run comes before the first stage freezes, and there is no full "
                "precision to compare with. Name its metric, as in full_precision=0.91; or let the run begin in full "
                "precision, and stages have windows: StoMPPConfig(start=0.2, end=0.7)."
            )
        if state.global_step == 0 or self._steps.get(state.global_step) == self.good_stages:
            self._keep(progression)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.undone_at is not None and state.global_step == self.undone_at:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None  # of a model that is gone

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.stopped and state.global_step in self._steps:
            self._edge = state.global_step
            control.should_evaluate = control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._edge != state.global_step or not metrics:
            return
        if self._key not in metrics:
            if any(key.startswith("eval_binary_") for key in metrics):
                return  # the second evaluation of `evaluate_binary`
            names = ", ".join(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
            raise ConfigError(
                f"StopFreezingCallback: {self._key.removeprefix('eval_')!r} is not evaluated; there are {names}. Add "
                "it to compute_metrics, or name one of these: StopFreezingCallback(..., metric=...)."
            )
        progression, value, self._edge = self.stompp._required(), float(metrics[self._key]), None
        done = self._steps[state.global_step]
        if done == 0 and self.full_precision is None:
            self.full_precision = value
        if self.full_precision is not None and not self._sign * (self.full_precision - value) <= self.drop:
            self._stop(progression, value, state)
        else:
            self.good_stages = done
            self._keep(progression)

    # ---- the parts ----

    def _grows(self, args: Any) -> bool:
        """Whether more of the metric is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        best = args.metric_for_best_model
        if best is not None and self._key in (best, f"eval_{best}") and args.greater_is_better is not None:
            return bool(args.greater_is_better)
        return not self._key.endswith(FALLING)

    def _keep(self, progression: Progression) -> None:
        tensors = _tensors(progression.model)
        self._copy = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def _stop(self, progression: Progression, value: float, state: Any) -> None:
        if self._copy:
            with torch.no_grad():
                for name, tensor in _tensors(progression.model).items():
                    tensor.copy_(self._copy[name])
        else:
            warn_once(
                logger, progression.model,
                "StopFreezingCallback: this run was resumed behind the last good stage, so there are no weights of its "
                "end to go back to; training goes on from those that there are.",
            )  # fmt: skip
        progression.stop_after(self.good_stages)
        self.stopped, self.undone_at, self._copy = True, state.global_step, {}
        if state.is_world_process_zero:
            say(
                logger, "%s is %.4g, more than %g from full precision (%.4g): freezing ends with stage %d of %d.",
                self._key, value, self.drop, self.full_precision, self.good_stages, progression.plan.stage_count,
            )  # fmt: skip


def _edges(progression: Progression) -> dict[int, int]:
    windows: dict[int, list[Window]] = {}
    for entry in progression.plan.entries:
        if not progression.layers[entry.name].always_real:
            windows.setdefault(entry.stage, []).append(progression.windows[entry.name])
    return stage_edges(windows[stage] for stage in sorted(windows))


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This process's part of every parameter and buffer but the states of the progression, which follow the step."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: local(tensor.detach()) for name, tensor in named.items() if not name.endswith("stompp_state")}
