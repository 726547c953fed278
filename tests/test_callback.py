"""StoMPPTrainerCallback inside a real Trainer: metrics, best model, early stopping, resuming, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import CASES, logits, quick, same_tensors
from stack import random_states
from train_and_die import arguments, rows
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from stompp_hf import StoMPPConfig, StoMPPTrainerCallback, binarize_model
from stompp_hf.errors import CheckpointError, NotBinarizedError
from stompp_hf.surgery.members import binary_layers

BERT = CASES["bert"]
METRICS = {"stompp_frozen_fraction", "stompp_stage", "stompp_flip_ratio"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
EVALUATED |= {"metric_for_best_model": "accuracy", "load_best_model_at_end": True}


def bert(**options: Any) -> torch.nn.Module:
    """A tiny BERT that freezes in two stages, in [2, 10) and [10, 18) of 20 steps."""
    return binarize_model(BERT.build(), quick(**{"start": 0.1, "end": 0.9, **options}))


def trainer_of(out: Path, model: torch.nn.Module, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """A Trainer that saves nothing unless told to, and evaluates on eight examples."""
    data, metrics = rows(), options.pop("compute_metrics", None)
    args = arguments(out, **{"save_strategy": "no", "logging_steps": 2, **options})
    return Trainer(
        model, args, train_dataset=data, eval_dataset=data[:8], compute_metrics=metrics, callbacks=list(callbacks)
    )


def states(model: torch.nn.Module) -> list[str]:
    """State of each stage's first layer."""
    return [layer.stage_state for layer in list(binary_layers(model).values())[::6]]


def saved(out: Path, steps: int = 6, **options: Any) -> str:
    """A checkpoint of a run of 20 steps that was stopped after `steps`."""
    trainer_of(out, bert(**options), StoMPPTrainerCallback(), StopAt(steps), save_strategy="steps").train()
    return str(out / f"checkpoint-{steps}")


def warnings(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """This library's warnings that contain `text`."""
    found = [r.getMessage() for r in caplog.records if r.name.startswith("stompp_hf") and r.levelname == "WARNING"]
    return [message for message in found if text in message]


class StopAt(TrainerCallback):
    """Ends training, with a checkpoint, after `step` updates; counts the steps begun."""

    def __init__(self, step: int) -> None:
        self.step, self.begun = step, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


class Tracker(TrainerCallback):
    """What an experiment tracker sees."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.records.append(dict(logs))


class Falling:
    """compute_metrics of a model that gets worse as it freezes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.calls += 1
        return {"accuracy": 1.0 - 0.01 * self.calls}


# ---- the three lines, metrics, trackers ----


def test_three_lines_train_a_fully_binary_model_that_reloads(tmp_path):
    model = BERT.build()
    model = binarize_model(model, StoMPPConfig())
    trainer = trainer_of(tmp_path, model, StoMPPTrainerCallback())
    trainer.train()
    trainer.save_model(tmp_path / "out")
    assert states(model) == ["frozen", "frozen"]
    for layer in binary_layers(model).values():
        assert (layer.step, layer.total_steps, layer.activation_ready) == (20, 20, True)
        assert torch.equal(layer.binary_weight().abs().amin(1), layer.binary_weight().abs().amax(1))
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded, BERT.batch(9)), logits(model, BERT.batch(9)))


@pytest.mark.parametrize("attached", [False, True])
def test_metrics_stand_in_the_record_of_the_loss(tmp_path, attached):
    tracker, callback = Tracker(), StoMPPTrainerCallback()
    trainer = trainer_of(tmp_path, bert(), tracker, *([] if attached else [callback]))
    if attached:
        assert callback.attach(trainer) is callback
        assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 10 and all(record.keys() >= METRICS for record in records)
    assert not [r for r in trainer.state.log_history if "loss" not in r and METRICS & r.keys()]
    assert not any("stompp_freezing" in record for record in trainer.state.log_history)
    assert [record["stompp_stage"] for record in records] == [1] * 4 + [2] * 6
    shares = [record["stompp_frozen_fraction"] for record in records]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[4] == 0.5 and shares[-1] == 1.0
    assert records[0]["stompp_flip_ratio"] > 0 and all(0 <= r["stompp_flip_ratio"] <= 1 for r in records)
    seen = [record for record in tracker.records if "loss" in record]
    assert len(seen) == 10 and all((record.keys() >= METRICS) == attached for record in seen)


def test_attaching_twice_or_to_a_trainer_that_has_the_callback_adds_it_once(tmp_path):
    callback = StoMPPTrainerCallback()
    trainer = trainer_of(tmp_path, bert(), callback, max_steps=8)
    callback.attach(trainer)
    assert callback.attach(trainer).attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert any(record.get("stompp_flip_ratio") for record in trainer.state.log_history)


@pytest.mark.parametrize(("trackers", "attached", "count"), [(1, False, 1), (1, True, 0), (0, False, 0)])
def test_a_tracker_that_sees_nothing_is_told_once(tmp_path, caplog, trackers, attached, count):
    callback = StoMPPTrainerCallback()
    trainer = trainer_of(tmp_path, bert(), *([] if attached else [callback]), max_steps=4)
    trainer.args.report_to = ["tensorboard"] * trackers
    if attached:
        callback.attach(trainer)
    trainer.train()
    told = warnings(caplog, "attach(trainer)")
    assert len(told) == count and all("tensorboard" in message for message in told)


def test_the_progress_bar_names_the_stage(tmp_path):
    bar = TrainerCallback()
    shown: list[str] = []
    bar.training_bar = SimpleNamespace(set_postfix_str=lambda text, refresh: shown.append(text))
    trainer = trainer_of(tmp_path, bert(), bar)
    StoMPPTrainerCallback().attach(trainer)
    trainer.train()
    assert shown[5] == "stage 1/2 bert.encoder.layer.0 12%" and shown[16].startswith("stage 2/2 bert.encoder.layer.1 ")
    assert shown[17:] == ["fully binary"] * 3  # the last window is [10, 18)


# ---- the best model, early stopping ----


def test_the_best_model_is_a_fully_binary_one(tmp_path):
    model = bert()
    trainer = trainer_of(tmp_path, model, StoMPPTrainerCallback(), compute_metrics=Falling(), **EVALUATED)
    trainer.train()
    assert trainer.state.best_global_step == 18
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-18"
    assert states(model) == ["frozen", "frozen"] and {layer.step for layer in binary_layers(model).values()} == {18}
    assert states(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-18")) == ["frozen"] * 2


def test_without_a_fully_binary_checkpoint_none_is_best(tmp_path, caplog):
    options = {**EVALUATED, "eval_steps": 4, "save_steps": 4}
    trainer = trainer_of(tmp_path, bert(), StoMPPTrainerCallback(), StopAt(16), compute_metrics=Falling(), **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None and states(trainer.model) == ["frozen", "transition"]
    assert warnings(caplog, "before these stages were frozen: bert.encoder.layer.1")


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_waits_for_full_freeze(tmp_path, caplog, first):
    pair = [EarlyStoppingCallback(early_stopping_patience=1), StoMPPTrainerCallback()]
    options = {"compute_metrics": Falling(), "max_steps": 30, **EVALUATED}
    trainer = trainer_of(tmp_path, bert(start=0.0, end=0.6), *pair[:: 1 if first else -1], **options)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (20, 18)
    assert not warnings(caplog, "before these stages")


def test_an_unfinished_progression_is_told(tmp_path, caplog):
    trainer_of(tmp_path, bert(), StoMPPTrainerCallback(), StopAt(12)).train()
    (told,) = warnings(caplog, "training ended at step 12")
    assert "bert.encoder.layer.1" in told and "bert.encoder.layer.0" not in told


# ---- evaluate_binary ----


def test_evaluate_binary_measures_the_committed_model_and_leaves_no_trace(tmp_path):
    weights = []
    for binary in (False, True):
        trainer = trainer_of(tmp_path, bert(), eval_strategy="steps", eval_steps=4)
        StoMPPTrainerCallback(evaluate_binary=binary, calibration_batches=2).attach(trainer)
        trainer.train()
        weights.append(trainer.model.state_dict())
        records = {
            kind: [record for record in trainer.state.log_history if f"{kind}_loss" in record]
            for kind in ("eval", "eval_binary")
        }
        assert [record["step"] for record in records["eval"]] == [4, 8, 12, 16, 20]
        if binary:
            pairs = list(zip(records["eval"], records["eval_binary"], strict=True))
            assert [one["eval_loss"] == other["eval_binary_loss"] for one, other in pairs] == [False] * 4 + [True]
        else:
            assert not records["eval_binary"]
    assert same_tensors(*weights) == []


def test_evaluate_binary_leaves_model_and_random_state(tmp_path):
    tensors = []

    class Inspect(TrainerCallback):
        """Evaluates in the middle of training, and looks before and after."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step not in (1, 6, 12):
                return
            layers = binary_layers(model).values()

            def look() -> list[Any]:
                modes = [module.training for module in model.modules()]
                return [[(n.stage_state, n.weight_mask is None, n.activation_ready) for n in layers], modes]

            generators, before = random_states(), (look(), {k: v.clone() for k, v in model.state_dict().items()})
            trainer.evaluate()
            drawn = random_states()
            torch.set_rng_state(torch.tensor(generators[0], dtype=torch.uint8))
            evaluate_once()
            assert random_states() == drawn  # what one evaluation draws, and no more
            model.train()
            assert look() == before[0] and same_tensors(model.state_dict(), before[1]) == []
            tensors.append(before[1])

    trainer = trainer_of(tmp_path, bert(), Inspect())
    evaluate_once = trainer.evaluate
    StoMPPTrainerCallback(evaluate_binary=True).attach(trainer)
    trainer.train()
    assert len(tensors) == 3


# ---- resuming and starting again ----


@pytest.mark.parametrize("attached", [False, True])
def test_a_plain_model_is_refused_before_the_first_step(tmp_path, attached):
    steps = StopAt(1)
    trainer = trainer_of(tmp_path, BERT.build(), steps, *([] if attached else [StoMPPTrainerCallback()]))
    if attached:
        StoMPPTrainerCallback().attach(trainer)
    with pytest.raises(NotBinarizedError, match="binarize_model"):
        trainer.train()
    assert steps.begun == 0


FIXED = {"learn_weight_scale": False, "learn_activation_scale": False, "learn_activation_threshold": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [(FIXED, "saved before binarize_model"), ({}, "parameter group")],  # with learnable scales, torch speaks first
    ids=["fixed", "learnable"],
)
def test_a_checkpoint_without_stompp_is_refused_before_the_first_step(tmp_path, options, message):
    trainer_of(tmp_path, BERT.build(), StopAt(2), save_strategy="steps").train()
    steps = StopAt(20)
    with pytest.raises(ValueError, match=message) as caught:
        trainer_of(tmp_path, bert(**options), StoMPPTrainerCallback(), steps).train(str(tmp_path / "checkpoint-2"))
    assert steps.begun == 0 and isinstance(caught.value, CheckpointError) == bool(options)


def test_attached_a_plain_checkpoint_is_refused_in_our_own_words(tmp_path):
    """With learnable scales torch would complain of parameter groups before any callback runs."""
    trainer_of(tmp_path, BERT.build(), StopAt(2), save_strategy="steps").train()
    steps = StopAt(20)
    for checkpoint in (str(tmp_path / "checkpoint-2"), True):
        trainer = trainer_of(tmp_path, bert(), steps)
        StoMPPTrainerCallback().attach(trainer)
        with pytest.raises(CheckpointError, match="saved before binarize_model"):
            trainer.train(resume_from_checkpoint=checkpoint)
    assert steps.begun == 0


@pytest.mark.parametrize("options", [{"stages": "module"}, {"mask_seed": 1}, {"end": 0.8}, {"schedule": "linear"}])
def test_a_checkpoint_of_another_progression_is_refused_before_the_first_step(tmp_path, options):
    steps = StopAt(20)
    trainer = trainer_of(tmp_path, bert(**options), StoMPPTrainerCallback(), steps)
    with pytest.raises(CheckpointError, match="other layers, stages, order, schedule or seed"):
        trainer.train(saved(tmp_path))
    assert steps.begun == 0


def test_a_resume_with_another_max_steps_keeps_the_total(tmp_path, caplog):
    checkpoint, callback = saved(tmp_path), StoMPPTrainerCallback()
    trainer = trainer_of(tmp_path, bert(), callback, max_steps=24)
    trainer.train(checkpoint)
    assert trainer.state.global_step == 24 and callback.progression.total_steps == 20
    assert len(warnings(caplog, "fixed at 20 steps")) == 1
    assert [r["stompp_stage"] for r in trainer.state.log_history if "stompp_stage" in r] == [1] * 4 + [2] * 8


def test_a_resume_may_rescale_what_is_left_and_never_thaws(tmp_path, caplog):
    callback = StoMPPTrainerCallback(rescale=True)
    trainer = trainer_of(tmp_path / "a", bert(), callback, max_steps=30)
    trainer.train(saved(tmp_path / "a"))
    assert callback.progression.total_steps == 30 and states(trainer.model) == ["frozen", "frozen"]
    stages = {r["step"]: r["stompp_stage"] for r in trainer.state.log_history if "stompp_stage" in r}
    assert (stages[14], stages[16]) == (1, 2)  # the windows are [3, 15) and [15, 27) now
    assert not warnings(caplog, "fixed at")
    with pytest.raises(CheckpointError, match=r"bert\.encoder\.layer\.0 would thaw"):
        trainer_of(tmp_path / "b", bert(), StoMPPTrainerCallback(rescale=True), max_steps=30).train(
            saved(tmp_path / "b", steps=12)
        )


def test_training_a_finished_model_again_keeps_it_frozen(tmp_path, caplog):
    model = bert(frozen_gradient="zero", learn_weight_scale=False)
    trainer_of(tmp_path, model, StoMPPTrainerCallback()).train()
    binary = [layer.binary_weight() for layer in binary_layers(model).values()]
    head = model.classifier.weight.detach().clone()
    seen: set[str] = set()
    handle = next(iter(binary_layers(model).values())).register_forward_pre_hook(
        lambda layer, _: seen.add(layer.stage_state)
    )
    trainer = trainer_of(tmp_path, model, StoMPPTrainerCallback(), max_steps=10)
    caplog.clear()
    trainer.train()
    handle.remove()
    assert seen == {"frozen"} and len(warnings(caplog, "over (fully binary)")) == 1
    assert all(map(torch.equal, binary, [layer.binary_weight() for layer in binary_layers(model).values()]))
    assert not torch.equal(head, model.classifier.weight)


def test_a_full_precision_run_is_called_one(tmp_path, caplog):
    model, shown = bert(binarize="nothing"), []
    for _ in range(2):
        bar: Any = TrainerCallback()
        bar.training_bar = SimpleNamespace(set_postfix_str=lambda text, refresh: shown.append(text))
        trainer = trainer_of(tmp_path, model, bar)
        StoMPPTrainerCallback().attach(trainer)
        trainer.train()
    assert set(shown) == {"full precision"}
    assert len(warnings(caplog, "over (full precision)")) == 1


def test_a_model_loaded_in_mid_progression_does_not_start_over(tmp_path):
    model, steps = AutoModelForSequenceClassification.from_pretrained(saved(tmp_path)), StopAt(20)
    assert states(model) == ["transition", "pending"]
    with pytest.raises(CheckpointError, match="at step 6 of 20"):
        trainer_of(tmp_path, model, StoMPPTrainerCallback(), steps).train()
    assert steps.begun == 0


def test_a_model_loaded_in_mid_progression_and_resumed_equals_the_uninterrupted_run(tmp_path):
    whole = trainer_of(tmp_path / "whole", bert(), StoMPPTrainerCallback())
    whole.train()
    checkpoint = saved(tmp_path / "cut")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    resumed = trainer_of(tmp_path / "cut", model, StoMPPTrainerCallback())
    resumed.train(checkpoint)
    assert same_tensors(whole.model.state_dict(), model.state_dict()) == []
    assert whole.state.log_history[:-1] == resumed.state.log_history[:-1]
