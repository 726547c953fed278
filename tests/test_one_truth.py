"""A copy of the tensors is a copy of the model: however they get there, a model's stages follow them (invariant 10)."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import load_checkpoint_and_dispatch
from safetensors.torch import save_file
from stack import batch, stack, train, update
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import stompp_hf
from stompp_hf import Progression, pack_model, restore_model
from stompp_hf.errors import CheckpointError
from stompp_hf.surgery.members import members

TOTAL, W = 12, 16


def trained(step: int = TOTAL, **options: Any) -> nn.Module:
    """A stack at a step of its progression."""
    model = stack(3, W, **options)
    train(model, Progression(model, TOTAL), 0, step)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch(7, width=W))


# ---- roads by which tensors get into a model ----


def by_state_dict(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    target.load_state_dict(source.state_dict())
    return target


def by_assignment(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    return target


def in_place(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    """As timm's ModelEma does, over the values of two state dicts."""
    for kept, new in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        kept.copy_(new)
    return target


def by_buffers(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    """Every tensor is replaced by another one, as accelerate's offloading does."""
    tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        module = target.get_submodule(owner)
        (module._parameters if own in module._parameters else module._buffers)[own] = copy.deepcopy(tensor)
    return target


def by_accelerate(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    save_file(source.state_dict(), folder / "model.safetensors")
    return load_checkpoint_and_dispatch(target, str(folder / "model.safetensors"), device_map={"": "cpu"})


def by_distributed_checkpoint(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    dcp.save(source.state_dict(), checkpoint_id=folder, no_dist=True)
    dcp.load(target.state_dict(), checkpoint_id=folder, no_dist=True)
    return target


def by_empty_tensors(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    target.to_empty(device="cpu").load_state_dict(source.state_dict())
    return target


def by_functional_call(source: nn.Module, target: nn.Module, folder: Path) -> nn.Module:
    tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}

    class Called(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(target, tensors, (x,))

    return Called()


ROADS: list[Callable[[nn.Module, nn.Module, Path], nn.Module]] = [
    *(by_state_dict, by_assignment, in_place, by_buffers, by_accelerate, by_distributed_checkpoint),
    *(by_empty_tensors, by_functional_call),
]


@pytest.mark.parametrize("step", [TOTAL, 5], ids=["finished", "in transition"])
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_the_stage_follows_the_tensors(road, step, tmp_path):
    source, fresh = trained(step), stack(3, W)
    plain = outputs(fresh)
    target = road(source, fresh, tmp_path)
    assert torch.equal(outputs(target), outputs(source)) and not torch.equal(outputs(target), plain)


@pytest.mark.parametrize("road", [by_state_dict, in_place, by_buffers], ids=lambda road: road.__name__)
def test_back_to_the_beginning(road, tmp_path):
    """A finished model that gets a fresh one's tensors is pending again."""
    target, fresh = trained(), stack(3, W)
    assert torch.equal(outputs(road(fresh, target, tmp_path)), outputs(fresh))
    assert {layer.stage_state for layer in target.layers} == {"pending"}


def test_what_was_written_into_a_state_dict_is_there_and_stays():
    model = trained(5)
    written = model.state_dict()["layers.0.stompp_state"]
    written[4] = TOTAL  # somebody's own tool
    assert model.state_dict()["layers.0.stompp_state"].tolist() == written.tolist()
    assert model.layers[0].step == TOTAL and model.layers[0].stage_state == "frozen"
    assert model.layers[1].stage_state == "transition"


def test_every_tensor_of_the_state_is_followed():
    model = trained(5)
    before = outputs(model)
    with torch.no_grad():
        model.layers[1].weight_clip.fill_(1e-3)
        model.layers[1].activation_high.fill_(1e-3)
    assert not torch.equal(outputs(model), before)
    assert model.layers[1].weight_edge == model.layers[1].input_edges[1] == pytest.approx(1e-3)


# ---- averages ----


def test_an_average_of_parameters_stands_where_the_model_stands():
    model = stack(3, W)
    average = AveragedModel(model, use_buffers=False)
    progression, optimizer = Progression(model, TOTAL), torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(TOTAL):
        progression.step(step)
        update(model, optimizer, step)
        progression.step(step + 1)
        average.update_parameters(model)
        assert [layer.stage_state for layer in average.module.layers] == [layer.stage_state for layer in model.layers]
    real = outputs(restore_model(copy.deepcopy(average.module)))
    assert not torch.equal(outputs(average.module), real)
    packed = outputs(pack_model(copy.deepcopy(average.module)))
    assert torch.equal(packed, outputs(average.module))


def test_an_average_of_buffers_stands_where_its_buffers_say_or_is_refused():
    """Its step is an average as well: halfway, where the model is finished. Average parameters, and copy buffers."""
    model = stack(3, W)
    average = AveragedModel(model, use_buffers=True)
    progression, optimizer = Progression(model, TOTAL), torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(TOTAL):
        progression.step(step)
        update(model, optimizer, step)
        progression.step(step + 1)
        average.update_parameters(model)
    try:
        seen = outputs(average.module)
    except CheckpointError as error:
        assert "use_buffers=True" in str(error)
        return
    (step,) = {layer.step for layer in average.module.layers}
    assert 0 < step < TOTAL
    expected = [state for state, _ in progression.state(step).values()]
    assert [layer.stage_state for layer in average.module.layers] == expected
    assert not torch.equal(seen, outputs(restore_model(copy.deepcopy(average.module))))


# ---- tensors that no run wrote ----


@pytest.mark.parametrize(
    "damage",
    [
        lambda layer: layer.stompp_state[0].fill_(0),  # begun, and the weight's scale never set
        lambda layer: layer.stompp_state[1].fill_(7),
        lambda layer: layer.stompp_state[4].fill_(-3),
        lambda layer: layer.activation_low.fill_(float("nan")),
    ],
    ids=["weight not ready", "a flag of 7", "a negative step", "a NaN clip"],
)
def test_a_state_that_no_run_could_have_written_is_refused_and_named(damage):
    model = trained()
    with torch.no_grad():
        damage(model.layers[1])
    for _ in range(2):  # it is said each time
        with pytest.raises(CheckpointError, match=r"layers\.1: .*use_buffers"):
            outputs(model)
    with pytest.raises(RuntimeError, match=r"layers\.1"):
        stack(3, W).load_state_dict(model.state_dict())


# ---- nothing else holds it ----


def test_copies_and_moves_keep_the_stage():
    for step in (5, TOTAL):
        model = trained(step)
        expected = outputs(model)
        assert torch.equal(outputs(copy.deepcopy(model)), expected)
        assert torch.equal(outputs(copy.deepcopy(model).double().float()), expected)
        shared = copy.copy(model.layers[0])
        assert shared.stage_state == model.layers[0].stage_state


def test_making_a_progression_changes_nothing():
    model = stack(3, W)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    progression = Progression(model, 40)
    assert progression.state(39) and progression.is_complete(40)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {member.total_steps for member in members(model).values()} == {0}
    assert Progression(model, 10).total_steps == 10
    with pytest.raises(CheckpointError, match="were trained by progressions"):
        Progression(model, 10).step(2)
        model.layers[1].total_steps = 20
        Progression(model, 10)


def test_the_state_lives_in_one_place():
    """One class knows what the saved numbers mean, one reads and writes the buffer; nobody else sets a stage."""
    texts = {p.name: p.read_text(encoding="utf-8") for p in Path(stompp_hf.__file__).parent.rglob("*.py")}

    def holding(pattern: str) -> set[str]:
        return {name for name, text in texts.items() if re.search(pattern, text)}

    assert holding(r"stompp_state(\.(tolist|copy_|fill_|data)\b|\[)|copy\w*\(\[?\w+\.stompp_state") == {
        "stage_member.py"
    }
    assert holding(r"\.(stage|share|has_frozen)(, \S+)* = ") == {"stage_member.py"}
    assert holding(r"int64\b.*\b6\b") <= {"binary_layer.py", "attention.py"}  # in words
