"""Models that other libraries have wrapped before binarize_model: accelerate's hooks and PEFT's adapters."""

import copy
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import CASES, logits, quick, train
from peft import LoraConfig, get_peft_model
from torch import nn

from stompp_hf import Progression, binarize_model, calibrate, get_plan, restore_model
from stompp_hf.plan import binary_layers

BERT = CASES["bert"]


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


def test_peft_only_base_layers_are_converted() -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(1)
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
        return get_peft_model(BERT.build(), lora)

    model, plain = adapted(), adapted()
    binarize_model(model, quick())
    prefix = "base_model.model."
    plain_names = [entry.name for entry in get_plan(binarize_model(BERT.build())).entries]
    expected = [n + ".base_layer" if n.endswith(("query", "value")) else n for n in plain_names]
    assert [*binary_layers(model)] == [prefix + name for name in expected]
    left = get_plan(model).left
    adapters = {name: reason for name, reason in left.items() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2 and set(adapters.values()) == {"it is part of an adapter"}
    assert "modules_to_save" in left[f"{prefix}classifier.original_module"]
    assert "modules_to_save" in left[f"{prefix}classifier.modules_to_save.default"]
    for name in left:
        assert type(model.get_submodule(name)) is nn.Linear
    batch = BERT.batch()
    assert torch.equal(logits(model, batch), logits(plain, batch))
    latents = {name: layer.weight.detach().clone() for name, layer in binary_layers(model).items()}
    assert all(loss == loss for loss in train(model, BERT, 0, 12, 12)) and Progression(model, 12).is_complete()
    assert all(torch.equal(layer.weight, latents[name]) for name, layer in binary_layers(model).items())
