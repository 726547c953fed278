"""Every kind of PEFT adapter with options that fit the tiny models, and a watch over who touches a binary weight."""

import dataclasses
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from stompp_hf.modules import BinaryLayer, Member

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 2},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [0, 1]},
    "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
"""What the tiny models need; the defaults serve for all others."""
KINDS = [str(kind.value) for kind, cls in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(cls, BaseTuner)]
"""Every kind that puts adapters into a model; prompts and prefixes do not."""


def config(kind: str, targets: list[str], **options: Any) -> PeftConfig:
    """A configuration of a kind, for layers whose names end so."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {option.name for option in dataclasses.fields(cls)}
    named = {"target_modules": targets} if "target_modules" in known else {}
    return cls(**named, **OPTIONS.get(kind, {}), **options)


class Watch(TorchFunctionMode):
    """Notes the torch functions that get the weight of a binary layer outside that layer's own forward.

    Asking for a shape, a dtype or a device is no such thing, nor is setting requires_grad.
    """

    LOOKS = (
        "__get__",
        "__set__",
        "requires_grad_",
        "size",
        "dim",
        "is_floating_point",
        "is_complex",
        "numel",
        "detach",
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = [module for module in model.modules() if isinstance(module, BinaryLayer)]
        self.weights = {layer.weight.data_ptr() for layer in layers}
        self.inside = 0
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if not self.inside and name not in self.LOOKS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            with torch._C.DisableTorchFunction():
                if any(t.data_ptr() in self.weights for t in tensors if t.device.type == "cpu"):
                    self.seen.add(name)
        return func(*args, **(kwargs or {}))

    def _move(self, module: nn.Module, steps: int) -> None:
        self.inside += steps * isinstance(module, Member)

    def __enter__(self) -> "Watch":
        self.hooks = [
            register_module_forward_pre_hook(lambda module, args: self._move(module, 1)),
            register_module_forward_hook(lambda module, args, output: self._move(module, -1), always_call=True),
        ]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)
