"""The paper's cells on CIFAR-10 for `gpu.py`: those of examples/ablations, for as many epochs as there is time."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "ablations"))
import run
from data import Data, cached, load
from grid import PRESETS, Cell, Preset, Recipe
from train import train_cell

KINDS = (("vanilla_ste", "forward"), ("stompp", "forward"), ("stompp_ste", "forward"), ("stompp", "reverse"))
"""Method and order: vanilla STE, STE-free, StoMPP+STE, and what the reverse order does."""
TRIAL_STEPS = 20
SPARE = 0.9
"""Share of the time that is planned for: later stages take longer than a trial's first ones."""


def cell_rows(args: Any, clock: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Train the cells that are missing, one after the other; a row each. What was trained before is kept."""
    name = "quick" if args.tiny else "paper"
    preset, folder = PRESETS[name]([args.seed]), Path(args.output_dir) / ("noise" if args.cifar is None else "cifar10")
    files = noise(folder, preset.recipe) if args.cifar is None else images(Path(args.cifar))
    cells, done = wanted(preset), sorted((folder / "cells").glob("*.json"))
    if done:
        epochs = json.loads(done[0].read_text(encoding="utf-8"))["settings"]["recipe"]["epochs"]
    else:
        data = load(cached(*files, preset.recipe.image_size, folder)[0], args.device)
        each = {depth: epoch_seconds(depth, preset, data, args.device) for depth in {cell.depth for cell in cells}}
        left = SPARE * (60 * args.minutes - clock())
        epochs = min(preset.recipe.epochs, max(1, int(left / sum(each[cell.depth] for cell in cells))))
    for cell in cells:
        path = folder / "cells" / f"{cell.id}.json"
        if not path.exists() and clock() > 60 * args.minutes:
            raise TimeoutError(f"--minutes {args.minutes:g} are over: the same command again goes on with {cell.id}.")
        run.main([
            "--preset", name, "--train_file", files[0], "--test_file", files[1], "--output_dir", str(folder),
            "--seeds", str(args.seed), "--device", args.device, "--epochs", str(epochs), "--only", cell.id,
        ])  # fmt: skip
        record = json.loads(path.read_text(encoding="utf-8"))
        right, again = (round(record[name], 2) for name in ("accuracy", "accuracy_recalibrated"))
        yield {
            "cell": cell.id, "images": "noise" if args.cifar is None else "CIFAR-10", "epochs": epochs,
            "accuracy": right, "batch norm re-estimated": again, "diverged": record["diverged"],
            "seconds": record["seconds"],
        }  # fmt: skip


def wanted(preset: Preset) -> list[Cell]:
    """The cells of these kinds with the preset's usual options, the smaller network first."""
    found: dict[tuple[int, int], Cell] = {}
    for cell in preset.cells:  # what is varied comes behind the usual
        if (cell.method, cell.order) in KINDS and cell.binarize == "bnn":
            found.setdefault((cell.depth, KINDS.index((cell.method, cell.order))), cell)
    return [found[key] for key in sorted(found)]


def epoch_seconds(depth: int, preset: Preset, data: Data, device: str) -> float:
    """What an epoch and a look at the test images take, by a few steps of StoMPP+STE; the first try is not counted."""
    recipe, cell = preset.recipe, next(c for c in preset.cells if c.method == "stompp_ste" and c.depth == depth)
    images, tests = len(data.train.labels), len(data.test.labels)
    few = min(images, TRIAL_STEPS * recipe.batch)
    part = max(1, tests * few // images)
    trial = replace(recipe, epochs=1, train_images=few, test_images=part, curve_images=part, probes=0)
    seconds = [float(train_cell(cell, trial, data, device)["seconds"]) for _ in range(2)]
    return max(seconds[1], 1e-3) * (recipe.train_images or images) / few


def images(folder: Path) -> tuple[str, str]:
    """CIFAR-10 as the hub has it.

    Raises SystemExit where a file is missing.
    """
    found = [sorted(folder.rglob(f"{split}*.parquet")) for split in ("train", "test")]
    if not all(found):
        raise SystemExit(f"--cifar {folder} has no train*.parquet, or no test*.parquet.")
    return str(found[0][0]), str(found[1][0])


def noise(folder: Path, recipe: Recipe) -> tuple[str, str]:
    """Files like CIFAR-10's with random images, written once."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.parquet", folder / "test.parquet"
    for path, count in zip(paths, (max(recipe.train_images, 8 * recipe.batch), 2 * recipe.batch), strict=True):
        if path.exists():
            continue
        random = torch.Generator().manual_seed(count)
        rows = []
        for pixels in torch.randint(0, 256, (count, recipe.image_size, recipe.image_size, 3), generator=random):
            buffer = io.BytesIO()
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({"img": rows, "label": [number % 10 for number in range(count)]})
        pyarrow.parquet.write_table(table, path)
    return str(paths[0]), str(paths[1])
