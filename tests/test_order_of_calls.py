"""The order of calls is checked: what was made too early, cast too late, or forgotten is said, once, or refused."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CASES, quick
from stack import stack, update
from test_callback import StopAt, bert, states, trainer_of, warnings
from transformers import AutoModelForSequenceClassification

from stompp_hf import Progression, StoMPPTrainerCallback, binarize_model, parameter_groups, restore_model
from stompp_hf.errors import ConfigError, HoldError
from stompp_hf.surgery.members import binary_layers, members

BERT = CASES["bert"]
TOTAL = 6


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model: Any, optimizers: list[Any], attached: list[Any] | None = None, steps: int = TOTAL) -> Progression:
    progression = Progression(model, TOTAL)
    for optimizer in optimizers if attached is None else attached:
        progression.attach(optimizer)
    for step in range(steps):
        progression.step(step)
        model(**BERT.batch(step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    progression.step(steps)
    return progression


# ---- an optimizer that is made before binarize_model ----


def test_an_optimizer_made_before_binarize_model_is_told_when_it_is_attached(caplog: Any) -> None:
    model = BERT.build()
    optimizer = adamw(model)
    binarize_model(model, quick())
    Progression(model, TOTAL).attach(optimizer)
    (told,) = warnings(caplog, "lacks parameters that binarize_model added")
    assert re.search(r"\(bert\.encoder\.layer\.0\.\S+_scale, \S+ and 34 more\)", told)  # 12 layers, 3 each


def test_the_same_in_trainer_and_once(tmp_path: Any, caplog: Any) -> None:
    model = BERT.build()
    early = adamw(model)
    trainer = trainer_of(tmp_path, binarize_model(model, quick()), StoMPPTrainerCallback(), max_steps=4)
    trainer.optimizer = early
    trainer.train()
    assert len(warnings(caplog, "lacks parameters that binarize_model added")) == 1


@pytest.mark.parametrize("split", ["by kind", "by layer", "groups"])
def test_optimizers_that_have_everything_between_them_are_not_told(caplog: Any, split: str) -> None:
    model = bert()
    every = list(model.named_parameters())
    halves = {
        "by kind": lambda name, p: p.dim() == 2,
        "by layer": lambda name, p: "layer.0" in name,
    }
    if split == "groups":
        optimizers = [torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)]
    else:
        first = [p for name, p in every if halves[split](name, p)]
        optimizers = [torch.optim.SGD(first, lr=0.1), adamw(model)]
        optimizers[1].param_groups[0]["params"] = [p for name, p in every if not halves[split](name, p)]
    train(model, optimizers)
    assert not warnings(caplog, "attach") and not warnings(caplog, "lacks")


def test_an_optimizer_that_was_not_attached_is_missed_at_the_first_step(caplog: Any) -> None:
    model = bert(frozen_gradient="windowed_ste")
    parts = [[p for n, p in model.named_parameters() if ("layer.0" in n) == first] for first in (True, False)]
    first, second = (torch.optim.SGD(part, lr=0.1) for part in parts)
    progression = Progression(model, TOTAL)
    progression.attach(first)
    assert not warnings(caplog, "optimizer")
    progression.step(0)
    (told,) = warnings(caplog, "no optimizer that is attached has the latent weights")
    assert "bert.encoder.layer.1" in told and "bert.encoder.layer.0" not in told
    progression.attach(second)
    progression.step(1)
    assert len(warnings(caplog, "optimizer")) == 2  # latents, and scales; nothing new since


@pytest.mark.parametrize("regime", ["zero", "ste"])
def test_an_optimizer_of_another_model(caplog: Any, regime: str) -> None:
    model = bert(frozen_gradient=regime)
    other = adamw(copy.deepcopy(model))
    if regime == "zero":
        with pytest.raises(ConfigError, match="AdamW has none of this model's parameters"):
            Progression(model, TOTAL).attach(other)
    else:
        Progression(model, TOTAL).attach(other)
        assert len(warnings(caplog, "AdamW has none of this model's parameters")) == 1


# ---- latents that became half precision ----


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: binary_layers(m)[LAST].half()]
)
def test_half_precision_latents_are_told_when_an_optimizer_is_attached(caplog: Any, cast: Callable[[Any], Any]) -> None:
    model = bert()
    cast(model)
    Progression(model, TOTAL).attach(adamw(model))
    (told,) = warnings(caplog, "small updates vanish")
    assert LAST in told or "and 10 more" in told
    caplog.clear()
    model.float()
    train(model, [adamw(model)])
    assert not warnings(caplog, "small updates vanish")


LAST = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_half_precision_before_training_is_told(tmp_path: Any, caplog: Any, option: str) -> None:
    model = bert()
    trainer = trainer_of(tmp_path, model, StoMPPTrainerCallback(), max_steps=1, **{option: True})
    trainer.evaluate()
    trainer.train()
    assert len(warnings(caplog, option)) == 1


def test_who_asks_for_half_precision_is_told_by_binarize_model_alone(caplog: Any) -> None:
    model = binarize_model(BERT.build().to(torch.bfloat16), quick(keep_dtype=True))
    assert len(warnings(caplog, "keep_dtype=True")) == 1
    Progression(model, TOTAL).attach(adamw(model))
    assert len(warnings(caplog, "small updates vanish")) == 1


# ---- parts that do not train ----


def test_what_is_added_to_a_frozen_part_does_not_train_either() -> None:
    model = BERT.build()
    model.bert.encoder.layer[0].requires_grad_(False)
    binarize_model(model, quick(attention="binarize"))
    for name, member in members(model).items():
        for own, tensor in member.own_tensors().items():
            learnable = own.endswith(("_scale", "_threshold"))
            assert tensor.requires_grad == (learnable and "layer.0" not in name), (name, own)
            assert isinstance(tensor, torch.nn.Parameter) == learnable
    model.requires_grad_(True)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("when", ["before", "after"])
def test_latents_that_do_not_learn_and_will_freeze_are_told(caplog: Any, when: str) -> None:
    model = BERT.build()
    if when == "before":
        model.bert.requires_grad_(False)
    binarize_model(model, quick())
    model.bert.requires_grad_(False)
    train(model, [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)])
    assert len(warnings(caplog, "do not learn (requires_grad=False)")) == 1
    assert not warnings(caplog, "lacks")


def test_a_head_that_is_trained_on_a_finished_base_is_no_mistake(caplog: Any) -> None:
    model = bert(end=0.5)
    train(model, [adamw(model)])
    model.bert.requires_grad_(False)
    caplog.clear()
    progression = Progression(model, TOTAL)
    progression.attach(torch.optim.AdamW(model.classifier.parameters(), lr=1e-3))
    progression.step(TOTAL)
    assert not warnings(caplog, "")


# ---- a progression that nobody advances ----

FORGOTTEN = "nothing advances its progression"


def test_a_trainer_without_the_callback_is_told_once_at_the_latest_when_it_saves(tmp_path: Any, caplog: Any) -> None:
    trainer = trainer_of(tmp_path, bert(), max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path)
    trainer.save_model(tmp_path)
    (told,) = warnings(caplog, FORGOTTEN)
    assert "callbacks=[StoMPPTrainerCallback()]" in told


def test_a_single_update_is_told_when_the_model_is_saved(caplog: Any) -> None:
    model = bert()
    model(**BERT.batch(0)).loss.backward()
    adamw(model).step()
    assert not warnings(caplog, FORGOTTEN)
    model.state_dict()
    model.state_dict()
    assert len(warnings(caplog, FORGOTTEN)) == 1


def test_a_plain_loop_over_any_module_is_told_without_a_save(caplog: Any) -> None:
    model = stack(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        update(model, optimizer, step)
    assert len(warnings(caplog, FORGOTTEN)) == 1
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters()) and not model._state_dict_pre_hooks


def test_a_checkpoint_that_goes_on_without_the_callback_is_told(tmp_path: Any, caplog: Any) -> None:
    """Its stages stand where the checkpoint left them."""
    trainer_of(tmp_path, bert(), StoMPPTrainerCallback(), StopAt(6), save_strategy="steps").train()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert states(model) == ["transition", "pending"]
    caplog.clear()
    trainer = trainer_of(tmp_path, model, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path)
    assert len(warnings(caplog, FORGOTTEN)) == 1


@pytest.mark.parametrize("what", ["saved", "gradients", "nothing", "driven", "finished", "restored", "copied"])
def test_no_false_alarm(caplog: Any, what: str) -> None:
    model = bert(binarize="nothing") if what == "nothing" else bert()
    if what in ("driven", "finished"):
        train(model, [adamw(model)], steps=TOTAL if what == "finished" else 1)
    if what == "restored":
        restore_model(model)
    if what == "copied":  # a copy is not the one that was looked at
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    optimizer = adamw(model)
    for step in range(3):
        model(**BERT.batch(step)).loss.backward()
        if what in ("nothing", "driven", "finished", "restored"):
            optimizer.step()
    model.state_dict()
    assert not warnings(caplog, FORGOTTEN)


# ---- callbacks ----


def test_two_callbacks_train_as_one_does(tmp_path: Any) -> None:
    weights = []
    for count in (1, 2):
        model = bert(frozen_gradient="zero", pending_lr=0.5)
        trainer_of(tmp_path, model, *(StoMPPTrainerCallback() for _ in range(count))).train()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_attached_callback_takes_the_place_of_another(tmp_path: Any, caplog: Any) -> None:
    trainer = trainer_of(tmp_path, bert(), StoMPPTrainerCallback(), max_steps=4)
    attached = StoMPPTrainerCallback().attach(trainer)
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, StoMPPTrainerCallback)]
    assert found == [attached] and len(warnings(caplog, "takes its place")) == 1
    trainer.train()
    assert attached.progression is not None and attached.progression.is_complete()


def test_training_behind_the_end_stays_at_the_end(tmp_path: Any) -> None:
    """Trainer goes on counting where a kept total is over; the progression does not."""
    trainer_of(tmp_path, bert(), StoMPPTrainerCallback(), StopAt(6), save_strategy="steps").train()
    callback = StoMPPTrainerCallback()
    trainer = trainer_of(tmp_path, bert(), callback, max_steps=26, save_strategy="steps")
    trainer.train(str(tmp_path / "checkpoint-6"))
    assert trainer.state.global_step == 26 and callback.progression.current_step == 20
    again = StoMPPTrainerCallback()
    trainer_of(tmp_path, bert(), again, max_steps=26).train(str(tmp_path / "checkpoint-25"))
    assert again.progression.current_step == again.progression.total_steps == 20


# ---- steps ----


@pytest.mark.parametrize("step", [-1, 7, 1000, 2.0, True, None])
def test_a_step_that_the_progression_does_not_have_is_refused(step: Any) -> None:
    progression = Progression(bert(), TOTAL)
    progression.step(2)
    with pytest.raises(ConfigError, match=r"from 0 to total_steps=6"):
        progression.step(step)
    assert progression.current_step == 2


def test_a_loop_may_go_on_behind_the_end(caplog: Any) -> None:
    """What was walked to the end stays there; a frozen sign that moves is found there too."""
    model = stack(3, 16, frozen_gradient="zero")
    progression = Progression(model, TOTAL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    progression.attach(optimizer)
    for step in range(2 * TOTAL):
        progression.step(step)
        update(model, optimizer, step)
    assert progression.current_step == TOTAL and progression.is_complete()
    with torch.no_grad():
        model.layers[0].weight[0, 0] *= -1
    with pytest.raises(HoldError):
        progression.step(2 * TOTAL)
