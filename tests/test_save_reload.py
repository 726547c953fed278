"""Saving and reloading: what the files hold, names, ties and copies, and clear errors where nothing fits.

That another process computes the same is the matter of test_round_trips.py.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import CASES, logits, quick, same_tensors, train
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from stompp_hf import (
    Progression,
    StoMPPConfig,
    StoMPPQuantizationConfig,
    StoMPPTrainerCallback,
    binarize_model,
    get_plan,
    restore_model,
)
from stompp_hf.checkpoints.quantizer import StoMPPQuantizer
from stompp_hf.errors import CheckpointError, ConfigError, PatternError
from stompp_hf.modules import OWN_TENSORS, BinaryLayer
from stompp_hf.surgery.members import binary_layers

BERT = CASES["bert"]
STEPS = 12
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT saved in mid-progression, at the end, and at the end in shards."""
    folder, model = tmp_path_factory.mktemp("saved"), binarize_model(BERT.build(), quick())
    for name, first, last in (("middle", 0, 7), ("end", 7, STEPS)):
        train(model, BERT, first, last, STEPS)
        model.save_pretrained(folder / name)
    model.save_pretrained(folder / "sharded", max_shard_size="50KB")
    return folder


@pytest.fixture()
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in mid-progression, to be damaged."""
    for file in (saved / "middle").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, change: Any) -> None:
    """As by hand, without the digest that would tell of it."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    values["quantization_config"].pop("digest", None)
    path.write_text(json.dumps(values))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


# ---- what is written ----


def test_config_json_holds_the_plan(saved: Path) -> None:
    values = json.loads((saved / "middle" / "config.json").read_text())["quantization_config"]
    assert values["quant_method"] == "stompp" and values["format"] == "training" and values["format_version"] == 1
    assert values["config"] == quick().to_dict()
    assert [entry["stage"] for entry in values["modules"]] == [0] * 6 + [1] * 6
    first = values["modules"][0]
    assert (first["name"], first["stage_name"], first["producer"]) == (QUERY, "bert.encoder.layer.0", "LayerNorm")
    assert values["left"].keys() == {"bert.pooler.dense", "classifier"}
    plan = StoMPPQuantizationConfig(**values).plan()
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert plan == get_plan(load(saved / "middle"))


def test_safetensors_hold_scales_thresholds_and_state(saved: Path) -> None:
    tensors = load_file(saved / "middle" / "model.safetensors")
    plain = BERT.build().state_dict()
    entries = [entry.name for entry in get_plan(load(saved / "middle")).entries]
    assert tensors.keys() == plain.keys() | {f"{name}.{own}" for name in entries for own in OWN_TENSORS}
    state = tensors[f"{QUERY}.stompp_state"]
    assert state.dtype == torch.int64 and state[3:5].tolist() == [STEPS, 7]  # total, step
    assert tensors[f"{QUERY}.weight_scale"].shape == (32,) and tensors[f"{QUERY}.activation_threshold"].shape == (32,)
    assert (tensors[f"{QUERY}.weight_scale"] != 1).all()
    latent = tensors[f"{QUERY}.weight"]
    assert latent.unique().numel() > 1000  # the latents, not their signs
    shards = list((saved / "sharded").glob("model-*.safetensors"))
    together = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert len(shards) >= 2
    assert same_tensors(together, load_file(saved / "end" / "model.safetensors")) == []


# ---- what is read ----


def test_names_are_found_with_and_without_the_prefix(saved: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(saved / "middle")
    assert isinstance(base, BertModel) and next(iter(binary_layers(base))) == QUERY.removeprefix("bert.")
    base.save_pretrained(tmp_path)
    model = load(tmp_path, num_labels=3)
    assert next(iter(binary_layers(model))) == QUERY
    assert [layer.step for layer in binary_layers(model).values()] == [7] * 12
    inputs = {name: value for name, value in BERT.batch().items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(model.bert(**inputs).pooler_output, base(**inputs).pooler_output)
    train(model, BERT, 7, STEPS, STEPS)
    assert all(layer.stage_state == "frozen" for layer in binary_layers(model).values())


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_tied_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = binarize_model(case.build(), quick())
    train(model, case, 0, 7, STEPS)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    reload = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reload.lm_head.weight is reload.get_input_embeddings().weight
    assert torch.equal(logits(reload, case.batch()), logits(model, case.batch()))
    base = AutoModel.from_pretrained(tmp_path)
    inputs = {key: value for key, value in case.batch().items() if key != "labels"}
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        assert torch.equal(hidden, reload.base_model(**inputs).last_hidden_state)


def test_a_reloaded_model_is_an_ordinary_one_to_trainer(saved: Path, tmp_path: Path) -> None:
    model = load(saved / "end")
    assert not model.is_quantized and getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model, "quantization_method")
    plain = {name for name, parameter in BERT.build().named_parameters() if parameter.requires_grad}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert plain < trainable == {name for name, _ in model.named_parameters()}
    model.float()  # raises on a model that transformers takes for quantized
    before = copy.deepcopy(model.state_dict())
    rows = [{key: value[i] for key, value in BERT.batch().items()} for i in range(4)]
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, max_steps=1, disable_tqdm=True, learning_rate=1e-2)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[StoMPPTrainerCallback()])
    trainer.train()
    assert same_tensors(before, model.state_dict()) != []
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(logits(load(tmp_path / "out"), BERT.batch()), logits(model, BERT.batch()))


def test_a_restored_model_is_saved_as_a_plain_one(saved: Path, tmp_path: Path) -> None:
    model = load(saved / "middle")
    restore_model(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert load_file(tmp_path / "model.safetensors").keys() == BERT.build().state_dict().keys()
    reload = load(tmp_path)
    assert not any(isinstance(module, BinaryLayer) for module in reload.modules())
    assert type(reload.get_submodule(QUERY)) is nn.Linear
    assert torch.equal(logits(reload, BERT.batch()), logits(model, BERT.batch()))


# ---- other ways to carry a model about, in mid-progression ----


def in_the_middle() -> Any:
    model = binarize_model(BERT.build(), quick())
    train(model, BERT, 0, 7, STEPS)
    return model


def test_deepcopy() -> None:
    model = in_the_middle()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, BERT.batch()), logits(model, BERT.batch()))
    assert get_plan(twin) == get_plan(model) and get_plan(twin) is not get_plan(model)
    before = copy.deepcopy(model.state_dict())
    train(twin, BERT, 7, STEPS, STEPS)
    assert same_tensors(model.state_dict(), before) == []  # nothing is shared, masks neither
    train(model, BERT, 7, STEPS, STEPS)
    assert same_tensors(model.state_dict(), twin.state_dict()) == []


def test_float64_in_transition() -> None:
    model = in_the_middle()
    single = logits(model, BERT.batch())
    states = {layer.stage_state for layer in binary_layers(model).values()}
    assert states == {"frozen", "transition"}
    model.to(torch.float64)
    layers = binary_layers(model).values()
    assert {layer.weight_mask.dtype for layer in layers if layer.weight_mask is not None} == {torch.bool}
    double = logits(model, BERT.batch())
    assert double.dtype == torch.float64 and torch.isfinite(double).all()
    assert torch.allclose(double.float(), single, atol=0.05)  # a sign on the edge may flip, no more
    train(model, BERT, 7, STEPS, STEPS)
    assert logits(model, BERT.batch()).dtype == torch.float64


def test_state_dict_through_pickle(tmp_path: Path) -> None:
    model = in_the_middle()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = binarize_model(BERT.build(seed=5), quick())
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    progression = Progression(fresh, STEPS)
    assert progression.current_step == 7
    progression.step(7)
    assert torch.equal(logits(fresh, BERT.batch()), logits(model, BERT.batch()))
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(logits(whole, BERT.batch()), logits(model, BERT.batch()))


# ---- files that do not fit ----


@pytest.mark.parametrize("own", ["weight_scale", "weight_clip", "activation_threshold", "stompp_state"])
def test_a_missing_tensor_is_named(checkpoint: Path, own: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[f"{QUERY}.{own}"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{QUERY}.{own} is missing in the checkpoint"):
        load(checkpoint)


def test_without_knowing_the_files_nothing_is_loaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other versions of transformers may call a quantizer with other arguments."""
    ours = StoMPPQuantizer._process_model_before_weight_loading

    def called(self: Any, model: Any, checkpoint_files: Any, **options: Any) -> None:
        ours(self, model, **options)

    monkeypatch.setattr(StoMPPQuantizer, "_process_model_before_weight_loading", called)
    with pytest.raises(CheckpointError, match="does not tell a quantization method which files it loads"):
        load(saved / "end")


def test_a_layer_that_the_class_lacks(checkpoint: Path) -> None:
    change_config(checkpoint, lambda values: values["modules"][3].update(name="bert.encoder.layer.7.dense"))
    with pytest.raises(CheckpointError, match=r"bert.encoder.layer.7.dense is binary, and BertForSequence.* no such"):
        load(checkpoint)


def test_a_layer_of_another_type(checkpoint: Path) -> None:
    name = "bert.encoder.layer.0.output.LayerNorm"
    change_config(checkpoint, lambda values: values["modules"][3].update(name=name))
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "format_version is 2, and this release of stompp_hf reads 1"),
        ("format_version", None, "format_version is None"),
        ("format", "packed-9", "format='packed-9' is unknown to this release"),
        ("modules", [], "damaged: its stages are not numbered"),
        ("modules", [{"name": "x"}], "damaged .*TypeError"),
        ("modules", [{"name": "x", "stage": 1, "stage_name": "x"}], "damaged: its stages are not numbered"),
    ],
)
def test_damaged_or_newer_plans(checkpoint: Path, key: str, value: Any, message: str) -> None:
    change_config(checkpoint, lambda values: values.update({key: value}))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_unknown_options(checkpoint: Path) -> None:
    change_config(checkpoint, lambda values: values.update(note="a newer release may add keys"))
    assert isinstance(load(checkpoint).get_submodule(QUERY), BinaryLayer)
    change_config(checkpoint, lambda values: values["config"].update(refresh_rates=3))
    with pytest.raises(ConfigError, match="no option 'refresh_rates'; did you mean 'refresh_rate'"):
        load(checkpoint)


def test_a_plain_checkpoint_is_no_stompp_checkpoint(tmp_path: Path) -> None:
    BERT.build().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"takes a StoMPPConfig.*binarize_model"):
        load(tmp_path, quantization_config=StoMPPQuantizationConfig())
    assert len(binary_layers(binarize_model(load(tmp_path), StoMPPConfig()))) == 12


# ---- binarizing at load ----


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5"])
def test_a_plain_checkpoint_is_binarized_at_load(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.build().save_pretrained(tmp_path / "plain")
    plain = case.auto.from_pretrained(tmp_path / "plain")
    model = case.auto.from_pretrained(tmp_path / "plain", quantization_config=quick())
    assert torch.equal(logits(model, case.batch()), logits(plain, case.batch()))
    twin = binarize_model(plain, quick())
    assert get_plan(model) == get_plan(twin) and same_tensors(model.state_dict(), twin.state_dict()) == []
    assert not model.is_quantized and not model.training
    for each in (model, twin):
        train(each, case, 0, STEPS, STEPS)
    assert same_tensors(model.state_dict(), twin.state_dict()) == []
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(
        logits(case.auto.from_pretrained(tmp_path / "trained"), case.batch()), logits(twin, case.batch())
    )


def test_binarizing_at_load_casts_and_refuses_as_binarize_model_does(checkpoint: Path, tmp_path: Path) -> None:
    BERT.build().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = load(tmp_path / "half", quantization_config=quick())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with pytest.raises(PatternError, match="nowhere"):
        load(tmp_path / "half", quantization_config=quick(exclude_modules=["nowhere"]))
    with pytest.raises(ValueError, match="StoMPPConfig"):
        load(checkpoint, quantization_config=quick())


# ---- what a load says ----


def test_half_precision_and_disk_are_warned_of(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers tells the quantizer neither dtype nor device map after loading."""
    load(saved / "middle")
    assert not [record for record in caplog.records if record.name == "stompp_hf.checkpoints.quantizer"]
    load(saved / "middle", dtype=torch.bfloat16)
    assert "loaded as torch.bfloat16" in caplog.text and "disk" not in caplog.text
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    model = load(saved / "end", device_map=device_map, offload_folder=str(tmp_path))
    assert "offloaded to disk" in caplog.text
    assert torch.equal(logits(model, BERT.batch(77)), logits(load(saved / "end"), BERT.batch(77)))
    with pytest.raises(CheckpointError, match="between real and binary"):
        load(saved / "middle", device_map=device_map, offload_folder=str(tmp_path))


def test_a_new_head_and_a_missing_one(saved: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers may make a head anew where it is asked to; what is only missing would be random."""
    transformers.utils.logging.set_verbosity_warning()  # an example that ran in this process may have changed both
    transformers.utils.logging.enable_propagation()
    model = load(checkpoint, num_labels=7, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape[0] == 7 and "classifier.weight" in caplog.text
    caplog.clear()
    other = AutoModelForTokenClassification.from_pretrained(checkpoint, num_labels=3)
    assert other.bert.encoder.layer[0].attention.self.query.stage_state == "frozen"
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.bias is missing in the checkpoint"):
        load(checkpoint)
