"""What an ONNX file of a binary model weighs, and what loading and running it costs, against the plain model's.

    python examples/benchmarks/onnx_file.py                              # MiniLM's shapes, a minute or two
    python examples/benchmarks/onnx_file.py --shapes bert-base resnet18  # ten minutes
    python examples/benchmarks/onnx_file.py --shapes bert-base --variants W1A1
    python examples/benchmarks/onnx_file.py --what layers                # layer by layer, and where it is not faster
    python examples/benchmarks/onnx_file.py --shapes tiny --profile True

Models with random weights, exported plain by torch and frozen by export_onnx, and run by onnxruntime on one thread. All
files take turns in one process, in another order each round: run: median CPU time of a batch; faster: median of the
rounds' ratios, plain over this one. load: CPU time to make a session, which unpacks the bits, the least of three;
"each time": without onnxruntime's optimizers, so that weights are unpacked at every run. error: mean difference of the
outputs from those of torch's packed model, over their mean size. Prints Markdown tables.
"""

import copy
import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from training_cost import BERT_SHAPES, RESNET_SHAPES
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    ResNetConfig,
    ResNetForImageClassification,
)

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, export_onnx

EMBEDDING, WEIGHTS = {"embeddings": "binarize"}, {"binarize": "weights"}
INT8, FLOAT32, TWO_BITS = {"weights": "int8"}, {"products": "float32"}, {"weights_only": "matmul_nbits"}
Variants = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Options of the configuration, and of export_onnx."""
OF_BERT: Variants = {
    "W1A1": ({}, {}),
    "W1A1, binary embedding": (EMBEDDING, {}),
    "W1A1, binary embedding and attention": ({**EMBEDDING, "attention": "binarize"}, {}),
    "W1A1, stored as int8": ({}, INT8),
    "W1A1, in float32": ({}, FLOAT32),
    "W1A32": (WEIGHTS, {}),
    "W1A32, MatMulNBits": (WEIGHTS, TWO_BITS),
}
OF_RESNET: Variants = {"W1A1": ({}, {}), "W1A1, in float32": ({}, FLOAT32), "W1A32": (WEIGHTS, {})}
LINEAR = ((768, 768), (768, 3072), (3072, 768), (384, 384))
ROWS = (1, 16, 128, 512)
CONVOLUTIONS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "3x3, 64 channels, 56x56": (64, 64, 56, {"kernel_size": 3, "padding": 1}),
    "3x3, 128 channels, 28x28": (128, 128, 28, {"kernel_size": 3, "padding": 1}),
    "3x3, 256 channels, 14x14": (256, 256, 14, {"kernel_size": 3, "padding": 1}),
    "3x3, 512 channels, 7x7": (512, 512, 7, {"kernel_size": 3, "padding": 1}),
    "3x3, stride 2, 128 to 256 channels, 28x28": (128, 256, 28, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "1x1, 256 to 64 channels, 56x56": (256, 64, 56, {"kernel_size": 1}),
    "1x1, 64 to 256 channels, 56x56": (64, 256, 56, {"kernel_size": 1}),
    "1x1, 512 to 2048 channels, 7x7": (512, 2048, 7, {"kernel_size": 1}),
    "3x3, 16 channels, 112x112": (16, 16, 112, {"kernel_size": 3, "padding": 1}),
    "3x3, 128 channels in 32 groups, 28x28": (128, 128, 28, {"kernel_size": 3, "padding": 1, "groups": 32}),
    "3x3, 384 channels, depthwise, 14x14": (384, 384, 14, {"kernel_size": 3, "padding": 1, "groups": 384}),
}
ENOUGH = 2e-3
"""Seconds that a turn lasts at least: reading the clock takes as long as the shortest runs."""


@dataclass
class FileArguments:
    """What is measured."""

    what: str = field(default="models", metadata={"help": "models or layers.", "choices": ["models", "layers"]})
    shapes: list[str] = field(
        default_factory=lambda: ["minilm"], metadata={"help": f"Models: {', '.join((*BERT_SHAPES, *RESNET_SHAPES))}."}
    )
    variants: list[str] = field(default_factory=list, metadata={"help": "Only these rows, as 'W1A1'; all if none."})
    batch: int = field(default=1, metadata={"help": "Sequences or images a batch."})
    seq: int = field(default=128, metadata={"help": "Tokens a sequence."})
    size: int = field(default=224, metadata={"help": "Height and width of an image."})
    repeats: int = field(default=15, metadata={"help": "Rounds of which the median is taken."})
    profile: bool = field(default=False, metadata={"help": "Also which operators the time of W1A1 goes to."})


def frozen(plain: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    """A binary copy of a model, frozen at once."""
    model = binarize_model(copy.deepcopy(plain), StoMPPConfig(end=0.0, **options), inputs)
    Progression(model, 1).step(0)
    return calibrate(model, [inputs]).eval()


def export_plain(model: nn.Module, path: Path, inputs: dict[str, Tensor]) -> None:
    """The plain model as torch exports it, in one file."""
    torch.onnx.export(model.eval(), (), str(path), kwargs=inputs, external_data=False, verbose=False)


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU time of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def session(path: Path, **options: Any) -> onnxruntime.InferenceSession:
    """A session on one thread."""
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each run, by round; what is short runs several times in a turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    counts = {name: max(1, int(ENOUGH / max(cpu_seconds(run), 1e-6))) for name, run in runs.items()}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            begin = time.thread_time()
            for _ in range(counts[name]):
                runs[name]()
            times[name].append((time.thread_time() - begin) / counts[name])
    return times


def faster(times: dict[str, list[float]], than: str, name: str) -> float:
    """Median of the rounds' ratios."""
    return median(a / b for a, b in zip(times[than], times[name], strict=True))


def build(shapes: str, args: FileArguments) -> tuple[Any, dict[str, Tensor], Variants]:
    """A plain model, one batch, and its variants."""
    if shapes in RESNET_SHAPES:
        net: Any = ResNetForImageClassification(ResNetConfig(**RESNET_SHAPES[shapes]))
        return net.eval(), {"pixel_values": torch.randn(args.batch, 3, args.size, args.size)}, OF_RESNET
    config = BertConfig(**BERT_SHAPES[shapes], max_position_embeddings=max(args.seq, 64))
    ids = torch.randint(1, config.vocab_size, (args.batch, args.seq))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return BertForSequenceClassification(config).eval(), inputs, OF_BERT


def table_of_model(shapes: str, args: FileArguments, folder: Path) -> Iterator[str]:
    """The lines of a table, one a file."""
    plain, inputs, variants = build(shapes, args)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    files, expected = {"plain float32": folder / f"{shapes}.onnx"}, {"plain float32": plain(**inputs).logits}
    export_plain(plain, files["plain float32"], inputs)
    chosen = {name: how for name, how in variants.items() if not args.variants or name in args.variants}
    for number, (name, (options, form)) in enumerate(chosen.items()):
        model: Any = frozen(plain, inputs, **options)
        files[name] = export_onnx(model, folder / f"{shapes}{number}.onnx", inputs, **form)
        expected[name] = model(**inputs).logits
    del plain, model
    off = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = {name: session(path) for name, path in files.items()}
    slow = {name: session(path, graph_optimization_level=off) for name, path in files.items()}
    runs = {name: lambda made=made: made.run(None, arrays)[0] for name, made in sessions.items()}
    each_time = {name: lambda made=made: made.run(None, arrays)[0] for name, made in slow.items()}
    times, unfolded = in_turns(runs, args.repeats), in_turns(each_time, max(1, args.repeats // 3))
    yield f"| {shapes}, batch {args.batch} | file | load | run | faster | unpacked each time | error |"
    yield "|---|---|---|---|---|---|---|"
    for name, path in files.items():
        load = min(cpu_seconds(lambda path=path: session(path)) for _ in range(3))
        error = (torch.from_numpy(runs[name]()) - expected[name]).abs().mean() / expected[name].abs().mean()
        yield (
            f"| {name} | {path.stat().st_size / 1e6:.1f} MB | {load:.2f} s | {1000 * median(times[name]):.1f} ms "
            f"| {faster(times, 'plain float32', name):.2f} | {1000 * median(unfolded[name]):.0f} ms | {error:.0e} |"
        )
    if args.profile:
        yield ""
        for name in [name for name in ("plain float32", "W1A1") if name in files]:
            yield f"{name}: {operators(files[name], arrays, folder, args.repeats)}"


def operators(path: Path, arrays: dict[str, Any], folder: Path, repeats: int) -> str:
    """Milliseconds by operator, from onnxruntime's profiler: the sum over nodes of each one's shortest run."""
    made = session(path, enable_profiling=True, profile_file_prefix=str(folder / "profile"))
    for _ in range(repeats):
        made.run(None, arrays)
    nodes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in json.loads(Path(made.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"])
    found: Counter[str] = Counter()
    for (operator, _), micros in nodes.items():
        found[operator] += min(micros)
    return ", ".join(f"{operator} {micros / 1000:.2f}" for operator, micros in found.most_common(12))


class Alone(nn.Module):
    """One layer as a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def table_of_layers(args: FileArguments, folder: Path) -> Iterator[str]:
    """The lines of a table: layers by themselves, with their signs and scales."""

    def files(layer: nn.Module, x: Tensor) -> dict[str, onnxruntime.InferenceSession]:
        plain = Alone(layer).eval()
        export_plain(plain, folder / "plain.onnx", {"x": x})
        model = frozen(plain, {"x": x}, first_layer="binarize", head="binarize")
        axes = {"x": {0: "batch"}}
        made = {"plain": session(folder / "plain.onnx")}
        for name, form in (("integer", {}), ("float32", FLOAT32)):
            made[name] = session(export_onnx(model, folder / "layer.onnx", {"x": x}, dynamic_axes=axes, **form))
        return made

    def row(name: str, made: dict[str, onnxruntime.InferenceSession], x: Tensor) -> str:
        times = in_turns({kind: lambda s=s: s.run(None, {"x": x.numpy()}) for kind, s in made.items()}, args.repeats)
        ratios = " | ".join(f"{faster(times, 'plain', kind):.2f}" for kind in ("integer", "float32"))
        return f"| {name} | {1000 * median(times['plain']):.3f} ms | {ratios} |"

    yield "| W1A1 | plain float32 | faster | with products=float32 |"
    yield "|---|---|---|---|"
    for features, outputs in LINEAR:
        for rows in ROWS:
            x = torch.randn(rows, features)
            yield row(f"linear {features} to {outputs}, {rows} rows", files(nn.Linear(features, outputs), x), x)
    for name, (channels, outputs, size, options) in CONVOLUTIONS.items():
        x = torch.randn(args.batch, channels, size, size)
        yield row(name, files(nn.Conv2d(channels, outputs, **options), x), x)


def main() -> None:
    """Print the tables."""
    (args,) = HfArgumentParser(FileArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        if args.what == "layers":
            print("\n".join(table_of_layers(args, folder)))
        else:
            for shapes in args.shapes:
                print("\n".join(table_of_model(shapes, args, folder)), end="\n\n")


if __name__ == "__main__":
    main()
