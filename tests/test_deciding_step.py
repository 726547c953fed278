"""The one step in which a stage's starting values are decided, with data that says nothing, or says nonsense."""

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from stack import batch, stack, train, update
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stompp_hf import Progression, StoMPPConfig, binarize_model
from stompp_hf.errors import ConfigError, NonFiniteError, NotCalibratedError
from stompp_hf.method.masks import SoftRefreshMask
from stompp_hf.surgery.members import members
from stompp_hf.training.progression import SCALE_FLOOR

W = 16


class Experts(nn.Module):
    """Blocks of two layers, the second of which gets the rows that `routed` says: none at all, or is not called."""

    def __init__(self, routed: int | None = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routed = routed
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(W, W), "b": nn.Linear(W, W)}) for _ in range(3))
        self.head = nn.Linear(W, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["a"](x)
            if self.routed is not None:
                x = x + block["b"](x[: self.routed]).sum()
        return self.head(x)


def experts(routed: int | None, **options: Any) -> Experts:
    """Binarized while its experts got something."""
    model = Experts(2)
    binarize_model(model, StoMPPConfig(**options), torch.randn(4, W))
    model.routed = routed
    return model


def run(model: nn.Module, steps: int = 6) -> Progression:
    progression = Progression(model, steps)
    for step in range(steps):
        progression.step(step)
        model(batch(step, width=W)).sum().backward()
    progression.step(steps)
    return progression


# ---- nothing to see ----


@pytest.mark.parametrize("options", [{}, {"start": 0.0, "end": 0.0}, {"start": 0.4, "end": 0.4}], ids=str)
@pytest.mark.parametrize("routed", [0, None], ids=["no token", "not called"])
def test_an_expert_without_a_token_starts_from_its_weights(routed, options, caplog):
    model = experts(routed, **options)
    with caplog.at_level(logging.WARNING):
        run(model)
    assert sum("no input reached it" in record.message for record in caplog.records) == 3
    for block in model.blocks:
        expert = block["b"]
        assert expert.activation_ready and expert.stage_state == "frozen"
        wanted = (2 / torch.pi / W) ** 0.5 / expert.weight.detach().square().mean().sqrt()
        torch.testing.assert_close(expert.activation_scale.detach(), wanted.reshape(1))
    again = experts(routed, **options)
    again.load_state_dict(model.state_dict())
    model.routed = again.routed = 2  # now it gets some
    x = batch(99, width=W)
    assert torch.equal(again.eval()(x), model.eval()(x)) and model(x).isfinite().all()


def test_an_expert_that_wakes_up_within_its_window_takes_values_from_data():
    model = experts(0)
    progression = Progression(model, 20)
    for step in range(20):
        progression.step(step)
        model.routed = 3 if step == 2 else 0
        model(batch(step, width=W)).sum().backward()
    first, later = model.blocks[0]["b"], model.blocks[1]["b"]
    torch.testing.assert_close(first.activation_scale.detach(), _mean_size(model, 2), rtol=0.2, atol=0)
    assert later.activation_ready


def _mean_size(model: nn.Module, seed: int) -> Tensor:
    x = batch(seed, width=W)
    return (x + nn.functional.linear(x, model.blocks[0]["a"].weight, model.blocks[0]["a"].bias))[:3].abs().mean()[None]


def visible(step: int, blind: set[int]) -> Tensor:
    return torch.full((8,), int(step not in blind)).reshape(1, 8)


def masked(blind: set[int], steps: int = 12, **options: Any) -> nn.Module:
    """A stack trained on rows that are all padding in the steps `blind`."""
    model = stack(2, W, **options)
    progression, optimizer = Progression(model, steps), torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(steps):
        progression.step(step)
        model(batch(step, width=W)[None], attention_mask=visible(step, blind)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    progression.step(steps)
    return model


@pytest.mark.parametrize("blind", [{0}, {0, 1, 2}, {6}], ids=str)
def test_padding_alone_is_not_to_have_run(blind):
    model = masked(blind)
    for layer in model.layers:
        assert layer.activation_ready and all(t.isfinite().all() for t in layer.own_tensors().values())
    stack(2, W).load_state_dict(model.state_dict())
    first = min(set(range(6)) - blind)
    expected = batch(first, width=W).abs().mean()
    assert abs(model.layers[0].activation_scale.item() - expected) < 0.1  # learnt a little since


def test_a_window_of_nothing_but_padding_is_an_error_that_names_the_layer():
    with pytest.raises(NotCalibratedError, match=r"layers\.0: .*before step 6.*attention_mask"):
        masked(set(range(6)))
    with pytest.raises(NotCalibratedError, match=r"layers\.1"):
        masked(set(range(6, 12)))


# ---- nonsense ----


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"end": 0.0}], ids=["a window", "vanilla STE"])
def test_what_is_not_finite_is_no_starting_value(value, options):
    model = stack(2, W, check_every=0, **options)
    progression = Progression(model, 8)
    x = batch(0, width=W)
    x[0, 3] = value
    progression.step(0)
    with pytest.raises(NonFiniteError, match=r"layers\.0"):
        model(x)
        progression.step(1)
    for layer in model.layers:
        assert layer.activation_scale.isfinite().all()


def test_a_latent_that_is_not_finite_where_its_stage_begins_is_named():
    model = stack(2, W)
    progression = Progression(model, 8)
    train(model, progression, 0, 3)
    with torch.no_grad():
        model.layers[1].weight[2, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"latent weight of layers\.1"):
        progression.step(4)


# ---- who is looking ----


def scales(around: Any) -> list[Tensor]:
    model = stack(2, W)
    progression = Progression(model, 8)
    for step in range(8):
        progression.step(step)
        around(model, step)
        model(batch(step, width=W)).square().mean().backward()
    progression.step(8)
    return [layer.activation_scale.detach() for layer in model.layers]


def _without_gradients(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        model(100 * batch(50 + step, width=W))


def _in_inference_mode(model: nn.Module, step: int) -> None:
    with torch.inference_mode():
        model(100 * batch(50 + step, width=W))


def _in_evaluation(model: nn.Module, step: int) -> None:
    model.eval()
    model(100 * batch(50 + step, width=W))
    model.train()


def _by_a_copy(model: nn.Module, step: int) -> None:
    copy.deepcopy(model)(100 * batch(50 + step, width=W))


@pytest.mark.parametrize("look", [_without_gradients, _in_inference_mode, _in_evaluation, _by_a_copy])
def test_only_forwards_that_train_are_calibration_data(look):
    for seen, expected in zip(scales(look), scales(lambda *_: None), strict=True):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_that_runs_without_gradients_to_be_recomputed_is_seen(reentrant):
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(4))
            self.recompute = False

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant) if self.recompute else layer(x)
            return x

    found = []
    for recompute in (False, True):
        model = binarize_model(Recomputed(), StoMPPConfig(), torch.zeros(1, W))
        model.recompute = recompute
        progression = Progression(model, 8)
        for step in range(8):
            progression.step(step)
            model(batch(step, width=W).requires_grad_()).square().mean().backward()
        progression.step(8)
        found.append([member.activation_scale.detach() for member in members(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- what the optimizer made of the values ----


def test_vanilla_ste_keeps_its_first_update():
    model = stack(2, W, start=0.0, end=0.0)
    progression, optimizer = Progression(model, 4), torch.optim.SGD(model.parameters(), 0.5)
    progression.step(0)
    update(model, optimizer, 0)
    learnt = [layer.activation_scale.detach().clone() for layer in model.layers]
    thresholds = [layer.activation_threshold.detach().clone() for layer in model.layers]
    progression.step(1)
    for layer, scale, threshold in zip(model.layers, learnt, thresholds, strict=True):
        assert torch.equal(layer.activation_scale, scale) and torch.equal(layer.activation_threshold, threshold)


@pytest.mark.parametrize("name", ["weight_scale", "activation_scale"])
def test_a_scale_does_not_cross_zero(name):
    model = stack(2, W)
    progression = Progression(model, 8)
    train(model, progression, 0, 6)
    with torch.no_grad():  # what a large step of an optimizer does
        getattr(model.layers[0], name)[0] = -0.3
    progression.step(6)
    assert getattr(model.layers[0], name)[0].item() == pytest.approx(SCALE_FLOOR)
    assert (getattr(model.layers[1], name) > SCALE_FLOOR).all()


# ---- the masks' phases ----


@pytest.mark.parametrize(("rows", "width", "rate"), [(64, 100, 100), (32, 400, 20), (50, 50, 50)])
def test_a_step_redraws_no_whole_columns_where_the_rate_divides_the_width(rows, width, rate):
    weight = SoftRefreshMask(rows * width, 0, "layer.weight_mask", rate)
    before = weight.draws(7).clone()
    redrawn = (weight.draws(8) != before).reshape(rows, width)
    assert abs(redrawn.float().mean().item() - 1 / rate) < 0.5 / rate
    assert redrawn.float().mean(0).max() < 0.5  # columns
    activation = SoftRefreshMask(width, 0, "layer.activation_mask", rate)
    other = SoftRefreshMask(width, 0, "other.activation_mask", rate)
    moved = []
    for mask in (activation, other):
        steps = [mask.draws(step).clone() for step in range(2 * rate)]
        moved.append([(b != a).nonzero().flatten().tolist() for a, b in itertools.pairwise(steps)])
    assert moved[0] != moved[1]  # each tensor in its own time


# ---- several plans, and steps that are none ----


class Towers(nn.Module):
    """Two towers beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = stack(2, W), stack(3, W)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_parts_that_were_binarized_apart_are_driven_together():
    model = Towers()
    progression = Progression(model, 12)
    assert [len(progression.layers), progression.plan.stage_count] == [5, 5]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    progression.attach(optimizer)
    for step in range(12):
        progression.step(step)
        assert progression.is_complete() == all(m.stage_state == "frozen" for m in progression.layers.values())
        model(batch(step, width=W)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    progression.step(12)
    for part in (model.left, model.right):
        assert progression.is_complete() and {layer.stage_state for layer in part.layers} == {"frozen"}
        again = stack(len(part.layers), W)
        again.load_state_dict(part.state_dict())
        assert torch.equal(again.eval()(batch(3, width=W)), part.eval()(batch(3, width=W)))


def test_parts_with_other_options_are_not_driven_together():
    model = Towers()
    model.right = stack(3, W, frozen_gradient="zero")
    with pytest.raises(ConfigError, match=r"left, right were binarized with frozen_gradient='windowed_ste' and 'zero'"):
        Progression(model, 12)


@pytest.mark.parametrize("step", [-1, 13, 1000, 1.0, True, None])
def test_a_step_outside_the_progression_is_an_error(step):
    progression = Progression(stack(2, W), 12)
    with pytest.raises(ConfigError, match=r"from 0 to total_steps=12"):
        progression.step(step)
