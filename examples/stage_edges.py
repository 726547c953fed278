"""Evaluation at the moments that matter in a progression: shared by the Trainer examples."""

from typing import Any

from transformers import TrainerCallback

from stompp_hf import StoMPPTrainerCallback


class EvaluateAtStageEdges(TrainerCallback):
    """Evaluates when a stage has just been frozen, and once when the first is about to."""

    def __init__(self, stompp: StoMPPTrainerCallback) -> None:
        self.stompp = stompp

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progression = self.stompp.progression
        windows = set() if progression is None else set(progression.windows.values())
        edges = {window.end for window in windows} | {min((w.begin for w in windows), default=0)}
        if state.global_step in edges:
            control.should_evaluate = control.should_log = True
