"""Variants of training examples by neighbours in the word embedding, and text without labels."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from test_examples import ROOT, tiny_bert
from torch import nn

sys.path.insert(0, str(ROOT / "examples"))
import run_glue
from augmentation import WORD, AugmentArguments, neighbours, unlabelled, varied, whole_words
from glue_data import DataArguments, grammar_dataset, load_task, prepare, train_tokenizer

TEXTS = list(grammar_dataset(400, 10)["train"]["sentence"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS)


@pytest.fixture
def embedding(tokenizer: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(len(tokenizer), 16)


def test_neighbours_are_those_of_a_plain_loop(tokenizer: Any, embedding: nn.Embedding) -> None:
    near = neighbours(TEXTS[:50], tokenizer, embedding, 3)
    vocabulary = tokenizer.get_vocab()
    whole = {w: n for w, n in vocabulary.items() if WORD.fullmatch(w) and n not in tokenizer.all_special_ids}
    assert {"plot", "great"} <= near.keys() <= whole.keys()
    weight = embedding.weight.detach()
    for word, found in near.items():
        others = [w for w in whole if w != word]
        cosines = {w: float(torch.cosine_similarity(weight[whole[word]], weight[whole[w]], dim=0)) for w in others}
        assert found == sorted(others, key=cosines.__getitem__, reverse=True)[:3]


def test_only_single_tokens_are_words(tokenizer: Any) -> None:
    found = whole_words(["plot", "zzqqzz"], tokenizer)
    assert found == {"plot": tokenizer.get_vocab()["plot"]} and whole_words([], tokenizer) == {}


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.5, 2), (1.0, 4)])
def test_a_variant_replaces_a_share_of_the_words_and_nothing_else(share: float, expected: int) -> None:
    row = {"a": "The plot, was great!", "b": "plot2 was_x", "label": 1}
    near = {"plot": ["PLOT"], "was": ["WAS"], "great": ["GREAT"]}
    columns, options = ["a", "b"], {"near": near, "share": share, "draw": "0/1"}
    assert sum(word in near for name in columns for word in WORD.findall(row[name])) == 5
    seen = set()
    for index in range(60):
        new = varied(row, index, columns, **options)
        assert new == varied(row, index, columns, **options)  # the same draw for the same place
        assert {name: new[name].lower() for name in columns} == {name: row[name].lower() for name in columns}
        changed = sum(word in ("PLOT", "WAS", "GREAT") for name in columns for word in WORD.findall(new[name]))
        assert changed == (5 if share == 1.0 else expected)
        seen.add(tuple(new.values()))
    assert len(seen) == (1 if share == 1.0 else 5 if expected == 1 else 10)
    assert varied({"a": "42 ..."}, 0, ["a"], **options) == {"a": "42 ..."}


def test_examples_come_first_and_variants_keep_labels(tokenizer: Any, embedding: nn.Embedding) -> None:
    train = grammar_dataset(40, 10)["train"]
    more = AugmentArguments(augment=2).grown(train, ["sentence"], tokenizer, embedding, seed=3)
    assert len(more) == 120 and more.features == train.features
    assert more[:40] == train[:40]
    assert more["label"] == [*train["label"]] * 3
    first, second = more[40:80]["sentence"], more[80:]["sentence"]
    assert all(a != b for a, b in zip(first, train["sentence"], strict=True))
    assert first != second
    fewer = AugmentArguments(augment=1).grown(train.select(range(5)), ["sentence"], tokenizer, embedding, seed=3)
    assert len(fewer) == 10
    assert AugmentArguments().grown(train, ["sentence"], tokenizer, embedding, seed=3) is train


def test_text_without_labels_is_added_to_the_training_examples_alone(
    tokenizer: Any, embedding: nn.Embedding, tmp_path: Path
) -> None:
    path = str(tmp_path / "more.json")
    Dataset.from_dict({"extra": [1, 2], "sentence": ["the plot", "a cast"]}).to_json(path)
    data_args = DataArguments(grammar_train_samples=30, grammar_eval_samples=10, max_train_samples=20)
    task = load_task(data_args)
    args = AugmentArguments(unlabelled_file=path, augment=1)
    data = prepare(task, tokenizer, data_args, lambda train: args.grown(train, ["sentence"], tokenizer, embedding, 0))
    assert len(data["train"]) == 2 * (20 + 2) and len(data["validation"]) == 10
    assert data["train"][20]["input_ids"] == tokenizer("the plot")["input_ids"]
    pairs = Dataset.from_dict({"a": ["x"], "b": ["y"], "label": [0]}).cast_column("label", ClassLabel(names=["n", "y"]))
    with pytest.raises(ValueError, match=r"has no column a, b; its columns are extra, sentence"):
        unlabelled(path, pairs, ["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlabelled_file": "x.json"}, "--unlabelled_file has no labels"),
        ({"augment": -1}, "--augment -1"),
        ({"augment": 1, "augment_share": 0.0}, "a share above 0"),
        ({"augment": 1, "augment_neighbours": 0}, "at least one neighbour"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentArguments(**options).check_augmentation(None, 0.0)
    AugmentArguments(unlabelled_file="x.json").check_augmentation("runs/real", 0.0)
    for teacher, weight in (("own", 0.0), ("runs/real", 1.0)):
        with pytest.raises(ValueError, match="--task_weight 0"):
            AugmentArguments(unlabelled_file="x.json").check_augmentation(teacher, weight)


def test_run_glue_trains_on_the_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = str(tmp_path / "more.json")
    Dataset.from_dict({"sentence": ["the plot was dull", "the cast was great"]}).to_json(more)
    words = ["--grammar_train_samples", "30", "--grammar_eval_samples", "10", "--per_device_train_batch_size", "16"]
    words += ["--num_train_epochs", "2", "--refresh_rate", "1", "--disable_tqdm", "True", "--use_cpu", "True"]
    base = str(tmp_path / "base")
    tiny_bert(tmp_path / "base", labels=2)
    words += ["--model_name_or_path", base, "--teacher", base, "--task_weight", "0", "--do_train", "--do_eval"]
    words += ["--augment", "1", "--unlabelled_file", more]
    monkeypatch.setattr(sys, "argv", ["run_glue.py", "--output_dir", str(tmp_path / "run"), *words])
    seen: list[int] = []

    class Recording(run_glue.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seen.extend([len(kwargs["train_dataset"]), len(kwargs["eval_dataset"])])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run_glue, "Trainer", Recording)
    assert "eval_accuracy" in run_glue.main()
    assert seen == [64, 10]
