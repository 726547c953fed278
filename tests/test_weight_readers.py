"""Whoever computes with a layer's weight past the layer: found before anything is converted, refused once frozen."""

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fusion

from stompp_hf import BinaryLinear, Progression, StoMPPConfig, binarize_model, calibrate, get_plan, pack_model
from stompp_hf.errors import PatternError, WeightError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


# ---- found by the probe ----


class Block(nn.Module):
    """Two linear layers; how they are computed differs by class."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class FusedWithoutHooks(Block):
    """As torch's encoder layer does it: in evaluation past the layers, unless somebody hooks them."""

    def forward(self, x: Tensor) -> Tensor:
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        if self.training or torch.is_grad_enabled() or hooked:
            return super().forward(x)
        return x + F.linear(torch.tanh(F.linear(x, self.a.weight, self.a.bias)), self.b.weight, self.b.bias)


class ReadTwice(Block):
    """Calls a layer, and computes with its weight as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x @ self.a.weight.detach().t()


class Normed(Block):
    """Goes by the size of a weight, in a way that no NaN comes through."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if bool(self.b.weight.norm() > 0.1) else 1)


class Suspicious(Block):
    """Raises on a weight that is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool(self.a.weight.isfinite().all()):
            raise ValueError("not finite")
        return super().forward(x)


class OnlyLooks(Block):
    """Asks a weight for what is no number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.a.weight.dtype)[:, : self.b.weight.shape[1]])


class Random(Block):
    """Draws while it evaluates: from torch's state, which each run of the probe has anew."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(x.shape)


class NeverTheSame(Block):
    """Gives something else in each run."""

    def forward(self, x: Tensor) -> Tensor:
        self.runs = [*getattr(self, "runs", [0.0]), random.SystemRandom().random()]
        return super().forward(x) + self.runs[-1]


def stack(*kinds: type) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(kind() for kind in kinds)), nn.Linear(8, 2))


READERS = [
    (FusedWithoutHooks, {"a", "b"}),
    (ReadTwice, {"a"}),
    (Normed, {"b"}),
    (Suspicious, {"a"}),
    (OnlyLooks, set()),
    (Random, set()),
    (NeverTheSame, set()),
]


@pytest.mark.parametrize(("kind", "read"), READERS)
def test_readers_are_found(kind: type, read: set[str], caplog: pytest.LogCaptureFixture) -> None:
    model = stack(Block, kind, Block)
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        binarize_model(model, StoMPPConfig(), example_inputs=X)
    plan = get_plan(model)
    left = {f"1.1.{name}" for name in read}
    assert {entry.name for entry in plan.entries} == {f"1.{i}.{name}" for i in range(3) for name in "ab"} - left
    for name in left:
        assert plan.left[name].startswith("bypassed: its weight moved the model's output")
        assert type(model.get_submodule(name)) is nn.Linear
    said = [record.message for record in caplog.records if "computes with their weights" in record.message]
    assert bool(said) == bool(read) and all(name in said[0] for name in left)


def test_what_reads_a_weight_only_with_a_cache() -> None:
    """RecurrentGemma calls its convolution on a prompt, and computes with its weight from the second token on."""
    config = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "lru_width": 32}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_window_size": 16}
    torch.manual_seed(0)
    model = hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(**config)).float()
    binarize_model(model, StoMPPConfig())
    read = {name: reason for name, reason in get_plan(model).left.items() if name.endswith("conv_1d")}
    assert len(read) == 2 and all(reason.startswith("bypassed: its weight moved") for reason in read.values())
    ids = torch.arange(3, 19).reshape(2, 8)
    commit(model, {"input_ids": ids}).eval()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    made = model.generate(ids, return_dict_in_generate=True, **options)
    with torch.no_grad():
        whole = model(made.sequences, use_cache=False).logits
    torch.testing.assert_close(torch.stack(made.logits, 1), whole[:, 7:10])


def test_inputs_that_grow_are_given_anew() -> None:
    class Caching(Block):
        def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
            cache.append(x)
            return super().forward(torch.stack(cache).sum(0))

    inputs = {"x": X, "cache": []}
    plan = get_plan(binarize_model(Caching(), StoMPPConfig(first_layer="binarize", head="binarize"), inputs))
    assert [entry.name for entry in plan.entries] == ["a", "b"]


class Counting(nn.Module):
    """Leaves all kinds of things behind; in the `fail`th run it raises."""

    def __init__(self, fail: int = 0) -> None:
        super().__init__()
        self.inner, self.fail, self.runs, self.kept = stack(Block, ReadTwice), fail, [0], None
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("table", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.runs[0] += 1
        self.replaced, self.kept = self.replaced + 1, x
        self.table[0] += random.random() + numpy.random.rand()
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)
        x = self.inner[1](self.inner[0](x)) + torch.rand(8)
        if self.runs[0] == self.fail:
            raise RuntimeError("in the middle")
        return self.inner[2](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fail", range(8))
def test_the_probe_leaves_nothing_behind(fail: int) -> None:
    """Whether it goes through, or the model raises, in whichever run."""
    torch.manual_seed(0)
    model = Counting(fail).train()
    model.inner[1].eval()
    replaced = model.inner[1][0].a
    replaced.forward = replaced.forward  # as accelerate does it; it stays in the instance
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = [(layer, layer.weight, layer.weight.data_ptr(), layer.weight.clone()) for layer in layers]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    attributes = {module: dict(vars(module)) for module in model.modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes()
    config = StoMPPConfig(target_modules=["nothing"])  # refused, after the probe
    raised: list[str] = []
    try:
        binarize_model(model, config, example_inputs=X)
    except Exception as error:
        raised.append(str(error))
    assert len(raised) == 1 and model.runs[0] >= max(1, fail)
    assert ("in the middle" in raised[0]) == (fail in (1, 3))  # the others count as a look at NaN
    for layer, weight, address, value in weights:
        assert layer.weight is weight and weight.data_ptr() == address and torch.equal(weight, value)
    for name, (buffer, value) in buffers.items():
        assert model.get_buffer(name) is buffer and torch.equal(buffer, value)
    for module, before in attributes.items():
        assert vars(module) == before
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == states[1:]


# ---- weights that are none ----


class Quantized(Tensor):
    """A tensor subclass, as torchao's are."""


class Params4bit(nn.Parameter):
    """A subclass of Parameter, as bitsandbytes has it."""


def test_weights_that_have_no_signs_stay_real() -> None:
    layers = [nn.Linear(8, 8) for _ in range(5)]
    layers[1].weight = nn.Parameter(layers[1].weight.detach().as_subclass(Quantized))
    layers[2].weight = Params4bit(layers[2].weight.detach())
    layers[3].weight = nn.Parameter(layers[3].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    for layer in layers[1:4]:
        layer.forward = lambda x: x
    with pytest.warns(UserWarning, match="zero-element"):
        empty = [nn.Linear(8, 0), nn.Linear(0, 8)]
    model = nn.Sequential(*layers[:4], nn.LazyLinear(8), *empty, layers[4], nn.Linear(8, 2))
    plan = get_plan(binarize_model(model, StoMPPConfig(), example_inputs=X))
    assert [entry.name for entry in plan.entries] == ["7"]
    for name, reason in {
        "1": "its weight is a Quantized",
        "2": "its weight is a Params4bit",
        "3": "its weight is stored as torch.float8_e4m3fn",
        "4": "its weight is a UninitializedParameter",
        "5": "its weight is empty, of shape (0, 8)",
        "6": "its weight is empty, of shape (8, 0)",
    }.items():
        assert plan.left[name].startswith(reason) and not isinstance(model.get_submodule(name), BinaryLinear)
    with pytest.warns(UserWarning, match="zero-element"):
        kernel = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 0, 1), nn.Conv2d(4, 4, 1))
    kernel[1].forward = lambda x: x
    with pytest.raises(PatternError, match=r"its weight is empty, of shape \(0, 4, 1, 1\)"):
        binarize_model(kernel, StoMPPConfig(target_modules=["1"]), example_inputs=torch.ones(1, 3, 4, 4))


# ---- refused once frozen ----


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    conv = nn.Sequential(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 2))
    for norm in (linear[2], conv[2]):
        norm.weight.data.uniform_(-2, 2)
        norm.running_mean.uniform_(-1, 1)
    binarize_model(linear, StoMPPConfig(), example_inputs=X)
    binarize_model(conv, StoMPPConfig(), example_inputs=X.unsqueeze(1))
    return linear.eval(), conv.eval()


def commit(model: nn.Module, x: Any) -> nn.Module:
    Progression(model, 1).step(1)
    return calibrate(model, [x])


def quantize_as_quanto_does(model: nn.Module) -> None:
    """What optimum-quanto's quantize() does to every nn.Linear, by isinstance."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            real = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            with torch.no_grad():
                real.weight.copy_(module.weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, real)
            for key, _ in list(module.named_parameters()):
                setattr(module, key, None)  # "save device memory by clearing parameters"


def quantize_as_torchao_does(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantized), requires_grad=False)


FOREIGN: list[Callable[[nn.Module], Any]] = [
    lambda model: fusion.fuse_linear_bn_eval(model[1], model[2]),
    quantize_as_quanto_does,
    quantize_as_torchao_does,
    lambda model: setattr(model[1], "weight", nn.Parameter(torch.ones(8, 8))),
    lambda model: setattr(model[1], "weight", None),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_frozen_weight_is_not_replaced(foreign: Callable[[nn.Module], Any], packed: bool) -> None:
    model = commit(nets()[0], X)
    model = pack_model(model) if packed else model
    with pytest.raises((WeightError, AttributeError), match=r"frozen|read-only"):
        foreign(model)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_norm_is_not_folded_into_frozen_latents(packed: bool) -> None:
    model = commit(nets()[1], X.unsqueeze(1))
    model = pack_model(model) if packed else model
    with pytest.raises(WeightError, match=r"weight was to be replaced in a frozen .*fuse_for_inference"):
        fusion.fuse_conv_bn_eval(model[1], model[2])


FOLDS = (fusion.fuse_linear_bn_eval, fusion.fuse_conv_bn_eval)


def test_in_transition_it_is_refused_too_and_pending_it_is_right() -> None:
    for model, x, fuse in zip(nets(), (X, X.unsqueeze(1)), FOLDS, strict=True):
        inner = model[0](x)
        torch.testing.assert_close(fuse(model[1], model[2])(inner), model[2](model[1](inner)))
        progression = Progression(model, 10)
        for step in range(5):
            progression.step(step)
            model.train()(x)
        with pytest.raises(WeightError):
            fuse(model.eval()[1], model[2])


def test_who_leaves_binary_layers_alone() -> None:
    model = commit(nets()[0], X)
    expected = model[1](model[0](X)).detach()
    with pytest.warns((UserWarning, DeprecationWarning)):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantized[1]) is BinaryLinear and torch.equal(quantized[1](model[0](X)), expected)
    with pytest.raises(AssertionError):
        torch.ao.nn.qat.Linear.from_float(model[1])
    with pytest.raises(RuntimeError, match="weight_scale"):
        nn.Linear(8, 8).load_state_dict(model[1].state_dict())


def test_what_may_still_be_done_with_a_frozen_weight() -> None:
    model, other = commit(nets()[0], X), commit(nets()[0], X + 1)
    layer = model[1]
    layer.weight = layer.weight
    layer.weight = nn.Parameter(layer.weight.detach().clone())  # the same, elsewhere
    layer.bias = nn.Parameter(torch.zeros(8))
    with torch.no_grad():
        layer.weight.neg_()
        for module in other.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.mul_(-2)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(model(X), other(X))
    again = torch.func.functional_call(model, {"1.weight": -layer.weight}, (X,))
    assert not torch.equal(again, model(X)) and not vars(layer).get("_is_loading")
