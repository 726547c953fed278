"""What StoMPP costs in training: step time and memory against vanilla STE and against the plain model.

    python examples/benchmarks/training_cost.py                                    # MiniLM's shapes, minutes on a CPU
    python examples/benchmarks/training_cost.py --shapes bert-base --batch 32 --seq 128 --device cuda
    python examples/benchmarks/training_cost.py --weights_only True --threads 1 --cpu_time True
    python examples/benchmarks/training_cost.py --bf16 True --fractions 0 0.25 0.5 0.75 1
    python examples/benchmarks/training_cost.py --shapes resnet18 --batch 8         # images of --size pixels

All methods take turns step by step in one process (in a different order each round); a time is the median over the
rounds, a ratio the median of the rounds' ratios. A step is progression.step(), forward (with dropout), backward and
AdamW; embeddings are not trained. Stages are the model's blocks, with the default start and end. Peaks cannot be told
apart there: each is that of a process of its own, over two steps, above what it took before it made the model (on
Linux; as in clm_memory.py, glibc hands freed blocks back). On CUDA it is what torch's allocator handed out at most.
Prints a Markdown table.
"""

import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from clm_memory import peak
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    logging,
)

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, parameter_groups

BERT_SHAPES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
RESNET_SHAPES: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "resnet50": {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]},
    "tiny-resnet": {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}
PLAIN, VANILLA, WITH_STE, STE_FREE = "plain", "vanilla STE", "StoMPP+STE", "StoMPP STE-free"
WINDOW = 1000
"""Steps of one stage's window: what a run of usual length has."""


@dataclass
class BenchmarkArguments:
    """What is measured."""

    shapes: str = field(
        default="minilm", metadata={"help": "Shapes of the model.", "choices": [*BERT_SHAPES, *RESNET_SHAPES]}
    )
    batch: int = field(default=16, metadata={"help": "Sequences or images a step."})
    seq: int = field(default=64, metadata={"help": "Tokens a sequence."})
    size: int = field(default=224, metadata={"help": "Height and width of an image."})
    repeats: int = field(default=15, metadata={"help": "Rounds a row."})
    run_points: int = field(default=12, metadata={"help": "Equally spaced steps of the whole run; 0 leaves it out."})
    run_repeats: int = field(default=5, metadata={"help": "Rounds a step of the whole run."})
    fractions: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 1.0], metadata={"help": "Shares of the stages that are frozen, a row each."}
    )
    bf16: bool = field(default=False, metadata={"help": "Forward under bfloat16 autocast."})
    weights_only: bool = field(default=False, metadata={"help": "Binary weights and real activations."})
    surrogate: str = field(
        default=StoMPPConfig.frozen_gradient,
        metadata={"help": "Of both methods with STE.", "choices": ["ste", "clipped_ste", "windowed_ste"]},
    )
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's number."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    cpu_time: bool = field(default=False, metadata={"help": "CPU time of the process: steadier on a busy machine."})
    peaks: bool = field(default=True, metadata={"help": "Peaks of memory as well: a process a row."})
    method: str | None = field(default=None, metadata={"help": "Measure the peak of this one alone, in this process."})
    step: int = field(default=0, metadata={"help": "Where in the run that peak is measured."})


def stages(args: BenchmarkArguments) -> int:
    """Stages of the model: its blocks."""
    if args.shapes in BERT_SHAPES:
        return BERT_SHAPES[args.shapes]["num_hidden_layers"]
    return sum(RESNET_SHAPES[args.shapes]["depths"])


def total_steps(args: BenchmarkArguments) -> int:
    """Steps of a run in which each stage's window has the usual length."""
    return round(WINDOW * stages(args) / (StoMPPConfig().end - StoMPPConfig().start))


def binarized(args: BenchmarkArguments) -> str:
    """What becomes binary, as StoMPPConfig says it."""
    return "weights" if args.weights_only else "weights_and_activations"


def methods(args: BenchmarkArguments) -> dict[str, StoMPPConfig | None]:
    """The options of each method; None for the plain model."""
    ste = StoMPPConfig(binarize=binarized(args), frozen_gradient=args.surrogate)
    free = replace(ste, frozen_gradient="zero")
    return {PLAIN: None, VANILLA: ste.as_vanilla_ste(), WITH_STE: ste, STE_FREE: free}


def halfway(args: BenchmarkArguments) -> int:
    """The step at which half of the stages are frozen, and the next one is at p = 0.5."""
    return stages(args) // 2 * WINDOW + round(0.5 ** (1 / 3) * WINDOW)


def build(args: BenchmarkArguments) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model with random weights, and one batch of inputs."""
    if args.shapes in RESNET_SHAPES:
        images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
        return ResNetForImageClassification(ResNetConfig(**RESNET_SHAPES[args.shapes])), {"pixel_values": images}
    shapes = BertConfig(**BERT_SHAPES[args.shapes], max_position_embeddings=max(args.seq, 64))
    model = BertForSequenceClassification(shapes)
    model.bert.embeddings.requires_grad_(False)
    ids = torch.randint(1, shapes.vocab_size, (args.batch, args.seq), device=args.device)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Runner:
    """One method: its model, its optimizer, and where it is in its run."""

    def __init__(self, args: BenchmarkArguments, config: StoMPPConfig | None) -> None:
        torch.manual_seed(0)
        model, self.inputs = build(args)
        model.to(args.device).train()
        self.cuda, self.kind, self.mixed = args.device.startswith("cuda"), args.device.partition(":")[0], args.bf16
        self.clock: Callable[[], float] = time.process_time if args.cpu_time else time.perf_counter
        self.labels = torch.randint(0, 2, (args.batch,), device=args.device)
        self.progression: Progression | None = None
        parameters: Any = [p for p in model.parameters() if p.requires_grad]
        if config is not None:
            binarize_model(model, config)
            self.progression = Progression(model, total_steps(args))
            parameters = parameter_groups(model, 0.01)
        self.model, self.at, self.advance = model, 0, 0
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        if self.progression is not None:
            self.progression.attach(self.optimizer)

    def place(self, step: int, advance: bool) -> None:
        """Go forward to a step, to stay there or go on from it; committed layers get their activation values."""
        self.at, self.advance = step, int(advance)
        if self.progression is not None:
            self.progression.step(step)
            calibrate(self.model, [self.inputs])

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return self.clock()

    def step(self) -> tuple[float, float]:
        """One training step; its time and the progression's part of it, in ms."""
        begin = self._now()
        if self.progression is not None:
            self.progression.step(self.at)
        drawn = self._now()
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.mixed):
            loss = self.model(**self.inputs, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = self._now()
        self.at += self.advance
        return 1e3 * (end - begin), 1e3 * (drawn - begin)

    def memory(self) -> float:
        """MB of one step: on CUDA the peak above what is allocated before it, else what is saved for backward."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        saved: dict[int, torch.Tensor] = {}  # keeps the tensors, so that no address is used twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.step()
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / 2**20


@dataclass
class Row:
    """One method in one state: times in ms, memory in MB."""

    time: float
    progression: float
    to_plain: float
    to_vanilla: float
    memory: float


def peak_here(args: BenchmarkArguments, method: str) -> float:
    """MB that a method takes at most in two steps at args.step, model and optimizer among it."""
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    cuda = args.device.startswith("cuda")
    before = 0.0 if cuda else peak()
    runner = Runner(args, methods(args)[method])
    runner.place(args.step, False)
    for _ in range(2):
        runner.step()
    return torch.cuda.max_memory_allocated() / 2**20 if cuda else peak() - before


def peak_alone(args: BenchmarkArguments, method: str, step: int) -> float:
    """The same in a process of its own."""
    command = [sys.executable, __file__]
    for name, value in asdict(replace(args, method=method, step=step)).items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20), **os.environ}
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return float(json.loads(printed.splitlines()[-1]))


def measure(runners: dict[str, Runner], step: int, advance: bool, repeats: int) -> dict[str, Row]:
    """Every method at (or over a few steps from) `step`, taking turns."""
    memory = {}
    for name, runner in runners.items():
        runner.place(step, advance)
        runner.step()  # a mask's first draws, the optimizer's state
        memory[name] = runner.memory()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for number in range(repeats):
        for name in random.Random(number).sample(list(runners), len(runners)):
            times[name].append(runners[name].step())

    def ratio(name: str, base: str) -> float:
        return median(one[0] / other[0] for one, other in zip(times[name], times[base], strict=True))

    def row(name: str) -> Row:
        whole, part = (median(values) for values in zip(*times[name], strict=True))
        return Row(whole, part, ratio(name, PLAIN), ratio(name, VANILLA), memory[name])

    return {name: row(name) for name in runners}


def machine(args: BenchmarkArguments) -> str:
    """One line on what ran this."""
    name = platform.processor() or platform.machine()
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    kind = "CPU" if args.cpu_time else "wall"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kind} time"


def main() -> None:
    """Measure in the order of the run's steps, and print."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.method is not None:
        print(json.dumps(peak_here(args, args.method)))
        return
    runners = {name: Runner(args, config) for name, config in methods(args).items()}

    count, total = stages(args), total_steps(args)
    half = count // 2
    # At a window's first step its stage is still real (p = 0): if time stands still, nothing is in transition.
    names = {0: "none", count: "all"}
    frozen = [round(share * count) for share in args.fractions]
    states = {k * WINDOW if k < count else total: f"{names.get(k, f'{k} of {count}')} frozen" for k in frozen}
    states[halfway(args)] = f"{half} of {count} frozen, the next at p = 0.5"
    points = [round(total * (i + 0.5) / args.run_points) for i in range(args.run_points)]
    at_state, at_point = {}, []
    for step in sorted({*states, *points}):
        if step in states:
            at_state[step] = measure(runners, step, "p =" in states[step], args.repeats)
        if step in points:
            at_point.append(measure(runners, step, True, args.run_repeats))

    memory = "peak above the start, MB" if args.device.startswith("cuda") else "saved for backward (no parameters), MB"
    size = f"{args.seq} tokens" if args.shapes in BERT_SHAPES else f"{args.size}x{args.size} pixels"
    what = f"{binarized(args)}, {'bfloat16' if args.bf16 else 'float32'}"
    print(f"{args.shapes} shapes, batch {args.batch}, {size}, {what}; {machine(args)}\n")
    can_tell = Path("/proc/self/status").exists() or args.device.startswith("cuda")
    print(f"| state | method | step, ms | / plain | / vanilla STE | progression.step(), ms | {memory} | peak, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for step, rows in sorted(at_state.items()):
        for name, row in rows.items():
            most = f"{peak_alone(args, name, step):.0f}" if args.peaks and can_tell else ""
            print(
                f"| {states[step]} | {name} | {row.time:.1f} | {row.to_plain:.2f} | {row.to_vanilla:.2f} "
                f"| {row.progression:.2f} | {row.memory:.1f} | {most} |"
            )
    for name in runners if at_point else ():
        part = [rows[name] for rows in at_point]
        print(
            f"| mean of a run ({len(part)} steps of it) | {name} | {mean(r.time for r in part):.1f} "
            f"| {mean(r.to_plain for r in part):.2f} | {mean(r.to_vanilla for r in part):.2f} "
            f"| {mean(r.progression for r in part):.2f} | {mean(r.memory for r in part):.1f} | |"
        )


if __name__ == "__main__":
    main()
