"""Reading a checkpoint folder without loading it: config.json, the class it names, headers, single tensors."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import METHOD
from ..errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class Header:
    """What a safetensors file says of one tensor: its name, dtype in safetensors' words, shape, and bytes on disk."""

    name: str
    dtype: str
    shape: list[int]
    size: int


def read_json(path: Path) -> Any:
    """The values of a JSON file.

    Raises:
        CheckpointError: it cannot be read, or is no JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint of ours.

    Raises:
        CheckpointError: no checkpoint, not one of ours, or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json. Give the folder of save_pretrained.")
    config = read_json(path)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder} is no checkpoint of stompp_hf: its config.json names no binary layers. Binarize and train first "
            "(stompp_hf.binarize_model), then save_pretrained."
        )
    return config  # type: ignore[no-any-return]


def architecture(config: dict[str, Any]) -> str:
    """The name of the class that a checkpoint was saved from; "model" where its config.json names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "model"


def model_class(name: str) -> Any:
    """transformers' model class of a name, or None: for remote code, and for what is no model at all."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that from_pretrained would read: one, or those that an index names.

    Raises:
        CheckpointError: there are none, one that the index names is missing, or the index is damaged.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}.")
    values = read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} is damaged: it has no weight_map of file names.")
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{index} names {file.name}, which is not there: the download or copy is incomplete.")
    return files


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin.

    Raises:
        CheckpointError: the file is damaged or cut off.
    """
    try:
        with safe_open(str(path), framework="pt"):  # checks lengths, dtypes and offsets against the file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size)), 8 + size
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}.") from error


def headers(files: Iterable[Path]) -> Iterator[Header]:
    """What safetensors files say of their tensors.

    Raises:
        CheckpointError: a file is damaged or cut off; the message names it.
    """
    for path in files:
        yield from tensors_in(read_header(path)[0])


def tensors_in(header: Mapping[str, Any]) -> Iterator[Header]:
    """What one file says of its tensors, from what `read_header` gave."""
    for name, value in header.items():
        if name != "__metadata__":
            first, last = value["data_offsets"]
            yield Header(name, value["dtype"], value["shape"], last - first)


def read_tensors(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the tensors of a folder whose names are `wanted`, one at a time.

    Raises:
        CheckpointError: a file is damaged or cut off.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in filter(wanted, file.keys()):
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut off: {error}.") from error
