"""A second evaluation, as if the model were fully binary already."""

import itertools
from collections.abc import Callable
from typing import Any

from ..integrations.transformers import prepared
from ..surgery.running import random_states_kept
from ..training.progression import Progression


def evaluate_twice(
    trainer: Any, progression: Callable[[], Progression | None], batches: int
) -> Callable[..., dict[str, float]]:
    """A stand-in for `trainer.evaluate` that evaluates the model as it is, and then as `eval_binary_*`.

    Args:
        trainer: whose evaluation it is.
        progression: gives what drives the model, or None where there is no second evaluation.
        batches: layers that are still real are calibrated on this many training batches, for that evaluation only.
    """
    evaluate = trainer.evaluate
    inside = False

    def both(*args: Any, **kwargs: Any) -> dict[str, float]:
        nonlocal inside
        metrics: dict[str, float] = evaluate(*args, **kwargs)
        driving = None if inside else progression()  # several datasets are evaluated by calls from within
        if driving is None:
            return metrics
        prefix = kwargs.get("metric_key_prefix", "eval")
        inside = True
        try:
            with random_states_kept(), driving.committed(_first_batches(trainer, batches)):
                metrics.update(evaluate(*args, **{**kwargs, "metric_key_prefix": f"{prefix}_binary"}))
        finally:
            inside = False
        return metrics

    return both


def _first_batches(trainer: Any, count: int) -> list[Any]:
    return [prepared(trainer, batch) for batch in itertools.islice(trainer.get_train_dataloader(), count)]
