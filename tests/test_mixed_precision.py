"""Autocast, half-precision weights, the fp16 scaler's skipped steps, activation checkpointing."""

import copy
from typing import Any

import pytest
import torch
from models import CASES, quick, same_tensors
from stack import batch, stack
from torch import nn
from torch.amp import GradScaler
from train_and_die import arguments, rows
from transformers import Trainer

from stompp_hf import Progression, StoMPPConfig, StoMPPTrainerCallback, binarize_model
from stompp_hf.method.mixing import hard
from stompp_hf.modules import binary_class_of as type_of
from stompp_hf.surgery.members import binary_layers

BERT = CASES["bert"]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TOTAL = 12


def masks_of(progression: Progression) -> list[torch.Tensor]:
    members = progression.layers.values()
    found = [getattr(member, name) for member in members for name in member.mask_names]
    return [mask.clone() for mask in found if mask is not None]


@HALVES
@pytest.mark.parametrize("regime", ["zero", "windowed_ste"])
def test_autocast_sees_the_same_masks_and_ends_binary(dtype, regime):
    runs = []
    for enabled in (False, True):
        model = stack(3, frozen_gradient=regime)
        progression, optimizer = Progression(model, TOTAL), torch.optim.AdamW(model.parameters(), lr=1e-3)
        progression.attach(optimizer)
        masks, losses = [], []
        for step in range(TOTAL):
            progression.step(step)
            masks += masks_of(progression)
            with torch.autocast("cpu", dtype, enabled=enabled):
                out = model(batch(step))
            loss = out.float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        progression.step(TOTAL)
        assert progression.is_complete()
        runs.append((masks, losses))
    (masks, losses), (other, halves) = runs
    assert len(masks) == len(other) > 0 and all(map(torch.equal, masks, other))
    assert halves == pytest.approx(losses, rel=0.03)


@HALVES
def test_a_frozen_layers_signs_do_not_depend_on_autocast(dtype):
    """The same tensor in, the same codes: the frozen product is that of float32, rounded once at its end."""
    model = stack(1, learn_activation_threshold=False)
    progression = Progression(model, TOTAL)
    for step in (0, TOTAL):
        progression.step(step)
        model(batch(0))
    layer = model.layers[0].eval()
    near = torch.cat([batch(1), layer.activation_threshold.detach() + 1e-7 * batch(2)])  # close to the threshold
    exact = layer(near)
    with torch.autocast("cpu", dtype):
        mixed = layer(near)
    assert mixed.dtype == dtype and torch.equal(mixed, exact.to(dtype))


@HALVES
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_autocast_narrows_a_frozen_layers_backward_pass_as_a_plain_layers(dtype, kind):
    """With scales of 1 the binary weight is exact in every dtype: both products of the backward pass are autocast's."""
    torch.manual_seed(0)
    plain = nn.Linear(65, 33) if kind == "linear" else nn.Conv2d(13, 7, 3, padding=1)
    values = torch.randn(9, 65) if kind == "linear" else torch.randn(2, 13, 6, 6)
    signs = copy.deepcopy(plain)
    signs.weight.data = hard(plain.weight.data)
    layer = type_of(plain).convert(plain, StoMPPConfig.paper(frozen_gradient="ste", conv_padding="zero"))
    layer.enter("frozen", 1.0)
    runs = []
    for module, x in ((layer, values), (signs, hard(values))):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = module(x)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype))
        runs.append((x.grad, module.weight.grad))
    assert all(map(torch.equal, *runs))
    exact = copy.deepcopy(layer)
    exact.zero_grad()
    y = exact(values)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    assert not torch.equal(exact.weight.grad, runs[0][1])  # else nothing was narrowed


def test_weights_in_half_precision_warn_and_run(caplog):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).to(torch.bfloat16)
    binarize_model(
        model, quick(keep_dtype=True, first_layer="binarize", head="binarize"), torch.zeros(1, 16).bfloat16()
    )
    assert "small updates vanish" in caplog.text
    progression, optimizer = Progression(model, TOTAL), torch.optim.SGD(model.parameters(), lr=0.1)
    progression.attach(optimizer)
    for step in range(TOTAL):
        progression.step(step)
        model(torch.randn(8, 16, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.weight.dtype == torch.bfloat16 for layer in binary_layers(model).values())


@pytest.mark.parametrize("regime", ["zero", "windowed_ste"])
def test_a_step_that_the_fp16_scaler_skips_is_a_step_of_the_progression(regime):
    """The optimizer's hooks do not run then: weights, and what was held, stay as they are, and the masks go on."""
    model = stack(3, frozen_gradient=regime)
    progression, optimizer = Progression(model, TOTAL), torch.optim.AdamW(model.parameters(), lr=0.05)
    progression.attach(optimizer)
    scaler = GradScaler("cpu", init_scale=8.0)
    signs: list[torch.Tensor] = []
    for step in range(TOTAL):
        progression.step(step)
        layer = model.layers[0]
        if layer.stage_state == "frozen" and regime == "zero":
            signs.append(layer.weight.detach() >= 0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss = model(batch(step)).square().mean()
        scaler.scale(loss * torch.inf if step in (2, 6) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(map(torch.equal, before, model.parameters()))
        assert same == (step in (2, 6))
    progression.step(TOTAL)
    assert progression.is_complete() and scaler.get_scale() == 2.0
    assert all(torch.equal(signs[0], later) for later in signs)


@pytest.mark.parametrize("regime", ["zero", "windowed_ste"])
def test_trainers_activation_checkpointing_changes_nothing(tmp_path, regime):
    """Recomputation sees the same masks, and what it sees is not counted again for starting values."""
    models: list[Any] = []
    for recomputes in (False, True):
        model = binarize_model(BERT.build(), quick(frozen_gradient=regime))
        args = arguments(tmp_path, activation_checkpointing=recomputes, save_strategy="no", max_steps=TOTAL)
        Trainer(model, args, train_dataset=rows(), callbacks=[StoMPPTrainerCallback()]).train()
        models.append(model)
    assert models[1].is_activation_checkpointing and not models[0].is_activation_checkpointing
    assert same_tensors(models[0].state_dict(), models[1].state_dict()) == []
