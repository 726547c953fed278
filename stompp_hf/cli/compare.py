"""how far two checkpoints' outputs lie apart, on random inputs"""

import argparse

from ..checkpoints.rewriting import load
from ..reports.comparison import output_difference
from . import folder


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    folder(added, "of the same class")


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    return output_difference(load(args.source), load(args.target))
