"""Whether the tensors of a checkpoint are those that its plan promises: what is missing would be random, in silence."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint_files import headers
from .errors import CheckpointError
from .modules import Member
from .modules.activations import RPReLU
from .modules.int8_embedding import Int8Embedding
from .plan import members

OWNERS = {"weight_bits": Member, "stompp_state": Member, "weight_int8": Int8Embedding}
"""Tensors that no other class has."""
BELONGS = "one of the two is not the file that belongs here."


def name_in(modules: dict[str, Any], name: str, prefix: str) -> str | None:
    """The name that a saved module has in a model, which may have gained or lost its base model's prefix."""
    names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((name for name in names if name in modules), None)


def expected_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the modules to which binarization added some, by name, on the meta device."""
    return {
        f"{name}.{own}": tensor.detach().to("meta")
        for name, module in _converted(model).items()
        for own, tensor in _tensors(module).items()
    }


def check_names(model: PreTrainedModel, files: list[str]) -> set[str]:
    """Refuse files that hold more of a binary model than the plan knows of; returns the names of their tensors.

    Raises:
        CheckpointError: they do; without it those tensors would be left out, and others filled at random.
    """
    prefix, modules = model.base_model_prefix, dict(model.named_modules())
    names = set()
    for header in headers(Path(file) for file in files if str(file).endswith(".safetensors")):
        names.add(header.name)
        owner, _, own = header.name.rpartition(".")
        found = name_in(modules, owner, prefix)
        module = None if found is None else modules[found]
        if found is not None and own in OWNERS and "F" in header.dtype:  # transformers would cast it
            raise CheckpointError(f"{header.name} is {header.dtype} in the checkpoint, and must be of whole numbers.")
        owned = (*module.own_names, *OWNERS) if isinstance(module, Member) else OWNERS
        if module is not None and own in owned and own not in _tensors(module):
            raise CheckpointError(
                f"the checkpoint holds {header.name}, which by its config.json should not be there: {BELONGS}"
            )
    return names


def check_tensors(model: PreTrainedModel, expected: dict[str, Tensor], names: set[str]) -> None:
    """Refuse a loaded model with a tensor that the files lack, or that is not what the plan says.

    What belongs to binary modules must be there. What is real must be if the model is of the class that was saved; to
    another class, or where a head has another size, transformers may add a new one, and says so.

    Args:
        model: after loading.
        expected: what `expected_tensors` gave before.
        names: of the tensors in the files.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype, or values that cannot be.
    """
    for name, module in _converted(model).items():
        for own, tensor in _tensors(module).items():
            _check(f"{name}.{own}", tensor, expected[f"{name}.{own}"])
        reason = module.damage() if isinstance(module, Member) else None
        if reason is not None:
            raise CheckpointError(f"{name}: {reason}: the file is damaged, or was not written by stompp_hf.")
    for name, tensor in _saved(model).items():
        if isinstance(tensor, nn.Parameter):
            _check_float(name, tensor)
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or []):
        return
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    excused = {*names, *(model._keys_to_ignore_on_save or [])}
    for name, tensor in _saved(model).items():
        if not _was_loaded(tensor) and name not in excused and not any(pattern.search(name) for pattern in ignored):
            _refuse_missing(name)


def _check(name: str, tensor: Tensor, expected: Tensor) -> None:
    if not _was_loaded(tensor):
        _refuse_missing(name)
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{name} has the shape {list(tensor.shape)} in the checkpoint, and by its config.json it should have "
            f"{list(expected.shape)}: {BELONGS}"
        )
    if expected.is_floating_point():
        _check_float(name, tensor)
    elif tensor.dtype != expected.dtype:
        raise CheckpointError(f"{name} is {tensor.dtype} in the checkpoint, and must be {expected.dtype}.")


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is {tensor.dtype} in the checkpoint, and must be of a floating-point dtype.")


def _refuse_missing(name: str) -> None:
    raise CheckpointError(
        f"{name} is missing in the checkpoint, although its config.json says that it belongs to the model: the weights "
        "were saved without it, or the file is not the one that belongs here."
    )


def _was_loaded(tensor: Tensor) -> bool:
    return tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)


def _converted(model: PreTrainedModel) -> dict[str, Any]:
    """The modules to which binarization added tensors, by name."""
    others = {name: m for name, m in model.named_modules() if isinstance(m, (RPReLU, Int8Embedding))}
    return {**members(model), **others}


def _tensors(module: Any) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a state dict would hold; making one writes into the members' state buffers."""
    return {
        f"{name}.{own}": tensor
        for name, module in model.named_modules()
        for own, tensor in _tensors(module).items()
        if own not in module._non_persistent_buffers_set
    }
