"""Binary fine-tuning, method by method: a grid of runs of examples/run_glue.py, a results file and a table.

    python examples/ablations/glue.py --preset table --model CHECKPOINT --data_dir GLUE --output_dir runs/glue \
        --tasks sst2 mrpc stsb --workers 2
    python examples/ablations/glue.py ... --only "sst2-*" --seeds 0 1           # a part of the grid
    python examples/ablations/glue.py ... --preset script --learning_rates 5e-5 --parts real      # what costs where

GLUE holds a folder a task with train.parquet and validation.parquet, as on the hub. Each cell is a process; its
options, log and metrics are kept in cells/ID, and options.json there runs it again by hand. Run the same command after
a stop, and it goes on with the cells that are missing; --known takes the results.json of another machine's part of the
grid. Needs the extra `examples`.
"""

import functools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from cells import chosen, write_json
from datasets import Dataset
from glue_grid import FINE_TUNED, LABELS, METRICS, PRESETS, RIVALS, TextCell, TextPreset
from report import Interval, interval, spread
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

from stompp_hf import StoMPPConfig, binarize_model, get_plan
from stompp_hf.reports.runs import STAGES
from stompp_hf.surgery.blocks import block_of

logger = logging.getLogger("ablations.glue")
REAL, BINARY = "real", "binary"
SCRIPT = Path(__file__).resolve().parent.parent / "run_glue.py"


@dataclass
class GlueArguments:
    """Which cells, on which data, from which checkpoint, and where to."""

    model: str = field(metadata={"help": "Checkpoint to fine-tune: a folder, or a name on the hub."})
    data_dir: str = field(metadata={"help": "Folder with a folder a task: train.parquet, validation.parquet."})
    output_dir: str = field(metadata={"help": "Where cells and results are written."})
    preset: str = field(default="table", metadata={"help": "The grid.", "choices": list(PRESETS)})
    tasks: list[str] = field(default_factory=lambda: ["sst2"], metadata={"help": f"Of {', '.join(METRICS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One cell of each kind a seed."})
    held_out: int = field(
        default=0,
        metadata={"help": "Evaluate on the last N training examples, which nothing trains on, in place of validation."},
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Every cell at each of these, in place of its own."}
    )
    only: list[str] | None = field(default=None, metadata={"help": "Shell-style patterns of the cells to run."})
    workers: int = field(default=1, metadata={"help": "Processes at a time."})
    threads: int = field(default=1, metadata={"help": "CPU threads of each."})
    parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Every cell also once for each kind of layer and each block: `real` leaves that part real, "
            "`binary` makes it alone binary; one or both."
        },
    )
    options: str | None = field(
        default=None, metadata={"help": "JSON with options for every cell, in place of its own."}
    )
    known: list[str] | None = field(
        default=None, metadata={"help": "results.json of earlier runs: their cells are not run again, and reported."}
    )
    list_cells: bool = field(default=False, metadata={"help": "Print the ids of the cells, and stop."})


def selected(args: GlueArguments) -> TextPreset:
    """The preset with what the command line changes."""
    unknown = set(args.tasks) - set(METRICS)
    if unknown:
        raise SystemExit(f"--tasks {' '.join(unknown)}: choose among {', '.join(METRICS)}.")
    if set(args.parts) - {REAL, BINARY}:
        raise SystemExit(f"--parts {' '.join(args.parts)}: choose {REAL}, {BINARY}, or both.")
    preset = PRESETS[args.preset](args.tasks, args.seeds)
    cells = preset.cells
    if args.learning_rates:
        cells = [replace(cell, lr=lr) for cell in cells for lr in args.learning_rates]
    cells = [other for cell in cells for other in (cell, *of_parts(cell, args))]
    return TextPreset(preset.recipe, chosen(cells, args.only))


def of_parts(cell: TextCell, args: GlueArguments) -> list[TextCell]:
    """The same cell for each kind of layer and each block, as `--parts` asks for."""
    if cell.method == FINE_TUNED:
        return []
    return [replace(cell, part=f"{how} {name}") for how in args.parts for name in parts(args.model, cell.layers)]


@functools.cache
def parts(model: str, layers: int = 0) -> dict[str, list[str]]:
    """The binary layers of a checkpoint by kind (their name within a block), then by block."""
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = layers or config.num_hidden_layers
    binary = binarize_model(AutoModelForSequenceClassification.from_config(config), StoMPPConfig())
    kinds: dict[str, list[str]] = {}
    blocks: dict[str, list[str]] = {}
    for entry in get_plan(binary).entries:
        block = block_of(binary, entry.name)
        if block is not None:
            kinds.setdefault(entry.name.removeprefix(f"{block}."), []).append(entry.name)
            blocks.setdefault(".".join(block.split(".")[-2:]), []).append(entry.name)
    return {**kinds, **blocks}


def resized(model: str, layers: int, folder: Path) -> str:
    """A checkpoint with another number of layers: evenly spaced ones of the model's, or each of them repeated."""
    target = folder / f"layers{layers}"
    if (target / "config.json").is_file():
        return str(target)
    config = AutoConfig.from_pretrained(model)
    count = config.num_hidden_layers
    set_seed(0)  # of a head that the checkpoint may lack: one start for all runs
    whole: Any = AutoModelForSequenceClassification.from_pretrained(model)
    config.num_hidden_layers = layers
    other = type(whole)(config)
    state = whole.state_dict()
    marks = {f".{place}.": f".{place * count // layers}." for place in range(layers)}
    for name, value in other.state_dict().items():
        mark = next((m for m in marks if f"layer{m}" in name), None)
        value.copy_(state[name if mark is None else name.replace(f"layer{mark}", f"layer{marks[mark]}", 1)])
    other.save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return str(target)


def held_out(train: Path, count: int, used: int, folder: Path) -> Path:
    """A file with the last `count` rows of a training file: more examples than a small validation set has.

    Raises SystemExit if the run would train on them.
    """
    data: Any = Dataset.from_parquet(str(train))
    if not 0 < used <= len(data) - count:
        raise SystemExit(f"--held_out {count}: {train} has {len(data)} rows, and the preset trains on {used or 'all'}.")
    target = folder / f"{train.parent.name}-last{count}.parquet"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data.select(range(len(data) - count, len(data))).to_parquet(str(target))
    return target


def options_of(cell: TextCell, preset: TextPreset, args: GlueArguments, folder: Path) -> dict[str, Any]:
    """All options of the cell's run; its output_dir is the cell's folder."""
    data = Path(args.data_dir, cell.task)
    model = resized(args.model, cell.layers, folder / "models") if cell.layers else args.model
    validation = data / "validation.parquet"
    if args.held_out:
        validation = held_out(data / "train.parquet", args.held_out, preset.recipe.train_samples, folder / "data")
    own = {"model_name_or_path": model, **cell.options()}
    if cell.part:
        how, _, name = cell.part.partition(" ")
        own["exclude_modules" if how == REAL else "target_modules"] = parts(args.model, cell.layers)[name]
    if cell.fine_tuned is not None:
        place = str(folder / "cells" / cell.fine_tuned.id)
        own = {key: place if value == FINE_TUNED and key != "method" else value for key, value in own.items()}
    return {
        **preset.recipe.options(), **own,
        "train_file": str(data / "train.parquet"), "validation_file": str(validation),
        **json.loads(args.options or "{}"), "output_dir": str(folder / "cells" / cell.id),
    }  # fmt: skip


def run_cell(options: dict[str, Any], threads: int) -> dict[str, Any]:
    """One run of run_glue.py in a process of its own; returns its metrics. Raises RuntimeError with the log's end.

    Weights are kept in full precision only: other cells may start from them, and options.json makes the rest again.
    """
    folder = Path(options["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        command = [sys.executable, str(SCRIPT), str(folder / "options.json")]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
    if code:
        raise RuntimeError(f"exit status {code}: " + (folder / "log.txt").read_text(encoding="utf-8")[-600:])
    metrics = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    for weights in (*folder.glob("*.safetensors"), *folder.glob("_teacher/*.safetensors")):
        if options.get("method") != FINE_TUNED:
            weights.unlink()
    return {
        "metrics": metrics,
        "binary": last_stage(folder),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)),
    }


def last_stage(folder: Path) -> dict[str, Any] | None:
    """Packed bytes and 1-bit share of the multiply-accumulates of a run's last stage; None for a run without stages."""
    file = folder / STAGES
    return json.loads(file.read_text(encoding="utf-8"))["stages"][-1] if file.is_file() else None


def portable(options: dict[str, Any]) -> dict[str, Any]:
    """Options without what differs from machine to machine: where things lie, not what they are."""
    places = ("model_name_or_path", "teacher", "train_file", "validation_file")
    names = {key: Path(options[key]) for key in places if key in options}
    named = {key: "/".join(path.parts[-2 if path.suffix else -1 :]) for key, path in names.items()}
    return {key: value for key, value in {**options, **named}.items() if key != "output_dir"}


def read(folder: Path, known: list[str] | None = None) -> dict[TextCell, dict[str, Any]]:
    """All finished cells, by cell; the folder's own come before known ones."""
    records = [record for path in known or [] for record in json.loads(Path(path).read_text(encoding="utf-8"))]
    records += [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    return {TextCell(**record["cell"]): record for record in records}


def score(cell: TextCell, record: dict[str, Any]) -> float:
    """The task's metric, in percent."""
    return 100.0 * float(record["metrics"][f"eval_{METRICS[cell.task]}"])


def paired(
    results: dict[TextCell, dict[str, Any]], mine: list[TextCell], method: str, rule: str
) -> list[tuple[float, float]]:
    """Scores beside those of another method's cells of the same task, depth and seed, under this rule.

    Where that method was run at several learning rates, the one with the most of these seeds stands for it, and among
    equals the one with the best mean: a single good seed is no rival for three.
    """
    first = mine[0]
    rivals: dict[float, dict[int, float]] = {}
    for cell, record in results.items():
        if (cell.task, cell.layers, cell.method, cell.rule) == (first.task, first.layers, method, rule):
            rivals.setdefault(cell.lr, {})[cell.seed] = score(cell, record)
    if not rivals:
        return []
    seeds = {cell.seed for cell in mine}
    best = max(rivals.values(), key=lambda scores: (len(scores.keys() & seeds), mean(scores.values())))
    return [(score(cell, results[cell]), best[cell.seed]) for cell in mine if cell.seed in best]


def versus(results: dict[TextCell, dict[str, Any]], mine: list[TextCell], method: str) -> Interval | None:
    """Paired differences to another method's cells of the same rule; None without pairs, or for the method itself."""
    pairs = [] if mine[0].method == method else paired(results, mine, method, mine[0].rule)
    return interval([own - other for own, other in pairs]) if pairs else None


def share(results: dict[TextCell, dict[str, Any]], mine: list[TextCell]) -> float | None:
    """Share of full precision's score, by pairs; a rule without full-precision runs of its own takes the default's."""
    if mine[0].method == FINE_TUNED:
        return None
    rules = (mine[0].rule, "default")
    pairs = next(filter(None, (paired(results, mine, FINE_TUNED, rule) for rule in rules)), None)
    return sum(own for own, _ in pairs) / sum(real for _, real in pairs) if pairs else None


def table(results: dict[TextCell, dict[str, Any]]) -> str:
    """Every group with its mean and spread, its paired difference to vanilla STE, and its share of full precision.

    Vanilla STE is windowed, but for what has the identity surrogate itself.
    """
    results = {cell: record for cell, record in results.items() if not cell.part}
    groups: dict[str, list[TextCell]] = {}
    order = {method: place for place, method in enumerate(LABELS)}
    key: Callable[[TextCell], Any] = lambda c: (c.task, c.rule, c.layers, order[c.method], c.lr, c.seed)  # noqa: E731
    for cell in sorted(results, key=key):
        groups.setdefault(cell.group, []).append(cell)
    titles = ["task", "method", "learning rate", "seeds", "score, %", "minus vanilla STE", "of full precision"]
    titles += ["CPU minutes", "peak memory, MB"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for cells in groups.values():
        first, scores = cells[0], [score(cell, results[cell]) for cell in cells]
        extra = [f"{first.layers} layers"] if first.layers else []
        extra += [] if first.rule == "default" else [f"{first.rule} rule"]
        rival = RIVALS.get(first.method, "vanilla_ste")
        margin = None if first.method == FINE_TUNED else versus(results, cells, rival)
        part = share(results, cells)
        told = ["" if margin is None else str(margin), "" if part is None else f"{part:.1%}"]
        minutes = mean(results[cell]["cpu_seconds"] for cell in cells) / 60
        memory = max(results[cell]["peak_mb"] for cell in cells)
        row = [", ".join([first.task, *extra]), first.label, f"{first.lr:g}", str(len(cells)), spread(scores)]
        lines.append("| " + " | ".join([*row, *told, f"{minutes:.1f}", str(memory)]) + " |")
    return "\n".join(lines)


def parts_table(results: dict[TextCell, dict[str, Any]]) -> str:
    """What each part costs: its cells beside those in which all is binary, seed by seed; empty where there are none."""
    groups: dict[str, list[TextCell]] = {}
    for cell in results:
        if cell.part:
            groups.setdefault(cell.group, []).append(cell)
    if not groups:
        return ""
    titles = ["task", "method", "learning rate", "part", "seeds", "score, %", "minus all binary", "packed, MB"]
    lines = ["| " + " | ".join([*titles, "1-bit products"]) + " |", "|" + "---|" * (len(titles) + 1)]
    for cells in groups.values():
        first, scores = cells[0], [score(cell, results[cell]) for cell in cells]
        whole = [results.get(replace(cell, part="")) for cell in cells]
        gains = [s - score(c, r) for s, c, r in zip(scores, cells, whole, strict=True) if r is not None]
        told = [str(interval(gains)) if gains else "", *_told(results[first].get("binary"))]
        row = [first.task, first.label, f"{first.lr:g}", first.part, str(len(cells)), spread(scores), *told]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _told(stage: dict[str, Any] | None) -> list[str]:
    if stage is None:
        return ["", ""]
    share = stage["share_1bit"]
    return [f"{stage['bytes'] / 1e6:.2f}", "" if share is None else f"{share:.0%}"]


def write_report(folder: Path, known: list[str] | None = None) -> str:
    """Write results.json, a line a cell, and results.md, and return the latter."""
    results = read(folder, known)
    if not results:
        raise SystemExit(f"{folder} has no finished cell.")
    tables = [found for found in (table(results), parts_table(results)) if found]
    text = "# Binary fine-tuning\n\n" + "\n\n".join(tables) + "\n"
    lines = ",\n".join(json.dumps(record) for _, record in sorted(results.items(), key=lambda item: item[0].id))
    (folder / "results.json").write_text(f"[{lines}]\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def run_cells(rest: dict[TextCell, dict[str, Any]], args: GlueArguments, folder: Path) -> list[str]:
    """Run cells side by side and write a record of each; returns the ids of those that failed."""
    failed = []
    with ThreadPoolExecutor(args.workers) as pool:
        running = {pool.submit(run_cell, options, args.threads): cell for cell, options in rest.items()}
        for number, future in enumerate(as_completed(running), 1):
            cell = running[future]
            if error := future.exception():
                failed.append(cell.id)
                logger.error("%s failed: %s", cell.id, error)
                continue
            record = {"id": cell.id, "cell": asdict(cell), "options": portable(rest[cell]), **future.result()}
            write_json(folder / "cells" / f"{cell.id}.json", record)
            logger.info(
                "%d of %d: %s: %.2f, %.0f s", number, len(rest), cell.id, score(cell, record), record["seconds"]
            )
    return failed


def main(words: list[str] | None = None) -> None:
    """Run what is missing, then write the table of all that is there."""
    (args,) = HfArgumentParser(GlueArguments).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stdout)
    preset = selected(args)
    if args.list_cells:
        print("\n".join(cell.id for cell in preset.cells))
        return
    folder = Path(args.output_dir)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    rest: dict[TextCell, dict[str, Any]] = {}
    done = read(folder, args.known)
    for cell in preset.cells:
        options = options_of(cell, preset, args, folder)
        if cell not in done:
            rest[cell] = options
        elif (then := done[cell]["options"]) != (now := portable(options)):
            changed = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
            raise SystemExit(f"{cell.id} was made with other options ({', '.join(changed)}). Use another --output_dir.")
    needed = {cell.fine_tuned for cell in rest if cell.fine_tuned is not None}
    for cell in needed:
        if cell not in rest and not list((folder / "cells" / cell.id).glob("*.safetensors")):
            rest[cell] = options_of(cell, preset, args, folder)  # known from elsewhere, or outside --only
    logger.info("%d cells, %d of them to run, on %d workers", len(preset.cells), len(rest), args.workers)
    failed: list[str] = []
    for wave in (needed & rest.keys(), rest.keys() - needed):
        failed += run_cells({cell: options for cell, options in rest.items() if cell in wave}, args, folder)
    if read(folder, args.known):
        print(write_report(folder, args.known))
    if failed:
        raise SystemExit(f"{len(failed)} cells failed: {', '.join(failed)}. Run again to retry them.")


if __name__ == "__main__":
    main()
