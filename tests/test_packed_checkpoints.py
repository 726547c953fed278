"""Packed checkpoints: what the files hold and weigh, and clear errors.

That another process computes the same is the matter of test_round_trips.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beyond
import models
import pytest
import torch
import transformers as hf
import vision
from models import logits, quick, same_tensors, train
from safetensors.torch import load_file, save_file

from stompp_hf import (
    Progression,
    StoMPPConfig,
    StoMPPTrainerCallback,
    binarize_model,
    calibrate,
    get_plan,
    pack_model,
    unpack_model,
)
from stompp_hf.errors import CheckpointError
from stompp_hf.modules.packed import PackedLayer
from stompp_hf.surgery.members import binary_layers

STEPS = 6
CASES = {**models.CASES, **vision.CASES}
BERT = CASES["bert"]
QUERY = "bert.encoder.layer.0.attention.self.query"


def frozen(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model trained to the end, and a batch."""
    case = CASES[name]
    model = binarize_model(case.build(), quick(**options))
    train(model, case, 0, STEPS, STEPS)
    return model.eval(), case.batch(77)


# ---- what the files hold ----


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A packed BERT in one file, and its logits."""
    folder = tmp_path_factory.mktemp("packed")
    model, batch = frozen("bert")
    pack_model(model).save_pretrained(folder)
    return folder, logits(model, batch)


@pytest.fixture()
def checkpoint(packed: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    for file in packed[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return hf.AutoModelForSequenceClassification.from_pretrained(folder, **options)


def change_config(folder: Path, change: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_files_hold_bits_and_no_latents(packed: tuple[Path, Any]) -> None:
    values = json.loads((packed[0] / "config.json").read_text())["quantization_config"]
    assert values["quant_method"] == "stompp" and values["format"] == "packed" and values["format_version"] == 1
    tensors = load_file(packed[0] / "model.safetensors")
    model = load(packed[0])
    for name in binary_layers(model):
        assert f"{name}.weight" not in tensors
        assert tensors[f"{name}.weight_bits"].dtype == torch.uint8
        assert tensors[f"{name}.weight_scale"].dtype == tensors[f"{name}.activation_threshold"].dtype == torch.float32
    assert tensors[f"{QUERY}.weight_bits"].shape == (32, 4)
    assert get_plan(model).packed and same_tensors(model.state_dict(), tensors) == []


def test_a_reloaded_model_goes_on_like_any_other(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = packed
    model = load(folder)
    assert not model.is_quantized and all(isinstance(layer, PackedLayer) for layer in binary_layers(model).values())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), BERT.batch(77)), expected)
    rows = [{key: value[i] for key, value in BERT.batch().items()} for i in range(4)]
    args = hf.TrainingArguments(str(tmp_path / "run"), use_cpu=True, max_steps=2, disable_tqdm=True, report_to="none")
    trainer = hf.Trainer(model, args, train_dataset=rows, callbacks=[StoMPPTrainerCallback()])
    trainer.train()  # scales, thresholds, biases, and what is real
    trainer.save_model(str(tmp_path / "trained"))
    assert torch.equal(logits(load(tmp_path / "trained"), BERT.batch()), logits(model, BERT.batch()))
    unpack_model(model).save_pretrained(tmp_path / "unpacked")
    reload = load(tmp_path / "unpacked")
    assert not get_plan(reload).packed and torch.equal(logits(reload, BERT.batch()), logits(model, BERT.batch()))


@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.requires_grad_(False).to("cpu")]
)
def test_moving_a_model_before_it_ran_loses_nothing(
    move: Callable[[Any], Any], packed: tuple[Path, torch.Tensor]
) -> None:
    assert torch.equal(logits(move(load(packed[0])), BERT.batch(77)), packed[1])
    other = load(packed[0])
    for layer in binary_layers(other).values():
        layer.stompp_state.zero_()
    other.load_state_dict(load(packed[0]).state_dict(), assign=True)
    assert torch.equal(logits(move(other), BERT.batch(77)), packed[1])


def test_scales_and_thresholds_stay_float32_in_half_precision(packed: tuple[Path, torch.Tensor]) -> None:
    exact = load(packed[0])
    for dtype in (torch.bfloat16, torch.float16):
        model = load(packed[0], dtype=dtype)
        for name, layer in binary_layers(model).items():
            own, before = layer.own_tensors(), exact.get_submodule(name).own_tensors()
            assert same_tensors(own, before) == [] and {t.dtype for t in own.values()} == {
                t.dtype for t in before.values()
            }
            assert layer.bias.dtype == layer.weight.dtype == dtype
        assert model.bert.embeddings.word_embeddings.weight.dtype == logits(model, BERT.batch(77)).dtype == dtype


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_attention_and_embeddings_are_shipped_too(name: str, tmp_path: Path) -> None:
    case = beyond.CASES[name]
    options = beyond.BOTH if name in beyond.WORDS else {"attention": "binarize"}
    model = binarize_model(beyond.build(name), quick(**options))
    train(model, case, 0, STEPS, STEPS)
    before = logits(model, case.batch(77))
    pack_model(model).save_pretrained(tmp_path)
    assert torch.equal(logits(case.auto.from_pretrained(tmp_path), case.batch(77)), before)
    half = case.auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    scales = [tensor for key, tensor in half.state_dict().items() if key.endswith(("_scale", "_threshold"))]
    assert {tensor.dtype for tensor in scales} == {torch.float32}
    assert torch.isfinite(logits(half, case.batch(77))).all()


def test_tables_stay_in_the_file_and_products_get_aligned_weights(
    packed: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[int, ...]] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, *a, **k: copied.append(tuple(t.shape)) or clone(t, *a, **k))
    model = load(packed[0])
    products = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert tuple(model.get_input_embeddings().weight.shape) not in copied
    assert products and copied and all(p.data_ptr() % 64 == 0 for module in products for p in module.parameters())


def test_size(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=100,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=3,
    )
    plain = hf.AutoModelForSequenceClassification.from_config(config)
    plain.save_pretrained(tmp_path / "float")
    model = binarize_model(plain, StoMPPConfig(end=0.0))
    Progression(model, 1).step(0)
    calibrate(model, [BERT.batch()])
    pack_model(model).save_pretrained(tmp_path / "packed")

    def size(folder: str, *endings: str) -> int:
        """Bytes on disk of the encoder's tensors with these endings, by the file's own header."""
        data = (tmp_path / folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = {key: value for key, value in json.loads(data[8 : 8 + length]).items() if key != "__metadata__"}
        assert len(data) == 8 + length + max(value["data_offsets"][1] for value in header.values())
        names = [f"{name}.{ending}" for name in binary_layers(model) for ending in endings]
        return sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names)

    weights, bits, scales = size("float", "weight"), size("packed", "weight_bits"), size("packed", "weight_scale")
    assert weights == 4 * 6 * (4 * 384 * 384 + 2 * 384 * 1536) and bits * 32 == weights
    assert weights >= 28 * (bits + scales)


# ---- files that do not fit ----


@pytest.mark.parametrize("own", ["weight_bits", "weight_scale", "activation_threshold", "stompp_state", "bias"])
def test_a_missing_or_misshapen_tensor_is_named(checkpoint: Path, own: str) -> None:
    name = f"{QUERY}.{own}"
    change_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    for lenient in (False, True):
        with pytest.raises(CheckpointError, match=f"{name} has the shape .* and by its config.json it should have"):
            load(checkpoint, ignore_mismatched_sizes=lenient)
    change_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{name} is missing in the checkpoint"):
        load(checkpoint)


def test_bits_that_are_numbers(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({f"{QUERY}.weight_bits": t[f"{QUERY}.weight_bits"].to(torch.int64)}))
    with pytest.raises(CheckpointError, match=r"weight_bits is .*int64 in the checkpoint, and must be"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "training"}, r"the checkpoint holds bert\.encoder.*weight_bits, which .* should not be there"),
        ({"format": "packed-9"}, "format='packed-9' is unknown to this release, which reads 'training' and 'packed'"),
        ({"format": None}, "format=None is unknown"),
        ({"format_version": 2}, "format_version is 2, and this release of stompp_hf reads 1"),
    ],
)
def test_configs_that_do_not_belong(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    change_config(checkpoint, lambda values: values["quantization_config"].update(changes))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_training_weights_with_a_packed_config(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = frozen("bert")
    save_file(model.state_dict(), checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{QUERY}.weight_bits is missing"):
        load(checkpoint)


def test_another_size_of_the_model(checkpoint: Path) -> None:
    change_config(checkpoint, lambda values: values.update(intermediate_size=64))
    for lenient in (False, True):
        with pytest.raises(CheckpointError, match=r"dense.bias has the shape \[48\].* should have \[64\]"):
            load(checkpoint, ignore_mismatched_sizes=lenient)
