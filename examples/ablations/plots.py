"""Pictures of a finished grid, into its folder `plots`.

    python examples/ablations/plots.py runs/ablation

accuracy.png: accuracy over time with the stages' boundaries; depth.png: accuracy against depth; ordering.png: the
ordering ablation; gradient_flow.png: gradient norm of every layer over time, and how much is severed.
"""

import itertools
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from grid import ORDERS, Cell
from report import BASELINES, LABELS, Results, groups, read

COLOURS = {
    "full_precision": "0.5", "vanilla_ste": "black", "vanilla_clipped_ste": "tab:green", "stompp": "tab:blue",
    "stompp_ste": "tab:orange", "stompp_clipped_ste": "tab:red",
    "vanilla_scaled_ste": "tab:grey", "stompp_scaled_ste": "tab:purple",
}  # fmt: skip
LINES = {"forward": "-", "global": ":", "reverse": "--"}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'stompp-hf[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _usual(results: Results) -> Results:
    """The cells with the grid's most common learning rate, schedule, refresh rate and so on; tables show the others."""

    def options(cell: Cell) -> tuple[Any, ...]:
        return cell.schedule, cell.refresh_rate, cell.stages, cell.activation_mask, cell.start, cell.end

    rate = Counter(cell.lr for cell in results).most_common(1)
    usual = Counter(options(cell) for cell in results if cell.method.startswith("stompp")).most_common(1)
    return {
        cell: record
        for cell, record in results.items()
        if cell.lr == rate[0][0] and (not cell.method.startswith("stompp") or options(cell) == usual[0][0])
    }


def _name(cell: Cell) -> str:
    return f"{LABELS[cell.method]}, {cell.order}" if cell.method.startswith("stompp") else LABELS[cell.method]


def _networks(results: Results) -> dict[tuple[str, int, bool], list[Cell]]:
    """Cells by what is binary, depth and shortcuts."""
    found: dict[tuple[str, int, bool], list[Cell]] = {}
    for cell in results:
        if cell.method != "full_precision":
            found.setdefault((cell.binarize, cell.depth, cell.shortcuts), []).append(cell)
    return found


def _title(network: tuple[str, int, bool]) -> str:
    binarize, depth, shortcuts = network
    return f"{binarize.upper()}, depth {depth}" + ("" if shortcuts else ", no shortcuts")


def _curve(results: Results, cells: list[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and training accuracy, mean over the seeds."""
    curves = [results[cell]["training"]["accuracy"] for cell in cells if not results[cell]["diverged"]]
    return np.array(results[cells[0]]["training"]["step"]), np.array(curves).mean(0)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(values, np.ones(width) / width, mode="valid")


def _folded(steps: np.ndarray, accuracy: np.ndarray, edges: list[int], bins: int = 10) -> np.ndarray:
    """Accuracy against the place in a stage's window, as the distance to the window's mean, over all windows."""
    found: list[list[float]] = [[] for _ in range(bins)]
    for begin, end in itertools.pairwise(edges):
        inside = (steps >= begin) & (steps < end)
        place = ((steps[inside] - begin) / (end - begin) * bins).astype(int)
        for index, value in zip(place, accuracy[inside] - accuracy[inside].mean(), strict=True):
            found[index].append(value)
    return np.array([mean(values) if values else np.nan for values in found])


def accuracy_over_time(results: Results, path: Path) -> None:
    """Training accuracy (thin), test accuracy (marked) and stage boundaries (grey), mean over seeds, by network.

    On the right the same by the place in a stage's window, over all windows: the saw-tooth without the noise.
    """
    pyplot = _pyplot()
    networks = _networks(results)
    figure, axes = pyplot.subplots(
        len(networks), 2, figsize=(15, 3.8 * len(networks)), squeeze=False, width_ratios=[3, 1], layout="constrained"
    )
    for (left, right), (network, all_cells) in zip(axes, networks.items(), strict=True):
        edges: list[int] = []
        for cells in groups({cell: results[cell] for cell in all_cells}).values():
            cells = [cell for cell in cells if not results[cell]["diverged"]]
            if not cells or cells[0].order == "global":
                continue
            style = {"color": COLOURS[cells[0].method], "linestyle": LINES.get(cells[0].order, "-.")}
            steps, accuracy = _curve(results, cells)
            width = max(1, len(steps) // 60)
            left.plot(_smooth(steps, width), _smooth(accuracy, width), **style, linewidth=0.8, alpha=0.7)
            courses = [results[cell]["course"] for cell in cells]
            test = np.array([course["accuracy"] for course in courses]).mean(0)
            left.plot(courses[0]["step"], test, **style, marker="o", markersize=3, linewidth=0.4, label=_name(cells[0]))
            if len(results[cells[0]]["boundaries"]) > 2:
                edges = results[cells[0]]["boundaries"]
                folded = _folded(steps, accuracy, edges)
                right.plot((np.arange(len(folded)) + 0.5) / len(folded), folded, **style, marker=".")
        for edge in edges:
            left.axvline(edge, color="0.85", linewidth=0.6, zorder=0)
        left.set(title=_title(network), xlabel="step", ylabel="accuracy, %")
        left.legend(fontsize=7)
        right.axhline(0.0, color="0.85", linewidth=0.6, zorder=0)
        right.set(title="in a stage's window", xlabel="share of the window", ylabel="training accuracy - mean, %")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def accuracy_by_depth(results: Results, path: Path) -> None:
    """Mean and standard deviation over seeds against depth, a panel for each of BNN and BWN."""
    pyplot = _pyplot()
    lines: dict[str, dict[tuple[str, str], list[tuple[int, list[float]]]]] = {}
    for cells in groups(results).values():
        cell = cells[0]
        if cell.method == "full_precision" or not cell.shortcuts:
            continue
        values = [results[one]["accuracy"] for one in cells]
        lines.setdefault(cell.binarize, {}).setdefault((cell.method, cell.order), []).append((cell.depth, values))
    figure, axes = pyplot.subplots(1, len(lines), figsize=(6 * len(lines), 4.5), squeeze=False)
    for axis, (binarize, methods) in zip(axes[0], lines.items(), strict=True):
        for shift, ((method, order), points) in enumerate(methods.items()):
            points = sorted(points)
            axis.errorbar(
                [depth + 0.3 * shift for depth, _ in points],  # apart, so that the bars can be told from each other
                [mean(values) for _, values in points],
                [stdev(values) if len(values) > 1 else 0.0 for _, values in points],
                color=COLOURS[method], linestyle=LINES.get(order, "-."), marker="o", capsize=3,
                label=_name(Cell(method, order=order)),
            )  # fmt: skip
        axis.set(title=binarize.upper(), xlabel="depth", ylabel="test accuracy, %")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def ordering(results: Results, path: Path) -> None:
    """Bars of the orders for each method and network, the seeds as points, the baselines as lines."""
    pyplot = _pyplot()
    networks = _networks(results)
    figure, axes = pyplot.subplots(1, len(networks), figsize=(3.8 * len(networks), 4.2), squeeze=False, sharey=True)
    for axis, (network, cells) in zip(axes[0], networks.items(), strict=True):
        methods = [method for method in LABELS if method.startswith("stompp") and method in {c.method for c in cells}]
        for place, method in enumerate(methods):
            for offset, order in zip((-0.27, 0.0, 0.27), ORDERS, strict=True):
                values = [results[cell]["accuracy"] for cell in cells if (cell.method, cell.order) == (method, order)]
                if values:
                    hatch = {"forward": "", "global": "..", "reverse": "//"}[order]
                    axis.bar(place + offset, mean(values), 0.25, color=COLOURS[method], alpha=0.6, hatch=hatch)
                    axis.plot([place + offset] * len(values), values, "k.", markersize=4)
                    axis.annotate(order, (place + offset, 1), ha="center", rotation=90, fontsize=8)
        for method in BASELINES:
            values = [results[cell]["accuracy"] for cell in cells if cell.method == method]
            if values:
                axis.axhline(mean(values), color=COLOURS[method], linewidth=1, label=LABELS[method])
                axis.legend(fontsize=7)
        axis.set_xticks(range(len(methods)), [LABELS[method] for method in methods], fontsize=7)
        axis.set(title=_title(network))
    axes[0, 0].set_ylabel("test accuracy, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def gradient_flow(results: Results, path: Path, shortcuts: bool = True) -> bool:
    """Forward beside reverse, STE-free BNN: gradient norm by layer and time (white: none), share of the severed."""
    both = [
        cell
        for cell in results
        if (cell.method, cell.binarize, cell.order, cell.shortcuts) == ("stompp", "bnn", "forward", shortcuts)
        and replace(cell, order="reverse") in results and results[cell]["gradient_flow"]["step"]
    ]  # fmt: skip
    if not both:
        return False
    pyplot = _pyplot()
    forward = max(both, key=lambda cell: (cell.depth, -cell.seed))
    figure, axes = pyplot.subplots(
        2, 2, figsize=(12, 8), sharex="col", height_ratios=[3, 1], layout="constrained", squeeze=False
    )
    norms = {}
    for order in ("forward", "reverse"):
        record = results[replace(forward, order=order)]["gradient_flow"]
        norms[order] = np.ma.log10(np.ma.masked_equal(np.array(record["norm"], dtype=float).T, 0.0))
    low, high = (pick([pick(values) for values in norms.values()]) for pick in (np.ma.min, np.ma.max))
    for column, (order, values) in enumerate(norms.items()):
        record = results[replace(forward, order=order)]["gradient_flow"]
        steps = record["step"]
        image = axes[0, column].pcolormesh(
            steps, range(1, len(values) + 1), values, vmin=low, vmax=high, shading="nearest"
        )
        axes[0, column].set(title=f"{_title(('bnn', forward.depth, forward.shortcuts))}, {order}")
        axes[0, column].set_ylabel("binary layer, input to output")
        # Forward, all that is upstream is frozen and wants no gradient; the second curve leaves out what is frozen.
        axes[1, column].plot(steps, record["blocked_upstream"], "k:", label="of all upstream of the transition")
        axes[1, column].plot(steps, record["starved"], color="tab:red", label="of all that is not frozen yet")
        axes[1, column].set(ylim=(-0.03, 1.03), xlabel="step", ylabel="share of entries\nwithout gradient")
        axes[1, column].legend(fontsize=8)
    figure.colorbar(image, ax=axes[0], label="log10 of the gradient's norm")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def write_plots(folder: Path) -> list[Path]:
    """Draw what the finished cells allow, and return the files."""
    results = read(folder)
    if not results:
        raise SystemExit(f"{folder} has no finished cell.")
    results = _usual(results)
    target = folder / "plots"
    drawings = {
        "accuracy": accuracy_over_time,
        "depth": accuracy_by_depth,
        "ordering": ordering,
        "gradient_flow": gradient_flow,
        "gradient_flow_no_shortcuts": partial(gradient_flow, shortcuts=False),
    }
    _pyplot()
    target.mkdir(exist_ok=True)
    paths = {target / f"{name}.png": draw for name, draw in drawings.items()}
    return [path for path, draw in paths.items() if draw(results, path) is not False]


if __name__ == "__main__":
    print("\n".join(map(str, write_plots(Path(sys.argv[1])))))
