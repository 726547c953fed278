"""PEFT on a binary base: an adapter beside a binary layer is fine; one that reads or writes its weight is refused.

Adapters add to a layer's weight when they are merged, and some kinds read it to compute (DoRA, HRA) or change it to
begin with (PiSSA). The weight of a binary layer is a latent of which only the signs are used: the result would be
silently wrong. `stompp_hf.hooks` makes PEFT ask here first.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import AdapterError
from ..integrations.peft import adapters_of, check_version, is_target, with_targets
from ..modules import BinaryConv1D, BinaryLayer, BinaryLinear, Member
from .members import plain_name

logger = logging.getLogger(__name__)

BESIDE = frozenset(
    {
        *("ADALORA", "BEFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "LOHA", "LOKR", "LORA", "OFT", "PVERA"),
        *("RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
    }
)
"""Kinds of adapters that work on what enters a layer or leaves it, and leave the layer's weight alone."""
VARIANTS = (
    *("use_dora", "use_bdlora", "use_qalora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""Options of LoRA that change how its layers compute. PEFT marks most of them."""
_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of LoRA's init_lora_weights of which the same is true."""


# ---- what is wrapped ----


def base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers, with the adapters in it; the model itself where there are none."""
    inner: Any = model
    kinds = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("peft.")}
    if kinds & {"PeftModel", "PeftMixedModel"}:
        return base_model(inner.get_base_model())
    return base_model(inner.model) if "BaseTuner" in kinds else model


def _is_a(cls: type, name: str) -> bool:
    return any(base.__name__ == name for base in cls.__mro__)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a module is a PEFT adapter around a layer of the model."""
    return _is_a(type(module), "BaseTunerLayer")


def adapter_parts(model: nn.Module) -> set[nn.Module]:
    """The modules that PEFT has put into a model, without those that it has put them around."""
    outer = [module for module in model.modules() if is_tuner_layer(module)]
    added = [child for module in outer for name, child in module.named_children() if name != "base_layer"]
    return {part for child in added for part in child.modules()}


def has_adapters(model: nn.Module) -> bool:
    """Whether there are PEFT adapters in a model: Trainer then saves them, and nothing of the model."""
    return base_model(model) is not model or any(is_tuner_layer(module) for module in model.modules())


def adapter_reason(model: nn.Module, name: str) -> str | None:
    """Why a layer that PEFT put into a model stays real; None for a layer of the model itself."""
    path = name.split(".")
    for depth in range(len(path)):
        outer = model.get_submodule(".".join(path[:depth]))
        if _is_a(type(outer), "ModulesToSaveWrapper"):
            return "PEFT trains and saves it whole (modules_to_save)"
        if is_tuner_layer(outer) and path[depth] != "base_layer":
            return "it is part of an adapter"
    return None


# ---- adapters that need the weight ----


def _needs_weight(config: Any) -> str | None:
    """Why the adapters of a PEFT configuration cannot stand beside a binary layer, or None."""
    check_version()
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in BESIDE:
        return f"{kind} reads or changes the layer's weight, or is not known to leave it alone"
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITS:
        return f"init_lora_weights={init!r} starts from the layer's weight"
    for option in dataclasses.fields(config):
        if (option.name in VARIANTS or option.metadata.get("is_lora_variant")) and getattr(config, option.name):
            return f"{option.name} reads or changes the layer's weight, or is not known to leave it alone"
    return None


def _names(name: str, keys: Iterable[str]) -> list[str]:
    """The keys that name a module as PEFT's options do: by the end of its dotted name."""
    return [key for key in keys if f".{name}".endswith(f".{key}")]


def _is_binary(module: Any) -> bool:
    """Whether it is to be left alone: what stays real for good is not."""
    return isinstance(module, Member) and not module.always_real


def _option(config: Any, name: str) -> Any:
    return getattr(config, name, None) or []


def check_adapter(tuner: Any, model: nn.Module, adapter_name: str, state_dict: Any = None, **unused: Any) -> None:
    """Raise AdapterError, before PEFT changes anything, where an adapter is to stand and cannot."""
    found = {plain_name(name): module for name, module in model.named_modules() if _is_binary(module)}
    if not found:
        return
    config = copy.copy(tuner.peft_config[adapter_name])
    reasons: dict[str, str] = {}
    if _option(config, "layer_replication"):
        reasons["the model"] = "layer_replication copies layers to places that the plan does not know"
    config = with_targets(tuner, config, model)  # targets that PEFT takes by default
    reason, tokens = _needs_weight(config), _option(config, "trainable_token_indices")
    for name, member in found.items():
        if whole := [key for key in _option(config, "modules_to_save") if _inside(name, key)]:
            if not member.is_settled:
                reasons[name] = f"modules_to_save={whole} would train a copy of it before it is frozen"
        elif not isinstance(member, BinaryLayer):
            continue
        elif parameters := _names(f"{name}.weight", _option(config, "target_parameters")):
            reasons[name] = f"target_parameters={parameters} adds to the layer's weight"
        elif isinstance(member, nn.Embedding) and tokens and (not isinstance(tokens, dict) or _names(name, tokens)):
            reasons[name] = "trainable_token_indices replaces rows of the layer's weight"
        elif reason and _is_target(tuner, config, name, member, state_dict):
            reasons[name] = reason
    _refuse(reasons, f"the adapter {adapter_name!r}")
    if not config.inference_mode and any(m.stompp_config.is_ste_free for m in found.values()):
        logger.warning(
            "this base is STE-free: its frozen layers pass no gradient on, and an adapter in front of them learns "
            "through shortcuts alone. A base that was trained with frozen_gradient='windowed_ste' passes one."
        )


def _inside(name: str, key: str) -> bool:
    """Whether modules_to_save takes the module of this name, or one around it."""
    path = name.split(".")
    return any(".".join(path[: depth + 1]).endswith(key) for depth in range(len(path)))


def _is_target(tuner: Any, config: Any, name: str, layer: BinaryLayer, state_dict: Any) -> bool:
    if state_dict:  # PEFT then goes by the names of what is to be loaded
        return any(str(key).startswith(f"{name}.") for key in state_dict)
    if str(_option(config, "target_modules")).lower() == "all-linear":
        return isinstance(layer, (BinaryLinear, BinaryConv1D))
    return is_target(tuner, config, name)


def check_wrapped(model: nn.Module, names: Iterable[str]) -> None:
    """Look at the adapters around layers that are to become binary.

    Raises:
        AdapterError: one of them reads or changes the layer's weight, or is merged into it.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    configs = getattr(model, "peft_config", {})
    reasons: dict[str, str] = {}
    for name in names:
        outer = name
        while outer.endswith(".base_layer"):
            outer = outer.removesuffix(".base_layer")
            layer = modules[outer]
            if layer.merged:
                reasons[outer] = "it is merged into the layer; call unmerge_adapter() first"
            elif hasattr(layer, "parameter_name"):
                reasons[outer] = "target_parameters adds to the layer's weight"
            for adapter in adapters_of(layer) & set(configs):
                if reason := _needs_weight(configs[adapter]):
                    reasons[outer] = reason
    _refuse(reasons, "an adapter")


def _refuse(reasons: dict[str, str], what: str) -> None:
    if reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise AdapterError(
            f"{what} cannot stand beside {len(reasons)} binary layer{'s' if len(reasons) > 1 else ''} ({listed}). A "
            "binary layer uses the signs of its weight alone. Use LoraConfig() with use_dora=False and "
            "init_lora_weights=True, or LoHa, LoKr, AdaLoRA, IA3, VeRA; or target layers that stayed real; or "
            "stompp_hf.restore_model(model) first, for a real base."
        )


# ---- merging ----


def _merges(layer: Any, adapters: Any) -> bool:
    """Whether a merge of these adapters, or of the active ones, would add to a binary weight."""
    if not _is_binary(layer.get_base_layer()):
        return False
    asked = layer.active_adapters if adapters is None else adapters
    return bool(set(asked) & adapters_of(layer))


def check_layer_merge(layer: Any, adapter_names: Any = None, **unused: Any) -> None:
    """Raise AdapterError where one adapter layer would be merged into a binary weight."""
    if _merges(layer, adapter_names):
        base = layer.get_base_layer()
        _refuse_merge([f"{type(base).__name__}({base.extra_repr()})"])


def check_model_merge(tuner: Any, adapter_names: Any = None, **unused: Any) -> None:
    """All layers, before the first is touched: a merge that stops half-way would leave a model of neither kind."""
    layers = [(name, module) for name, module in tuner.model.named_modules() if is_tuner_layer(module)]
    _refuse_merge([name for name, layer in layers if _merges(layer, adapter_names)])


def _refuse_merge(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise AdapterError(
            f"an adapter cannot be merged into the binary weight of {', '.join(names[:3])}{more}: real numbers do not "
            "fit into signs; what the adapter learned would be lost, or would flip signs. Keep it beside the base: "
            "model.save_pretrained(...) writes the adapter, model.unload().save_pretrained(...) the base. For a merge "
            "into float weights, stompp_hf.restore_model(model) first."
        )
