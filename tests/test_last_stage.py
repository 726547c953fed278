"""last_stage and StopFreezingCallback: some stages binary for good, the rest real for good, and yet finished."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, logits, quick, train
from test_callback import bert, states, trainer_of, warnings
from transformers import AutoModelForSequenceClassification

from stompp_hf import (
    Progression,
    StoMPPConfig,
    StoMPPTrainerCallback,
    StopFreezingCallback,
    binarize_model,
    export_onnx,
    fuse_for_inference,
    get_plan,
    pack_model,
    restore_model,
    summary,
    unpack_model,
)
from stompp_hf.errors import ConfigError, PackingError
from stompp_hf.surgery.members import binary_layers, members

BERT = CASES["bert"]
TOTAL = 20
FIRST, SECOND = "bert.encoder.layer.0", "bert.encoder.layer.1"


def finished(**options: Any) -> Any:
    """A tiny BERT of two stages after its run, the first of which froze."""
    model = binarize_model(BERT.build(), quick(**{"last_stage": 1, "end": 0.9, **options}))
    train(model, BERT, 0, TOTAL, TOTAL)
    return model.eval()


# ---- what the option means ----


@pytest.mark.parametrize(("asked", "frozen"), [(None, 2), (2, 2), (1, 1), (0, 0), (FIRST, 1), (0.5, 1), ("1.0", 2)])
def test_a_number_a_name_and_a_share(asked: Any, frozen: int) -> None:
    config = StoMPPConfig(last_stage=asked)
    assert StoMPPConfig.from_json(config.to_json()) == config
    model = binarize_model(BERT.build(), config)
    assert get_plan(model).freezing == frozen
    progression = Progression(model, TOTAL)
    progression.step(TOTAL)
    assert progression.is_complete() and len(progression.frozen_layers()) == 6 * frozen


@pytest.mark.parametrize("asked", [3, "bert.encoder.layer.7", -1, 1.5, "", True, "nan"])
def test_what_is_no_stage_is_refused_and_nothing_changes(asked: Any) -> None:
    model = BERT.build()
    with pytest.raises(ConfigError, match="last_stage"):
        binarize_model(model, StoMPPConfig(last_stage=asked))
    assert not members_or_none(model)


def members_or_none(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "stompp_state")]


def test_the_others_freeze_as_they_would_have() -> None:
    """The run is the same, step by step and bit for bit, until the first stage that stays real."""
    some, every = (binarize_model(BERT.build(), quick(end=1.0, last_stage=last)) for last in (1, None))
    for model in (some, every):
        progression = Progression(model, TOTAL)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        progression.attach(optimizer)
        for step in range(TOTAL // 2):
            progression.step(step)
            torch.manual_seed(step)
            model(**BERT.batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(some.parameters(), every.parameters(), strict=True))
    progression = Progression(some, TOTAL)
    assert progression.is_complete(TOTAL // 2) and not Progression(every, TOTAL).is_complete(TOTAL // 2)
    assert progression.unfinished_stages(0) == [FIRST]
    assert progression.stage_in_transition(TOTAL) == (1, FIRST, 1.0)


@pytest.mark.parametrize("binarize", ["weights", "weights_and_activations"])
def test_real_layers_compute_as_plain_ones(binarize: str) -> None:
    """Also with clips, which are for what is still to freeze."""
    options = {"weight_clip": 0.01, "activation_clip": 0.01} if binarize != "weights" else {"weight_clip": 0.01}
    model = finished(binarize=binarize, **options)
    for name, layer in binary_layers(model).items():
        if not name.startswith(SECOND):
            continue
        x = torch.randn(3, layer.in_features)
        assert layer.always_real and layer.stage_state == "pending"
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


# ---- such a model is finished ----


@pytest.mark.parametrize("packed", [False, True])
def test_it_saves_and_loads_as_it_is(packed: bool, tmp_path: Path) -> None:
    model, batch = finished(), BERT.batch(1)
    before = logits(model, batch)
    if packed:
        model = pack_model(model)
        assert torch.equal(logits(model, batch), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, batch), before)
    kinds = {name[: len(FIRST)]: member.is_packed for name, member in members(loaded).items()}
    assert kinds == {FIRST: packed, SECOND: False}
    assert all(m.always_real == n.startswith(SECOND) for n, m in members(loaded).items())
    if packed:
        loaded = unpack_model(loaded)
        torch.testing.assert_close(logits(loaded, batch), before)
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(logits(again, batch), logits(loaded, batch))


@pytest.mark.parametrize("real", ["float16", "int8"])
def test_what_stays_real_is_stored_as_asked(real: str, tmp_path: Path) -> None:
    pack_model(finished(), real=real).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, BERT.batch(1)), logits(finished(), BERT.batch(1)), atol=0.05, rtol=0.05)


def test_it_is_fused_exported_and_restored(tmp_path: Path) -> None:
    model, batch = finished(), BERT.batch(1)
    before = logits(model, batch)
    fused = fuse_for_inference(pack_model(model))
    torch.testing.assert_close(logits(fused, batch), before, atol=1e-4, rtol=1e-4)
    import onnxruntime

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    path = export_onnx(finished(), tmp_path / "model.onnx", inputs)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found), before, atol=1e-4, rtol=1e-4)
    plain = restore_model(finished())
    assert not members_or_none(plain)


def test_the_summary_says_what_is_binary() -> None:
    rows = {row.name: row for row in summary(finished()).modules}
    first, second = rows[f"{FIRST}.output.dense"], rows[f"{SECOND}.output.dense"]
    assert (first.state, second.state) == ("frozen", "real")
    assert (first.binary, second.binary) == (first.shape[0] * first.shape[1], 0)
    assert first.packed < first.float32 / 8 and second.packed >= second.float32
    whole = summary(pack_model(finished())).totals
    assert whole.packed == whole.stored


def test_nothing_binary_is_not_packed() -> None:
    with pytest.raises(PackingError, match="last_stage=0"):
        pack_model(binarize_model(BERT.build(), quick(last_stage=0)))


def test_a_loaded_one_trains_on(tmp_path: Path) -> None:
    finished().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    trainer_of(tmp_path / "run", model, StoMPPTrainerCallback()).train()
    assert states(model) == ["frozen", "pending"]
    plan = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert plan["config"]["last_stage"] == "1"


# ---- stopping by itself ----


class Worth:
    """compute_metrics: the worth of the model at each evaluation, one after the other."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, predictions: Any) -> dict[str, float]:
        return {"worth": self.values.pop(0) if self.values else 0.0}


@pytest.mark.parametrize(
    ("values", "good"),
    [((0.9, 0.88, 0.87), 2), ((0.9, 0.88, 0.86), 1), ((0.9, 0.8), 0)],
)
def test_freezing_stops_where_the_metric_falls(values: tuple[float, ...], good: int, tmp_path: Path) -> None:
    model, stompp = bert(), StoMPPTrainerCallback()
    stop = StopFreezingCallback(stompp, drop=0.035, metric="worth")
    trainer_of(tmp_path, model, stompp, stop, compute_metrics=Worth(*values)).train()
    assert (stop.full_precision, stop.good_stages, stop.stopped) == (0.9, good, good < 2)
    assert states(model) == [["pending", "pending"], ["frozen", "pending"], ["frozen", "frozen"]][good]
    assert get_plan(model).freezing == good
    batch = BERT.batch(1)
    model.eval().save_pretrained(tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again, batch), logits(model, batch))
    if good:
        before = logits(model, batch)
        assert torch.equal(logits(pack_model(model), batch), before)


def test_weights_go_back_to_the_end_of_the_last_good_stage(tmp_path: Path) -> None:
    kept: dict[str, dict[str, torch.Tensor]] = {}
    model, stompp = bert(), StoMPPTrainerCallback()

    class Spy(StopFreezingCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            kept[f"before {state.global_step}"] = {n: p.detach().clone() for n, p in model.named_parameters()}
            super().on_evaluate(args, state, control, metrics, **kwargs)
            kept[f"after {state.global_step}"] = {n: p.detach().clone() for n, p in model.named_parameters()}

    stop = Spy(stompp, drop=0.01, metric="eval_worth", full_precision=0.9)
    trainer_of(tmp_path, model, stompp, stop, compute_metrics=Worth(0.9, 0.9, 0.5)).train()
    good, bad, back = kept["before 10"], kept["before 18"], kept["after 18"]
    assert any(not torch.equal(good[name], bad[name]) for name in good)
    assert all(torch.equal(good[name], back[name]) for name in good)
    learnt = dict(model.named_parameters())
    weight = f"{SECOND}.output.dense.weight"
    assert not torch.equal(learnt[weight].detach(), back[weight])  # and training went on from there


def test_a_loss_falls_when_it_rises(tmp_path: Path) -> None:
    model, stompp = bert(), StoMPPTrainerCallback()
    stop = StopFreezingCallback(stompp, drop=0.0, metric="loss", full_precision=-1.0)
    trainer_of(tmp_path, model, stompp, stop).train()
    assert stop.stopped and stop.good_stages == 0


@pytest.mark.parametrize(
    ("options", "said", "changes"),
    [
        ({"drop": -1.0}, "drop", {}),
        ({"drop": 0.1}, "which metric", {}),
        ({"drop": 0.1, "metric": "worth"}, r"full_precision=0\.91", {}),
        ({"drop": 0.1, "metric": "worth"}, r"full_precision=0\.91", {"start": 0.01}),  # of 20 steps: none
        ({"drop": 0.1, "metric": "worth"}, r"full_precision=0\.91", {"start": 0.5, "end": 0.5}),
        ({"drop": 0.1, "metric": "accurary"}, "there are loss, worth", {"start": 0.1}),
    ],
)
def test_what_it_cannot_know_is_asked_for(
    options: dict[str, Any], said: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    stompp, model = StoMPPTrainerCallback(), bert(**{"start": 0.0, **changes})
    with pytest.raises(ConfigError, match=said):
        stop = StopFreezingCallback(stompp, **options)
        trainer_of(tmp_path, model, stompp, stop, compute_metrics=Worth(0.9)).train()


def test_it_comes_behind_the_other_callback(tmp_path: Path) -> None:
    stompp = StoMPPTrainerCallback()
    stop = StopFreezingCallback(stompp, 0.1, "worth")
    with pytest.raises(ConfigError, match=r"callbacks=\[stompp, stop\]"):
        trainer_of(tmp_path, bert(), stop, stompp, compute_metrics=Worth()).train()


@pytest.mark.parametrize(
    ("metric", "options", "values", "stopped"),
    [
        ("worth", {}, (0.9, float("nan")), True),
        ("worth", {"greater_is_better": False}, (0.9, 0.5, 0.5), False),
        ("worth", {"greater_is_better": False}, (0.5, 0.9), True),
        ("worth_mse", {}, (0.5, 0.9), True),  # less is better
        ("worth_mse", {}, (0.9, 0.5, 0.5), False),
    ],
)
def test_which_way_is_down(
    metric: str, options: dict[str, Any], values: tuple[float, ...], stopped: bool, tmp_path: Path
) -> None:
    stompp, worth = StoMPPTrainerCallback(), Worth(*values)
    stop = StopFreezingCallback(stompp, 0.1, metric, **options)
    measured = lambda prediction: {metric: worth(prediction)["worth"]}  # noqa: E731
    # load_best_model_at_end says that less is better, of the loss
    arguments = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "steps"}
    trainer_of(tmp_path, bert(), stompp, stop, compute_metrics=measured, save_steps=20, **arguments).train()
    assert stop.stopped is stopped


def test_a_bad_first_stage_is_undone_from_the_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stompp, model = StoMPPTrainerCallback(), bert(start=0.0)
    stop = StopFreezingCallback(stompp, drop=0.01, metric="worth", full_precision=0.9)
    trainer_of(tmp_path, model, stompp, stop, compute_metrics=Worth(0.5)).train()
    assert (stop.good_stages, stop.stopped) == (0, True) and not warnings(caplog, "no weights")


def test_a_second_run_begins_anew(tmp_path: Path) -> None:
    stompp = StoMPPTrainerCallback()
    stop = StopFreezingCallback(stompp, drop=0.01, metric="worth")
    trainer = trainer_of(tmp_path, bert(), stompp, stop, compute_metrics=Worth(0.9, 0.5))
    trainer.train()
    assert stop.stopped
    trainer.model = trainer.model_wrapped = bert()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.compute_metrics = Worth(0.8, 0.8, 0.8)
    trainer.train()
    assert (stop.full_precision, stop.good_stages, stop.stopped) == (0.8, 2, False)


def test_what_was_undone_is_not_the_best(tmp_path: Path) -> None:
    stompp = StoMPPTrainerCallback()
    stop = StopFreezingCallback(stompp, drop=0.01, metric="worth")
    worth = Worth(0.9, 0.9, 0.5)
    best = {"metric_for_best_model": "other", "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "best"}
    trainer = trainer_of(
        tmp_path, bert(), stompp, stop, compute_metrics=lambda p: {**worth(p), "other": 1.0 - worth.values.count(0)},
        greater_is_better=True, **best,
    )  # fmt: skip
    trainer.train()
    assert stop.undone_at == 18 and trainer.state.best_global_step in (None, 20)


# ---- tensors of another last_stage ----


@pytest.mark.parametrize(("saved", "loaded"), [(None, 1), (2, 1), (1, 0), (1, None), (1, 2), (0, 1)])
def test_tensors_of_another_last_stage_are_refused(saved: Any, loaded: Any) -> None:
    model = binarize_model(BERT.build(5), quick(last_stage=loaded, end=0.9))
    with pytest.raises(RuntimeError, match=r"last_stage|never set"):
        model.load_state_dict(finished(last_stage=saved).state_dict())


def test_tensors_of_a_run_that_stopped_say_so(tmp_path: Path) -> None:
    model, stompp = bert(), StoMPPTrainerCallback()
    stop = StopFreezingCallback(stompp, drop=0.01, metric="worth")
    trainer_of(tmp_path, model, stompp, stop, compute_metrics=Worth(0.9, 0.9, 0.5)).train()
    for last_stage in (None, 1):  # the tensors say that the second stage stays real
        again = bert(last_stage=last_stage)
        again.load_state_dict(model.state_dict())
        assert torch.equal(logits(again, BERT.batch(1)), logits(model, BERT.batch(1)))
        progression = Progression(again, TOTAL)
        progression.step(TOTAL)
        assert len(progression.frozen_layers()) == 6 and progression.is_complete()
    with pytest.raises(RuntimeError, match="stompp_state holds"):
        state = {name: t - 2 if name.endswith("stompp_state") else t for name, t in model.state_dict().items()}
        bert().load_state_dict(state)


def test_what_is_told_of_it(tmp_path: Path) -> None:
    from stompp_hf import model_card, report
    from stompp_hf.checkpoints.inspection import inspect

    model = finished()
    assert report(model).startswith("6 binary layers in 1 of 2 stages (the rest stays real)")
    pack_model(model).save_pretrained(tmp_path)
    assert "6 layers binary" in str(inspect(tmp_path)) and "1 of 2 stages" in str(inspect(tmp_path))
    card = str(model_card(tmp_path))
    assert f"`{FIRST}`" in card and f"`{SECOND}`" not in card.split("Real")[0].split("**Binary**")[1]


def test_adapters_stand_in_what_stays_real() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=[f"{SECOND}.attention.self.query"], use_dora=True, task_type="SEQ_CLS")
    tuned = get_peft_model(finished(), config)
    before = logits(tuned, BERT.batch(1))
    torch.testing.assert_close(logits(tuned.merge_and_unload(), BERT.batch(1)), before, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_remembers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stompp = StoMPPTrainerCallback()
    stop = StopFreezingCallback(stompp, drop=0.01, metric="worth")
    options = {"save_strategy": "steps", "save_steps": 12, "compute_metrics": Worth(0.9, 0.9, 0.5)}
    trainer_of(tmp_path, bert(), stompp, stop, **options).train()
    stompp, model = StoMPPTrainerCallback(), bert()
    stop = StopFreezingCallback(stompp, drop=0.01, metric="worth")
    trainer = trainer_of(tmp_path, model, stompp, stop, **{**options, "compute_metrics": Worth(0.5)})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert (stop.full_precision, stop.good_stages, stop.stopped) == (0.9, 1, True)
    assert states(model) == ["frozen", "pending"]
    assert warnings(caplog, "no weights")


def test_a_run_that_stopped_is_resumed_as_it_is(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 19}
    runs = {}
    for name in ("whole", "resumed"):
        stompp, model = StoMPPTrainerCallback(), bert()
        stop = StopFreezingCallback(stompp, drop=0.01, metric="worth")
        trainer = trainer_of(tmp_path, model, stompp, stop, compute_metrics=Worth(0.9, 0.9, 0.5), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-19") if name == "resumed" else None)
        runs[name] = model
    for one, other in zip(runs["whole"].parameters(), runs["resumed"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert states(runs["resumed"]) == ["frozen", "pending"]
