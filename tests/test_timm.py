"""timm's models, as they are and through transformers' wrapper; needs timm and torchvision (marker `timm`)."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_ops  # noqa: F401  # before timm
from models import assert_binary, quick, same_tensors
from reference import Geometry
from safetensors.torch import save_file
from test_conv import REGIMES, Conv, build, check
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from stompp_hf import (
    Progression,
    binarize_model,
    calibrate,
    get_plan,
    pack_model,
    restore_model,
    unpack_model,
)
from stompp_hf.errors import NothingToBinarizeError
from stompp_hf.surgery.members import binary_layers

pytestmark = pytest.mark.timm

STEPS, LABELS, BATCH = 6, 3, 4


@pytest.fixture(scope="module")
def timm() -> Any:
    """timm, imported when a test that needs it runs: to collect this file nothing of it is needed."""
    return pytest.importorskip("timm")


@dataclass(frozen=True)
class Case:
    """One of timm's models, and what binarizing it must give, by hand."""

    layers: int
    stages: int
    left: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    absorbed: int = 0


TRANSFORMER = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
PATCHES = {"patch_embed.proj": "first layer", "head": "head"}
QKV = {f"blocks.{index}.attn.qkv": "bypassed: the model did not call it" for index in (0, 1)}
CASES = {
    # 8 blocks of two, and the ReLU between them goes; each narrowed group of blocks begins with a shortcut, also the
    # first one, since the stem keeps its 64 channels
    "resnet18": Case(
        16, 8,
        {"conv1": "first layer", "fc": "head", **{f"layer{i}.0.downsample.0": "shortcut" for i in (1, 2, 3, 4)}},
        {"channels": (8, 16, 16, 32)}, 8,
    ),
    # a separable convolution of two, and 16 inverted residuals of three; the stem's ReLU6 feeds the first block alone
    "mobilenetv2_100": Case(
        2 + 16 * 3, 17, {"conv_stem": "first layer", "conv_head": "head", "classifier": "head"}, absorbed=2 + 16 * 2
    ),
    # 16 blocks with squeeze and excitation; the first has no expansion
    "tf_efficientnet_b0": Case(
        4 + 15 * 5, 16, {"conv_stem": "first layer", "conv_head": "head", "classifier": "head"}
    ),
    "vit_tiny_patch16_224": Case(2 * 4, 2, PATCHES, TRANSFORMER),
    "beit_base_patch16_224": Case(2 * 3, 2, {**PATCHES, **QKV}, TRANSFORMER),
}  # fmt: skip
every_model = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES.keys())


def batch(seed: int, size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)  # for dropout and stochastic depth
    outputs = model(batch(seed))
    return nn.functional.cross_entropy(getattr(outputs, "logits", outputs), torch.arange(BATCH) % LABELS)


def train(model: nn.Module, first: int, last: int, total: int = STEPS) -> list[float]:
    """Steps [first, last) of a run of `total`, and the state after them."""
    model.train()
    progression, losses = Progression(model, total), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    progression.attach(optimizer)
    for step in range(first, last):
        progression.step(step)
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    progression.step(last)
    progression.detach()
    return losses


def outputs(model: nn.Module, seed: int = 50) -> Tensor:
    """In evaluation mode."""
    with torch.no_grad():
        found = model.eval()(batch(seed))
    return getattr(found, "logits", found)


@every_model
def test_models_as_they_are(name: str, case: Case, timm: Any) -> None:
    def create() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, num_classes=LABELS, **case.options).train()

    plain, model = create(), create()
    kinds = {name: type(module) for name, module in plain.named_modules()}
    calls: dict[str, None] = {}
    for layer_name, module in plain.named_modules():
        module.register_forward_pre_hook(lambda *_, layer_name=layer_name: calls.setdefault(layer_name))
    assert binarize_model(model, quick(end=1.0), batch(0)) is model and model.training

    plan = get_plan(model)
    names = [entry.name for entry in plan.entries]
    assert torch.equal(outputs(model), outputs(plain))
    assert len(names) == case.layers and names == [called for called in calls if called in names]
    assert plan.stage_count == case.stages and all(e.name.startswith(f"{e.stage_name}.") for e in plan.entries)
    assert plan.left.keys() == case.left.keys()
    assert all(reason in plan.left[left] and type(model.get_submodule(left)) is kinds[left]
               for left, reason in case.left.items())  # fmt: skip
    assert list(plan.bypassed.values()) == ["absorbed"] * case.absorbed
    assert torch.equal(loss_of(model.train(), 1), loss_of(plain.train(), 1))

    before = {name: layer.weight.detach().clone() for name, layer in binary_layers(model).items()}
    assert all(math.isfinite(loss) for loss in train(model, 0, 2, total=5 * case.stages))
    assert not any(torch.equal(layer.weight, before[name]) for name, layer in binary_layers(model).items())

    model = binarize_model(create(), quick(end=1.0), batch(0))
    assert all(math.isfinite(loss) for loss in train(model, 0, STEPS))
    for layer in binary_layers(model).values():
        assert layer.stage_state == "frozen"
        assert_binary(layer)
    frozen = outputs(model)
    assert torch.isfinite(frozen).all()
    assert torch.equal(outputs(pack_model(model)), frozen)
    restore_model(unpack_model(model))
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_weights_that_are_standardized_on_the_fly_are_left_alone(timm: Any) -> None:
    """timm's ScaledStdConv2d computes with another weight than the one it stores."""
    model = timm.create_model("nf_resnet26", pretrained=False, num_classes=LABELS)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(NothingToBinarizeError, match=r"x ScaledStdConv2d has no binary class \(exact types only: "):
        binarize_model(model, quick(), batch(0, 64))
    assert [type(module) for module in model.modules()] == kinds
    binarize_model(model, quick(head="binarize", first_layer="binarize"), batch(0, 64))
    assert list(binary_layers(model)) == ["head.fc"]
    convolutions = {name for name, module in model.named_modules() if type(module).__name__ == "ScaledStdConv2d"}
    left = get_plan(model).left
    assert left.keys() == convolutions and len(left) > 25
    assert all(reason.startswith("ScaledStdConv2d has no binary class") for reason in left.values())


# ---- Conv2dSame keeps its own padding ----


class Same(Conv):
    """TensorFlow's "same": ceil(size / stride) outputs, the odd padding behind."""

    def plain(self, bias: bool = True) -> nn.Module:
        from timm.layers import Conv2dSame

        return Conv2dSame(*self.channels, self.kernel, self.stride, 0, self.dilation, self.groups, bias)

    def geometry(self) -> Geometry:
        totals = [
            max((math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, k, s, d in zip(self.size, self.kernel, self.stride, self.dilation, strict=True)
        ]
        before = tuple(total // 2 for total in totals)
        after = tuple(total - total // 2 for total in totals)
        weight = (self.channels[1], self.group[0], *self.kernel)
        return Geometry(weight, self.size, self.stride, self.dilation, before, after, self.groups, self.mode)


@pytest.mark.parametrize("size", [(5, 6), (6, 7), (4, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("groups", [1, 4])
def test_same_padding_equals_reference(size: tuple[int, int], stride: tuple[int, int], groups: int, timm: Any) -> None:
    torch.manual_seed(0)
    group = (2, 2) if groups == 1 else (1, 1)
    conv = Same((3, 2), size, stride=stride, dilation=(1, 2), groups=groups, group=group)
    for regime in REGIMES:
        plain, x = conv.plain().double(), conv.x()
        before = plain(x)
        layer = build(conv, regime, plain, x)
        assert type(layer).__name__ == "BinaryConv2dSame"
        check(layer, conv, regime, x, torch.randn_like(before), exact=False)
        layer.enter("pending", 0.0)
        if regime.absorbed is None:
            assert torch.equal(layer(x), before)


def test_a_packed_layer_keeps_its_padding(timm: Any) -> None:
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 8)
    model = nn.Sequential(Conv2dSame(4, 6, 3, stride=2), nn.ReLU(), Conv2dSame(6, 4, 2, stride=2, groups=2))
    binarize_model(model, quick(first_layer="binarize", head="binarize", end=0.0), x)
    Progression(model, 1).step(0)
    frozen = calibrate(model, [x])(x)
    assert torch.equal(pack_model(model)(x), frozen)
    assert [type(layer).__name__ for layer in binary_layers(model).values()] == ["PackedConv2dSame"] * 2


def test_same_padding_follows_the_size(timm: Any) -> None:
    """One layer, inputs of many sizes: the frozen layer is the plain one on its binary operands at every size."""
    torch.manual_seed(0)
    conv = Same((3, 3), (7, 7), stride=(2, 2), dilation=(1, 1))
    regime = next(r for r in REGIMES if r.state == "frozen" and r.binarize != "weights" and r.pad == "zero")
    layer = build(conv, regime, conv.plain().double(), conv.x())
    for size in range(3, 12):
        x = torch.randn(1, 2, size, size + 1, dtype=torch.float64)
        plain = conv.plain().double()
        plain.load_state_dict({"weight": layer.binary_weight(), "bias": layer.bias})
        codes = torch.where(x >= layer.activation_threshold.reshape(-1, 1, 1), 1.0, -1.0) * layer.activation_scale
        torch.testing.assert_close(layer(x), plain(codes))


# ---- through transformers' wrapper ----


def from_config(timm: Any, folder: Path) -> Any:
    config = AutoConfig.for_model(
        "timm_wrapper", architecture="mobilenetv2_100", num_labels=LABELS, model_args={"drop_path_rate": 0.1}
    )
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config)


def from_checkpoint(timm: Any, folder: Path) -> Any:
    """A checkpoint in timm's own layout."""
    torch.manual_seed(0)
    options = CASES["resnet18"].options
    plain = timm.create_model("resnet18", num_classes=LABELS, **options)
    config = {"architecture": "resnet18", "num_classes": LABELS, "model_args": {**options}}
    config["pretrained_cfg"] = {**plain.pretrained_cfg, "input_size": [3, 32, 32], "tag": "local"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(plain.state_dict(), folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(outputs(model), outputs(plain))
    return model


@pytest.mark.parametrize(
    ("begin", "name"), [(from_config, "mobilenetv2_100"), (from_checkpoint, "resnet18")], ids=["config", "checkpoint"]
)
def test_wrapped_models(begin: Callable[..., Any], name: str, timm: Any, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    model, case = begin(timm, tmp_path / "start"), CASES[name]
    before = outputs(model)
    binarize_model(model, quick(end=1.0))  # probed with images made from its config
    plan = get_plan(model)
    assert torch.equal(outputs(model), before)
    assert len(plan.entries) == case.layers and plan.stage_count == case.stages
    assert plan.left.keys() == {f"timm_model.{left}" for left in case.left} and len(plan.bypassed) == case.absorbed

    losses = train(model, 0, 3)
    model.save_pretrained(tmp_path / "middle")
    reload = AutoModelForImageClassification.from_pretrained(tmp_path / "middle")
    assert torch.equal(outputs(reload), outputs(model)) and get_plan(reload) == plan
    assert train(reload, 3, STEPS) == train(model, 3, STEPS) and all(map(math.isfinite, losses))
    assert same_tensors(reload.state_dict(), model.state_dict()) == []
    for layer in binary_layers(reload).values():
        assert layer.stage_state == "frozen"
        assert_binary(layer)
    frozen = outputs(reload)
    pack_model(reload).save_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(reload), frozen)
    packed = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    assert get_plan(packed).packed and torch.equal(outputs(packed), frozen)
