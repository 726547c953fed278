"""What must hold for every vision, speech and image-text architecture: as test_architectures.py, for convolutions."""

import math
from pathlib import Path

import pytest
import torch
from models import assert_binary, first_calls, logits, plain_names, quick, same_tensors, scores, train
from torch import Tensor, nn
from transformers import CLIPModel, set_seed
from vision import CASES, Case

from stompp_hf import BinaryLayer, Progression, StoMPPConfig, binarize_model, get_plan
from stompp_hf.modules.activations import Bypassed, Paused
from stompp_hf.surgery.members import binary_layers

STEPS, MIDDLE = 8, 3
RESNETS = ("resnet", "resnet-bottleneck")
every_architecture = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# ---- invariant 1: nothing changes at the start ----


@every_architecture
def test_nothing_changes_at_the_start(case: Case) -> None:
    batch, plain, model = case.batch(), case.build(), case.build()
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    assert binarize_model(model) is model
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(model.get_buffer(name), buffer) for name, buffer in buffers.items())
    assert torch.equal(logits(model, batch), logits(plain, batch))
    outputs, gradients = [], []
    for network in (model, plain):  # with dropout, masked time steps, stochastic depth, and statistics of the batch
        set_seed(1)
        outputs.append(network(**batch))
        outputs[-1].loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert torch.equal(scores(outputs[0]), scores(outputs[1])) and torch.equal(outputs[0].loss, outputs[1].loss)
    assert same_tensors(*gradients) == []
    assert same_tensors({n: model.get_buffer(n) for n in buffers}, dict(plain.named_buffers())) == []

    after = dict(model.named_parameters())
    assert plain_names(after) == list(parameters)
    assert {name: id(after[name]) for name in parameters} == parameters
    assert {name: id(module) for name, module in model.named_modules()} == modules

    other = case.build(seed=1)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(logits(model, batch), logits(other, batch))


# ---- which layers, in which order, and why the others not ----


@every_architecture
def test_layers_stages_and_reasons(case: Case) -> None:
    plain = case.build()
    order = first_calls(plain, case.batch())
    kinds = {name: type(module).__name__ for name, module in plain.named_modules()}
    model = binarize_model(case.build())
    plan = get_plan(model)
    names = [entry.name for entry in plan.entries]
    assert len(names) == len(set(names)) == case.layers
    assert names == [name for name in order if name in names] == [*binary_layers(model)]
    assert set(names) == {name for name, module in model.named_modules() if isinstance(module, BinaryLayer)}
    assert plan.stage_count == case.stages == len(set(plan.stage_names))
    assert all(f"{entry.name}.".startswith(f"{entry.stage_name}.") for entry in plan.entries)
    assert plan.left.keys() == case.left.keys()
    for name, reason in case.left.items():
        assert reason in plan.left[name] and type(model.get_submodule(name)).__name__ == kinds[name]

    assert list(plan.bypassed.values()) == ["absorbed"] * case.absorbed and plan.paused.keys() == case.paused
    changed = {name for name, module in model.named_modules() if isinstance(module, (Bypassed, Paused))}
    assert changed == {*plan.bypassed, *plan.paused}
    assert sum(layer.absorbed is not None for layer in binary_layers(model).values()) == case.absorbed


def test_an_image_encoder_freezes_as_it_runs_and_wav2vec2_after_its_convolutions() -> None:
    clip = [entry.name.partition(".")[0] for entry in get_plan(binarize_model(CASES["clip"].build())).entries]
    assert clip == ["vision_model"] * 12 + ["text_model"] * 12
    names = get_plan(binarize_model(CASES["wav2vec2"].build())).stage_names
    convolutions = [f"wav2vec2.feature_extractor.conv_layers.{index}" for index in (1, 2)]
    layers = [f"wav2vec2.encoder.layers.{index}" for index in (0, 1)]
    assert names == [*convolutions, "wav2vec2.feature_projection.projection", *layers]


def test_one_tower_of_clip_alone() -> None:
    tower = CLIPModel(CASES["clip"].config()).vision_model
    binarize_model(tower)
    assert len(binary_layers(tower)) == 12 and get_plan(tower).left.keys() == {"embeddings.patch_embedding"}


# ---- two steps, a whole progression, saving on the way ----


@every_architecture
@pytest.mark.parametrize("regime", ["zero", "ste"])
def test_two_steps_reach_every_layer(case: Case, regime: str) -> None:
    model = binarize_model(case.build(), quick(frozen_gradient=regime))
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    assert all(math.isfinite(loss) for loss in train(model, case, 0, 2, total=5 * case.stages))  # windows of 4 steps
    after = model.state_dict()
    assert {layer.stage_state for layer in binary_layers(model).values()} == {"transition", "pending"}
    for name, layer in binary_layers(model).items():
        assert not torch.equal(layer.weight, before[f"{name}.weight"])
        # Calibrated where its window has opened, untouched where not.
        same = torch.equal(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"])
        assert same == (layer.stage_state == "pending") and layer.activation_ready == (not same)
    for name in case.left:  # what stays real learns, too
        module = model.get_submodule(name)
        if "weight" in module._parameters:
            assert not torch.equal(module.weight, before[f"{name}.weight"])


@every_architecture
def test_training_to_the_end_and_saving_on_the_way(case: Case, tmp_path: Path) -> None:
    model, batch = binarize_model(case.build(), quick()), case.batch(77)
    losses = train(model, case, 0, MIDDLE, STEPS)
    assert "transition" in {layer.stage_state for layer in binary_layers(model).values()}

    middle = logits(model, batch)
    model.save_pretrained(tmp_path / "middle")
    reload = case.auto.from_pretrained(tmp_path / "middle")
    assert type(reload) is type(model) and torch.equal(logits(reload, batch), middle)
    assert get_plan(reload) == get_plan(model) and same_tensors(reload.state_dict(), model.state_dict()) == []
    losses += train(model, case, MIDDLE, STEPS, STEPS)
    assert train(reload, case, MIDDLE, STEPS, STEPS) == losses[MIDDLE:]
    assert same_tensors(reload.state_dict(), model.state_dict()) == []

    assert all(math.isfinite(loss) for loss in losses) and Progression(model, STEPS).is_complete()
    for layer in binary_layers(model).values():
        assert layer.stage_state == "frozen" and layer.weight_mask is None and layer.activation_mask is None
        assert_binary(layer)
    end = logits(model, batch)
    assert torch.isfinite(end).all() and not torch.equal(end, middle)
    model.save_pretrained(tmp_path / "end")
    assert torch.equal(logits(case.auto.from_pretrained(tmp_path / "end"), batch), end)


# ---- without ReLUs: relu="drop", and the paper's rule ----


@pytest.mark.parametrize("name", RESNETS)
def test_dropped_relus(name: str, tmp_path: Path) -> None:
    """All go but the last one, which feeds the head: the stem's (through its max-pool) and those after additions."""
    case = CASES[name]
    model, plain = binarize_model(case.build(), quick(relu="drop")), case.build()
    relus = [name for name, module in plain.named_modules() if type(module) is nn.ReLU]
    gone = [relu for relu in relus if relu != "resnet.encoder.stages.1.layers.1.activation"]
    assert get_plan(model).bypassed == dict.fromkeys(gone, "dropped") and len(gone) == case.absorbed + 4
    for relu in gone:
        plain.get_submodule(relu).forward = lambda x: x
    assert torch.equal(logits(model, case.batch()), logits(plain, case.batch()))
    assert all(math.isfinite(loss) for loss in train(model, case, 0, STEPS, STEPS))
    assert all(layer.activation_offset == 0 for layer in binary_layers(model).values())  # two-sided inputs everywhere
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(case.auto.from_pretrained(tmp_path), case.batch()), logits(model, case.batch()))


@pytest.mark.parametrize("name", RESNETS)
def test_the_papers_rule(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    config = StoMPPConfig.paper(refresh_rate=2)
    with caplog.at_level("WARNING", "stompp_hf"):
        model = binarize_model(case.build(), config)
    assert not caplog.records  # no input has one sign only: the ReLUs are gone
    names = [name for name, _ in model.named_parameters()]
    assert plain_names(names) == names  # nothing learnable was added
    assert all(math.isfinite(loss) for loss in train(model, case, 0, STEPS, STEPS))
    for layer in binary_layers(model).values():
        assert layer.stage_state == "frozen" and set(layer.binary_weight().unique().tolist()) == {-1.0, 1.0}


# ---- policies by structure ----


class Detour(nn.Module):
    """A residual block whose way around, where the shape changes, is a convolution under a name of its own."""

    def __init__(self, width: int, out: int, kernel: int) -> None:
        super().__init__()
        stride, padding = out // width, kernel // 2
        self.a, self.b = nn.Conv2d(width, out, 3, padding=1, stride=stride), nn.Conv2d(out, out, 1)
        self.aside = nn.Conv2d(width, out, kernel, stride, padding) if out != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return self.b(torch.tanh(self.a(x))) + self.aside(x)


class Odd(nn.Module):
    """Blocks with no name that transformers uses, in no list; registered in the reverse of their order."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.zenith, self.third, self.second = nn.Linear(16, 3), Detour(16, 16, 1), Detour(8, 16, kernel)
        self.first, self.eye = Detour(8, 8, 1), nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.eye(x))
        for part in (self.first, self.second, self.third):
            x = part(x)
        return self.zenith(x.mean((2, 3)))


def test_shortcuts_are_found_by_structure() -> None:
    x = torch.randn(2, 3, 10, 10)
    plan = get_plan(binarize_model(Odd(), example_inputs=x))
    assert [entry.name for entry in plan.entries] == [f"{n}.{c}" for n in ("first", "second", "third") for c in "ab"]
    assert plan.stage_count == 6  # no repeated blocks: each layer is a stage
    assert plan.left.keys() == {"eye", "second.aside", "zenith"}
    assert plan.left["eye"].startswith("first layer of a model without blocks")
    assert plan.left["second.aside"].startswith("shortcut: it leads around other layers")
    assert plan.left["zenith"].startswith("head: last layer of a model without blocks")

    for model, config in ((Odd(), StoMPPConfig(downsampling="binarize")), (Odd(kernel=3), None)):  # pointwise ones only
        plan = get_plan(binarize_model(model, config, x))
        assert "second.aside" in [entry.name for entry in plan.entries] and plan.left.keys() == {"eye", "zenith"}
