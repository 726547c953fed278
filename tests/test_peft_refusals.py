"""What PEFT may not do to a binary base: merge into it, or read and change its weights; and that nothing else does."""

import copy
import subprocess
import sys
from importlib import metadata
from typing import Any

import beyond
import models
import peft_kinds
import pytest
import torch
import vision
from models import logits, quick, same_tensors, train
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from peft_kinds import KINDS, Watch
from torch import nn

from stompp_hf import binarize_model, get_plan, pack_model, restore_model
from stompp_hf.errors import AdapterError
from stompp_hf.surgery import adapters
from stompp_hf.surgery.adapters import BESIDE, is_tuner_layer
from stompp_hf.surgery.members import binary_layers

CASES = {"bert": beyond.CASES["bert"], "gpt2": models.CASES["gpt2"], "resnet": vision.CASES["resnet"]}
TARGETS = {
    "linear": ("bert", ["query"]), "embedding": ("bert", ["word_embeddings"]), "conv1d": ("gpt2", ["c_attn"]),
    "conv2d": ("resnet", ["convolution"]),
}  # fmt: skip
TAKEN = {
    "linear": BESIDE,
    "embedding": {"LORA", "OFT"},
    "conv1d": {"LORA", "ADALORA", "FOURIERFT", "GRALORA", "IA3", "PVERA", "RANDLORA", "UNILORA", "VBLORA", "VERA"}
    | {"WAVEFT"},
    "conv2d": {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT"},
}
"""The kinds that PEFT has for each type of layer."""
READERS = {
    *("ADAMSS", "DEFT", "DELORA", "HIRA", "HRA", "OSF", "PEANUT", "PSOFT", "SUPERTUNING", "TINYLORA"),
    "TRAINABLE_TOKENS",
}
"""Kinds that read the weight of a linear layer to begin with, or in forward; convolutions have more of them."""
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def bases() -> dict[tuple[str, str], Any]:
    """Finished models, with latents and packed."""
    found = {}
    for name, case in CASES.items():
        options = {"embeddings": "binarize"} if name == "bert" else {}
        model = binarize_model(case.build(), quick(**options))
        train(model, case, 0, 6, 6)
        found[name, "training"] = model
        found[name, "packed"] = pack_model(copy.deepcopy(model))
    return found


def adapted(base: Any, config: Any) -> Any:
    return get_peft_model(copy.deepcopy(base).train(), config)


# ---- merging ----


@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for layer in TAKEN for kind in sorted(TAKEN[layer])])
def test_every_kind_leaves_the_weight_alone_and_is_not_merged(bases: Any, kind: str, layer: str) -> None:
    """Through a forward and a backward pass no one but the layer touches its weight; no way of merging does either."""
    name, targets = TARGETS[layer]
    base, batch = bases[name, "training"], CASES[name].batch()
    model = copy.deepcopy(base).train()
    with Watch(model) as watch:
        model = get_peft_model(model, peft_kinds.config(kind, targets))
        model(**batch).loss.backward()
    assert watch.seen == set()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    packed = adapted(bases[name, "packed"], peft_kinds.config(kind, targets))
    for wrapped in (model, packed):
        before = copy.deepcopy(wrapped.state_dict())
        layers = [m for m in wrapped.modules() if is_tuner_layer(m) and m.get_base_layer() in members_of(wrapped)]
        ways = [wrapped.merge_and_unload, wrapped.merge_adapter, layers[0].merge]
        for merge in ways:
            for safe in (False, True):
                with pytest.raises(AdapterError, match="cannot be merged into the binary weight of"):
                    merge(safe_merge=safe)
        assert same_tensors(wrapped.state_dict(), before) == [] and not any(layer.merged for layer in layers)
        expected = logits(base, batch)
        if layer != "conv2d":  # batch norm moved on in the training pass above
            assert torch.equal(logits(wrapped.unload(), batch), expected)


def members_of(model: Any) -> set[nn.Module]:
    return set(binary_layers(model).values())


def test_a_merge_is_refused_before_a_real_layer_is_touched(bases: Any) -> None:
    config = LoraConfig(r=2, target_modules=["pooler.dense", "query"], init_lora_weights=False)
    model = adapted(bases["bert", "training"], config)
    batch = CASES["bert"].batch()
    expected = logits(model, batch)
    with pytest.raises(AdapterError) as error:
        model.merge_and_unload()
    for part in (QUERY, "do not fit into signs", "model.save_pretrained", "model.unload()", "restore_model(model)"):
        assert part in str(error.value)
    with pytest.raises(AdapterError):
        model.merge_adapter(["default"])
    assert torch.equal(logits(model, batch), expected)
    assert not any(m.merged for m in model.modules() if is_tuner_layer(m))


def test_what_stayed_real_can_be_merged(bases: Any) -> None:
    """An adapter of the head alone, also beside an inactive one of binary layers."""
    config = LoraConfig(r=2, target_modules=["pooler.dense"], init_lora_weights=False)
    for kind in ("training", "packed"):
        model, batch = adapted(bases["bert", kind], config), CASES["bert"].batch()
        expected = logits(model, batch)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
        model.merge_adapter()
        torch.testing.assert_close(logits(model, batch), expected)
        model.unmerge_adapter()
        with pytest.raises(AdapterError):
            model.merge_adapter(["other"])
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), expected)
        assert get_plan(merged).packed == (kind == "packed")


def test_a_restored_base_can_be_merged(bases: Any) -> None:
    for kind in ("training", "packed"):
        config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
        model, batch = adapted(bases["bert", kind], config), CASES["bert"].batch()
        restore_model(model)
        expected = logits(model, batch)
        torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected)


def test_a_kind_that_is_defined_later_is_guarded_too(bases: Any) -> None:
    class Later(lora.Linear):
        def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
            self.get_base_layer().weight.data.add_(1.0)

    config = LoraConfig(r=2, target_modules=["query"])
    config._register_custom_module({type(bases["bert", "training"].get_submodule(QUERY)): Later})
    layer = adapted(bases["bert", "training"], config).get_submodule(f"base_model.model.{QUERY}")
    assert type(layer) is Later
    with pytest.raises(AdapterError, match="BinaryLinear"):
        layer.merge()


# ---- adapters that need the weight ----


def refused(bases: Any, config: Any, message: str, name: str = "bert") -> None:
    """get_peft_model raises, and leaves the model as it was."""
    for kind in ("training", "packed"):
        model = copy.deepcopy(bases[name, kind])
        needs = {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(AdapterError, match=message):
            get_peft_model(model, copy.deepcopy(config))
        assert {n: p.requires_grad for n, p in model.named_parameters()} == needs
        assert not any(is_tuner_layer(module) for module in model.modules())
        assert torch.equal(logits(model, CASES[name].batch()), logits(bases[name, kind], CASES[name].batch()))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - BESIDE - {"LN_TUNING", "XLORA"}))
def test_other_kinds_are_refused(bases: Any, kind: str) -> None:
    refused(bases, peft_kinds.config(kind, ["classifier", "query"]), f"{QUERY}: {kind} reads or changes")


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    ],
)
def test_lora_that_needs_the_weight_is_refused(bases: Any, options: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["query", "pooler.dense"], **options)
    refused(bases, config, next(iter(options)))
    config.target_modules = {"pooler.dense"}
    if "use_dora" in options or options.get("init_lora_weights") in ("pissa", "olora"):  # the head is real
        model = adapted(bases["bert", "packed"], config)
        assert torch.isfinite(model(**CASES["bert"].batch()).loss)


def test_other_ways_to_the_weight_are_refused(bases: Any) -> None:
    layer = "encoder.layer.1.output.dense"
    refused(bases, LoraConfig(target_modules=["query"], target_parameters=[f"{layer}.weight"]), "target_parameters")
    config = LoraConfig(target_modules=["pooler.dense"], trainable_token_indices={"word_embeddings": [3]})
    refused(bases, config, "word_embeddings: trainable_token_indices")
    refused(bases, LoraConfig(target_modules="all-linear", use_dora=True), "use_dora")
    refused(bases, LoraConfig(target_modules=["query"], layer_replication=[(0, 2), (1, 2)]), "layer_replication")
    refused(bases, LoraConfig(target_modules=["convolution"], use_dora=True), "use_dora", "resnet")
    refused(bases, LoraConfig(use_dora=True), "use_dora", "gpt2")  # PEFT's own choice of targets


def test_an_older_peft_is_refused(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"peft": "0.20.0"}.__getitem__)
    refused(bases, LoraConfig(target_modules=["query"]), "PEFT 0.20.0 does not say .* pip install -U 'peft>=0.21'")
    wrapped = get_peft_model(CASES["bert"].build(), LoraConfig(target_modules=["query"]))
    with pytest.raises(AdapterError, match="PEFT 0"):
        binarize_model(wrapped, quick())


def test_a_second_adapter_is_looked_at_too(bases: Any) -> None:
    model = adapted(bases["bert", "packed"], LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(AdapterError, match=f"'other' cannot stand .*{QUERY}: use_dora"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["query"], use_dora=True))
    assert [*model.peft_config] == ["default"]
    bare = copy.deepcopy(bases["bert", "packed"])
    with pytest.raises(AdapterError):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"], use_dora=True), bare)
    with pytest.raises(AdapterError):
        bare.add_adapter(LoraConfig(r=2, target_modules=["query"], use_dora=True))


def test_a_base_that_passes_no_gradient_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    case = models.CASES["bert"]
    for regime in ("windowed_ste", "zero"):
        model = binarize_model(case.build(), quick(frozen_gradient=regime))
        with caplog.at_level("WARNING", "stompp_hf.surgery.adapters"):
            get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
        assert ("this base is STE-free" in caplog.text) == (regime == "zero")


def test_the_refused_ones_do_touch_the_weight(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard the watch sees them: it is no test that cannot fail."""
    monkeypatch.setattr(adapters, "_needs_weight", lambda config: None)
    configs = {kind: peft_kinds.config(kind, ["query"]) for kind in READERS}
    for options in ({"use_dora": True}, *({"init_lora_weights": init} for init in ("pissa", "olora", "mica"))):
        configs[str(options)] = LoraConfig(r=2, target_modules=["query"], **options)
    for name, config in configs.items():
        model = copy.deepcopy(bases["bert", "training"]).train()
        with Watch(model) as watch:
            get_peft_model(model, config)(**CASES["bert"].batch())
        assert watch.seen, name


def test_binarizing_under_an_adapter_that_needs_the_weight() -> None:
    case = models.CASES["bert"]
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        model = get_peft_model(case.build(), LoraConfig(r=2, target_modules=["query"], **options))
        with pytest.raises(AdapterError, match=f"{QUERY}: {next(iter(options))}"):
            binarize_model(model, quick())
        assert not hasattr(model.get_base_model(), "stompp_plan")
        binarize_model(model, quick(exclude_modules=["query.base_layer"]))
    model = get_peft_model(case.build(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the layer"):
        binarize_model(model, quick())
    model.unmerge_adapter()
    binarize_model(model, quick())


# ---- imports ----


def test_without_peft() -> None:
    script = """
import sys
sys.modules["peft"] = None
import stompp_hf, torch
stompp_hf.binarize_model(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
