"""weight_scale="group": values and gradients from the definition, in every form that a layer takes, in whole models."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import vision
from hypothesis import given, settings, strategies as st
from models import logits, quick, same_tensors, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stompp_hf import (
    BinaryEmbedding,
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    fuse_for_inference,
    pack_model,
    restore_model,
    summary,
    unfuse,
    unpack_model,
)
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.errors import CheckpointError
from stompp_hf.modules import FROZEN, TRANSITION
from stompp_hf.modules.packed import PackedLayer
from stompp_hf.modules.registry import binary_class_of
from stompp_hf.surgery.members import binary_layers

GROUP: dict[str, Any] = {"weight_scale": "group"}
PLAIN: dict[str, Any] = {
    "linear": lambda fan_in, out: nn.Linear(fan_in, out),
    "transposed": lambda fan_in, out: Conv1D(out, fan_in),
    "conv": lambda fan_in, out: nn.Conv1d(fan_in, out, 3, padding=1),
    "conv2d": lambda fan_in, out: nn.Conv2d(2 * fan_in, 2 * out, (2, 3), stride=2, padding=1, groups=2),
    "embedding": lambda fan_in, out: nn.Embedding(out, fan_in),
}
SHAPES = {"conv": (2, 0, 5), "conv2d": (2, 0, 4, 5)}
KINDS = [kind for kind in PLAIN if kind != "embedding"]
CASES = {**models.CASES, **vision.CASES}


def rows_of(kind: str, weight: Tensor) -> list[list[float]]:
    """A row of numbers for each output channel, in the order in which groups are counted."""
    weight = weight.detach()
    if kind == "transposed":
        return [weight[:, out].tolist() for out in range(weight.shape[1])]
    return [channel.reshape(-1).tolist() for channel in weight]


def layer_of(kind: str, fan_in: int, out: int, size: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A calibrated layer, with zeros of both signs in its weight."""
    plain = PLAIN[kind](fan_in, out).to(dtype)
    with torch.no_grad():
        for tensor in plain.parameters():
            tensor.copy_(torch.randn(tensor.shape))
        plain.weight.view(-1)[:2] = torch.tensor([0.0, -0.0])[: plain.weight.numel()]
    config = StoMPPConfig(**{**GROUP, "group_size": size, "binarize": "weights", **options})
    layer: Any = BinaryEmbedding if kind == "embedding" else binary_class_of(plain)
    layer = layer.convert(plain, config)
    layer.calibrate_weight()
    return layer


def freeze(layer: Any, state: str) -> None:
    """Enter a state, with masks of one half."""
    layer.enter(state, 1.0 if state == FROZEN else 0.5)
    for name, shape in layer.masked_tensors().items():
        setattr(layer, name, (torch.rand(shape) < 0.5).to(layer.weight.dtype))


# ---- one layer ----


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*PLAIN]), fan_in=st.integers(1, 40), out=st.integers(1, 4), size=st.integers(1, 50),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_each_group_starts_at_its_mean_and_is_plus_or_minus_its_scale(
    kind: str, fan_in: int, out: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = layer_of(kind, fan_in, out, size)
    latents, binary = rows_of(kind, layer.weight), rows_of(kind, layer.binary_weight())
    assert layer.weight_scale.shape == (len(latents), math.ceil(len(latents[0]) / size))
    for row, values, scales in zip(latents, binary, layer.weight_scale.tolist(), strict=True):
        for group, scale in enumerate(scales):
            own = row[group * size : (group + 1) * size]
            assert scale == pytest.approx(math.fsum(map(abs, own)) / len(own), rel=1e-14)
            found = values[group * size : (group + 1) * size]
            assert found == [scale if w >= 0 else -scale for w in own]


class Reference:
    """y from the definition, by autograd: every scale is looked up by number, every sign is chosen, and k is added."""

    def __init__(self, kind: str, layer: Any, size: int, clip: float) -> None:
        self.kind, self.layer, self.clip = kind, layer, clip
        own = {name: tensor.detach().clone().requires_grad_() for name, tensor in layer.named_parameters()}
        self.tensors: dict[str, Tensor] = own
        numbers = torch.arange(layer.weight.numel()).reshape(layer.weight.shape)
        self.channels, self.groups = torch.empty_like(numbers), torch.empty_like(numbers)
        for channel, row in enumerate(rows_of(kind, numbers)):
            for place, number in enumerate(row):
                self.channels.view(-1)[int(number)] = channel
                self.groups.view(-1)[int(number)] = place // size

    def weight(self, k: float) -> Tensor:
        w, s = self.tensors["weight"], self.tensors["weight_scale"]
        hard = torch.where(w.detach() >= 0, 1.0, -1.0).to(w.dtype) * s[self.channels, self.groups]
        near = k * (w.detach().abs() < self.clip)
        return self._mixed(hard + near * (w - w.detach()), w, self.layer.weight_mask.to(w.dtype))

    def input(self, x: Tensor, k: float, offset: float, width: float) -> Tensor:
        layer = self.layer
        if layer.activation_scale is None:
            return x
        shape = (-1, *[1] * (x.dim() - 2)) if self.kind in SHAPES else (-1,)
        a, b = self.tensors["activation_scale"], self.tensors["activation_threshold"].reshape(shape)
        v = x - b
        near = k * ((v.detach().abs() < width * a.detach()) & (x.detach().abs() < self.clip))
        levels = a * (torch.where(v.detach() >= 0, 1.0, -1.0).to(x.dtype) + offset) + near * (v - v.detach())
        mask = layer.activation_mask
        return self._mixed(levels, x, None if mask is None else mask.reshape(shape))

    def _mixed(self, frozen: Tensor, real: Tensor, mask: Tensor | None) -> Tensor:
        return (
            frozen
            if self.layer.stage_state == FROZEN
            else mask * frozen + (1 - mask) * real.clamp(-self.clip, self.clip)
        )

    def __call__(self, x: Tensor, k: float, offset: float, width: float) -> Tensor:
        layer, w, bias = self.layer, self.weight(k), self.tensors.get("bias")
        if self.kind == "embedding":
            return w[x]
        u = self.input(x, k, offset, width)
        if self.kind in ("linear", "transposed"):
            return u @ (w if self.kind == "transposed" else w.t()) + bias
        product = nn.functional.conv1d if self.kind == "conv" else nn.functional.conv2d
        return product(u, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def input_of(kind: str, layer: Any) -> Tensor:
    if kind == "embedding":
        return torch.randint(0, layer.num_embeddings, (3, 4))
    features = layer.product.features(layer.weight)
    shape = [features if size == 0 else size for size in SHAPES.get(kind, (3, 2, 0))]
    return torch.randn(shape, dtype=layer.weight.dtype).requires_grad_()


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("surrogate", ["zero", "windowed_ste", "clipped_ste"])
@pytest.mark.parametrize("binarize", ["weights", "weights_and_activations"])
@pytest.mark.parametrize("state", [TRANSITION, FROZEN])
@pytest.mark.parametrize("kind", [*PLAIN])
def test_values_and_gradients(
    kind: str, state: str, binarize: str, surrogate: str, offset: float, learns: bool
) -> None:
    torch.manual_seed(1)
    size, clip = 4, 0.8 if surrogate == "clipped_ste" else 2.0**100
    layer = layer_of(
        kind, 7, 3, size, binarize=binarize, frozen_gradient=surrogate, learn_weight_scale=learns,
        weight_clip=clip, activation_clip=clip,
    )  # fmt: skip
    if layer.activation_scale is not None:
        with torch.no_grad():
            layer.activation_scale.fill_(0.7)
            layer.activation_threshold.normal_(0.0, 0.3)
        layer.activation_ready, layer.activation_offset = True, offset
    freeze(layer, state)
    reference = Reference(kind, layer, size, clip)
    if not learns:
        reference.tensors["weight_scale"] = layer.weight_scale.detach().clone()
    x = input_of(kind, layer)
    twin = x.detach().clone()
    twin = twin.requires_grad_() if twin.is_floating_point() else twin
    width = layer.stompp_config.surrogate_width if surrogate == "windowed_ste" else math.inf
    found, expected = layer(x), reference(twin, float(surrogate != "zero"), offset, width)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(expected)
    found.backward(g)
    expected.backward(g)
    for name, parameter in [*layer.named_parameters(), ("x", x)]:
        grad, wanted = parameter.grad, twin.grad if name == "x" else reference.tensors[name].grad
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        grad = torch.zeros_like(parameter) if grad is None else grad
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    if state == FROZEN and surrogate == "zero":
        assert layer.weight.grad is None  # undefined, not zeros


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*PLAIN]), fan_in=st.integers(1, 300), out=st.integers(1, 5), size=st.integers(1, 200),
    binary=st.booleans(), offset=st.sampled_from([0.0, 1.0]), padding=st.sampled_from(["zero", "one"]),
)  # fmt: skip
def test_packed_equals_frozen_bit_for_bit(
    kind: str, fan_in: int, out: int, size: int, binary: bool, offset: float, padding: str
) -> None:
    """Values, and the gradients of what a packed layer still has; and back."""
    torch.manual_seed(fan_in)
    options = {"binarize": "weights_and_activations" if binary else "weights", "conv_padding": padding}
    layer = layer_of(kind, fan_in, out, size, torch.float32, **options)
    if layer.activation_scale is not None:
        layer.activation_threshold.data.normal_(0.0, 0.3)
        layer.activation_ready, layer.activation_offset = True, offset
    freeze(layer, FROZEN)
    if kind == "conv2d" and offset:  # in another order of memory
        layer.to(memory_format=torch.channels_last)
    x = input_of(kind, layer)
    before = layer(x)
    g = torch.randn_like(before)
    before.backward(g)
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None and name != "weight"}
    binary_weight = layer.binary_weight()
    layer.zero_grad()
    packed_class = next(c for c in PackedLayer.__subclasses__() if c.binary_class is type(layer))
    packed_class.pack(layer, packed_class.buffers_of(layer))
    assert torch.equal(layer.weight, binary_weight)
    after = layer(x)
    assert torch.equal(after, before)
    after.backward(g)
    assert grads and same_tensors(grads, {name: p.grad for name, p in layer.named_parameters()}) == []
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    layer.unpack()
    assert torch.equal(layer.binary_weight(), binary_weight) and torch.equal(layer(x), before)


def test_sums_with_a_binary_input_are_exact_in_any_order() -> None:
    """Each output is the exact sum, rounded once to float32, though its terms would round in float32."""
    torch.manual_seed(0)
    layer = layer_of("linear", 1000, 6, 128, torch.float32, binarize="weights_and_activations")
    layer.activation_ready = True
    layer.bias.data.zero_()
    freeze(layer, FROZEN)
    x = torch.randn(5, 1000)
    signs, weight = torch.where(x >= 0, 1.0, -1.0).tolist(), layer.binary_weight().tolist()
    sums = [[math.fsum(c * w for c, w in zip(row, channel, strict=True)) for channel in weight] for row in signs]
    assert torch.equal(layer(x), torch.tensor(sums, dtype=torch.float64).float())
    assert not torch.equal(nn.functional.linear(torch.tensor(signs), layer.binary_weight()), layer(x))


# ---- whole models ----

STEPS = 6
MODELS = {
    "gpt2, W1A32": ("gpt2", {"binarize": "weights"}),
    "gpt2, W1A1": ("gpt2", {}),
    "llama, W1A32": ("llama", {"binarize": "weights", "embeddings": "binarize", "frozen_gradient": "zero"}),
    "resnet, W1A32": ("resnet", {"binarize": "weights"}),
    "resnet, W1A1": ("resnet", {"conv_padding": "one", "frozen_gradient": "zero"}),
}
SIZE = 20  # divides no fan-in of these models


def trained(name: str) -> tuple[Any, dict[str, Any]]:
    """A model trained to the end, and a batch."""
    name, options = MODELS[name]
    case = CASES[name]
    model = binarize_model(case.build(), quick(**GROUP, group_size=SIZE, **options))
    train(model, case, 0, STEPS, STEPS)
    return model, case.batch(77)


@pytest.mark.parametrize("name", [*MODELS])
def test_a_model_in_all_its_forms(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = trained(name)
    answer, layers = logits(model, batch), binary_layers(model)
    for layer in layers.values():
        channels = layer.weight_scale.shape[0]
        assert layer.weight_scale.shape[1] == math.ceil(layer.weight.numel() / channels / SIZE)
    model.save_pretrained(tmp_path / "trained")
    again = type(model).from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again, batch), answer)
    assert binary_layers(again)[next(iter(layers))].stompp_config.group_size == SIZE

    promised = summary(model).totals.packed
    pack_model(model)
    assert torch.equal(logits(model, batch), answer)
    model.save_pretrained(tmp_path / "packed")
    packed = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(packed, batch), answer)
    found = inspect(tmp_path / "packed")
    scales = sum(layer.weight_scale.numel() for layer in layers.values())
    assert found.sizes["weight scales"] == 4 * scales
    assert found.total == sum(t.nbytes for t in load_file(tmp_path / "packed" / "model.safetensors").values())
    assert promised == found.total == summary(model).totals.stored

    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with caplog.at_level(logging.WARNING):
        fuse_for_inference(packed, inputs)
    count = sum(not isinstance(layer, BinaryEmbedding) for layer in layers.values())
    assert f"{count} layers have a scale a group" in caplog.text
    assert torch.equal(logits(packed, batch), answer)
    unfuse(packed)
    assert all(type(layer).__name__.startswith("Packed") for layer in binary_layers(packed).values())
    unpack_model(packed)
    assert torch.equal(logits(packed, batch), answer)
    train(packed, CASES[MODELS[name][0]], STEPS, STEPS + 1, STEPS + 1)  # it learns again
    plain = restore_model(packed)
    assert not [key for key in plain.state_dict() if "scale" in key and "weight_scale" in key]


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, _ = trained("gpt2, W1A32")
    model.save_pretrained(tmp_path)
    name = next(iter(binary_layers(model))) + ".weight_scale"
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:, :1].clone()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} has the shape"):
        type(model).from_pretrained(tmp_path)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["config"]["group_size"] == SIZE
    config["quantization_config"]["config"]["group_size"] = SIZE - 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="changed after it was saved"):
        type(model).from_pretrained(tmp_path)


def test_frozen_signs_hold_while_scales_learn() -> None:
    model, batch = trained("llama, W1A32")
    progression = Progression(model, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    progression.attach(optimizer)
    progression.step(STEPS)
    layers = binary_layers(model)
    before = {name: (layer.weight >= 0, layer.weight_scale.detach().clone()) for name, layer in layers.items()}
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, (signs, scale) in before.items():
        assert torch.equal(layers[name].weight >= 0, signs) and not torch.equal(layers[name].weight_scale, scale)


# ---- graphs ----


class Shelf(nn.Module):
    """Layers of every kind, each on its own input."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"linear": nn.Linear(150, 9), "transposed": Conv1D(7, 150), "conv": nn.Conv2d(3, 5, 3, padding=1)}
        self.layers = nn.ModuleDict(layers)

    def forward(self, linear: Tensor, transposed: Tensor, conv: Tensor) -> dict[str, Tensor]:
        x = {"linear": linear, "transposed": transposed, "conv": conv}
        return {f"{name}_out": layer(x[name]) for name, layer in self.layers.items()}


@pytest.fixture(params=["weights", "weights_and_activations"])
def shelf(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    torch.manual_seed(0)
    x = {"linear": torch.randn(2, 3, 150), "transposed": torch.randn(4, 150), "conv": torch.randn(2, 3, 6, 5)}
    options = {"binarize": request.param, "end": 0.0, "first_layer": "binarize", "head": "binarize"}
    model = binarize_model(Shelf(), StoMPPConfig(**GROUP, group_size=64, **options), x)
    Progression(model, 1).step(0)
    calibrate(model, [x])
    yield model.eval(), x


def test_onnx(shelf: tuple[Any, dict[str, Tensor]], tmp_path: Path) -> None:
    test_onnx = pytest.importorskip("test_onnx")
    from stompp_hf import export_onnx

    model, x = shelf
    with torch.no_grad():
        expected = model(**x)
    exact = model.layers["linear"].activation_scale is not None
    found = test_onnx.answers(export_onnx(model, tmp_path / "bits.onnx", x), x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[name], value) or not exact or name == "conv_out"
    if exact:
        return
    path = export_onnx(model, tmp_path / "two.onnx", x, weights_only="matmul_nbits")
    found = test_onnx.answers(path, x)
    for name, value in expected.items():  # with a real input, rounded to a byte
        assert (found[name] - value).abs().mean() / value.abs().mean() < 0.01


def test_torch_export_and_compile(shelf: tuple[Any, dict[str, Tensor]]) -> None:
    model, x = shelf
    pack_model(model)
    with torch.no_grad():
        expected = model(**x)
        program = torch.export.export(model, (), x)
        assert same_tensors(program.module()(**x), expected) == []
        traced = torch.compile(model, backend="eager", fullgraph=True)
        assert same_tensors(traced(**x), expected) == []
