"""Binary layers in their three states against the slow reference, and what must hold of a frozen layer exactly."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stompp_hf import BinaryConv1D, BinaryLayer, BinaryLinear, StoMPPConfig
from stompp_hf.errors import NotCalibratedError
from stompp_hf.modules import FROZEN, PENDING, TRANSITION

IN, OUT, ROWS = 5, 4, 6
CLASSES = (BinaryLinear, BinaryConv1D)
SURROGATES = ("zero", "ste", "clipped_ste", "windowed_ste")
FIXED = {"learn_weight_scale": False, "learn_activation_scale": False, "learn_activation_threshold": False}

# Every regime: class, surrogate, what is binary, offset in units of a, bias, learnable values, tight clips. A BWN has
# no offset, and a Conv1D always a bias.
REGIMES = [
    pytest.param(*regime, id="-".join(map(str, (regime[0].__name__, *regime[1:]))))
    for regime in itertools.product(
        CLASSES, SURROGATES, ("weights", "weights_and_activations"), (0, 1), (False, True), (False, True), (False, True)
    )
    if not (regime[2] == "weights" and regime[3]) and not (regime[0] is BinaryConv1D and not regime[4])
]
every_regime = pytest.mark.parametrize("cls, surrogate, binarize, offset, bias, learn, tight", REGIMES)


def plain_layer(cls: type[BinaryLayer], bias: bool = True, features: int = IN, channels: int = OUT) -> nn.Module:
    layer = nn.Linear(features, channels, bias=bias) if cls is BinaryLinear else Conv1D(channels, features)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def calibrated(layer: nn.Module, cls: type[BinaryLayer], config: StoMPPConfig, rows: Tensor) -> BinaryLayer:
    binary = cls.convert(layer, config)
    binary.calibrate_weight()
    if binary.needs_activation_values:
        binary.calibrate_activation(rows)
    return binary


def freeze(layer: BinaryLayer, state: str, seed: int | None = None) -> None:
    """Enter a state; a transition with random masks, or, without a seed, with everything frozen."""
    layer.enter(state, 1.0 if state == FROZEN else 0.5)
    if state == TRANSITION:
        generator = torch.Generator().manual_seed(seed or 0)
        for name, shape in layer.masked_tensors().items():
            share = 0.5 if seed is not None else 0.0
            setattr(layer, name, (torch.rand(shape, generator=generator) >= share).to(layer.weight.dtype))


def build(
    cls: type[BinaryLayer], surrogate: str, binarize: str, offset: int, bias: bool, learn: bool, tight: bool
) -> tuple[BinaryLayer, Tensor]:
    """A calibrated float64 layer, and an input with zeros of both signs and values at thresholds and clip edges."""
    torch.manual_seed(0)
    clips = {"weight_clip": 0.4, "activation_clip": 0.75} if tight else {}
    config = StoMPPConfig(binarize=binarize, frozen_gradient=surrogate, **clips, **({} if learn else FIXED))
    plain = plain_layer(cls, bias).double()
    with torch.no_grad():
        plain.weight[0, :4] = torch.tensor([0.0, -0.0, 0.4, -0.4], dtype=torch.float64)
    x = torch.randn(2, ROWS // 2, IN, dtype=torch.float64)
    layer = calibrated(plain, cls, config, (x.abs() if offset else x).reshape(-1, IN))
    if binarize == "weights_and_activations":
        assert layer.activation_offset == offset
        with torch.no_grad():
            layer.activation_threshold += torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0])
        edges = [0.0, -0.0, layer.activation_low.item(), layer.activation_high.item()]
        x[0, :, 0] = layer.activation_threshold[0].detach()
        x[1, 0, :4], x[1, 1, 1] = torch.tensor(edges, dtype=torch.float64), 9.0
    return layer, x


@dataclass
class Expected:
    """Output and gradients of the reference; the weight and its gradient as (out, in)."""

    y: Any
    x: Any
    weight: Any
    bias: Any
    weight_scale: Any
    activation_scale: Any = None
    activation_threshold: Any = None


def expect(layer: BinaryLayer, x: Tensor, grad: Tensor) -> Expected:
    """The reference's answer, given the values that the layer was calibrated to."""

    def numbers(tensor: Tensor) -> Any:
        return tensor.detach().tolist()

    transposed = isinstance(layer, BinaryConv1D)
    u, g = numbers(x.reshape(-1, IN)), numbers(grad.reshape(-1, OUT))
    weight = layer.weight.t() if transposed else layer.weight
    ones = torch.ones_like(weight)
    mask = ones if layer.stage_state == FROZEN else (layer.weight_mask.t() if transposed else layer.weight_mask)
    kind, c = layer.stompp_config.frozen_gradient, layer.weight_clip.item()
    mixed_w = reference.mix_weight(numbers(weight), numbers(layer.weight_scale), numbers(mask), c)
    mixed_u = u
    if layer.activation_scale is not None:
        a, b = layer.activation_scale.item(), numbers(layer.activation_threshold)
        features = [1.0] * IN if layer.stage_state == FROZEN else numbers(layer.activation_mask)
        edges = (layer.activation_low.item(), layer.activation_high.item(), layer.activation_offset)
        mixed_u = reference.mix_activation(u, a, b, features, *edges)
    y = reference.linear(mixed_u, mixed_w, None if layer.bias is None else numbers(layer.bias))
    grad_u, grad_w, grad_bias = reference.linear_gradients(g, mixed_u, mixed_w)
    grad_w, grad_s = reference.mix_weight_gradients(grad_w, numbers(weight), numbers(mask), c, kind)
    expected = Expected(y, grad_u, grad_w, grad_bias, grad_s)
    if layer.activation_scale is not None:
        expected.x, expected.activation_scale, expected.activation_threshold = reference.mix_activation_gradients(
            grad_u, u, b, features, *edges, kind, abs(a) * layer.stompp_config.surrogate_width
        )
    return expected


def assert_close(actual: Tensor | None, expected: Any) -> None:
    """To 1e-12 of the largest entry; an undefined gradient is a zero one."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    actual = torch.zeros_like(wanted) if actual is None else actual.detach().reshape(wanted.shape)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12 * max(1.0, wanted.abs().max().item()))


def check_against_reference(layer: BinaryLayer, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    expected = expect(layer, x, grad)
    assert_close(y, expected.y)
    assert_close(x.grad, expected.x)
    weight_grad = layer.weight.grad
    assert_close(weight_grad.t() if weight_grad is not None and isinstance(layer, BinaryConv1D) else weight_grad,
                 expected.weight)  # fmt: skip
    for name in ("bias", "weight_scale", "activation_scale", "activation_threshold"):
        tensor = getattr(layer, name)
        if tensor is not None and tensor.requires_grad:
            assert_close(tensor.grad, getattr(expected, name))
        elif tensor is not None:
            assert tensor.grad is None


@every_regime
def test_frozen_equals_reference(
    cls: type[BinaryLayer], surrogate: str, binarize: str, offset: int, bias: bool, learn: bool, tight: bool
) -> None:
    layer, x = build(cls, surrogate, binarize, offset, bias, learn, tight)
    freeze(layer, FROZEN)
    check_against_reference(layer, x)


@every_regime
def test_transition_equals_reference(
    cls: type[BinaryLayer], surrogate: str, binarize: str, offset: int, bias: bool, learn: bool, tight: bool
) -> None:
    layer, x = build(cls, surrogate, binarize, offset, bias, learn, tight)
    freeze(layer, TRANSITION, seed=2)
    assert 0 < layer.weight_mask.float().mean() < 1
    check_against_reference(layer, x)


@every_regime
def test_frozen_is_the_end_of_the_transition(
    cls: type[BinaryLayer], surrogate: str, binarize: str, offset: int, bias: bool, learn: bool, tight: bool
) -> None:
    layer, x = build(cls, surrogate, binarize, offset, bias, learn, tight)
    freeze(layer, TRANSITION)
    last = layer(x)
    freeze(layer, FROZEN)
    assert layer.weight_mask is None and layer.activation_mask is None
    torch.testing.assert_close(layer(x), last, rtol=1e-13, atol=1e-13)


# ---- what passes through a frozen layer ----


@pytest.mark.parametrize("cls", CLASSES)
def test_ste_free_bnn_blocks_gradients(cls: type[BinaryLayer]) -> None:
    layer, x = build(cls, "zero", "weights_and_activations", 0, True, True, False)
    freeze(layer, FROZEN)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is None and layer.activation_threshold.grad is None
    assert_close(layer.bias.grad, [ROWS] * OUT)
    assert layer.weight_scale.grad.abs().min() > 0 and layer.activation_scale.grad.abs() > 0


def test_ste_free_layer_saves_nothing_without_learnable_values() -> None:
    """Frozen layers are cheap: with nothing to learn, no tensor of the batch's size is kept for the backward pass."""
    layer, x = build(BinaryLinear, "zero", "weights_and_activations", 0, True, False, False)
    freeze(layer, FROZEN)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert all(tensor.numel() <= IN for tensor in kept)


@pytest.mark.parametrize("cls", CLASSES)
def test_ste_free_bwn_passes_gradient_to_its_input(cls: type[BinaryLayer]) -> None:
    layer, x = build(cls, "zero", "weights", 0, True, True, False)
    freeze(layer, FROZEN)
    layer(x.requires_grad_()).sum().backward()
    expected = layer.binary_weight().sum(layer.product.channel_dim).expand_as(x)
    assert_close(x.grad, expected)
    assert layer.weight.grad is None


# ---- exactly binary ----


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("scale", ["none", "tensor", "channel"])
def test_binary_weight_has_two_values_a_channel(cls: type[BinaryLayer], scale: str) -> None:
    torch.manual_seed(0)
    plain = plain_layer(cls, features=33)
    with torch.no_grad():
        plain.weight[:3, :3] = torch.tensor([0.0, -0.0, -1e-45])
    config = StoMPPConfig(weight_scale=scale, learn_weight_scale=scale != "none")
    layer = calibrated(plain, cls, config, torch.randn(8, 33))
    binary, latent = layer.binary_weight(), layer.weight.detach()
    if cls is BinaryConv1D:
        binary, latent = binary.t(), latent.t()
    assert layer.weight_scale.shape == ((OUT,) if scale == "channel" else (1,))
    for row, real, s in zip(binary, latent, layer.weight_scale.expand(OUT).tolist(), strict=True):
        assert set(row.tolist()) == {s, -s}
        assert [v > 0 for v in row.tolist()] == [reference.sign(v) > 0 for v in real.tolist()]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("offset", [0, 1])
def test_float32_output_is_one_affine_map_of_an_integer_product(cls: type[BinaryLayer], offset: int) -> None:
    torch.manual_seed(0)
    features = 515
    x = torch.randn(7, features)
    rows = x.abs() if offset else x
    layer = calibrated(plain_layer(cls, features=features), cls, StoMPPConfig(), rows)
    x[0], x[1] = 0.0, -0.0
    x[2] = layer.activation_threshold.detach()  # at the threshold: +1
    freeze(layer, FROZEN)
    with torch.no_grad():
        weight = layer.weight.t() if cls is BinaryConv1D else layer.weight
        signs_w = (weight >= 0).to(torch.int64) * 2 - 1
        signs_x = (x >= layer.activation_threshold).to(torch.int64) * 2 - 1
        scale = layer.weight_scale * layer.activation_scale
        shift = layer.bias + scale * signs_w.sum(1).float() if offset else layer.bias
        expected = (signs_x @ signs_w.t()).float() * scale + shift
        assert layer.activation_offset == offset
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_output_depends_on_signs_only(cls: type[BinaryLayer]) -> None:
    """A frozen activation has two values: sizes, and the sign of a zero, make no difference, not by one bit."""
    layer, x = build(cls, "ste", "weights_and_activations", 0, True, True, False)
    freeze(layer, FROZEN)
    b = layer.activation_threshold.detach()
    assert torch.equal(layer(b + (x - b) * 1e3), layer(x))
    with torch.no_grad():
        layer.activation_threshold.zero_()
    zero = torch.zeros(1, IN, dtype=torch.float64)
    assert torch.equal(layer(zero), layer(zero + 1))
    assert torch.equal(layer(-zero), layer(zero + 1))
    before = layer(x)
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight == 0, -layer.weight, layer.weight))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_autocast_keeps_signs_and_sums_exact(cls: type[BinaryLayer], dtype: torch.dtype) -> None:
    """Sums near 1000 that a bias brings back to a few units: bfloat16 sums would be off by up to 4."""
    torch.manual_seed(0)
    features = 1001
    layer = cls.convert(plain_layer(cls, features=features), StoMPPConfig.paper())
    with torch.no_grad():
        layer.weight.abs_().view(-1)[::97] *= -1
        layer.bias.fill_(-980.0)
    freeze(layer, FROZEN)
    x = torch.randn(7, features).abs().to(dtype)
    x[0, :5], x[1, :3] = -0.0, -1.0
    full = layer(x.float())
    assert full.min() > -120 and full.max() < 120  # integers that either half precision can tell apart
    with torch.autocast("cpu", dtype):
        half = layer(x)
    assert half.dtype == dtype and full.dtype == torch.float32
    assert torch.equal(half.float(), full)


# ---- pending layers, starting values, and layers without them ----


@pytest.mark.parametrize(("cls", "bias"), [(BinaryLinear, False), (BinaryLinear, True), (BinaryConv1D, True)])
@pytest.mark.parametrize(
    "options",
    [{}, {"binarize": "weights"}, {"binarize": "weights", "activation_clip": 0.5}, {"binarize": "nothing"}],
    ids=str,
)
def test_pending_layer_is_the_plain_layer_bitwise(cls: type[BinaryLayer], bias: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, x = plain_layer(cls, bias, 65, 33), torch.randn(2, 9, 65)
    x[0, 0, :2] = torch.tensor([0.0, -0.0])
    runs = []
    for step in range(2):
        if step == 1:
            layer = calibrated(plain, cls, StoMPPConfig(**options), x.reshape(-1, 65))
            assert layer is plain and layer.stage_state == PENDING
        plain.zero_grad()
        inputs = x.clone().requires_grad_()
        y = plain(inputs)
        y.square().sum().backward()
        runs.append([y.detach(), inputs.grad, plain.weight.grad.clone()])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("cls", CLASSES)
def test_pending_layer_of_the_paper_is_clipped(cls: type[BinaryLayer]) -> None:
    layer, x = build(cls, "zero", "weights_and_activations", 0, True, True, True)
    for name, shape in layer.masked_tensors().items():
        setattr(layer, name, torch.zeros(shape, dtype=torch.float64))
    check_against_reference(layer, x)


@pytest.mark.parametrize("cls", CLASSES)
def test_starting_values(cls: type[BinaryLayer]) -> None:
    layer, x = build(cls, "ste", "weights", 0, True, True, False)
    weight = (layer.weight.t() if cls is BinaryConv1D else layer.weight).tolist()
    assert_close(layer.weight_scale, [math.fsum(map(abs, row)) / IN for row in weight])
    assert layer.weight_clip.item() > max(abs(v) for row in weight for v in row)

    rows = x.reshape(-1, IN)
    config = StoMPPConfig(activation_threshold="mean")
    layer = calibrated(plain_layer(cls).double(), cls, config, rows)
    mean = [math.fsum(column) / ROWS for column in rows.t().tolist()]
    assert_close(layer.activation_threshold, mean)
    sizes = [abs(v - m) for row in rows.tolist() for v, m in zip(row, mean, strict=True)]
    assert_close(layer.activation_scale, [math.fsum(sizes) / len(sizes)])
    assert layer.activation_low < rows.min() and layer.activation_high > rows.max()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("state", [FROZEN, TRANSITION])
def test_uncalibrated_layer_names_the_remedy(cls: type[BinaryLayer], state: str) -> None:
    layer = cls.convert(plain_layer(cls), StoMPPConfig())
    freeze(layer, state)
    with pytest.raises(NotCalibratedError, match="calibrate"):
        layer(torch.zeros(1, IN))
    for config in (StoMPPConfig.paper(), StoMPPConfig(binarize="weights")):  # these need no data
        layer = cls.convert(plain_layer(cls), config)
        freeze(layer, state)
        assert torch.isfinite(layer(torch.zeros(1, IN))).all()
