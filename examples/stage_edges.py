"""Evaluation at the moments that matter in a progression, and what came of it: shared by the Trainer examples."""

from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainerCallback

from stompp_hf import StoMPPTrainerCallback, StopFreezingCallback, get_plan, stage_curve
from stompp_hf.reports.stage_curve import write_stages


@dataclass
class StopArguments:
    """When freezing stops by itself."""

    stop_drop: float | None = field(
        default=None,
        metadata={
            "help": "Freeze no further once the main metric has fallen by more than this since full precision, and go "
            "back to the last good stage's end; needs --start above 0, or --stop_reference."
        },
    )
    stop_reference: float | None = field(default=None, metadata={"help": "The main metric in full precision."})

    def add_stop(self, trainer: Trainer, stompp: StoMPPTrainerCallback, metric: str) -> None:
        """Evaluate at the edges of stages, and stop there if that was asked for."""
        trainer.add_callback(EvaluateAtStageEdges(stompp))
        if self.stop_drop is not None:
            trainer.add_callback(StopFreezingCallback(stompp, self.stop_drop, metric, self.stop_reference))


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


def print_stages(trainer: Trainer, stompp: StoMPPTrainerCallback, key: str) -> None:
    """The metric `key` at each evaluation, and what the model would then weigh if packed, also into stages.json."""
    plan, progression, name = get_plan(trainer.model), stompp.progression, key.removeprefix("eval_")
    if progression is None:
        return
    points = stage_curve(trainer.model) if plan.freezing else []
    if points:
        write_stages(trainer.args.output_dir, points)
    stops = [c for c in trainer.callback_handler.callbacks if isinstance(c, StopFreezingCallback)]
    undone = {stop.undone_at: stop.good_stages + 1 for stop in stops}
    records = {record["step"]: record for record in reversed(trainer.state.log_history) if key in record}
    for step, record in sorted(records.items()):
        if step in undone:
            print(f"  step {step:6d}: with stage {undone[step]} {name} {record[key]:.4f}, undone: it stays real")
            continue
        frozen = plan.freezing - len(progression.unfinished_stages(step))
        line = f"  step {step:6d}: {frozen} of {plan.stage_count} stages frozen, {name} {record[key]:.4f}"
        if points:
            share = points[frozen].share_1bit
            line += f", packed {points[frozen].bytes / 1e6:.2f} MB"
            line += f", {share:.0%} of multiply-accumulates 1-bit" if share else ""
        print(line)
