"""More text to learn from, without another network: words replaced by their neighbours, and text without labels."""

import itertools
import random
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from torch import Tensor, nn
from torch.nn.functional import normalize

WORD = re.compile(r"[^\W\d_]+")


@dataclass
class AugmentArguments:
    """What is added to the training examples."""

    augment: int = field(
        default=0,
        metadata={
            "help": "Add N variants of each training example, in which words are replaced by neighbours in the "
            "checkpoint's own word embedding. They keep the example's label, which may no longer be right: with a "
            "teacher and --task_weight 0 nobody reads it."
        },
    )
    augment_share: float = field(default=0.4, metadata={"help": "Share of the words that a variant replaces."})
    augment_neighbours: int = field(default=10, metadata={"help": "Among how many neighbours a word is drawn."})
    unlabelled_file: str | None = field(
        default=None,
        metadata={
            "help": "Local csv, json or parquet file with more text in columns of the same names, for a teacher alone "
            "to judge: needs --teacher and --task_weight 0."
        },
    )

    def check_augmentation(self, teacher: str | None, task_weight: float) -> None:
        """Raise ValueError for options that do not go together."""
        if self.augment < 0 or self.augment_neighbours < 1 or not 0.0 < self.augment_share <= 1.0:
            raise ValueError(
                f"--augment {self.augment} --augment_share {self.augment_share} --augment_neighbours "
                f"{self.augment_neighbours}: a number of variants, a share above 0 and up to 1, at least one neighbour."
            )
        if self.unlabelled_file and (teacher in (None, "own") or task_weight != 0.0):  # own: first trained on labels
            raise ValueError("--unlabelled_file has no labels: add --teacher FINE_TUNED_MODEL and --task_weight 0.")

    def grown(self, train: Dataset, columns: list[str], tokenizer: Any, embedding: nn.Module, seed: int) -> Dataset:
        """The training examples, then text without labels, then the variants of both.

        Args:
            train: with the columns of text, and label.
            columns: of text.
            tokenizer: of the checkpoint.
            embedding: its word embedding.
            seed: of the draws; an example's variants are the same however many examples there are.
        """
        if self.unlabelled_file:
            train = concatenate_datasets([train, unlabelled(self.unlabelled_file, train, columns)])
        if not self.augment:
            return train
        texts = [text for column in columns for text in train[column]]
        near = neighbours(texts, tokenizer, embedding, self.augment_neighbours)
        variants = [
            train.map(
                varied, with_indices=True, desc=f"variant {number}",
                fn_kwargs={"columns": columns, "near": near, "share": self.augment_share, "draw": f"{seed}/{number}"},
            )
            for number in range(1, self.augment + 1)
        ]  # fmt: skip
        return concatenate_datasets([train, *variants])


def unlabelled(path: str, like: Dataset, columns: list[str]) -> Dataset:
    """The columns of text of a file, with labels that mean nothing, in the form of another data set."""
    rows: Any = load_dataset(path.rsplit(".", 1)[-1], data_files=path, split="train")
    if missing := [name for name in columns if name not in rows.column_names]:
        raise ValueError(
            f"--unlabelled_file {path} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(rows.column_names)}."
        )
    rows = rows.select_columns(columns)
    for name in like.column_names:
        if name not in columns:
            rows = rows.add_column(name, [like[0][name]] * len(rows))
    return rows.select_columns(like.column_names).cast(like.features)


def whole_words(words: list[str], tokenizer: Any) -> dict[str, int]:
    """The token of each word that is a single one, inside a sentence."""
    if not words:
        return {}
    found = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    return {w: ids[0] for w, ids in zip(words, found, strict=True) if len(ids) == 1 and ids[0] != unknown}


@torch.no_grad()
def neighbours(texts: list[str], tokenizer: Any, embedding: nn.Module, count: int) -> dict[str, list[str]]:
    """For each word of the texts that is a single token, the words with the largest cosine to it, the nearest first."""
    special = set(tokenizer.all_special_ids)
    decoded = {number: tokenizer.decode([number]).strip() for number in sorted(tokenizer.get_vocab().values())}
    candidates = [text for number, text in decoded.items() if number not in special and WORD.fullmatch(text)]
    words = {number: word for word, number in whole_words(list(dict.fromkeys(candidates)), tokenizer).items()}
    numbers = torch.tensor(list(words), dtype=torch.long)
    own = whole_words(sorted({word for text in texts for word in WORD.findall(text)}), tokenizer)
    table = directions(embedding, numbers).T
    near: dict[str, list[str]] = {}
    for part in torch.tensor(sorted(set(own.values())), dtype=torch.long).split(2048):
        closest = (directions(embedding, part) @ table).topk(min(count + 1, table.shape[1])).indices
        for number, row in zip(part.tolist(), numbers[closest].tolist(), strict=True):
            near[number] = [words[other] for other in row if other != number][:count]  # type: ignore[index]
    return {word: near[number] for word, number in own.items() if near[number]}  # type: ignore[index]


def directions(embedding: nn.Module, numbers: Tensor) -> Tensor:
    """The embeddings of tokens at length 1, (tokens, features)."""
    place = next(itertools.chain(embedding.parameters(), embedding.buffers())).device
    return normalize(embedding(numbers.to(place)).float().cpu(), dim=-1)


def varied(
    row: dict[str, Any], index: int, columns: list[str], near: dict[str, list[str]], share: float, draw: str
) -> dict[str, Any]:
    """A row with a share of its words replaced, one at least where any can be."""
    rng = random.Random(f"{draw}/{index}")
    places = [(name, place) for name in columns for place, word in enumerate(WORD.findall(row[name])) if word in near]
    count = max(1, round(share * len(places)))
    chosen = set(rng.sample(places, min(count, len(places))))

    def replaced(name: str) -> str:
        words = iter(enumerate(WORD.findall(row[name])))

        def other(match: re.Match[str]) -> str:
            place, word = next(words)
            return rng.choice(near[word]) if (name, place) in chosen else word

        return WORD.sub(other, row[name])

    return {name: replaced(name) for name in columns}
