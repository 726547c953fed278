"""last_whole_checkpoint: where to resume after a crash, which may have come in the middle of a save."""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoints.files import headers
from ..errors import CheckpointError
from ..modules.calibration import in_processes

logger = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(folder: str | os.PathLike[str], processes: int | None = None) -> str | None:
    """The newest checkpoint of a Trainer run that was written to its end; None if there is none.

    Trainer writes straight into checkpoint-N. A process that is killed meanwhile leaves a folder that
    `resume_from_checkpoint=True` would take first. Here each newer one that is not whole is named in a warning.

    Whole means: trainer_state.json can be read and is of step N; every safetensors file is as long as its header says,
    and the index names no missing one; weights, optimizer and scheduler are there, and what torch.save wrote has its
    end; and each process finds its random state. Files are not read through.

    Args:
        folder: the run's output_dir; if it does not exist, there is no checkpoint.
        processes: how many processes wrote the checkpoints; by default as many as there are now, or one.
    """
    for step, path in sorted(_found(Path(folder)), reverse=True):
        wrong = damage(path, step, processes)
        if wrong is None:
            return str(path)
        logger.warning("%s is skipped, as its save was cut off: %s.", path, wrong)
    return None


def _found(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def damage(path: Path, step: int, processes: int | None = None) -> str | None:
    """What shows that a checkpoint folder is not whole, or None; see `last_whole_checkpoint`."""
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no trainer_state.json, which Trainer writes last"
    except ValueError:
        return "its trainer_state.json cannot be read"
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"its trainer_state.json is not of step {step}"
    return _weights(path) or _training(path) or _random_states(path, processes)


def _weights(path: Path) -> str | None:
    index = path / "model.safetensors.index.json"
    named: set[str] = set()
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} cannot be read"
    files = sorted(path.glob("*.safetensors"))
    missing = sorted(named - {file.name for file in files})
    if missing:
        return f"{', '.join(missing)} is missing"
    others = [*path.glob("pytorch_model*"), *path.glob("adapter_model.bin"), *path.glob("global_step*")]
    if not files and not others:
        return "it has no weights"
    for file in files:
        if not _ends_as_it_begins(file):
            return f"{file.name} is shorter than its header says"
    return _cut_off([other for other in others if other.suffix == ".bin"])


def _ends_as_it_begins(file: Path) -> bool:
    """Whether a safetensors file has the length that its header tells."""
    try:
        list(headers([file]))
    except CheckpointError:
        return False
    return True


def _training(path: Path) -> str | None:
    states = [*path.glob("optimizer*"), *path.glob("global_step*")]
    if not states:
        return "it has no optimizer state"
    if not (path / "scheduler.pt").is_file():
        return "it has no scheduler.pt"
    return _cut_off([file for file in (*states, path / "scheduler.pt", path / "scaler.pt") if file.is_file()])


def _random_states(path: Path, processes: int | None) -> str | None:
    if (path / "rng_state.pth").is_file() and processes in (None, 1):
        return _cut_off([path / "rng_state.pth"])
    count = processes or (torch.distributed.get_world_size() if in_processes() else _launched())
    files = [path / ("rng_state.pth" if count == 1 else f"rng_state_{rank}.pth") for rank in range(count)]
    if count == 1 and not files[0].is_file():
        files = sorted(path.glob("rng_state_*.pth"))  # of several processes: any of them will do
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        return (
            f"{', '.join(missing) or 'rng_state.pth'} is missing (if it was saved by another number of processes: "
            "last_whole_checkpoint(folder, processes=...))"
        )
    return _cut_off(files)


def _launched() -> int:
    """The number of processes that a launcher said, before torch.distributed runs."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _cut_off(files: list[Path]) -> str | None:
    """The first file of torch.save without its end: it is a zip archive, whose directory comes last."""
    for file in files:
        if not zipfile.is_zipfile(file):
            return f"{file.name} was not written to its end"
    return None
