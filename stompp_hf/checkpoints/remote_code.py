"""Checkpoints that load without `import stompp_hf` in the user's script: auto_map, and a file that imports it."""

import json
from pathlib import Path
from typing import Any

import transformers

from ..errors import CheckpointError
from ..integrations.transformers import auto_class_for
from .files import read_config

MODULE = "modeling_stompp"
_HEAD = '''"""Lets transformers load this checkpoint with trust_remote_code=True: stompp_hf registers its format."""

import stompp_hf  # noqa: F401
import transformers
'''
_CLASS = '''

class {name}(transformers.{name}):
    """transformers' own, once stompp_hf is imported."""
'''


def add_remote_code(folder: str | Path) -> Path:
    """Add auto_map and a small file of code to a checkpoint; returns the file's path.

    `AutoModelFor....from_pretrained(folder, trust_remote_code=True)` then loads it in a script that does not import
    this library, which must be installed all the same. Without trust_remote_code nothing changes.

    Raises:
        CheckpointError: no checkpoint of this library, or of a model type that transformers has no class for.
    """
    folder = Path(folder)
    config = read_config(folder)
    names = _auto_classes(config.get("model_type"))
    if not names:
        raise CheckpointError(f"{folder}: transformers has no classes for the model type {config.get('model_type')!r}.")
    path = folder / f"{MODULE}.py"
    path.write_text(_HEAD + "".join(_CLASS.format(name=name) for name in sorted(set(names.values()))), encoding="utf-8")
    config["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _auto_classes(model_type: Any) -> dict[str, str]:
    """The class that each of transformers' AutoModel classes gives a model type, by the Auto class's name."""
    autos = {auto: getattr(transformers, auto) for auto in dir(transformers) if auto.startswith("AutoModel")}
    names = {auto: auto_class_for(cls, model_type) for auto, cls in autos.items()}
    return {auto: name for auto, name in names.items() if name is not None}
