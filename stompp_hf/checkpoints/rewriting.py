"""Loading a checkpoint folder in the class that it was saved from, and writing a changed one beside it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StoMPPError
from .files import architecture, model_class, read_config, weight_files
from .model_card import write_model_card
from .remote_code import add_remote_code

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
"""Endings of files that are not copied beside the new weights; training state has them too."""
NOT_COPIED = ("config.json", "trainer_state.json", "training_args.bin")


def load(folder: Path) -> Any:
    """The model of a checkpoint folder, in the class that it was saved from.

    Raises:
        CheckpointError: no checkpoint, not one of ours, damaged, or of a class that transformers has not.
    """
    name = architecture(read_config(folder))
    cls = model_class(name)
    if cls is None:
        raise CheckpointError(
            f"{folder}: its config.json names the class {name!r}, which transformers has not. Load it in Python, call "
            "stompp_hf.pack_model(model), and save_pretrained."
        )
    weight_files(folder)  # no pickle takes the place of safetensors that are missing
    try:
        return cls.from_pretrained(folder, use_safetensors=True)
    except StoMPPError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged file
        raise CheckpointError(f"{folder} is damaged or cut off: {type(error).__name__}: {error}") from error


def rewrite(source: Path, target: Path, change: Callable[[Any], Any], remote_code: bool = False) -> None:
    """Load, change and save a checkpoint, with a card, the tokenizer's and other small files; all of it or nothing.

    Raises:
        CheckpointError: as `load`; or `target` exists.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; give a new folder, or delete it first.")
    model = change(load(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        part = Path(name, "checkpoint")
        model.save_pretrained(part)
        for path in source.iterdir():
            weights = path.name in NOT_COPIED or path.name.endswith(WEIGHTS)
            if path.is_file() and not weights and not (part / path.name).exists():
                shutil.copy2(path, part / path.name)
        write_model_card(part, repo_id=target.name)
        if remote_code:
            add_remote_code(part)
        if target.exists():
            target.rmdir()
        part.replace(target)
