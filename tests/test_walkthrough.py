"""The walk-through runs as a user runs it, from load to report, on its own model and on a checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stompp_hf import read_run, restore_model
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.cli import main

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "walk_through.py"


def walk(out: Path, *words: str, script: Path = SCRIPT) -> str:
    """Run a script and return what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--output_dir", str(out), *words]
    result = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_from_load_to_report(tmp_path: Path) -> None:
    printed = walk(tmp_path / "first", "--max_steps", "20", "--train_samples", "320")
    assert "24 binary layers in 4 stages" in printed and "packed: 8 weights a byte" in printed
    assert inspect(tmp_path / "first" / "packed").plan.packed
    report = (tmp_path / "first" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4
    assert json.loads((tmp_path / "first" / "run.json").read_text())["command"][-1] == "320"


def test_an_example_records_itself_for_the_report(tmp_path: Path) -> None:
    """The command, the options that were given, a secret left out, and gradient norms, in the report of run_glue.py."""
    words = ["--grammar_train_samples", "96", "--grammar_eval_samples", "32", "--num_train_epochs", "1"]
    words += ["--logging_steps", "1", "--gradient_norms_every", "1", "--refresh_rate", "1", "--hub_token", "hf_abc123"]
    walk(tmp_path / "run", *words, script=ROOT / "examples" / "run_glue.py")
    record = read_run(tmp_path / "run").record
    assert record["options"]["grammar_train_samples"] == 96 and record["options"]["learning_rate"] == 1e-3
    assert record["options"]["hub_token"] == record["command"][-1] == "***" and "torch" in record["versions"]
    assert "seed" not in record["options"]
    assert main(["report", str(tmp_path / "run")]) == 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Gradient that reaches the binary weights" in report and "hf_abc123" not in report


@pytest.mark.slow
def test_a_checkpoint_of_ones_own(tmp_path: Path) -> None:
    """A plain model that was trained before, with its tokenizer."""
    walk(tmp_path / "first", "--max_steps", "8", "--train_samples", "128")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    restore_model(model).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "plain")
    words = ("--model_name_or_path", str(tmp_path / "plain"), "--max_steps", "8", "--train_samples", "128")
    assert "packed: 8 weights a byte" in walk(tmp_path / "second", *words)


def test_cells_are_those_of_a_notebook() -> None:
    text = SCRIPT.read_text()
    cells = re.findall(r"^# %%.*$", text, flags=re.MULTILINE)
    headings = re.findall(r"^# ## (\d)\. (\w+)", text, flags=re.MULTILINE)
    assert [name for _, name in headings] == ["Load", "Binarize", "Look", "Train", "Pack", "Report"]
    assert cells.count("# %% [markdown]") == len(headings) == cells.count("# %%")
