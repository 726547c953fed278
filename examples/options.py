"""Options of the examples: files first, then the command line; those that both share; and the record of a run."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import transformers
import yaml
from transformers import Trainer, TrainingArguments

from stompp_hf import (
    DistillationCallback,
    GradientNormCallback,
    StoMPPConfig,
    get_plan,
    last_whole_checkpoint,
    record_run,
    restore_model,
)
from stompp_hf.errors import NotBinarizedError


def as_words(path: str) -> list[str]:
    """The options of a .json or .yaml file, as they would be written on the command line."""
    with open(path, encoding="utf-8") as file:
        options = json.load(file) if path.endswith(".json") else yaml.safe_load(file)
    words: list[str] = []
    for key, value in (options or {}).items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{key}", *map(str, values)]
    return words


@dataclass
class Words:
    """The words of a command line, with its files' options in front, and what they name."""

    words: list[str]
    given: set[str]
    preset: str | None


def read_words(words: Iterable[str]) -> Words:
    """Any number of .json and .yaml files, then options; what comes later wins."""
    rest = list(words)
    files = list(itertools.takewhile(lambda word: word.endswith((".json", ".yaml", ".yml")), rest))
    rest = [word for path in files for word in as_words(path)] + rest[len(files) :]
    split = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = {word[2:] for word in split if word.startswith("--")}
    presets = [value for name, value in itertools.pairwise(split) if name == "--preset"]
    return Words(rest, given, presets[-1] if presets else None)


def config_of(method: str, stompp: StoMPPConfig) -> StoMPPConfig:
    """The options of `--method`: StoMPP's own, or a baseline with the same ones."""
    if method == "vanilla_ste":
        return stompp.as_vanilla_ste()
    return stompp.as_full_precision() if method == "full_precision" else stompp


def is_binarized(model: Any) -> bool:
    """Whether the checkpoint came with binary layers."""
    try:
        get_plan(model)
    except NotBinarizedError:
        return False
    return True


def plain_again(model: Any) -> Any:
    """The model without the plan of a run of `--method full_precision`: a plain model on the same code path."""
    if is_binarized(model) and get_plan(model).config.binarize == "nothing":
        restore_model(model)
    return model


def resumed_from(args: TrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint` names; the last whole one for True."""
    folder: Any = args.resume_from_checkpoint
    return last_whole_checkpoint(args.output_dir) if folder in (True, "True", "true") else folder


def set_up_logging(args: TrainingArguments) -> None:
    """Python's logging at Trainer's levels; stompp_hf speaks on the first process only."""
    level = args.get_process_log_level()
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=level)
    logging.getLogger("stompp_hf").setLevel(logging.INFO if args.local_rank in (-1, 0) else logging.ERROR)
    transformers.utils.logging.set_verbosity(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)


@dataclass
class HubArguments:
    """How everything is fetched."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Hub token."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the hub."})

    @property
    def hub(self) -> dict[str, Any]:
        """What every from_pretrained takes."""
        return {
            "cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }  # fmt: skip


@dataclass
class MethodArguments:
    """Which method trains the model."""

    method: str = field(
        default="stompp",
        metadata={
            "help": "stompp; or a baseline of the same options: vanilla_ste (frozen from step 0), full_precision.",
            "choices": ["stompp", "vanilla_ste", "full_precision"],
        },
    )


def publish(trainer: Trainer, card: dict[str, Any]) -> None:
    """Push what was trained, if that was asked for; else write its card beside it."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    elif trainer.args.do_train:
        trainer.create_model_card(**card)


@dataclass
class TeacherArguments:
    """Who teaches the model while it freezes, and how much."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Distil while freezing: `own` (the model itself as it stands when the first stage's window opens; "
            "give it time with --start), or the path or hub name of a fine-tuned model of the same kind."
        },
    )
    teacher_logits: float = field(default=1.0, metadata={"help": "Weight of the teacher's predictions."})
    teacher_hidden: float = field(default=1.0, metadata={"help": "Weight of the teacher's hidden states."})
    teacher_relations: float = field(
        default=0.0, metadata={"help": "Weight of the teacher's attention relations (MiniLM's, of q, k and v)."}
    )
    teacher_embeddings: bool = field(
        default=False, metadata={"help": "Whether what enters the first block is one of the hidden states."}
    )
    teacher_temperature: float = field(default=1.0, metadata={"help": "Temperature of the predictions."})
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the labels' loss beside a teacher's."})

    def add_to(self, trainer: Trainer, method: str) -> None:
        """Give the trainer's model its teacher, if one was asked for and anything is to be binary."""
        if self.teacher is not None and method != "full_precision":
            callback = DistillationCallback(
                None if self.teacher == "own" else self.teacher,
                logits=self.teacher_logits,
                hidden=self.teacher_hidden,
                task=self.task_weight,
                temperature=self.teacher_temperature,
                relations=self.teacher_relations,
                embeddings=self.teacher_embeddings,
            )
            trainer.add_callback(callback)


@dataclass
class LoraArguments:
    """A small real-valued adapter beside a finished 1-bit base."""

    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train a LoRA adapter of this rank, and the head; the base, a finished binary or packed checkpoint "
            "in --model_name_or_path, stays as it is. Only the adapter is saved."
        },
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "The adapter is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Ends of the names of layers that get an adapter; PEFT's choice if not given."},
    )

    def adapted(self, model: Any, finished: bool, task: str = "SEQ_CLS") -> Any:
        """The model inside PEFT's wrapper; `finished` says whether every stage of the base is frozen."""
        if not finished:
            raise ValueError(
                "--lora_rank needs a finished binary base: train one with this script first (without --lora_rank), and "
                "give its folder, or that of `python -m stompp_hf pack`, as --model_name_or_path."
            )
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError('--lora_rank needs PEFT: pip install -e ".[peft]"') from error
        options = {"r": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        return get_peft_model(model, LoraConfig(task_type=task, target_modules=self.lora_target_modules, **options))


@dataclass
class RecordArguments:
    """What a run writes down about itself, for `python -m stompp_hf report`."""

    gradient_norms_every: int = field(
        default=0,
        metadata={"help": "Log the gradient norm of every stage, from a look every this many steps; 0: never."},
    )

    def record(self, trainer: Trainer, *options: Any) -> None:
        """Write run.json (command, versions, options that are not at their default), and log what was asked for."""
        if self.gradient_norms_every:
            trainer.add_callback(GradientNormCallback(self.gradient_norms_every))
        if trainer.is_world_process_zero():
            changed = {name: value for group in options for name, value in not_default(group).items()}
            record_run(trainer.args.output_dir, changed)


def not_default(options: Any) -> dict[str, Any]:
    """The plain values among a dataclass's fields that are not the default."""
    return {
        option.name: getattr(options, option.name)
        for option in dataclasses.fields(options)
        if isinstance(getattr(options, option.name), (bool, int, float, str))
        and getattr(options, option.name) != option.default
    }  # fmt: skip
