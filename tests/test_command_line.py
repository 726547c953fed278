"""`python -m stompp_hf`: pack, inspect and unpack; and clear errors for what is no checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CASES, logits, quick, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from stompp_hf import binarize_model, get_plan
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.cli import main
from stompp_hf.surgery.members import binary_layers

BERT = CASES["bert"]
STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint, with a file beside it that every folder should keep."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    model = binarize_model(BERT.build(), quick())
    train(model, BERT, 0, STEPS, STEPS)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def sizes_on_disk(folder: Path) -> int:
    """Bytes of the tensors: the files without their headers."""
    files = list(folder.glob("*.safetensors"))
    return sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files)


def test_pack_inspect_and_unpack(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, again = tmp_path / "new" / "packed", tmp_path / "again"
    command = [sys.executable, "-m", "stompp_hf", "pack", str(trained), str(packed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "packed: 8 weights a byte" in result.stdout and "pooler" in result.stdout
    assert main(["unpack", str(packed), str(again)]) == 0
    assert main(["inspect", str(trained)]) == 0
    assert "training format: latent weights" in capsys.readouterr().out
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (trained, packed, again)]
    assert [get_plan(model).packed for model in models] == [False, True, False]
    answers = [logits(model, BERT.batch()) for model in models]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for folder in (packed, again):
        assert (folder / "vocab.txt").read_text() == "a\nb\n" and not (folder / "trainer_state.json").exists()
    assert not list(tmp_path.rglob(".*"))  # no half-written folder


def test_sizes_are_those_of_the_files(trained: Path, tmp_path: Path) -> None:
    assert main(["pack", str(trained), str(tmp_path / "packed")]) == 0
    plain = BERT.build()
    layers = binary_layers(AutoModelForSequenceClassification.from_pretrained(trained))
    for folder in (trained, tmp_path / "packed"):
        found = inspect(folder)
        assert found.total == sum(found.sizes.values()) == sizes_on_disk(folder)
        assert found.as_float32 == 4 * sum(p.numel() for p in plain.parameters())
        assert found.binary_as_float32 == 4 * sum(layer.weight.numel() for layer in layers.values())
        assert found.sizes["weight scales"] == 4 * sum(layer.weight_scale.numel() for layer in layers.values())
    bits = sum(len(layer.weight) * -(-layer.weight[0].numel() // 8) for layer in layers.values())
    assert found.sizes["bits"] == bits and found.sizes["latent weights"] == 0
    assert found.sizes["real"] == inspect(trained).sizes["real"]


def test_inspect_says_what_it_can(trained: Path, tmp_path: Path) -> None:
    """Dtypes that torch or this library has no name for, and classes that transformers has not."""
    known = inspect(trained)
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "classifier.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for architectures in (["NoSuchModel"], "AutoModel", ["pipeline"], ["logging"], [5], [], None, ["TimmBackbone"]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        found = inspect(tmp_path)
        assert found.by_dtype["F8_E4M3"] == tensors[name].numel() and found.as_float32 == 0 and found.note in str(found)
        assert found.total == known.total - 3 * tensors[name].numel()
        assert found.sizes["latent weights"] == known.sizes["latent weights"]


def test_what_cannot_be_packed_leaves_nothing_behind(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = binarize_model(BERT.build(), quick(end=1.0))
    train(half, BERT, 0, 6, 8)
    half.save_pretrained(tmp_path / "half")
    BERT.build().save_pretrained(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    broken, cut, foreign = (tmp_path / name for name in ("broken", "cut", "foreign"))
    for folder in (broken, cut, foreign):
        folder.mkdir()
        for path in trained.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    (broken / "config.json").write_text("{ not json")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    before = sorted(path.name for path in tmp_path.iterdir())
    cases = {
        ("half", "out"): "stages are not frozen",
        ("plain", "out"): "names no binary layers",
        ("empty", "out"): "no config.json",
        ("nowhere", "out"): "no config.json",
        ("broken", "out"): "is damaged",
        ("cut", "out"): "cut off",
        ("foreign", "out"): "NoSuchModel",
        (str(trained), "full"): "is not empty",
    }
    for (source, target), words in cases.items():
        assert main(["pack", str(tmp_path / source), str(tmp_path / target)]) == 1
        message = capsys.readouterr().err
        assert "error: " in message and words in message, (source, message)
        if source == "foreign":
            assert main(["inspect", str(tmp_path / source)]) == 0
            assert "transformers has no class NoSuchModel" in capsys.readouterr().out
        elif source not in ("half", str(trained)):
            assert main(["inspect", str(tmp_path / source)]) == 1
            assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert main(["pack", "--commit", str(tmp_path / "half"), str(tmp_path / "out")]) == 0
    assert main(["unpack", str(trained), str(tmp_path / "other")]) == 1
    assert "not packed" in capsys.readouterr().err
