"""Train tiny models on several processes, in float64, and keep what the test compares: masks, weights, gradients' fate.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/two_processes.py '[{"name": "a", ...}]' OUT

The test calls `train` itself for the same jobs in one process, which sees the whole of each batch.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import CASES, quick
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stompp_hf import Progression, binarize_model
from stompp_hf.surgery.members import members

STEPS = 30


class Chain(nn.Module):
    """Layers without shortcuts: a frozen STE-free one lets no gradient through to those before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), labels)


def batch_of(job: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Eight examples of one step."""
    if job["model"] == "chain":
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        return {"x": x, "labels": torch.arange(8) % 3}
    halves = [CASES[job["model"]].batch(2 * step + i) for i in range(2)]
    return {key: torch.cat([half[key] for half in halves]) for key in halves[0]}


def build(job: dict[str, Any]) -> nn.Module:
    """The binarized model, in float64, without dropout; biases are not zero, since the sign of a sum of signs and a
    bias that is a rounding error (a key's: softmax does not see it) would differ between one process and two."""
    options = {"frozen_gradient": job["regime"], "start": 0.1, "end": 0.9, **job.get("options", {})}
    if job["model"] == "chain":
        model: nn.Module = Chain().double()
        return binarize_model(model, quick(**options), example_inputs=batch_of(job, 0))
    model = CASES[job["model"]].build().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, std=0.1)
    return binarize_model(model, quick(**options))


def digest(model: nn.Module) -> str:
    """Of all states and masks."""
    found = hashlib.sha256()
    for name, member in members(model).items():
        found.update(f"{name} {member.stage_state}".encode())
        for mask in (getattr(member, attribute) for attribute in member.mask_names):
            found.update(b"none" if mask is None else mask.to(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(job: dict[str, Any], rank: int = 0, world: int = 1) -> dict[str, Any]:
    """One run: masks by step, the final state dict, and which parameters the optimizer was given in each step."""
    model = build(job)
    wrapped: Any = model
    if world > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=job.get("find_unused", False))
    progression = Progression(model, STEPS)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    if job.get("sgd"):  # the gradient of a key's bias is a rounding error, by which Adam would divide
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    progression.attach(optimizer)
    given: list[list[str]] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer.register_step_pre_hook(
        lambda *_: given.append([names[id(p)] for p in model.parameters() if p.grad is not None])
    )
    parts, digests = job.get("accumulate", 1), []
    for step in range(STEPS):
        progression.step(step)
        digests.append(digest(model))
        batch = batch_of(job, step)
        mine = {key: value[rank::world] for key, value in batch.items()}
        for part in range(parts):
            last = part == parts - 1
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                output = wrapped(**{key: value[part::parts] for key, value in mine.items()})
                loss = output if isinstance(output, Tensor) else output.loss
                (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    progression.step(STEPS)
    return {"masks": digests, "given": given, "state": model.state_dict()}


def main() -> None:
    """All jobs on this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(sys.argv[1]):
        result = train(job, dist.get_rank(), dist.get_world_size())
        torch.save(result, Path(sys.argv[2], f"{job['name']}-{dist.get_rank()}.pt"))
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts


if __name__ == "__main__":
    main()
