"""scale_gradient="lsq": gradients of scales and thresholds over the root of how many entries they sum over."""

import math
from typing import Any

import beyond
import pytest
import torch
from models import quick
from test_group_scales import PLAIN, freeze
from torch import Tensor

from stompp_hf import BinaryEmbedding, Progression, StoMPPConfig, binarize_model, kernels, pack_model
from stompp_hf.method.gradient_units import per_root
from stompp_hf.modules import FROZEN, TRANSITION
from stompp_hf.modules.registry import binary_class_of

FEATURES, OUT = 24, 6


def test_the_value_is_the_same_to_the_bit() -> None:
    values = torch.tensor([0.0, -0.0, 1e-38, -3.0, 2.0**100]).requires_grad_()
    found = per_root(values, 9)
    assert torch.equal(found, values) and torch.equal(found.signbit(), values.signbit())
    found.sum().backward()
    torch.testing.assert_close(values.grad, torch.full((5,), 1 / 3))


def converted(kind: str, units: str, **options: Any) -> Any:
    torch.manual_seed(0)
    plain = PLAIN[kind](FEATURES, OUT)
    cls: Any = BinaryEmbedding if kind == "embedding" else binary_class_of(plain)
    layer = cls.convert(plain, StoMPPConfig(scale_gradient=units, **options))
    layer.calibrate_weight()
    if kind != "embedding":
        layer.calibrate_activation(torch.randn(32, layer.activation_threshold.shape[0]))
    return layer


def inputs_of(kind: str) -> Tensor:
    shapes = {"conv": (3, FEATURES, 5), "conv2d": (3, 2 * FEATURES, 4, 5)}
    if kind == "embedding":
        return torch.tensor([[0, 1, 1], [2, 5, 3]])
    return torch.randn(shapes.get(kind, (3, 5, FEATURES)))


def gradients(layer: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {**found, "y": y.detach(), **({"x": x.grad} if x.grad is not None else {})}


def counted(layer: Any, kind: str, x: Tensor) -> dict[str, int]:
    """How many entries each number of a scale or threshold acts on, from the definition."""
    config, channels = layer.stompp_config, layer.weight.shape[1 if kind == "transposed" else 0]
    alone = layer.weight.numel() // channels
    sizes = {"tensor": layer.weight.numel(), "channel": alone, "group": min(config.group_size, alone)}
    features = x.shape[1 if kind.startswith("conv") else -1]
    return {
        "weight_scale": sizes[config.weight_scale],
        "activation_scale": x[0].numel(),
        "activation_threshold": x[0].numel() // features,
    }


@pytest.mark.parametrize("way", ["c", "torch"])
@pytest.mark.parametrize("state", [TRANSITION, FROZEN])
@pytest.mark.parametrize("scale", ["tensor", "channel", "group"])
@pytest.mark.parametrize("kind", PLAIN)
def test_layers(kind: str, scale: str, state: str, way: str) -> None:
    """Only scales and thresholds get another gradient, each over its root; in C and in plain torch alike."""
    x = inputs_of(kind)
    options = {"weight_scale": scale, **({"group_size": 10} if scale == "group" else {})}
    results = []
    if way == "torch":
        kernels.use("torch")
    try:
        for units in ("sum", "lsq"):
            layer = converted(kind, units, **options)
            torch.manual_seed(2)
            freeze(layer, state)
            results.append(gradients(layer, x))
    finally:
        kernels.use()
    plain, found = results
    counts = counted(layer, kind, x)
    learnt = [name for name in plain if name in counts]
    assert len(learnt) == (1 if kind == "embedding" else 3) and all(plain[name].any() for name in learnt)
    wanted = {name: grad / math.sqrt(counts.get(name, 1)) for name, grad in plain.items()}
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=name, rtol=1e-5 if name in learnt else 0, atol=0)


@pytest.mark.parametrize("at", [3, 8])
def test_a_model_with_binary_attention_and_embeddings(at: int) -> None:
    results = []
    for units in ("sum", "lsq"):
        model = binarize_model(beyond.build("bert"), quick(order="global", scale_gradient=units, **beyond.BOTH)).eval()
        progression = Progression(model.train(), 10)
        for step in (0, at):
            model.zero_grad()
            progression.step(step)
            torch.manual_seed(1)
            loss = model(**beyond.BERT.batch()).loss
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    (plain, found), length, size = results, beyond.BERT.batch()["input_ids"].shape[1], 16
    seen = set()
    for name, grad in plain.items():
        what, module = name.rpartition(".")[2], model.get_submodule(name.rpartition(".")[0])
        count = {
            "weight_scale": getattr(module, "fan_in", 0), "activation_threshold": length,
            "activation_scale": length * getattr(module, "in_features", 0),
            **{f"{site}_scale": length * size for site in ("query", "key", "value")},
            **{f"{site}_threshold": length for site in ("query", "key", "value")},
            "probability_scale": length * length, "probability_threshold": length * length,
        }.get(what, 1)  # fmt: skip
        seen |= {what} if count > 1 else set()
        torch.testing.assert_close(found[name] * math.sqrt(count), grad, msg=name)
    assert len(seen) == 11


def test_packed_layers_and_layers_that_do_not_learn() -> None:
    model = binarize_model(beyond.BERT.build(), quick(scale_gradient="lsq", end=0.5))
    progression = Progression(model.train(), 10)
    for step in (0, 3, 10):
        progression.step(step)
        model(**beyond.BERT.batch())
    progression.detach()
    loss = model.eval()(**beyond.BERT.batch()).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if name.endswith(("_scale", "_threshold"))}
    packed = pack_model(model)
    packed.zero_grad()
    packed(**beyond.BERT.batch()).loss.backward()
    own = {name: p.grad for name, p in packed.named_parameters() if name in grads}
    assert len(own) == 36
    torch.testing.assert_close(own, grads)
    fixed = {f"learn_{name}": False for name in ("weight_scale", "activation_scale", "activation_threshold")}
    layer = converted("linear", "lsq", **fixed)
    freeze(layer, FROZEN)
    assert sorted(gradients(layer, inputs_of("linear"))) == ["bias", "weight", "x", "y"]


def test_one_row_and_no_row() -> None:
    """Without a batch in front, a vector's numbers count as samples."""
    row, results = torch.randn(FEATURES), []
    for units in ("sum", "lsq"):
        layer = converted("linear", units)
        freeze(layer, FROZEN)
        results.append(gradients(layer, row))
    assert torch.equal(results[0]["activation_scale"], results[1]["activation_scale"])
    assert layer(torch.randn(0, FEATURES)).shape == (0, OUT)
