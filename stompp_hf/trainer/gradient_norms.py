"""GradientNormCallback: how much gradient reaches each stage, for the record and the pictures."""

from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError
from ..surgery.members import get_plan
from ..training.metrics import gradient_flow

GRADIENT_NORM = "stompp_grad_norm/"


class GradientNormCallback(TrainerCallback):
    """Logs `stompp_grad_norm/<stage>` for every stage, in log_history, from a look every few steps.

    Forward: the Euclidean norm of dL/dw over all binary weights of the stage, right before the optimizer's step (after
    clipping, if Trainer clips), 0 where no gradient arrives; the mean over the looks since the last record.

    Use:  Trainer(model, args, ..., callbacks=[StoMPPTrainerCallback(), GradientNormCallback()])
    Cost: a look reads every gradient once; steps in between cost nothing.

    Args:
        every: look every this many optimizer steps.

    Raises:
        ConfigError: `every` is no positive number.

    Source: the blockade that it shows is Smith and Islam's (2026); the sampling is this library's choice.
    """

    def __init__(self, every: int = 10) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r} must be a positive number of steps, as in GradientNormCallback(10).")
        self.every = every
        self._looks: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        model = kwargs["model"]
        stages = {entry.name: entry.stage_name for entry in get_plan(model).entries}
        squares = dict.fromkeys(stages.values(), 0.0)
        for name, flow in gradient_flow(model).items():
            squares[stages[name]] += flow.norm**2
        self._looks.append({name: square**0.5 for name, square in squares.items()})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not self._looks:
            return
        count = len(self._looks)
        norms = {name: sum(look[name] for look in self._looks) / count for name in self._looks[0]}
        self._looks.clear()
        state.log_history[-1].update({f"{GRADIENT_NORM}{name}": norm for name, norm in norms.items()})
