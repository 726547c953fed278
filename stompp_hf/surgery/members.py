"""Finding a model's plan, and the members that it names."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import ConfigError, NotBinarizedError
from ..integrations.torch import modules_of
from ..modules import BinaryLayer, Member
from ..modules.converted import Converted
from .plan import Plan

PLAN = "stompp_plan"
"""Attribute of a model that holds the plan that describes it."""
Key = TypeVar("Key")


def planned_models(model: nn.Module) -> dict[str, nn.Module]:
    """The modules inside `model` (or it itself) that carry a plan, by name: several, where parts were binarized apart.

    Raises:
        NotBinarizedError: there is none.
    """
    # Its own: PEFT's wrappers pass on what they have not.
    found = {name: m for name, m in model.named_modules() if isinstance(vars(m).get(PLAN), Plan)}
    if not found:
        raise NotBinarizedError(
            f"{type(model).__name__} has no binary layers. Call `model = stompp_hf.binarize_model(model, "
            "StoMPPConfig())` first (with Trainer: before `Trainer(...)` is created)."
        )
    return found


def planned_model(model: nn.Module) -> nn.Module:
    """The module inside `model` (itself, or what DDP, PEFT or compile wraps) that carries a plan.

    Raises:
        NotBinarizedError: there is none.
        ConfigError: there are several.
    """
    found = planned_models(model)
    if len(found) > 1:
        names = ", ".join(found)
        raise ConfigError(
            f"{type(model).__name__} has {len(found)} parts that were binarized apart ({names}): call this for each of "
            f"them, as in pack_model(model.{next(iter(found))}). They are trained together."
        )
    return next(iter(found.values()))


def driven_model(model: nn.Module) -> nn.Module:
    """The module whose call runs everything that a progression drives: the planned one, or what holds several."""
    found = planned_models(model)
    return model if len(found) > 1 else next(iter(found.values()))


def get_plan(model: nn.Module) -> Plan:
    """The plan of a binarized model; where parts were binarized apart, theirs one after the other, as a new plan.

    Raises:
        NotBinarizedError: there is none.
        ConfigError: parts cannot be driven together, since their options differ.
    """
    plans: dict[str, Plan] = {name: getattr(root, PLAN) for name, root in planned_models(model).items()}
    if len(plans) == 1:
        return next(iter(plans.values()))
    for option in ("binarize", "frozen_gradient", "pending_lr", "binary_lr", "scale_lr", "check_every", "refresh_rate"):
        values = {repr(getattr(plan.config, option)) for plan in plans.values()}
        if len(values) > 1:
            raise ConfigError(
                f"{', '.join(plans)} were binarized with {option}={' and '.join(sorted(values))}, and cannot be driven "
                "together. Use one value for all, or train each part by itself."
            )
    return Plan.joined(plans)


def plain_name(name: str) -> str:
    """The name that a layer has without the PEFT adapters around it: plans hold that one, whatever comes and goes."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a plain name, inside whatever PEFT wrapped around it or around a module on the way.

    Raises:
        AttributeError: there is none.
    """
    module: Any = model
    for part in name.split("."):
        while (child := modules_of(module).get(part)) is None and (inner := _wrapped(module)) is not None:
            module = inner
        module = module.get_submodule(part) if child is None else child
    while not isinstance(module, Member) and (inner := _wrapped(module)) is not None:
        module = inner
    return module  # type: ignore[no-any-return]


def _wrapped(module: nn.Module) -> nn.Module | None:
    inner = (modules_of(module).get(name) for name in ("base_layer", "original_module"))
    return next((module for module in inner if module is not None), None)


def members(model: nn.Module) -> dict[str, Member]:
    """Everything that freezes, by name, in the order in which it does: layers, embeddings, attention products."""
    roots, found = planned_models(model), {}
    for prefix, root in roots.items():
        for name, member in members_of(root, getattr(root, PLAN)).items():
            found[f"{prefix}.{name}" if len(roots) > 1 else name] = member
    return found


def members_of(root: nn.Module, plan: Plan) -> dict[str, Member]:
    """The members that a plan of `root` names, by name."""
    found: dict[str, Member] = {}
    for entry in plan.entries:
        try:
            module = submodule(root, entry.name)
        except AttributeError:
            module = None
        if not isinstance(module, Member):
            what = "is gone: it was removed" if module is None else f"is a {type(module).__name__}: it was replaced"
            raise NotBinarizedError(
                f"{entry.name} should be a binary layer and {what} after binarize_model. Change the model first and "
                "binarize last; restore_model and binarize_model do it anew."
            )
        found[entry.name] = module
    return found


def weighted(found: Mapping[Key, Member]) -> dict[Key, BinaryLayer]:
    """Those of the members that have a binary weight."""
    return {name: member for name, member in found.items() if isinstance(member, BinaryLayer)}


def own_tensors(model: nn.Module) -> list[Tensor]:
    """What binarization added to a model, and the latent weights: neither decayed nor rounded."""
    ours = (module for module in model.modules() if isinstance(module, Converted))
    return [tensor for module in ours for tensor in module.binary_tensors()]


def binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """The members that have a binary weight, by name, in the order in which they freeze."""
    return weighted(members(model))
