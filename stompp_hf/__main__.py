"""The command line: `python -m stompp_hf inspect DIR`, `... pack SRC DST`, `... unpack SRC DST`, `... env`."""

import argparse
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from . import __version__, kernels
from .errors import CheckpointError, StoMPPError
from .inspecting import inspect, read_config
from .packing import pack_model, unpack_model

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
"""Endings of files that are not copied beside the new weights; training state has them too."""
NOT_COPIED = ("config.json", "trainer_state.json", "training_args.bin")


def load(folder: Path) -> Any:
    """The model of a checkpoint folder, in the class that it was saved from.

    Raises:
        CheckpointError: no checkpoint, not one of ours, damaged, or of a class that transformers has not.
    """
    config = read_config(folder)
    architecture = (config.get("architectures") or [""])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise CheckpointError(
            f"{folder}: its config.json names the class {architecture!r}, which transformers has not. Load it in "
            "Python, call stompp_hf.pack_model(model), and save_pretrained."
        )
    try:
        return cls.from_pretrained(folder)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} is damaged or cut off: {error}") from error


def rewrite(source: Path, target: Path, change: Callable[[Any], Any]) -> None:
    """Load, change and save a checkpoint, with the tokenizer's and other small files; all of it or nothing.

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
        if target.exists():
            target.rmdir()
        part.replace(target)


def environment() -> str:
    """Versions, and which kernels compute packed layers, and why."""
    versions = f"stompp_hf {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, Python {platform.python_version()}, {platform.machine()}\n{kernels.describe()}"


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 after an error that was printed."""
    parser = argparse.ArgumentParser(prog="python -m stompp_hf", description="Look at, pack and unpack checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="what is binary, bytes on disk, compression")
    look.add_argument("folder", type=Path, help="folder of save_pretrained")
    pack = commands.add_parser("pack", help="latent weights to 8 weights a byte")
    unpack = commands.add_parser("unpack", help="back to the training format, every stage frozen")
    for command in (pack, unpack):
        command.add_argument("source", type=Path, help="folder of save_pretrained")
        command.add_argument("target", type=Path, help="new folder")
    pack.add_argument("--commit", action="store_true", help="freeze the stages that are not frozen yet, untrained")
    commands.add_parser("env", help="versions, and which kernels compute packed layers, and why")
    args = parser.parse_args(words)
    try:
        if args.command == "env":
            print(environment())
            return 0
        if args.command == "pack":
            rewrite(args.source, args.target, lambda model: pack_model(model, commit=args.commit))
        elif args.command == "unpack":
            rewrite(args.source, args.target, unpack_model)
        print(inspect(args.folder if args.command == "inspect" else args.target))
    except StoMPPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
