"""Activations and dropouts right before binary layers: absorbed, kept, dropped, shifted, paused, and put back."""

import copy
import logging
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vision
from models import logits, quick, same_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, set_seed
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutput

from stompp_hf import Progression, StoMPPConfig, binarize_model, get_plan, report, restore_model
from stompp_hf.errors import CheckpointError
from stompp_hf.method.mixing import hard
from stompp_hf.modules.activations import DROPPABLE, Bypassed, Changed, Paused
from stompp_hf.surgery.members import binary_layers

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
KINDS = [nn.ReLU, nn.ReLU6, nn.Hardswish]
STEPS = 8
EVERYWHERE = {"first_layer": "binarize", "head": "binarize", "end": 1.0}
Use = Callable[[Any, Tensor, Tensor], Any]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """Convolutions (and one linear layer), of which `first` and `last` stay real, and parts by name.

    `use` says what becomes of u = 3 first(x) and of h = act(u); without an `act`, h is u.
    """

    def __init__(self, use: Use, **parts: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("first", "a", "b", "c", "last"):
            self.add_module(name, nn.Conv2d(8, 8, 3, padding=1))
        self.linear = nn.Linear(6, 6)
        for name, part in parts.items():
            self.add_module(name, part())
        self.use = use

    def forward(self, x: Tensor) -> Any:
        u = 3 * self.first(x)  # beyond the edges of ReLU6 and Hardswish
        return self.use(self, u, self.act(u) if hasattr(self, "act") else u)


def pair(use: Use, options: dict[str, Any] | None = None, **parts: Callable[[], nn.Module]) -> tuple[Net, Net]:
    """A binarized net and a plain one with the same weights."""
    chosen = {**EVERYWHERE, "exclude_modules": ["first", "last"], "refresh_rate": 2, **(options or {})}
    return binarize_model(Net(use, **parts), StoMPPConfig(**chosen), X), Net(use, **parts)


def tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for o in (outputs.values() if hasattr(outputs, "values") else outputs) for t in tensors(o)]


def assert_same(model: nn.Module, plain: nn.Module, rounded: bool = False) -> None:
    """Outputs and gradients, in training (with one random state) and in evaluation, bit for bit: invariant 1.

    `rounded`: gradients up to rounding; f'(u) g + f'(u) h of two readers is (g + h) f'(u) in the plain model.
    """
    results = []
    for network in (model, plain):
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        outputs = tensors(network.train()(x))
        sum(output.square().sum() for output in outputs).backward()
        found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None and "rprelu" not in name}
        results.append(
            ({**found, "x": x.grad}, {str(i): t for i, t in enumerate(outputs + tensors(network.eval()(X)))})
        )
    (gradients, outputs), (plain_gradients, plain_outputs) = results
    assert same_tensors(outputs, plain_outputs) == []
    if rounded:
        torch.testing.assert_close(gradients, plain_gradients)
    else:
        assert same_tensors(gradients, plain_gradients) == []


def changes(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """What became of activations, and which layer absorbed what; the modules agree with the plan and the report."""
    plan = get_plan(model)
    assert {name for name, module in model.named_modules() if isinstance(module, Bypassed)} == plan.bypassed.keys()
    entries = {entry.name: entry.absorbed for entry in plan.entries}
    assert entries == {name: layer.absorbed for name, layer in binary_layers(model).items()}
    text = {"absorbed": "absorbed into the layers they feed: ", "dropped": "dropped: "}
    for how in set(plan.bypassed.values()):
        listed = ", ".join(name for name, what in plan.bypassed.items() if what == how)
        assert f"\n  activations {text[how]}{listed}\n" in report(model)
    return plan.bypassed, {name: kind for name, kind in entries.items() if kind is not None}


# ---- what is absorbed: an activation that binary layers alone read, every one of them always ----


ABSORBED: dict[str, Use] = {
    "straight": lambda m, u, h: m.last(m.a(h)),
    "fork": lambda m, u, h: m.last(m.a(h) + m.b(h)),
    "shared": lambda m, u, h: m.last(m.b(m.act(m.a(h)))),  # one module at two places
    "linear": lambda m, u, h: m.last(m.linear(h)),
    "twice": lambda m, u, h: m.last(m.a(m.act(m.a(h)))),  # one layer at two places, behind the same kind both times
}
NOT_ABSORBED: dict[str, Use] = {
    "added": lambda m, u, h: m.last(m.a(h) + h),
    "read-by-a-real-layer": lambda m, u, h: m.a(h) + m.last(h),
    "returned": lambda m, u, h: (m.last(m.a(h)), {"features": [h]}),
    "returned-in-a-mapping": lambda m, u, h: UserDict(result=m.last(m.a(h)), features=h),
    "returned-by-name": lambda m, u, h: BaseModelOutput(m.last(m.a(h)), (h,)),
    "shared-with-a-real-layer": lambda m, u, h: m.last(m.act(m.a(h))),
    "sometimes-without": lambda m, u, h: m.last(m.a(h) + m.a(-u)),
    "reshaped": lambda m, u, h: m.last(m.a(h.flip(-1))),
    "averaged": lambda m, u, h: m.last(m.a(F.avg_pool2d(h, 2))),
    # `b` once reads no activation, so that `act` stays; then `a` is not always behind one that goes, and all stay
    "chained": lambda m, u, h: m.last(m.a(h) + m.b(h) + m.b(-u) + m.a(m.other(-u)) + m.c(m.other(-u))),
}
STRAIGHT, FORK, ADDED = ABSORBED["straight"], ABSORBED["fork"], NOT_ABSORBED["added"]


@every_kind
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("name", "readers"), [("straight", "a"), ("fork", "a b"), ("shared", "a b"), ("linear", "linear"), ("twice", "a")]
)
def test_absorbed(kind: type, inplace: bool, name: str, readers: str) -> None:
    model, plain = pair(ABSORBED[name], act=lambda: kind(inplace=inplace))
    assert changes(model) == ({"act": "absorbed"}, dict.fromkeys(readers.split(), kind.__name__))
    assert_same(model, plain, rounded=kind is nn.Hardswish and name == "fork")


@every_kind
@pytest.mark.parametrize("use", NOT_ABSORBED.values(), ids=NOT_ABSORBED.keys())
def test_not_absorbed(kind: type, use: Use) -> None:
    model, plain = pair(use, act=kind, other=kind)
    assert changes(model) == ({}, {}) and "absorbed" not in report(model)
    assert_same(model, plain)


RARE: dict[str, tuple[Use, dict[str, Any], dict[str, Callable[[], nn.Module]]]] = {
    "across-a-dropout": (lambda m, u, h: m.last(m.a(m.drop(h))), {}, {"act": nn.ReLU6, "drop": nn.Dropout}),
    "read-by-another": (lambda m, u, h: m.last(m.a(h) + m.other(h)), {}, {"act": nn.ReLU, "other": nn.Hardswish}),
    "read-by-a-pool-with-indices": (
        lambda m, u, h: (m.last(m.a(h)), m.pool(h)[0]),
        {}, {"act": nn.ReLU, "pool": lambda: nn.MaxPool2d(2, return_indices=True)},
    ),
    "on-a-view": (lambda m, u, h: m.last(m.a(m.inside(u.view_as(u)))) + u, {}, {"inside": lambda: nn.ReLU(True)}),
    "on-a-vector": (
        lambda m, u, h: m.last(m.a(u * m.inside(u.mean((1, 2, 3))).reshape(4, 1, 1, 1))), {}, {"inside": nn.ReLU}
    ),
    "two-widths-to-shift": (
        lambda m, u, h: m.last(m.a(m.act(m.back(m.act(m.out(u)))))), {"relu": "rprelu"},
        {"act": nn.ReLU, "out": lambda: nn.Conv2d(8, 16, 1), "back": lambda: nn.Conv2d(16, 8, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RARE)
def test_rare_paths(name: str) -> None:
    use, options, parts = RARE[name]
    model, plain = pair(use, options, **parts)
    assert changes(model) == ({}, {}) and not get_plan(model).shifted
    assert_same(model, plain)


@every_kind
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_padding_with_zero_commutes(kind: type, value: float) -> None:
    """As MobileNetV2 pads in TensorFlow's way: a function stands between the activation and its reader."""
    model, plain = pair(lambda m, u, h: m.last(m.a(F.pad(h, (0, 1, 0, 1), value=value))), act=kind)
    assert changes(model)[0] == ({"act": "absorbed"} if value == 0.0 else {})
    assert_same(model, plain)


@every_kind
def test_a_maximum_commutes_with_what_never_falls(kind: type) -> None:
    for relu, what in (("drop", "dropped"), ("absorb", "absorbed")):
        parts = {"act": kind, "pool": lambda: nn.MaxPool2d(3, 2, 1)}
        model, plain = pair(lambda m, u, h: m.last(m.a(m.pool(h))), {"relu": relu}, **parts)
        assert changes(model)[0] == ({} if kind is nn.Hardswish else {"act": what})
    assert_same(model, plain)


Relu = type("Relu", (nn.ReLU,), {"forward": lambda self, x: F.leaky_relu(x)})
Pool = type("Pool", (nn.MaxPool2d,), {"forward": lambda self, x: -F.max_pool2d(x, 2)})


def patched() -> nn.Module:
    module = nn.ReLU()
    module.forward = lambda x: F.leaky_relu(x)
    return module


def test_activations_that_are_others_than_they_seem_stay() -> None:
    for use, parts in (
        (STRAIGHT, {"act": Relu}),
        (STRAIGHT, {"act": patched}),
        (lambda m, u, h: m.last(m.a(m.pool(h))), {"act": nn.ReLU, "pool": lambda: Pool(2)}),
        (lambda m, u, h: m.last(m.a(F.relu(u))), {}),
        (lambda m, u, h: m.last(m.a(h) + m.a(m.other(-u))), {"act": nn.ReLU, "other": nn.ReLU6}),
        (lambda m, u, h: m.last(m.a(h) + u), {"act": lambda: nn.ReLU(inplace=True)}),  # u holds what h does
    ):
        model, plain = pair(use, **parts)
        assert changes(model) == ({}, {})
        assert_same(model, plain)


def freeze(model: nn.Module) -> Progression:
    """Calibrate on X and go to the end of the progression."""
    progression = Progression(model, STEPS)
    progression.step(0)
    model.train()(X)
    progression.step(STEPS)
    return progression


@every_kind
def test_what_an_absorbing_layer_computes(kind: type) -> None:
    """Starting values are those of f(u); once frozen, the levels are {0, 2a}, and the sign is that of u - b."""
    model, plain = pair(STRAIGHT, act=kind)
    freeze(model)
    u = 3 * plain.first(X).detach()
    layer, seen = model.a, plain.act(u)
    assert layer.activation_offset == 1 and layer.activation_low < seen.min() and layer.activation_high > seen.max()
    assert 0 < layer.activation_scale < seen.max()
    a, b = layer.activation_scale, layer.activation_threshold.reshape(-1, 1, 1)
    codes = torch.where(u >= b, 2 * a, 0 * a)
    expected = plain.last(F.conv2d(codes, layer.binary_weight(), plain.a.bias, padding=1))
    torch.testing.assert_close(model.eval()(X), expected)


# ---- kept, dropped, shifted ----


def test_keep_and_weights_alone() -> None:
    for options in ({"relu": "keep"}, {"binarize": "weights"}, {"binarize": "nothing"}):
        model, plain = pair(FORK, options, act=nn.ReLU)
        assert changes(model) == ({}, {}) and not any(isinstance(m, Changed) for m in model.modules())
        assert_same(model, plain)


@pytest.mark.parametrize("kind", [*KINDS, nn.GELU, nn.SiLU, GELUActivation])
@pytest.mark.parametrize("name", [*ABSORBED, "added", "read-by-a-real-layer", "shared-with-a-real-layer"])
def test_drop(kind: type, name: str) -> None:
    """Where it feeds a binary layer, an activation goes for all that read it, and the input has two signs; else not."""
    model, plain = pair({**ABSORBED, **NOT_ABSORBED}[name], {"relu": "drop"}, act=kind, spare=kind)
    assert changes(model) == ({"act": "dropped"}, {}) and type(model.spare) is kind
    plain.act = nn.Identity()
    assert_same(model, plain)
    freeze(model)
    assert all(layer.activation_offset == 0 for layer in binary_layers(model).values())
    assert changes(pair(lambda m, u, h: m.last(m.act(m.a(u))), {"relu": "drop"}, act=kind)[0]) == ({}, {})


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.GELU])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_drop_in_front_of_a_dropout(kind: type, p: float) -> None:
    """As in timm's Mlp: activation, dropout, layer. ReLU(6) is not absorbed there, since a factor moves its edge."""
    use = lambda m, u, h: m.last(m.a(m.dropout(h)))  # noqa: E731
    model, plain = pair(use, {"relu": "drop"}, act=kind, dropout=lambda: nn.Dropout(p))
    assert changes(model) == ({"act": "dropped"}, {})
    plain.act = nn.Identity()
    assert_same(model, plain)
    assert changes(pair(use, act=kind, dropout=lambda: nn.Dropout(p))[0]) == ({}, {})


@pytest.mark.parametrize("kind", DROPPABLE)
def test_smooth_activations_stay_unless_they_are_dropped(kind: type) -> None:
    """Absorbed they would be thresholded elsewhere; dropped, their class can be pickled, and comes back."""
    model, plain = pair(STRAIGHT, act=lambda: made(kind))
    assert changes(model) == ({}, {}) and type(model.act) is kind
    assert_same(model, plain)
    model, plain = pair(STRAIGHT, {"relu": "drop"}, act=lambda: made(kind))
    assert changes(model) == ({"act": "dropped"}, {})
    assert type(pickle.loads(pickle.dumps(model.act))) is type(model.act) is not kind
    assert type(restore_model(model).act) is kind
    assert_same(model, plain)


def run_through(model: nn.Module) -> list[dict[str, Tensor]]:
    """Outputs, gradients and tensors while pending, in transition and frozen; and in evaluation."""
    progression, found = Progression(model, STEPS), []
    for step in (0, STEPS // 2, STEPS):
        progression.step(step)
        torch.manual_seed(1)
        model.zero_grad()
        outputs = tensors(model.train()(X))
        sum(output.square().sum() for output in outputs).backward()
        gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
        outputs += tensors(model.eval()(X))
        found.append({**gradients, **model.state_dict(), **{str(i): t.detach() for i, t in enumerate(outputs)}})
        found[-1] = {name: tensor.clone() for name, tensor in found[-1].items() if "stompp_state" not in name}
    model.zero_grad()
    return found


REPLACED = [*ABSORBED, "added", "read-by-a-real-layer", "returned", "shared-with-a-real-layer", "sometimes-without"]


@pytest.mark.parametrize("kind", [nn.GELU, lambda: nn.SiLU(inplace=True), GELUActivation])
@pytest.mark.parametrize("relu", ["absorb", "keep"])
@pytest.mark.parametrize("name", REPLACED)
def test_a_gelu_becomes_a_relu(name: str, relu: str, kind: Any) -> None:
    """The net computes what it would with a ReLU in its place, from the first step on, and is absorbed as that is."""
    use = {**ABSORBED, **NOT_ABSORBED}[name]
    model, plain = pair(use, {"gelu": "relu", "relu": relu}, act=kind, spare=kind)
    twin, _ = pair(use, {"relu": relu}, act=nn.ReLU, spare=nn.ReLU)
    absorbed = relu == "absorb" and name in ABSORBED
    assert get_plan(model).bypassed == {"act": "absorbed" if absorbed else "relu"}
    assert [e.absorbed for e in get_plan(model).entries] == [e.absorbed for e in get_plan(twin).entries]
    assert ("  activations that became ReLUs: act\n" in report(model)) != absorbed and type(model.spare) is type(kind())
    for own, theirs in zip(run_through(model), run_through(twin), strict=True):
        assert same_tensors(own, theirs) == []
    assert type(restore_model(model).act) is type(kind())
    plain.load_state_dict(model.state_dict())
    assert_same(model, plain)


@pytest.mark.parametrize("kind", DROPPABLE)
def test_every_smooth_activation_may_become_a_relu(kind: type) -> None:
    model, _ = pair(ADDED, {"gelu": "relu"}, act=lambda: made(kind))
    assert torch.equal(model.act(X), X.relu())
    assert type(pickle.loads(pickle.dumps(model.act))) is type(model.act) is not kind
    assert type(restore_model(model).act) is kind


def test_a_gelu_stays_where_it_feeds_no_binary_activation() -> None:
    for use, options in (
        (STRAIGHT, {}),
        (STRAIGHT, {"gelu": "relu", "binarize": "weights"}),
        (STRAIGHT, {"gelu": "relu", "binarize": "nothing"}),
        (lambda m, u, h: m.last(m.act(m.a(u))), {"gelu": "relu"}),
        (lambda m, u, h: m.last(m.a(h * u)), {"gelu": "relu"}),  # a gate
    ):
        model, plain = pair(use, options, act=nn.GELU)
        assert changes(model) == ({}, {})
        assert_same(model, plain)


def made(kind: type) -> nn.Module:
    """An activation with the arguments that it needs."""
    return kind(-10, 10) if kind.__name__ == "ClippedGELUActivation" else kind()


def test_plain_signs_of_a_far_negative_value_are_negative() -> None:
    """In float32 gelu(-6) is -0.0, which counts as +1: the paper's rule looks at the value before it."""
    assert torch.equal(F.gelu(torch.tensor([-6.0, -1.0, 1.0])).sign(), torch.tensor([0.0, -1.0, 1.0]))
    for relu, sign in (("keep", 1.0), ("drop", -1.0)):
        options = {"exclude_modules": ["first", "last"], "first_layer": "binarize", "relu": relu}
        model = binarize_model(Net(STRAIGHT, act=nn.GELU), StoMPPConfig.paper(**options), X)
        freeze(model)
        with torch.no_grad():
            found = model.a(model.act(torch.full((1, 8, 3, 3), -6.0)))
            wanted = F.conv2d(torch.full((1, 8, 3, 3), sign), hard(model.a.weight), model.a.bias, padding=1)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("use", [STRAIGHT, ADDED])
def test_shifted_relus_are_relus_at_the_start(use: Use) -> None:
    model, plain = pair(use, {"relu": "rprelu"}, act=nn.ReLU, other=nn.ReLU)
    assert get_plan(model).shifted == {"act": ["a"]}
    assert not any(get_plan(pair(use, {"relu": "rprelu"}, act=kind)[0]).shifted for kind in KINDS[1:])
    assert "\n  ReLUs with learnable shifts (RPReLU): act\n" in report(model)
    assert_same(model, plain)
    model.load_state_dict(plain.state_dict(), strict=True)  # a plain checkpoint lacks what was added, and fits
    with torch.no_grad():
        for name, value in (("shift", 0.5), ("slope", 0.25), ("bias", -1.0)):
            getattr(model.act, f"rprelu_{name}")[0] = value
    values = torch.tensor([2.0, -1.5]).reshape(2, 1, 1, 1).expand(2, 8, 1, 1)
    assert model.act(values)[:, :2].flatten().tolist() == [0.5, 2.0, -1.5, 0.0]
    assert type(restore_model(model).act) is nn.ReLU and list(model.state_dict()) == list(plain.state_dict())
    assert_same(model, plain)


# ---- dropouts ----


def dropped_out(m: Any, u: Tensor, h: Tensor) -> Tensor:
    h = m.drop(torch.tanh(h))
    return m.last(m.a(h) + m.b(h)) + m.free(u)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_a_dropout_stops_as_soon_as_a_reader_has_frozen_entries(kind: type) -> None:
    parts = {"drop": lambda: kind(0.5), "free": lambda: kind(0.5)}
    model, plain = pair(dropped_out, {"order": ["b", "a"], "stages": "module"}, **parts)
    assert get_plan(model).paused == {"drop": ["a", "b"]} and type(model.free) is kind
    assert "\n  dropouts that stop once a layer they feed freezes: drop\n" in report(model)
    progression = Progression(model, STEPS)
    assert_same(model, plain)
    progression.step(0)  # in transition, with nothing frozen yet
    assert model.b.stage_state == "transition"
    assert_same(model, plain)
    model.train()
    for step in (1, STEPS // 2, STEPS):
        progression.step(step)
        model(X)
        state = torch.get_rng_state()
        assert torch.equal(model.drop(X), X) and torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(model.free(X), X)  # it feeds no binary layer


def test_dropouts_before_real_activations_go_on() -> None:
    for options in ({"binarize": "weights"}, {"exclude_modules": ["first", "last", "a", "b"]}):
        model, _ = pair(lambda m, u, h: dropped_out(m, m.c(u), h), options, drop=nn.Dropout, free=nn.Dropout)
        assert get_plan(model).paused == {} and type(model.drop) is nn.Dropout
    assert get_plan(pair(dropped_out, drop=lambda: nn.Dropout(0.0), free=nn.Dropout)[0]).paused == {}


# ---- put back, carried about ----


@pytest.mark.parametrize("relu", ["absorb", "drop", "rprelu"])
def test_restore_puts_everything_back(relu: str) -> None:
    parts = {"act": lambda: nn.ReLU(True), "drop": lambda: nn.Dropout2d(0.2)}
    model, plain = pair(lambda m, u, h: m.last(m.a(m.drop(h))), {"relu": relu}, **parts)
    assert sum(isinstance(module, Changed) for module in model.modules()) == 2
    freeze(model).detach()
    assert restore_model(model) is model
    for name, module in plain.named_modules():
        assert type(model.get_submodule(name)) is type(module)
        assert vars(model.get_submodule(name)).keys() == vars(module).keys()
    assert_same(model, plain)


def test_a_deepcopy_has_its_own_readers() -> None:
    model, _ = pair(dropped_out, drop=nn.Dropout, free=nn.Dropout)
    twin = copy.deepcopy(model)
    assert [id(reader) for reader in twin.drop.readers] == [id(twin.a), id(twin.b)]
    freeze(twin)
    assert torch.equal(twin.drop(X), X) and not torch.equal(model.train().drop(X), X)
    assert not list(model.drop.children()) and list(model.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("resnet", {"relu": relu}) for relu in ("absorb", "drop", "rprelu")],
        ("wav2vec2", {}),
        *[("vit", {"relu": relu, "gelu": "relu"}) for relu in ("absorb", "keep")],
    ],
)
def test_save_and_reload(name: str, options: dict[str, str], tmp_path: Path) -> None:
    case = vision.CASES[name]
    model = binarize_model(case.build(), quick(**options))
    progression = Progression(model, STEPS)
    progression.step(0)
    model(**case.batch())
    progression.step(1)
    progression.detach()
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "rprelu" in n):
            parameter += 0.1
    model.save_pretrained(tmp_path)
    reload, base = case.auto.from_pretrained(tmp_path).train(), AutoModel.from_pretrained(tmp_path)
    plan, prefix = get_plan(model), f"{model.base_model_prefix}."
    assert get_plan(reload) == plan and (plan.bypassed or plan.paused or plan.shifted)
    for changed in ("bypassed", "paused", "shifted"):
        assert getattr(get_plan(base), changed).keys() == {n.removeprefix(prefix) for n in getattr(plan, changed)}
    for network in (model, reload, base):
        there, found = get_plan(network), {n for n, module in network.named_modules() if isinstance(module, Changed)}
        assert found == {*there.bypassed, *there.paused, *there.shifted}
        for dropout in (module for module in network.modules() if isinstance(module, Paused)):
            assert all(any(reader is module for module in network.modules()) for reader in dropout.readers)
    inputs = {key: value for key, value in case.batch().items() if key != "labels"}
    with torch.no_grad():
        hidden = [m.eval()(**inputs).last_hidden_state for m in (base, getattr(model, model.base_model_prefix))]
    results = []
    for network in (model.train(), reload):
        set_seed(0)
        results.append([network(**case.batch()).logits, logits(network, case.batch())])
    assert all(map(torch.equal, *results)) and torch.equal(*hidden)


# ---- signs that say nothing ----

DEAD = "layers was never negative in the probe, so that its sign says nothing: "


def warnings_of(caplog: pytest.LogCaptureFixture, use: Use, options: dict[str, Any], act: type) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        pair(use, {**options, "exclude_modules": ["first", "last"]}, act=act)
    return [record.message for record in caplog.records if "never calls" not in record.message]


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Softplus, nn.GELU, nn.Tanh, nn.ReLU])
def test_dead_signs_are_reported(act: type, caplog: pytest.LogCaptureFixture) -> None:
    """A ReLU is dropped by paper(), and GELU has small negative values, whose signs do say something."""
    found = warnings_of(caplog, STRAIGHT, StoMPPConfig.paper().to_dict(), act)
    if act in (nn.Sigmoid, nn.Softplus):
        (message,) = found
        assert f"the input of 1 {DEAD}a (after {act.__name__}). Use activation_levels='auto'" in message
    else:
        assert found == []
    assert not any(warnings_of(caplog, STRAIGHT, o, act) for o in ({}, {"relu": "keep"}, {"binarize": "weights"}))


def test_dead_signs_behind_relus_that_stay(caplog: pytest.LogCaptureFixture) -> None:
    symmetric = {"activation_levels": "symmetric"}
    for use, options, expected in (
        (FORK, {**symmetric, "relu": "keep"}, f"2 {DEAD}a (after ReLU), b (after ReLU). "),
        (FORK, symmetric, None),  # absorbed
        (ADDED, symmetric, f"1 {DEAD}a (after ReLU). "),
        (lambda m, u, h: m.last(m.a(F.relu(u)) + m.b(u)), symmetric, f"1 {DEAD}a (after "),
    ):
        found = warnings_of(caplog, use, options, nn.ReLU)
        assert len(found) == (expected is not None) and all(expected in message for message in found)


def test_a_relu_in_place_of_a_gelu_has_one_sign(caplog: pytest.LogCaptureFixture) -> None:
    options = {"activation_levels": "symmetric", "gelu": "relu", "relu": "keep"}
    (message,) = warnings_of(caplog, STRAIGHT, options, nn.GELU)
    assert f"1 {DEAD}a (after GELU). " in message
    assert not warnings_of(caplog, STRAIGHT, {**options, "relu": "absorb"}, nn.GELU)


def test_a_missing_rprelu_parameter_is_named(tmp_path: Path) -> None:
    case = vision.CASES["resnet"]
    model = binarize_model(case.build(), quick(relu="rprelu"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("rprelu_slope"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{gone} is missing in the checkpoint"):
        case.auto.from_pretrained(tmp_path)
