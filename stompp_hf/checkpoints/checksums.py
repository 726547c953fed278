"""Checksums over what a plan covers, in the metadata of safetensors files: a flipped bit of a sign is no error else.

Each file of a checkpoint holds the sums of all covered tensors, and a mark of the save that it belongs to. They are
taken over bytes on disk, so that a load in another dtype changes nothing; what a plan does not cover may be edited.
STOMPP_CHECKSUMS=skip loads without looking.
"""

import hashlib
import json
import logging
import mmap
import os
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..integrations.sharding import is_sharded

logger = logging.getLogger(__name__)
KEY = "stompp"
"""Name of our entry in a file's metadata."""
SWITCH = "STOMPP_CHECKSUMS"
"""Environment variable: "check", or "skip"."""


def note_of(written: Mapping[str, Tensor], covered: Container[str]) -> dict[str, Any]:
    """What every file of a save is to hold: the sums of what is `covered`, and a mark that follows from all tensors."""
    whole = {name: t for name, t in written.items() if isinstance(t, Tensor) and not t.is_meta and not is_sharded(t)}
    sums = {name: _sum(tensor) for name, tensor in whole.items()}
    mark = hashlib.blake2b(json.dumps(sums, sort_keys=True).encode(), digest_size=8).hexdigest()
    kept = {name: value for name, value in sums.items() if name in covered}
    return {"save": mark, "crc32": kept}


def _sum(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(flat.numpy().data):08x}"


def check_files(read: Mapping[Path, tuple[Mapping[str, Any], int]], mark: str | None) -> None:
    """Hold the safetensors files of a checkpoint to the sums in them, to each other, and to the mark in config.json.

    read: what `read_header` gave, by file.

    Raises:
        CheckpointError: a covered tensor is not what was saved, or the files are of several saves.
    """
    switch = os.environ.get(SWITCH, "check")
    if switch not in ("check", "skip"):
        raise CheckpointError(f"{SWITCH}={switch!r} is neither 'check' nor 'skip'.")
    if switch == "skip":
        return
    notes = {path: _note(path, header) for path, (header, _) in read.items()}
    if not any(notes.values()):
        for path in list(notes)[:1]:  # where there is any: a pickle has no place for sums
            logger.warning(
                "%s has no checksums: it was saved by an older stompp_hf, or by another tool. Damage to it would go "
                "unseen; save_pretrained writes them.", path,
            )  # fmt: skip
        return
    marks: dict[str, str | None] = {"config.json": mark} if mark else {}
    for path, note in notes.items():
        marks[path.name] = note.get("save")
        others = [name for name, other in marks.items() if other != marks[path.name]]
        if others:
            raise CheckpointError(
                f"{path} and {others[0]} beside it were not written by the same save: one of the two is of another "
                f"checkpoint. Take both from where they came from; {SWITCH}=skip loads them as they are."
            )
        _check_file(path, *read[path], note["crc32"])


def _note(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    text = header.get("__metadata__", {}).get(KEY)
    if text is None:
        return {}
    try:
        note = json.loads(text)
        if isinstance(note["save"], str) and isinstance(note["crc32"], dict):
            return note  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{path} is damaged: the checksums in its metadata cannot be read.")


def _check_file(path: Path, header: Mapping[str, Any], begin: int, sums: Mapping[str, Any]) -> None:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        for name, value in header.items():
            if name not in sums:
                continue
            first, last = (begin + offset for offset in value["data_offsets"])
            with view[first:last] as part:
                same = f"{zlib.crc32(part):08x}" == sums[name]
            if not same:
                raise CheckpointError(
                    f"{path}: {name} is not what was saved (its checksum differs): the file is damaged, or was changed "
                    f"by hand. Take it from where it came from; {SWITCH}=skip loads it as it is."
                )
