"""pending_lr: what is still real moves by a share of the optimizer's step, and all else by the whole of it."""

import pytest
import torch
from models import CASES, quick
from torch import nn

from stompp_hf import Progression, StoMPPConfig, binarize_model
from stompp_hf.errors import ConfigError
from stompp_hf.surgery.members import binary_layers
from stompp_hf.training.pending_lr import first_steps

BERT = CASES["bert"]
TOTAL = 12


def moved(model: nn.Module, kind: type[torch.optim.Optimizer], step: int, **options: float) -> dict[str, torch.Tensor]:
    """What one optimizer step at `step` adds to each parameter."""
    progression = Progression(model, TOTAL)
    optimizer = kind(model.parameters(), **options)  # type: ignore[call-arg]
    progression.attach(optimizer)
    for earlier in range(step + 1):  # values are set at their time
        progression.step(earlier)
        torch.manual_seed(earlier)
        model(**BERT.batch(earlier)).loss.backward()
        if earlier < step:
            optimizer.zero_grad()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    progression.detach()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def begins_of(model: nn.Module) -> dict[str, int]:
    return {name: window.begin for name, window in Progression(model, TOTAL).windows.items()}


def test_each_parameter_goes_with_the_stage_around_it() -> None:
    model = binarize_model(BERT.build(), quick(start=0.25, end=0.75))
    begins = begins_of(model)
    steps = {id(parameter): first for parameter, first in first_steps(model, begins)}
    first, last = min(begins.values()), max(begins.values())
    assert first < last
    for name, parameter in model.named_parameters():
        block = next((n for n in ("layer.0.", "layer.1.") if n in name), None)
        wanted = first if block != "layer.1." else last
        assert steps[id(parameter)] == wanted, name
    modules = binarize_model(BERT.build(), quick(stages="module", start=0.25, end=0.75))
    begins = begins_of(modules)
    steps = {id(parameter): first for parameter, first in first_steps(modules, begins)}
    for name, layer in binary_layers(modules).items():
        assert {steps[id(parameter)] for parameter in layer.parameters()} == {begins[name]}
    norm = modules.get_parameter("bert.encoder.layer.1.output.LayerNorm.weight")
    assert steps[id(norm)] == begins["bert.encoder.layer.1.output.dense"]


@pytest.mark.parametrize("step", [0, 4, 8])
@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})]
)
def test_pending_moves_by_its_share(kind: type[torch.optim.Optimizer], options: dict[str, float], step: int) -> None:
    plain, slow = (binarize_model(BERT.build(), quick(start=0.25, end=0.75, pending_lr=rate)) for rate in (1.0, 0.25))
    steps = {name: 0 for name, _ in plain.named_parameters()}
    for parameter, first in first_steps(slow, begins_of(slow)):
        steps[next(name for name, p in slow.named_parameters() if p is parameter)] = first
    whole, part = (moved(model, kind, step, **options) for model in (plain, slow))
    assert {step < first for first in steps.values()} == (
        {True} if step == 0 else {True, False} if step == 4 else {False}
    )
    for name, difference in whole.items():
        share = 0.25 if step < steps[name] else 1.0
        torch.testing.assert_close(part[name], share * difference, rtol=1e-4, atol=1e-7)


def test_rate_zero_leaves_pending_layers_as_they_are() -> None:
    model = binarize_model(BERT.build(), quick(start=0.5, end=0.75, pending_lr=0.0))
    assert not any(difference.any() for difference in moved(model, torch.optim.AdamW, 2, lr=0.1).values())


def test_baselines_and_refusals() -> None:
    assert StoMPPConfig(pending_lr=0.1).as_full_precision().pending_lr == 1.0
    model = binarize_model(BERT.build(), quick(pending_lr=0.5))
    with pytest.raises(ConfigError, match=r"pending_lr=1\.0"):
        Progression(model, TOTAL).attach(object())
