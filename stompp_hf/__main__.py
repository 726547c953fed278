"""The command line: `python -m stompp_hf inspect DIR`; pack, unpack, compare, card, export-onnx, report and env."""

import argparse
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__, kernels
from .checkpoints.files import architecture, model_class, read_config, weight_files
from .checkpoints.inspection import inspect
from .checkpoints.model_card import write_model_card
from .checkpoints.packing import pack_model, unpack_model
from .checkpoints.remote_code import add_remote_code
from .errors import CheckpointError, StoMPPError
from .export.onnx_export import CHOICES, export_onnx
from .reports.comparison import output_difference
from .reports.html_report import add_report, write_report
from .surgery.plan import FLOAT32, STORED

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
"""Endings of files that are not copied beside the new weights; training state has them too."""
NOT_COPIED = ("config.json", "trainer_state.json", "training_args.bin")


def load(folder: Path) -> Any:
    """The model of a checkpoint folder, in the class that it was saved from.

    Raises:
        CheckpointError: no checkpoint, not one of ours, damaged, or of a class that transformers has not.
    """
    name = architecture(read_config(folder))
    cls = model_class(name)
    if cls is None:
        raise CheckpointError(
            f"{folder}: its config.json names the class {name!r}, which transformers has not. Load it in Python, call "
            "stompp_hf.pack_model(model), and save_pretrained."
        )
    weight_files(folder)  # no pickle takes the place of safetensors that are missing
    try:
        return cls.from_pretrained(folder, use_safetensors=True)
    except StoMPPError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged file
        raise CheckpointError(f"{folder} is damaged or cut off: {type(error).__name__}: {error}") from error


def rewrite(source: Path, target: Path, change: Callable[[Any], Any], remote_code: bool = False) -> None:
    """Load, change and save a checkpoint, with a card, the tokenizer's and other small files; all of it or nothing.

    Raises:
        CheckpointError: as `load`; or `target` exists.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; give a new folder, or delete it first.")
    model = change(load(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        part = Path(name, "checkpoint")
        model.save_pretrained(part)
        for path in source.iterdir():
            weights = path.name in NOT_COPIED or path.name.endswith(WEIGHTS)
            if path.is_file() and not weights and not (part / path.name).exists():
                shutil.copy2(path, part / path.name)
        write_model_card(part, repo_id=target.name)
        if remote_code:
            add_remote_code(part)
        if target.exists():
            target.rmdir()
        part.replace(target)


def parser() -> argparse.ArgumentParser:
    """The commands, each with the function that runs it as `run`."""
    made = argparse.ArgumentParser(prog="python -m stompp_hf", description="Look at, pack and ship checkpoints.")
    commands = made.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Any], text: str, target: str = "") -> Any:
        added = commands.add_parser(name, help=text)
        added.set_defaults(run=run)
        added.add_argument("source", type=Path, help="folder of save_pretrained")
        if target:
            added.add_argument("target", type=Path, help=target)
        return added

    command("inspect", lambda args: inspect(args.source), "what is binary, bytes on disk, compression")
    pack = command("pack", _pack, "latent weights to 8 weights a byte", "new folder")
    pack.add_argument("--commit", action="store_true", help="freeze the stages that are not frozen yet, untrained")
    pack.add_argument("--real", choices=STORED, default=FLOAT32, help="how embeddings, heads, norms, biases are stored")
    unpack = command("unpack", _unpack, "back to the training format, every stage frozen", "new folder")
    for added in (pack, unpack):
        added.add_argument("--remote-code", action="store_true", help="load with trust_remote_code, without an import")
    command("compare", _compare, "how far two checkpoints' outputs lie apart, on random inputs", "of the same class")
    card = command("card", _card, "write README.md: how to load it, what is binary, sizes, metrics")
    card.add_argument("--base-model", help="the model on the hub that this one was made from")
    card.add_argument("--metric", action="append", type=_metric, default=[], metavar="NAME=VALUE")
    exported = command("export-onnx", _export, "an ONNX file, 8 weights a byte, signs summed as integers", "the file")
    for option, choices in CHOICES.items():
        exported.add_argument(
            f"--{option.replace('_', '-')}", choices=choices, default=choices[0], help="as export_onnx"
        )
    add_report(commands).set_defaults(run=_report)
    env = commands.add_parser("env", help="versions, and which kernels compute packed layers, and why")
    env.set_defaults(run=lambda args: environment())
    return made


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def _pack(args: argparse.Namespace) -> Any:
    rewrite(args.source, args.target, partial(pack_model, commit=args.commit, real=args.real), args.remote_code)
    return inspect(args.target)


def _unpack(args: argparse.Namespace) -> Any:
    rewrite(args.source, args.target, unpack_model, args.remote_code)
    return inspect(args.target)


def _compare(args: argparse.Namespace) -> Any:
    return output_difference(load(args.source), load(args.target))


def _card(args: argparse.Namespace) -> Any:
    return write_model_card(args.source, metrics=dict(args.metric), base_model=args.base_model)


def _export(args: argparse.Namespace) -> Any:
    path = export_onnx(load(args.source), args.target, **{option: getattr(args, option) for option in CHOICES})
    return f"{path}: {path.stat().st_size:,} bytes"


def _report(args: argparse.Namespace) -> Any:
    return write_report(args.runs, args.out, args.before, args.pictures)


def environment() -> str:
    """Versions, and which kernels compute packed layers, and why."""
    versions = f"stompp_hf {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    python = f"Python {platform.python_version()}, {platform.machine()}"
    return f"{versions}, {python}\n{kernels.describe()}"


def main(words: list[str] | None = None) -> int:
    """Run one command and print what it gives; returns the exit status: 0, or 1 after an error that was printed."""
    args = parser().parse_args(words)
    try:
        print(args.run(args))
    except StoMPPError as error:
        source = str(getattr(args, "source", ""))
        where = "" if source in str(error) else f"{source}: "
        print(f"error: {where}{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
