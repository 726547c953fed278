"""Frozen means frozen (invariant 3): whatever the optimizer does, STE-free signs stay; with STE they may flip."""

import pytest
import torch
from accelerate import Accelerator
from models import CASES, quick
from stack import batch, stack, update
from torch import Tensor
from train_and_die import arguments, rows
from transformers import Trainer, TrainerCallback

from stompp_hf import Progression, StoMPPTrainerCallback, binarize_model
from stompp_hf.errors import ConfigError
from stompp_hf.surgery.members import binary_layers

TOTAL, FURTHER, WIDTH = 60, 200, 16
ADAMW = (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1})
SGD = (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.1})
optimizers = pytest.mark.parametrize(("kind", "options"), [ADAMW, SGD], ids=["adamw", "sgd"])


def hold_stack(regime: str = "zero", learnable: bool = False):
    """Three layers that freeze one after the other, with fixed or learnable scales."""
    fixed = {"learn_weight_scale": learnable, "learn_activation_scale": learnable}
    return stack(3, WIDTH, frozen_gradient=regime, **fixed)


def frozen_signs(layers) -> list[tuple[Tensor, Tensor]]:
    """For each layer: which entries are frozen now, and all signs."""
    result = []
    for layer in layers:
        frozen = torch.full(layer.weight.shape, layer.stage_state == "frozen")
        result.append((frozen if layer.weight_mask is None else layer.weight_mask.clone(), layer.weight.detach() >= 0))
    return result


def count_flips(model, progression, optimizer, first: int, last: int, parts: int = 1, to_none: bool = True) -> int:
    """Train; entries whose sign changed between two steps at both of which they were frozen."""
    flips, before = 0, None
    for step in range(first, last):
        progression.step(step)
        now = frozen_signs(model.layers)
        for (frozen, sign), (was_frozen, was) in zip(now, before or now, strict=True):
            flips += int((frozen & was_frozen & (sign != was)).sum())
        before = now
        update(model, optimizer, step, parts)
        if not to_none:  # as under DDP: gradients of 0 where nothing flows back
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
    return flips


@optimizers
@pytest.mark.parametrize("parts", [1, 2], ids=["one-batch", "accumulated"])
def test_frozen_signs_stay_during_the_whole_progression_and_ever_after(kind, options, parts):
    model = hold_stack()
    progression, optimizer = Progression(model, TOTAL), kind(model.parameters(), **options)
    start = [layer.weight.detach().clone() for layer in model.layers]
    progression.attach(optimizer)
    assert count_flips(model, progression, optimizer, 0, TOTAL, parts) == 0
    for layer, old in zip(model.layers, start, strict=True):
        assert ((layer.weight >= 0) != (old >= 0)).any()  # before they froze, entries did move

    progression.step(TOTAL)
    binary = [layer.binary_weight() for layer in model.layers]
    latent = [layer.weight.detach().clone() for layer in model.layers]
    assert count_flips(model, progression, optimizer, TOTAL, TOTAL + FURTHER, parts) == 0
    for layer, values, weight in zip(model.layers, binary, latent, strict=True):
        assert torch.equal(layer.binary_weight(), values) and torch.equal(layer.weight, weight)


@optimizers
def test_gradients_of_zero_move_nothing_that_is_frozen(kind, options):
    model = hold_stack()
    progression, optimizer = Progression(model, TOTAL), kind(model.parameters(), **options)
    progression.attach(optimizer)
    assert count_flips(model, progression, optimizer, 0, TOTAL + FURTHER, to_none=False) == 0


@optimizers
def test_learnable_scales_move_and_signs_do_not(kind, options):
    model = hold_stack(learnable=True)
    progression, optimizer = Progression(model, TOTAL), kind(model.parameters(), **options)
    progression.attach(optimizer)
    assert count_flips(model, progression, optimizer, 0, TOTAL) == 0
    progression.step(TOTAL)
    scales = [layer.weight_scale.detach().clone() for layer in model.layers]
    signs = [layer.weight.detach() >= 0 for layer in model.layers]
    assert count_flips(model, progression, optimizer, TOTAL, TOTAL + 50) == 0
    for layer, scale, sign in zip(model.layers, scales, signs, strict=True):
        assert not torch.equal(layer.weight_scale, scale) and torch.equal(layer.weight >= 0, sign)


def test_entries_that_are_not_frozen_move_and_frozen_ones_keep_every_bit():
    model = hold_stack()
    progression, optimizer = Progression(model, TOTAL), ADAMW[0](model.parameters(), **ADAMW[1])
    progression.attach(optimizer)
    count_flips(model, progression, optimizer, 0, 16)
    progression.step(16)  # the first window is [0, 20): half of it is frozen
    layer = model.layers[0]
    mask, before = layer.weight_mask.clone(), layer.weight.detach().clone()
    assert 0.3 < mask.float().mean() < 0.7
    bias = layer.bias.detach().clone()
    update(model, optimizer, 16)
    assert torch.equal(layer.weight[mask], before[mask])
    assert (layer.weight[~mask] != before[~mask]).float().mean() > 0.99
    assert not torch.equal(layer.bias, bias)


@pytest.mark.parametrize("regime", ["ste", "clipped_ste", "windowed_ste"])
@optimizers
def test_with_a_surrogate_frozen_latents_go_on_learning_and_may_flip(kind, options, regime):
    model = hold_stack(regime)
    progression, optimizer = Progression(model, TOTAL), kind(model.parameters(), **options)
    progression.attach(optimizer)
    assert count_flips(model, progression, optimizer, 0, TOTAL + 20) > 0


@optimizers
def test_without_attach_signs_would_flip(kind, options):
    """The test above can fail: inertia and decay alone flip frozen signs."""
    model = hold_stack()
    progression, optimizer = Progression(model, TOTAL), kind(model.parameters(), **options)
    assert count_flips(model, progression, optimizer, 0, TOTAL + FURTHER, to_none=False) > 0


def test_accelerates_wrapper_is_held_too():
    model = hold_stack()
    optimizer = Accelerator(cpu=True).prepare(ADAMW[0](model.parameters(), **ADAMW[1]))
    progression = Progression(model, TOTAL)
    progression.attach(optimizer)
    assert count_flips(model, progression, optimizer, 0, TOTAL + FURTHER, to_none=False) == 0


class Watch(TrainerCallback):
    """Counts the signs that change between two steps at both of which their entries were frozen."""

    def __init__(self) -> None:
        self.before, self.looked_at, self.flips = [], 0, 0

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        now = frozen_signs(binary_layers(model).values())
        for (frozen, sign), (was_frozen, was) in zip(now, self.before or now, strict=True):
            self.looked_at += int((frozen & was_frozen).sum())
            self.flips += int((frozen & was_frozen & (sign != was)).sum())
        self.before = now


@pytest.mark.parametrize(("regime", "flips"), [("zero", False), ("ste", True)])
def test_trainer_holds_too(tmp_path, regime, flips):
    model = binarize_model(CASES["bert"].build(), quick(frozen_gradient=regime))
    args = arguments(tmp_path, save_strategy="no", learning_rate=0.02, gradient_accumulation_steps=2)
    watch = Watch()
    Trainer(model, args, train_dataset=rows(), callbacks=[StoMPPTrainerCallback(), watch]).train()
    assert watch.looked_at > 10_000 and bool(watch.flips) == flips


class Hookless:
    """An optimizer from elsewhere: it can step, and nobody can look on."""

    def step(self) -> None:
        """Do nothing."""


def test_optimizers_without_hooks_are_refused_where_they_would_break_the_promise():
    for regime in ("ste", "clipped_ste", "windowed_ste"):
        Progression(hold_stack(regime), TOTAL).attach(Hookless())
    Progression(stack(1, frozen_gradient="zero", binarize="nothing"), TOTAL).attach(Hookless())
    with pytest.raises(ConfigError, match=r"Hookless has no step hooks.*'ste'"):
        Progression(hold_stack(), TOTAL).attach(Hookless())


def test_detach_lets_go_of_the_optimizer_and_removes_every_hook():
    model = hold_stack()
    progression, optimizer = Progression(model, TOTAL), ADAMW[0](model.parameters(), **ADAMW[1])
    progression.attach(optimizer)
    progression.step(0)
    assert optimizer._optimizer_step_pre_hooks and optimizer._optimizer_step_post_hooks
    assert model._forward_pre_hooks and model.layers[0]._forward_pre_hooks
    update(model, optimizer, 0)
    progression.step(16)
    progression.detach()
    hooks = [module._forward_pre_hooks for module in model.modules()]
    assert not any([optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *hooks])
    mask, before = model.layers[0].weight_mask.clone(), model.layers[0].weight.detach().clone()
    update(model, optimizer, 1)
    assert (model.layers[0].weight[mask] != before[mask]).any()
    assert torch.isfinite(model(batch(0, width=WIDTH))).all()
