"""The model card that Trainer writes, with this library's part."""

import logging
from pathlib import Path
from typing import Any

from ..checkpoints.model_card import write_model_card
from ..errors import CheckpointError

logger = logging.getLogger(__name__)


def attach_to(trainer: Any) -> None:
    """Let the card that a Trainer writes (`create_model_card`, `push_to_hub`) have this library's part."""
    plain = trainer.create_model_card
    if getattr(plain, "has_stompp_part", False):
        return

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        saved = Path(trainer.args.output_dir, "config.json").is_file()
        if trainer.is_world_process_zero() and saved:  # a card without a checkpoint has nothing to load
            try:
                write_model_card(trainer.args.output_dir, repo_id=trainer.hub_model_id)
            except CheckpointError as error:  # a card is not worth the end of a run
                logger.warning("the model card does not say how to load the model: %s", error)

    create_model_card.has_stompp_part = True  # type: ignore[attr-defined]
    trainer.create_model_card = create_model_card
