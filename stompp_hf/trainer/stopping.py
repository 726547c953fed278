"""StopFreezingCallback: freeze stage by stage only as long as the held-out metric stands it."""

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..console import say, warn_once
from ..errors import ConfigError
from ..integrations.sharding import local
from ..method.windows import Window
from ..training.progression import Progression
from .callback import StoMPPTrainerCallback, logger


class StopFreezingCallback(TrainerCallback, ExportableState):
    """Evaluates when a stage has frozen, and stops the freezing where the metric has fallen too far.

    Then the weights go back to the end of the last good stage, the stages behind it are real for good, and training
    goes on to its end. What comes out is finished: it is saved, packed, fused and exported as any other, with its
    frozen stages in bits and the rest as it was. The optimizer keeps its moments.

    Use:  stompp = StoMPPTrainerCallback()
          callbacks=[stompp, StopFreezingCallback(stompp, drop=0.03, metric="accuracy")]

    Args:
        stompp: the callback that freezes the model.
        drop: how far the metric may fall, in its own units.
        metric: its name, with or without "eval_"; unset: `metric_for_best_model`. A loss counts as falling when it
            rises, as does whatever `greater_is_better=False` is said of.
        full_precision: what it was in full precision; unset: measured when the first window opens (`start` above 0).

    Raises (before the first step):
        ConfigError: drop is negative, no metric is named, or nothing says what full precision is worth.
    Source: this library's choice.
    Cost: one evaluation a stage, and a copy of the weights on the CPU. A resumed run has none, and goes on from the
        weights that it has.
    """

    def __init__(
        self,
        stompp: StoMPPTrainerCallback,
        drop: float,
        metric: str | None = None,
        full_precision: float | None = None,
    ) -> None:
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not drop >= 0.0:
            raise ConfigError(f"StopFreezingCallback: drop={drop!r} must be a number of at least 0, as in drop=0.03.")
        self.stompp, self.drop, self.metric, self.full_precision = stompp, drop, metric, full_precision
        self.good_stages = 0
        self.stopped = False
        self.undone_at: int | None = None
        """The step of the evaluation after which its stage became real again."""
        self._edge: int | None = None
        self._copy: dict[str, torch.Tensor] = {}

    def state(self) -> dict[str, Any]:
        """What Trainer saves with a checkpoint."""
        kept = ("full_precision", "good_stages", "stopped", "undone_at")
        values = {name: getattr(self, name) for name in kept}
        return {"args": {"drop": self.drop, "metric": self.metric}, "attributes": values}

    # ---- Trainer's events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.metric = self.metric or args.metric_for_best_model
        if not self.metric:
            raise ConfigError("StopFreezingCallback: which metric? As in StopFreezingCallback(..., metric='accuracy').")
        self.metric = self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"
        self._sign = -1.0 if self.metric.endswith("loss") or args.greater_is_better is False else 1.0
        kept = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(kept, dict):  # of the run that is resumed
            for name, value in kept.get("attributes", {}).items():
                setattr(self, name, value)
        if self._progression().config.start == 0.0 and self.full_precision is None:
            raise ConfigError(
                "StopFreezingCallback: with start=0.0 there is no full precision to compare with. Name its metric, as "
                "in full_precision=0.91; or let the run begin in full precision: StoMPPConfig(start=0.2)."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progression = self._progression()
        if self.stopped or state.global_step not in self._edges(progression):
            return
        self._edge = state.global_step
        control.should_evaluate = control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._edge != state.global_step or self.metric not in (metrics or {}):
            return
        progression, value, self._edge = self._progression(), float(metrics[self.metric]), None
        done = self._edges(progression)[state.global_step]
        if done == 0 and self.full_precision is None:
            self.full_precision = value
        if self.full_precision is not None and self._sign * (self.full_precision - value) > self.drop:
            self._stop(progression, value, state)
        else:
            self.good_stages = done
            tensors = _tensors(progression.model)
            self._copy = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    # ---- the parts ----

    def _progression(self) -> Progression:
        return self.stompp._required()

    @staticmethod
    def _edges(progression: Progression) -> dict[int, int]:
        """The number of stages that are frozen at each step at which a stage begins or has just ended."""
        windows: dict[int, list[Window]] = {}
        for entry in progression.plan.entries:
            if not progression.layers[entry.name].always_real:
                windows.setdefault(entry.stage, []).append(progression.windows[entry.name])
        ends = {max(window.end for window in inside): stage + 1 for stage, inside in windows.items()}
        return {min((w.begin for inside in windows.values() for w in inside), default=0): 0, **ends}

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
                logger, "%s is %.4g, more than %g below full precision (%.4g): freezing ends with stage %d of %d.",
                self.metric, value, self.drop, self.full_precision, self.good_stages, progression.plan.stage_count,
            )  # fmt: skip


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This process's part of every parameter and buffer but the states of the progression, which follow the step."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: local(tensor.detach()) for name, tensor in named.items() if not name.endswith("stompp_state")}
