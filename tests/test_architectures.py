"""What must hold for every architecture: identity, order, training, full freeze, and saving at any moment."""

import logging
import math
from pathlib import Path

import pytest
import torch
from models import CASES, Case, assert_binary, first_calls, logits, plain_names, quick, same_tensors, train
from torch import nn

from stompp_hf import BinaryConv1D, BinaryLayer, Progression, binarize_model, get_plan
from stompp_hf.errors import NothingToBinarizeError
from stompp_hf.surgery.members import binary_layers

STEPS, MIDDLE = 12, 5
every_architecture = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_architecture
def test_nothing_changes_at_the_start(case: Case) -> None:
    batch, plain = case.batch(), case.build()
    model = case.build()
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    assert binarize_model(model) is model
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert torch.equal(logits(model, batch), logits(plain, batch))
    outputs = []
    for network in (model, plain):  # with dropout
        torch.manual_seed(1)
        outputs.append(network(**batch))
    assert torch.equal(outputs[0].logits, outputs[1].logits) and torch.equal(outputs[0].loss, outputs[1].loss)

    after = dict(model.named_parameters())
    assert plain_names(after) == list(parameters)
    assert {name: id(after[name]) for name in parameters} == parameters
    assert {name: id(module) for name, module in model.named_modules()} == modules

    other = case.build(seed=1)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(logits(model, batch), logits(other, batch))


@every_architecture
def test_layers_stages_and_reasons(case: Case) -> None:
    order = first_calls(case.build(), case.batch())
    model = binarize_model(case.build())
    plan = get_plan(model)
    names = [entry.name for entry in plan.entries]
    assert len(names) == len(set(names)) == case.layers
    assert names == [name for name in order if name in names]
    assert names == [*binary_layers(model)]
    assert set(names) == {n for n, m in model.named_modules() if isinstance(m, BinaryLayer)}
    assert plan.stage_count == case.stages and len(set(plan.stage_names)) == case.stages
    assert all(entry.name.startswith(entry.stage_name) for entry in plan.entries)
    assert plan.left.keys() == case.left.keys()
    for name, reason in case.left.items():
        assert reason in plan.left[name]
        assert type(model.get_submodule(name)) is nn.Linear


def test_decoders_freeze_after_encoders() -> None:
    for name, decoder in (("t5", "decoder."), ("bart", "model.decoder.")):
        order = [entry.name.startswith(decoder) for entry in get_plan(binarize_model(CASES[name].build())).entries]
        assert order == [False] * 12 + [True] * 20


def test_a_shared_block_is_one_stage_and_gpt2_has_conv1d() -> None:
    names = [entry.name for entry in get_plan(binarize_model(CASES["albert"].build())).entries]
    prefix = "albert.encoder.albert_layer_groups.0.albert_layers.0."
    inside = ["attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"]
    assert sorted(names) == sorted(prefix + name for name in inside)
    gpt2 = binarize_model(CASES["gpt2"].build())
    assert {type(layer) for layer in binary_layers(gpt2).values()} == {BinaryConv1D}
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


@every_architecture
@pytest.mark.parametrize("regime", ["zero", "ste", "windowed_ste"])
def test_two_steps_in_each_regime(case: Case, regime: str) -> None:
    model = binarize_model(case.build(), quick(frozen_gradient=regime))
    before = {name: layer.weight.detach().clone() for name, layer in binary_layers(model).items()}
    losses = train(model, case, 0, 2, total=3)
    assert all(math.isfinite(loss) for loss in losses)
    assert any(layer.stage_state != "pending" for layer in binary_layers(model).values())
    moved = [name for name, layer in binary_layers(model).items() if not torch.equal(layer.weight, before[name])]
    assert moved == list(before)  # every latent of every layer was reached: nothing was fully frozen yet


@every_architecture
def test_training_to_the_end_and_saving_on_the_way(case: Case, tmp_path: Path) -> None:
    model, batch = binarize_model(case.build(), quick()), case.batch(77)
    losses = train(model, case, 0, MIDDLE, STEPS)
    states = {layer.stage_state for layer in binary_layers(model).values()}
    assert "transition" in states and not Progression(model, STEPS).is_complete()

    # In the middle: saved, reloaded, and continued twice, each time as if nothing had happened.
    middle = logits(model, batch)
    model.save_pretrained(tmp_path / "middle")
    assert torch.equal(logits(model, batch), middle)
    reloads = [case.auto.from_pretrained(tmp_path / "middle") for _ in range(2)]
    assert torch.equal(logits(reloads[0], batch), middle)
    assert same_tensors(reloads[0].state_dict(), model.state_dict()) == []
    losses += train(model, case, MIDDLE, STEPS, STEPS)
    for reload in reloads:
        assert train(reload, case, MIDDLE, STEPS, STEPS) == losses[MIDDLE:]
        assert same_tensors(reload.state_dict(), model.state_dict()) == []

    # At the end: fully binary, and saved once more.
    assert all(math.isfinite(loss) for loss in losses)
    assert Progression(model, STEPS).is_complete()
    for layer in binary_layers(model).values():
        assert layer.stage_state == "frozen" and layer.weight_mask is None and layer.activation_mask is None
        assert_binary(layer)
    end = logits(model, batch)
    assert torch.isfinite(end).all() and not torch.equal(end, middle)
    model.save_pretrained(tmp_path / "end")
    reload = case.auto.from_pretrained(tmp_path / "end")
    assert type(reload) is type(model) and torch.equal(logits(reload, batch), end)


class Bypassing(nn.Module):
    """Two repeated blocks; each uses the weight of `proj` without calling it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.tanh(nn.functional.linear(x, self.proj.weight)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_bypassed_layers_are_found_before_anything_is_converted(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 8)
    model = Bypassing()
    before = model(x)
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        binarize_model(model, example_inputs=x)
    plan = get_plan(model)
    assert [entry.name for entry in plan.entries] == ["blocks.0.out", "blocks.1.out"]
    assert plan.left.keys() == {"blocks.0.proj", "blocks.1.proj"}
    for name, reason in plan.left.items():
        assert type(model.get_submodule(name)) is nn.Linear and reason.startswith("bypassed")
        assert any(name in record.message and "never calls" in record.message for record in caplog.records)
    assert torch.equal(model(x), before)

    lonely = Bypassing()
    lonely.forward = lambda x: x
    with pytest.raises(NothingToBinarizeError, match=r"4 x bypassed.*example_inputs"):
        binarize_model(lonely, example_inputs=x)
