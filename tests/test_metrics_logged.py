"""The metrics of a run: equal to slow references, in log_history and on trackers, and where the bars show the stage."""

import copy
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vision
from models import CASES, quick, same_tensors
from test_callback import StopAt, Tracker, bert, saved, trainer_of
from torch import nn
from transformers import TrainerCallback, set_seed

from stompp_hf import Progression, StoMPPTrainerCallback, binarize_model
from stompp_hf.errors import ConfigError
from stompp_hf.modules.activations import ABSORBABLE
from stompp_hf.surgery.members import binary_layers, get_plan
from stompp_hf.training.live_metrics import LiveMetrics
from stompp_hf.training.metrics import frozen_fraction

BERT = CASES["bert"]
CHEAP = {"stompp_frozen_fraction", "stompp_stage", "stompp_stage_fraction", "stompp_flip_ratio"}
SAMPLED = {"stompp_clipped_weights", "stompp_clipped_inputs", "stompp_blocked_share", "stompp_blocked_upstream"}
NORMS = {"stompp_grad_norm_before", "stompp_grad_norm_behind"}


# ---- slow references: entry by entry, from what a step leaves behind ----


class Seen:
    """The first input that each layer gets, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        for name, layer in binary_layers(model).items():
            layer.register_forward_pre_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any) -> None:
            self.inputs.setdefault(name, args[0].detach().clone())

        return keep


def frozen_entries(layer: Any) -> list[bool]:
    """Which entries of a weight are frozen."""
    if layer.weight_mask is None:
        return [layer.stage_state == "frozen"] * layer.weight.numel()
    return [entry == 1.0 for entry in layer.weight_mask.flatten().tolist()]


def mean_of(values: list[bool]) -> float:
    """Share of True; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def clipping(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Shares of the real entries of weights and inputs that a clip changes."""
    config = get_plan(model).config
    weights: list[bool] = []
    values: list[bool] = []
    for name, layer in binary_layers(model).items():
        opened = layer.stage_state == "transition" and layer.frozen_share > 0
        if layer.stage_state == "frozen":
            continue
        clip = float(layer.weight_clip) if opened else config.weight_clip or math.inf
        if clip < math.inf:
            free = [not frozen for frozen in frozen_entries(layer)]
            weights += [abs(w) > clip for w in itertools.compress(layer.weight.flatten().tolist(), free)]
        wide = config.activation_clip or math.inf
        low, high = (float(layer.activation_low), float(layer.activation_high)) if opened else (-wide, wide)
        if low > -math.inf:
            x = inputs[name] if layer.absorbed is None else ABSORBABLE[layer.absorbed](inputs[name])
            x = x.movedim(1 if x.dim() == 4 else -1, -1).flatten(0, -2)
            mask = [0.0] * x.shape[-1] if layer.activation_mask is None else layer.activation_mask.tolist()
            for row in x.tolist():
                values += [not low <= u <= high for u, frozen in zip(row, mask, strict=True) if not frozen]
    return mean_of(weights), mean_of(values)


def blocking(model: nn.Module) -> tuple[float, float]:
    """Shares of the unfrozen weights, and of those executed before the transition, without a gradient."""
    layers, order = binary_layers(model), {entry.name: entry.position for entry in get_plan(model).entries}
    moving = [order[name] for name, layer in layers.items() if layer.stage_state == "transition"]
    unfrozen: list[bool] = []
    upstream: list[bool] = []
    for name, layer in layers.items():
        grads = [0.0] * layer.weight.numel() if layer.weight.grad is None else layer.weight.grad.flatten().tolist()
        blocked = [grad == 0.0 for grad in grads]
        unfrozen += [none for none, frozen in zip(blocked, frozen_entries(layer), strict=True) if not frozen]
        upstream += blocked if moving and order[name] < min(moving) else []
    return mean_of(unfrozen), mean_of(upstream)


def norms(model: nn.Module, stage: int) -> dict[str, float]:
    """Norms of the gradients before and behind a stage (from 1), by the name of the metric."""
    entries = get_plan(model).entries
    inside = [entry.position for entry in entries if entry.stage == stage - 1]
    squares: dict[str, list[float]] = {}
    for entry in entries:
        side = "before" if entry.position < min(inside) else "behind" if entry.position > max(inside) else None
        if side is not None:
            grad = model.get_submodule(entry.name).weight.grad
            own = [] if grad is None else [value**2 for value in grad.double().flatten().tolist()]
            squares.setdefault(f"stompp_grad_norm_{side}", []).extend(own)
    return {name: math.sqrt(math.fsum(values)) for name, values in squares.items()}


def flips(model: nn.Module, before: dict[str, list[float]]) -> float:
    """Share of the weights of the layers that are frozen or in transition whose sign changed."""
    changed: list[bool] = []
    for name, layer in binary_layers(model).items():
        if layer.stage_state != "pending":
            now = layer.weight.flatten().tolist()
            changed += [(w >= 0) != (then >= 0) for w, then in zip(now, before[name], strict=True)]
    return mean_of(changed)


RESNET = vision.CASES["resnet"]
RUNS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "default": (BERT, {}, {"stompp_clipped_inputs", *NORMS}),
    "reverse, STE-free": (
        *(BERT, {"frozen_gradient": "zero", "order": "reverse"}),
        {"stompp_blocked_share", "stompp_grad_norm_before"},
    ),
    "clipped": (
        *(BERT, {"weight_clip": 0.03, "activation_clip": 0.8, "frozen_gradient": "clipped_ste"}),
        {"stompp_clipped_weights", "stompp_clipped_inputs", "stompp_blocked_share", "stompp_blocked_upstream", *NORMS},
    ),
    "weights, by module": (
        *(BERT, {"binarize": "weights", "stages": "module", "weight_clip": 0.02}),
        {"stompp_clipped_weights", "stompp_blocked_share", *NORMS},
    ),
    "convolutions, absorbed ReLUs": (
        *(RESNET, {"activation_clip": 0.5, "frozen_gradient": "zero"}),
        {"stompp_clipped_inputs", "stompp_blocked_upstream", "stompp_grad_norm_behind"},
    ),
}
"""What a run is made of, and the metrics (of those that may stay 0) that do not stay 0 in it."""


@pytest.mark.parametrize("name", sorted(RUNS))
def test_metrics_equal_slow_references(name):
    case, options, live_ones = RUNS[name]
    model = binarize_model(case.build(), quick(**{"start": 0.1, "end": 0.9, **options}))
    progression = Progression(model, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    progression.attach(optimizer)
    live, seen = LiveMetrics(progression, every=1), Seen(model)
    before = {n: layer.weight.flatten().tolist() for n, layer in binary_layers(model).items()}
    course: list[dict[str, float]] = []
    for step in range(10):
        set_seed(step)
        seen.inputs.clear()
        progression.step(step)
        live.begin(step)
        model(**case.batch(step)).loss.backward()
        weights, inputs = clipping(model, seen.inputs)
        expected = {"stompp_clipped_weights": weights, "stompp_clipped_inputs": inputs}
        share, upstream = blocking(model)
        expected |= {"stompp_blocked_share": share, "stompp_blocked_upstream": upstream}
        stage = progression.stage_in_transition()[0]
        expected |= norms(model, stage)
        live.sample()
        optimizer.step()
        optimizer.zero_grad()
        expected |= {"stompp_flip_ratio": flips(model, before), "stompp_frozen_fraction": frozen_fraction(model)}
        inside = [binary_layers(model)[e.name] for e in get_plan(model).entries if e.stage == stage - 1]
        sizes = [layer.weight.numel() for layer in inside]
        shares = [layer.frozen_share * size for layer, size in zip(inside, sizes, strict=True)]
        expected |= {"stompp_stage": stage, "stompp_stage_fraction": sum(shares) / sum(sizes)}
        before = {n: layer.weight.flatten().tolist() for n, layer in binary_layers(model).items()}
        course.append(live.record())
        assert course[-1] == pytest.approx(expected, rel=1e-5, abs=1e-12), step

    moved = {metric for record in course for metric, value in record.items() if value > 0}
    assert moved >= CHEAP | live_ones
    assert {metric for metric in moved if "clipped" in metric} == {
        metric for metric in live_ones if "clipped" in metric
    }


def test_a_copy_of_the_model_is_not_looked_at():
    """A teacher is copied in the middle of a run, hooks and all, and runs beside the model."""
    model = binarize_model(BERT.build().eval(), quick(weight_clip=0.03, activation_clip=0.8))
    live, shares = LiveMetrics(Progression(model, 10), every=1), []
    for copies in (False, True):
        live.begin(0)
        if copies:
            copy.deepcopy(model)(**BERT.batch(7))
        model(**BERT.batch(1)).loss.backward()
        live.sample()
        shares.append(live.record()["stompp_clipped_inputs"])
    assert shares[0] == shares[1] > 0


# ---- in Trainer ----


@pytest.mark.parametrize("attached", [False, True])
def test_samples_stand_in_the_records_that_follow_them(tmp_path, attached):
    tracker, callback = Tracker(), StoMPPTrainerCallback(metrics_every=4)
    trainer = trainer_of(tmp_path, bert(), tracker, *([] if attached else [callback]))
    if attached:
        callback.attach(trainer)
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["step"] for record in records if record.keys() >= SAMPLED] == [2, 6, 10, 14, 18]
    assert all(record.keys() >= CHEAP for record in records)
    assert not any(record.keys() & (SAMPLED | NORMS) for record in records if record["step"] % 4 == 0)
    assert [record["stompp_stage_name"][-1] for record in records] == ["0"] * 4 + ["1"] * 6
    shares = [record["stompp_stage_fraction"] for record in records]
    assert shares[0] == shares[4] == 0.0 and 0 < shares[2] < shares[3] < 1 and shares[-1] == 1.0
    named = [{name for name in NORMS if name in record} for record in records if record.keys() >= SAMPLED]
    assert named == [{"stompp_grad_norm_behind"}] * 3 + [{"stompp_grad_norm_before"}] * 2  # two stages, in order
    json.dumps(trainer.state.log_history)
    seen = [record for record in tracker.records if "loss" in record]
    assert all(isinstance(value, (int, float)) for record in seen for value in record.values())
    assert (set().union(*seen) >= CHEAP | SAMPLED | NORMS) == attached
    assert all(not layer._forward_pre_hooks for layer in binary_layers(trainer.model).values())


def test_a_record_holds_the_mean_of_its_samples(tmp_path):
    histories = []
    for every, logging in ((1, 1), (1, 4)):
        trainer = trainer_of(tmp_path, bert(), logging_steps=logging, max_steps=8)
        StoMPPTrainerCallback(metrics_every=every).attach(trainer)
        trainer.train()
        histories.append([record for record in trainer.state.log_history if "loss" in record])
    single, grouped = histories
    for index, record in enumerate(grouped):
        for name in sorted(record.keys() & (SAMPLED | NORMS)):
            parts = [part[name] for part in single[4 * index : 4 * index + 4] if name in part]
            assert record[name] == pytest.approx(sum(parts) / len(parts))
    assert grouped[0].keys() >= SAMPLED and {len(histories[0]), 4 * len(grouped)} == {8}
    assert single[3]["stompp_grad_norm_behind"] != grouped[0]["stompp_grad_norm_behind"]


class Reference(TrainerCallback):
    """Measures what the optimizer is about to get."""

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.norms.append(norms(model, 1 if state.global_step < 10 else 2))


def test_samples_see_what_the_optimizer_gets(tmp_path):
    """All of an accumulated gradient, clipped."""
    reference, options = Reference(), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, bert(), reference, logging_steps=1, max_grad_norm=0.1, **options)
    StoMPPTrainerCallback(metrics_every=1).attach(trainer)
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    found = [{name: record[name] for name in NORMS & record.keys()} for record in records]
    assert len(found) == 20 and all(a == pytest.approx(b) for a, b in zip(found, reference.norms, strict=True))
    assert all(record["grad_norm"] > 0.1 > max(norm.values()) for record, norm in zip(records, found, strict=True))


def test_without_samples_nothing_but_the_cheap_metrics_is_logged(tmp_path):
    weights = []
    for every in (0, 1):
        trainer = trainer_of(tmp_path, bert())
        StoMPPTrainerCallback(metrics_every=every).attach(trainer)
        trainer.train()
        names = set().union(*trainer.state.log_history)
        assert names >= CHEAP and bool(names & (SAMPLED | NORMS)) == bool(every)
        weights.append(trainer.model.state_dict())
    assert same_tensors(*weights) == []  # looking changes nothing


@pytest.mark.parametrize("every", [-1, 2.0, True, None])
def test_a_sampling_interval_is_a_number_of_steps(every):
    with pytest.raises(ConfigError, match="metrics_every="):
        StoMPPTrainerCallback(metrics_every=every)


def test_a_resumed_run_logs_what_the_uninterrupted_one_does(tmp_path):
    whole = trainer_of(tmp_path / "whole", bert(), StoMPPTrainerCallback(metrics_every=3))
    whole.train()
    checkpoint = tmp_path / "cut" / "checkpoint-6"
    first = trainer_of(
        tmp_path / "cut", bert(), StoMPPTrainerCallback(metrics_every=3), StopAt(6), save_strategy="steps"
    )
    first.train()
    resumed = trainer_of(tmp_path / "cut", bert(), StoMPPTrainerCallback(metrics_every=3))
    resumed.train(str(checkpoint))
    assert whole.state.log_history[:-1] == resumed.state.log_history[:-1]


def test_a_step_that_dies_leaves_no_hook(tmp_path):
    model = bert()

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise MemoryError

    handle = model.classifier.register_forward_hook(fail)
    trainer = trainer_of(tmp_path, model, StoMPPTrainerCallback(metrics_every=1))
    with pytest.raises(MemoryError):
        trainer.train()
    handle.remove()
    trainer.train()
    assert all(not layer._forward_pre_hooks for layer in binary_layers(model).values())


# ---- a notebook's bar ----


def test_a_notebook_names_the_stage_and_its_share(tmp_path, monkeypatch):
    shown: list[str] = []
    display: Any = ModuleType("IPython.display")
    display.HTML = str
    display.display = lambda text, **options: shown.append(text) or SimpleNamespace(update=shown.append)
    package: Any = ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    trainer = trainer_of(tmp_path, bert(), NotebookProgressCallback(), eval_strategy="steps", eval_steps=4)
    StoMPPTrainerCallback().attach(trainer)
    trainer.train()
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook")
    assert any("stage 1/2 bert.encoder.layer.0 " in text for text in shown) and "Validation Loss" in shown[-1]
    assert any("stage 2/2 bert.encoder.layer.1 " in text for text in shown) and "fully binary" in shown[-1]


def test_a_checkpoint_keeps_the_metrics(tmp_path):
    path = Path(saved(tmp_path), "trainer_state.json")
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    assert history[0].keys() >= CHEAP | SAMPLED | {"stompp_stage_name"}
