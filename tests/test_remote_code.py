"""Checkpoints with a small file of code load in scripts that never import this library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CASES, logits, quick, same_tensors, train
from transformers import AutoModelForSequenceClassification

from stompp_hf import add_remote_code, binarize_model
from stompp_hf.cli import main
from stompp_hf.errors import CheckpointError

BERT = CASES["bert"]
STEPS = 4

RELOAD = """
import sys, torch
from transformers import AutoModel, AutoModelForSequenceClassification
folder, batch, results = sys.argv[1], torch.load(f"{sys.argv[1]}/batch.pt"), {}
inputs = {name: value for name, value in batch.items() if name != "labels"}
assert not any(name.startswith("stompp_hf") for name in sys.modules)
with torch.no_grad():
    # Each in a folder and a module of its own; the first one imports the library.
    base = AutoModel.from_pretrained(f"{folder}/packed", trust_remote_code=True)
    results["base"] = base(**inputs).pooler_output
    for kind in ("packed", "training"):
        model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{kind}", trust_remote_code=True)
        results[kind] = model(**batch).logits
        model.save_pretrained(f"{folder}/{kind} again")
        again = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{kind} again", trust_remote_code=True)
        results[f"{kind} again"] = again(**batch).logits
torch.save(results, f"{folder}/results.pt")
"""


def test_a_script_without_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = binarize_model(BERT.build(), quick())
    train(model, BERT, 0, STEPS, STEPS)
    model.save_pretrained(tmp_path / "plain")
    assert main(["pack", "--remote-code", str(tmp_path / "plain"), str(tmp_path / "packed")]) == 0
    model.save_pretrained(tmp_path / "training")
    assert add_remote_code(tmp_path / "training") == tmp_path / "training" / "modeling_stompp.py"
    batch = BERT.batch(77)
    torch.save(batch, tmp_path / "batch.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=300)
    expected = logits(model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        computed = {"base": model.eval().bert(**inputs).pooler_output}
    computed |= dict.fromkeys(("packed", "training", "packed again", "training again"), expected)
    assert same_tensors(torch.load(tmp_path / "results.pt"), computed) == []
    # Without trust_remote_code, and for the commands, it is a checkpoint like any other.
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed"), batch), expected)
    assert main(["inspect", str(tmp_path / "packed again")]) == 0
    assert main(["unpack", str(tmp_path / "packed again"), str(tmp_path / "unpacked")]) == 0


def test_what_has_no_class(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        add_remote_code(tmp_path)
    binarize_model(BERT.build(), quick()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(CheckpointError, match="no classes for the model type 'unheard-of'"):
        add_remote_code(tmp_path)
