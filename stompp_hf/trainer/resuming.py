"""Where to resume after a crash, which may have come in the middle of a save, and whether that fits the model."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.files import headers
from ..errors import CheckpointError
from ..modules.calibration import in_processes
from ..surgery.members import get_plan

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
    for path, step in reversed(checkpoints(Path(folder)).items()):
        wrong = damage(path, step, processes)
        if wrong is None:
            return str(path)
        logger.warning("%s is skipped, as its save was cut off: %s.", path, wrong)
    return None


def checkpoints(folder: Path) -> dict[Path, int]:
    """Trainer's checkpoint folders, oldest first, with the steps that they are of."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("checkpoint-*") if path.is_dir())
    found = {path: int(match[1]) for path, match in matches if match}
    return dict(sorted(found.items(), key=lambda item: item[1]))


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
        try:
            list(headers([file]))
        except CheckpointError:
            return f"{file.name} is shorter than its header says"
    return _cut_off([other for other in others if other.suffix == ".bin"])


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


# ---- whether it fits the model ----


def check_folder(model: Any, checkpoint: Any) -> None:
    """Refuse a plain checkpoint before torch does, whose error would be about the optimizer's parameter groups."""
    get_plan(model)
    path = Path(checkpoint, "config.json")
    if not path.is_file():
        return  # Trainer says that there is no checkpoint; other models keep no config.json
    if "quantization_config" not in json.loads(path.read_text(encoding="utf-8")):
        raise CheckpointError(
            f"{checkpoint} was saved before binarize_model: it holds no StoMPP state. Resume from a checkpoint of this "
            "run, or start without resume_from_checkpoint."
        )


def stopped_after(state: Any) -> int | None:
    """The stage after which `StopFreezingCallback` had ended the freezing in the run that is resumed."""
    kept = state.stateful_callbacks.get("StopFreezingCallback")
    values = kept.get("attributes", {}) if isinstance(kept, dict) and state.global_step else {}
    return values["good_stages"] if values.get("stopped") else None


def check_resumed(layers: dict[str, Any], step: int) -> None:
    """Refuse a checkpoint that does not belong to this model and its progression, or to the step that Trainer is at."""
    empty = [name for name, layer in layers.items() if not layer.total_steps]
    if empty:
        raise CheckpointError(
            f"the checkpoint holds no StoMPP state for {', '.join(empty[:4])}: it was saved before binarize_model, "
            "or by another model. Resume from a checkpoint of this run, or start without resume_from_checkpoint."
        )
    for name, layer in layers.items():
        if layer.fingerprint != layer.place.fingerprint:
            raise CheckpointError(
                f"the checkpoint was trained with other layers, stages, order, schedule or seed than this model "
                f"(seen at {name}): binarize the model with the StoMPPConfig in the checkpoint's config.json, or "
                "load it from there with from_pretrained, which needs no binarize_model."
            )
        if layer.step < min(step, layer.total_steps):
            raise CheckpointError(
                f"{name} was saved at step {layer.step}, and the checkpoint's trainer_state.json says {step}: its "
                "files do not belong together. Resume from another checkpoint."
            )


def check_adapted(base: int, step: int) -> None:
    """Refuse to resume a base that is not finished from a checkpoint that holds an adapter alone; warn else.

    Args:
        base: the step at which the base stands.
        step: the step at which training begins.
    """
    if base < step:
        raise CheckpointError(
            f"training resumes at step {step}, and the base stands at step {base} of its progression: checkpoints "
            "of a model with PEFT adapters hold the adapter alone. Start without resume_from_checkpoint; or make "
            "the base binary first, save it, and train the adapter beside it."
        )
    logger.warning(
        "the base becomes binary around an adapter, and Trainer saves the adapter alone. When training has ended, "
        "save the base too: model.unload().save_pretrained(...)."
    )
