"""Text-classification data for the examples: GLUE by name, local files, or a small data set made from a grammar."""

import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

logger = logging.getLogger(__name__)

TASK_COLUMNS: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class DataArguments:
    """Where the examples come from. With none of these options: a data set made from a grammar, offline."""

    task_name: str | None = field(
        default=None, metadata={"help": f"GLUE task: one of {', '.join(TASK_COLUMNS)}; from the hub without files."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Local csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "Local file to predict."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens a sequence is cut to."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every sequence to max_seq_length."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N evaluation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first N test examples."})
    grammar_train_samples: int = field(default=8000, metadata={"help": "Training sentences made from the grammar."})
    grammar_eval_samples: int = field(default=1000, metadata={"help": "Evaluation sentences made from the grammar."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASK_COLUMNS:
                raise ValueError(f"--task_name {self.task_name!r} is unknown; choose one of {', '.join(TASK_COLUMNS)}.")
        files = [f for f in (self.train_file, self.validation_file, self.test_file) if f]
        kinds = {f.rsplit(".", 1)[-1] for f in files}
        if kinds - {"csv", "json", "parquet"} or len(kinds) > 1:
            raise ValueError("--train_file, --validation_file and --test_file must all be csv, or json, or parquet.")
        if files and not (self.train_file or self.validation_file):
            raise ValueError("--test_file needs --train_file or --validation_file beside it, for the labels' names.")

    @property
    def from_grammar(self) -> bool:
        """Whether the embedded data set is used."""
        return self.task_name is None and self.train_file is None and self.validation_file is None


# ---- the embedded data set ----

_SUBJECTS = "the plot,the acting,the film,the script,the music,the ending,the cast,the story,the camera,the dialogue"
_GOOD = "good,great,funny,clever,moving,brilliant,charming,fresh,sharp,delightful,warm,gripping"
_BAD = "bad,awful,dull,stupid,boring,terrible,clumsy,stale,flat,painful,cold,tedious"
_DEGREES = ",,very ,rather ,truly ,really "
_DENIALS = ("{s} was not {a}", "{s} was never {a}", "nobody would call {s} {a}", "i doubt that {s} was {a}")
_CLAIMS = ("{s} was {a}", "{s} seemed {a}", "everybody would call {s} {a}", "i think that {s} was {a}")
_CONTRASTS = ("{x} , but {y}", "although {x} , {y}", "{y} , although {x}", "{x} ; still , {y}")


def _clause(rng: random.Random, positive: bool) -> str:
    denied = rng.random() < 0.3
    word = rng.choice((_GOOD if positive != denied else _BAD).split(","))
    form = rng.choice(_DENIALS if denied else _CLAIMS)
    return form.format(s=rng.choice(_SUBJECTS.split(",")), a=rng.choice(_DEGREES.split(",")) + word)


def grammar_sentence(rng: random.Random) -> tuple[str, int]:
    """A sentence and its sentiment (1 is positive).

    A denial turns the word around in three of ten clauses, and in four of ten sentences a contrast sets a clause of
    the opposite sentiment beside the one that counts: a bag of words gets about two thirds right.
    """
    positive = rng.random() < 0.5
    main = _clause(rng, positive)
    if rng.random() < 0.6:
        return main, int(positive)
    return rng.choice(_CONTRASTS).format(x=_clause(rng, not positive), y=main), int(positive)


def grammar_dataset(train: int, validation: int, seed: int = 0) -> DatasetDict:
    """Two splits without a common sentence, columns sentence and label."""
    rng = random.Random(seed)
    pairs: dict[str, int] = {}
    while len(pairs) < train + validation:
        sentence, label = grammar_sentence(rng)
        pairs.setdefault(sentence, label)
    rows = list(pairs.items())

    def split(part: list[tuple[str, int]]) -> Dataset:
        sentences, labels = zip(*part, strict=True)
        data = Dataset.from_dict({"sentence": list(sentences), "label": list(labels)})
        return data.cast_column("label", ClassLabel(names=["negative", "positive"]))

    return DatasetDict(train=split(rows[:train]), validation=split(rows[train:]))


def train_tokenizer(texts: list[str], vocab_size: int = 400) -> Any:
    """A WordPiece tokenizer in BERT's layout, trained on `texts`."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    from tokenizers.processors import BertProcessing

    tokenizer._tokenizer.post_processor = BertProcessing(*ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=512,
    )


# ---- loading and preparing ----


@dataclass
class Task:
    """A data set with what is known of it."""

    data: DatasetDict
    columns: tuple[str, str | None]
    labels: list[str]
    is_regression: bool
    metrics: Callable[[Any, Any], dict[str, float]]
    name: str

    @property
    def main_metric(self) -> str:
        """The one that a model is judged by."""
        if self.is_regression:
            return "pearson" if self.name == "stsb" else "mse"
        return "matthews_correlation" if self.name == "cola" else "accuracy"


def load_task(args: DataArguments, cache_dir: str | None = None) -> Task:
    """Read the data that the arguments name; from files, columns other than the label are taken in order."""
    if args.from_grammar:
        data = grammar_dataset(args.grammar_train_samples, args.grammar_eval_samples)
    elif args.train_file or args.validation_file:
        named = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        files = {split: path for split, path in named.items() if path}
        kind = next(iter(files.values())).rsplit(".", 1)[-1]
        data = load_dataset(kind, data_files=files, cache_dir=cache_dir)
    else:
        data = load_dataset("nyu-mll/glue", args.task_name, cache_dir=cache_dir)
        if args.task_name == "mnli":
            data["validation"], data["test"] = data["validation_matched"], data["test_matched"]
    some = data["train"] if "train" in data else data["validation"]
    if "label" not in some.column_names:
        raise ValueError(f"the data has no column 'label'; its columns are {', '.join(some.column_names)}.")
    columns = TASK_COLUMNS.get(args.task_name or "")
    if columns is None:
        texts = [c for c in some.column_names if c not in ("label", "idx") and isinstance(some[0][c], str)]
        if not texts:
            raise ValueError(f"no column of text among {', '.join(some.column_names)}.")
        columns = (texts[0], texts[1] if len(texts) > 1 else None)
    real_valued = some.features["label"].dtype.startswith("float")
    is_regression = args.task_name == "stsb" or (args.task_name is None and real_valued)
    if is_regression:
        labels = ["score"]
    elif isinstance(some.features["label"], ClassLabel):
        labels = list(some.features["label"].names)
    else:
        labels = [str(label) for label in sorted(some.unique("label"))]
    metrics = metric_function(args.task_name, is_regression)
    return Task(data, columns, labels, is_regression, metrics, args.task_name or "text-classification")


def prepare(
    task: Task, tokenizer: Any, args: DataArguments, grown: Callable[[Dataset], Dataset] | None = None
) -> DatasetDict:
    """Tokenize every split, and give labels the numbers that the model uses; `grown` adds to the training examples."""
    if isinstance(task.data["train" if "train" in task.data else "validation"].features["label"], ClassLabel):
        numbers: dict[str, int] | None = None
    else:
        numbers = None if task.is_regression else {label: i for i, label in enumerate(task.labels)}

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        first, second = task.columns
        texts = (rows[first],) if second is None else (rows[first], rows[second])
        padding = "max_length" if args.pad_to_max_length else False
        result = tokenizer(*texts, padding=padding, max_length=args.max_seq_length, truncation=True)
        if "label" in rows:
            as_number = float if task.is_regression else (lambda x: x if numbers is None else numbers.get(str(x), -1))
            result["labels"] = [as_number(label) for label in rows["label"]]
        return dict(result)

    limits = {"train": args.max_train_samples, "test": args.max_predict_samples}
    encoded = DatasetDict()
    for split, rows in task.data.items():
        limit = limits.get(split, args.max_eval_samples)
        part = rows if limit is None else rows.select(range(min(limit, len(rows))))
        if grown is not None and split == "train":
            part = grown(part)
        encoded[split] = part.map(encode, batched=True, remove_columns=part.column_names, desc=f"tokenizing {split}")
    return encoded


# ---- metrics ----


def local_metrics(task_name: str | None, predictions: Any, references: Any) -> dict[str, float]:
    """GLUE's metrics from scikit-learn and scipy: the numbers that `evaluate` gives."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    predictions, references = np.asarray(predictions), np.asarray(references)
    if task_name == "stsb":
        return {
            "pearson": float(pearsonr(predictions, references)[0]),
            "spearmanr": float(spearmanr(predictions, references)[0]),
        }
    if task_name == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
    result = {"accuracy": float((predictions == references).mean())}
    if task_name in ("mrpc", "qqp"):
        result["f1"] = float(f1_score(y_true=references, y_pred=predictions))
    return result


def metric_function(task_name: str | None, is_regression: bool) -> Callable[[Any, Any], dict[str, float]]:
    """(predictions, references) -> metrics; through `evaluate` when it can load GLUE's, else locally."""
    if is_regression and task_name is None:
        return lambda p, r: {"mse": float(((np.asarray(p) - np.asarray(r)) ** 2).mean())}
    if task_name is not None:
        import evaluate

        try:
            metric = evaluate.load("glue", task_name)
            return lambda p, r: {k: float(v) for k, v in metric.compute(predictions=p, references=r).items()}
        except Exception as error:  # evaluate raises many kinds of errors when the hub is out of reach
            logger.info("evaluate.load('glue') failed (%s); metrics come from scikit-learn.", type(error).__name__)
    return lambda p, r: local_metrics(task_name, p, r)


def majority_share(labels: Any) -> float:
    """Accuracy of always answering the most frequent label."""
    ordered = sorted(labels)
    return max(len(list(group)) for _, group in itertools.groupby(ordered)) / len(ordered)
