"""The text grid: what one cell is, the methods, and the presets; each cell is one run of examples/run_glue.py."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

OWN = {"teacher": "own", "start": 0.2, "end": 0.35, "pending_lr": 0.1, "refresh_rate": 20}
"""A fifth of the run fine-tunes in full precision; the model as it then stands teaches the rest."""
FINE_TUNED = "full_precision"
"""As a teacher or a checkpoint: the full-precision cell of the same task, depth and seed, which then runs first."""
TAUGHT = {"teacher": FINE_TUNED, "model_name_or_path": FINE_TUNED}
"""Two runs: the first fine-tunes in full precision; the second starts from it, and is taught by it from step 0."""
METHODS: dict[str, dict[str, Any]] = {
    "full_precision": {"method": "full_precision"},
    "vanilla_identity": {"method": "vanilla_ste", "frozen_gradient": "ste"},
    "vanilla_ste": {"method": "vanilla_ste"},
    "stompp": {"frozen_gradient": "zero", "end": 0.8},
    "stompp_identity": {"frozen_gradient": "ste", "end": 0.25, "pending_lr": 0.1},
    "stompp_ste": {"end": 0.25, "pending_lr": 0.1},
    "stompp_distilled": {**OWN, "frozen_gradient": "zero", "end": 0.8},
    # All layers at once, at the moment when the first stage of the others begins: STE with the same teacher.
    "one_shot_distilled": {**OWN, "end": OWN["start"]},
    "stompp_ste_distilled": OWN,
    "vanilla_taught": {**TAUGHT, "method": "vanilla_ste"},
    "stompp_taught": {**TAUGHT, "frozen_gradient": "zero", "end": 0.8, "pending_lr": 0.1},
    "stompp_ste_taught": {**TAUGHT, "end": 0.25, "pending_lr": 0.1, "refresh_rate": 20},
}
"""run_glue.py's options for each method; what is not named is the library's default."""
PAPER: dict[str, dict[str, Any]] = {
    "vanilla_ste": {"preset": "paper", "method": "vanilla_ste"},
    "stompp": {"preset": "paper"},
    "stompp_ste": {"preset": "paper", "frozen_gradient": "ste"},
}
"""The same under the paper's rule: plain signs, identity surrogate, module by module over the whole run."""
PAIRS: dict[str, dict[str, Any]] = {
    "full_precision": {"method": "full_precision", "max_steps": -1},  # the recipe's epochs
    "vanilla_taught": {**METHODS["vanilla_taught"], "teacher_hidden": 10.0},
    "stompp_ste_taught": {**METHODS["stompp_ste_taught"], "teacher_hidden": 10.0},
}
"""For sentence pairs: a short run in full precision, then a long one, taught by its hidden states above all."""
ALONE = {"task_weight": 0.0, "teacher_logits": 0.0}
"""Nothing but the teacher's hidden states."""
SMALL: dict[str, dict[str, Any]] = {
    "full_precision": {
        "method": "full_precision", "num_train_epochs": 4, "per_device_train_batch_size": 16,
        "freeze_embeddings": False,
    },
    "vanilla_taught": {**METHODS["vanilla_taught"], **ALONE},
    "stompp_ste_taught": {**METHODS["stompp_ste_taught"], **ALONE},
}  # fmt: skip
"""For small tasks: hidden states alone, in small batches and many steps."""
SCRIPT = {"binary_lr": None, "refresh_rate": None, "freeze_embeddings": False, "warmup_steps": 0, "weight_decay": 0.0}
"""A user's script as it was: Trainer's own settings, and nothing of StoMPPConfig."""
SCRIPTS: dict[str, dict[str, Any]] = {
    "full_precision": {**SCRIPT, "method": "full_precision"},
    "vanilla_ste": {**SCRIPT, "method": "vanilla_ste"},
    "stompp_ste": SCRIPT,
}
RULES = {"default": METHODS, "paper": PAPER, "pairs": PAIRS, "small": SMALL, "script": SCRIPTS}
LABELS = {
    "full_precision": "full precision",
    "vanilla_identity": "vanilla STE, identity surrogate",
    "vanilla_ste": "vanilla STE, windowed",
    "stompp": "StoMPP (STE-free)",
    "stompp_identity": "StoMPP+STE, identity surrogate",
    "stompp_ste": "StoMPP+STE, windowed",
    "stompp_distilled": "StoMPP (STE-free), own teacher",
    "one_shot_distilled": "windowed STE from a fifth of the run on, own teacher",
    "stompp_ste_distilled": "StoMPP+STE, windowed, own teacher",
    "vanilla_taught": "vanilla STE, windowed, from its fine-tuned teacher",
    "stompp_taught": "StoMPP (STE-free), from its fine-tuned teacher",
    "stompp_ste_taught": "StoMPP+STE, windowed, from its fine-tuned teacher",
}
RIVALS = {
    "stompp_identity": "vanilla_identity",
    "stompp_taught": "vanilla_taught", "stompp_ste_taught": "vanilla_taught",
}  # fmt: skip
"""The vanilla STE that a method is compared with, where it is not the windowed one without a teacher."""
MEASURED_WITH = {"binary_lr": 1.0, "refresh_rate": 100}
"""Options that follow the run where they are not given; the records were made with these."""
METRICS = {"sst2": "accuracy", "mrpc": "combined_score", "stsb": "pearson"}
"""What is compared; `combined_score` is the mean of accuracy and F1."""


@dataclass(frozen=True)
class TextCell:
    """One fine-tuning run. Cells of one seed see the same examples in the same order."""

    task: str
    method: str
    lr: float
    seed: int = 0
    layers: int = 0  # of the encoder; 0: the checkpoint's
    rule: str = "default"  # or another of RULES
    part: str = ""  # "real NAME": all but this part is binary; "binary NAME": this part alone; NAME is one of `parts`

    @property
    def group(self) -> str:
        """The id without the seed."""
        words = [self.task, self.method, f"lr{self.lr:g}"]
        words += [f"layers{self.layers}"] if self.layers else []
        words += [] if self.rule == "default" else [self.rule]
        return "-".join(words + ([self.part.replace(" ", "_")] if self.part else []))

    @property
    def id(self) -> str:
        """A stable, readable name."""
        return f"{self.group}-s{self.seed}"

    @property
    def label(self) -> str:
        """The method in words."""
        words = LABELS[self.method]
        return words.replace("windowed", "identity surrogate") if self.rule == "paper" else words

    @property
    def fine_tuned(self) -> "TextCell | None":
        """The full-precision cell whose weights this one needs."""
        needs = FINE_TUNED in (self.options().get("teacher"), self.options().get("model_name_or_path"))
        return replace(self, method=FINE_TUNED, lr=BEST[FINE_TUNED], part="") if needs else None

    def options(self) -> dict[str, Any]:
        """run_glue.py's options of this cell alone."""
        own = {"task_name": self.task, "learning_rate": self.lr, "seed": self.seed, "mask_seed": self.seed}
        return {**MEASURED_WITH, **RULES[self.rule][self.method], **own}


@dataclass(frozen=True)
class TextRecipe:
    """What all cells of a preset share."""

    train_samples: int  # the first of the training set; 0 takes all
    epochs: int
    batch: int = 32
    max_seq_length: int = 128
    max_steps: int = 0  # in place of epochs
    max_grad_norm: float = 0.0  # 0: gradients are not clipped

    def options(self) -> dict[str, Any]:
        """run_glue.py's options of the recipe."""
        limit = {"max_train_samples": self.train_samples} if self.train_samples else {}
        limit |= {"max_steps": self.max_steps} if self.max_steps else {}
        return {
            **limit, "num_train_epochs": self.epochs, "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": 64, "max_seq_length": self.max_seq_length, "do_train": True, "do_eval": True,
            "freeze_embeddings": True, "train_sampling_strategy": "group_by_length",
            "max_grad_norm": self.max_grad_norm,
            "weight_decay": 0.01, "warmup_steps": 0.1, "save_strategy": "no", "evaluate_stages": False,
            "logging_steps": 50, "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip


@dataclass(frozen=True)
class TextPreset:
    """A recipe and its cells."""

    recipe: TextRecipe
    cells: list[TextCell]


def product(**axes: Iterable[Any]) -> list[TextCell]:
    """Cells over the product of some fields' values."""
    return [TextCell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


RATES = (1e-4, 2e-4, 4e-4, 1e-3)
BEST = {
    "full_precision": 1e-4, "one_shot_distilled": 1e-3, "stompp_ste_distilled": 1e-3, "vanilla_taught": 1e-3,
    "stompp_ste": 1e-3, "stompp_ste_taught": 1e-3,
}  # fmt: skip
"""Learning rate of a method in `table`; 4e-4 for the others."""


def _search(tasks: list[str], seeds: list[int]) -> TextPreset:
    """One seed, the same learning rates for every method."""
    cells = product(method=METHODS, lr=RATES, task=tasks, seed=seeds[:1])
    return TextPreset(TextRecipe(12800, 1), cells)


def _table(tasks: list[str], seeds: list[int]) -> TextPreset:
    cells = [
        TextCell(task, method, BEST.get(method, 4e-4), seed) for task in tasks for method in METHODS for seed in seeds
    ]
    return TextPreset(TextRecipe(12800, 3), cells)


def _depth(tasks: list[str], seeds: list[int]) -> TextPreset:
    methods = ["full_precision", "vanilla_identity", "vanilla_ste", "stompp_identity", "stompp_ste"]
    cells = [
        TextCell(tasks[0], method, BEST[method] if method == FINE_TUNED else 4e-4, seed, layers)
        for layers in (2, 6, 12)
        for method in methods
        for seed in seeds
    ]
    return TextPreset(TextRecipe(12800, 1), cells)


def _paper(tasks: list[str], seeds: list[int]) -> TextPreset:
    """Two layers beside the checkpoint's number: a third of its stages, so three times the steps for each."""
    cells = product(method=PAPER, lr=(4e-4, 1e-3), task=tasks[:1], seed=seeds[:1], layers=[0, 2], rule=["paper"])
    return TextPreset(TextRecipe(12800, 1), cells)


def _pairs(tasks: list[str], seeds: list[int]) -> TextPreset:
    """All of MRPC or STS-B, 1,800 steps: what an encoder needs to relearn the comparison of two sentences."""
    cells = [
        TextCell(task, method, BEST[method], seed, rule="pairs") for task in tasks for method in PAIRS for seed in seeds
    ]
    return TextPreset(TextRecipe(0, 3, max_steps=1800, max_grad_norm=1.0), cells)


def _small(tasks: list[str], seeds: list[int]) -> TextPreset:
    """All of a small task, 20 epochs in batches of 8, as in glue_pairs.yaml."""
    cells = [
        TextCell(task, method, BEST[method] if method == FINE_TUNED else 5e-4, seed, rule="small")
        for task in tasks
        for method in SMALL
        for seed in seeds
    ]
    return TextPreset(TextRecipe(0, 20, batch=8, max_grad_norm=1.0), cells)


def _script(tasks: list[str], seeds: list[int]) -> TextPreset:
    """The three lines in a script whose settings are Trainer's, at the rates that such scripts have."""
    cells = product(method=["stompp_ste"], lr=(2e-5, 5e-5, 1e-4), task=tasks, seed=seeds, rule=["script"])
    return TextPreset(TextRecipe(12800, 3, max_grad_norm=1.0), cells)


def _full(tasks: list[str], seeds: list[int]) -> TextPreset:
    """All of SST-2 but the last 4,000 examples (`--held_out 4000`), once."""
    methods = ["full_precision", "vanilla_ste", "stompp_ste", "vanilla_taught", "stompp_ste_taught"]
    cells = [TextCell("sst2", method, BEST.get(method, 4e-4), seed) for method in methods for seed in seeds]
    return TextPreset(TextRecipe(63349, 1), cells)


def _quick(tasks: list[str], seeds: list[int]) -> TextPreset:
    methods = ["full_precision", "vanilla_ste", "stompp_ste_distilled", "stompp_ste_taught"]
    cells = product(method=methods, lr=[1e-3], task=tasks, seed=seeds)
    return TextPreset(TextRecipe(64, 2, batch=8, max_seq_length=16), cells)


PRESETS = {
    "quick": _quick, "search": _search, "table": _table, "full": _full, "depth": _depth, "paper": _paper,
    "pairs": _pairs, "small": _small, "script": _script,
}  # fmt: skip
