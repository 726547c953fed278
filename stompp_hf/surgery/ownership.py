"""Which model saves a plan: the transformers model that holds its layers, whatever wrapper stands around it.

Only a PreTrainedModel writes a config.json, so a plan belongs to one, with names relative to it. A larger model that
contains it saves it with the name that it has there; a smaller one inside saves its part.
"""

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import AlreadyBinarizedError, CheckpointError, ConfigError, NotBinarizedError
from ..modules import Member
from .members import PLAN, get_plan, members_of, planned_models
from .plan import Plan
from .quantization_config import StoMPPQuantizationConfig

_PART = "stompp_part"
"""Attribute of a PreTrainedModel inside a planned one: the whole plan, and the name that it has there."""


def check_module(model: Any) -> None:
    """Whether binarize_model was given a module.

    Raises:
        ConfigError: it was not (but, say, a pipeline, a Trainer, or SetFit's model, which hold one).
    """
    if isinstance(model, nn.Module):
        return
    held = sorted(name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module))
    instead = "give it the model itself."
    if held:
        instead = f"of it, {', '.join(held)} can become binary: binarize_model(model.{held[0]}, ...)."
    raise ConfigError(f"binarize_model needs a torch.nn.Module, and a {type(model).__name__} is none; {instead}")


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper that has exactly one (as sentence-transformers'); else the model."""
    found: list[str] = []
    if not isinstance(model, PreTrainedModel):
        for name, module in model.named_modules():
            if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in found):
                found.append(name)
    return model.get_submodule(found[0]) if len(found) == 1 else model


def owner(root: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """The model that a plan belongs to, and the plan with names relative to it.

    It is the outermost PreTrainedModel in which everything lies that the plan changes; `root` itself if there is none.
    """
    readers = [reader for changed in (plan.paused, plan.shifted) for found in changed.values() for reader in found]
    names = [entry.name for entry in plan.entries] + readers + [*plan.bypassed, *plan.paused, *plan.shifted]
    for place, module in root.named_modules():
        if isinstance(module, PreTrainedModel):
            start = f"{place}." if place else ""
            if all(name.startswith(start) for name in names):
                return module, plan.moved(lambda name, start=start: name.removeprefix(start))  # type: ignore[misc]
    return root, plan


def already_binary(root: nn.Module, config: Any) -> bool:
    """Whether a model has become binary by these very options.

    Raises:
        AlreadyBinarizedError: it has binary layers, by other options, or in a part of it only.
    """
    if not any(isinstance(module, Member) for module in root.modules()):
        return False
    plans = _plans(root)
    whole = ("", _name_in(root, inner_model(root)))
    if len(plans) == 1 and (name := next(iter(plans))) in whole:
        theirs, ours = plans[name].config.to_dict(), config.to_dict()
        others = [f"{key} is {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
        if not others:
            return True
        what = f"this model has binary layers already, by other options: {'; '.join(others)}. Give it the same options"
    else:
        where = f" ({', '.join(name for name in plans if name)})" if any(plans) else ""
        what = f"a part of this model{where} has binary layers already. Binarize its other parts apart"
    raise AlreadyBinarizedError(
        f"binarize_model: {what}, train it as it is, or call stompp_hf.restore_model(model) first."
    )


def _name_in(root: nn.Module, module: nn.Module) -> str | None:
    return next((name for name, other in root.named_modules() if other is module), None)


def own_configs(model: nn.Module) -> None:
    """Give a model config objects of its own: transformers shares one among all models that are built from it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                module.__dict__[name] = copy.deepcopy(value, copies)


def own(model: nn.Module, plan: Plan) -> None:
    """Make a plan a model's own, and let the transformers models inside know of what part of it is theirs."""
    setattr(model, PLAN, plan)
    places = plan.places(getattr(model, "base_model_prefix", ""))
    for name, member in members_of(model, plan).items():
        member.place = places[name]
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and any(e.name.startswith(f"{name}.") for e in plan.entries):
            setattr(module, _PART, (plan, name))
    record(model, plan)


def stop_at(model: nn.Module, stage: int) -> None:
    """Let no stage of a plan's owner behind the `stage`-th freeze, as if `last_stage` had said so.

    Raises:
        ConfigError: there is no such stage.
    """
    plan: Plan = getattr(model, PLAN)
    config = replace(plan.config, last_stage=str(stage))
    replace(plan, config=config).freezing  # noqa: B018  # refuses before anything changes
    plan.config = config
    own(model, plan)
    for member in members_of(model, plan).values():
        if member.always_real:
            member.stay_real()


def disown(model: nn.Module) -> None:
    """Undo `own`."""
    plan = get_plan(model)
    delattr(model, PLAN)
    for module in model.modules():
        if vars(module).get(_PART, (None, ""))[0] is plan:
            delattr(module, _PART)
    if isinstance(model, PreTrainedModel) and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def record(model: nn.Module, plan: Plan) -> None:
    """Bring a model's config up to date with its plan: a copy, a load with `config=model.config` go by it."""
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = StoMPPQuantizationConfig.of({"": plan})


def _plans(model: nn.Module) -> dict[str, Plan]:
    try:
        return {name: getattr(module, PLAN) for name, module in planned_models(model).items()}
    except NotBinarizedError:
        return {}


def plans_of(model: PreTrainedModel) -> dict[str, Plan]:
    """The plans that a model saves, by the name of the module that each is about; none if it is a plain model.

    Raises:
        CheckpointError: it is a part of a model in training, or has binary layers that no plan names.
    """
    plans = _plans(model)
    if not plans and _PART in vars(model):
        whole, name = vars(model)[_PART]
        plans = {"": whole.inside(name)}
        unfinished = not all(member.is_settled for member in members_of(model, plans[""]).values())
        if unfinished and len(plans[""].entries) < len(whole.entries):
            raise CheckpointError(
                f"this {type(model).__name__} is a part ({name}) of a model whose training has not ended: alone, its "
                "layers would freeze at other times. Save the whole model, or the part after the last stage froze."
            )
    named = {id(m) for name, plan in plans.items() for m in members_of(model.get_submodule(name), plan).values()}
    for name, module in model.named_modules():
        if isinstance(module, Member) and id(module) not in named:
            raise CheckpointError(
                f"{name} is binary, and no plan of this {type(model).__name__} names it (it was put in after "
                "binarize_model, or belongs to another model): what is saved would not load. restore_model the model "
                "that it comes from, and binarize this one."
            )
    return plans
