"""versions, and which kernels compute packed layers, and why"""

import argparse
import platform
from importlib.metadata import version

from .. import kernels


def add(added: argparse.ArgumentParser) -> None:
    """Add its options."""


def run(args: argparse.Namespace) -> object:
    """What is printed."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("stompp_hf", "torch", "transformers"))
    return f"{versions}, Python {platform.python_version()}, {platform.machine()}\n{kernels.describe()}"
