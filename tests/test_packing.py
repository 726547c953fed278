"""Packed models compute what the frozen ones do, bit for bit, and come back; the rest is refused, whole."""

from typing import Any

import models
import pytest
import torch
import vision
from models import logits, quick, train

from stompp_hf import (
    StoMPPConfig,
    binarize_model,
    pack_model,
    unpack_model,
)
from stompp_hf.modules.packed import PackedLayer
from stompp_hf.plan import binary_layers

STEPS = 6
BERT = models.CASES["bert"]
CASES = {**models.CASES, **vision.CASES}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bwn": ("bert", {"binarize": "weights"}),
    "bwn-gpt2": ("gpt2", {"binarize": "weights"}),
    "bwn-conv": ("resnet", {"binarize": "weights"}),
    "bwn-depthwise": ("mobilenet_v2", {"binarize": "weights"}),
    "no scales": ("bert", vars(StoMPPConfig.paper(end=0.8, refresh_rate=2))),
    "one scale": ("bert", {"weight_scale": "tensor"}),
    "padding with one": ("resnet", {"conv_padding": "one"}),
    "kept relu": ("resnet", {"relu": "keep"}),
    "rprelu": ("resnet", {"relu": "rprelu"}),
    "dropped relu": ("mobilenet_v2", {"relu": "drop"}),
    "zero gradient": ("bert", {"frozen_gradient": "zero"}),
}


def frozen(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model trained to the end, and a batch."""
    case = CASES[name]
    model = binarize_model(case.build(), quick(**options))
    train(model, case, 0, STEPS, STEPS)
    return model, case.batch(77)


def assert_packed_alike(model: Any, batch: dict[str, Any]) -> None:
    """Packing changes no bit of the logits, leaves no latent, and unpacking keeps the logits too."""
    before, latents = logits(model, batch), {name: layer.weight.shape for name, layer in binary_layers(model).items()}
    parameters = dict(model.named_parameters())
    assert pack_model(model) is model
    assert torch.equal(logits(model, batch), before)
    layers = binary_layers(model)
    assert all(isinstance(layer, PackedLayer) for layer in layers.values())
    gone = {name for name in parameters if name not in dict(model.named_parameters())}
    assert gone == {f"{name}.weight" for name in layers}
    assert all(dict(model.named_parameters())[name] is parameters[name] for name in parameters.keys() - gone)
    for name, layer in layers.items():
        assert layer.weight.shape == latents[name] and layer.weight.dtype == torch.float32
        assert layer.weight_bits.dtype == torch.uint8
        assert layer.weight_bits.numel() <= layer.weight.numel() // 8 + layer.weight_bits.shape[0]
    assert unpack_model(model) is model
    assert torch.equal(logits(model, batch), before)
    for name, layer in binary_layers(model).items():
        assert type(layer).__name__.startswith("Binary") and layer.weight.shape == latents[name]
        assert layer.weight.requires_grad and layer.stage_state == "frozen"


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str) -> None:
    assert_packed_alike(*frozen(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str) -> None:
    case, options = VARIANTS[name]
    assert_packed_alike(*frozen(case, **options))
