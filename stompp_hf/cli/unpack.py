"""back to the training format, every stage frozen"""

import argparse

from ..checkpoints.inspection import inspect
from ..checkpoints.packing import unpack_model
from ..checkpoints.rewriting import rewrite
from . import folder


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    folder(added, "new folder")
    added.add_argument("--remote-code", action="store_true", help="load with trust_remote_code, without an import")


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    rewrite(args.source, args.target, unpack_model, args.remote_code)
    return inspect(args.target)
