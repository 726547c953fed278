"""Attention through transformers' AttentionInterface: how a BinaryAttention is asked in place of sdpa or eager.

A model asks its config for the name of an attention implementation at every call. Binarization changes that name to
one of `NAMES`, which calls the `binary_attention` of the asking module if it has one, and else what was asked for
before. The name says what that was, so nothing else has to be remembered, and transformers writes none to config.json.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError
from ..integrations.torch import remove_forward_pre_hook
from ..integrations.transformers import attention_of, set_attention
from ..modules.attention import BinaryAttention, Call

NAMES = {"sdpa": "stompp_sdpa", "eager": "stompp_eager"}
"""Our name for each implementation that pending attention can still run."""

CHILD = "binary_attention"
"""Name that a BinaryAttention has in its attention module."""

Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor, Call], None]
_watchers: list[Watcher] = []


def original(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The implementation called `name` for a module; eager ones belong to the file that defines the module."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    found = (getattr(file, "eager_attention_forward", None) for file in files)
    return next((function for function in found if function is not None), None)


def _answer(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: an attention function, whose first argument is the asking module."""
    function = original(name, module)
    if function is None:
        raise ConfigError(f"{type(module).__name__} has no eager attention; load with attn_implementation='sdpa'.")
    binary: Any = getattr(module, CHILD, None)
    if binary is None and not _watchers:
        return function(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    call = Call(
        plain=lambda q, k, v: function(module, q, k, v, attention_mask, **options),
        mask=attention_mask,
        bias=options.get("position_bias"),
        scaling=options.get("scaling"),
        softcap=options.get("softcap") if name == "eager" else None,  # sdpa knows no such thing
        dropout=options.get("dropout", 0.0) if module.training else 0.0,
        # Where sdpa gets no mask, the module itself says whether it is causal; eager always gets a causal mask.
        causal=name == "sdpa" and bool(getattr(module, "is_causal", True) if causal is None else causal),
        wants_weights=name == "eager",
    )
    for watcher in _watchers:
        watcher(module, query, key, value, call)
    if binary is None:
        return call.plain(query, key, value)
    return binary(query, key, value, call)  # type: ignore[no-any-return]


def configs_of(model: nn.Module) -> list[Any]:
    """Every config of a model that names an attention implementation: its own, its parts', and their sub-configs."""
    found: dict[int, Any] = {}
    todo: list[Any] = [
        module.config for module in model.modules() if hasattr(getattr(module, "config", None), "sub_configs")
    ]
    while todo:
        config: Any = todo.pop(0)
        if config is not None and id(config) not in found:
            found[id(config)] = config
            todo += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())


def implementations(model: nn.Module) -> set[str]:
    """The names that the configs of a model give now."""
    return {name for name in map(attention_of, configs_of(model)) if name is not None}


def switch(model: nn.Module, to: dict[str, str]) -> None:
    """Rename implementations in every config of a model; names that are no keys of `to` stay."""
    for config in configs_of(model):
        name = attention_of(config)
        set_attention(config, to.get(name or "", name))


def _still_asked(module: nn.Module, args: Any) -> None:
    """Hook before an attention module's forward: binary attention must not be left out in silence."""
    config = getattr(module, "config", None)
    name = attention_of(config)
    if hasattr(config, "sub_configs") and name not in NAMES.values():
        raise ConfigError(
            f"{type(module).__name__} has binary attention, and its attention implementation was changed to {name!r} "
            "after binarize_model, which leaves it out. Choose the implementation before: "
            "restore_model(model), model.set_attn_implementation(...), then binarize_model(model, config)."
        )


def attach(module: nn.Module, binary: BinaryAttention) -> None:
    """Give an attention module its binary products."""
    module.add_module(CHILD, binary)
    module.register_forward_pre_hook(_still_asked)


def detach_all(model: nn.Module) -> None:
    """Remove all binary products from a model, and give its implementations their names back."""
    for module in list(model.modules()):
        if isinstance(getattr(module, CHILD, None), BinaryAttention):
            delattr(module, CHILD)
            remove_forward_pre_hook(module, _still_asked)
    switch(model, {new: old for old, new in NAMES.items()})


@contextlib.contextmanager
def watched(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Inside the block the watcher is told of every attention call that goes through the interface."""
    before = [(config, attention_of(config)) for config in configs_of(model)]
    switch(model, NAMES)
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
        for config, name in before:
            set_attention(config, name)


for _name, _ours in NAMES.items():
    AttentionInterface.register(_ours, functools.partial(_answer, _name))
    AttentionMaskInterface.register(_ours, ALL_MASK_ATTENTION_FUNCTIONS[_name])
