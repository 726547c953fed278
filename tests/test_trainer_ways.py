"""Ways in which Trainer starts, ends and feeds a run: each freezes every stage, or says why not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import CASES, quick
from torch.utils.data import IterableDataset
from train_and_die import arguments, rows
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from stompp_hf import StoMPPTrainerCallback, binarize_model
from stompp_hf.errors import ShardingError

BERT = CASES["bert"]


def bert() -> Any:
    return binarize_model(BERT.build(), quick())


class Stream(IterableDataset):
    """The same rows, one after the other, without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(rows(24))


def frozen(callback: StoMPPTrainerCallback) -> bool:
    """Whether the last run froze everything, at its own last step."""
    progression = callback.progression
    return progression.is_complete() and progression.current_step == progression.total_steps


def test_streaming_data_with_max_steps(tmp_path):
    callback = StoMPPTrainerCallback()
    args = arguments(tmp_path, max_steps=14, save_strategy="no")
    Trainer(bert(), args, train_dataset=Stream(), callbacks=[callback]).train()
    assert frozen(callback) and callback.progression.total_steps == 14


def test_epochs_that_do_not_divide(tmp_path):
    callback = StoMPPTrainerCallback()
    args = arguments(
        tmp_path, max_steps=-1, num_train_epochs=2.5, gradient_accumulation_steps=3, per_device_train_batch_size=3,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(bert(), args, train_dataset=rows(32), callbacks=[callback])
    trainer.train()
    assert frozen(callback) and callback.progression.total_steps == trainer.state.max_steps == trainer.state.global_step


def test_model_init_binarizes_each_time(tmp_path):
    callback = StoMPPTrainerCallback()
    trainer = Trainer(
        model_init=bert, args=arguments(tmp_path, max_steps=10, save_strategy="no"), train_dataset=rows(),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    first = callback.progression.model
    trainer.train()  # what hyperparameter_search does for each trial
    assert callback.progression.model is trainer.model is not first and frozen(callback)


def test_auto_find_batch_size_begins_anew(tmp_path, caplog):
    class Full(TrainerCallback):
        """Runs out of memory once, in mid-run."""

        done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6 and not self.done:
                self.done = True
                raise RuntimeError("CUDA out of memory.")

    callback, full = StoMPPTrainerCallback(), Full()
    args = arguments(tmp_path, max_steps=12, auto_find_batch_size=True, save_strategy="no")
    trainer = Trainer(bert(), args, train_dataset=rows(), callbacks=[callback, full])
    trainer.train()
    assert full.done and frozen(callback) and trainer.state.global_step == 12
    assert "training begins anew at step 0" in caplog.text


def test_early_stopping_cannot_end_a_run_before_everything_is_frozen(tmp_path):
    callback = StoMPPTrainerCallback()
    args = arguments(
        tmp_path, max_steps=20, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    callbacks = [callback, EarlyStoppingCallback(early_stopping_patience=1)]
    trainer = Trainer(bert(), args, train_dataset=rows(), eval_dataset=rows(4), callbacks=callbacks)
    trainer.train()
    assert trainer.state.global_step >= 16 and callback.progression.is_complete(trainer.state.best_global_step)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="no")
    trainer = Trainer(bert(), args, train_dataset=rows(), callbacks=[callback := StoMPPTrainerCallback()])
    args._n_gpu = 2
    with pytest.raises(ShardingError, match="accelerate launch"):
        callback.on_train_begin(args, trainer.state, trainer.control, model=trainer.model, optimizer=None)
