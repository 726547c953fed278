"""What is read straight from files is what transformers' loader would have put there, and else goes through it."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import logits, quick, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification as Auto,
    conversion_mapping,
    core_model_loading,
)

from stompp_hf import binarize_model, pack_model

BERT = models.CASES["bert"]
STEPS = 6


@pytest.fixture(scope="module", params=["training", "packed", "sharded"])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], list[str]]:
    """A checkpoint, its tensors, and the order of the model's parameters."""
    folder = tmp_path_factory.mktemp(request.param)
    model = binarize_model(BERT.build(), quick())
    train(model, BERT, 0, STEPS, STEPS)
    model = model if request.param == "training" else pack_model(model)
    model.save_pretrained(folder, max_shard_size="20KB" if request.param == "sharded" else "5GB")
    return folder, model.state_dict(), [name for name, _ in model.named_parameters()]


@pytest.fixture()
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that transformers' loader puts into a model."""
    names: list[str] = []
    theirs = core_model_loading.set_param_for_module

    def put(model: Any, name: str, *args: Any) -> None:
        names.append(name)
        theirs(model, name, *args)

    monkeypatch.setattr(core_model_loading, "set_param_for_module", put)
    return names


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_loader_gets_nothing_that_lies_in_the_files_as_it_is_held(saved: Any, loaded: list[str]) -> None:
    folder, tensors, order = saved
    model, info = Auto.from_pretrained(folder, output_loading_info=True)
    assert loaded == []
    assert not any(info.values())
    assert [name for name, _ in model.named_parameters()] == order
    assert all(parameter.requires_grad for parameter in model.parameters())
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_conversions_are_looked_up_for_plain_checkpoints_alone(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    theirs = conversion_mapping.get_checkpoint_conversion_mapping

    def noted(kind: str) -> Any:
        asked.append(kind)
        return theirs(kind)

    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", noted)
    Auto.from_pretrained(saved[0])
    assert asked == []
    BERT.build().save_pretrained(tmp_path)
    asked.clear()
    Auto.from_pretrained(tmp_path)
    assert "bert" in asked


def test_names_that_transformers_renames_are_found(tmp_path: Path) -> None:
    model = binarize_model(BERT.build(), quick())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in load_file(file).items()}
    assert old.keys() != model.state_dict().keys()
    save_file(old, file, metadata)
    found = Auto.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


WAYS: dict[str, dict[str, Any]] = {
    "on a device": {"device_map": {"": "cpu"}},
    "not mapped": {"disable_mmap": True},
    "renamed": {"key_mapping": {"^bert": "bert"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_another_way_goes_through_the_loader(way: str, saved: Any, loaded: list[str]) -> None:
    folder, tensors, _ = saved
    model = Auto.from_pretrained(folder, **WAYS[way])
    assert {*loaded} == {name for name in tensors if way != "renamed" or name.startswith("bert")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_state_dict_goes_through_the_loader(saved: Any, loaded: list[str]) -> None:
    folder, tensors, _ = saved
    changed = {**everything(folder), "classifier.bias": tensors["classifier.bias"] + 1}
    own_class = type(BERT.build())
    model = own_class.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=changed)
    assert {*loaded} == tensors.keys()
    assert torch.equal(model.classifier.bias, tensors["classifier.bias"] + 1)


def test_what_is_cast_goes_through_the_loader(saved: Any, loaded: list[str]) -> None:
    folder, tensors, _ = saved
    model = Auto.from_pretrained(folder, dtype=torch.bfloat16)
    cast = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert "classifier.weight" in cast
    assert {*loaded} == cast & tensors.keys()


def test_a_part_gets_its_own(saved: Any, loaded: list[str]) -> None:
    folder, tensors, _ = saved
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert loaded == []
    assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    found = model.state_dict()
    assert all(torch.equal(tensor, tensors[f"bert.{name}"]) for name, tensor in found.items())


def test_a_head_of_another_size_is_new(saved: Any, loaded: list[str]) -> None:
    model, info = Auto.from_pretrained(saved[0], num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"} == {*loaded}
    assert model.classifier.weight.shape[0] == 7
    assert bool(model.classifier.weight.isfinite().all())


def test_what_nobody_knows_is_told(saved: Any, tmp_path: Path) -> None:
    tensors = everything(saved[0])
    own = next(name for name in tensors if name.endswith("query.weight_scale")).rpartition(".")[0]
    strange = {"nowhere.weight_scale", "bert.encoder.layer.99.output.dense.bias", f"{own}.strange"}
    tensors |= {name: torch.ones(1) for name in strange}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved[0] / "config.json").read_bytes())
    _, info = Auto.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == strange


def test_a_loaded_model_can_be_changed_and_its_file_stays(saved: Any, tmp_path: Path) -> None:
    folder, _, _ = saved
    before = everything(folder)
    with torch.inference_mode():
        model = Auto.from_pretrained(folder)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    logits(Auto.from_pretrained(folder), BERT.batch(77)).sum()
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(folder).items())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    torch.save(model.classifier.bias, tmp_path / "bias")
    assert (tmp_path / "bias").stat().st_size < 4096  # a tensor of its own, and not the whole file
