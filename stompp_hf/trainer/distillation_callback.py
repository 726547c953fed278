"""DistillationCallback: gives Trainer's model a teacher, by default its own full-precision self."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import CheckpointError, ConfigError, DistillationError
from ..surgery.members import get_plan, members, planned_model
from ..training.distillation import Distiller, as_if_pending, snapshot
from ..training.teacher_losses import check_weights

logger = logging.getLogger(__name__)

TEACHER_FOLDER = "_teacher"
"""Where a model's own snapshot is kept below output_dir, for resumes; Trainer uploads no folder that starts with _."""


class DistillationCallback(TrainerCallback):
    """Trains a binarized model towards a full-precision teacher while Trainer trains it on the task.

    Use:  callbacks=[StoMPPTrainerCallback(), DistillationCallback()]

    Without a teacher, the model is its own: it is fine-tuned in full precision until the first stage's window opens
    (`StoMPPConfig(start=...)`), and a copy of it at that step teaches the rest of the run. The copy is kept in
    `output_dir/_teacher`, so that a resumed run goes on with the same one. See `Distiller` for the loss.

    With the loss it logs stompp_task, stompp_logits, stompp_hidden and stompp_relations: the weighted parts of the last
    step's loss.

    Args:
        teacher: a fine-tuned model of the same task, its path or hub name, or None: the model's own snapshot.
        logits, hidden, task, temperature, relations, embeddings: as in `Distiller`.

    Raises (before the first step, or after it for a loss that nobody uses):
        ConfigError: an option of Trainer that leaves the model's own loss aside, or a bad weight.
        CheckpointError: a resumed run whose snapshot is gone.
        DistillationError: teacher and model cannot be compared, or Trainer computes a loss of its own.
    """

    def __init__(
        self,
        teacher: str | os.PathLike[str] | nn.Module | None = None,
        logits: float = 1.0,
        hidden: float = 1.0,
        task: float = 1.0,
        temperature: float = 1.0,
        relations: float = 0.0,
        embeddings: bool = False,
    ) -> None:
        self.teacher = teacher
        self.options: dict[str, Any] = {
            "logits": logits, "hidden": hidden, "task": task, "temperature": temperature, "relations": relations,
            "embeddings": embeddings,
        }  # fmt: skip
        check_weights(**self.options)
        self.distiller: Distiller | None = None
        self._snapshot_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()  # auto_find_batch_size begins anew
        if args.label_smoothing_factor:
            raise ConfigError(
                f"DistillationCallback: label_smoothing_factor={args.label_smoothing_factor} makes Trainer compute a "
                "loss of its own, without the teacher's part; set it to 0."
            )
        if args.n_gpu > 1:
            raise ConfigError(
                "DistillationCallback does not work under DataParallel (one process, several GPUs): start one process "
                "a GPU, as in `accelerate launch script.py`."
            )
        root = planned_model(kwargs["model"])
        if self.teacher is not None:
            teacher: Any = self.teacher
            self._teach(root, _load(root, teacher) if isinstance(teacher, (str, os.PathLike)) else teacher, args)
            return
        total = next(iter(members(root).values())).total_steps or state.max_steps
        self._snapshot_at = min(window.begin for window in get_plan(root).windows(total).values())
        if state.global_step > self._snapshot_at:
            self._resume(root, args)
        elif self._snapshot_at == 0:
            logger.warning(
                "the teacher is the model as it was loaded. Unless that was fine-tuned on this task, give it time to "
                "be: StoMPPConfig(start=0.2), or DistillationCallback(teacher=PATH)."
            )

    def _resume(self, root: Any, args: Any) -> None:
        folder = Path(args.output_dir, TEACHER_FOLDER)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is gone: it held the teacher of the run that this one goes on with. Put it back, or give "
                "another one: DistillationCallback(teacher=PATH)."
            )
        self._teach(root, as_if_pending(_load(root, folder)), args)

    def _teach(self, root: Any, teacher: Any, args: Any) -> None:
        self.distiller = Distiller(root, teacher, **self.options)
        self.distiller.autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.distiller is None and state.global_step == self._snapshot_at:
            root: Any = planned_model(kwargs["model"])
            teacher: Any = snapshot(root)
            if args.should_save:
                teacher.save_pretrained(Path(args.output_dir, TEACHER_FOLDER))
            self._teach(root, teacher, args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.distiller is not None and not self.distiller.used:
            raise DistillationError(
                "the teacher's loss got no gradient in this step: Trainer was given compute_loss_func, or a subclass "
                "computes its loss without `outputs.loss`. Add the teacher's part there (hidden_loss, logits_loss "
                "and relation_loss of stompp_hf.training.teacher_losses), or use the model's own loss."
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.distiller is not None and logs and "loss" in logs:
            parts = {f"stompp_{name}": round(float(part), 5) for name, part in self.distiller.last.items()}
            logs.update(parts)
            state.log_history[-1].update(parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self.distiller is not None:
            self.distiller.detach()
        self.distiller = None


def _load(root: Any, path: Any) -> Any:
    return type(root).from_pretrained(path, dtype=torch.float32)
