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

from stompp_hf import Distiller, Progression, binarize_model, restore_model
from stompp_hf.training.distillation import snapshot

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


def test_hidden_states_alone_leave_no_parameter_to_wait_for(tmp_path: Path) -> None:
    """Nothing uses the head then, and it stays what it was."""
    model = binarize_model(CASES["bert"].build(), quick()).train()
    head, block = (model.get_parameter(n) for n in ("classifier.weight", "bert.encoder.layer.1.output.dense.weight"))
    before = [head.detach().clone(), block.detach().clone()]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run = torch.nn.parallel.DistributedDataParallel(model)
        progression, optimizer = Progression(run, 4), torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
        progression.attach(optimizer)
        distiller = Distiller(model, snapshot(model), task=0.0, logits=0.0)
        for step in range(4):
            progression.step(step)
            run(**CASES["bert"].batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        distiller.detach()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(head, before[0]) and not torch.equal(block, before[1])


def test_pending_layers_cost_nothing_in_one_process() -> None:
    """The idle parameters are kept in the graph only where processes wait for them."""
    model = build({"model": "chain", "regime": "zero"})
    x = torch.randn(2, 12, dtype=torch.float64)
    assert model.blocks[0][0](x).grad_fn.name() == "AddmmBackward0"
