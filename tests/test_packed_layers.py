"""Packed layers one by one: any geometry, tiles, gradients and embeddings, against the frozen layer, bit for bit."""

import copy
import platform
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from stompp_hf import StoMPPConfig
from stompp_hf.checkpoints.packing import pack_members
from stompp_hf.method import int8_product, packed_product
from stompp_hf.modules import BinaryEmbedding, binary_class_of

PLAIN = {"linear": lambda: nn.Linear(11, 7), "transposed": lambda: Conv1D(7, 11), "conv": lambda: nn.Conv2d(4, 6, 3)}
INPUTS = {"linear": (5, 11), "transposed": (5, 11), "conv": (2, 4, 6, 6)}


def frozen_layer(plain: nn.Module, x: torch.Tensor, one_sided: bool = False, **options: Any) -> Any:
    """A layer of its own, calibrated on x and frozen."""
    options["activation_levels"] = "auto" if one_sided else "symmetric"
    layer = binary_class_of(plain).convert(plain, StoMPPConfig(**options), "ReLU" if one_sided else None)
    layer.calibrate_weight()
    if layer.stompp_config.binary_activations:
        layer.calibrate_activation(layer.product.rows(x))
        assert layer.activation_offset == float(one_sided)
    layer.enter("frozen", 1.0)
    return layer


def packed(layer: Any) -> Any:
    """A packed copy."""
    twin = copy.deepcopy(layer)
    pack_members({"layer": twin})
    return twin


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    """A convolution of any geometry and an input that it takes."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inner, outer = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from([0, 1, 2, *(["same"] if mode == "zeros" else [])]))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 9)))
    plain = getattr(nn, f"Conv{dims}d")(
        inner, outer, kernel, stride, padding, dilation, groups, draw(st.booleans()), padding_mode=mode
    )
    return plain, torch.randn(2, inner, *[5] * dims)


@pytest.mark.usefixtures("plain_torch")
@given(convolutions(), st.booleans(), st.sampled_from(["zero", "one"]), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_convolutions_of_any_geometry(
    case: tuple[nn.Module, torch.Tensor], one_sided: bool, padding: str, real_input: bool, small_tiles: bool
) -> None:
    plain, x = case
    options = {"conv_padding": padding, "binarize": "weights" if real_input else "weights_and_activations"}
    layer = frozen_layer(plain, x.abs() if one_sided else x, one_sided and not real_input, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_product, "TILE", 20 if small_tiles else 2**20)
        assert torch.equal(packed(layer)(x), layer(x))


@pytest.mark.usefixtures("plain_torch")
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 300), st.booleans())
@settings(max_examples=100, deadline=None)
def test_linear_layers_of_any_size(inner: int, outer: int, rows: int, tile: int, one_sided: bool) -> None:
    torch.manual_seed(inner)
    x = torch.randn(rows, inner)
    for plain in (nn.Linear(inner, outer), Conv1D(outer, inner)):
        layer = frozen_layer(plain, x.abs() if one_sided else x, one_sided)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed_product, "TILE", tile)
            assert torch.equal(packed(layer)(x), layer(x))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("regime", ["zero", "ste", "clipped_ste", "windowed_ste"])
@pytest.mark.parametrize("activations", ["real", "symmetric", "one-sided", "absorbed"])
def test_gradients_are_those_of_a_frozen_layer(kind: str, regime: str, activations: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(INPUTS[kind])
    binarize = "weights" if activations == "real" else "weights_and_activations"
    one_sided = activations == "one-sided"
    layer = frozen_layer(
        PLAIN[kind](), x.abs() if one_sided else x, one_sided, binarize=binarize, frozen_gradient=regime
    )
    if activations == "absorbed":
        layer.absorbed = "ReLU"
    layer.weight.requires_grad_(False)
    found = []
    for each in (layer, packed(layer)):
        inner = x.clone().requires_grad_()
        each(inner).sin().sum().backward()
        names = ("weight_scale", "activation_scale", "activation_threshold", "bias")
        own = [getattr(each, name) for name in names]
        found.append([inner.grad, *(None if tensor is None else tensor.grad for tensor in own)])
    for left, right in zip(*found, strict=True):
        assert (left is None and right is None) or torch.allclose(left, right, rtol=1e-6, atol=1e-6)
    assert (found[1][0] is None) == (regime == "zero" and activations != "real")


class Largest(TorchDispatchMode):
    """Notes the largest float tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("plain", [nn.Linear(70, 37), nn.Linear(8, 5), nn.Linear(3, 64), Conv1D(40, 333)])
@pytest.mark.parametrize("tile", [1, 1000, 2**22])
def test_plain_torch_adds_int8(plain: nn.Module, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(int8_product, "TILE", tile)
    features = plain.weight.shape[0] if isinstance(plain, Conv1D) else plain.weight.shape[1]
    for shape in ((features,), (1, features), (2, 3, features), (0, features)):
        x = torch.randn(shape)
        layer = packed(frozen_layer(copy.deepcopy(plain), torch.randn(4, features)))
        signs = torch.where(x - layer.activation_threshold >= 0, 1.0, -1.0)
        w = layer._bits().signs(torch.float64)
        z = signs.double() @ (w if isinstance(plain, Conv1D) else w.t())
        bits = layer._bits()
        found = packed_product.packed_product(x, layer.activation_threshold, True, bits, layer.product, 0.0)
        assert found.dtype == torch.float32 and torch.equal(found.double(), z)
        alone = int8_product.int8_product(signs, bits) if x.numel() else None
        assert alone is None or torch.equal(alone, found)
        assert alone is not None or x.numel() == 0 or platform.machine() not in int8_product.MACHINES


@pytest.mark.usefixtures("plain_torch")
def test_a_weight_is_unpacked_in_tiles() -> None:
    x = torch.randn(1, 1024)
    layer = packed(frozen_layer(nn.Linear(1024, 4096), x))
    with Largest() as largest, torch.no_grad():
        layer(x)
    assert largest.entries == packed_product.TILE < layer.weight.numel() == 2**22
    kept = [tensor.numel() for tensor in (*layer.parameters(), *layer.buffers()) if tensor.is_floating_point()]
    assert sum(kept) < 4 * 4096
    assert not any(isinstance(value, torch.Tensor) for value in vars(layer).values())


@pytest.mark.parametrize("scale", ["channel", "tensor", "none"])
@pytest.mark.parametrize("padding", [None, "zero", "learnt"])
def test_embeddings(scale: str, padding: str | None) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(10, 13, padding_idx=None if padding is None else 3)
    if padding == "learnt":
        plain.weight.data[3] = torch.randn(13)
    options = {"weight_scale": scale, "learn_weight_scale": scale != "none"}
    layer = BinaryEmbedding.convert(plain, StoMPPConfig(**options))
    layer.calibrate_weight()
    layer.enter("frozen", 1.0)
    ids = torch.tensor([[0, 3, 9], [3, 3, 1]])
    twin = packed(layer)
    assert torch.equal(twin(ids), layer(ids)) and torch.equal(twin.weight, layer.binary_weight())
    assert bool((twin(ids)[0, 1] == 0).all()) == (padding == "zero")
    if scale != "none":
        for each in (layer, twin):
            each(ids).sin().sum().backward()
        assert torch.equal(twin.weight_scale.grad, layer.weight_scale.grad)
    twin.unpack()
    assert type(twin) is BinaryEmbedding and torch.equal(twin(ids), layer(ids))


def test_latents_keep_their_signs_whatever_became_of_the_scale() -> None:
    x = torch.randn(4, 6)
    layer = frozen_layer(nn.Linear(6, 3), x)
    layer.weight_scale.data = torch.tensor([0.5, -0.25, 0.0])
    before, signs = layer(x), layer.weight.detach().sign()
    twin = packed(layer)
    assert torch.equal(twin(x), before)
    twin.unpack()
    assert torch.equal(twin(x), before) and torch.equal(twin.weight.detach().sign(), signs)
    assert torch.equal(twin.weight.detach()[:2].abs(), torch.tensor([0.5, 0.25])[:, None].expand(2, 6))
