"""All that wants a GPU, in one command, for whoever has one for ten minutes.

    python examples/benchmarks/gpu.py --cifar FOLDER                # CIFAR-10 as parquet: train*.parquet, test*.parquet
    python examples/benchmarks/gpu.py --minutes 60 --output_dir runs/gpu
    python examples/benchmarks/gpu.py --tiny True --device cpu      # whether the script itself runs

In this order: whether 1-bit kernels give what torch gives, bit for bit; packed linear layers against other products;
training steps and their memory; and, for the rest of the time, the paper's cells on CIFAR-10 (on noise without
--cifar: then only their times mean anything). After each row results.json and results.md are written anew. Run the same
command again after a stop: parts that are complete, and cells that are trained, are kept.
"""

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import training_cost
from gpu_cells import cell_rows
from inference import BenchmarkArguments as PackedArguments, frozen
from torch import Tensor, nn
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from stompp_hf import kernels
from stompp_hf.method.layer_product import LinearProduct
from stompp_hf.method.packed_product import packed_forward, packed_reference
from stompp_hf.method.sign_bits import SignBits

logger = logging.getLogger("gpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 16, 128, 2048)
WAYS = {"eager": (False, False), "autocast": (False, True), "compiled": (True, False)}
"""Of a training step: whether it is compiled, and whether in bfloat16; compiling comes last, since it takes longest."""
CALLS = 20
"""Calls that are timed together: a GPU is asked to finish after the last of them."""


@dataclass
class GPUArguments:
    """What is measured, for how long, and where to."""

    output_dir: str = field(default="runs/gpu", metadata={"help": "Where results and cells are written."})
    device: str = field(default="cuda", metadata={"help": "cuda or cpu."})
    minutes: float = field(default=10.0, metadata={"help": "No further measurement or cell begins after these."})
    training_share: float = field(default=0.5, metadata={"help": "Part of them after which no training step does."})
    cifar: str | None = field(default=None, metadata={"help": "Folder with train*.parquet and test*.parquet."})
    seed: int = field(default=0, metadata={"help": "Of the cells."})
    repeats: int = field(default=10, metadata={"help": "Rounds of everything that is timed."})
    batch: int = field(default=32, metadata={"help": "Sequences or images of a training step."})
    seq: int = field(default=128, metadata={"help": "Tokens of a sequence."})
    size: int = field(default=224, metadata={"help": "Height and width of an image."})
    ways: list[str] = field(
        default_factory=lambda: list(WAYS), metadata={"help": "Of a training step.", "choices": list(WAYS)}
    )
    backend: str = field(default="inductor", metadata={"help": "What torch.compile is given."})
    tiny: bool = field(default=False, metadata={"help": "The smallest shapes of everything."})

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise SystemExit(
                f"--device {self.device}, and torch sees no GPU; --tiny True --device cpu tries the script."
            )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of linear layers: BERT-base's, and one that fills no whole word."""
        return [(40, 24), (33, 7)] if self.tiny else [(768, 768), (768, 3072), (3072, 768), (333, 77)]

    @property
    def models(self) -> list[str]:
        """Names of shapes in training_cost.py."""
        return ["tiny", "tiny-resnet"] if self.tiny else ["bert-base", "resnet50"]


Clock = Callable[[], float]
"""Seconds since the start."""
Part = Callable[[GPUArguments, Clock], Iterator[dict[str, Any]]]


def kernel_rows(args: GPUArguments, clock: Clock) -> Iterator[dict[str, Any]]:
    """Whether the kernels of this device (Triton on a GPU, C on a CPU) give what plain torch gives there."""
    used, cells = kernels.choice(), [(dtype, shape) for shape in args.linears for dtype in DTYPES]
    for dtype, (inner, outer) in cells:
        w, b, scale, shift = (random(shape, args, 1) for shape in ((outer, inner), (inner,), (outer,), (outer,)))
        signs, found = SignBits.of(w, 0), []
        for rows in ROWS:
            x = random((rows, inner), args, 0).to(dtype)
            x[0], x[:, :2] = b.to(dtype), torch.tensor([float("nan"), float("inf")])  # zeros, and what has no size
            for threshold in (b, None):
                operands = (signs, (scale, shift), dtype, LinearProduct(), 0.0)
                y = packed_forward(x, threshold, *operands)
                found.append(None if y is None else torch.equal(y, by_torch(x, threshold, *operands, mode=used.mode)))
        asked = [one for one in found if one is not None]
        verdict = "equal" if asked and all(asked) else "DIFFERENT" if asked else "no kernel, plain torch"
        yield {
            "layer": f"{inner} to {outer}",
            "dtype": str(dtype)[6:],
            "products": len(asked),
            "against torch": verdict,
        }


def by_torch(x: Tensor, threshold: Tensor | None, signs: SignBits, affine: Any, *rest: Any, mode: str) -> Tensor:
    """The same in plain torch."""
    try:
        kernels.use("torch")
        return packed_reference(x, threshold, True, signs, affine, *rest)
    finally:
        kernels.use(mode)


def linear_rows(args: GPUArguments, clock: Clock) -> Iterator[dict[str, Any]]:
    """Packed linear layers against float32, bfloat16 and int8 products, ms a call."""
    for inner, outer in args.linears:
        plain = nn.Linear(inner, outer).to(args.device)
        half = nn.Linear(inner, outer).to(args.device, torch.bfloat16)
        for rows in ROWS:
            x = random((rows, inner), args, 0)
            (_, packed), x_half, x_int8 = frozen(plain, x, PackedArguments()), x.bfloat16(), x.to(torch.int8)
            w_int8 = plain.weight.detach().to(torch.int8).t()
            calls: dict[str, Callable[[], Any]] = {
                "float32": lambda x=x, plain=plain: plain(x),
                "bfloat16": lambda x=x_half, half=half: half(x),
                "int8 product alone": lambda x=x_int8, w=w_int8: torch._int_mm(x, w),
                "packed": lambda x=x, packed=packed: packed(x),
            }
            with torch.no_grad():
                times = milliseconds(calls, args)
            ratio = times["float32"] / times["packed"]
            yield {"layer": f"{inner} to {outer}", "rows": rows, **times, "float32 / packed": round(ratio, 2)}


def milliseconds(calls: dict[str, Callable[[], Any]], args: GPUArguments) -> dict[str, Any]:
    """The median time of a call in ms, in turns; None for what cannot be called (int8 of few rows or odd sizes)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            del times[name]
            logger.info("%s: %s", name, str(error).splitlines()[0])
    for _ in range(args.repeats):
        for name, found in times.items():
            settle(args)
            begin = time.perf_counter()
            for _ in range(CALLS):
                calls[name]()
            settle(args)
            found.append(1e3 * (time.perf_counter() - begin) / CALLS)
    return {name: round(median(times[name]), 4) if name in times else None for name in calls}


def training_rows(args: GPUArguments, clock: Clock) -> Iterator[dict[str, Any]]:
    """A step with half of the stages frozen and the next at p = 0.5, by `training_cost.py`."""
    left_out = False
    for compiled, mixed in (WAYS[name] for name in args.ways):
        for shapes in args.models:
            way = f"{'compiled' if compiled else 'eager'}, {'bfloat16 autocast' if mixed else 'float32'}"
            if clock() > 60 * args.minutes * args.training_share:
                yield {"shapes": shapes, "way": way, "failed": "left out: --minutes are needed for the cells"}
                left_out = True
                continue
            try:
                rows = training_steps(args, shapes, compiled, mixed)
            except Exception as error:  # out of memory; what a compiler cannot do
                logger.exception("%s, %s", shapes, way)
                yield {"shapes": shapes, "way": way, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            for method, row in rows.items():
                yield {
                    "shapes": shapes, "way": way, "method": method, "step, ms": round(row.time, 2),
                    "/ plain": round(row.to_plain, 2), "/ vanilla STE": round(row.to_vanilla, 2),
                    "progression.step(), ms": round(row.progression, 2), "memory, MB": round(row.memory, 1),
                }  # fmt: skip
    if left_out:
        raise TimeoutError("Training steps were left out: the same command again, with more --minutes, measures them.")


def training_steps(args: GPUArguments, shapes: str, compiled: bool, mixed: bool) -> dict[str, training_cost.Row]:
    """All methods in turns, in one way."""
    wanted = training_cost.BenchmarkArguments(
        shapes=shapes, batch=args.batch, seq=args.seq, size=args.size, device=args.device, bf16=mixed
    )
    runners = {}
    for name, config in training_cost.methods(wanted).items():
        runners[name] = training_cost.Runner(wanted, config)
        if compiled:
            torch.compiler.reset()
            runners[name].model.compile(backend=args.backend)
    return training_cost.measure(runners, training_cost.halfway(wanted), True, args.repeats)


PARTS: dict[str, tuple[str, Part]] = {
    "Kernels": ("Bit for bit.", kernel_rows),
    "Linear layers": ("ms a call; int8 without what makes whole numbers of real ones.", linear_rows),
    "Training": (
        "Memory: on a GPU the peak of a step above what was there before it; on a CPU what is saved for backward.",
        training_rows,
    ),
    "CIFAR-10": ("Cells of examples/ablations, their accuracy on the test images in percent.", cell_rows),
}


def random(shape: tuple[int, ...], args: GPUArguments, seed: int) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(args.device)


def settle(args: GPUArguments) -> None:
    """Wait for the GPU."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    lines = [f"# {results['machine']}", "", f"{results['command']}", ""]
    for name, part in results["parts"].items():
        about = PARTS[name][0] + ("" if part["done"] else " Not complete.")
        columns = list(dict.fromkeys(column for row in part["rows"] for column in row))
        lines += [f"## {name}", "", about, ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"] if columns else []
        lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in part["rows"]]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def write(folder: Path, results: dict[str, Any]) -> None:
    """Both files, each whole or not at all."""
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", markdown(results))):
        part = folder / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / name)


def start(folder: Path, args: GPUArguments) -> dict[str, Any]:
    """What an earlier run of the same options on the same machine left, or nothing yet.

    Raises SystemExit where it is of another machine or of other options.
    """
    machine = training_cost.machine(training_cost.BenchmarkArguments(device=args.device))
    options = {k: v for k, v in asdict(args).items() if k not in ("output_dir", "minutes", "training_share", "cifar")}
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    results = {"machine": machine, "command": f"`gpu.py {command}`", "parts": {}}
    if (folder / "results.json").exists():
        before: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        other = [key for key in ("machine", "command") if before[key] != results[key]]
        if other:
            raise SystemExit(f"{folder} holds results of {before[other[0]]}, not {results[other[0]]}: --output_dir.")
        return before
    return results


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing; returns all results."""
    (args,) = HfArgumentParser(GPUArguments).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("stompp_hf").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    folder, began = Path(args.output_dir), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    results, failed = start(folder, args), []
    for name, (_, rows) in PARTS.items():
        if results["parts"].get(name, {}).get("done"):
            continue
        part = results["parts"][name] = {"rows": [], "done": False}
        try:
            for row in rows(args, lambda: time.monotonic() - began):
                part["rows"].append(row)
                write(folder, results)
            part["done"] = True
        except TimeoutError as error:
            logger.info("%s", error)
        except Exception:  # the other parts are worth having
            logger.error("%s: %s", name, traceback.format_exc())
            failed.append(name)
        write(folder, results)
        logger.info("%s: %d rows, %.1f min in all", name, len(part["rows"]), (time.monotonic() - began) / 60)
    print((folder / "results.md").read_text(encoding="utf-8"))
    if failed or any(row["against torch"] == "DIFFERENT" for row in results["parts"]["Kernels"]["rows"]):
        raise SystemExit(f"failed: {', '.join(failed) or 'the kernels give other numbers than torch'}; see above.")
    return results


if __name__ == "__main__":
    main()
