"""FSDP2: sharded runs on two CPU processes equal one process; what cannot be followed is refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stack import stack
from torch import nn

from stompp_hf import Progression, StoMPPConfig, binarize_model
from stompp_hf.errors import ShardingError

RUNS = (
    "ste-free, 50 steps",
    "with ste, evaluated",
    "whole model only, evaluated",
    "attention and embeddings",
    "at once, two micro-batches",
    "slow pending, checkpointing",
    "taught",
)
ROUNDING = 1e-9
"""float64, relative to a tensor's largest entry: AdamW divides by the root of tiny gradients."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found; sharded_ranks.py has the scenarios."""
    out = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).parent / "sharded_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_sharded_runs_equal_one_process(found, name):
    for rank in found:
        run = rank[name]
        assert run["masks"] and run["complete"]
        assert run["weights"] < ROUNDING and run["numbers"] < ROUNDING
        assert run["shares"] < 0.02  # of gradients that are exactly 0: one of them may be 1e-20


def test_sharded_and_full_checkpoints_resume(found):
    for rank in found:
        result = rank["checkpoints"]
        assert result["step"] == 9  # read from the checkpoint
        assert result["sharded"] == 0.0  # bit for bit
        assert result["masks"] and result["full"] < ROUNDING


def test_calibrate_writes_to_the_shards(found):
    assert all(rank["calibrated"]["values"] < 1e-12 for rank in found)


def test_parameters_gathered_in_half_precision(found):
    for rank in found:
        assert rank["half"]["masks"] and rank["half"]["losses"] < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("nan", "NonFiniteError: the latent weight of bert.encoder.layer.0.output.dense is not finite"),
        ("binarize", "Binarize first, then shard"),
        ("restore", "Gather it first"),
        ("pack", "Gather it first"),
        ("snapshot", "teacher=PATH"),
    ],
)
def test_what_needs_whole_parameters_says_so_on_every_process(found, call, message):
    assert all(message in rank["refused"][call] for rank in found)


# ---- what is refused ----


def test_fsdp1_is_refused(monkeypatch):
    import torch.distributed.fsdp as fsdp

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    monkeypatch.setattr(fsdp, "FullyShardedDataParallel", Wrapped)  # the real one wants a group of processes
    with pytest.raises(ShardingError, match=r"FSDP1.*fully_shard"):
        Progression(Wrapped(stack()), 12)


def test_deepspeed_is_refused():
    model = stack()
    model.layers[1].weight.ds_id = 3
    with pytest.raises(ShardingError, match=r"layers\.1\.weight is partitioned by DeepSpeed.*FSDP2"):
        Progression(model, 12)
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    plain[0].weight.ds_id = 0
    with pytest.raises(ShardingError, match="DeepSpeed"):
        binarize_model(plain, StoMPPConfig(), torch.zeros(1, 8))
    assert type(plain[0]) is nn.Linear
    engine = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(ShardingError, match="DeepSpeedEngine"):
        Progression(engine(stack()), 12)


def test_deepspeed_optimizers_are_refused_also_inside_accelerates_wrapper():
    model = stack()
    zero = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    for optimizer in (zero, SimpleNamespace(optimizer=zero)):
        with pytest.raises(ShardingError, match="DeepSpeedZeroOptimizer"):
            Progression(model, 12).attach(optimizer)


def test_data_parallel_is_refused_with_several_gpus_only():
    wrapped = nn.DataParallel(stack())
    assert Progression(wrapped, 12).total_steps == 12  # without a GPU it only calls the module
    wrapped.device_ids = [0, 1]
    with pytest.raises(ShardingError, match="accelerate launch"):
        Progression(wrapped, 12)
