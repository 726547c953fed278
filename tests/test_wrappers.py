"""Models that accelerate has put hooks on before binarize_model; for PEFT's adapters see test_peft_wrapped.py."""

import copy
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from stompp_hf import Progression, binarize_model, calibrate, restore_model


def freeze(model: nn.Module, batch: Any) -> nn.Module:
    """Everything frozen at once, with activation values from one batch."""
    Progression(model, 1).step(1)
    return calibrate(model, [batch]).eval()


def test_accelerate_hooks_run_the_binary_forward() -> None:
    x = torch.randn(16, 8)
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    hooked, bare = copy.deepcopy(plain), copy.deepcopy(plain)
    calls: list[str] = []

    class Recorder(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append("called")
            return args, kwargs

    add_hook_to_module(hooked[1], Recorder())
    for model in (hooked, bare):
        binarize_model(model, example_inputs=x)
        calls.clear()
        assert torch.equal(model(x), plain(x))
        freeze(model, x)
    calls.clear()
    assert torch.equal(hooked(x), bare(x)) and not torch.equal(hooked(x), plain(x)) and calls == ["called"] * 2
    assert torch.equal(restore_model(hooked)(x), plain(x))
