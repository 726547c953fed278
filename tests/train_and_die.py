"""Train a tiny BERT with Trainer, in a process of its own, and end it by SIGKILL where the job says so.

    python tests/train_and_die.py '[{"name": "a", "out": "runs/a", "kill": ["substep", 5]}, ...]'

The jobs run one after the other, each in a fork of a process that has only imported what it needs, so that a resumed
run knows nothing but its checkpoints. A job that is to be killed and finishes, or fails otherwise, is an error.
"""

import gc
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from models import CASES, quick
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from stompp_hf import DistillationCallback, StoMPPTrainerCallback, binarize_model
from stompp_hf.surgery.members import binary_layers

logger = logging.getLogger(__name__)
TOTAL, SAVE = 20, 5
WINDOWS = {"start": 0.1, "end": 0.9}
"""Stage 1 freezes in steps [2, 10), stage 2 in [10, 18)."""


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """A data set: single examples, some of them padded."""
    case = CASES["bert"]
    batches = [case.batch(seed) for seed in range(count // 4)]
    return [{key: value[row] for key, value in batch.items()} for batch in batches for row in range(4)]


def arguments(out: str | Path, **options: Any) -> TrainingArguments:
    """Quiet, on the CPU, a checkpoint every SAVE steps, with a loss record just before it."""
    values = {"max_steps": TOTAL, "save_steps": SAVE, "logging_steps": SAVE, "per_device_train_batch_size": 4}
    values |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3, "weight_decay": 0.1}
    return TrainingArguments(str(out), **{**values, **options})


class Recorder(TrainerCallback):
    """Writes states and digests of the masks of all layers after each update."""

    def __init__(self, out: str) -> None:
        self.path = Path(out, "masks.jsonl")

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        layers = binary_layers(model).values()
        masks = [mask for layer in layers for mask in (layer.weight_mask, layer.activation_mask)]
        digests = [None if mask is None else hashlib.sha256(mask.numpy().tobytes()).hexdigest() for mask in masks]
        with self.path.open("a") as file:
            file.write(json.dumps([state.global_step, [layer.stage_state for layer in layers], digests]) + "\n")


class Killer(TrainerCallback):
    """Ends the process, without a word, at one event of one step (steps count finished updates)."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def on_event(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if name == f"on_{self.event}" and state.global_step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)

        return on_event


def run(job: dict[str, Any]) -> None:
    """One training run, from the last checkpoint in its folder if there is one; `load`: the model is loaded from it."""
    out = job["out"]
    Path(out).mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(out)
    if job.get("load"):
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    else:
        config = quick(frozen_gradient=job["regime"], **WINDOWS, **job.get("options", {}))
        model = binarize_model(CASES["bert"].build(), config)
    args = arguments(out, optim=job["optim"], gradient_accumulation_steps=2, max_steps=job.get("max_steps", TOTAL))
    callbacks = [StoMPPTrainerCallback(), Recorder(out), *([DistillationCallback()] if job.get("teacher") else [])]
    if job.get("kill"):
        callbacks.append(Killer(*job["kill"]))
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=checkpoint)
    torch.save(model.state_dict(), Path(out, "final.pt"))
    Path(out, "history.json").write_text(json.dumps(trainer.state.log_history))


def main(jobs: list[dict[str, Any]]) -> None:
    """Run the jobs, each in a process of its own that ends as it should."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        CASES["bert"].build().save_pretrained(folder)  # imports what transformers imports late, once for all jobs
    gc.freeze()  # else each fork's first collection copies all pages
    for job in jobs:
        child = os.fork()
        if child == 0:
            try:
                logging.basicConfig(level=logging.WARNING, filename=f"{job['out']}.log", force=True)
                run(job)
                os._exit(0)
            except BaseException:
                logger.exception("this job failed: %s", job)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if killed != bool(job.get("kill")) or not (killed or status == 0):
            raise SystemExit(f"{job} ended with {status}:\n{Path(job['out'] + '.log').read_text()}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
