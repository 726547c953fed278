"""Peak memory of a training step of a language model whose weights become binary, beside the plain model's.

    python examples/benchmarks/clm_memory.py --threads 1      # 341M parameters: 8 GB, minutes on a CPU
    python examples/benchmarks/clm_memory.py --tiny True

A Llama of random weights, W1A32 by the default options. Each state of it is a process of its own: the peak of two
training steps (forward, backward, AdamW) above what the process took before it made the model, on Linux. There glibc is
told to hand freed blocks back (MALLOC_MMAP_THRESHOLD_), or the holes in its heap would count too. First, how long a
Llama of 1.2 billion parameters on the meta device takes to become binary, which needs no memory. Prints a Markdown
table.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, logging

from stompp_hf import Progression, StoMPPConfig, binarize_model, parameter_groups

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
    "350M": {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2816},
    "1B": {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192},
}
HEADS = {"tiny": (2, 2), "350M": (16, 16), "1B": (32, 8)}
WINDOW = 1000
"""Steps of one stage's window."""
PLAIN, FIRST, HALF, LAST, ALL = (
    "plain", "the first stage in transition", "half frozen, the next in transition", "the last stage in transition",
    "all frozen",
)  # fmt: skip
STATES = (PLAIN, FIRST, HALF, LAST, ALL)


@dataclass
class BenchmarkArguments:
    """What is measured."""

    tiny: bool = field(default=False, metadata={"help": "A model of two small layers."})
    batch: int = field(default=1, metadata={"help": "Sequences a step."})
    seq: int = field(default=256, metadata={"help": "Tokens a sequence."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW; binary_lr raises a low one."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's number."})
    state: str | None = field(default=None, metadata={"help": "Measure this state alone, in this process."})


def shapes(name: str) -> LlamaConfig:
    """A Llama's config; the small tables are tied, as usual at these sizes."""
    heads, shared = HEADS[name]
    return LlamaConfig(
        **SHAPES[name], num_attention_heads=heads, num_key_value_heads=shared, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip


def peak() -> float:
    """MB that this process took at most; what getrusage says is inherited from the parent."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def first_step(state: str, stages: int, total: int) -> int:
    """Of the two steps in that state; half of a stage's entries are frozen at 0.5 ** (1 / 3) of its window."""
    if state == ALL:
        return total - 1
    return {FIRST: 0, HALF: stages // 2, LAST: stages - 1}[state] * WINDOW + round(0.5 ** (1 / 3) * WINDOW)


def measure(args: BenchmarkArguments, state: str) -> dict[str, float]:
    """Peak in MB above the start, and seconds of the second step."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    before = peak()
    torch.manual_seed(0)
    model = LlamaForCausalLM(shapes("tiny" if args.tiny else "350M")).train()
    parameters: Any = model.parameters()
    progression, at = None, 0
    if state != PLAIN:
        config = StoMPPConfig(binarize="weights")
        binarize_model(model, config)
        stages = model.config.num_hidden_layers
        total = round(WINDOW * stages / (config.end - config.start))
        progression, at = Progression(model, total), first_step(state, stages, total)
        parameters = parameter_groups(model, 0.01)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    if progression is not None:
        progression.attach(optimizer)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq))
    for step in (at, at + 1):
        begin = time.perf_counter()
        if progression is not None:
            progression.step(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"peak": peak() - before, "seconds": time.perf_counter() - begin}


def main() -> None:
    """Measure every state, and print."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    logging.set_verbosity_error()
    if args.state is not None:
        print(json.dumps(measure(args, args.state)))
        return
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes("tiny" if args.tiny else "1B"))
    begin = time.perf_counter()
    binarize_model(model, StoMPPConfig(binarize="weights"))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.0f}M parameters on the meta device: binary in {time.perf_counter() - begin:.2f} s\n")
    print(f"| {args.batch} x {args.seq} tokens | peak, MB | / plain | a step, s |\n|---|---|---|---|")
    plain, environment = 0.0, {"MALLOC_MMAP_THRESHOLD_": str(2**20), **os.environ}
    for state in STATES:
        words = [f"--{name}={value}" for name, value in asdict(args).items() if value is not None]
        command = [sys.executable, __file__, *words, f"--state={state}"]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
        found = json.loads(printed.splitlines()[-1])
        plain = plain or found["peak"]
        print(f"| {state} | {found['peak']:.0f} | {found['peak'] / plain:.3f} | {found['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
