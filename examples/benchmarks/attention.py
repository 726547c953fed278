"""Binary attention alone: by popcounts, in plain torch, and float32's scaled_dot_product_attention.

    python examples/benchmarks/attention.py --threads 1
    python examples/benchmarks/attention.py --threads 1 --heads 32 --key_heads 8 --queries 1 --keys 512 2048

Queries are laid out as a projection gives them, keys and values so too, or, for one query, as a cache keeps them.
"softmax" is torch's alone, of as many scores, which is what popcounts leave as it is. All contenders take turns in one
process; times are what `inference.py` measures. Outputs by popcounts and in plain torch are compared bit for bit. The
shares are those of a call by popcounts: bits of keys and values, scores, outputs; softmax as above, and the rest is
Python's. Prints a Markdown table.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from inference import FLOAT32, Case, machine, measure
from torch import Tensor
from torch.nn import functional as F
from transformers import HfArgumentParser

from stompp_hf import BinaryAttention, StoMPPConfig, kernels
from stompp_hf.modules import FROZEN
from stompp_hf.modules.attention import Call

TORCH, POPCOUNTS, SOFTMAX = "in torch", "popcounts", "softmax"


@dataclass
class AttentionArguments:
    """What is measured."""

    heads: int = field(default=12, metadata={"help": "Query heads."})
    key_heads: int = field(default=12, metadata={"help": "Key heads."})
    sizes: list[int] = field(default_factory=lambda: [32, 64], metadata={"help": "Sizes of a head."})
    queries: list[int] = field(default_factory=lambda: [1, 8, 64, 128, 512], metadata={"help": "Queries."})
    keys: list[int] = field(
        default_factory=list, metadata={"help": "Keys; by default as many as queries, and 128, 512 and 2048 for one."}
    )
    batch: int = field(default=1, metadata={"help": "Sequences."})
    causal: bool = field(default=False, metadata={"help": "Later keys are excluded, where there are several queries."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's number."})
    repeats: int = field(default=15, metadata={"help": "Rounds a row."})
    leave_out: list[str] = field(default_factory=list, metadata={"help": "Contenders to leave out."})


def frozen(args: AttentionArguments, size: int, keys: int) -> BinaryAttention:
    """Binary attention that selects what is more than uniform."""
    module = BinaryAttention(
        StoMPPConfig(attention="binarize"), [args.heads, args.key_heads, size, size], torch.zeros(1)
    )
    module.calibrate_unseen()
    module.enter(FROZEN, 1.0)
    with torch.no_grad():
        module.probability_threshold.fill_(1.0 / keys)
    return module.eval()


def operands(args: AttentionArguments, size: int, queries: int, keys: int) -> list[Tensor]:
    """Random queries, keys and values."""
    counts = ((args.heads, queries), (args.key_heads, keys), (args.key_heads, keys))
    found = [torch.randn(args.batch, count, heads, size).transpose(1, 2) for heads, count in counts]
    return found if queries > 1 else [found[0], *(u.contiguous() for u in found[1:])]


def in_torch(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call without kernels."""

    def computed() -> Any:
        with kernels.switched_off():
            return call()

    return computed


def case(args: AttentionArguments, size: int, queries: int, keys: int) -> Case:
    """One row."""
    module, (query, key, value) = frozen(args, size, keys), operands(args, size, queries, keys)
    causal = args.causal and queries > 1
    call = Call(lambda q, k, v: (q, None), causal=causal)
    scores = torch.randn(args.batch * args.heads * queries, keys)

    def binary() -> Tensor:
        return module(query, key, value, call)[0]  # type: ignore[no-any-return]

    def plain() -> Tensor:
        grouped = args.heads != args.key_heads
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    if not torch.equal(binary(), in_torch(binary)()):
        raise SystemExit(f"{queries} queries, {keys} keys of size {size}: popcounts and torch give different outputs.")
    calls = {FLOAT32: plain, TORCH: in_torch(binary), POPCOUNTS: binary, SOFTMAX: lambda: scores.softmax(-1)}
    return Case(f"{queries} to {keys}, heads of {size}", 0, calls)


class Timed:
    """The compiled part, and how long its functions take."""

    def __init__(self) -> None:
        self.native, self.times = kernels.choice().native, Counter[str]()
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.native, name)

        def call(*of: Any) -> Any:
            begin = self.clock()
            result = function(*of)
            self.times[name] += self.clock() - begin
            return result

        return call


def parts(call: Callable[[], Any], repeats: int) -> list[float]:
    """The least times of panels, scores and values in a call, in ms."""
    timed, found = Timed(), []
    with mock.patch.object(kernels.attending, "choice", lambda: SimpleNamespace(native=timed)):
        for _ in range(repeats):
            timed.times.clear()
            call()
            found.append([1e3 * timed.times[f"stompp_attention_{part}"] for part in ("pack", "scores", "values")])
    return [min(own) for own in zip(*found, strict=True)]


def main() -> None:
    """Measure and print."""
    (args,) = HfArgumentParser(AttentionArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if kernels.choice().native is None:
        raise SystemExit("There is nothing to measure without the compiled kernels: python -m stompp_hf env says why.")
    if args.threads:
        torch.set_num_threads(args.threads)
    causal = ", causal" if args.causal else ""
    print(f"{args.heads} heads, {args.key_heads} of keys, batch {args.batch}{causal}; {machine()}\n")
    names = [name for name in (FLOAT32, TORCH, POPCOUNTS, SOFTMAX) if name not in args.leave_out]
    titles = [f"{name}, ms" for name in names]
    titles += ["popcounts over float32", "over torch", SOFTMAX, "bits", "scores", "outputs"]
    print(f"| queries to keys | {' | '.join(titles)} |")
    print("|---|" + "---|" * len(titles))
    with torch.inference_mode():
        for size, queries in itertools.product(args.sizes, args.queries):
            for keys in args.keys or ([128, 512, 2048] if queries == 1 else [queries]):
                row = case(args, size, queries, keys)
                times = measure(row, args)
                ours = times[POPCOUNTS]
                cells = [f"{times[name]:.3f}" for name in names]
                cells += [f"**{times[name] / ours:.1f}**" if name in times else "" for name in (FLOAT32, TORCH)]
                cells += [f"{times[SOFTMAX] / ours:.0%}" if SOFTMAX in times else ""]
                cells += [f"{part / ours:.0%}" for part in parts(row.contenders[POPCOUNTS], args.repeats)]
                print(f"| {row.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
