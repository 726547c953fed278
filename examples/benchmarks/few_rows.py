"""A linear layer with few rows, where Python is most of the time: its three ways to compiled C, and plain torch.

    python examples/benchmarks/few_rows.py                  # one thread, float32
    python examples/benchmarks/few_rows.py --weights_only True

"in C": the whole call, checks included, is one function of C; "prechecked": Python calls the kernel with addresses that
were looked up before; "ordinary": the layer's own forward; "not fused": the packed layer as `from_pretrained` gives it;
"real": nn.Linear of the same size. They take turns in one process, in a different order each round; times are medians
over the rounds, and outputs of all but the last are compared bit for bit (with real inputs, "not fused" sums in torch's
order, and is compared with its own ordinary way). Prints a Markdown table.
"""

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from training_cost import machine
from transformers import HfArgumentParser, logging

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, fuse_for_inference, pack_model
from stompp_hf.modules.prechecked_linear import PreparedLinear


@dataclass
class FewRowsArguments:
    """What is measured."""

    sizes: str = field(default="256x256,768x768,768x3072", metadata={"help": "Inputs x outputs, with commas between."})
    rows: str = field(default="1,4,32", metadata={"help": "Rows, with commas between."})
    repeats: int = field(default=25, metadata={"help": "Rounds."})
    calls: int = field(default=200, metadata={"help": "Calls a round and way."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    weights_only: bool = field(default=False, metadata={"help": "Binary weights, real activations."})
    cpu_time: bool = field(default=False, metadata={"help": "CPU time, for machines with other work to do."})
    device: str = field(default="cpu", metadata={"help": "Nothing else has such calls."})


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class _Never(PreparedLinear):
    """No call to C: a layer goes its ordinary way."""

    def __call__(self, layer: nn.Module, x: Tensor) -> None:
        return None


class _NotWhole(PreparedLinear):
    """No whole call in C."""

    def _keep(self, *unused: object) -> None:
        pass


WAYS: dict[str, type[PreparedLinear]] = {"in C": PreparedLinear, "prechecked": _NotWhole, "ordinary": _Never}


def ways_of(layer: nn.Module, packed: nn.Module, real: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared; the first ways are the same layer with another object that prepares its calls."""

    def through(prepared: PreparedLinear) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            layer.prepared = prepared
            return layer(x)  # type: ignore[no-any-return]

        return call

    return {**{name: through(kind()) for name, kind in WAYS.items()}, "not fused": packed, "real": real}


def main() -> None:
    """Measure every size and number of rows, and print."""
    (args,) = HfArgumentParser(FewRowsArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    binarize = "weights" if args.weights_only else "weights_and_activations"
    print(f"Microseconds a call, and how many times faster than the ordinary way; {machine(args)}\n")
    print("| inputs x outputs | rows |", " | ".join((*WAYS, "not fused", "real")), "|")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        inputs, outputs = map(int, size.split("x"))
        torch.manual_seed(0)
        real = nn.Linear(inputs, outputs).eval()
        model = OneLayer(inputs, outputs)
        config = StoMPPConfig(binarize=binarize, first_layer="binarize", head="binarize")
        binarize_model(model, config, example_inputs=torch.randn(2, inputs))
        Progression(model, 2).step(2)
        calibrate(model, [torch.randn(8, inputs)])
        packed = copy.deepcopy(pack_model(model)).eval()  # as `from_pretrained` gives it
        fuse_for_inference(model, torch.randn(2, inputs))
        for rows in map(int, args.rows.split(",")):
            x = torch.randn(rows, inputs)
            with torch.no_grad():
                times = measure(ways_of(model.layer, packed.layer, real), x, args)
            ordinary = times["ordinary"]
            cells = (f"{value:.1f} ({ordinary / value:.1f}x)" for value in times.values())
            print(f"| {inputs} x {outputs} | {rows} | {' | '.join(cells)} |")


def measure(ways: dict[str, Callable[[Tensor], Tensor]], x: Tensor, args: FewRowsArguments) -> dict[str, float]:
    """Microseconds a call of each way: medians over the rounds."""
    alike = [*WAYS, *([] if args.weights_only else ["not fused"])]
    outputs = [[ways[name](x) for _ in range(3)][-1] for name in alike]  # the first calls prepare the others
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    packed: Any = ways["not fused"]
    assert torch.equal(packed(x), packed._frozen(x))
    times: dict[str, list[float]] = {name: [] for name in ways}
    now = time.process_time if args.cpu_time else time.perf_counter
    for number in range(args.repeats):
        for name in random.Random(number).sample(list(ways), len(ways)):
            call = ways[name]
            begin = now()
            for _ in range(args.calls):
                call(x)
            times[name].append(1e6 * (now() - begin) / args.calls)
    return {name: median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
