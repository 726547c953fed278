"""A finished or broken training run, read from Trainer's output folder: records, plan, metrics, what made it."""

import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..checkpoints.files import read_tensors
from ..errors import CheckpointError, RunError, StoMPPError
from ..method.schedules import frozen_fraction
from ..method.windows import Window
from ..modules.freeze_state import SAVED, FreezeState
from ..surgery.members import get_plan
from ..surgery.plan import Plan
from ..surgery.quantization_config import StoMPPQuantizationConfig
from ..trainer.resuming import checkpoints

RECORD = "run.json"
STAGES = "stages.json"
STATE = "trainer_state.json"
PACKAGES = ("stompp-hf", "transformers", "torch", "accelerate", "peft", "timm")
SECRETS = ("token", "key", "password", "secret")
"""Last words of options whose values never reach run.json."""
HIDDEN = "***"
SPEED = ("runtime", "samples_per_second", "steps_per_second", "samples", "loss", "preparation_time")


@dataclass
class Run:
    """What a run left behind; what could not be read is None or empty, and named in `notes`.

    home: the folder of its latest model; records: Trainer's log_history; step, max_steps: where training stood, and
    where it was to end; total_steps: of the progression, which keeps the first total on a resume; metrics: the final
    ones; record: what run.json holds; stages: what stages.json holds of each stage.
    """

    name: str
    folder: Path | None = None
    home: Path | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    max_steps: int = 0
    total_steps: int = 0
    plan: Plan | None = None
    hub_config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one logged number, finite ones only; the later record of a step counts."""
        found = {}
        for record in self.records:
            step, value = _number(record.get("step")), _number(record.get(key))
            if step is not None and value is not None:
                found[step] = value
        steps = sorted(found)
        return steps, [found[step] for step in steps]

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the logged numbers that begin with `prefix`, in the order in which they first appear."""
        found: dict[str, None] = {}
        for record in self.records:
            found |= {key: None for key in record if key.startswith(prefix) and _number(record[key]) is not None}
        return list(found)

    @property
    def main_metric(self) -> str | None:
        """The metric that evaluation is about: accuracy where there is one, else the first that is no loss or speed."""
        names = [key for key in (*self.keys("eval_"), *self.metrics) if key.startswith("eval_")]
        names = [key for key in names if not key.endswith(SPEED) and not key.startswith("eval_binary_")]
        return "eval_accuracy" if "eval_accuracy" in names else next(iter(names), None)

    @property
    def freezes(self) -> bool:
        """Whether it is known which stages freeze when."""
        return self.plan is not None and self.total_steps > 0 and self.plan.freezing > 0

    def stage_windows(self) -> list[tuple[str, list[Window]]]:
        """Name of each stage and the windows of its members, in the order in which they freeze."""
        if self.plan is None or not self.freezes:
            return []
        every = self.plan.windows(self.total_steps)
        return [
            (name, [every[entry.name] for entry in self.plan.entries if entry.stage == stage])
            for stage, name in enumerate(self.plan.stage_names[: self.plan.freezing])
        ]

    def execution_order(self) -> list[int]:
        """Numbers of the stages, from the model's input to its output."""
        if self.plan is None or not self.freezes:
            return []
        first = {e.stage: e.position for e in sorted(self.plan.entries, key=lambda e: e.position, reverse=True)}
        return sorted(first, key=first.__getitem__)

    def frozen_fractions(self, steps: Iterable[int]) -> list[list[float]]:
        """Target frozen fraction of every stage (rows) at `steps` (columns), 0 to 1: the mean over its members."""
        if self.plan is None:
            return []
        schedule, steps = self.plan.config.schedule, list(steps)

        def fraction(window: Window, step: int) -> float:
            return frozen_fraction(schedule, window.state(step)[1])

        return [
            [sum(fraction(window, step) for window in inside) / len(inside) for step in steps]
            for _, inside in self.stage_windows()
        ]

    @property
    def edges(self) -> list[int]:
        """Steps at which a stage's window opens or ends, inside the run, in order."""
        found = {edge for _, inside in self.stage_windows() for w in inside for edge in (w.begin, w.end)}
        return sorted(edge for edge in found if 0 < edge < self.total_steps)


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object, or an empty one; damage is noted."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"{path} is damaged ({error}); restore it, or delete it.")
        return {}
    if isinstance(found, dict):
        return found
    notes.append(f"{path} is damaged: it holds no JSON object.")
    return {}


def _read_state(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The trainer_state.json that got farthest; a run that died has one in its checkpoints only."""
    states = [_read_object(path / STATE, notes) for path in (*checkpoints(folder), folder)]
    good = [state for state in states if isinstance(state.get("log_history"), list)]
    return max(reversed(good), key=lambda state: _number(state.get("global_step")) or 0, default={})


def _read_plan(config: dict[str, Any], notes: list[str]) -> Plan | None:
    values = config.get("quantization_config")
    if not isinstance(values, dict):
        return None
    try:
        return StoMPPQuantizationConfig(**values).plan()
    except (StoMPPError, TypeError) as error:
        notes.append(f"The plan in config.json could not be read: {error}")
        return None


def _saved_total(folder: Path, notes: list[str]) -> int:
    """The progression's total number of steps as the model itself keeps it, or 0."""
    try:
        state = next((tensor for _, tensor in read_tensors(folder, lambda name: name.endswith(".stompp_state"))), None)
    except CheckpointError as error:
        notes.append(str(error))
        return 0
    return max(0, FreezeState.of(state).total_steps) if state is not None and state.numel() == len(SAVED) else 0


def read_run(folder: str | Path) -> Run:
    """Read a Trainer output folder, or any checkpoint folder; nothing in it is unpickled or executed.

    What is missing or damaged is left out and named in the run's `notes`.

    Raises:
        RunError: no such folder, or nothing in it to show: neither a log history nor a config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; give Trainer's output_dir.")
    notes: list[str] = []
    run = Run(folder.resolve().name, folder, notes=notes)
    state = _read_state(folder, notes)
    homes = [path for path in (folder, *reversed(checkpoints(folder))) if (path / "config.json").is_file()]
    run.hub_config = next(filter(None, (_read_object(path / "config.json", notes) for path in homes)), {})
    if not state and not run.hub_config:
        found = "; ".join(notes) or "it has no trainer_state.json, no checkpoint-N folder and no config.json"
        raise RunError(f"{folder} holds no run: {found}. Give the output_dir of a Trainer that has logged or saved.")
    run.records = [record for record in state.get("log_history", []) if isinstance(record, dict)]
    run.step, run.max_steps = (max(0, int(_number(state.get(key)) or 0)) for key in ("global_step", "max_steps"))
    run.plan = _read_plan(run.hub_config, notes)
    run.home = homes[0] if homes else None
    saved = next(filter(None, (_saved_total(path, notes) for path in homes)), 0) if run.plan else 0
    run.total_steps = saved or run.max_steps
    run.metrics = _read_metrics(folder, run, notes)
    if run.records and run.metrics and run.step == run.max_steps and run.main_metric not in _at(run.records, run.step):
        # scripts save Trainer's state after training, and evaluate once more after that
        last = {key: value for key, value in run.metrics.items() if key.startswith("eval_")}
        run.records.append({"step": run.step, **last})
    run.record = _read_object(folder / RECORD, notes)
    stages = _read_object(folder / STAGES, notes).get("stages", [])
    run.stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    notes += _what_is_missing(run, state)
    return run


def _at(records: list[dict[str, Any]], step: int) -> set[str]:
    """Names of what was logged at a step."""
    return {key for record in records if record.get("step") == step for key in record}


def _read_metrics(folder: Path, run: Run, notes: list[str]) -> dict[str, Any]:
    for names in (("all_results.json",), ("train_results.json", "eval_results.json")):
        found: dict[str, Any] = {}
        for name in names:
            found |= _read_object(folder / name, notes)
        if found:
            return found
    return {key: values[-1] for key in run.keys("eval_") if (values := run.series(key)[1])}


def _what_is_missing(run: Run, state: dict[str, Any]) -> list[str]:
    notes = []
    if not state:
        notes.append(
            f"No log history: there is no readable {STATE} (trainer.save_state() writes it, and so does every "
            "checkpoint of Trainer), so nothing can be drawn over time."
        )
    elif not run.keys():
        notes.append("The log history is empty: set logging_steps in TrainingArguments.")
    if run.max_steps and run.step < run.max_steps:
        notes.append(
            f"The run ended at step {run.step} of {run.max_steps}: it died, was stopped early, or is still going. To "
            "go on: trainer.train(resume_from_checkpoint=True)."
        )
    if run.total_steps and run.max_steps and run.total_steps != run.max_steps:
        notes.append(
            f"The progression has {run.total_steps} steps, and Trainer's run {run.max_steps}: it was resumed with "
            "another number of steps, and stages froze by the first."
        )
    if run.plan is None:
        notes.append("No StoMPP plan was found in config.json: stages cannot be shown. Was binarize_model called?")
    if not run.record:
        notes.append(
            f"No {RECORD}: the command and the versions of the run are unknown. stompp_hf.record_run(output_dir) "
            "writes it."
        )
    recorded = run.record.get("versions")
    then = recorded.get("transformers") if isinstance(recorded, dict) else None
    saved = run.hub_config.get("transformers_version")
    if then and saved and then != saved:
        notes.append(f"Mixed versions: the run began with transformers {then}, and its model was saved with {saved}.")
    return notes


def run_of(trainer: Any, name: str = "this run") -> Run:
    """The run of a live Trainer, for pictures in a notebook.

    Raises:
        NotBinarizedError: its model has no binary layers.
    """
    state, plan = trainer.state, get_plan(trainer.model)
    layer = trainer.model.get_submodule(plan.entries[0].name)
    total = getattr(layer, "total_steps", 0) or state.max_steps
    return Run(
        name, records=list(state.log_history), step=state.global_step, max_steps=state.max_steps, total_steps=total,
        plan=plan,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a run, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _without_secrets(words: Iterable[str]) -> list[str]:
    result, hide = [], False
    for word in words:
        option, equals, _ = word.partition("=")
        secret = option.startswith("--") and option.replace("-", "_").endswith(SECRETS)
        result.append(f"{option}={HIDDEN}" if secret and equals else HIDDEN if hide else word)
        hide = secret and not equals
    return result


def record_run(folder: str | Path, options: Mapping[str, Any] | None = None, argv: list[str] | None = None) -> Path:
    """Write run.json: the command, versions and options of a run, for `report`. Call it on the first process.

    Values of options that end with "token", "key", "password" or "secret" are left out.

    Args:
        folder: Trainer's output_dir; made if it is missing.
        options: what else to keep, plain JSON values (others are written as text).
        argv: the command; by default this process's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = {
        key: HIDDEN if key.endswith(SECRETS) and value is not None else value for key, value in (options or {}).items()
    }
    values = {
        "command": _without_secrets(["python", *sys.argv] if argv is None else argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "options": shown,
    }
    path = folder / RECORD
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    return path
