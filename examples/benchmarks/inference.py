"""How fast packed layers are: operators, blocks and whole models against torch in float32, bfloat16 and int8.

    python examples/benchmarks/inference.py --threads 1                       # everything, a few minutes on a CPU
    python examples/benchmarks/inference.py --what models --models bert-base resnet18 --batch 8 --threads 0
    python examples/benchmarks/inference.py --what operators --weights_only True --threads 1
    python examples/benchmarks/inference.py --what models --models bert-base minilm --attention True --threads 1
    python examples/benchmarks/inference.py --peers onnxruntime bnn-lab --threads 1

All contenders take turns in one process (in a different order each round); a time is the least of all rounds, which a
busy machine disturbs least, and a ratio that of two such times; calls that are short are made several times in a turn,
all contenders' alike, so that the clock is no part of them, and small weights lie in a cache. With one thread it is the
thread's CPU time, else wall time. int8 is torch's dynamic quantization of linear layers. Models have random weights;
the packed ones are calibrated on their input, and fused with `fuse_for_inference`. "Of inner loop" is the rate over
that of the kernels' inner loop alone, on operands in the first cache, which nothing can pass. Prints Markdown tables.
"""

import copy
import math
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    ResNetConfig,
    ResNetForImageClassification,
    logging,
)

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, fuse_for_inference, kernels, pack_model
from stompp_hf.checkpoints.packing import pack_members
from stompp_hf.inference.fused_layers import fuse
from stompp_hf.modules import binary_class_of

ENOUGH = 2e-4
"""Seconds that a turn lasts at least: reading the clock takes as long as the shortest calls."""
FLOAT32, BFLOAT16, INT8, PACKED, FUSED = "float32", "bfloat16", "int8", "packed", "packed, fused"
REAL = "fused, real attention"
BERTS: dict[str, dict[str, Any]] = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny-bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "resnet50": {},
    "tiny-resnet": {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]},
}
BLOCKS = {"bert": "bert.encoder.layer.1", "resnet": "resnet.encoder.stages.1.layers.1"}
LINEAR = ((768, 768), (768, 3072), (3072, 768), (384, 384), (384, 1536), (1536, 384))
CONVOLUTIONS = (
    (64, 64, 56, 3),
    (128, 128, 28, 3),
    (256, 256, 14, 3),
    (512, 512, 7, 3),
    (256, 64, 56, 1),
    (64, 256, 56, 1),
)


@dataclass
class BenchmarkArguments:
    """What is measured."""

    what: list[str] = field(
        default_factory=lambda: ["operators", "blocks", "models"],
        metadata={"help": "operators, blocks, models: one or more."},
    )
    models: list[str] = field(
        default_factory=lambda: ["bert-base", "minilm", "resnet18", "resnet50"],
        metadata={"help": f"Shapes: {', '.join((*BERTS, *RESNETS))}."},
    )
    rows: list[int] = field(default_factory=lambda: [1, 16, 128, 512], metadata={"help": "Rows of linear operators."})
    batch: int = field(default=1, metadata={"help": "Sequences or images."})
    seq: int = field(default=128, metadata={"help": "Tokens a sequence."})
    size: int = field(default=224, metadata={"help": "Height and width of an image."})
    weights_only: bool = field(default=False, metadata={"help": "Binary weights and real activations (W1A32)."})
    attention: bool = field(default=False, metadata={"help": "Binary attention too, in BERTs."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's number."})
    repeats: int = field(default=15, metadata={"help": "Rounds a row."})
    leave_out: list[str] = field(
        default_factory=list,
        metadata={"help": "Contenders to leave out, as bfloat16 on a CPU that has no instructions for it."},
    )
    peers: list[str] = field(
        default_factory=list, metadata={"help": f"Also these, where installed: {', '.join(peers.COLUMNS)}."}
    )


@dataclass
class Case:
    """One row of a table: what it is, its multiplications and additions (or 0), and how each contender runs it."""

    name: str
    macs: int
    contenders: dict[str, Callable[[], Any]]


def frozen(plain: nn.Module, x: Tensor, args: BenchmarkArguments) -> tuple[nn.Module, nn.Module]:
    """A packed layer, as `from_pretrained` gives it, and the same fused."""
    kind = binary_class_of(plain)
    assert kind is not None
    layer: Any = kind.convert(copy.deepcopy(plain), config(args))
    layer.calibrate_weight()
    if not args.weights_only:
        layer.calibrate_activation(layer.product.rows(x))
    layer.enter("frozen", 1.0)
    pack_members({"layer": layer})
    fused = copy.deepcopy(layer.eval())
    fuse(fused, *fused.scale_and_shift())
    return layer, fused


def config(args: BenchmarkArguments, attention: bool = False) -> StoMPPConfig:
    """Options of the packed models."""
    return StoMPPConfig(
        binarize="weights" if args.weights_only else "weights_and_activations",
        attention="binarize" if attention else "keep",
    )


def half_and_int8(plain: nn.Module, has_linear: bool) -> dict[str, nn.Module]:
    """The other contenders' modules."""
    found = {BFLOAT16: copy.deepcopy(plain).to(torch.bfloat16)}
    if has_linear:  # inside of something: only what is inside is quantized
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is announced to move to torchao
            found[INT8] = quantize_dynamic(nn.Sequential(copy.deepcopy(plain)), {nn.Linear}, dtype=torch.qint8)[0]
    return found


def operators(args: BenchmarkArguments) -> Iterator[Case]:
    """Linear layers at the shapes of BERT-base and MiniLM, convolutions at those of ResNets."""
    plains: list[tuple[str, nn.Module, Tensor]] = []
    for inner, outer in LINEAR:
        for rows in args.rows:
            plains.append(
                (f"linear {inner} to {outer}, {rows} rows", nn.Linear(inner, outer), torch.randn(rows, inner))
            )
    for inner, outer, size, kernel in CONVOLUTIONS:
        plain = nn.Conv2d(inner, outer, kernel, padding=kernel // 2)
        name = f"{kernel}x{kernel} convolution {inner} to {outer}, {size}x{size}, batch {args.batch}"
        plains.append((name, plain, torch.randn(args.batch, inner, size, size)))
    for name, plain, x in plains:
        y = plain(x)
        macs = y.numel() * math.prod(plain.weight.shape[1:])
        (packed, fused), others = frozen(plain, x, args), half_and_int8(plain, isinstance(plain, nn.Linear))
        half = x.bfloat16()
        calls: dict[str, Callable[[], Any]] = {FLOAT32: lambda m=plain, x=x: m(x)}
        calls[BFLOAT16] = lambda m=others[BFLOAT16], x=half: m(x)
        if INT8 in others:
            calls[INT8] = lambda m=others[INT8], x=x: m(x)
        calls[PACKED] = lambda m=packed, x=x: m(x)
        calls[FUSED] = lambda m=fused, x=x: m(x)
        calls.update(peers.calls_of(args.peers, plain, x))
        yield Case(name, macs, calls)


def build(name: str, args: BenchmarkArguments) -> tuple[Any, dict[str, Tensor]]:
    """A model with random weights, in eval mode, and its inputs."""
    torch.manual_seed(0)
    if name in RESNETS:
        model: Any = ResNetForImageClassification(ResNetConfig(**RESNETS[name]))
        return model.eval(), {"pixel_values": torch.randn(args.batch, 3, args.size, args.size)}
    shapes = BertConfig(**BERTS[name], max_position_embeddings=max(args.seq, 64))
    ids = torch.randint(1, shapes.vocab_size, (args.batch, args.seq))
    return BertForSequenceClassification(shapes).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def packed(plain: Any, inputs: dict[str, Tensor], args: BenchmarkArguments, attention: bool) -> Any:
    """A packed model, calibrated on its input."""
    model = binarize_model(copy.deepcopy(plain), config(args, attention), inputs)
    progression = Progression(model, 1000)
    progression.step(1000)
    calibrate(model, [inputs])
    progression.detach()  # its checks of activations are for training
    return pack_model(model).eval()


def contestants(name: str, args: BenchmarkArguments) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All models of one name, and their inputs."""
    plain, inputs = build(name, args)
    attention = args.attention and name in BERTS
    models = {FLOAT32: plain, **half_and_int8(plain, name in BERTS), PACKED: packed(plain, inputs, args, attention)}
    models[FUSED] = fuse_for_inference(copy.deepcopy(models[PACKED]), inputs)
    if attention:
        models[REAL] = fuse_for_inference(packed(plain, inputs, args, False), inputs)
    return models, inputs


def models_and_blocks(args: BenchmarkArguments) -> Iterator[Case]:
    """Whole models, and one block of each."""
    for name in args.models:
        with torch.inference_mode(False), torch.no_grad():  # as models are loaded: their tensors count changes
            models, inputs = contestants(name, args)
        size = f"{args.seq} tokens" if name in BERTS else f"{args.size}x{args.size}"
        if "models" in args.what:
            calls = {}
            for kind, model in models.items():
                dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float32
                own = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
                calls[kind] = lambda m=model, i=own: m(**i)
            calls.update(peers.calls_of(args.peers, models[FLOAT32], inputs))
            yield Case(f"{name}, {size}, batch {args.batch}", 0, calls)
        if "blocks" in args.what:
            path = BLOCKS["bert" if name in BERTS else "resnet"]
            seen: list[Tensor] = []
            hook = models[FLOAT32].get_submodule(path).register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            models[FLOAT32](**inputs)
            hook.remove()
            blocks = {kind: model.get_submodule(path) for kind, model in models.items()}
            half = seen[0].bfloat16()
            calls = {k: lambda m=b, x=half if k == BFLOAT16 else seen[0]: m(x) for k, b in blocks.items()}
            yield Case(f"{name}, {path.split('.', 1)[1]}, {tuple(seen[0].shape)}", 0, calls)


def measure(case: Case, args: BenchmarkArguments) -> dict[str, float]:
    """The least time of each contender, in ms."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    contenders = {name: call for name, call in case.contenders.items() if name not in args.leave_out}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    counts: dict[str, int] = {}
    for name, call in contenders.items():
        call()
        begin = clock()
        call()
        counts[name] = max(1, round(ENOUGH / max(clock() - begin, 1e-7)))
    for number in range(args.repeats):
        for name in random.Random(number).sample(list(times), len(times)):
            call, count = contenders[name], counts[name]
            begin = clock()
            for _ in range(count):
                call()
            times[name].append((clock() - begin) / count)
    return {name: 1e3 * min(own) for name, own in times.items()}


def ceiling() -> float | None:
    """Signs that the kernels' inner loop multiplies in a nanosecond (GMAC/s) on all threads; None without them."""
    if kernels.choice().native is None:
        return None
    best = 0.0
    for _ in range(50):
        begin = time.thread_time()
        count = kernels.inner_loop(200)
        best = max(best, count / (time.thread_time() - begin) / 1e9)
    return best * torch.get_num_threads()


def machine() -> str:
    """One line on what ran this."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    chosen = kernels.choice()
    threads = torch.get_num_threads()
    kind = "CPU" if threads == 1 else "wall"
    used = f"{chosen.used} {chosen.instructions}".strip()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, kernels: {used}, {kind} time"


def main() -> None:
    """Measure and print."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    logging.set_verbosity_error()
    if unknown := set(args.peers) - set(peers.COLUMNS):
        raise SystemExit(f"--peers {' '.join(unknown)}: choose among {', '.join(peers.COLUMNS)}.")
    if unknown := set(args.leave_out) - {BFLOAT16, INT8, PACKED}:
        raise SystemExit(f"--leave_out {' '.join(unknown)}: choose among {BFLOAT16}, {INT8}, {PACKED}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    most = None if args.weights_only else ceiling()  # real inputs are looked up by another loop
    limit = "" if most is None else f", inner loop alone {most:.0f} GMAC/s"
    print(f"{'W1A32' if args.weights_only else 'W1A1'}; {machine()}{limit}\n")
    names = [FLOAT32, BFLOAT16, INT8, *(name for peer in args.peers for name in peers.COLUMNS[peer]), PACKED, FUSED]
    names += [REAL] * args.attention
    names = [name for name in names if name not in args.leave_out]
    print(
        "| | "
        + " | ".join(f"{name}, ms" for name in names)
        + " | fused over float32 | over int8 | GMAC/s | of inner loop |"
    )
    print("|---|" + "---|" * (len(names) + 4))
    with torch.inference_mode():
        for source in (operators, models_and_blocks):
            if source is operators and "operators" not in args.what:
                continue
            if source is models_and_blocks and not {"blocks", "models"} & set(args.what):
                continue
            for case in source(args):
                times = measure(case, args)
                ratios = {name: times[FLOAT32] / own for name, own in times.items()}
                cells = [f"{times[name]:.3f}" if name in times else "" for name in names]
                int8 = f"{ratios[FUSED] / ratios[INT8]:.1f}" if INT8 in ratios else ""
                rate = f"{case.macs / times[FUSED] / 1e6:.0f}" if case.macs else ""
                share = f"{case.macs / times[FUSED] / 1e6 / most:.0%}" if case.macs and most else ""
                cells += [f"**{ratios[FUSED]:.1f}**", int8, rate, share]
                print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
