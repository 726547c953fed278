"""what is binary, bytes on disk, compression"""

import argparse

from ..checkpoints.inspection import inspect
from . import folder


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    folder(added)


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    return inspect(args.source)
