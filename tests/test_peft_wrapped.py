"""Models that PEFT has wrapped before they become binary: what is converted, trained, packed, saved, and unwrapped."""

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as hf
import vision
from models import logits, quick, same_tensors, train
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from stompp_hf import (
    Progression,
    StoMPPTrainerCallback,
    binarize_model,
    get_plan,
    pack_model,
    restore_model,
    unpack_model,
)
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.errors import AdapterError, CheckpointError
from stompp_hf.modules import BinaryLayer
from stompp_hf.modules.packed import PackedLayer
from stompp_hf.surgery.members import binary_layers

STEPS = 12
CASES = {"bert": models.CASES["bert"], "resnet": vision.CASES["resnet"]}
BERT = CASES["bert"]
LORA: dict[str, dict[str, Any]] = {
    "bert": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "resnet": {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]},
}

RELOAD = """
import sys, torch, transformers, stompp_hf
from peft import PeftModel
folder, results = sys.argv[1], {}
for name, (auto, adapters, batch) in torch.load(f"{folder}/jobs.pt").items():
    base = getattr(transformers, auto).from_pretrained(f"{folder}/{name} base").eval()
    with torch.no_grad():
        results[name] = base(**batch).logits
        for adapter in adapters:
            path = f"{folder}/{name}" + ("" if adapter == "default" else f"/{adapter}")
            model = PeftModel.from_pretrained(base, path, adapter_name=adapter).eval()
            results[f"{name} {adapter}"] = model(**batch).logits
            base = model.unload()
torch.save(results, f"{folder}/results.pt")
"""


def adapted(name: str, **options: Any) -> Any:
    """A model with two adapters that are not nothing, the first of them active."""
    model = CASES[name].build()
    torch.manual_seed(1)
    config = {**LORA[name], "r": 2, "init_lora_weights": False, **options}
    model = get_peft_model(model, LoraConfig(**config))
    model.add_adapter("other", LoraConfig(**config))
    return model


@pytest.mark.parametrize("name", CASES)
def test_base_layers_are_converted_and_nothing_else(name: str) -> None:
    """The plan is the one of the model without adapters: the same names and stages."""
    case = CASES[name]
    model, before = adapted(name), adapted(name)
    batch = case.batch()
    binarize_model(model, quick(relu="keep"))
    bare = get_plan(binarize_model(case.build(), quick(relu="keep")))
    plan = get_plan(model)
    assert [(e.name, e.stage, e.stage_name) for e in plan.entries] == [
        (e.name, e.stage, e.stage_name) for e in bare.entries
    ]
    assert plan.fingerprint() == bare.fingerprint() and len(plan.of_kind("layer")) == case.layers
    adapters = {name: reason for name, reason in plan.left.items() if "lora_" in name}
    assert adapters and set(adapters.values()) == {"it is part of an adapter"}
    copies = {name: reason for name, reason in plan.left.items() if "modules_to_save" in reason}
    assert {name.rpartition("classifier")[2].removeprefix(".1") for name in copies} == {
        ".original_module", ".modules_to_save.default", ".modules_to_save.other",
    }  # fmt: skip
    base = model.get_base_model()
    assert all(type(base.get_submodule(name)) in (nn.Linear, nn.Conv2d) for name in plan.left)
    assert not any("lora_" in name for name, m in base.named_modules() if isinstance(m, BinaryLayer))
    for adapter in ("default", "other"):
        model.set_adapter(adapter), before.set_adapter(adapter)
        assert torch.equal(logits(model, batch), logits(before, batch))
    assert torch.equal(logits(restore_model(model), batch), logits(before, batch))


def finish(model: Any, name: str) -> Any:
    train(model, CASES[name], 0, STEPS, STEPS)
    return model.eval()


def test_packed_saved_and_reloaded_in_another_process(tmp_path: Path) -> None:
    """Adapters and base are saved apart, in both formats; what another process computes is bitwise the same."""
    jobs, expected = {}, {}
    for short, kind in ((short, kind) for short in CASES for kind in ("training", "packed")):
        name, case = f"{short} {kind}", CASES[short]
        model = binarize_model(adapted(short), quick())
        latents = {key: layer.weight.detach().clone() for key, layer in binary_layers(model).items()}
        finish(model, short)
        assert Progression(model, STEPS).is_complete()
        assert all(torch.equal(layer.weight, latents[key]) for key, layer in binary_layers(model).items())
        batch = {key: value for key, value in case.batch(77).items() if key != "labels"}
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            expected[f"{name} {adapter}"] = logits(model, batch)
        if kind == "packed":
            assert pack_model(model) is model
            assert all(isinstance(layer, PackedLayer) for layer in binary_layers(model).values())
            assert torch.equal(logits(model, batch), expected[f"{name} other"])
        with pytest.raises(AdapterError):
            model.merge_and_unload()
        model.save_pretrained(tmp_path / name)
        base = model.unload()
        base.save_pretrained(tmp_path / f"{name} base")
        expected[name] = logits(base, batch)
        jobs[name] = (case.auto.__name__, ["default", "other"], batch)
        found = inspect(tmp_path / f"{name} base")
        assert found.plan.packed == (kind == "packed") and found.sizes["weight scales"] > 0
        assert not any("base_layer" in entry.name for entry in found.plan.entries)
    torch.save(jobs, tmp_path / "jobs.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=500)
    assert same_tensors(torch.load(tmp_path / "results.pt"), expected) == []


def test_unpack_under_an_adapter() -> None:
    model = finish(binarize_model(adapted("bert"), quick()), "bert")
    batch = BERT.batch()
    expected = logits(model, batch)
    assert torch.equal(logits(unpack_model(pack_model(model)), batch), expected)
    model.delete_adapter("default")
    assert [*model.peft_config] == ["other"] and torch.isfinite(logits(model, batch)).all()


def test_prompts_leave_every_layer_alone() -> None:
    """Prompt tuning wraps the model and adds no layer: there is nothing to refuse."""
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = get_peft_model(BERT.build(), config)
    plain, batch = copy.deepcopy(model), BERT.batch()
    binarize_model(model, quick())
    assert len(binary_layers(model)) == BERT.layers
    assert torch.equal(logits(model, batch), logits(plain, batch))
    finish(model, "bert")
    expected = logits(model, batch)
    assert torch.equal(logits(pack_model(model), batch), expected)


# ---- in mid-progression ----


def run(model: Any, folder: Path, **options: Any) -> hf.Trainer:
    rows = [{key: value[row] for key, value in BERT.batch(seed).items()} for seed in range(4) for row in range(4)]
    args = hf.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        report_to="none", logging_steps=1, learning_rate=1e-2, **options,
    )  # fmt: skip
    return hf.Trainer(model, args, train_dataset=rows, callbacks=[StoMPPTrainerCallback()])


@pytest.mark.parametrize("regime", ["windowed_ste", "zero"])
def test_the_progression_goes_on_around_an_adapter(
    regime: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half binary when the adapter comes: the rest freezes around it, and latents and scales are not trained."""
    model = binarize_model(BERT.build(), quick(frozen_gradient=regime))
    wrapped = get_peft_model(model, LoraConfig(r=4, **LORA["bert"]))
    needs = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in needs)
    latents = {name: layer.weight.detach().clone() for name, layer in binary_layers(wrapped).items()}
    trainer = run(wrapped, tmp_path, save_steps=6)
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        trainer.train()
    assert "Trainer saves the adapter alone" in caplog.text and "model.unload().save_pretrained" in caplog.text
    shares = [record["stompp_frozen_fraction"] for record in trainer.state.log_history if "loss" in record]
    assert shares[0] < 1 == shares[-1] and shares == sorted(shares)
    for name, layer in binary_layers(wrapped).items():
        assert torch.equal(layer.weight, latents[name]) and layer.stage_state == "frozen"
        scale = latents[name].abs().mean(1)
        torch.testing.assert_close(layer.weight_scale.detach(), scale)  # as it was set, from data and latents
    batch = BERT.batch(77)
    expected = logits(wrapped, batch)
    trainer.save_model(str(tmp_path / "adapter"))
    wrapped.unload().save_pretrained(tmp_path / "base")
    base = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), batch), expected)

    again = get_peft_model(binarize_model(BERT.build(), quick()), LoraConfig(r=4, **LORA["bert"]))
    with pytest.raises(CheckpointError, match=r"resumes at step 6, and the base stands at step 0 .* adapter alone"):
        run(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_modules_to_save_waits_until_its_layers_are_frozen() -> None:
    """A copy of a layer that is not frozen would never be: nothing drives it. A copy of a finished one is fine."""
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["intermediate.dense"])
    model = binarize_model(BERT.build(), quick())
    with pytest.raises(AdapterError, match=r"modules_to_save=\['intermediate.dense'\] would train a copy"):
        get_peft_model(model, config)
    train(model, BERT, 0, STEPS, STEPS)
    batch = BERT.batch()
    for finished in (model, pack_model(copy.deepcopy(model))):
        expected = logits(finished, batch)
        wrapped = get_peft_model(finished, config)
        assert len(binary_layers(wrapped)) == BERT.layers
        assert torch.equal(logits(wrapped, batch), expected)
        wrapped(**batch).loss.backward()
        assert torch.equal(logits(wrapped.unload(), batch), expected)
