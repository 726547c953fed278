"""Scripts in the shape of transformers' own examples, with three lines added: they train, end binary, and reload.

The scripts in tests/scripts are as strangers have them: every line that names this library ends with `# n of 3`.
"""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import assert_binary
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast, Trainer, ViTImageProcessor

from stompp_hf.surgery.members import binary_layers

HERE = Path(__file__).parent
STEPS = 12
WORDS = [
    "the",
    "a",
    "cast",
    "plot",
    "film",
    "actor",
    "was",
    "very",
    "not",
    "dull",
    "great",
    "good",
    "and",
    "but",
    "what",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BERT |= {"vocab_size": len(WORDS) + len(SPECIAL), "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = {**BERT, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 1}  # of the checkpoint whose tokenizer alone is used
DISTILBERT = {**BERT, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT |= {"image_size": 32, "patch_size": 8}


def sentences(count: int, seed: int) -> list[str]:
    dice = np.random.default_rng(seed)
    return [" ".join(dice.choice(WORDS, 8)) for _ in range(count)]


def checkpoint(folder: Path, auto: str, model_type: str, options: dict[str, Any]) -> Path:
    """A plain model from config, with a tokenizer of whole words or an image processor."""
    torch.manual_seed(0)
    getattr(transformers, auto).from_config(AutoConfig.for_model(model_type, **options)).save_pretrained(folder)
    if auto.endswith("ImageClassification"):
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **{f"{name}_token": word for name, word in names.items()}
    ).save_pretrained(folder)
    return folder


def rows(folder: Path, labels: Callable[[str], Any] = lambda text: int("great" in text)) -> list[str]:
    for split, count in (("train", 64), ("validation", 16), ("test", 8)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence1", "sentence2", "label"])
            writer.writerows([a, a[::-1], labels(a)] for a in sentences(count, count))
    return [f"--{split}_file={folder / split}.csv" for split in ("train", "validation", "test")]


def grades(folder: Path) -> list[str]:
    return rows(folder, lambda text: len(text) / 50)


def text(folder: Path) -> list[str]:
    for split, count in (("train", 96), ("validation", 24)):
        (folder / f"{split}.txt").write_text("\n\n".join(sentences(count, count)))
    return [f"--{split}_file={folder / split}.txt" for split in ("train", "validation")]


def questions(folder: Path) -> list[str]:
    for split, count in (("train", 48), ("validation", 12)):
        data = []
        for index, context in enumerate(sentences(count, count)):
            answer = context.split()[index % 8]
            where = [match.start() for match in re.finditer(rf"\b{answer}\b", context)][:1]
            answers = {"text": [answer], "answer_start": where}
            data.append({"id": str(index), "question": "what was it", "context": context, "answers": answers})
        (folder / f"{split}.json").write_text(json.dumps({"data": data}))
    return [f"--{split}_file={folder / split}.json" for split in ("train", "validation")]


def images(folder: Path) -> list[str]:
    dice = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 6)):
        for label in ("cat", "dog"):
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = dice.integers(0, 256, (36, 36, 3), dtype=np.uint8) // (1 + (label == "dog"))
                Image.fromarray(pixels).save(place / f"{index}.png")
    return [f"--{split}_dir={folder / split}" for split in ("train", "validation")]


@dataclass(frozen=True)
class Run:
    """A script, what it starts from, and its options."""

    script: str
    auto: str
    model_type: str
    options: dict[str, Any]
    data: Callable[[Path], list[str]]
    words: tuple[str, ...] = ()
    scratch: bool = False


BEST = ("--load_best_model_at_end=True", "--eval_strategy=steps", "--eval_steps=4", "--save_strategy=steps")
FEW_WORDS = f"n_embd=32,n_layer=2,n_head=2,n_positions=64,vocab_size={len(WORDS) + len(SPECIAL)}"
KEEP = ("--remove_unused_columns=False",)
IMAGES = "AutoModelForImageClassification"
RUNS = {
    "glue": Run(
        "run_glue", "AutoModelForSequenceClassification", "bert", BERT, rows,
        (*BEST, "--metric_for_best_model=accuracy", "--do_predict"),
    ),
    "glue, regression": Run(
        "run_glue", "AutoModelForSequenceClassification", "electra", {**BERT, "embedding_size": 16}, grades,
        ("--gradient_accumulation_steps=2", "--pad_to_max_length=False", "--ignore_mismatched_sizes=True"),
    ),
    "clm": Run(
        "run_clm", "AutoModelForCausalLM", "llama", LLAMA, text, ("--block_size=16", "--activation_checkpointing=True")
    ),
    "clm from scratch": Run(
        "run_clm", "AutoModelForCausalLM", "gpt2", GPT2, text,
        ("--model_type=gpt2", f"--config_overrides={FEW_WORDS}", "--block_size=16"), scratch=True,
    ),
    "mlm": Run("run_mlm", "AutoModelForMaskedLM", "bert", BERT, text),
    "qa": Run(
        "run_qa", "AutoModelForQuestionAnswering", "distilbert", DISTILBERT, questions,
        ("--doc_stride=4", "--max_seq_length=16"),
    ),
    "resnet": Run("run_image_classification", IMAGES, "resnet", RESNET, images, (*KEEP, *BEST)),
    "vit": Run("run_image_classification", IMAGES, "vit", VIT, images, (*KEEP, "--optim=sgd")),
}  # fmt: skip

RELOAD = """
import sys, torch, transformers, stompp_hf
jobs, results = torch.load(sys.argv[1]), {}
for name, (auto, folder, batch) in jobs.items():
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    with torch.no_grad():
        results[name] = [value for value in model(**batch).values() if isinstance(value, torch.Tensor)]
torch.save(results, sys.argv[2])
"""


def reload_elsewhere(folder: Path, jobs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Outputs of saved models, computed by another process; a job is an Auto class, a folder and a batch."""
    torch.save(jobs, folder / "jobs.pt")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RELOAD, str(folder / "jobs.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


@dataclass(frozen=True)
class Done:
    """A script's output folder, a batch, and what the model gave on it in the process that trained it."""

    folder: Path
    batch: dict[str, Tensor]
    outputs: list[Tensor]


def batch_of(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, len(WORDS), (3, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run_script(name: str, folder: Path, start: Path, data: list[str], *more: str) -> Done:
    """Run a script in this process, as `python script.py ...` would, and check that its model ended binary."""
    run, out = RUNS[name], folder / "out"
    words = [f"--tokenizer_name={start}" if run.scratch else f"--model_name_or_path={start}", f"--output_dir={out}"]
    words += ["--do_train", "--do_eval", f"--max_steps={STEPS}", "--save_steps=4", "--learning_rate=1e-3"]
    words += ["--per_device_train_batch_size=4", "--use_cpu=True", "--report_to=none", "--disable_tqdm=True"]
    saved: list[Any] = []
    plain_save, argv = Trainer.save_model, sys.argv

    def save_model(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        plain_save(trainer, *args, **kwargs)
        saved[:] = [trainer.model]

    Trainer.save_model, sys.argv = save_model, [run.script, *words, *run.words, *data, *more]
    try:
        runpy.run_path(str(HERE / "scripts" / f"{run.script}.py"), run_name="__main__")
    finally:
        Trainer.save_model, sys.argv = plain_save, argv
    model = saved[0].eval()
    for layer in binary_layers(model).values():
        assert layer.stage_state == "frozen"
        assert_binary(layer)
    batch = batch_of(model)
    with torch.no_grad():
        outputs = [value for value in model(**batch).values() if isinstance(value, Tensor)]
    assert outputs and all(torch.isfinite(value).all() for value in outputs)
    return Done(out, batch, outputs)


def begin(name: str, folder: Path) -> tuple[Path, list[str]]:
    """What a run starts from, and its options that name data."""
    run = RUNS[name]
    return checkpoint(folder / "start", run.auto, run.model_type, run.options), run.data(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Every script, run to its end."""
    folders = {name: tmp_path_factory.mktemp(run.script) for name, run in RUNS.items()}
    return {name: run_script(name, folder, *begin(name, folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def reloaded(trained: dict[str, Done], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """What the saved models give in another process."""
    jobs = {name: (RUNS[name].auto, str(done.folder), done.batch) for name, done in trained.items()}
    return reload_elsewhere(tmp_path_factory.mktemp("reload"), jobs)


@pytest.mark.parametrize("name", RUNS)
def test_ends_binary_and_reloads_in_another_process(
    name: str, trained: dict[str, Done], reloaded: dict[str, list[Tensor]]
) -> None:
    here, there = trained[name].outputs, reloaded[name]
    assert len(here) == len(there) and all(map(torch.equal, here, there))


@pytest.mark.parametrize("name", ["glue, regression", "clm"])
def test_a_run_that_was_interrupted_ends_as_the_other_one(name: str, trained: dict[str, Done], tmp_path: Path) -> None:
    whole = trained[name]
    start, data = begin(name, tmp_path)
    again = run_script(name, tmp_path, start, data, f"--resume_from_checkpoint={whole.folder / 'checkpoint-4'}")
    assert all(map(torch.equal, again.outputs, whole.outputs))


@pytest.mark.parametrize("name", ["mlm", "vit"])
def test_its_own_output_is_a_checkpoint(name: str, trained: dict[str, Done], tmp_path: Path) -> None:
    """As any script's is: what is binary stays so, and what is real goes on learning."""
    _, data = begin(name, tmp_path)
    again = run_script(name, tmp_path, trained[name].folder, data)
    assert not all(map(torch.equal, again.outputs, trained[name].outputs))
    reload = getattr(transformers, RUNS[name].auto).from_pretrained(again.folder).eval()
    with torch.no_grad():
        found = [value for value in reload(**again.batch).values() if isinstance(value, Tensor)]
    assert all(map(torch.equal, found, again.outputs))


def test_three_lines_are_all_that_was_added() -> None:
    scripts = list((HERE / "scripts").glob("run_*.py"))
    assert {script.stem for script in scripts} == {run.script for run in RUNS.values()}
    for script in scripts:
        body = script.read_text().partition('"""\n\n')[2]
        lines = [line for line in body.splitlines() if re.search(r"stompp|binar", line, re.IGNORECASE)]
        assert [line[-8:] for line in lines] == ["# 1 of 3", "# 2 of 3", "# 3 of 3"], script
