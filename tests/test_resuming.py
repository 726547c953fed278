"""last_whole_checkpoint: what a killed save leaves is skipped, by name; and a run of two processes survives kills."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, quick, same_tensors
from test_kill_resume import history, masks
from train_and_die import SAVE, arguments, rows
from transformers import Trainer

from stompp_hf import StoMPPTrainerCallback, binarize_model, last_whole_checkpoint
from stompp_hf.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("run")
    model = binarize_model(CASES["bert"].build(), quick())
    args = arguments(out, max_steps=4, save_steps=2, logging_steps=2)
    trainer = Trainer(model, args, train_dataset=rows(16))
    StoMPPTrainerCallback().attach(trainer)
    trainer.train()
    assert last_whole_checkpoint(out) == str(out / "checkpoint-4")
    return out


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def shorten(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def other_step(folder: Path) -> None:
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "global_step": 2}))


def a_shard_short(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def of_another_rank(folder: Path) -> None:
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no state": (without("trainer_state.json"), "no trainer_state.json"),
    "half a state": (shorten("trainer_state.json"), "cannot be read"),
    "another step": (other_step, "not of step 4"),
    "no weights": (without("model.safetensors"), "no weights"),
    "half the weights": (shorten("model.safetensors"), "shorter than its header says"),
    "all but a byte of the weights": (shorten("model.safetensors", 0.99999), "shorter than its header says"),
    "half a header": (shorten("model.safetensors", 0.001), "shorter than its header says"),
    "an empty file": (shorten("model.safetensors", 0.0), "shorter than its header says"),
    "a shard short": (a_shard_short, "model-00002-of-00002.safetensors is missing"),
    "half an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        "index.json cannot be read",
    ),
    "no optimizer": (without("optimizer.pt"), "no optimizer state"),
    "half an optimizer": (shorten("optimizer.pt"), "optimizer.pt was not written to its end"),
    "no scheduler": (without("scheduler.pt"), "no scheduler.pt"),
    "half a scheduler": (shorten("scheduler.pt"), "scheduler.pt was not written to its end"),
    "no random state": (without("rng_state.pth"), "rng_state.pth is missing"),
    "half a random state": (shorten("rng_state.pth"), "rng_state.pth was not written to its end"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_skipped_by_name(run: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    change, message = DAMAGES[damage]
    change(run / "checkpoint-4")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
    assert "checkpoint-4 is skipped" in caplog.text and message in caplog.text


def test_processes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One random state a process; those of one process, and of more than there are now, do."""
    newest = run / "checkpoint-4"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_whole_checkpoint(run) == str(newest)
    of_another_rank(newest)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
    assert last_whole_checkpoint(run, processes=1) == str(newest)
    shutil.copy(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
    assert last_whole_checkpoint(run) == str(newest)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert last_whole_checkpoint(run) == str(newest)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
    assert last_whole_checkpoint(run, processes=2) == str(newest)


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "missing") is None


def test_resume_from_checkpoint_true_takes_the_last_whole_one(run: Path) -> None:
    shorten("optimizer.pt")(run / "checkpoint-4")

    def trainer() -> Trainer:
        model = binarize_model(CASES["bert"].build(), quick())
        made = Trainer(model, arguments(run, max_steps=4, save_steps=2, logging_steps=2), train_dataset=rows(16))
        StoMPPTrainerCallback().attach(made)
        return made

    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and last_whole_checkpoint(run) == str(run / "checkpoint-4")
    for folder in run.glob("checkpoint-*"):
        shorten("model.safetensors")(folder)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        trainer().train(resume_from_checkpoint=True)


# ---- two processes ----


def launch(job: dict[str, Any], processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(Path(__file__).with_name("train_and_die_together.py")), json.dumps(job)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def finish(job: dict[str, Any], processes: int = 2) -> Path:
    done = launch(job, processes)
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(job["out"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish({"out": str(tmp_path_factory.mktemp("two") / "uninterrupted")})


def die(out: Path, rank: int, step: int, seconds: float) -> None:
    """A run that is killed so many seconds after a step."""
    done = launch({"out": str(out), "kill": {"rank": rank, "step": step, "seconds": seconds}})
    assert done.returncode != 0


def ends_like(uninterrupted: Path, out: Path) -> None:
    finish({"out": str(out)})
    assert same_tensors(torch.load(uninterrupted / "final.pt"), torch.load(out / "final.pt")) == []
    assert masks(uninterrupted) == masks(out)
    assert history(uninterrupted) == history(out)


def test_killed_twice_and_resumed_equals_uninterrupted(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    die(out, rank=1, step=SAVE, seconds=0.01)
    die(out, rank=0, step=13, seconds=0.0)
    ends_like(uninterrupted, out)
    assert json.loads((out / "began.json").read_text()) == "checkpoint-10"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_six_times(uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    """Either process, at random moments: three times within the 40 ms after a save's step, when files are written."""
    draw = random.Random(seed)
    for number in range(6):
        whole = last_whole_checkpoint(tmp_path, processes=2)
        base = int(whole.rpartition("-")[2]) if whole else 0
        step = base + SAVE if number % 2 == 0 else base + draw.randrange(1, SAVE - 1)
        die(tmp_path, draw.randrange(2), step, draw.random() * 0.04)
    ends_like(uninterrupted, tmp_path)


def test_resumed_on_one_process(tmp_path: Path) -> None:
    """Two processes until the kill, one from then on, the same global batch: equal masks, and weights but for sums."""
    job = {"dropout": False, "regime": "ste", "options": {"binary_lr": 1.0}}  # steps no larger than what is told apart
    whole = finish({**job, "out": str(tmp_path / "whole")})
    out = str(tmp_path / "resumed")
    assert launch({**job, "out": out, "kill": {"rank": 0, "step": 12, "seconds": 0.0}}).returncode != 0
    finish({**job, "out": out}, processes=1)
    assert masks(whole) == masks(Path(out))
    first, second = torch.load(whole / "final.pt"), torch.load(Path(out) / "final.pt")
    assert first.keys() == second.keys()
    far = [key for key in first if (first[key].float() - second[key].float()).nan_to_num().abs().max() > 1e-3]
    assert far == []
