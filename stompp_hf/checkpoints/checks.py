"""Whether tensors are those that a plan promises, asked of what is to be saved and of what was loaded.

What is missing would be random, in silence; a sign hides that a latent weight is not finite; a member that stands at
another step than the others would compute something else. What is refused here when it is loaded is refused when it is
saved, so that what is saved loads.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, NonFiniteError
from ..integrations.sharding import everywhere, is_sharded, local
from ..integrations.torch import saved_tensors
from ..integrations.transformers import is_initialized, may_be_missing, not_saved
from ..modules.converted import Converted
from ..surgery.members import members_of
from ..surgery.ownership import plans_of
from ..surgery.plan import Plan
from .files import Header

OWNERS = ("weight_bits", "stompp_state", "weight_int8")
"""Tensors that no other class has."""
OPEN_ENDED = ("_clip", "_low", "_high")
"""Endings of tensors that are infinite where nothing is clipped."""
SMALL = 1 << 16
"""Entries of a tensor at which a call of torch begins to take less time than what it does."""
BELONGS = "one of the two is not the file that belongs here."


def name_in(modules: Mapping[str, Any], name: str, prefix: str) -> str | None:
    """The name that a saved module has in a model, which may have gained or lost its base model's prefix."""
    names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((name for name in names if name in modules), None)


def expected_tensors(model: PreTrainedModel, plans: Mapping[str, Plan]) -> dict[str, Tensor]:
    """The tensors of the modules to which binarization by these plans added some, by name, on the meta device."""
    return _expected(_converted(model, plans))


def _expected(converted: Mapping[str, Converted]) -> dict[str, Tensor]:
    return {
        f"{name}.{own}": tensor if tensor.is_meta else tensor.detach().to("meta")
        for name, module in converted.items()
        for own, tensor in saved_tensors(module).items()
    }


def check_names(model: PreTrainedModel, found: Iterable[Header]) -> dict[str, bool]:
    """Refuse tensors that hold more of a binary model than the plan knows of.

    Returns the names of all, and whether the model has a tensor of that name, be it in front of a head or behind it.

    Raises:
        CheckpointError: they do; without it those tensors would be left out, and others filled at random.
    """
    prefix, modules = model.base_model_prefix, dict(model.named_modules())
    names: dict[str, bool] = {}
    of_owner: dict[str, tuple[set[str], set[str]] | None] = {}
    for header in found:
        owner, _, own = header.name.rpartition(".")
        if owner not in of_owner:
            place = name_in(modules, owner, prefix)
            of_owner[owner] = None if place is None else _held_and_lacking(modules[place])
        known = of_owner[owner]
        names[header.name] = known is not None and own in known[0]
        if known is None:
            continue
        if own in OWNERS and "F" in header.dtype:  # transformers would cast it
            raise CheckpointError(f"{header.name} is {header.dtype} in the checkpoint, and must be of whole numbers.")
        if own in known[1]:
            raise CheckpointError(
                f"the checkpoint holds {header.name}, which by its config.json should not be there: {BELONGS}"
            )
    return names


def _held_and_lacking(module: nn.Module) -> tuple[set[str], set[str]]:
    """The names of a module's tensors, and of those that only binary modules of other options have."""
    owned = (*module.own_names, *OWNERS) if isinstance(module, Converted) else OWNERS
    held = set(saved_tensors(module))
    return held, set(owned) - held


def check_loaded(
    model: PreTrainedModel, plans: Mapping[str, Plan], expected: Mapping[str, Tensor], names: set[str]
) -> None:
    """Refuse a loaded model with a tensor that the files lack, or that is not what the plan says.

    What belongs to binary modules must be there. What is real must be if the model is of the class that was saved; to
    another class, or where a head has another size, transformers may add a new one, and says so.

    Args:
        model: after loading.
        plans: what `plans_of` gives.
        expected: what `expected_tensors` gave before.
        names: of the tensors in the files.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype, or values that cannot be.
    """
    saved, converted = _saved(model), _converted(model, plans)
    loaded = {name: tensor for name, tensor in saved.items() if tensor.is_meta or is_initialized(tensor)}
    _check_covered(expected, loaded)
    own = [tensor for module in converted.values() for tensor in module.own_tensors().values()]
    has_nan = any(map(is_sharded, own)) or _holds(torch.isnan, own)  # True: each is looked at, on all processes alike
    for name, module in converted.items():
        reason = module.taken(has_nan)
        if reason is not None:
            raise CheckpointError(f"{name}: {reason}: the file is damaged, or was not written by stompp_hf.")
    try:
        _check_values(model, plans, converted, loaded)
    except NonFiniteError as error:
        raise CheckpointError(f"{error} The file is damaged, or was saved after training went wrong.") from error
    for name, tensor in saved.items():
        if isinstance(tensor, nn.Parameter):
            _check_float(name, tensor)
    if type(model).__name__ in (getattr(model.config, "architectures", None) or []):
        _check_complete(model, saved, {*loaded, *names, *not_saved(model)})


def check_written(model: PreTrainedModel, written: Mapping[str, Tensor]) -> None:
    """Refuse to save what would be refused when it is loaded.

    Args:
        model: with a plan, or a part of one.
        written: the state dict that is to be saved, of this model.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than its layer says, or a wrong place.
        NonFiniteError: a latent weight, a scale or a threshold is NaN or infinite.
        NotBinarizedError: a binary layer was replaced or removed after binarize_model.
    """
    plans = plans_of(model)
    converted = _converted(model, plans)
    for name, module in converted.items():
        _check_own_shapes(name, module)
    check_names(model, [Header(n, "F" if t.is_floating_point() else "I", list(t.shape), 0) for n, t in written.items()])
    _check_covered(_expected(converted), written)
    _check_values(model, plans, converted, written)
    _check_complete(model, _saved(model), {*written, *not_saved(model)})


def _check_own_shapes(name: str, module: Converted) -> None:
    """A weight that was resized in place has scales and thresholds of the old size."""
    for what, (tensor, size) in module.expected_sizes().items():
        if tensor.numel() != size:
            shape = None if module.latent is None else list(module.latent.shape)
            raise CheckpointError(
                f"{name} has a weight of shape {shape}, and a {what} of size {tensor.numel()}: it was "
                "resized after binarize_model (by resize_token_embeddings, say). Change the model first and binarize "
                "last: restore_model(model), then resize, then binarize_model(model, config)."
            )


def _check_covered(expected: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in held:
            _refuse_missing(name)
        _check(name, held[name], tensor)


def _check_values(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    converted: Mapping[str, Converted],
    held: Mapping[str, Tensor],
) -> None:
    binary = [(name, saved_tensors(module)) for name, module in converted.items() if not module.always_real]
    names = [f"{name}.{own}" for name, tensors in binary for own in tensors if not own.endswith(OPEN_ENDED)]
    finite = {name for name in names if held[name].numel() <= SMALL and not is_sharded(held[name])}
    if _holds(lambda tensor: ~tensor.isfinite(), (held[name] for name in finite)):
        finite.clear()  # one after the other, to find which
    for name in names:
        if name not in finite and held[name].is_floating_point() and not _is_finite(held[name]):
            raise NonFiniteError(
                f"{name} holds NaN or an infinite value, which a sign would hide. Go back to the last checkpoint from "
                "before it became so."
            )
    for start, plan in plans.items():
        root, at = model.get_submodule(start), f"{start}." if start else ""
        places: dict[tuple[int, ...], str] = {}
        for name in members_of(root, plan):
            state = held[f"{at}{name}.stompp_state"]
            if not state.is_meta:
                places.setdefault(tuple(state.tolist()[3:]), f"{at}{name}")  # total, step, fingerprint
        if len(places) > 1:
            (place, name), (other_place, other) = list(places.items())[:2]
            raise CheckpointError(
                f"{name} stands at step {place[1]} of {place[0]} of its progression, and {other} at step "
                f"{other_place[1]} of {other_place[0]}, or was trained by another plan: they are not of one save."
            )


@torch.no_grad()
def _holds(test: Callable[[Tensor], Tensor], tensors: Iterable[Tensor]) -> bool:
    """Whether a test, isnan say, finds anything in tensors, none of them sharded; small ones are tested together."""
    alike: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta:
            alone = id(tensor) if tensor.numel() > SMALL else None
            alike.setdefault((tensor.dtype, tensor.device, alone), []).append(tensor.flatten())
    return any(bool(test(torch.cat(ts) if len(ts) > 1 else ts[0]).any()) for ts in alike.values())


def _is_finite(tensor: Tensor) -> bool:
    """On all processes, where it is sharded."""
    if tensor.is_meta:
        return True
    here = local(tensor)
    total = here.sum(dtype=None if here.dtype == torch.float64 else torch.float32)  # one pass, and no memory
    finite = bool(total.isfinite()) or bool(here.isfinite().all())
    return everywhere(torch.tensor(finite, device=here.device), tensor) if is_sharded(tensor) else finite


def _check_complete(model: PreTrainedModel, saved: Mapping[str, Tensor], names: set[str]) -> None:
    """Everything that is real, too, must be there; what is tied to something that is there counts as such."""
    ignored = [re.compile(pattern) for pattern in may_be_missing(model)]
    there = {id(tensor) for name, tensor in saved.items() if name in names}
    for name, tensor in saved.items():
        if name not in names and id(tensor) not in there and not any(pattern.search(name) for pattern in ignored):
            _refuse_missing(name)


def _check(name: str, tensor: Tensor, expected: Tensor) -> None:
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


def _converted(model: PreTrainedModel, plans: Mapping[str, Plan]) -> dict[str, Converted]:
    """The modules to which binarization added tensors, by name."""
    found: dict[str, Converted] = {}
    for name, plan in plans.items():
        root, start = model.get_submodule(name), f"{name}." if name else ""
        found |= {start + own: member for own, member in members_of(root, plan).items()}
        found |= {start + own: m for own, m in root.named_modules() if isinstance(m, Converted) and m.own_names}
    return found


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a state dict holds, without making one."""
    return {
        f"{name}.{own}" if name else own: tensor
        for name, module in model.named_modules()
        for own, tensor in saved_tensors(module).items()
    }
