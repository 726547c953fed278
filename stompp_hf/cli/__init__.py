"""The command line: one file a subcommand, found by its name. It has a docstring, `add` for its options, and `run`."""

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

from ..errors import StoMPPError

NAMES = [found.name.replace("_", "-") for found in pkgutil.iter_modules(__path__)]


def parser(wanted: list[str]) -> argparse.ArgumentParser:
    """A parser of these subcommands. Others are not imported: each brings along what it works with."""
    made = argparse.ArgumentParser(prog="python -m stompp_hf", description="Look at, pack and ship checkpoints.")
    commands = made.add_subparsers(dest="command", required=True)
    for name in wanted:
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        added = commands.add_parser(name, help=module.__doc__)
        added.set_defaults(run=module.run)
        module.add(added)
    return made


def folder(added: argparse.ArgumentParser, target: str = "") -> None:
    """Add a checkpoint folder to a subcommand's arguments, and where it writes to."""
    added.add_argument("source", type=Path, help="folder of save_pretrained")
    if target:
        added.add_argument("target", type=Path, help=target)


def main(words: list[str] | None = None) -> int:
    """Run one command and print what it gives; returns the exit status: 0, or 1 after an error that was printed."""
    words = sys.argv[1:] if words is None else words
    args = parser(words[:1] if words[:1] and words[0] in NAMES else NAMES).parse_args(words)
    try:
        print(args.run(args))
    except StoMPPError as error:
        source = str(getattr(args, "source", ""))
        where = "" if source in str(error) else f"{source}: "
        print(f"error: {where}{error}", file=sys.stderr)
        return 1
    return 0
