"""One process and two (DDP, gloo) give the same progression: equal masks, equal weights up to the order of sums."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, quick, same_tensors
from two_processes import build, train

from stompp_hf import binarize_model, restore_model

BEYOND = {"attention": "binarize", "embeddings": "binarize"}
JOBS: dict[str, dict[str, Any]] = {
    "bert-zero": {"model": "bert", "regime": "zero"},
    "bert-windowed": {"model": "bert", "regime": "windowed_ste", "accumulate": 2},
    "bert-beyond": {"model": "bert", "regime": "zero", "options": BEYOND, "find_unused": True, "sgd": True},
    "bert-beyond-idle": {"model": "bert", "regime": "windowed_ste", "options": BEYOND, "sgd": True},
    "bert-vanilla": {"model": "bert", "regime": "ste", "options": {"start": 0.0, "end": 0.0}},
    "chain-zero": {"model": "chain", "regime": "zero", "options": {"stages": "module"}},
    "chain-zero-found": {"model": "chain", "regime": "zero", "options": {"stages": "module"}, "find_unused": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs on two processes."""
    out = tmp_path_factory.mktemp("ddp")
    jobs = [{**job, "name": name} for name, job in JOBS.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("two_processes.py")), json.dumps(jobs), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(runs: Path, name: str) -> None:
    first, second = (torch.load(runs / f"{name}-{rank}.pt") for rank in range(2))
    alone = train(JOBS[name])
    assert first["masks"] == second["masks"] == alone["masks"]
    assert len(set(alone["masks"])) > 10 or "vanilla" in name
    assert same_tensors(first["state"], second["state"]) == []
    assert first["given"] == alone["given"]
    for key, value in alone["state"].items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_blocked_parameters_stay_where_they_are(runs: Path) -> None:
    """What stands before a frozen layer is skipped by the optimizer, decay included; without the rule it is not."""
    given = torch.load(runs / "chain-zero-0.pt")["given"]
    assert "blocks.0.0.bias" in given[0] and "blocks.0.0.bias" not in given[-1]
    assert "head.weight" in given[-1]


def test_buffers_are_not_sent_from_rank_0() -> None:
    """DistributedDataParallel leaves our buffers alone, and others as they were; restore_model takes that back."""
    model = CASES["bert"].build()
    model._ddp_params_and_buffers_to_ignore = ["bert.embeddings.position_ids"]
    binarize_model(model, quick())
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    own = {name for name, _ in model.named_buffers() if name.endswith(("stompp_state", "_low", "_high", "_clip"))}
    assert own and own < ignored and "bert.embeddings.position_ids" in ignored
    restore_model(model)
    assert model._ddp_params_and_buffers_to_ignore == ["bert.embeddings.position_ids"]
    other = restore_model(binarize_model(CASES["bert"].build(), quick()))
    assert not hasattr(other, "_ddp_params_and_buffers_to_ignore")


def test_pending_layers_cost_nothing_in_one_process() -> None:
    """The idle parameters are kept in the graph only where processes wait for them."""
    model = build({"model": "chain", "regime": "zero"})
    x = torch.randn(2, 12, dtype=torch.float64)
    assert model.blocks[0][0](x).grad_fn.name() == "AddmmBackward0"
