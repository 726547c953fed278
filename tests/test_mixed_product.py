"""A layer in transition makes its mixed operands again in the backward pass: with the gradients of kept ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stompp_hf import BinaryConv1D, BinaryConv2d, BinaryLayer, BinaryLinear, StoMPPConfig
from stompp_hf.method import mixed_product
from stompp_hf.modules import TRANSITION

LAYERS: dict[str, tuple[type, Any, tuple[int, ...]]] = {
    "linear": (BinaryLinear, lambda: nn.Linear(24, 16), (2, 5, 24)),
    "gpt2": (BinaryConv1D, lambda: Conv1D(16, 24), (2, 5, 24)),
    "conv": (BinaryConv2d, lambda: nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=2), (2, 8, 7, 7)),
    "circular": (BinaryConv2d, lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), (2, 8, 7, 7)),
    "one sample": (BinaryConv2d, lambda: nn.Conv2d(8, 16, 3, padding=1), (8, 7, 7)),
}


def in_transition(name: str, **options: Any) -> tuple[BinaryLayer, Tensor]:
    torch.manual_seed(0)
    cls, plain, shape = LAYERS[name]
    absorbed = options.pop("absorbed", None)
    layer, x = cls.convert(plain(), StoMPPConfig(**options), absorbed=absorbed), torch.randn(shape)  # type: ignore[attr-defined]
    layer.calibrate_weight()
    if layer.stompp_config.binary_activations:
        layer.calibrate_activation(layer.product.rows(x))
    layer.enter(TRANSITION, 0.5)
    for attribute, size in layer.masked_tensors().items():
        setattr(layer, attribute, (torch.rand(size) < 0.5).float())
    return layer, x


def kept_and_made(layer: BinaryLayer, x: Tensor, autocast: bool) -> tuple[list[Tensor | None], int]:
    """Output and gradients, and how many bytes wait for the backward pass beside parameters and masks."""
    own = {p.data_ptr() for p in (*layer.parameters(), layer.weight_mask_bits, layer.activation_mask) if p is not None}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    layer.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
        y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())], sum(kept.values())


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "clipped": {"frozen_gradient": "clipped_ste", "weight_clip": 0.3, "activation_clip": 1.0},
    "free": {"frozen_gradient": "zero", "learn_weight_scale": False},
    "groups": {"weight_scale": "group", "group_size": 8},
    "weights": {"binarize": "weights"},
    "ones": {"conv_padding": "one"},
    "absorbed": {"absorbed": "Hardswish"},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_operands_that_are_kept(
    name: str, options: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = in_transition(name, **OPTIONS[options])
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    for u in layouts:
        made, bytes_made = kept_and_made(layer, u, autocast)
        with monkeypatch.context() as patch:
            patch.setattr(mixed_product.kernels, "apply", lambda function, *arguments: function.apply(*arguments))
            patch.setattr(mixed_product.torch.compiler, "is_compiling", lambda: True)
            kept, bytes_kept = kept_and_made(layer, u, autocast)
        for found, expected in zip(made, kept, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or (torch.equal(found, expected) and found.stride() == expected.stride())
        narrow_copy = autocast and options == "weights"  # autocast keeps that of a real input, for each reader its own
        assert bytes_made < bytes_kept or narrow_copy


def test_layers_that_read_one_tensor_keep_it_once() -> None:
    layers = [in_transition("linear")[0] for _ in range(3)]
    x = torch.randn(64, 24, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for layer in layers:
            layer(x)
    assert kept == {x.data_ptr(): x.nbytes}


def test_there_is_no_second_derivative() -> None:
    layer, x = in_transition("linear")
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
