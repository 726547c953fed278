"""From finished cells to a table: mean and spread over seeds, and paired differences with their intervals.

python examples/ablations/report.py runs/ablation
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from grid import ORDERS, Cell

LABELS = {
    "full_precision": "full precision", "vanilla_ste": "vanilla STE", "vanilla_clipped_ste": "vanilla clipped STE",
    "stompp": "StoMPP (STE-free)", "stompp_ste": "StoMPP+STE", "stompp_clipped_ste": "StoMPP + clipped STE",
    "vanilla_scaled_ste": "vanilla STE, scaled", "stompp_scaled_ste": "StoMPP+STE, scaled",
}  # fmt: skip
BASELINES = ("vanilla_ste", "vanilla_clipped_ste")
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, and half the width of its confidence interval (infinite for one pair)."""

    mean: float
    half: float
    count: int

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:+.2f} (one seed)"
        verdict = "" if self.resolved else ", not resolved"
        return f"{self.mean:+.2f} [{self.mean - self.half:+.2f}, {self.mean + self.half:+.2f}]{verdict}"


def interval(differences: list[float]) -> Interval:
    """Student's interval of the mean: mean -+ t * sd / sqrt(n), t the quantile at n - 1 degrees of freedom."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return Interval(mean(differences), math.inf, count)
    half = float(t.ppf(0.5 + LEVEL / 2, count - 1)) * stdev(differences) / math.sqrt(count)
    return Interval(mean(differences), half, count)


Results = dict[Cell, dict[str, Any]]


def read(folder: Path) -> Results:
    """All finished cells of a run, by cell, in a stable order."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cells").glob("*.json")]
    results = {Cell(**record["settings"]["cell"]): record for record in records}
    places = {"bnn": 0, "bwn": 1}, {name: index for index, name in enumerate(LABELS)}

    def place(cell: Cell) -> tuple[Any, ...]:
        orders = ORDERS.index(cell.order) if cell.order in ORDERS else len(ORDERS)
        return (
            places[0][cell.binarize],
            cell.depth,
            not cell.shortcuts,
            cell.lr,
            places[1][cell.method],
            orders,
            cell.id,
        )

    return {cell: results[cell] for cell in sorted(results, key=place)}


def paired(
    results: Results, cells: Iterable[Cell], other: Callable[[Cell], Cell], value: str = "accuracy"
) -> Interval | None:
    """Differences of cells to their partners, over the seeds that have both; None where there is no pair."""
    differences = []
    for cell in cells:
        partner = other(cell)
        if partner == cell or partner not in results:
            continue
        mine, theirs = results[cell], results[partner]
        if mine["pair"] != theirs["pair"]:
            raise ValueError(f"{mine['id']} and {theirs['id']} are no pair: they began or went on differently.")
        differences.append(mine[value] - theirs[value])
    return interval(differences) if differences else None


def groups(results: Results) -> dict[str, list[Cell]]:
    """Cells that differ only in their seed, by their common name."""
    found: dict[str, list[Cell]] = {}
    for cell in results:
        found.setdefault(cell.group, []).append(cell)
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _network(cell: Cell) -> str:
    kind = "full precision" if cell.method == "full_precision" else cell.binarize.upper()
    more = ([] if cell.shortcuts else ["no shortcuts"]) + ([f"lr {cell.lr:g}"] if cell.lr != Cell.lr else [])
    return ", ".join([kind, str(cell.depth), *more])


def _method(cell: Cell) -> str:
    if not cell.method.startswith("stompp"):
        return f"{LABELS[cell.method]} | "
    more = [] if cell.schedule == Cell.schedule else [cell.schedule]
    more += [] if cell.stages == Cell.stages else [f"{cell.stages} stages"]
    more += [] if cell.activation_mask == Cell.activation_mask else [f"{cell.activation_mask} masks"]
    more += [] if (cell.start, cell.end) == (0.0, 1.0) else [f"from {cell.start:g} to {cell.end:g}"]
    return f"{LABELS[cell.method]} | {', '.join([cell.order, *more, f'r = {cell.refresh_rate}'])}"


def table(results: Results) -> str:
    """Accuracy of every group, and its paired differences to the baselines that were run."""
    baselines = [method for method in BASELINES if any(cell.method == method for cell in results)]
    titles = ["network, depth", "method", "order", "seeds", "accuracy, %", "batch norm re-estimated, %"]
    titles += [f"minus {LABELS[method]}" for method in baselines]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for cells in groups(results).values():
        diverged = sum(bool(results[cell]["diverged"]) for cell in cells)
        shown = [spread([results[cell][key] for cell in cells]) for key in ("accuracy", "accuracy_recalibrated")]
        shown[0] += f" ({diverged} diverged)" if diverged else ""
        for method in baselines:
            trained = cells[0].method.startswith("stompp")
            found = paired(results, cells, lambda cell, method=method: cell.baseline(method)) if trained else None
            shown.append("" if found is None else str(found))
        lines.append(f"| {_network(cells[0])} | {_method(cells[0])} | {len(cells)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def order_table(results: Results) -> str:
    """Forward minus the other orders, method by method."""
    lines = ["| network, depth | method | forward minus global | forward minus reverse |", "|---|---|---|---|"]
    for cells in groups(results).values():
        if cells[0].order != "forward" or not cells[0].method.startswith("stompp"):
            continue
        found = [
            paired(results, cells, lambda cell, order=order: replace(cell, order=order))
            for order in ("global", "reverse")
        ]
        if any(found):
            shown = ["" if difference is None else str(difference) for difference in found]
            method = f"{LABELS[cells[0].method]}, {_method(cells[0]).partition(', ')[2]}"
            lines.append(f"| {_network(cells[0])} | {method} | {' | '.join(shown)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def depth_table(results: Results) -> str:
    """How the margin over a baseline grows from one depth to the next, in forward order, paired by seed."""
    margins: dict[tuple[str, Cell], dict[int, dict[int, float]]] = {}
    for cell, record in results.items():
        for method in BASELINES:
            partner = results.get(cell.baseline(method))
            if cell.method.startswith("stompp") and cell.order == "forward" and partner is not None:
                depths = margins.setdefault((method, replace(cell, depth=0, seed=0)), {}).setdefault(cell.depth, {})
                depths[cell.seed] = record["accuracy"] - partner["accuracy"]
    lines = []
    for (method, kind), depths in sorted(margins.items(), key=lambda item: item[0][0] != BASELINES[0]):
        for low, high in itertools.pairwise(sorted(depths)):
            seeds = sorted(set(depths[low]) & set(depths[high]))
            if seeds:
                growth = interval([depths[high][seed] - depths[low][seed] for seed in seeds])
                name = f"{_network(kind).replace(', 0', '')} | {_method(kind)} | {LABELS[method]}"
                lines.append(f"| {name} | {low} to {high} | {growth} |")
    head = ["| network | method | order | baseline | depths | growth of the margin |", "|---|---|---|---|---|---|"]
    return "\n".join(head + lines) if lines else ""


def write_report(folder: Path) -> str:
    """Write results.json and results.md, and return the latter."""
    results = read(folder)
    if not results:
        raise SystemExit(f"{folder} has no finished cell.")
    first = next(iter(results.values()))
    recipe, versions = first["settings"]["recipe"], first["versions"]
    minutes = sum(record["cpu_seconds"] for record in results.values()) / 60
    clipping = f", gradients clipped at {recipe['max_grad_norm']:g}" if recipe["max_grad_norm"] else ""
    parts = [
        "# Ablations",
        f"{recipe['train_images'] or 'All'} images a seed at {recipe['image_size']}x{recipe['image_size']}, "
        f"{recipe['epochs']} epochs of batches of {recipe['batch']}, {first['steps']} steps, SGD with momentum "
        f"{recipe['momentum']:g}{clipping}, constant lr {Cell.lr:g} unless said; first stage of {recipe['width']} "
        f"channels. Accuracy on {recipe['test_images'] or 'all'} test images, everything frozen. {len(results)} cells, "
        f"{minutes:.0f} CPU minutes (torch {versions['torch']}, stompp_hf {versions['stompp_hf']}).",
        "Spread: standard deviation over seeds. Differences are paired by seed (same initial weights, images and "
        f"order), with {LEVEL:.0%} t intervals; 'not resolved' where the interval contains 0. A run that diverged "
        "counts as chance.",
        table(results),
    ]
    for title, text in (("Order", order_table(results)), ("Depth", depth_table(results))):
        parts += [f"## {title}", text] if text else []
    text = "\n\n".join(parts) + "\n"
    (folder / "results.json").write_text(json.dumps(list(results.values())) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
