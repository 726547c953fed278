"""Tensors that are read straight from their files: transformers' loader takes as long for a scale as for a table.

A packed layer has nine small tensors in place of a weight and a bias. A tensor that is stored as the model holds it,
under the name that it has there, needs nothing of what the loader is for: it is there before the loader begins, where
it lies in the file, and the loader is told of the others only. These are all that is to be cast, renamed, tied, sharded
or placed on a device, and what comes from elsewhere than from safetensors files.
"""

import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..integrations.torch import buffers_of, parameters_of
from ..integrations.transformers import mark_initialized, show_only
from .checks import name_in

OTHER_WAYS = ("state_dict", "distributed_config", "tp_plan", "tp_size", "disable_mmap")
"""Options of from_pretrained that give it other tensors than those of the files, or parts of them, or map no file."""
HELD_AS_STORED = {
    "F64": torch.float64, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8, "I8": torch.int8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Without half precision: which of it a model holds in float32 is for transformers to say."""

_straight: ContextVar[bool] = ContextVar("straight", default=False)


@contextmanager
def loading_by(options: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block from_pretrained runs, with these options."""
    token = _straight.set(not any(options.get(name) is not None for name in OTHER_WAYS))
    try:
        yield
    finally:
        _straight.reset(token)


def is_straight(device_map: Any) -> bool:
    """Whether what is loaded now are the tensors of the files, whole and on the CPU."""
    return _straight.get() and device_map is None


@torch.inference_mode(False)
def read_straight(
    model: PreTrainedModel,
    files: Mapping[Path, tuple[Mapping[str, Any], int]],
    renamings: Iterable[Any],
) -> None:
    """Load what can be read straight, and hide it from transformers' loader, until `show_all`.

    Args:
        model: on the meta device.
        files: what `read_header` gave, by file.
        renamings: what the loader does to names.
    """
    modules, prefix = dict(model.named_modules()), model.base_model_prefix
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    left = model.state_dict()
    places: dict[str, str | None] = {}
    read: dict[str, str] = {}
    for path, (header, begin) in files.items():
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, stored in header.items():
            owner, _, own = name.rpartition(".")
            if owner not in places:
                places[owner] = name_in(modules, owner, prefix)
            place = places[owner]
            held_as = f"{place}.{own}" if place else own
            like = left.get(held_as)
            if place is None or held_as in tied or not _is_held_as(like, stored) or _is_renamed(name, renamings):
                continue
            _put(modules[place], own, left.pop(held_as), data, begin + stored["data_offsets"][0])
            read[name] = held_as
    show_only(model, left, read)


def _put(module: nn.Module, own: str, like: Tensor, data: mmap.mmap, offset: int) -> None:
    flat = torch.frombuffer(data, dtype=like.dtype, count=like.numel(), offset=offset)
    tensor = flat if like.dim() == 1 else flat.view(like.shape).data  # a tensor of its own, and no view
    parameters = parameters_of(module)
    value = nn.Parameter(tensor, tensor.is_floating_point()) if own in parameters else tensor
    mark_initialized(value)
    (parameters if own in parameters else buffers_of(module))[own] = value


def _is_held_as(like: Any, stored: Mapping[str, Any]) -> bool:
    if not isinstance(like, Tensor) or HELD_AS_STORED.get(stored["dtype"]) is not like.dtype:
        return False  # a module's extra state is no tensor
    return stored["shape"] == list(like.shape) and like.numel() > 0


def _is_renamed(name: str, renamings: Iterable[Any]) -> bool:
    return any(renaming.compiled_sources.search(name) for renaming in renamings)
