"""The language-model example: its text, its packing, and runs of it as a user starts them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stompp_hf import get_plan, pack_model
from stompp_hf.surgery.members import binary_layers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmarks")]
import clm_memory  # noqa: E402
import run_clm as example  # noqa: E402
from text_data import END, DataArguments, docstrings, load_text, prepare, train_tokenizer  # noqa: E402

CONFIGS = ROOT / "examples" / "configs"
TINY = [
    *("--max_steps", "10", "--per_device_train_batch_size", "2", "--max_eval_samples", "8", "--refresh_rate", "1"),
    *("--disable_tqdm", "True"),
]
NARROW = ("--config_overrides", "hidden_size=32,intermediate_size=64,num_hidden_layers=2")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *words, *TINY])
    return example.main()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, and two text files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    texts = docstrings(20_000)
    (folder / "train.txt").write_text("\n".join(texts[2:]))
    (folder / "valid.txt").write_text("\n".join(texts[:2]))
    tokenizer = train_tokenizer(texts, vocab_size=300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_docstrings_are_each_there_once_and_take_the_size_asked_for() -> None:
    texts = docstrings(50_000)
    assert len(set(texts)) == len(texts) > 20 and min(map(len, texts)) >= 200
    assert 50_000 <= sum(map(len, texts)) < 150_000
    data = load_text(DataArguments(docstring_characters=50_000, validation_split_percentage=10))
    held_out = set(data["validation"]["text"])
    assert not held_out & set(data["train"]["text"]) and abs(len(held_out) - len(texts) / 10) <= 1


def test_blocks_are_the_text_in_order() -> None:
    rows = ["one two", "three", "four five six"] * 30
    tokenizer = train_tokenizer(rows, vocab_size=280)
    data = DatasetDict(train=Dataset.from_dict({"text": rows}), validation=Dataset.from_dict({"text": rows[:30]}))
    packed = prepare(data, tokenizer, DataArguments(block_size=16, end_of_text=True, max_eval_samples=1), 1000)
    assert {len(block) for block in packed["train"]["input_ids"]} == {16} and len(packed["validation"]) == 1
    assert packed["train"]["labels"] == packed["train"]["input_ids"]
    text = tokenizer.decode([token for block in packed["train"]["input_ids"] for token in block])
    whole = "".join(row + END for row in rows)
    assert whole.startswith(text) and len(whole) - len(text) < 16 * 13
    with pytest.raises(ValueError, match=r"lower --block_size"):
        prepare(data, tokenizer, DataArguments(block_size=4096), 5000)


@pytest.mark.parametrize("kind", ["hub", "json", "txt"])
def test_text_from_a_hub_data_set_and_from_files(tmp_path: Path, kind: str) -> None:
    """A tenth of the rows is held out where no other are given; of several columns one is the text."""
    rows = [f"line {i}" for i in range(40)]
    data = Dataset.from_dict({"number": list(range(40)), "story": rows})
    options: dict[str, Any] = {"validation_split_percentage": 10, "text_column": "story"}
    if kind == "hub":  # a folder is a data set as one on the hub
        data.to_parquet(tmp_path / "data" / "train.parquet")
        options["dataset_name"] = str(tmp_path / "data")
    elif kind == "json":
        data.to_json(tmp_path / "train.json")
        options["train_file"] = str(tmp_path / "train.json")
        with pytest.raises(ValueError, match="the columns are number, story"):
            load_text(DataArguments(**{**options, "text_column": "text"}), str(tmp_path / "cache"))
    else:
        (tmp_path / "train.txt").write_text("".join(f"{row}\n" for row in rows))
        rows = [f"{row}\n" for row in rows]
        options = {"validation_split_percentage": 10, "train_file": str(tmp_path / "train.txt")}
    data = load_text(DataArguments(**options), str(tmp_path / "cache"))
    assert data["validation"]["text"] == rows[:4] and data["train"]["text"] == rows[4:]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"train_file": "a.txt", "validation_file": "b.csv"}, "both be txt"),
        ({"validation_file": "b.csv"}, "needs --train_file"),
        ({"train_file": "a.txt", "dataset_name": "b"}, "not both"),
    ],
)
def test_sources_that_make_no_sense(options: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        DataArguments(**options)
    with pytest.raises(ValueError, match="--config_overrides is for a model from scratch"):
        example.parse(["--output_dir", "out", "--model_name_or_path", "model", *NARROW])


def test_embedded_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three ways from equal weights; the perplexity at each stage, a sample, and a model that reloads as it was."""
    results = run(monkeypatch, "--output_dir", str(tmp_path), "--docstring_characters", "20000", *NARROW)
    printed = capsys.readouterr().out
    assert (
        json.loads((tmp_path / "comparison.json").read_text()).keys()
        == results.keys()
        == {"full_precision", "w1a1", "w1a32"}
    )
    starts = [line for line in printed.splitlines() if line.startswith("  step      0:")]
    assert len({line.rsplit(" ", 1)[1] for line in starts}) == 1 and len(starts) == 3
    assert printed.count("1 of 2 stages frozen, perplexity") == 2 and printed.count("sample: ") == 3
    assert f"w1a32            {results['w1a32']['perplexity']:10.2f}" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "w1a32")
    assert {layer.stage_state for layer in binary_layers(model).values()} == {"frozen"}
    assert (
        get_plan(model).config.binarize == "weights" and len(AutoTokenizer.from_pretrained(tmp_path / "w1a32")) == 512
    )


@pytest.mark.parametrize("name", ["w1a32", "w1a1"])
def test_config_file_on_a_checkpoint_and_an_adapter(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The recipe freezes and teaches a checkpoint on text files; a LoRA adapter is trained beside the packed result."""
    files = ("--train_file", str(checkpoint / "train.txt"), "--validation_file", str(checkpoint / "valid.txt"))
    words = (
        str(CONFIGS / f"clm_{name}.yaml"),
        *files,
        "--teacher",
        "own",
        "--save_strategy",
        "no",
        "--logging_steps",
        "1",
    )
    out = tmp_path / "out"
    results = run(monkeypatch, *words, "--model_name_or_path", str(checkpoint), "--output_dir", str(out))
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    taught = [record for record in history if "stompp_logits" in record]
    assert len(taught) == 9 and taught[-1]["stompp_logits"] > 0 and taught[-1]["stompp_frozen_fraction"] == 1
    assert results["perplexity"] < 300
    model = AutoModelForCausalLM.from_pretrained(out)
    pack_model(model).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(out).save_pretrained(tmp_path / "packed")
    adapter = ("--model_name_or_path", str(tmp_path / "packed"), "--output_dir", str(tmp_path / "adapter"))
    run(monkeypatch, *files, *adapter, "--lora_rank", "2", "--do_train", "True", "--save_strategy", "no")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))


def test_full_precision_then_binary_taught_by_it(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full-precision run's folder is a plain checkpoint to the next run, and its teacher."""
    files = ("--train_file", str(checkpoint / "train.txt"), "--do_train", "--do_eval", "--save_strategy", "no")
    real, out = str(tmp_path / "real"), str(tmp_path / "out")
    first = ("--model_name_or_path", str(checkpoint), "--method", "full_precision", "--output_dir", real)
    run(monkeypatch, *files, *first)
    run(monkeypatch, *files, "--model_name_or_path", real, "--teacher", real, "--output_dir", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {layer.stage_state for layer in binary_layers(model).values()} == {"frozen"}


def test_memory_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every state takes its two steps; the table is made by processes of their own, here a single one."""
    args = clm_memory.BenchmarkArguments(tiny=True, seq=8)
    for state in clm_memory.STATES:
        assert clm_memory.measure(args, state)["seconds"] > 0
    monkeypatch.setattr(clm_memory, "STATES", (clm_memory.PLAIN,))
    monkeypatch.setattr(sys, "argv", ["clm_memory.py", "--tiny", "True", "--seq", "8"])
    clm_memory.main()
    assert "| plain |" in capsys.readouterr().out
