"""pending_lr, binary_lr, scale_lr: what waits and what is binary move by shares of a step, the rest by all of it."""

from typing import Any

import pytest
import torch
from models import CASES, quick
from torch import nn

from stompp_hf import Progression, StoMPPConfig, binarize_model
from stompp_hf.errors import ConfigError
from stompp_hf.surgery.members import binary_layers, members
from stompp_hf.training.learning_rates import PROPORTIONAL, Rate, peak_rates, rates, scale_steps

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


def rates_of(model: nn.Module, pending: float = 0.5, binary: float | None = 2.0, scales: float = 1.0) -> list[Rate]:
    return rates(model, members(model), begins_of(model), pending, binary, scales)


def test_each_parameter_goes_with_the_stage_around_it() -> None:
    model = binarize_model(BERT.build(), quick(start=0.25, end=0.75))
    begins = begins_of(model)
    steps = {id(rate.parameter): rate.begin for rate in rates_of(model)}
    first, last = min(begins.values()), max(begins.values())
    assert first < last
    for name, parameter in model.named_parameters():
        block = next((n for n in ("layer.0.", "layer.1.") if n in name), None)
        wanted = first if block != "layer.1." else last
        assert steps[id(parameter)] == wanted, name
    modules = binarize_model(BERT.build(), quick(stages="module", start=0.25, end=0.75))
    begins = begins_of(modules)
    steps = {id(rate.parameter): rate.begin for rate in rates_of(modules)}
    for name, layer in binary_layers(modules).items():
        assert {steps[id(parameter)] for parameter in layer.parameters()} == {begins[name]}
    norm = modules.get_parameter("bert.encoder.layer.1.output.LayerNorm.weight")
    assert steps[id(norm)] == begins["bert.encoder.layer.1.output.dense"]


@pytest.mark.parametrize("step", [0, 4, 8])
@pytest.mark.parametrize("scales", [1.0, 0.5])
@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})]
)
def test_each_moves_by_its_share(
    kind: type[torch.optim.Optimizer], options: dict[str, float], scales: float, step: int
) -> None:
    shares = {"pending_lr": 0.25, "binary_lr": 3.0, "scale_lr": scales}
    plain, scaled = (binarize_model(BERT.build(), quick(start=0.25, end=0.75, **own)) for own in ({}, shares))
    found = {id(rate.parameter): rate for rate in rates_of(scaled, pending=0.25, binary=3.0)}
    latents = {id(layer.latent) for layer in members(scaled).values()}
    own = {id(t) for layer in members(scaled).values() for t in layer.own_tensors().values()}
    wanted = {}
    for name, parameter in scaled.named_parameters():
        waits = step < found[id(parameter)].begin
        begun = 3.0 if id(parameter) in latents else 3.0 * scales if id(parameter) in own else 1.0
        wanted[name] = 0.25 if waits else begun
    begun = {1.0, 3.0, 3.0 * scales}
    assert set(wanted.values()) == ({0.25} if step == 0 else {0.25, *begun} if step == 4 else begun)
    whole, part = (moved(model, kind, step, **options) for model in (plain, scaled))
    for name, difference in whole.items():
        torch.testing.assert_close(part[name], wanted[name] * difference, rtol=1e-3, atol=1e-6)


def test_frozen_entries_stay_where_they_are_held() -> None:
    model = binarize_model(BERT.build(), quick(frozen_gradient="zero", end=0.75, binary_lr=20.0))
    before = {name: layer.weight.detach().clone() for name, layer in binary_layers(model).items()}
    moved(model, torch.optim.AdamW, 8, lr=1e-3)
    frozen = [name for name, layer in binary_layers(model).items() if layer.stage_state == "frozen"]
    assert frozen and before.keys() >= set(frozen)
    progression = Progression(model, TOTAL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    progression.attach(optimizer)
    progression.step(9)
    held = {name: binary_layers(model)[name].weight.detach().clone() for name in frozen}
    model(**BERT.batch(9)).loss.backward()
    optimizer.step()
    assert all(torch.equal(binary_layers(model)[name].weight, value) for name, value in held.items())
    progression.detach()


def test_rate_zero_leaves_pending_layers_as_they_are() -> None:
    model = binarize_model(BERT.build(), quick(start=0.5, end=0.75, pending_lr=0.0))
    assert not any(difference.any() for difference in moved(model, torch.optim.AdamW, 2, lr=0.1).values())


def test_baselines_and_refusals() -> None:
    real = StoMPPConfig(pending_lr=0.1, binary_lr=20.0, scale_lr=0.2).as_full_precision()
    assert real.pending_lr == real.binary_lr == real.scale_lr == 1.0
    for options in ({"pending_lr": 0.5}, {"binary_lr": 1.0, "scale_lr": 0.5}, {"scale_lr": 0.5}):
        model = binarize_model(BERT.build(), quick(**options))
        with pytest.raises(ConfigError, match=r"pending_lr=1\.0, binary_lr=1\.0, scale_lr=1\.0"):
            Progression(model, TOTAL).attach(object())


# ---- binary_lr unset ----


def test_unset_brings_binary_layers_up_to_their_rate() -> None:
    """0.02 / sqrt(fan-in) whatever the script's rate, and never below that one."""
    model = binarize_model(BERT.build(), quick(start=0.25, end=0.75))
    found = {id(rate.parameter): rate for rate in rates_of(model, binary=None)}
    for layer in binary_layers(model).values():
        wanted = 0.02 / layer.weight.shape[1] ** 0.5  # nn.Linear: (out, in)
        for tensor in layer.binary_tensors():
            if not tensor.requires_grad:
                continue
            rate = found[id(tensor)]
            for peak in (2e-5, 5e-5, 1e-4):
                assert rate.at(rate.begin, peak) * peak == pytest.approx(wanted)
                assert rate.at(rate.begin - 1, peak) == 0.5
            assert rate.at(rate.begin, 0.1) == rate.at(rate.begin, 0.0) == 1.0
    slow = {id(rate.parameter): rate for rate in rates_of(model, binary=None, scales=0.1)}
    for layer in binary_layers(model).values():
        for tensor in layer.scales():
            for peak in (5e-5, 0.1):  # also where the latents have the script's own rate
                rates_now = [known[id(tensor)].at(TOTAL, peak) for known in (slow, found)]
                assert rates_now[0] == pytest.approx(0.1 * rates_now[1])
    head = found[id(model.get_parameter("classifier.weight"))]
    assert head.at(TOTAL, 1e-5) == 1.0


@pytest.mark.parametrize(
    ("kind", "options", "scaled"),
    [
        (torch.optim.AdamW, {"lr": 1e-4}, True),
        (torch.optim.Adafactor, {"lr": 1e-4}, True),
        (torch.optim.AdamW, {"lr": 0.1}, False),
        (torch.optim.SGD, {"lr": 1e-4}, False),  # its steps are as large as the gradient, not as the rate
    ],
)
def test_unset_asks_the_optimizer(kind: type[torch.optim.Optimizer], options: dict[str, float], scaled: bool) -> None:
    plain, auto = (binarize_model(BERT.build(), quick(start=0.25, end=0.75, binary_lr=lr)) for lr in (1.0, None))
    names = {id(parameter): name for name, parameter in auto.named_parameters()}
    own = {names[id(t)] for m in members(auto).values() for t in m.binary_tensors() if id(t) in names}
    fan_in = {name: m.fan_in for m in members(auto).values() for name in own if name in map_of(m, names)}
    whole, part = (moved(model, kind, 8, **options) for model in (plain, auto))
    for name, difference in whole.items():
        share = 0.02 / fan_in[name] ** 0.5 / options["lr"] if name in own and scaled else 1.0
        torch.testing.assert_close(part[name], share * difference, rtol=2e-2, atol=1e-6)


def map_of(member: nn.Module, names: dict[int, str]) -> set[str]:
    return {names[id(t)] for t in member.binary_tensors() if id(t) in names}  # type: ignore[operator]


@pytest.mark.parametrize("first", ["attach", "scheduler"])
def test_a_scheduler_lowers_both_alike(first: str) -> None:
    model = binarize_model(BERT.build(), quick(end=0.5))
    progression, optimizer = Progression(model, TOTAL), torch.optim.AdamW(model.parameters(), lr=1e-4)
    if first == "attach":
        progression.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0 - step / TOTAL)
    if first == "scheduler":
        progression.attach(optimizer)
    parameter = binary_layers(model)["bert.encoder.layer.0.output.dense"].weight
    for step in range(4):
        progression.step(step)
        assert peak_rates(optimizer)[id(parameter)] == 1e-4
        model(**BERT.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert optimizer.state_dict()["param_groups"][0]["initial_lr"] == 1e-4  # what a resumed run reads
    cycle = torch.optim.lr_scheduler.OneCycleLR(torch.optim.AdamW(model.parameters()), max_lr=3e-4, total_steps=9)
    assert set(peak_rates(cycle.optimizer).values()) == {3e-4}


def test_a_rate_that_the_optimizer_computes_itself_is_left() -> None:
    from transformers.optimization import Adafactor

    model = binarize_model(BERT.build(), quick())
    assert peak_rates(Adafactor(model.parameters())) == {}


def test_unset_leaves_optimizers_that_cannot_be_scaled(caplog: pytest.LogCaptureFixture) -> None:
    model = binarize_model(BERT.build(), quick())
    Progression(model, TOTAL).attach(object())
    assert "binary_lr=1.0" in caplog.text and "object" in caplog.text
    caplog.clear()
    Progression(binarize_model(BERT.build(), quick(binary_lr=1.0)), TOTAL).attach(object())
    assert "binary_lr" not in caplog.text


# ---- without copies ----


def grown(name: str, rate: float, options: dict[str, Any], shares: bool) -> dict[str, torch.Tensor]:
    """A layer's parameters after some steps: by shares of an optimizer's steps, or by groups of their own."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    groups = [{"params": [layer.weight], "lr": rate * 1e-2}, {"params": [layer.bias], "lr": 1e-2}]
    optimizer = getattr(torch.optim, name)(layer.parameters() if shares else groups, lr=1e-2, **options)
    if shares:
        scale_steps(optimizer, [Rate(layer.weight, 0, 1.0, rate), Rate(layer.bias, 0, 1.0, 1.0)], lambda: 0)
    for step in range(5):
        torch.manual_seed(step)
        layer(torch.randn(3, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.param_groups) == (1 if shares else 2)
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("name", sorted(cls.__name__ for cls in PROPORTIONAL))
def test_shares_are_those_of_groups_with_rates_of_their_own(name: str, options: dict[str, Any]) -> None:
    options = {**options, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    found, expected = (grown(name, 7.0, options, shares) for shares in (True, False))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_step_that_raises_leaves_no_split_groups_behind() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scale_steps(optimizer, [Rate(layer.weight, 0, 1.0, 3.0)], iter(range(9)).__next__)
    layer(torch.ones(1, 3)).sum().backward()
    layer.weight.grad = torch.sparse_coo_tensor([[0], [0]], [1.0], (2, 3))  # AdamW takes none
    with pytest.raises(RuntimeError):
        optimizer.step()
    layer.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
