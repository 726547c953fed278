"""A checkpoint of mid-progression is all that a new process needs: loaded, not binarized, it goes on bit for bit.

Unlike in test_kill_resume.py, the resuming script builds its model from the checkpoint. It runs in an interpreter of
its own, which never calls binarize_model (see `load` in train_and_die.py).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import same_tensors
from safetensors.torch import load_file
from test_kill_resume import history, masks, weights
from train_and_die import TOTAL

ADAMW = {"optim": "adamw_torch"}
BEYOND = {"attention": "binarize", "embeddings": "binarize"}
RUNS: dict[str, dict[str, Any]] = {
    "ste-free": {"regime": "zero", **ADAMW},
    "ste": {"regime": "ste", "optim": "sgd"},
    "weights": {"regime": "windowed_ste", **ADAMW, "options": {"binarize": "weights"}},
    "attention and embeddings": {"regime": "windowed_ste", **ADAMW, "options": BEYOND},
    "own teacher": {"regime": "windowed_ste", **ADAMW, "teacher": True},
}
MIDDLES = (5, 15)
"""Steps in the windows of the first stage and of the second."""


def train(jobs: list[dict[str, Any]]) -> None:
    """Run jobs in an interpreter of their own."""
    script = Path(__file__).with_name("train_and_die.py")
    done = subprocess.run([sys.executable, script, json.dumps(jobs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: each uninterrupted, and from a copy of each of its middle checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    train([{**run, "out": str(root / name)} for name, run in RUNS.items()])
    jobs = []
    for name, run in RUNS.items():
        for step in MIDDLES:
            out = root / f"{name} {step}"
            shutil.copytree(root / name / f"checkpoint-{step}", out / f"checkpoint-{step}")
            if "teacher" in run:
                shutil.copytree(root / name / "_teacher", out / "_teacher")
            jobs.append({**run, "out": str(out), "load": True})
    train(jobs)
    return root


def optimizer(run: Path) -> dict[str, torch.Tensor]:
    """The optimizer's final state, every tensor and number by its place."""
    found: dict[str, torch.Tensor] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{place}/{key}", inner)
        elif isinstance(value, list):
            walk(place, dict(enumerate(value)))
        elif isinstance(value, (int, float, torch.Tensor)):
            found[place] = torch.as_tensor(value)

    walk("", torch.load(run / f"checkpoint-{TOTAL}" / "optimizer.pt"))
    return found


@pytest.mark.parametrize("step", MIDDLES)
@pytest.mark.parametrize("name", RUNS)
def test_loaded_and_resumed_equals_uninterrupted(finished: Path, name: str, step: int) -> None:
    whole, resumed = finished / name, finished / f"{name} {step}"
    assert same_tensors(weights(whole), weights(resumed)) == []
    files = [load_file(run / f"checkpoint-{TOTAL}" / "model.safetensors") for run in (whole, resumed)]
    assert same_tensors(*files) == []
    assert same_tensors(optimizer(whole), optimizer(resumed)) == [] and len(optimizer(whole)) > 50
    assert history(whole) == history(resumed)
    assert masks(resumed) == {at: found for at, found in masks(whole).items() if at > step}
    assert len(masks(resumed)) == TOTAL - step


def test_the_runs_are_worth_comparing(finished: Path) -> None:
    """They differ, and each checkpoint is one of mid-progression."""
    finals = [weights(finished / name) for name in RUNS]
    assert all(same_tensors(finals[0], other) for other in finals[1:])
    for name in RUNS:
        states = {step: states for step, (states, _) in masks(finished / name).items()}
        assert [set(states[step]) for step in (*MIDDLES, TOTAL)] == [
            {"transition", "pending"}, {"frozen", "transition"}, {"frozen"}
        ]  # fmt: skip
    assert "stompp_hidden" in history(finished / "own teacher")[0]
