"""What is kept from call to call follows its tensors, and is no tensor of inference mode that training would meet."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_choosing import finished
from torch import nn

from stompp_hf import Progression, StoMPPConfig, binarize_model, kernels, unfuse
from stompp_hf.kernels.kept import Seen, _kept
from stompp_hf.modules.packed import PackedLayer


def layers(model: nn.Module) -> list[Any]:
    """The packed layers."""
    return [module for module in model.modules() if isinstance(module, PackedLayer)]


def in_place(layer: Any) -> None:
    layer.weight_scale.mul_(1.5)
    layer.weight_bits.bitwise_xor_(5)
    layer.bias.add_(0.25)


def by_data(layer: Any) -> None:
    for _ in range(3):  # so that memory is given back, and taken again
        layer.weight_scale.data = layer.weight_scale.data * 0.5
        layer.weight_bits.data = layer.weight_bits.data ^ 3
        layer.bias.data = layer.bias.data + 1.0


def replaced(layer: Any) -> None:
    layer._buffers["weight_bits"] = layer.weight_bits ^ 9
    layer._parameters["bias"] = nn.Parameter(layer.bias * -2.0)


def thresholds(layer: Any) -> None:
    if layer.activation_threshold is not None:
        layer.activation_threshold.add_(0.1)
        layer.activation_scale.mul_(3.0)


def moved(layer: Any) -> None:
    layer.double().float()


def is_true(model: Any, x: torch.Tensor) -> bool:
    """Whether a model computes what its tensors say: as an unfused copy does in plain torch."""
    twin = unfuse(copy.deepcopy(model))
    with kernels.switched_off():
        return torch.allclose(model(x), twin(x), atol=1e-5) and torch.allclose(twin(x), model(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "real", "conv", "embedding"])
@pytest.mark.parametrize("state", ["packed", "fused"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_change_of_tensors_is_a_change_of_the_model(kind: str, state: str, context: Callable[[], Any]) -> None:
    (model, x), (other, _) = finished(kind, state), finished(kind, state, seed=1)
    with context():
        model = copy.deepcopy(model)  # in inference mode: of tensors that count no changes
        twin, before = copy.deepcopy(model), model(x)
        for change in (in_place, by_data, replaced, thresholds, moved):
            for layer in layers(model):
                if kind != "embedding" or getattr(layer, "bias", None) is not None:
                    change(layer)
            found = model(x)
            assert is_true(model, x), change
            assert torch.equal(copy.deepcopy(model)(x), found), change
        assert not torch.equal(found, before) and torch.equal(twin(x), before)
        for assign in (False, True):
            model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
            assert torch.equal(model(x), other(x)) and is_true(model, x)


def test_compiled_graphs_of_a_fused_model_see_what_is_loaded() -> None:
    model, x = finished("linear", "fused")
    other, _ = finished("linear", "fused", seed=1)
    torch.compiler.reset()
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
        model.load_state_dict(other.state_dict())
        assert torch.equal(graph(x), other(x))


def test_gradients_are_wanted_again_of_parameters_that_were_loaded() -> None:
    model, _ = finished("linear", "fused")
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in unfuse(model).parameters())


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("levels", ["symmetric", "auto"])
def test_evaluation_in_inference_mode_does_not_reach_training(kind: str, levels: str) -> None:
    model, x = finished(kind, "frozen")
    del model
    torch.manual_seed(0)
    from test_choosing import plain

    net, x = plain(kind)
    model = binarize_model(net, StoMPPConfig(activation_levels=levels), example_inputs=x)
    progression, optimizer = Progression(model, 4), torch.optim.SGD(model.parameters(), 1e-2)
    progression.attach(optimizer)
    for step in range(7):
        progression.step(min(step, 4))
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            model.eval()(x)
    kept = [value for values in _kept.values() for _, value in values.values()]
    assert not any(value.is_inference() for value in kept)


def test_a_model_that_is_made_in_inference_mode_freezes() -> None:
    with torch.inference_mode():
        model, x = finished("linear", "fused")
        assert is_true(model, x)


def test_tensors_of_inference_mode_are_compared() -> None:
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.ones(1)

    with torch.inference_mode():
        bits = torch.zeros(4, dtype=torch.uint8)
        for _ in range(2):
            assert not kernels.derived(bits, "ones", make).is_inference()
        bits[0] = 1
        kernels.derived(bits, "ones", make)
    assert len(made) == 2
    plain_bits = torch.zeros(4, dtype=torch.uint8)
    seen = Seen(plain_bits)
    with torch.inference_mode():
        assert seen.is_still(plain_bits)
        plain_bits[0] = 1
        assert not seen.is_still(plain_bits)
