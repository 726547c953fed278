"""Packed models compute what the frozen ones do, bit for bit, and come back; the rest is refused, whole."""

import copy
import pickle
from typing import Any

import beyond
import models
import pytest
import torch
import vision
from models import logits, quick, same_tensors, train
from torch import nn

from stompp_hf import (
    BinaryLayer,
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    get_plan,
    pack_model,
    report,
    restore_model,
    unpack_model,
)
from stompp_hf.errors import NonFiniteError, NotBinarizedError, NotCalibratedError, PackingError, WeightError
from stompp_hf.method.sign_bits import SignBits
from stompp_hf.modules.activations import Paused
from stompp_hf.modules.packed import PackedAttention, PackedEmbedding, PackedLayer, PackedLinear
from stompp_hf.surgery.members import binary_layers, members
from stompp_hf.training.metrics import frozen_fraction

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
    "relu for gelu, absorbed": ("bert", {"gelu": "relu"}),
    "relu for gelu": ("vit", {"gelu": "relu", "relu": "keep"}),
    "dropped relu": ("mobilenet_v2", {"relu": "drop"}),
    "zero gradient": ("bert", {"frozen_gradient": "zero"}),
    "everything": ("vit", {"first_layer": "binarize", "head": "binarize"}),
    "every convolution": ("resnet", {"first_layer": "binarize", "head": "binarize", "downsampling": "binarize"}),
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


@pytest.mark.parametrize("binarize", ["weights_and_activations", "weights"])
@pytest.mark.parametrize("shortcuts", [False, True])
def test_a_net_of_ones_own(shortcuts: bool, binarize: str) -> None:
    """Depthwise, grouped and strided convolutions, and one that pads by reflection."""
    model = vision.conv_net(shortcuts=shortcuts, binarize=binarize)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    vision.train(model, Progression(model, STEPS), optimizer, 0, STEPS)
    x = vision.images(77)
    before = model.eval()(x)
    assert torch.equal(pack_model(model)(x), before) and len(binary_layers(model)) == 4
    assert torch.equal(unpack_model(model)(x), before)


# ---- a packed module among others ----


@pytest.fixture(scope="module")
def bert() -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A packed BERT, a batch, and its logits."""
    model, batch = frozen("bert")
    pack_model(model)
    return model, batch, logits(model, batch)


def test_packed_modules_are_what_they_replace(bert: tuple[Any, Any, Any]) -> None:
    layer = bert[0].get_submodule("bert.encoder.layer.0.output.dense")
    assert isinstance(layer, (PackedLinear, nn.Linear)) and (layer.in_features, layer.out_features) == (48, 32)
    assert repr(layer) == (
        "PackedLinear(in_features=48, out_features=32, bias=True, weights_and_activations, frozen, packed)"
    )
    values = layer.weight.unique(dim=None)
    assert layer.weight.is_floating_point() and len(values) <= 64 and not layer.weight.requires_grad
    assert torch.equal(layer.weight.abs(), layer.weight_scale.abs()[:, None].expand(32, 48))
    with pytest.raises((AttributeError, KeyError), match="weight"):
        layer.weight = torch.zeros(32, 48)
    with pytest.raises(WeightError, match="weight was to be replaced"):
        layer.weight = nn.Parameter(torch.zeros(32, 48))
    assert "12 binary layers in 2 stages" in report(bert[0]) and "are packed, 8 a byte" in report(bert[0])


def test_to_count_weights_none_is_unpacked(bert: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def unpacked(*args: Any) -> None:
        raise AssertionError("a weight was unpacked")

    unpackable = copy.deepcopy(bert[0])
    counts = [report(unpack_model(unpackable)).split(";")[1].split(" become")[0], frozen_fraction(unpackable)]
    monkeypatch.setattr(SignBits, "signs", unpacked)
    with pytest.raises(AssertionError, match="unpacked"):
        binary_layers(bert[0])["bert.encoder.layer.0.output.dense"].weight  # noqa: B018  # made on the fly
    assert [report(bert[0]).split(";")[1].split(" are packed")[0], frozen_fraction(bert[0])] == counts


def test_copies(bert: tuple[Any, Any, Any]) -> None:
    model, batch, expected = bert
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, batch), expected) and get_plan(twin).packed
        assert same_tensors(twin.state_dict(), model.state_dict()) == []
        unpack_model(twin)
        assert torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(model, batch), expected)


def test_a_state_dict_goes_from_one_to_another(bert: tuple[Any, Any, Any]) -> None:
    model, batch, expected = bert
    other = binarize_model(BERT.build(seed=3), quick())
    train(other, BERT, 0, STEPS, STEPS)
    with pytest.raises(RuntimeError, match="weight_bits"):
        other.load_state_dict(model.state_dict())
    pack_model(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_bits_and_what_carries_magnitude(bert: tuple[Any, Any, Any], dtype: torch.dtype) -> None:
    model, batch, expected = copy.deepcopy(bert[0]), *bert[1:]
    logits_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.get_submodule("bert.encoder.layer.0.output.dense").weight_scale.grad = torch.ones(32)
    model.to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for layer in binary_layers(model).values():
        assert layer.weight_bits.dtype == torch.uint8 and layer.bias.dtype == dtype == layer.weight.dtype
        assert {t.dtype for t in (layer.weight_scale, layer.activation_scale, layer.activation_threshold)} == {exact}
    cast = logits(model, batch)
    assert cast.dtype == dtype and torch.allclose(cast.float(), expected, atol=0.1)
    model.float()
    own = [f"{name}.{own}" for name, layer in members(model).items() for own in layer.own_tensors()]
    assert all(torch.equal(model.state_dict()[name], logits_before[name]) for name in own)
    if dtype == torch.float64:
        assert torch.equal(logits(model, batch), expected)
    pattern = torch.zeros(1, dtype=dtype)
    restored = unpack_model(model.to(dtype))  # cast to float32, where it was half
    assert {p.dtype for p in restored.parameters()} == {exact if pattern.dtype != exact else dtype}


def test_autocast(bert: tuple[Any, Any, Any]) -> None:
    model, batch, _ = bert
    twin = unpack_model(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model, batch), logits(twin, batch))


def test_paused_dropouts_stay_paused_and_training_goes_on() -> None:
    case = CASES["wav2vec2"]
    model, batch = frozen("wav2vec2")
    pack_model(model)
    paused = [module for module in model.modules() if isinstance(module, Paused)]
    x = torch.ones(64)
    assert len(paused) == len(case.paused) and all(torch.equal(module.train()(x), x) for module in paused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        model(**case.batch(1)).loss.backward()
        optimizer.step()
    moved = set(same_tensors(before, model.state_dict()))
    assert any(name.endswith("weight_scale") for name in moved)
    assert not any(name.endswith("weight_bits") for name in moved)
    assert torch.equal(logits(model, batch), logits(unpack_model(model), batch))


@pytest.mark.parametrize("name", beyond.CASES)
def test_attention_and_embeddings(name: str) -> None:
    case = beyond.CASES[name]
    options = beyond.BOTH if name in ("bert", "llama") else {"attention": "binarize"}
    model = binarize_model(beyond.build(name), quick(**options))
    train(model, case, 0, STEPS, STEPS)
    batch = case.batch(77)
    before = logits(model, batch)
    pack_model(model)
    assert torch.equal(logits(model, batch), before)
    assert sum(isinstance(m, PackedAttention) for m in model.modules()) == beyond.MODULES[name]
    assert sum(isinstance(m, PackedEmbedding) for m in model.modules()) == (name in beyond.WORDS)
    halved = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    assert torch.isfinite(logits(copy.deepcopy(model).to(torch.bfloat16), halved)).all()
    assert torch.equal(logits(unpack_model(model), batch), before)


def test_restoring_gives_a_plain_model_with_binary_weights(bert: tuple[Any, Any, Any]) -> None:
    model = copy.deepcopy(bert[0])
    weights = {name: layer.weight for name, layer in binary_layers(model).items()}
    restore_model(model)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, weight)
    assert not hasattr(model.config, "quantization_config")


# ---- what is refused ----


def unchanged(model: Any, error: type[Exception], match: str, **options: Any) -> None:
    """Packing raises, and the model is as it was."""
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    states = [layer.stage_state for layer in members(model).values()]
    with pytest.raises(error, match=match):
        pack_model(model, **options)
    assert same_tensors(before, model.state_dict()) == []
    assert [type(module) for module in model.modules()] == classes
    assert [layer.stage_state for layer in members(model).values()] == states


def test_unfinished_models() -> None:
    model = binarize_model(BERT.build(), quick())
    unchanged(
        model,
        PackingError,
        r"2 of 2 stages are not frozen yet: bert.encoder.layer.0, bert.encoder.layer.1.*commit=True",
    )
    unchanged(model, NotCalibratedError, r"query has no activation values.*calibrate\(model, batches\)", commit=True)
    train(model, BERT, 0, 8, 12)
    unchanged(model, PackingError, r"1 of 2 stages are not frozen yet: bert.encoder.layer.1\.")
    batch = BERT.batch(77)
    committed = copy.deepcopy(model)
    pack_model(committed, commit=True)
    Progression(model, 12).step(12)
    assert torch.equal(logits(committed, batch), logits(model, batch))
    unpacked = unpack_model(committed)
    progression = Progression(unpacked, 12)
    assert progression.is_complete()
    progression.step(progression.current_step)
    assert torch.equal(logits(unpacked, batch), logits(model, batch))


def test_the_call_that_the_error_names_works() -> None:
    model = binarize_model(BERT.build(), quick())
    progression = Progression(model, 10)
    progression.step(10)
    unchanged(model, NotCalibratedError, "calibrate")
    calibrate(model, [BERT.batch()])
    assert torch.isfinite(logits(pack_model(model), BERT.batch())).all()


def test_what_else_cannot_be_packed(bert: tuple[Any, Any, Any]) -> None:
    unchanged(bert[0], PackingError, "packed already")
    with pytest.raises(NotBinarizedError, match="binarize_model"):
        pack_model(nn.Linear(2, 2))
    unchanged(binarize_model(BERT.build(), StoMPPConfig(binarize="nothing")), PackingError, "binarize='nothing'")
    model, _ = frozen("bert")
    with pytest.raises(PackingError, match="not packed"):
        unpack_model(model)
    query = model.get_submodule("bert.encoder.layer.1.attention.self.query")
    query.weight.data[0, 0] = float("-inf")
    unchanged(model, NonFiniteError, "layer.1.attention.self.query is not finite")
    query.weight.data[0, 0] = 1.0
    query.__class__ = type("Unknown", (type(query),), {})
    unchanged(model, PackingError, "query is a Unknown, which has no packed class")


def test_packed_models_do_not_thaw(bert: tuple[Any, Any, Any]) -> None:
    model = copy.deepcopy(bert[0])
    with pytest.raises(PackingError, match=r"cannot go back to the state 'transition'.*unpack_model"):
        Progression(model, STEPS).step(0)
    assert all(isinstance(layer, BinaryLayer) for layer in binary_layers(model).values())
