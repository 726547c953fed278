"""Does a run come out the same however it is run? Trains a tiny BERT in every way and prints a Markdown table.

    python examples/benchmarks/agreement.py                # all 48 cells, on two CPU processes; minutes
    python examples/benchmarks/agreement.py --reduced      # 8 of them

{plain, DDP x2, FSDP2 x2} x {float32, bf16 autocast} x {eager, compile} x {activation checkpointing off, on} x
{STE-free, with STE}; compile: block by block. Every cell sees the same rows at each step, and is held against the
plain, eager cell of its precision and surrogate: the masks of all steps must be equal, and the final loss and every
parameter may differ by the tolerance of the precision. Exits with 1 if a cell disagrees.
"""

import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from stompp_hf import Progression, StoMPPConfig, binarize_model
from stompp_hf.integrations.sharding import whole

RANKS, STEPS, ROWS, LENGTH, WORDS = 2, 12, 8, 6, 50
TOLERANCE = {"float32": 1e-5, "bf16": 5e-3}
"""Of the final loss and of every parameter. Sums in another order round differently, and bf16 keeps 8 bits."""


@dataclass(frozen=True)
class Cell:
    """One way to run."""

    where: str
    precision: str
    compiled: bool
    checkpointing: bool
    regime: str


def cells(reduced: bool) -> list[Cell]:
    """All of them, or a plain cell and one in two processes for each of the other choices."""
    every = itertools.starmap(
        Cell,
        itertools.product(
            ("plain", "DDP x2", "FSDP2 x2"), ("float32", "bf16"), (False, True), (False, True),
            ("zero", "windowed_ste"),
        ),
    )  # fmt: skip
    chosen = {
        *(("plain", "float32", False, False, regime) for regime in ("zero", "windowed_ste")),
        ("plain", "bf16", False, False, "zero"),
        ("DDP x2", "float32", False, False, "zero"),
        ("DDP x2", "bf16", False, True, "zero"),
        ("FSDP2 x2", "float32", False, True, "windowed_ste"),
        ("FSDP2 x2", "float32", True, False, "zero"),
        ("plain", "float32", True, True, "windowed_ste"),
    }
    found = list(every)
    if not reduced:
        return found
    return [c for c in found if (c.where, c.precision, c.compiled, c.checkpointing, c.regime) in chosen]


def build(cell: Cell) -> PreTrainedModel:
    """The same weights each time; attention that torch can compile STE-free."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").train()
    options = StoMPPConfig(frozen_gradient=cell.regime, refresh_rate=3, end=0.75)  # type: ignore[arg-type]
    return binarize_model(model, options)


def batch(step: int) -> dict[str, torch.Tensor]:
    """The rows of one step, a pure function of it."""
    ids = torch.randint(1, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.sum(1) % 3}


class Graphs:
    """A backend that counts the graphs it is given, and computes what eager does."""

    def __init__(self) -> None:
        self.count, self.inner = 0, torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, graph: Any, example: list[torch.Tensor]) -> Any:
        self.count += 1
        return self.inner(graph, example)


def run(cell: Cell) -> dict[str, Any]:
    """Train; the final loss over all rows, a hash of the masks of all steps, and the graphs that were compiled."""
    torch._dynamo.reset()
    model, graphs = build(cell), Graphs()
    if cell.checkpointing:
        model.activation_checkpointing_enable()
    wrapped: Any = model
    if cell.compiled:
        for block in model.bert.encoder.layer:
            block.compile(backend=graphs)
    if cell.where == "FSDP2 x2":
        for block in model.bert.encoder.layer:
            fully_shard(block)
        fully_shard(model)
    elif cell.where == "DDP x2":
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    parts, part = (1, 0) if cell.where == "plain" else (RANKS, dist.get_rank())
    progression = Progression(wrapped, STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    progression.attach(optimizer)
    digest = hashlib.sha256()
    for step in range(STEPS + 1):
        progression.step(step)
        for member in progression.layers.values():
            for name in member.mask_names:
                mask = getattr(member, name)
                digest.update(b"-" if mask is None else mask.to(torch.uint8).numpy().tobytes())
        rows = {key: value.chunk(parts)[part] for key, value in batch(step).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=cell.precision == "bf16"):
            loss = wrapped(**rows).loss
        if step < STEPS:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    final = loss.detach().float().clone()
    if cell.where != "plain":
        dist.all_reduce(final)
        final /= RANKS
    progression.step(STEPS)  # FSDP2: parameters are the sharded ones again
    progression.detach()
    weights = torch.cat([whole(parameter).reshape(-1) for parameter in model.parameters()])
    return {"loss": final.item(), "masks": digest.hexdigest()[:8], "graphs": graphs.count, "weights": weights}


def work(reduced: bool) -> int:
    """In each of the processes: run every cell; the first one prints the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plain: dict[tuple[str, str], dict[str, Any]] = {}
    lines = [
        "| run | precision | | checkpointing | surrogate | final loss | masks | graphs | difference | agrees |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    disagree = 0
    for cell in cells(reduced):
        found = run(cell)
        base = plain.setdefault((cell.precision, cell.regime), found)
        apart = max(abs(found["loss"] - base["loss"]), float((found["weights"] - base["weights"]).abs().max()))
        agrees = found["masks"] == base["masks"] and apart <= TOLERANCE[cell.precision]
        disagree += not agrees
        lines.append(
            f"| {cell.where} | {cell.precision} | {'compile' if cell.compiled else 'eager'} | "
            f"{'on' if cell.checkpointing else 'off'} | {cell.regime} | {found['loss']:.6f} | {found['masks']} | "
            f"{found['graphs']} | {apart:.1e} | {'yes' if agrees else 'NO'} |"
        )
    if dist.get_rank() == 0:
        tolerances = ", ".join(f"{value:g} ({name})" for name, value in TOLERANCE.items())
        print("\n".join(lines))
        print(f"\n{len(lines) - 2} cells, {disagree} disagree; tolerance of the largest difference: {tolerances}.")
    dist.destroy_process_group()
    return int(disagree > 0)


def main() -> int:
    """Start two processes of this script, or be one of them."""
    reduced = "--reduced" in sys.argv[1:]
    if "RANK" in os.environ:
        status = work(reduced)
        sys.stdout.flush()
        os._exit(status)  # gloo's threads may outlive the interpreter, which then aborts
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, __file__, *sys.argv[1:]], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
