"""latent weights to 8 weights a byte"""

import argparse
from functools import partial

from ..checkpoints.inspection import inspect
from ..checkpoints.packing import pack_model
from ..checkpoints.rewriting import rewrite
from ..surgery.plan import FLOAT32, STORED
from . import folder


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    folder(added, "new folder")
    added.add_argument("--commit", action="store_true", help="freeze the stages that are not frozen yet, untrained")
    added.add_argument(
        "--real", choices=STORED, default=FLOAT32, help="how embeddings, heads, norms, biases are stored"
    )
    added.add_argument("--remote-code", action="store_true", help="load with trust_remote_code, without an import")


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    rewrite(args.source, args.target, partial(pack_model, commit=args.commit, real=args.real), args.remote_code)
    return inspect(args.target)
