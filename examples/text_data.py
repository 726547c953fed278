"""Text for the language-model example: a hub data set, text or table files, or the docstrings of Python's library."""

import ast
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

END = "<|endoftext|>"
SPLITS = ("train", "validation")


@dataclass
class DataArguments:
    """Where the text comes from. With none of these options: the docstrings of Python's standard library, offline."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Local txt, csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Part of the training rows, the first ones, to evaluate on if none are given."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the text: `text`, else the first one."})
    end_of_text: bool = field(
        default=False, metadata={"help": "Each row is a whole document: the tokenizer's end-of-text token follows it."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens a block; 1024, or what the model takes, if not given."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N evaluation blocks."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    docstring_characters: int = field(default=1_200_000, metadata={"help": "Size of the embedded text at most."})

    def __post_init__(self) -> None:
        kinds = {f.rsplit(".", 1)[-1] for f in (self.train_file, self.validation_file) if f}
        if kinds - {"txt", "csv", "json", "parquet"} or len(kinds) > 1:
            raise ValueError("--train_file and --validation_file must both be txt, or csv, or json, or parquet.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs --train_file beside it.")
        if self.dataset_name and self.train_file:
            raise ValueError("give --dataset_name or --train_file, not both.")

    @property
    def embedded(self) -> bool:
        """Whether the docstrings are used."""
        return self.dataset_name is None and self.train_file is None


# ---- the embedded text ----


def docstrings(characters: int, shortest: int = 200) -> list[str]:
    """Docstrings of this Python's standard library, each once, in the order of its files; short ones are left out."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found: dict[str, None] = {}
    size = 0
    for path in library_files():
        for node in ast.walk(ast.parse(path.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) >= shortest and text not in found:
                found[text] = None
                size += len(text)
        if size >= characters:
            break
    if not found:
        raise ValueError("this Python has no source files of its library to take docstrings from; give --train_file.")
    return list(found)


def library_files() -> Iterator[Path]:
    """Source files of Python's standard library, without tests and what was installed beside it."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - left_out)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Any:
    """A byte-level BPE tokenizer in GPT-2's way, trained on `texts`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END)


# ---- loading and packing ----


def load_text(args: DataArguments, cache_dir: str | None = None, token: str | None = None) -> DatasetDict:
    """The splits train and validation, with one column: text."""
    if args.embedded:
        texts = docstrings(args.docstring_characters)
        every = max(100 // args.validation_split_percentage, 2)  # spread: neighbours are of one module
        parts = [text for i, text in enumerate(texts) if i % every], texts[::every]
        return DatasetDict({name: Dataset.from_dict({"text": part}) for name, part in zip(SPLITS, parts, strict=True)})
    files = {"train": args.train_file, "validation": args.validation_file}
    files = {split: path for split, path in files.items() if path}
    if files:
        kind = files["train"].rsplit(".", 1)[-1]
        more = {"keep_linebreaks": True} if kind == "txt" else {}
        source: Any = {"path": "text" if kind == "txt" else kind, "data_files": files, **more}
    else:
        source = {"path": args.dataset_name, "name": args.dataset_config_name, "token": token}
    data = load_dataset(cache_dir=cache_dir, **source)
    if "validation" not in data:
        part = args.validation_split_percentage
        for split, rows in (("validation", f"train[:{part}%]"), ("train", f"train[{part}%:]")):
            data[split] = load_dataset(cache_dir=cache_dir, split=rows, **source)
    columns = data["train"].column_names
    column = args.text_column or ("text" if "text" in columns else columns[0])
    if column not in columns:
        raise ValueError(f"--text_column {column!r} is not there; the columns are {', '.join(columns)}.")
    picked = {split: data[split].select_columns(column) for split in SPLITS}
    return DatasetDict(
        picked if column == "text" else {s: part.rename_column(column, "text") for s, part in picked.items()}
    )


def prepare(data: DatasetDict, tokenizer: Any, args: DataArguments, longest: int) -> DatasetDict:
    """Tokenize, join, and cut into blocks of equal length; what is left over is dropped."""
    size = min(args.block_size or 1024, longest)
    end = tokenizer.eos_token if args.end_of_text else ""
    if end is None:
        raise ValueError("--end_of_text needs a tokenizer with an eos_token.")

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {"input_ids": tokenizer([text + end for text in rows["text"]], verbose=False)["input_ids"]}

    def pack(rows: dict[str, list[Any]]) -> dict[str, Any]:
        ids = list(chain(*rows["input_ids"]))
        blocks = [ids[i : i + size] for i in range(0, len(ids) // size * size, size)]
        return {"input_ids": blocks, "labels": blocks}

    workers = args.preprocessing_num_workers
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    packed = DatasetDict()
    for split, rows in data.items():
        ids = rows.map(encode, batched=True, remove_columns=["text"], num_proc=workers, desc=f"tokenizing {split}")
        part = ids.map(pack, batched=True, num_proc=workers, desc=f"packing {split}")
        if not len(part):
            raise ValueError(f"the {split} text is shorter than a block of {size} tokens; lower --block_size.")
        limit = limits[split]
        packed[split] = part if limit is None else part.select(range(min(limit, len(part))))
    return packed
