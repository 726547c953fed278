"""What a checkpoint weighs on disk, how long it takes to load, and in how much memory: float32, training and packed.

    python examples/benchmarks/checkpoint_size.py --model PATH     # a plain checkpoint, from a folder or a hub

Every stage of the model is frozen at once and calibrated on random inputs: sizes and times are those of a trained one.
The last column says what rounding does to the logits of this untrained one, whose activations lie anywhere about their
thresholds, where a flipped sign flips others in every later layer; for a trained one, ask python -m stompp_hf compare.
Each load is a process of its own, which has imported the model's class; the kinds take turns, and times and peaks are
medians over the rounds: of loading and one forward pass, in seconds and in MB above what the process took before. A
plain file is mapped, and read when the model first runs: the sum of both is what passes before there is an answer, and
what a process waits for anyway, importing transformers and the class, is given beside it. So is a second load in the
same process: the first one of a plain file makes transformers' tables of names. Prints Markdown tables.
"""

import copy
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, HfArgumentParser, set_seed
from transformers.utils import logging

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, pack_model
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.reports.comparison import output_difference
from stompp_hf.surgery.running import example_inputs_of

LOAD = """
import json, sys, time
clock = getattr(time, sys.argv[2])
started = clock()
import torch, transformers
from transformers import AutoConfig, AutoModelForSequenceClassification
import stompp_hf, stompp_hf.checkpoints.saving
from stompp_hf.surgery.running import example_inputs_of

def peak():  # of this very process; what getrusage says is inherited from the parent
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1e3 for line in file if line.startswith("VmHWM"))

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
getattr(transformers, AutoConfig.from_pretrained(sys.argv[1]).architectures[0])
imported = clock() - started
before, begin = peak(), clock()
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
loaded, held = clock() - begin, peak() - before
begin = clock()
with torch.no_grad():
    model(**example_inputs_of(model))
ran, most = clock() - begin, peak() - before
begin = clock()
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(json.dumps([imported, loaded, ran, loaded + ran, clock() - begin, held, most]))
"""

KINDS: dict[str, tuple[dict[str, str], str | None]] = {
    "training format": ({}, None),
    "packed": ({}, "float32"),
    "packed, real parts in float16": ({}, "float16"),
    "packed, tables in int8": ({}, "int8"),
    "packed, binary word embedding": ({"embeddings": "binarize"}, "float32"),
    "packed, binary word embedding, other tables in int8": ({"embeddings": "binarize"}, "int8"),
}
"""Options of StoMPPConfig, and how what stays real is stored (None: not packed), of each kind of checkpoint."""
PLAIN = "plain float32"


@dataclass
class BenchmarkArguments:
    """What is measured."""

    model: str = field(metadata={"help": "A plain checkpoint: a folder, or a name on the hub."})
    weights_only: bool = field(default=False, metadata={"help": "Binary weights and real activations."})
    repeats: int = field(default=5, metadata={"help": "Rounds of loading; 0 leaves times and memory out."})
    cpu_time: bool = field(default=False, metadata={"help": "CPU time of the process: steadier on a busy machine."})


def write(args: BenchmarkArguments, folder: Path) -> dict[str, str]:
    """Write every kind of checkpoint; returns what rounding does to the logits, by kind."""
    set_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    plain.save_pretrained(folder / PLAIN)
    costs = dict.fromkeys((PLAIN, *KINDS), "")
    binarize = "weights" if args.weights_only else "weights_and_activations"
    for options in ({}, {"embeddings": "binarize"}):
        model = binarize_model(copy.deepcopy(plain), StoMPPConfig(binarize=binarize, start=0.0, end=0.0, **options))
        Progression(model, 1).step(1)
        if not args.weights_only:
            calibrate(model, [example_inputs_of(model, seed) for seed in range(8)])
        model.eval()
        for kind, (wanted, real) in KINDS.items():
            if wanted == options:
                shipped = model if real is None else pack_model(copy.deepcopy(model), real=real)
                shipped.save_pretrained(folder / kind)
                found = output_difference(model, shipped)
                costs[kind] = "equal" if found.equal else f"{found.mean / found.spread:.2g} of a standard deviation"
    return costs


def weights(folder: Path) -> int:
    """Bytes of the files of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_all(folder: Path, repeats: int, cpu_time: bool) -> dict[str, list[float]]:
    """Medians, by kind: seconds to import, load, run first, of both, to load again; peaks of memory in MB."""
    rows: dict[str, list[list[float]]] = {kind: [] for kind in (PLAIN, *KINDS)}
    for _ in range(repeats):
        for kind, found in rows.items():
            command = [sys.executable, "-c", LOAD, str(folder / kind), "process_time" if cpu_time else "perf_counter"]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(result.stdout.splitlines()[-1]))
    return {kind: [median(column) for column in zip(*found, strict=True)] for kind, found in rows.items()}


def main() -> dict[str, Any]:
    """Write, load, print; returns bytes by kind."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        costs = write(args, folder)
        sizes = {kind: weights(folder / kind) for kind in costs}
        print("| checkpoint | MB on disk | times smaller | logits, against the frozen model |\n|---|---|---|---|")
        for kind, size in sizes.items():
            print(f"| {kind} | {size / 1e6:.1f} | {sizes[PLAIN] / size:.1f} | {costs[kind]} |")
        print(f"\nOf the packed one, by tensor:\n\n    {str(inspect(folder / 'packed')).splitlines()[0]}")
        found = inspect(folder / "packed")
        parts = {**found.sizes, "the binary weights in float32": found.binary_as_float32}
        print("\n".join(f"    {part:<32}{size:>12,} bytes" for part, size in parts.items()))
        ratio = found.binary_as_float32 / (found.sizes["bits"] + found.sizes["weight scales"])
        print(f"    bits and weight scales: {ratio:.1f} times smaller")
        if args.repeats:
            clock = "CPU" if args.cpu_time else "wall"
            print(
                f"\n{args.repeats} rounds, torch {torch.__version__}, one thread, {platform.machine()}, {clock} time:\n"
            )
            titles = ("imports, s", "load, s", "first forward, s", "both, s", "load again, s", "peak of loading, MB")
            print(f"| checkpoint | {' | '.join(titles)} | of both |\n|{'---|' * 8}")
            for kind, row in load_all(folder, args.repeats, args.cpu_time).items():
                imports, *seconds, held, peak = row
                told = (f"{imports:.1f}", *(f"{value:.3f}" for value in seconds), f"{held:.0f}", f"{peak:.0f}")
                print(f"| {kind} | {' | '.join(told)} |")
    return sizes


if __name__ == "__main__":
    main()
