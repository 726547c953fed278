"""Single tensors out of a checkpoint folder's safetensors files, without loading the rest."""

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError


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
