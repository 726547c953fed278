"""One real run of 20 steps, watched from outside: what pictures and reports are held against."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import CASES, quick
from train_and_die import arguments, rows
from transformers import Trainer, TrainerCallback

from stompp_hf import GradientNormCallback, StoMPPTrainerCallback, binarize_model, get_plan, record_run
from stompp_hf.surgery.members import binary_layers

STEPS, EVERY = 20, 2
WORDS = ["python", "train.py", "--hub_token", "abc123", "--api_key=abc123", "--learning_rate", "1e-3"]


@dataclass
class Watcher(TrainerCallback):
    """By step: the frozen share of each stage as the layers have it, and each stage's gradient norm."""

    shares: dict[int, list[float]] = field(default_factory=dict)
    norms: dict[int, list[float]] = field(default_factory=dict)

    def by_stage(self, model: Any) -> list[list[Any]]:
        """The binary layers of each stage."""
        layers, entries = binary_layers(model), get_plan(model).entries
        return [[layers[e.name] for e in entries if e.stage == stage] for stage in range(get_plan(model).stage_count)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stages = self.by_stage(kwargs["model"])
        self.shares[state.global_step] = [float(np.mean([x.frozen_share for x in stage])) for stage in stages]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def norm(stage: list[Any]) -> float:
            grads = [layer.weight.grad.flatten() for layer in stage if layer.weight.grad is not None]
            return float(torch.cat(grads).norm()) if grads else 0.0

        self.norms[state.global_step] = [norm(stage) for stage in self.by_stage(kwargs["model"])]


def accuracy(prediction: Any) -> dict[str, float]:
    """compute_metrics of the run."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run_trainer(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """A BERT of two blocks that freezes, STE-free, in [2, 10) and [10, 18) of 20 steps; saved as the examples do."""
    choices = {"start": 0.1, "end": 0.9, "frozen_gradient": "zero", **options}
    model = binarize_model(CASES["bert"].build(), quick(**choices))
    data = rows()
    saving = {
        "logging_steps": EVERY,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    watched = [StoMPPTrainerCallback(), GradientNormCallback(every=1), *callbacks]
    trainer = Trainer(
        model, arguments(folder, **saving), train_dataset=data, eval_dataset=data[:8], compute_metrics=accuracy,
        callbacks=watched,
    )  # fmt: skip
    record_run(folder, {"learning_rate": 1e-3, "hub_token": "abc123"}, WORDS)
    metrics = trainer.train().metrics
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    return trainer
