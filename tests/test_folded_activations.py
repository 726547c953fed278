"""Activations whose output is only cut into signs: thresholds of their input, proven, followed, and undone."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.utils.flop_counter
from instruction_sets import limited_to
from models import logits
from test_fusing import compiled, kernels_and_torch, packed
from torch import nn
from transformers.activations import ACT2FN

from stompp_hf import (
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    fuse_for_inference,
    kernels,
    pack_model,
    unfuse,
    unpack_model,
)
from stompp_hf.checkpoints.packing import pack_members
from stompp_hf.errors import PackingError
from stompp_hf.inference.folded_activation import TOLERANCE, FoldedActivation, cut_of
from stompp_hf.modules import BinaryLinear
from stompp_hf.surgery.members import binary_layers

ACTIVATIONS = {
    "gelu": nn.GELU(),
    "tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    **{f"hf-{name}": ACT2FN[name] for name in ("gelu", "gelu_new", "gelu_fast", "quick_gelu")},
}


class Folded(nn.Module):
    """Linear layers around activations; `read` says who else reads what comes out of the first one."""

    def __init__(self, activation: nn.Module, read: str = "") -> None:
        super().__init__()
        self.first, self.inner, self.outer, self.last = (nn.Linear(n, 70) for n in (6, 70, 70, 70))
        self.activation, self.read = activation, read

    def forward(self, x: torch.Tensor) -> Any:
        h = self.inner(self.first(x))
        a = self.activation(h)
        if self.read == "view":
            a = a.view(a.shape)
        y = self.outer(a)
        y = y + a if self.read == "sum" else y
        y = self.outer(y) if self.read == "twice" else y
        y = self.last(y)
        return (y, a) if self.read == "output" else y


def folded(activation: nn.Module, read: str = "", **options: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(9, 6)
    model = binarize_model(Folded(copy.deepcopy(activation), read), StoMPPConfig(refresh_rate=2, **options), x)
    progression = Progression(model, 10)
    progression.step(10)
    calibrate(model, [(x,)])
    progression.detach()
    pack_model(model).eval()
    if model.outer.activation_threshold is not None:  # also below 0, where there are two edges
        model.outer.activation_threshold.data.copy_(torch.linspace(-0.16, 0.3, 70))
        model.inner.weight_scale.data.mul_(10.0)  # inputs of both sides of either
    return model, x


def layer_with(thresholds: torch.Tensor) -> Any:
    """A packed layer with these thresholds."""
    layer: Any = BinaryLinear.convert(nn.Linear(len(thresholds), 5), StoMPPConfig(activation_threshold="mean"))
    layer.calibrate_weight()
    layer.calibrate_activation(torch.randn(8, len(thresholds)))
    layer.enter("frozen", 1.0)
    pack_members({"layer": layer})
    layer.activation_threshold.data.copy_(thresholds)
    return layer


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_signs_are_those_of_the_activation(name: str) -> None:
    activation = ACTIVATIONS[name]
    # Around the lowest value and 0, where there are two edges, one, and none.
    b = torch.cat((torch.linspace(-0.4, 3.0, 400), torch.tensor([0.0, -0.0, 1e-6, -1e-6, -0.1, 40.0])))
    layer = layer_with(b)
    cut = cut_of(activation, layer)
    assert cut is not None
    high, low = cut
    assert bool((low[b > 0.001].isinf()).all()) and bool((high > low)[b > -0.1].all())
    u = torch.cat((torch.linspace(-12, 12, 5003), torch.randn(500) * 100))[:, None]
    f = activation(u.expand(-1, len(b)).contiguous())
    expected, found = f >= b, torch.maximum(u - high, low - u) >= 0
    differs = expected != found
    assert bool(((f - b).abs() <= TOLERANCE * (u.abs() + b.abs()))[differs].all())
    assert differs.float().mean() < 1e-3
    # At the edges themselves: from them on, and not a number before.
    edge = high.nextafter(torch.tensor(-100.0))
    clear = (b > 0.01) & (b < 3)
    assert bool((activation(high) >= b)[clear].all()) and not bool((activation(edge) >= b)[clear].any())


def test_what_is_no_number_is_not_cut() -> None:
    assert cut_of(nn.GELU(), layer_with(torch.tensor([0.1, float("nan"), 0.2, 0.3]))) is None
    assert cut_of(nn.GELU(), layer_with(torch.tensor([0.1, float("inf"), 0.2, 0.3]))) is None


class Wavy(nn.GELU):
    """No valley: it rises, and falls, and rises."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.sin(input)


def test_what_has_more_than_one_valley_is_not_cut() -> None:
    assert cut_of(Wavy(), layer_with(torch.tensor([0.1, 0.2, -0.3]))) is None


@compiled
@pytest.mark.parametrize("cpu", ["portable", "avx2", "avx512", "neon"])
@pytest.mark.parametrize("features", [1, 31, 64, 770])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_kernels_cut_as_torch_does(cpu: str, features: int, rows: int) -> None:
    for _ in limited_to(cpu):
        torch.manual_seed(features)
        x, high = torch.randn(rows, features), torch.randn(features)
        low = high - torch.rand(features) * 3
        high[::7], low[::5], high[::9], low[::11] = float("inf"), float("-inf"), -0.0, 0.0
        x.view(-1)[::3] = high.expand_as(x).reshape(-1)[::3]
        x.view(-1)[1::4] = low.expand_as(x).reshape(-1)[1::4]
        x = x.nan_to_num(posinf=9.0, neginf=-9.0)
        x.view(-1)[::13] = -0.0
        weight = torch.randn(33, features)
        bits = kernels.pack(weight, False)
        y = torch.empty(rows, 33)
        native: Any = kernels.choice().native
        cut = torch.stack((high, low))
        code = kernels.choosing.CUT_DTYPES[torch.float32]
        tail = (None, 0, None, 0, y.data_ptr(), 0, rows, features, 33, 1)
        assert native.stompp_linear(x.data_ptr(), code, cut.data_ptr(), bits.data_ptr(), *tail) == 0
        signs = torch.where((x >= high) | (x <= low), 1.0, -1.0)
        assert torch.equal(torch.where(torch.maximum(x - high, low - x) >= 0, 1.0, -1.0), signs)
        assert torch.equal(y, signs @ torch.where(weight >= 0, 1.0, -1.0).T)


@pytest.mark.parametrize("name", ["gelu", "tanh", "silu", "mish", "hf-gelu", "hf-gelu_new"])
@pytest.mark.parametrize("threshold", ["zero", "mean"])
def test_models_with_folded_activations(name: str, threshold: str) -> None:
    model, x = folded(ACTIVATIONS[name], activation_threshold=threshold)
    kind, state = type(model.activation), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before, one_row = model(x), model(x[:1])
    assert type(fuse_for_inference(copy.deepcopy(model), x, exact=True).activation) is kind
    assert fuse_for_inference(model, x) is model and isinstance(model.activation, FoldedActivation)
    assert isinstance(model.activation, kind)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(one(x), before)  # no value is that close to its threshold here
            assert torch.equal(one(x[:1]), one_row)
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())
    with kernels.switched_off(), torch.no_grad():
        assert torch.equal(model(x), before)
    unfuse(model)
    assert type(model.activation) is kind and not hasattr(model.outer, "fused_cut")
    with torch.no_grad():
        assert torch.equal(model(x), before)
    fuse_for_inference(model, x)
    assert type(unpack_model(model).activation) is kind


@pytest.mark.parametrize("read", ["view", "sum", "output", "twice"])
def test_activations_that_others_read_stay(read: str) -> None:
    model, x = folded(nn.GELU(), read)
    fuse_for_inference(model, x)
    assert type(model.activation) is nn.GELU


def test_activations_that_write_in_place_or_are_hooked_stay() -> None:
    model, x = folded(nn.SiLU(inplace=True))
    assert type(fuse_for_inference(model, x).activation) is nn.SiLU
    model, x = folded(nn.GELU())
    model.activation.register_forward_hook(lambda *_: None)
    assert type(fuse_for_inference(model, x).activation) is nn.GELU


def test_thresholds_are_followed() -> None:
    model, x = folded(nn.GELU(), activation_threshold="mean")
    twin = copy.deepcopy(model)
    fuse_for_inference(model, x)
    for one in (model, twin):
        with torch.no_grad():
            one(x)
            one.outer.activation_threshold.add_(0.3)
    with torch.no_grad():
        expected = twin(x)
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x[:2]), twin(x[:2]))  # few rows go another way
        model.load_state_dict(twin.state_dict())
        assert torch.equal(model(x), expected)
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            model.outer.activation_threshold.sub_(0.2)
            twin.outer.activation_threshold.sub_(0.2)
            assert torch.equal(model(x), twin(x))  # while somebody listens
        model.outer.activation_threshold[0] = float("nan")
        with pytest.raises(PackingError, match=r"is no part of them: stompp_hf.unfuse"):
            model(x)


def test_other_dtypes_go_through_the_activation() -> None:
    model, x = folded(nn.GELU())
    halves = copy.deepcopy(model).to(torch.bfloat16)
    fused = fuse_for_inference(copy.deepcopy(model), x)
    with torch.no_grad():
        half = x.bfloat16()
        assert torch.equal(copy.deepcopy(fused).to(torch.bfloat16)(half), halves(half))
        wide = copy.deepcopy(model).double()(x.double())
        assert torch.equal(copy.deepcopy(fused).double()(x.double()), wide)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(x), model(x))
    with pytest.raises(PackingError, match="gives no gradient"):
        fused.outer(torch.randn(2, 70, requires_grad=True))


@pytest.mark.parametrize(("name", "count"), [("bert", 2), ("gpt2", 2), ("vit", 2), ("resnet", 0)])
def test_architectures(name: str, count: int) -> None:
    model, batch = packed(name)
    before = logits(model, batch)
    fuse_for_inference(model, batch)
    found = [module for module in model.modules() if isinstance(module, FoldedActivation)]
    cut = [layer for layer in binary_layers(model).values() if hasattr(layer, "fused_cut")]
    assert len(found) == len(cut) == count
    if count:
        assert torch.equal(logits(model, batch), before)
    assert torch.equal(*kernels_and_torch(model, batch))


def test_graphs() -> None:
    model, x = folded(nn.GELU(), activation_threshold="mean")
    fuse_for_inference(model, x)
    with torch.no_grad():
        expected = model(x)
        torch.compiler.reset()
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
        assert torch.equal(torch.jit.trace(model, x)(x), expected)
