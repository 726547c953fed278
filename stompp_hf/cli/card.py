"""write README.md: how to load it, what is binary, sizes, metrics"""

import argparse

from ..checkpoints.model_card import write_model_card
from . import folder


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    folder(added)
    added.add_argument("--base-model", help="the model on the hub that this one was made from")
    added.add_argument("--metric", action="append", type=_metric, default=[], metavar="NAME=VALUE")


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    return write_model_card(args.source, metrics=dict(args.metric), base_model=args.base_model)


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)
