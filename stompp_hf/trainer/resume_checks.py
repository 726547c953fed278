"""Whether a checkpoint that Trainer resumes from fits the model and its progression."""

import json
import logging
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..surgery.members import get_plan

logger = logging.getLogger(__name__)


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
