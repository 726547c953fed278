"""Surrogates from outside the package: one class each, whose gradients every layer passes, trains, saves and loads."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from test_attention import SHAPES, build as build_attention, operands, plain as not_asked
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from stompp_hf import BinaryEmbedding, StoMPPConfig, binarize_model
from stompp_hf.errors import ConfigError
from stompp_hf.method.surrogates import SURROGATES, Surrogate, register_surrogate
from stompp_hf.modules import FROZEN, TRANSITION, binary_class_of
from stompp_hf.modules.attention import SITES, Call

LAYERS = ("linear", "conv1d_of_transformers", "conv", "embedding")
STATES = (TRANSITION, FROZEN)
IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])
SIZE = 6


class ApproxSign(Surrogate):
    """Bi-Real Net's polynomial for activations, a tanh's slope for weights: factors of any size."""

    def of_activation(self, u: Any, threshold: Any, scale: Any, low: Any, high: Any, width: float) -> Any:
        v = u if threshold is None else u - threshold
        return (2.0 - 2.0 * (v / scale).abs()).clamp(min=0.0)

    def of_weight(self, weight: Any, scale: Any, clip: Any) -> Any:
        return 1.0 - (weight / scale).tanh() ** 2


class Halved(Surrogate):
    """Half of the clip's gradient: reads its edges."""

    def of_activation(self, u: Any, threshold: Any, scale: Any, low: Any, high: Any, width: float) -> Any:
        return torch.full_like(u, 0.5) if low is None else 0.5 * ((u > low) & (u < high))

    def of_weight(self, weight: Any, scale: Any, clip: Any) -> Any:
        return None if clip is None else 0.5 * (weight.abs() < clip)


class PlainClipped(Surrogate):
    """`clipped_ste`, as booleans."""

    def of_activation(self, u: Any, threshold: Any, scale: Any, low: Any, high: Any, width: float) -> Any:
        return None if low is None else (u > low) & (u < high)

    def of_weight(self, weight: Any, scale: Any, clip: Any) -> Any:
        return None if clip is None else weight.abs() < clip


class PlainWindowed(Surrogate):
    """`windowed_ste`."""

    reads_clip = False

    def of_activation(self, u: Any, threshold: Any, scale: Any, low: Any, high: Any, width: float) -> Any:
        return (u - (0.0 if threshold is None else threshold)).abs() < scale.abs() * width


@pytest.fixture(autouse=True)
def registered() -> Any:
    """What this file defines, for the time of a test."""
    before = dict(SURROGATES)
    own = {"approx_sign": ApproxSign, "halved": Halved, "plain_clipped": PlainClipped, "plain_windowed": PlainWindowed}
    for name, cls in {**own, "plain_ste": Surrogate}.items():
        register_surrogate(name)(cls)
    yield
    SURROGATES.clear()
    SURROGATES.update(before)


def layer_of(kind: str, surrogate: str, state: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Tensor]:
    """A calibrated layer in a state, and an input."""
    torch.manual_seed(0)
    config = StoMPPConfig(frozen_gradient=surrogate, activation_clip=0.9, weight_clip=0.3, **options)
    plain: Any = {
        "linear": lambda: nn.Linear(SIZE, 5),
        "conv1d_of_transformers": lambda: Conv1D(5, SIZE),
        "conv": lambda: nn.Conv2d(SIZE, 4, 3, padding=1, groups=2),
        "embedding": lambda: nn.Embedding(7, SIZE, padding_idx=5),
    }[kind]()
    nn.init.normal_(plain.weight, std=0.3)
    plain = plain.to(dtype)
    x = torch.randn(2, SIZE, 5, 5, dtype=dtype) if kind == "conv" else torch.randn(2, 3, SIZE, dtype=dtype)
    if kind == "embedding":
        layer: Any = BinaryEmbedding.convert(plain, config)
    else:
        layer = binary_class_of(plain).convert(plain, config, None, "ReLU" if kind == "linear" else None)  # type: ignore[union-attr]
    layer.calibrate_weight()
    if kind != "embedding":
        layer.calibrate_activation(torch.randn(64, SIZE, dtype=dtype) + 0.1)
        with torch.no_grad():
            layer.activation_threshold += 0.1 * torch.linspace(-1, 1, SIZE)
    enter(layer, state)
    return layer, x


def enter(member: Any, state: str) -> None:
    """A state, with random masks."""
    member.enter(state, 1.0 if state == FROZEN else 0.5)
    generator = torch.Generator().manual_seed(1)
    for name, shape in member.masked_tensors().items():
        if state == TRANSITION:
            setattr(member, name, (torch.rand(shape, generator=generator) < 0.5).to(member.like.dtype))


def gradients(layer: Any, x: Tensor, inputs: tuple[Any, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the input and of every parameter, for a made-up loss."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    y = layer(x, *inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    found = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    return y.detach(), {name: grad for name, grad in found.items() if grad is not None}


def still(t: Tensor) -> Tensor:
    """0, with the gradient of t."""
    return t - t.detach()


def signs(u: Tensor) -> Tensor:
    return torch.where(u.detach() >= 0, 1.0, -1.0).to(u.dtype)


class ByHand(nn.Module):
    """METHOD's formulas, with the surrogate written as k * (u - u.detach()), on the parameters of a layer."""

    def __init__(self, layer: Any, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.surrogate = kind, layer, SURROGATES[layer.stompp_config.frozen_gradient]

    def weight(self) -> Tensor:
        layer = self.layer
        w, mask = layer.weight, 1.0 if layer.weight_mask is None else layer.weight_mask.to(layer.weight.dtype)
        shape = [-1 if dim == layer.product.channel_dim else 1 for dim in range(w.dim())]
        scale = layer._row_scales() if self.kind == "embedding" else layer.weight_scale.reshape(shape)
        k = self.surrogate.of_weight(w.detach(), scale.detach(), 0.3)
        hard = scale * signs(w) + (1.0 if k is None else k) * still(w)
        return mask * hard + (1.0 - mask) * w.clamp(-0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        layer, w = self.layer, self.weight()
        if self.kind == "embedding":
            return F.embedding(x, w, layer.padding_idx)
        spread = (-1, 1, 1) if self.kind == "conv" else (-1,)
        b, a = layer.activation_threshold.reshape(spread), layer.activation_scale
        mask = 1.0 if layer.activation_mask is None else layer.activation_mask.reshape(spread)
        real, gate = (x.relu(), (x > 0).to(x.dtype)) if self.kind == "linear" else (x, 1.0)
        k = self.surrogate.of_activation(x.detach(), b.detach(), a.detach(), -0.9, 0.9, 1.5)
        k = 1.0 if k is None else k
        hard = a * (layer.activation_offset + signs(x - b)) + k * (gate * still(x) - still(b))
        u = mask * hard + (1.0 - mask) * real.clamp(-0.9, 0.9)
        if self.kind == "conv":
            return F.conv2d(u, w, layer.bias, padding=1, groups=2)
        return F.linear(u, w if self.kind == "linear" else w.t(), layer.bias)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("surrogate", ["approx_sign", "halved", "ste", "clipped_ste", "windowed_ste"])
def test_layers_pass_what_the_surrogate_says(surrogate: str, kind: str, state: str) -> None:
    layer, x = layer_of(kind, surrogate, state, torch.float64)
    x = IDS if kind == "embedding" else x
    y, found = gradients(layer, x)
    layer.zero_grad()
    expected, by_hand = gradients(ByHand(layer, kind), x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for name, grad in found.items():
        torch.testing.assert_close(grad, by_hand[name if name == "x" else f"layer.{name}"], rtol=1e-10, atol=1e-12)
    assert found.keys() >= {"weight", "weight_scale"}
    assert kind == "embedding" or found.keys() >= {"x", "activation_scale", "activation_threshold"}


class AttentionByHand(nn.Module):
    """softmax(q' k'^T / sqrt(size)) v', as in `ByHand`."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def operand(self, site: str, u: Tensor) -> Tensor:
        of, surrogate = self.attention, SURROGATES[self.attention.stompp_config.frozen_gradient]
        a, b, mask = (getattr(of, f"{site}_{what}") for what in ("scale", "threshold", "mask"))
        a, b = a.reshape(-1, 1, 1), b.reshape(b.shape[0], 1, -1)
        mask = 1.0 if mask is None else mask.reshape(mask.shape[0], 1, -1)[..., : u.shape[-1]]
        low, high = of.edges[site]
        k = surrogate.of_activation(u.detach(), b.detach(), a.detach(), low, high, 1.5)
        k = 1.0 if k is None else k
        hard = a * (float(site == "probability") + signs(u - b)) + k * (still(u) - still(b))
        return mask * hard + (1.0 - mask) * (u if low is None else u.clamp(low, high))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (self.operand(site, u) for site, u in zip(SITES[:3], (query, key, value), strict=True))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (self.operand("probability", p) @ v).transpose(1, 2)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("surrogate", ["approx_sign", "halved", "windowed_ste"])
def test_attention_passes_what_the_surrogate_says(surrogate: str, state: str) -> None:
    attention = build_attention(SHAPES[0], frozen_gradient=surrogate)
    enter(attention, state)
    q, k, v = operands(SHAPES[0])
    leaves = [t.requires_grad_() for t in (k, v)]

    class First(nn.Module):  # of the pair that attention gives
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, key, value, Call(not_asked))[0]  # type: ignore[no-any-return]

    y, found = gradients(First(), q, (k, v))
    found |= {f"input {i}": t.grad for i, t in enumerate(leaves)}
    attention.zero_grad()
    for leaf in leaves:
        leaf.grad = None
    expected, by_hand = gradients(AttentionByHand(attention), q, (k, v))
    by_hand |= {f"input {i}": t.grad for i, t in enumerate(leaves)}
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert found.keys() == by_hand.keys() and len(found) == 3 + 8
    for name, grad in found.items():
        torch.testing.assert_close(grad, by_hand[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["ste", "clipped_ste", "windowed_ste"])
def test_one_that_compiled_c_does_not_know_passes_the_same(name: str, kind: str, state: str) -> None:
    layer, x = layer_of(kind, name, state, torch.float32)
    other, _ = layer_of(kind, f"plain_{name.removesuffix('_ste')}", state, torch.float32)
    x = IDS if kind == "embedding" else x
    (y, found), (expected, own) = gradients(layer, x), gradients(other, x)
    assert torch.equal(y, expected) and found.keys() == own.keys()
    for what, grad in found.items():
        assert torch.equal(grad, own[what]), what


# ---- a whole run, and names ----


def test_a_model_trains_saves_and_loads(tmp_path: Path) -> None:
    case = models.CASES["bert"]
    model = binarize_model(case.build(), models.quick(frozen_gradient="approx_sign", attention="binarize"))
    losses = models.train(model, case, 0, 8, 8)
    assert all(torch.tensor(losses).isfinite()) and all(p.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = case.batch(0)
    assert torch.equal(models.logits(again.eval(), batch), models.logits(model.eval(), batch))
    del SURROGATES["approx_sign"]
    with pytest.raises(ConfigError, match=r"'approx_sign' is not one of 'zero', 'ste'.*register_surrogate"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_names() -> None:
    with pytest.raises(ConfigError, match="frozen_gradient='magic' is not one of 'zero', 'ste', 'clipped_ste'"):
        StoMPPConfig(frozen_gradient="magic")
    with pytest.raises(ConfigError, match="'zero' is registered already: Zero"):
        register_surrogate("zero")(ApproxSign)
    before = SURROGATES["approx_sign"]
    register_surrogate("approx_sign")(ApproxSign)  # a notebook's cell that runs again
    assert SURROGATES["approx_sign"] is not before and not StoMPPConfig(frozen_gradient="approx_sign").is_ste_free
