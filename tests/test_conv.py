"""Binary convolutions, one layer at a time: against the slow reference, and what holds for any geometry.

The invariants are numbered as in the project's design: 1 identity at the start, 2 exactly binary at the end, 4
gradients in closed form. For those of a whole net (3, 5, 6, 7) see test_conv_nets.py.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference
import torch
from hypothesis import assume, given, settings, strategies as st
from reference import Array, Geometry, clip, indices, sign, surrogate, within
from torch import Tensor, nn

from stompp_hf import BinaryConv2d, StoMPPConfig
from stompp_hf.modules import FROZEN, PENDING, TRANSITION, BinaryLayer, binary_class_of

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ACTIVATIONS = {None: nn.Identity(), "ReLU": nn.ReLU(), "ReLU6": nn.ReLU6(), "Hardswish": nn.Hardswish()}
SURROGATES = ("zero", "ste", "clipped_ste", "windowed_ste")
MODES = ("zeros", "reflect", "replicate", "circular")
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Conv:
    """A convolution and the size of its input; without a batch it gets a single sample."""

    kernel: tuple[int, ...]
    size: tuple[int, ...]
    padding: Any = 0
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    groups: int = 1
    group: tuple[int, int] = (2, 2)  # input and output channels of a group
    mode: str = "zeros"
    batch: int | None = 2

    @property
    def channels(self) -> tuple[int, int]:
        return self.group[0] * self.groups, self.group[1] * self.groups

    def plain(self, bias: bool = True) -> nn.Module:
        options = (self.stride, self.padding, self.dilation, self.groups, bias, self.mode)
        return CLASSES[len(self.kernel)](*self.channels, self.kernel, *options)

    def geometry(self) -> Geometry:
        """Padding as torch's documentation has it: "same" puts the odd one behind."""
        stride, dilation, pad = (
            (v,) * len(self.size) if isinstance(v, int) else v for v in (self.stride, self.dilation, self.padding)
        )
        pads = [(p, p) for p in pad] if not isinstance(pad, str) else [(0, 0)] * len(self.size)
        if pad == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, self.kernel, strict=True)]
            pads = [(total // 2, total - total // 2) for total in totals]
        before, after = zip(*pads, strict=True)
        weight = (self.channels[1], self.group[0], *self.kernel)
        return Geometry(weight, self.size, stride, dilation, before, after, self.groups, self.mode)

    def x(self) -> Tensor:
        batch = () if self.batch is None else (self.batch,)
        return torch.randn(*batch, self.channels[0], *self.size, dtype=torch.float64)


CONVS = {
    "1d": Conv((3,), (7,), 1),
    "1d-even-same": Conv((4,), (6,), "same"),
    "1d-reflect-same": Conv((4,), (6,), "same", mode="reflect", dilation=2, groups=2),
    "1d-alone": Conv((3,), (8,), 2, 3, batch=None),
    "2d": Conv((3, 3), (5, 4), 1),
    "2d-stride-groups": Conv((3, 3), (6, 6), 1, 2, groups=2),
    "2d-depthwise-dilation": Conv((3, 3), (5, 5), 2, 1, 2, groups=4, group=(1, 2)),
    "2d-reflect": Conv((3, 2), (5, 5), (1, 2), (2, 1), mode="reflect"),
    "2d-replicate-alone": Conv((3, 3), (4, 5), 1, mode="replicate", batch=None),
    "2d-circular": Conv((3, 3), (4, 4), 2, 2, mode="circular"),
    "2d-even-same": Conv((2, 3), (4, 4), "same"),
    "2d-pointwise": Conv((1, 1), (3, 3), "valid"),
    "3d-stride-groups": Conv((2, 2, 2), (3, 3, 4), 1, 2, groups=2, group=(1, 2)),
    "3d-replicate-same": Conv((2, 2, 3), (3, 3, 3), "same", mode="replicate", group=(1, 2)),
}


@dataclass(frozen=True)
class Regime:
    """What is binary, what frozen entries pass back, the levels' offset in units of a, and what was absorbed."""

    surrogate: str
    state: str
    binarize: str = "weights_and_activations"
    offset: int = 0
    absorbed: str | None = None
    pad: str = "zero"
    mask: str = "feature"

    def config(self, **options: Any) -> StoMPPConfig:
        levels = "auto" if self.offset else "symmetric"
        chosen = {"frozen_gradient": self.surrogate, "binarize": self.binarize, "conv_padding": self.pad}
        return StoMPPConfig(**{**chosen, "activation_levels": levels, "activation_mask": self.mask, **options})


FRONTS = ((0, None), (1, None), (1, "ReLU"), (0, "ReLU6"), (0, "Hardswish"))
REGIMES = [
    *(Regime(kind, state, "weights") for kind in SURROGATES for state in (FROZEN, TRANSITION)),
    *(
        Regime(kind, state, "weights_and_activations", *front, pad)
        for kind, state, front, pad in itertools.product(SURROGATES, (FROZEN, TRANSITION), FRONTS, ("zero", "one"))
    ),
    *(Regime(kind, TRANSITION, mask="element", offset=offset) for kind in SURROGATES for offset in (0, 1)),
]


def build(conv: Conv, regime: Regime, plain: nn.Module, x: Tensor, **options: Any) -> BinaryLayer:
    """A calibrated float64 layer in the regime's state, with random masks in a transition."""
    sample = tuple(x.shape[1:]) if regime.mask == "element" else None
    layer = binary_class_of(plain).convert(plain, regime.config(**options), None, regime.absorbed, sample)
    layer.calibrate_weight()
    if layer.stompp_config.binary_activations:
        seen = ACTIVATIONS[regime.absorbed](x)
        if not seen.any():  # a tiny input that ReLU made 0: of no sign
            seen = torch.ones_like(seen)
        layer.calibrate_activation(layer.product.rows(seen.abs() if regime.offset else seen))
        assert layer.activation_offset == regime.offset
    enter(layer, regime.state)
    return layer


def enter(layer: BinaryLayer, state: str, share: float = 0.5) -> None:
    """Enter a state; in a transition, `share` of all entries are frozen."""
    layer.enter(state, 1.0 if state == FROZEN else 0.5)
    if state == TRANSITION:
        for name, shape in layer.masked_tensors().items():
            setattr(layer, name, (torch.rand(shape) < share).to(layer.weight.dtype))


def array(values: Tensor) -> Array:
    return dict(zip(indices(*values.shape), values.detach().reshape(-1).tolist(), strict=True))


def expect(layer: BinaryLayer, conv: Conv, regime: Regime, x: Tensor, grad: Tensor) -> dict[str, list[float]]:
    """Output and gradients by the reference, flat, given the values that the layer was calibrated to."""
    shape, kind, c = conv.geometry(), regime.surrogate, layer.weight_clip.item()
    u, g = (array(t.unsqueeze(0) if conv.batch is None else t) for t in (x, grad))
    frozen, batch, channels = layer.stage_state == FROZEN, conv.batch or 1, conv.channels[0]
    w, s = array(layer.weight), layer.weight_scale.tolist()
    m_w = dict.fromkeys(w, 1.0) if frozen else array(layer.weight_mask)
    mixed_w = {i: m_w[i] * s[i[0]] * sign(v) + (1.0 - m_w[i]) * clip(v, -c, c) for i, v in w.items()}
    pad = [0.0] * channels
    if regime.binarize == "weights":
        mixed_u = u
    else:
        a, b, offset = layer.activation_scale.item(), layer.activation_threshold.tolist(), regime.offset
        edges = layer.activation_low.item(), layer.activation_high.item()
        mask = torch.ones(channels) if frozen else layer.activation_mask
        entries = mask if mask.dim() > 1 else mask.reshape(-1, *[1] * len(conv.size)).expand(-1, *conv.size)
        m_u = array(entries)
        real = {i: reference.absorbed(regime.absorbed, v) for i, v in u.items()}
        codes = {i: sign(v - b[i[1]]) + offset for i, v in u.items()}
        mixed_u = {i: m_u[i[1:]] * a * codes[i] + (1.0 - m_u[i[1:]]) * clip(real[i][0], *edges) for i in u}
        if regime.pad == "one" and conv.mode == "zeros":
            pad = [(1.0 + offset) * a * m for m in mask.tolist()]
    y = reference.conv(mixed_u, mixed_w, pad, shape, batch)
    grad_u, grad_w, grad_pad = reference.conv_gradients(g, mixed_u, mixed_w, pad, shape, batch)
    bias = layer.bias.tolist()
    found = {
        "y": [v + bias[i[1]] for i, v in y.items()],
        "x": list(grad_u.values()),
        "weight": [reference.gradient(grad_w[i], v, -c, c, m_w[i], kind) for i, v in w.items()],
        "bias": list(reference.sums((((i[1],), v) for i, v in g.items()), indices(len(bias))).values()),
    }
    by_channel = (((i[0],), m_w[i] * grad_w[i] * sign(v)) for i, v in w.items())
    found["weight_scale"] = list(reference.sums(by_channel, indices(len(s))).values())
    if regime.binarize != "weights":
        reach = abs(a) * layer.stompp_config.surrogate_width
        passed = {i: m_u[i[1:]] * surrogate(kind, v, *edges, b[i[1]], reach) * grad_u[i] for i, v in u.items()}
        kept = {i: (1.0 - m_u[i[1:]]) * within(real[i][0], *edges) * grad_u[i] for i in u}
        found["x"] = [(kept[i] + passed[i]) * real[i][1] for i in u]  # all that goes up passes through f
        around = [grad_pad[(i,)] * p / a for i, p in enumerate(pad)]
        found["activation_scale"] = [math.fsum([*(m_u[i[1:]] * grad_u[i] * codes[i] for i in u), *around])]
        negative = (((i[1],), -v) for i, v in passed.items())
        found["activation_threshold"] = list(reference.sums(negative, indices(channels)).values())
    return found


def check(layer: BinaryLayer, conv: Conv, regime: Regime, x: Tensor, grad: Tensor, exact: bool) -> None:
    """Against the reference: bit for bit, or to 1e-12 of the largest entry; an undefined gradient is a zero one."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    actual = {"y": y, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    expected = expect(layer, conv, regime, x, grad)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        wanted = torch.tensor(wanted, dtype=torch.float64)
        found = torch.zeros_like(wanted) if actual[name] is None else actual[name].detach().reshape(-1)
        tolerance = {"rtol": 0.0, "atol": 0.0 if exact else 1e-12 * max(1.0, wanted.abs().max().item())}
        torch.testing.assert_close(found, wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- invariant 4: gradients equal the closed form ----


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
@pytest.mark.parametrize("state", [FROZEN, TRANSITION])
def test_convolution_equals_reference(conv: Conv, state: str) -> None:
    """Every regime, on random numbers and calibrated values, with and without a clip that bites."""
    torch.manual_seed(0)
    for index, regime in enumerate(r for r in REGIMES if r.state == state):
        if regime.mask == "element" and conv.batch is None:
            continue
        clips = {"weight_clip": 0.2, "activation_clip": 0.75} if index % 2 else {}
        x = conv.x()
        layer = build(conv, regime, conv.plain().double(), x, **clips)
        with torch.no_grad():
            for tensor in (layer.weight_scale, layer.activation_scale, layer.activation_threshold):
                if tensor is not None:
                    tensor += 0.3 * torch.rand_like(tensor)
        check(layer, conv, regime, x, torch.randn_like(layer(x)), exact=False)


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    """Any geometry that fits its input: 1 to 3 dimensions, groups up to depthwise, every padding there is."""
    dims, groups, mode = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(MODES))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = each(1, 3 if dims < 3 else 2), each(1, 2)
    padding = draw(st.sampled_from(["same", "valid", each(0, 2)]))
    stride = 1 if padding == "same" else each(1, 3)
    reaches = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        least = [(reach + 1) // 2 + 1 for reach in reaches]  # reflection needs more entries than it adds
    else:
        pads = [0] * dims if padding == "valid" else padding
        least = [max(reach + 1 - 2 * pad, pad + 1) for reach, pad in zip(reaches, pads, strict=True)]
    size = tuple(low + draw(st.integers(0, 2)) for low in least)
    group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    return Conv(kernel, size, padding, stride, dilation, groups, group, mode, draw(st.sampled_from([None, 1, 2])))


def eighths(*shape: int, most: int = 16) -> Tensor:
    return torch.randint(-most, most + 1, shape).double() / 8


@quick
@given(conv=convs(), regime=st.sampled_from(REGIMES), tight=st.booleans(), seed=st.integers(0, 999))
def test_gradients_bit_for_bit(conv: Conv, regime: Regime, tight: bool, seed: int) -> None:
    """On multiples of 1/8 no sum is rounded in float64, so that everything must be equal, reduced gradients too."""
    assume(regime.absorbed != "Hardswish" and not (regime.mask == "element" and conv.batch is None))
    torch.manual_seed(seed)
    plain, x = conv.plain().double(), conv.x()
    with torch.no_grad():
        for tensor in (*plain.parameters(), x):
            tensor.copy_(eighths(*tensor.shape))
        x.view(-1)[0] = 1.0
        layer = build(conv, regime, plain, x, **({"weight_clip": 1.0, "activation_clip": 1.0} if tight else {}))
        for name in ("weight_scale", "activation_scale", "activation_threshold"):
            tensor = getattr(layer, name)
            if tensor is not None:
                tensor.copy_(eighths(*tensor.shape) if "threshold" in name else 1 + eighths(*tensor.shape, most=7))
    check(layer, conv, regime, x, eighths(*layer(x).shape), exact=True)


# ---- invariant 1: identity at the start ----


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@quick
@given(conv=convs(), regime=st.sampled_from(REGIMES), share=st.booleans(), seed=st.integers(0, 999))
def test_identity_at_the_start(conv: Conv, regime: Regime, share: bool, seed: int) -> None:
    """Before its window, and in it while nothing is frozen: the plain layer's output and gradients, in both modes."""
    torch.manual_seed(seed)
    plain, x = conv.plain(), conv.x().float()
    if regime.mask == "element" or regime.binarize == "weights":
        regime = replace(regime, mask="feature", absorbed=None)
    results = []
    for convert in (False, True):
        if convert:
            layer = build(conv, regime, plain, x)
            assert layer is plain
            layer.enter(TRANSITION if share else PENDING, 0.0)
        inputs, found = x.clone().requires_grad_(), []
        for training in (True, False):
            plain.train(training).zero_grad()
            y = plain(inputs if convert else ACTIVATIONS[regime.absorbed](inputs))
            y.square().sum().backward()
            found += [y, plain.weight.grad.clone(), plain.bias.grad.clone(), inputs.grad.clone()]
        results.append(found)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
def test_pending_with_clips(conv: Conv) -> None:
    """As in transition with nothing frozen; padding is not clipped, nor binary."""
    torch.manual_seed(0)
    for pad, absorbed in itertools.product(("zero", "one"), (None, "ReLU")):
        regime, x = Regime("zero", PENDING, absorbed=absorbed, pad=pad), conv.x()
        layer = build(conv, regime, conv.plain().double(), x, weight_clip=0.2, activation_clip=0.75)
        pending = layer(x)
        enter(layer, TRANSITION, share=0.0)
        torch.testing.assert_close(pending, layer(x), rtol=1e-13, atol=1e-13)


# ---- invariant 2: exactly binary at the end ----


@quick
@given(conv=convs(), offset=st.integers(0, 1), pad=st.sampled_from(["zero", "one"]), seed=st.integers(0, 999))
def test_exactly_binary(conv: Conv, offset: int, pad: str, seed: int) -> None:
    """Two values a channel; in float32 an integer convolution and one affine map, bit for bit."""
    torch.manual_seed(seed)
    regime, plain, x = Regime("ste", FROZEN, offset=offset, pad=pad), conv.plain(), conv.x().float()
    with torch.no_grad():
        plain.weight.view(-1)[:2] = torch.tensor([0.0, -0.0])[: plain.weight.numel()]
        layer = build(conv, regime, plain, x)
        b = layer.activation_threshold.uniform_(-0.5, 0.5)
        places = layer.product.per_feature(b, x)
        x.copy_(torch.where(torch.rand(x.shape) < 0.1, places, x))  # at the threshold: +1
    for row, s, latent in zip(layer.binary_weight(), layer.weight_scale.tolist(), layer.weight, strict=True):
        assert row.reshape(-1).tolist() == [s * sign(v) for v in latent.reshape(-1).tolist()]

    batched = x.unsqueeze(0) if conv.batch is None else x
    codes = {i: sign(v - b.tolist()[i[1]]) for i, v in array(batched).items()}
    signs = {i: sign(v) for i, v in array(layer.weight).items()}
    around = {"zero": 0, "one": 1 + offset}[pad] if conv.mode == "zeros" else 0
    z = reference.conv(codes, signs, [float(around - offset)] * conv.channels[0], conv.geometry(), len(batched))
    integers = torch.tensor([int(v) for v in z.values()], dtype=torch.int64)
    rows = reference.sums((((i[0],), v) for i, v in signs.items()), indices(conv.channels[1]))
    scale = (layer.weight_scale * layer.activation_scale).detach()
    shift = layer.bias.detach() + scale * torch.tensor(list(rows.values())) * offset
    y = layer(x).detach()
    spread = [-1, *[1] * len(conv.size)]
    assert torch.equal(y, integers.reshape(y.shape).float() * scale.reshape(spread) + shift.reshape(spread))


@pytest.mark.parametrize("pad", ["zero", "one"])
def test_autocast_keeps_signs_and_sums_exact(pad: str) -> None:
    """Sums near 1000 that a bias brings back to a few units: bfloat16 sums would be off by up to 4."""
    torch.manual_seed(0)
    layer = BinaryConv2d.convert(nn.Conv2d(113, 4, 3, padding=1), StoMPPConfig.paper(conv_padding=pad))
    with torch.no_grad():
        layer.weight.abs_().view(-1)[::97] *= -1
        layer.bias.fill_(-980.0)
    enter(layer, FROZEN)
    x = torch.randn(2, 113, 5, 5).abs().to(torch.bfloat16)
    x[0, :5], x[1, :3] = -0.0, -1.0
    full = layer(x.float())
    inner = full[..., 1:-1, 1:-1]
    assert inner.min() > -120 and inner.max() < 120  # integers that bfloat16 can tell apart
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert torch.equal(half[..., 1:-1, 1:-1].float(), inner) and torch.equal(half, full.bfloat16())
