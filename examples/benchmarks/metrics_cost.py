"""What the metrics cost in training: a step without them, with the cheap ones, with a record, and a sampled one.

    python examples/benchmarks/metrics_cost.py --cpu_time True --threads 1 --batch 8       # MiniLM's shapes
    python examples/benchmarks/metrics_cost.py --shapes bert-base --batch 32 --seq 128 --device cuda

The kinds of step take turns on one model in one process, in a different order each round. A time is the median over the
rounds, "more" the median of the rounds' differences to the step without metrics, in % of it. "own" is what the calls
themselves take, without what the hooks of a sample do in the forward pass, in % too: smaller than the noise of whole
steps, and so what to look at for the cheap ones. Samples are taken every --every steps: their share of a run is a
sample's cost divided by that. Time stands still at each state of the model. Prints a Markdown table.
"""

import random
from dataclasses import dataclass, field
from statistics import median

from training_cost import WINDOW, BenchmarkArguments, Runner, machine, stages, total_steps
from transformers import HfArgumentParser, logging

from stompp_hf import LiveMetrics, StoMPPConfig

PLAIN, CHEAP, RECORD, SAMPLE = "no metrics", "cheap, each step", "a record", "a sample"


@dataclass
class MetricsArguments(BenchmarkArguments):
    """What is measured."""

    repeats: int = field(default=25, metadata={"help": "Rounds a state."})
    every: int = field(default=50, metadata={"help": "Steps from one sample to the next."})
    clip: float = field(default=0.0, metadata={"help": "Clip of weights and activations, as in the paper; 0 for none."})


class Watched(Runner):
    """A model in training, with metrics that are asked for step by step."""

    def __init__(self, args: MetricsArguments, config: StoMPPConfig) -> None:
        super().__init__(args, config)
        assert self.progression is not None
        self.live = LiveMetrics(self.progression, every=1)
        self.off = LiveMetrics(self.progression, every=0)

    def watched_step(self, kind: str) -> tuple[float, float]:
        """One training step; its time, and that of the calls for the metrics, in ms."""
        live = self.live if kind == SAMPLE else self.off
        begin = self._now()
        self.progression.step(self.at)
        first = self._now()
        if kind != PLAIN:
            live.begin(self.at)
        second = self._now()
        self.model(**self.inputs, labels=self.labels).loss.backward()
        third = self._now()
        if kind != PLAIN:
            live.sample()
        fourth = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        fifth = self._now()
        if kind == CHEAP:
            live.cheap()
            self.progression.stage_in_transition()  # for the progress bar
        elif kind == RECORD:
            live.record()
        end = self._now()
        self.live._samples.clear()
        return 1e3 * (end - begin), 1e3 * (second - first + fourth - third + end - fifth)


def main() -> None:
    """Measure in the order of the run's states, and print."""
    (args,) = HfArgumentParser(MetricsArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    logging.set_verbosity_error()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    binarize = "weights" if args.weights_only else "weights_and_activations"
    clips = {"weight_clip": args.clip, "activation_clip": args.clip} if args.clip else {}
    runner = Watched(args, StoMPPConfig(binarize=binarize, frozen_gradient=args.surrogate, **clips))
    count, total = stages(args), total_steps(args)
    half = count // 2
    states = {
        0: "none frozen",
        half * WINDOW + round(0.5 ** (1 / 3) * WINDOW): f"{half} of {count} frozen, the next at p = 0.5",
        total: "all frozen",
    }
    print(f"{args.shapes} shapes, batch {args.batch}, {machine(args)}; a sample every {args.every} steps\n")
    print("| state | step | ms | more | own | of a run: more | of a run: own |")
    print("|---|---|---|---|---|---|---|")
    kinds = (PLAIN, CHEAP, RECORD, SAMPLE)
    for step, state in states.items():
        runner.place(step, advance=False)
        for kind in kinds:
            runner.watched_step(kind)
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for number in range(args.repeats):
            for kind in random.Random(number).sample(kinds, len(kinds)):
                times[kind].append(runner.watched_step(kind))
        plain = median(whole for whole, _ in times[PLAIN])
        for kind in kinds:
            whole, own = (median(values) for values in zip(*times[kind], strict=True))
            pairs = zip(times[kind], times[PLAIN], strict=True)
            costs = [100 * median(a[0] - b[0] for a, b in pairs) / plain, 100 * own / plain]
            # A record is made once in logging_steps; its cost is given for one in every step, the dearest case.
            share = args.every if kind == SAMPLE else 1
            row = [f"{whole:.1f}", *(f"{c:.2f}%" for c in costs), *(f"{c / share:.3f}%" for c in costs)]
            print(f"| {state} | {kind} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
