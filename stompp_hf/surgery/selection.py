"""Which layers become binary, in which order, in which stages; and for every other candidate, why not."""

import fnmatch
import logging
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..config import StoMPPConfig
from ..errors import ConfigError, NothingToBinarizeError, PatternError
from ..integrations.accelerate import has_replaced_forward, is_hooked
from ..integrations.torch import ConvTranspose, parameters_of
from ..modules import BINARY_CLASSES, binary_class_of
from ..modules.registry import unlike_its_base
from .adapters import adapter_reason
from .attention_interface import CHILD
from .blocks import WEIGHTED, block_of, real_by_place
from .dataflow import DataFlow
from .embedding_and_attention import Beyond, find
from .plan import Entry, Plan
from .preceding_activations import Neighbours, neighbours
from .probe import probe

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PARAMETRIZED = nn.utils.parametrize.ParametrizationList

logger = logging.getLogger(__name__)


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is `pattern`, ends in it, lies inside it, or fits it as a shell-style pattern."""
    forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    return any(fnmatch.fnmatchcase(name, form) for form in forms)


def _reasons_in_itself(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Candidates by what they are, and the layers that look like candidates and are not."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    tied = {str(key).rpartition(".")[0] for key in _tied_keys(model)}
    candidates: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if binary_class_of(module) is not None:
            reason = _unfit(model, name, module, owners, tied)
            if reason is None and (unlike := unlike_its_base(module)):
                reason = _of_another_class(module, f", and subclasses that compute the same: {unlike}")
            if reason is None:
                candidates[name] = module
            else:
                left[name] = reason
        elif isinstance(module, (*WEIGHTED, *BINARY_CLASSES, ConvTranspose)):
            left[name] = _of_another_class(module)
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (*WEIGHTED, _PARAMETRIZED)) or nn.parameter.is_lazy(parameter):
                continue
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                left[f"{name}.{key}"] = f"a 3-D parameter of {parameter.numel():,} entries (fused experts?)"
    return candidates, left


def _of_another_class(module: Any, more: str = "") -> str:
    kind = type(module).__name__
    if kind in {cls.__name__ for cls in BINARY_CLASSES}:  # a namesake of another package
        kind = f"{type(module).__module__}.{kind}"
    known = ", ".join(cls.__name__ for cls in BINARY_CLASSES)
    return f"{kind} has no binary class (exact types only: {known}{more})"


def _tied_keys(model: nn.Module) -> set[str]:
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return set(keys) | set(keys.values()) if isinstance(keys, dict) else set(keys)


def _unfit(model: nn.Module, name: str, module: nn.Module, owners: dict[int, list[str]], tied: set[str]) -> str | None:
    weight: Any = parameters_of(module).get("weight")
    if weight is None or nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__} (quantized, or not made yet?): only plain tensors have signs"
    if weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(weight.shape)}"
    if len(owners[id(weight)]) > 1 or name in tied:
        others = [owner for owner in owners[id(weight)] if owner != name]
        return f"its weight is tied{' to ' + ', '.join(others) if others else ''}"
    if weight.is_meta and is_hooked(module):
        return "its weight is offloaded: load the model without offloading to binarize it"
    if weight.dtype not in _REAL:
        return f"its weight is stored as {weight.dtype}"
    if has_replaced_forward(module):
        return "its forward was replaced on the instance (kernelize, a monkey patch), so a new class has no effect"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "bypassed: torch's MultiheadAttention computes with its weight and does not call it"
    return adapter_reason(model, name)


def _pattern_reason(name: str, config: StoMPPConfig) -> str | None:
    if config.target_modules and not any(matches(name, pattern) for pattern in config.target_modules):
        return "no pattern of target_modules matches it"
    if any(matches(name, pattern) for pattern in config.exclude_modules or []):
        return "a pattern of exclude_modules matches it"
    return None


def _by_pattern(candidates: list[str], beside: list[str], config: StoMPPConfig, left: dict[str, str]) -> list[str]:
    known = f"candidates are {', '.join(candidates[:6])}{', ...' if len(candidates) > 6 else ''}"
    for option, patterns in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        for pattern in patterns or []:
            if not any(matches(name, pattern) for name in (*candidates, *beside)):
                real = [f"{name} ({reason})" for name, reason in left.items() if matches(name, pattern)]
                why = f"it names only layers that cannot be binarized: {', '.join(real[:4])}" if real else known
                raise PatternError(f"{option}: {pattern!r} matches no layer; {why}.")
    reasons = {name: _pattern_reason(name, config) for name in candidates}
    left.update({name: reason for name, reason in reasons.items() if reason})
    return [name for name in candidates if not reasons[name]]


def _ordered(names: list[str], config: StoMPPConfig) -> list[str]:
    patterns = config.order_patterns
    if config.order == "reverse":
        return names[::-1]
    if not patterns:
        return names
    place: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        found = [name for name in names if matches(name, pattern)]
        if not found:
            raise PatternError(f"order: {pattern!r} matches none of the layers to binarize: {', '.join(names[:6])} ...")
        for name in found:
            place.setdefault(name, index)
    rest = [name for name in names if name not in place]
    if rest:
        raise PatternError(f"order: no pattern matches {', '.join(rest[:6])}; end the list with '*' for the rest.")
    return sorted(names, key=lambda name: place[name])


def _staged(
    model: nn.Module, names: list[str], flow: DataFlow | None, beyond: Beyond, config: StoMPPConfig
) -> list[Entry]:
    called = beyond.called or (flow.called if flow else [name for name in names if name != beyond.embedding])
    blocks = {name: block_of(model, name) for name in called}
    blocks[str(beyond.embedding)] = next(filter(None, blocks.values()), None)  # an embedding goes with the first block
    if config.order == "global":
        stages = [(0, "all layers")] * len(names)
    elif config.stages.isdigit():
        count = int(config.stages)
        if count > len(names):
            raise ConfigError(f"StoMPPConfig: stages={count} is more than the {len(names)} layers to binarize.")
        stages = [(index * count // len(names), "") for index in range(len(names))]
        stages = [(stage, f"part {stage + 1} of {count}") for stage, _ in stages]
    else:
        keys = [(blocks[name] or name) if config.stages == "block" else name for name in names]
        # A block is one stage even where an explicit order takes its layers apart.
        numbers = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        stages = [(numbers[key], key) for key in keys]
    entries = []
    for name, (stage, label) in zip(names, stages, strict=True):
        if name == beyond.embedding:
            entry = Entry(name, stage, label, kind="embedding")
        else:  # after the embedding, if there is one
            entry = Entry(name, stage, label, position=called.index(name) + (beyond.embedding is not None))
        if name in beyond.attention:
            entry.kind, entry.shape = "attention", beyond.attention[name]
        elif flow is not None:
            entry.producer = flow.producers.get(name) or None
            entry.shape = list(flow.shapes.get(name, ())) or None
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry.stage)


_NOT_CALLED = "bypassed: the model did not call it in the probe (its weight may be used elsewhere)"
_READ_ELSEWHERE = (
    "bypassed: its weight moved the model's output in the probe by a way that does not lead through the layer (a fused "
    "operator, or a module that computes with it)"
)


def select(model: nn.Module, config: StoMPPConfig, example_inputs: Any = None) -> Plan:
    """Choose layers, order and stages, without changing anything.

    Raises:
        PatternError: a pattern matches nothing.
        NothingToBinarizeError: no layer is left; the message counts the reasons.
        ConfigError: more stages than layers, a last_stage that is none of them, element masks without a probe, or
            attention that has no binary form.
    """
    candidates, left = _reasons_in_itself(model)
    if not candidates:
        raise NothingToBinarizeError(
            f"{type(model).__name__} has no layer of a type with a binary class "
            f"({', '.join(cls.__name__ for cls in BINARY_CLASSES)}). {_why_not(left)}"
        )
    flow = probe(model, candidates, example_inputs)
    names = list(candidates)
    if flow is not None:
        bypassed = [name for name in names if name not in flow.called]
        left.update(dict.fromkeys(bypassed, _NOT_CALLED))
        if bypassed:
            logger.warning("left real because the model never calls them: %s", ", ".join(bypassed))
        left.update(dict.fromkeys(flow.bypassed, _READ_ELSEWHERE))
        if flow.bypassed:
            read = [name for name in names if name in flow.bypassed]
            logger.warning("left real because something else computes with their weights, too: %s", ", ".join(read))
        names = [name for name in flow.called if name not in flow.bypassed]

    def excluded(name: str) -> str | None:
        outside = name.endswith(CHILD) and block_of(model, name) is None and any(block_of(model, n) for n in names)
        return _pattern_reason(name, config) or ("it is outside the repeated blocks" if outside else None)

    beyond = find(model, config, names, excluded, example_inputs)
    more = [*filter(None, [beyond.embedding]), *beyond.attention]
    named = _by_pattern(names, [*more, *beyond.left], config, left)
    left.update(beyond.left)
    for name, reason in beyond.left.items():
        if not _pattern_reason(name, config):  # else the user says so
            logger.warning("%s stays real, although it was asked for: %s", name, reason)
    misplaced = real_by_place(model, names, flow, config) if names else {}
    left.update({name: reason for name, reason in misplaced.items() if name in named})
    kept = [name for name in named if name not in misplaced]
    if not kept:
        if named:
            advice = "Use first_layer='binarize' or head='binarize' to include them."
        elif names:
            advice = "Everything was excluded: loosen target_modules or exclude_modules."
        else:
            advice = "Pass example_inputs that reach the layers."
        kind = type(model).__name__
        raise NothingToBinarizeError(f"No layer of {kind} is left to binarize. {_why_not(left)} {advice}")
    near = Neighbours() if flow is None else neighbours(model, kept, flow, config)
    ordered = [name for name in beyond.called if name in kept or name in beyond.attention] or kept
    ordered = [*filter(None, [beyond.embedding]), *ordered]
    entries = _staged(model, _ordered(ordered, config), flow, beyond, config)
    for entry in entries:
        entry.absorbed = near.absorbing.get(entry.name)
        if entry.name in near.ungated:  # the ReLU that the probe saw is gone: both signs come through
            entry.producer = None
    _warn_of_dead_signs(near, entries, config)
    if config.activation_mask == "element" and config.binary_activations and flow is None:
        raise ConfigError(
            "StoMPPConfig: activation_mask='element' needs the sizes of the layers' inputs, and no probe could be run; "
            "pass binarize_model(model, config, example_inputs=...) one small batch."
        )
    plan = Plan(config, entries, left, near.bypassed, near.paused, near.shifted, beyond.implementation)
    plan.freezing  # noqa: B018  # a last_stage that does not exist is refused before anything changes
    return plan


def _warn_of_dead_signs(near: Neighbours, entries: list[Entry], config: StoMPPConfig) -> None:
    if near.one_signed and config.activation_levels == "symmetric":
        producers = {entry.name: entry.producer for entry in entries}
        listed = ", ".join(f"{name} (after {producers[name] or '?'})" for name in near.one_signed[:6])
        logger.warning(
            "the input of %d layers was never negative in the probe, so that its sign says nothing: %s%s. Use "
            "activation_levels='auto' with a scale and a threshold, or relu='drop' where it is a ReLU.",
            len(near.one_signed), listed, ", ..." if len(near.one_signed) > 6 else "",
        )  # fmt: skip


def _why_not(left: dict[str, str]) -> str:
    reasons = Counter(left.values())
    return "Left: " + "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) + "." if reasons else ""
