"""The example scripts run as a user runs them: in a process of their own, on tiny data."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from launching import run_to_its_end
from transformers import AutoModelForSequenceClassification

from stompp_hf import Progression, binarize_model, calibrate, pack_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from glue_data import grammar_dataset, local_metrics, majority_share  # noqa: E402
from options import LoraArguments  # noqa: E402

TINY = [
    *("--grammar_train_samples", "96", "--grammar_eval_samples", "32", "--per_device_train_batch_size", "8"),
    *("--num_train_epochs", "1", "--refresh_rate", "1", "--disable_tqdm", "True"),
]
SENTENCE = "although the plot was dull , the cast was great"
TRAIN = f"""
import sys, torch
sys.path.insert(0, "examples")
import run_glue
path = sys.argv.pop(1)
class Recording(run_glue.Trainer):
    def save_model(self, *args, **kwargs):
        super().save_model(*args, **kwargs)
        inputs = self.processing_class({SENTENCE!r}, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        torch.save(self.model.eval()(**inputs).logits.detach(), path)
run_glue.Trainer = Recording
run_glue.main()
"""
RELOAD = f"""
import sys, torch, stompp_hf
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from stompp_hf.surgery.members import binary_layers
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
for layer in binary_layers(model).values():
    assert layer.stage_state == "frozen"
    sizes = layer.binary_weight().abs()
    assert torch.equal(sizes, sizes[:, :1].expand_as(sizes))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer({SENTENCE!r}, return_tensors="pt")
inputs.pop("token_type_ids", None)
torch.save(model(**inputs).logits.detach(), sys.argv[2])
"""

RELOAD_BOTH = f"""
import sys, torch, stompp_hf
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
inputs = AutoTokenizer.from_pretrained(sys.argv[2])({SENTENCE!r}, return_tensors="pt")
inputs.pop("token_type_ids", None)
torch.save(model(**inputs).logits.detach(), sys.argv[3])
"""


def run(*words: str, processes: int = 0) -> str:
    """Run a script with the repository's examples, through accelerate if on `processes`, and return what it printed."""
    command = [sys.executable]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if processes:
        command += ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu" if processes > 1 else "--cpu"]
        environment["ACCELERATE_USE_CPU"] = "true"
    result = run_to_its_end([*command, *words], cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_embedded_run_and_reload(tmp_path: Path) -> None:
    """The embedded run ends fully binary, and another process reloads it with bitwise equal logits."""
    out, trained, reloaded = (str(tmp_path / name) for name in ("run", "trained", "reloaded"))
    printed = run("-c", TRAIN, trained, "--output_dir", out, *TINY)
    assert "24 binary layers in 4 stages" in printed
    assert "fully binary (weights and activations)" in printed
    run("-c", RELOAD, out, reloaded)
    assert torch.equal(torch.load(trained), torch.load(reloaded))
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_samples"] == 32
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- 1-bit" in card and "import stompp_hf" in card and "24 layers, in 4 stages" in card


def test_adapter_beside_a_packed_base(tmp_path: Path) -> None:
    """The config file trains an adapter, and saves nothing else; base and adapter reload in another process."""
    base, out, trained, reloaded = (str(tmp_path / name) for name in ("base", "adapter", "trained", "reloaded"))
    tiny_bert(tmp_path / "base", labels=2)
    model = binarize_model(AutoModelForSequenceClassification.from_pretrained(base))
    with pytest.raises(ValueError, match="--lora_rank needs a finished binary base"):
        LoraArguments(lora_rank=2).adapted(model, finished=False)
    Progression(model, 1).step(1)
    calibrate(model, [{"input_ids": torch.arange(1, 17).reshape(2, 8)}])
    pack_model(model).save_pretrained(base)
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    words = ["examples/configs/glue_lora.yaml", "--model_name_or_path", base, "--output_dir", out, *TINY]
    printed = run("-c", TRAIN, trained, *words)
    assert "are packed, 8 a byte" in printed and f'PeftModel.from_pretrained(base, "{out}")' in printed
    assert not list((tmp_path / "adapter").rglob("model*.safetensors"))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    run("-c", RELOAD_BOTH, base, out, reloaded)
    assert torch.equal(torch.load(trained), torch.load(reloaded))


def test_launch_with_a_yaml_file_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {
        "output_dir": str(out), "grammar_train_samples": 96, "grammar_eval_samples": 32, "max_steps": 12,
        "per_device_train_batch_size": 8, "refresh_rate": 1, "save_strategy": "steps", "save_steps": 6,
        "frozen_gradient": "zero", "disable_tqdm": True,
    }  # fmt: skip
    path = tmp_path / "options.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in options.items()))
    whole = run("examples/run_glue.py", str(path), processes=1)
    (out / "checkpoint-12").rename(tmp_path / "later")
    path.write_text(path.read_text() + "\nresume_from_checkpoint: 'True'")
    assert run("examples/run_glue.py", str(path)).splitlines()[-1] == whole.splitlines()[-1]


def test_own_teacher_on_two_processes(tmp_path: Path) -> None:
    """DDP: the loss that the forward's hook makes is the one that both processes average, and the run ends binary."""
    words = ["--teacher", "own", "--start", "0.4", "--end", "0.8", "--logging_steps", "1", "--use_cpu", "True"]
    run("examples/run_glue.py", "--output_dir", str(tmp_path), *words, *TINY, processes=2)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    history = [record for record in state["log_history"] if "loss" in record]
    taught = [record for record in history if "stompp_hidden" in record]
    assert len(history) == 6 and 0 < len(taught) < 6 and taught == history[-len(taught) :]
    assert taught[0]["stompp_hidden"] == 0 < taught[-1]["stompp_hidden"]  # at first the teacher is the model itself
    assert history[-1]["stompp_frozen_fraction"] == 1 and (tmp_path / "_teacher" / "config.json").is_file()


def test_paper_preset(tmp_path: Path) -> None:
    run("examples/run_glue.py", "--output_dir", str(tmp_path), "--preset", "paper", "--stages", "4", *TINY)
    options = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config"]
    assert (options["weight_scale"], options["weight_clip"], options["stages"]) == ("none", 1.0, "4")
    assert options["learn_activation_scale"] is False


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_local_files(tmp_path: Path, kind: str) -> None:
    """Labels as words in a csv file; two sentences and a score in a parquet file; predictions for both."""
    words = [f"word{i}" for i in range(24)]
    if kind == "csv":
        data = Dataset.from_dict({"text": words, "label": ["no", "yes"] * 12})
        data.to_csv(tmp_path / "data.csv")
        extra, answers = [], {"no", "yes"}
    else:
        scores = [i / 5 for i in range(24)]
        data = Dataset.from_dict(
            {"sentence1": words, "sentence2": words[::-1], "label": scores, "idx": list(range(24))}
        )
        data.to_parquet(tmp_path / "data.parquet")
        extra, answers = ["--task_name", "stsb"], None
    tiny_bert(tmp_path / "model", labels=1 if kind == "parquet" else 2)
    file = str(tmp_path / f"data.{kind}")
    run(
        *("examples/run_glue.py", "--model_name_or_path", str(tmp_path / "model"), "--train_file", file),
        *("--validation_file", file, "--test_file", file, "--do_train", "--do_eval", "--do_predict"),
        *("--output_dir", str(tmp_path / "run"), *TINY, *extra),
    )
    name = "stsb" if kind == "parquet" else "text-classification"
    lines = (tmp_path / "run" / f"predict_results_{name}.txt").read_text().splitlines()
    assert len(lines) == 25
    if answers is not None:
        assert {line.split("\t")[1] for line in lines[1:]} <= answers
    else:
        assert "eval_pearson" in json.loads((tmp_path / "run" / "all_results.json").read_text())


def tiny_bert(path: Path, labels: int) -> None:
    """A checkpoint with a tokenizer."""
    from glue_data import train_tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = train_tokenizer([f"word{i}" for i in range(24)])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=labels,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def test_stopping_where_it_pays(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    printed = run("examples/run_glue.py", "--output_dir", out, *TINY, "--stop_drop", "0", "--stop_reference", "2")
    assert "with stage 1 accuracy" in printed and "undone: it stays real" in printed
    assert "1 of 4 stages frozen" not in printed
    printed = run("examples/run_glue.py", "--output_dir", out, *TINY, "--last_stage", "2")
    assert "1 of 4 stages frozen" in printed and "2 of 4 stages binary" in printed
    assert len(json.loads((tmp_path / "run" / "stages.json").read_text())["stages"]) == 3


def test_no_trainer(tmp_path: Path) -> None:
    words = ["--grammar_train_samples", "96", "--grammar_eval_samples", "32", "--refresh_rate", "1"]
    out = str(tmp_path / "run")
    run("examples/run_glue_no_trainer.py", "--output_dir", out, "--num_train_epochs", "1", *words, processes=1)
    run("-c", RELOAD, out, str(tmp_path / "logits"))


TRAINING_COST = ("examples/benchmarks/training_cost.py", "--shapes", "tiny", "--batch", "2", "--seq", "8")


def test_training_cost_benchmark() -> None:
    printed = run(
        *TRAINING_COST,
        *("--repeats", "1", "--run_points", "2", "--run_repeats", "1", "--bf16", "True", "--fractions", "0.5", "1"),
        *("--peaks", "False"),
    )
    assert "bfloat16" in printed and "| none frozen |" not in printed
    for method in ("plain", "vanilla STE", "StoMPP+STE", "StoMPP STE-free"):
        assert f"| all frozen | {method} |" in printed


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_training_cost_benchmark_tells_the_peak_of_a_method() -> None:
    assert float(run(*TRAINING_COST, "--method", "StoMPP+STE", "--step", "500")) > 0.0


def test_onnx_file_benchmark() -> None:
    printed = run("examples/benchmarks/onnx_file.py", "--shapes", "tiny", "--batch", "2", "--repeats", "1")
    for name in ("plain float32", "W1A1", "W1A1, binary embedding", "W1A32"):
        assert f"| {name} |" in printed


def test_metrics_cost_benchmark() -> None:
    printed = run(
        *("examples/benchmarks/metrics_cost.py", "--shapes", "tiny", "--batch", "2", "--seq", "8"),
        *("--repeats", "1", "--clip", "0.5"),
    )
    for kind in ("no metrics", "cheap, each step", "a record", "a sample"):
        assert f"| all frozen | {kind} |" in printed


@pytest.mark.parametrize("weights_only", ["False", "True"])
def test_inference_benchmark(weights_only: str) -> None:
    printed = run(
        *("examples/benchmarks/inference.py", "--models", "tiny-bert", "tiny-resnet", "--size", "32", "--seq", "8"),
        *("--repeats", "1", "--rows", "1", "--what", "blocks", "models", "--weights_only", weights_only),
    )
    for name in ("tiny-bert, 8 tokens", "tiny-bert, encoder.layer.1", "tiny-resnet, 32x32", "tiny-resnet, encoder"):
        assert f"| {name}" in printed


def test_attention_benchmarks() -> None:
    printed = run(
        *(
            "examples/benchmarks/attention.py",
            "--heads",
            "4",
            "--key_heads",
            "2",
            "--sizes",
            "8",
            "--queries",
            "1",
            "9",
        ),
        *("--causal", "True", "--repeats", "1"),
    )
    assert "| 1 to 2048, heads of 8 |" in printed and "| 9 to 9, heads of 8 |" in printed
    printed = run(
        *("examples/benchmarks/inference.py", "--models", "tiny-bert", "tiny-resnet", "--size", "32", "--seq", "8"),
        *("--repeats", "1", "--what", "models", "--attention", "True"),
    )
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| ")]
    assert "fused, real attention" in rows[0][7] and float(rows[1][7]) > 0 and not rows[2][7].strip()


def test_inference_benchmark_beside_other_libraries() -> None:
    printed = run(
        *("examples/benchmarks/inference.py", "--models", "tiny-bert", "--seq", "8", "--repeats", "1"),
        *("--what", "models", "--peers", "onnxruntime"),
    )
    titles, _, values = printed[printed.index("| | float32") :].strip().splitlines()[:3]
    cells = dict(zip(titles.split("|"), values.split("|"), strict=True))
    assert float(cells[" onnxruntime, ms "]) > 0 and float(cells[" onnxruntime int8, ms "]) > 0


def test_grammar_needs_more_than_a_bag_of_words() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    data = grammar_dataset(2000, 500)
    train, validation = data["train"], data["validation"]
    assert not set(train["sentence"]) & set(validation["sentence"])
    words = CountVectorizer().fit(train["sentence"])
    model = LogisticRegression(max_iter=500).fit(words.transform(train["sentence"]), train["label"])
    assert model.score(words.transform(validation["sentence"]), validation["label"]) < 0.75
    assert majority_share(validation["label"]) < 0.6


def test_local_metrics_by_hand() -> None:
    predictions, references = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0])
    true, false_positive, false_negative, true_negative = 2, 1, 1, 2
    assert local_metrics("mrpc", predictions, references) == {
        "accuracy": pytest.approx(4 / 6),
        "f1": pytest.approx(2 * true / (2 * true + false_positive + false_negative)),
    }
    matthews = (true * true_negative - false_positive * false_negative) / np.sqrt(3 * 3 * 3 * 3)
    assert local_metrics("cola", predictions, references) == {"matthews_correlation": pytest.approx(matthews)}
    scores, wanted = np.array([0.1, 2.0, 3.5, 4.0]), np.array([0.0, 2.5, 2.4, 5.0])
    result = local_metrics("stsb", scores, wanted)
    assert result["pearson"] == pytest.approx(np.corrcoef(scores, wanted)[0, 1])
    ranks = np.corrcoef(scores.argsort().argsort(), wanted.argsort().argsort())[0, 1]
    assert result["spearmanr"] == pytest.approx(ranks)
