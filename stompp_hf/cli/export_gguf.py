"""a GGUF file for llama.cpp, binary weights as Q1_0"""

import argparse
from pathlib import Path

from ..checkpoints.rewriting import load
from ..export.gguf_export import CHOICES, export_gguf
from . import folder


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    folder(added, "the file")
    for option, choices in CHOICES.items():
        default = None if option == "pooling" else choices[0]
        added.add_argument(f"--{option}", choices=choices, default=default, help="as export_gguf")
    added.add_argument("--tokenizer", type=Path, help="its folder, where it is not the checkpoint's")
    added.add_argument("--pre", help="llama.cpp's name of how text is split into words, where it is not known")
    added.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    options = {option: getattr(args, option) for option in (*CHOICES, "pre", "overwrite")}
    path = export_gguf(load(args.source), args.target, args.tokenizer or args.source, **options)
    return f"{path}: {path.stat().st_size:,} bytes"
