"""LoRA beside a finished binary base, in the training format and packed: train, save, reload elsewhere, switch off."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import beyond
import models
import pytest
import torch
import transformers as hf
import vision
from models import logits, quick, same_tensors, train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora

from stompp_hf import StoMPPTrainerCallback, binarize_model, get_plan, pack_model
from stompp_hf.modules import BinaryConv1D, BinaryConv2d, BinaryEmbedding, BinaryLinear

STEPS = 6
CASES = {"bert": beyond.CASES["bert"], "gpt2": models.CASES["gpt2"], "resnet": vision.CASES["resnet"]}
OPTIONS: dict[str, dict[str, Any]] = {"bert": {"embeddings": "binarize"}, "gpt2": {}, "resnet": {}}
LORA: dict[str, dict[str, Any]] = {
    "bert": {"target_modules": ["query", "value", "word_embeddings"], "task_type": "SEQ_CLS"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"},
    # What batch norm sees changes with the adapter: its copy belongs to the adapter, and the base stays what it was.
    "resnet": {"target_modules": ["convolution"], "modules_to_save": ["normalization", "classifier.1"]},
}
BINARY = {"bert": {BinaryLinear, BinaryEmbedding}, "gpt2": {BinaryConv1D}, "resnet": {BinaryConv2d}}
FORMATS = ("training", "packed")

RELOAD = """
import sys, torch, peft, transformers
from peft import PeftModel
import stompp_hf  # after PEFT, for once
folder, results = sys.argv[1], {}
for name, (auto, base, batch) in torch.load(f"{folder}/jobs.pt").items():
    model = getattr(transformers, auto).from_pretrained(f"{folder}/{base}")
    model = PeftModel.from_pretrained(model, f"{folder}/{name}").eval()
    with torch.no_grad():
        results[name] = model(**batch).logits
        with model.disable_adapter():
            results[f"{name} off"] = model(**batch).logits
    try:
        model.merge_and_unload()
    except stompp_hf.errors.AdapterError:
        continue
    raise SystemExit("merged")
torch.save(results, f"{folder}/results.pt")
"""


def reloaded(folder: Path, jobs: dict[str, tuple[str, str, Any]]) -> dict[str, torch.Tensor]:
    """What another process computes from saved bases and adapters: {adapter: (auto class, base, batch)}."""
    torch.save(jobs, folder / "jobs.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(folder)], check=True, timeout=500)
    results: dict[str, torch.Tensor] = torch.load(folder / "results.pt")
    return results


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished checkpoints, "bert training", "bert packed", and so on."""
    folder = tmp_path_factory.mktemp("bases")
    for name, case in CASES.items():
        model = binarize_model(case.build(), quick(**OPTIONS[name]))
        train(model, case, 0, STEPS, STEPS)
        model.save_pretrained(folder / f"{name} training")
        pack_model(model).save_pretrained(folder / f"{name} packed")
    return folder


def load(folder: Path, name: str) -> Any:
    return CASES[name.split()[0]].auto.from_pretrained(folder / name)


def rows(name: str) -> list[dict[str, torch.Tensor]]:
    """Few examples, to be learnt by heart."""
    return [{key: value[row] for key, value in CASES[name].batch().items()} for row in range(4)]


def fit(model: Any, name: str, folder: Path, steps: int = 30, **options: Any) -> hf.Trainer:
    args = hf.TrainingArguments(
        str(folder), max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=4, use_cpu=True,
        disable_tqdm=True, report_to="none", logging_steps=1, **options,
    )  # fmt: skip
    return hf.Trainer(model, args, train_dataset=rows(name), callbacks=[StoMPPTrainerCallback()])


def test_trainer_trains_saves_and_another_process_reloads(bases: Path, tmp_path: Path) -> None:
    """Losses fall, nothing of the base changes, and base and adapter give the same logits bit for bit elsewhere."""
    expected, jobs = {}, {}
    for name in (f"{name} {kind}" for name in CASES for kind in FORMATS):
        short = name.split()[0]
        case, base = CASES[short], load(bases, name)
        batch, state = case.batch(77), copy.deepcopy(base.state_dict())
        alone = logits(base, batch)
        hf.set_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, **LORA[short]))
        layers = [m for m in model.modules() if isinstance(m, lora.LoraLayer)]
        kinds = {kind for kind in BINARY[short] for m in layers if isinstance(m.base_layer, kind)}
        assert kinds == BINARY[short] and get_plan(model).packed == name.endswith("packed")
        assert torch.equal(logits(model, batch), alone)  # B is zero: an adapter begins as nothing
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in n or "modules_to_save" in n for n in trained)

        trainer = fit(model, short, tmp_path / f"run {name}", save_strategy="no")
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        assert sum(losses[-4:]) < 0.97 * sum(losses[:4]), (name, losses)
        trainer.save_model(str(bases / f"adapter {name}"))
        assert not list((bases / f"adapter {name}").glob("model*"))  # the adapter, and nothing of the base
        after = {k.replace(".base_layer", "").replace(".original_module", ""): v for k, v in base.state_dict().items()}
        assert same_tensors({k: after[k] for k in state}, state) == []
        expected[f"adapter {name}"] = logits(model, batch)
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), alone)
        expected[f"adapter {name} off"] = alone
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        jobs[f"adapter {name}"] = (case.auto.__name__, name, inputs)
        assert not torch.equal(expected[f"adapter {name}"], alone)
    assert same_tensors(reloaded(bases, jobs), expected) == []
    for short in CASES:  # trained beside latents or bits: the same numbers
        assert torch.equal(expected[f"adapter {short} training"], expected[f"adapter {short} packed"])


def test_conv1d_is_taken_for_what_it_is(bases: Path) -> None:
    """GPT-2's layers are in x out: PEFT sees that, packed or not, and its adapter adds x A^T B^T."""
    for kind in FORMATS:
        model = get_peft_model(load(bases, f"gpt2 {kind}"), LoraConfig(r=2, target_modules=["c_attn"]))
        layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
        assert layer.fan_in_fan_out and (layer.in_features, layer.out_features) == (32, 96)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(up)
        x = torch.randn(5, 32)
        expected = layer.base_layer(x) + x @ down.t() @ up.t() * layer.scaling["default"]
        torch.testing.assert_close(layer(x), expected)


def test_resume_beside_a_finished_base(bases: Path, tmp_path: Path) -> None:
    """Trainer's checkpoints hold the adapter alone; the base is loaded as before, and the run goes on exactly."""
    for kind in FORMATS:
        finals = []
        for half in (False, True):
            hf.set_seed(0)
            model = get_peft_model(load(bases, f"bert {kind}"), LoraConfig(r=4, **LORA["bert"]))
            trainer = fit(model, "bert", tmp_path / kind, steps=8, save_steps=4)
            trainer.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-4") if half else None)
            finals.append(logits(model, CASES["bert"].batch(77)))
        assert torch.equal(*finals)


def test_several_adapters_and_unload(bases: Path, tmp_path: Path) -> None:
    batch = CASES["bert"].batch(77)
    for kind in FORMATS:
        base = load(bases, f"bert {kind}")
        alone = logits(base, batch)
        # A weak adapter moves what leaves its layer and, at times, no sign behind it: then no logit of so small a net.
        options = {"r": 2, "init_lora_weights": False, "lora_alpha": 64}
        model = get_peft_model(base, LoraConfig(**options, target_modules=["query"]), adapter_name="one")
        model.add_adapter("two", LoraConfig(**options, target_modules=["value", "word_embeddings"]))
        seen = []
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            seen.append(logits(model, batch))
        assert not torch.equal(*seen) and not any(torch.equal(one, alone) for one in seen)
        model.save_pretrained(tmp_path / kind)
        again = PeftModel.from_pretrained(load(bases, f"bert {kind}"), tmp_path / kind / "one", adapter_name="one")
        again.load_adapter(tmp_path / kind / "two", adapter_name="two")
        for adapter, expected in zip(("one", "two"), seen, strict=True):
            again.set_adapter(adapter)
            assert torch.equal(logits(again, batch), expected)
        unloaded = model.unload()
        assert unloaded is base and torch.equal(logits(base, batch), alone)
        base.save_pretrained(tmp_path / kind / "base")
        assert torch.equal(logits(CASES["bert"].auto.from_pretrained(tmp_path / kind / "base"), batch), alone)
