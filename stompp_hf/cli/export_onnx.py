"""an ONNX file, 8 weights a byte, signs summed as integers"""

import argparse

from ..checkpoints.rewriting import load
from ..export.onnx_export import CHOICES, export_onnx
from . import folder


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    folder(added, "the file")
    for option, choices in CHOICES.items():
        added.add_argument(f"--{option.replace('_', '-')}", choices=choices, default=choices[0], help="as export_onnx")


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    path = export_onnx(load(args.source), args.target, **{option: getattr(args, option) for option in CHOICES})
    return f"{path}: {path.stat().st_size:,} bytes"
