"""What an ONNX file of a binary model weighs, and what loading and running it costs, against the plain model's.

    python examples/benchmarks/onnx_file.py                      # MiniLM's shapes, a minute or two
    python examples/benchmarks/onnx_file.py --shapes tiny

A BERT with random weights, exported plain by torch and frozen by export_onnx; run by onnxruntime on one CPU thread.
load: CPU time to make a session, which unpacks the bits; run: median CPU time of a batch; "each time": with
onnxruntime's optimizers off, so that weights are unpacked at every run. Prints a Markdown table.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from training_cost import BERT_SHAPES
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, PreTrainedModel

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, export_onnx

VARIANTS: dict[str, dict[str, Any]] = {
    "W1A1": {},
    "W1A1, binary embedding": {"embeddings": "binarize"},
    "W1A1, binary embedding and attention": {"embeddings": "binarize", "attention": "binarize"},
    "W1A32": {"binarize": "weights"},
}


@dataclass
class FileArguments:
    """What is measured."""

    shapes: str = field(default="minilm", metadata={"help": "Shapes of the model.", "choices": [*BERT_SHAPES]})
    batch: int = field(default=8, metadata={"help": "Sequences a batch."})
    seq: int = field(default=64, metadata={"help": "Tokens a sequence."})
    repeats: int = field(default=9, metadata={"help": "Batches of which the median is taken."})


def frozen(plain: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> PreTrainedModel:
    """A binary copy of a model, frozen at once."""
    model = binarize_model(copy.deepcopy(plain), StoMPPConfig(end=0.0, **options), inputs)
    Progression(model, 1).step(0)
    return calibrate(model, [inputs])


def export_plain(model: PreTrainedModel, path: Path, inputs: dict[str, torch.Tensor]) -> None:
    """The plain model as torch exports it, in one file."""
    torch.onnx.export(model.eval(), (), str(path), kwargs=inputs, external_data=False, verbose=False)


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU time of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def row(name: str, path: Path, inputs: dict[str, torch.Tensor], repeats: int) -> str:
    """One line of the table."""
    arrays = {key: value.numpy() for key, value in inputs.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    cells = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ):
        options.graph_optimization_level = level
        found: list[Any] = []
        load = cpu_seconds(
            lambda found=found: found.append(
                onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            )
        )
        session = found[0]
        session.run(None, arrays)
        run = median(cpu_seconds(lambda session=session: session.run(None, arrays)) for _ in range(repeats))
        cells += [f"{load:.2f} s"] if not cells else []
        cells += [f"{1000 * run:.0f} ms"]
    return f"| {name} | {path.stat().st_size / 1e6:.1f} MB | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    (args,) = HfArgumentParser(FileArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = BertConfig(**BERT_SHAPES[args.shapes], max_position_embeddings=max(args.seq, 64))
    plain = BertForSequenceClassification(config).eval()
    ids = torch.randint(1, config.vocab_size, (args.batch, args.seq))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lines = ["| | file | load | run | unpacked each time |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        export_plain(plain, Path(folder, "plain.onnx"), inputs)
        lines.append(row("plain float32", Path(folder, "plain.onnx"), inputs, args.repeats))
        for name, options in VARIANTS.items():
            path = export_onnx(frozen(plain, inputs, **options), Path(folder, "binary.onnx"), inputs)
            lines.append(row(name, path, inputs, args.repeats))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
