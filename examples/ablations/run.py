"""The paper's ablations: every cell of a grid trained from scratch, a results file, a Markdown table and plots.

    python examples/ablations/run.py --preset cpu --train_file TRAIN.parquet --test_file TEST.parquet \
        --output_dir runs/ablation --workers 2
    python examples/ablations/run.py ... --only "bnn-*-d18-*" --seeds 0 1        # a part of the grid
    python examples/ablations/run.py --preset paper ... --device cuda --epochs 100

One JSON file a finished cell: run the same command again after a stop, and it goes on with the cells that are missing.
Files have an image column (img or image, encoded) and a label column, as CIFAR-10 on the hub. Needs the extra
`examples`; plots need the extra `plots`.
"""

import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cells import chosen, write_json
from data import Data, cached, load
from grid import PRESETS, Cell, Preset, Recipe, settings
from report import write_report
from train import train_cell
from transformers import HfArgumentParser

logger = logging.getLogger("ablations")


@dataclass
class RunArguments:
    """Which cells, on which data, and where to."""

    train_file: str = field(metadata={"help": "Parquet file with the training images."})
    test_file: str = field(metadata={"help": "Parquet file with the test images."})
    output_dir: str = field(metadata={"help": "Where cells and results are written."})
    preset: str = field(default="cpu", metadata={"help": "The grid.", "choices": list(PRESETS)})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One cell of each kind a seed."})
    only: list[str] | None = field(default=None, metadata={"help": "Shell-style patterns of the cells to run."})
    workers: int = field(default=1, metadata={"help": "Processes, of one CPU thread each."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    epochs: int | None = field(default=None, metadata={"help": "In place of the preset's."})
    train_images: int | None = field(default=None, metadata={"help": "In place of the preset's; 0 takes all."})
    width: int | None = field(default=None, metadata={"help": "Channels of the first stage, in place of the preset's."})
    max_grad_norm: float | None = field(default=None, metadata={"help": "In place of the preset's; 0 does not clip."})
    lr: float | None = field(default=None, metadata={"help": "Learning rate of all cells, in place of theirs."})
    plots: bool = field(default=False, metadata={"help": "Draw the plots at the end."})
    list_cells: bool = field(default=False, metadata={"help": "Print the ids of the cells, and stop."})


def selected(args: RunArguments) -> Preset:
    """The preset with what the command line changes."""
    preset = PRESETS[args.preset](args.seeds)
    given = {name: getattr(args, name) for name in ("epochs", "train_images", "width", "max_grad_norm")}
    recipe = replace(preset.recipe, **{name: value for name, value in given.items() if value is not None})
    cells = preset.cells if args.lr is None else [replace(cell, lr=args.lr) for cell in preset.cells]
    return Preset(recipe, chosen(cells, args.only))


def missing(cells: list[Cell], recipe: Recipe, made_from: str, folder: Path) -> list[Cell]:
    """The cells without a file, longest first; one with a file made by other settings is an error."""
    rest = []
    for cell in cells:
        path = folder / f"{cell.id}.json"
        if not path.exists():
            rest.append(cell)
            continue
        then, now = json.loads(path.read_text(encoding="utf-8"))["settings"], settings(cell, recipe, made_from)
        if then != now:
            flat = [{**s["cell"], **s["recipe"], "data files": s["data"]} for s in (then, now)]
            other = [
                f"{key} {flat[0].get(key)} -> {value}" for key, value in flat[1].items() if flat[0].get(key) != value
            ]
            raise SystemExit(
                f"{path} was made with other settings ({', '.join(other)}). Use another --output_dir, or delete it."
            )
    return sorted(rest, key=lambda cell: -cell.depth)


_data: Data


def _start_worker(path: str, device: str) -> None:
    """One thread, the images in memory and, in a process of its own, no life beyond the runner's."""
    global _data
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _data = load(path, device)


def _work(cell: Cell, recipe: Recipe, made_from: str, device: str, folder: Path) -> dict[str, Any]:
    """Train one cell and write its file."""
    record = {"id": cell.id, "settings": settings(cell, recipe, made_from), **train_cell(cell, recipe, _data, device)}
    write_json(folder / f"{cell.id}.json", record)
    return record


def finished(
    cells: list[Cell], recipe: Recipe, images: tuple[Path, str], args: RunArguments, folder: Path
) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """Train cells, here or on `args.workers` processes; yields each with its record, or with what stopped it."""
    start, rest = (str(images[0]), args.device), (recipe, images[1], args.device, folder)
    if args.workers == 1:
        _start_worker(*start)
        for cell in cells:
            yield cell, _work(cell, *rest)
        return
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _start_worker, start) as pool:
        running = {pool.submit(_work, cell, *rest): cell for cell in cells}
        try:
            for future in as_completed(running):
                yield running[future], future.exception() or future.result()  # type: ignore[misc]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(words: list[str] | None = None) -> None:
    """Run what is missing, then write the report on all that is there."""
    (args,) = HfArgumentParser(RunArguments).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stdout)
    preset = selected(args)
    if args.list_cells:
        print("\n".join(cell.id for cell in preset.cells))
        return
    folder = Path(args.output_dir)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    images = cached(args.train_file, args.test_file, preset.recipe.image_size, folder)
    rest = missing(preset.cells, preset.recipe, images[1], folder / "cells")
    logger.info("%d cells, %d of them to run, on %d workers", len(preset.cells), len(rest), args.workers)
    began, failed = time.perf_counter(), []
    results = finished(rest, preset.recipe, images, args, folder / "cells") if rest else iter(())
    for number, (cell, result) in enumerate(results, 1):
        if isinstance(result, Exception):
            failed.append(cell.id)
            logger.error("%s failed: %s: %s", cell.id, type(result).__name__, result)
            continue
        minutes = (time.perf_counter() - began) / 60
        logger.info(
            "%d of %d: %s: accuracy %.2f (batch norm re-estimated: %.2f)%s, %.0f s, %.1f min in all",
            number, len(rest), cell.id, result["accuracy"], result["accuracy_recalibrated"],
            ", diverged" if result["diverged"] else "", result["seconds"], minutes,
        )  # fmt: skip
    print(write_report(folder))
    if args.plots:
        from plots import write_plots

        for path in write_plots(folder):
            logger.info("wrote %s", path)
    if failed:
        raise SystemExit(f"{len(failed)} cells failed: {', '.join(failed)}. Run again to retry them.")


if __name__ == "__main__":
    main()
