"""Subclasses of nn.Linear and the like: those that compute what their base does become binary, the others stay real."""

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import assert_binary
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.lasr.modeling_lasr import LasrEncoderCTCHead
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from stompp_hf import (
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    get_plan,
    pack_model,
    restore_model,
    unpack_model,
)
from stompp_hf.errors import NothingToBinarizeError
from stompp_hf.modules import BinaryConv1D, BinaryLinear, binary_class_of
from stompp_hf.modules.registry import unlike_its_base
from stompp_hf.surgery.members import binary_layers

# ---- which are the same ----


class OtherWords(nn.Linear):
    """The same product in other words, and its input by another name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", hidden_states, self.weight) + self.bias


class Transposed(Conv1D):
    """A subclass of transformers' Conv1D."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Initialized(nn.Conv2d):
    """A subclass that has an initialization of its own."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.1)
        nn.init.zeros_(self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Clamped(nn.Linear):
    """The same for small weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.clamp(-4, 4), self.bias)


class Narrow(nn.Linear):
    """The same for small inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-4, 4))


class Noisy(nn.Linear):
    """The same in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (torch.rand(x.shape[-1]).sum() if self.training else 0)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Adapted(nn.Linear):
    """LoRA as loralib has it: at first it adds nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lora = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora


class Masked(nn.Linear):
    """A mask that excludes nothing yet, in an attribute."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mask = torch.ones_like(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Switched(nn.Linear):
    """Changes its weight between training and evaluation."""

    def train(self, mode: bool = True) -> "Switched":
        self.weight.data.mul_(1.0)
        return super().train(mode)


class Weighed(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x)


SAME = [
    lambda: FalconLinear(8, 8),
    lambda: FalconLinear(8, 6, bias=False).bfloat16(),
    lambda: EsmFoldLinear(8, 8),
    lambda: OtherWords(8, 8),
    lambda: Transposed(6, 8),
    lambda: Initialized(3, 4, 3, stride=2, padding=1, padding_mode="reflect"),
    lambda: EfficientNetDepthwiseConv2d(4, kernel_size=3),
]
OTHERS: list[tuple[Any, str]] = [
    (lambda: Scaled(8, 8), "it computes something else"),
    (lambda: Clamped(8, 8), "it computes something else"),
    (lambda: Narrow(8, 8), "it computes something else"),
    (lambda: Noisy(8, 8), "it computes something else"),
    (lambda: Standardized(3, 4, 3), "it computes something else"),
    (lambda: Llama4Router(hf.Llama4TextConfig(hidden_size=8, num_local_experts=4)), "it computes something else"),
    (lambda: LasrEncoderCTCHead(8, 6, 1), "it does not run on an input of its base"),
    (lambda: Switched(8, 8), "its train uses the weight, too"),
    (lambda: Weighed(8, 8), "its forward takes more than an input"),
]


@pytest.mark.parametrize("make", SAME)
def test_the_same_product(make: Any) -> None:
    layer: Any = make()
    state, values, attributes = torch.get_rng_state(), copy.deepcopy(layer.state_dict()), dict(vars(layer))
    assert unlike_its_base(layer) is None
    assert torch.equal(torch.get_rng_state(), state) and vars(layer) == attributes
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in values.items())

    plain, layer = layer.float(), copy.deepcopy(layer.float())
    binary = binary_class_of(layer)
    assert binary is binary_class_of(make()) and binary.__name__ == f"Binary{type(plain).__name__}"
    binary.convert(layer, StoMPPConfig())
    shape = (2, 3, 7, 7) if isinstance(layer, Initialized) else (2, 4, 7, 7) if hasattr(layer, "stride") else (2, 8)
    x = torch.randn(shape)
    assert torch.equal(layer(x), plain(x)) and torch.equal(layer(hidden_states=x), plain(x))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer) is binary and torch.equal(copied(x), plain(x))
        assert type(copied.restore()) is type(plain)


@pytest.mark.parametrize(("make", "reason"), OTHERS)
def test_another_product_stays_real(make: Any, reason: str) -> None:
    assert unlike_its_base(make()).startswith(reason)


def test_with_tensors_of_its_own_it_has_no_binary_class() -> None:
    assert binary_class_of(Adapted(8, 8)) is binary_class_of(Masked(8, 8)) is None
    assert binary_class_of(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))) is None
    x = torch.randn(5, 8)
    layers = [nn.Linear(8, 8), Scaled(8, 8), Adapted(8, 8), Masked(8, 8), FalconLinear(8, 8), nn.Linear(8, 2)]
    plan = get_plan(binarize_model(nn.Sequential(*layers), StoMPPConfig(), example_inputs=x))
    assert [entry.name for entry in plan.entries] == ["4"]
    assert all("has no binary class (exact types only: " in plan.left[name] for name in "123")
    assert plan.left["1"].endswith("and subclasses that compute the same: it computes something else)")


def test_without_a_probe_too() -> None:
    model = binarize_model(nn.Sequential(nn.Linear(8, 8), FalconLinear(8, 8), Scaled(8, 8), nn.Linear(8, 2)))
    assert [entry.name for entry in get_plan(model).entries] == ["1"]


# ---- their whole life ----


def falcon() -> hf.FalconForCausalLM:
    torch.manual_seed(0)
    config = hf.FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return hf.FalconForCausalLM(config)


IDS = torch.arange(2, 34).reshape(4, 8)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def test_falcon(tmp_path: Path) -> None:
    model, plain = falcon(), outputs(falcon())
    binarize_model(model, StoMPPConfig(refresh_rate=1))
    layers = binary_layers(model)
    assert len(layers) == 8 and all(isinstance(layer, BinaryLinear) for layer in layers.values())
    assert {type(layer).plain_class for layer in layers.values()} == {FalconLinear}
    assert torch.equal(outputs(model), plain)
    progression, optimizer = Progression(model, 4), torch.optim.SGD(model.parameters(), 1e-2)
    progression.attach(optimizer)
    for step in range(4):
        progression.step(step)
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            model.save_pretrained(tmp_path / "middle")
            again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "middle")
            assert torch.equal(outputs(again), outputs(model))
    progression.step(4)
    for layer in layers.values():
        assert_binary(layer)
    frozen = outputs(model)
    assert not torch.equal(frozen, plain)

    model.save_pretrained(tmp_path / "training")
    pack_model(model).save_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(model), frozen)
    assert type(next(iter(binary_layers(model).values()))).__name__ == "PackedFalconLinear"
    again = copy.deepcopy(model)
    assert torch.equal(outputs(again), frozen) and torch.equal(outputs(unpack_model(again)), frozen)
    torch.save(model, tmp_path / "whole.pt")
    torch.save(frozen, tmp_path / "frozen.pt")
    code = f"""
        import torch, stompp_hf
        from transformers import AutoModelForCausalLM
        ids, frozen = torch.arange(2, 34).reshape(4, 8), torch.load({str(tmp_path / "frozen.pt")!r})
        models = [torch.load({str(tmp_path / "whole.pt")!r}, weights_only=False)]
        models += [AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + part) for part in ("/training", "/packed")]
        with torch.no_grad():
            assert all(torch.equal(model(ids).logits, frozen) for model in models)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    restore_model(model)
    assert sum(type(module) is FalconLinear for module in model.modules()) == 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 3, 1), Initialized(3, 4, 3, padding=1)
        self.depth, self.mix, self.head = EfficientNetDepthwiseConv2d(4), Transposed(4, 4), OtherWords(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(torch.tanh(self.body(self.stem(x)))).mean((2, 3))
        return self.head(hidden_states=torch.tanh(self.mix(x)))  # type: ignore[no-any-return]


def test_convolutions_and_conv1d() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = binarize_model(Net(), StoMPPConfig(head="binarize"), example_inputs=x).eval()
    assert [entry.name for entry in get_plan(model).entries] == ["body", "depth", "mix", "head"]
    assert isinstance(model.mix, BinaryConv1D)
    assert torch.equal(model(x), Net()(x))
    Progression(model, 1).step(1)
    frozen = calibrate(model, [x])(x)
    assert torch.equal(pack_model(model)(x), frozen)
    restore_model(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in Net().modules()]


def test_weight_standardized_models_say_why_they_stay_real() -> None:
    config = hf.BitConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=2)
    with pytest.raises(NothingToBinarizeError, match=r"WeightStandardizedConv2d has no binary class .*something else"):
        binarize_model(hf.BitModel(config))
