"""Killed and resumed equals uninterrupted, bit for bit: weights, masks and log records (invariant 5).

Real processes, ended by SIGKILL (see train_and_die.py), with dropout on and two micro-batches an update. Each run is
resumed from its last checkpoint by a process that knows nothing else.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import same_tensors
from train_and_die import TOTAL

RUNS = [(regime, optim) for regime in ("zero", "ste") for optim in ("adamw_torch", "sgd")]
KILLS: dict[str, tuple[str, int]] = {
    "inside-a-window": ("step_end", 7),
    "at-a-stages-edge": ("step_begin", 10),
    "right-after-a-save": ("save", 15),
    "in-the-last-window": ("optimizer_step", 17),
    "in-mid-accumulation": ("substep_end", 13),
}
OTHER_TOTALS = {"more-steps": 26, "fewer-steps": 14}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
"""Trainer restarts these."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, trained once for all tests here."""
    root = tmp_path_factory.mktemp("runs")
    jobs: list[dict[str, Any]] = []
    for regime, optim in RUNS:
        run = {"regime": regime, "optim": optim}
        folder = root / f"{regime}-{optim}"
        folder.mkdir()
        jobs.append({**run, "out": str(folder / "uninterrupted")})
        for name, kill in KILLS.items():
            out = str(folder / name)
            jobs += [{**run, "out": out, "kill": kill}, {**run, "out": out}]
    for name, steps in OTHER_TOTALS.items():
        run = {"regime": "zero", "optim": "adamw_torch", "out": str(root / name)}
        jobs += [{**run, "kill": KILLS["inside-a-window"]}, {**run, "max_steps": steps}]
    script = Path(__file__).with_name("train_and_die.py")
    done = subprocess.run([sys.executable, script, json.dumps(jobs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final state dict."""
    return torch.load(run / "final.pt")


def masks(run: Path) -> dict[int, Any]:
    """States and masks by step; a step done twice, before the kill and after it, must have given the same."""
    found: dict[int, Any] = {}
    for line in (run / "masks.jsonl").read_text().splitlines():
        step, *value = json.loads(line)
        assert found.setdefault(step, value) == value
    return found


def history(run: Path) -> list[dict[str, Any]]:
    """All log records, without times."""
    records = json.loads((run / "history.json").read_text())
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize(("regime", "optim"), RUNS, ids=["-".join(run) for run in RUNS])
def test_killed_and_resumed_equals_uninterrupted(finished, regime, optim, kill):
    folder = finished / f"{regime}-{optim}"
    whole, resumed = folder / "uninterrupted", folder / kill
    assert same_tensors(weights(whole), weights(resumed)) == []
    assert masks(whole) == masks(resumed)
    assert history(whole) == history(resumed)


def test_the_runs_are_worth_comparing(finished):
    """They differ from each other, they freeze in two stages, and the losses are recorded."""
    runs = [finished / f"{regime}-{optim}" / "uninterrupted" for regime, optim in RUNS]
    assert all(same_tensors(weights(runs[0]), weights(other)) for other in runs[1:])
    states = {step: states for step, (states, _) in masks(runs[0]).items()}
    assert list(states) == list(range(1, TOTAL + 1))
    assert [states[step] for step in (1, 2, 10, 18)] == [
        ["pending"] * 12,
        ["transition"] * 6 + ["pending"] * 6,
        ["frozen"] * 6 + ["transition"] * 6,
        ["frozen"] * 12,
    ]
    assert [record["step"] for record in history(runs[0]) if {"loss", "stompp_stage"} <= record.keys()] == [
        5,
        10,
        15,
        20,
    ]


@pytest.mark.parametrize("name", OTHER_TOTALS)
def test_resumed_with_other_max_steps_keeps_the_total_and_warns(finished, name):
    steps, run = OTHER_TOTALS[name], finished / name
    whole, resumed = masks(finished / "zero-adamw_torch" / "uninterrupted"), masks(run)
    assert list(resumed) == list(range(1, steps + 1))
    assert all(resumed[step] == whole.get(step, whole[TOTAL]) for step in resumed)
    log = (finished / f"{name}.log").read_text()
    assert f"fixed at {TOTAL} steps" in log and str(steps) in log
    assert ("training ended at step 14, before these stages were frozen: bert.encoder.layer.1" in log) == (steps < 18)
