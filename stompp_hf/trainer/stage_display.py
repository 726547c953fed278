"""The stage beside Trainer's progress bar, on a terminal and in a notebook."""

import html
from typing import Any

from ..training.progression import Progression


def show_stage(trainer: Any, progression: Progression) -> None:
    """Write which stage freezes, and how far it is, behind the bar of every callback that has one."""
    number, name, share = progression.stage_in_transition()
    text = f"stage {number}/{progression.plan.stage_count} {name} {share:.0%}"
    if all(layer.is_settled for layer in progression.layers.values()):
        text = progression.outcome
    for callback in trainer.callback_handler.callbacks:
        bar, notebook = getattr(callback, "training_bar", None), getattr(callback, "training_tracker", None)
        if bar is not None:
            bar.set_postfix_str(text, refresh=False)
        if notebook is not None:  # a notebook's bar shows it when it is drawn next
            notebook.prefix = html.escape(text)
