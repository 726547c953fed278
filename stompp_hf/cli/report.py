"""one HTML file about one or several runs"""

import argparse
from pathlib import Path

from ..reports.html_report import write_report


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""
    added.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="Trainer's output_dir")
    added.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first RUN_DIR")
    added.add_argument("--before", type=Path, metavar="FOLDER", help="checkpoint with the weights before training")
    added.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the pictures as PNG files too")


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    return write_report(args.runs, args.out, args.before, args.pictures)
