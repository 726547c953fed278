"""Pictures of a training run: what froze when, loss and accuracy above it, gradients by stage, and every other metric.

They take a `Run` (`read_run(output_dir)`, or `run_of(trainer)` in a notebook), need matplotlib (the extra `plots`), and
return a matplotlib Figure, or None where the run logged nothing of the kind. Each raises ExtraError without matplotlib.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..trainer.gradient_norms import GRADIENT_NORM
from .drawing import LIGHT, draw_line, draw_map, label_ends, new_figure
from .runs import Run

OWN = "stompp_"
COLUMNS = 400
"""Steps that the map of the frozen fraction shows at most; longer runs are sampled evenly."""
DECADES = 200.0
"""From this ratio of the largest to the smallest value on, an axis is logarithmic."""
THIN = {"marker": "", "color": LIGHT, "linestyle": "-"}
TITLES = {
    "stompp_flip_ratio": "flip ratio: share of frozen weights whose sign changed since the last record",
    "stompp_frozen_fraction": "frozen fraction of all binary weights",
    "grad_norm": "gradient norm over all parameters",
    "loss": "training loss",
    "eval_loss": "held-out loss",
}


def titled(key: str) -> str:
    """A logged number's name, in words."""
    words = key.removeprefix(OWN).removeprefix("eval_").replace("_", " ").replace("/", ": ")
    return TITLES.get(key, words)


def _mark_stages(run: Run, axes: Any) -> None:
    """Thin lines at the edges of the stages' windows, a dotted one where a run broke off; the whole run on the axis."""
    for axis in axes:
        for edge in run.edges:
            axis.axvline(edge, color="0.85", linewidth=0.7, zorder=0)
    end = max(run.total_steps, run.max_steps, run.step)
    if end:
        axes[-1].set_xlim(0, end)
    if 0 < run.step < run.max_steps:
        for axis in axes:
            axis.axvline(run.step, color="black", linewidth=1.0, linestyle=(0, (1, 1)))


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Room above and below; a logarithmic axis where values span decades, as the loss of an easy task does."""
    axis.margins(y=0.1)
    if min(values) > 0.0 and max(values) > DECADES * min(values):
        axis.set_yscale("log")


def _panel(
    axis: Any, title: str, lines: Sequence[tuple[str, list[float], list[float]]], gap: float, styles: Sequence[Any]
) -> None:
    """Lines (name, steps, values) with their names at their ends."""
    for index, ((_, steps, values), style) in enumerate(zip(lines, styles, strict=True)):
        if steps:
            draw_line(axis, steps, values, index, **style)
    axis.set_ylabel(title)
    _scale(axis, [value for _, _, values in lines for value in values])
    label_ends(axis, [(name, values[-1]) for name, _, values in lines if values], gap)


def _curves(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The panels above the map, of what was logged: their titles, the numbers in them and their labels."""
    metric = run.main_metric or ""
    panels = [
        (titled(metric), [(metric, "held-out"), (metric.replace("eval_", "eval_binary_", 1), "if all binary")]),
        ("loss", [("loss", "training"), ("eval_loss", "held-out")]),
    ]
    found = [(title, [(key, label) for key, label in pairs if run.series(key)[0]]) for title, pairs in panels]
    return [(title, pairs) for title, pairs in found if pairs]


def _draw_frozen(run: Run, axis: Any, figure: Any) -> None:
    """The map of the frozen fraction, stages top down in execution order; without a plan, the logged total."""
    if not run.freezes:
        steps, values = run.series("stompp_frozen_fraction")
        draw_line(axis, steps, values)
        axis.set(ylabel="frozen fraction", ylim=(-0.03, 1.03))
        return
    last = run.step or run.total_steps
    edges = sorted({round(last * column / COLUMNS) for column in range(COLUMNS + 1)})
    order = run.execution_order()
    names = [run.stage_windows()[stage][0] for stage in order]
    fractions = np.array(run.frozen_fractions(edges[:-1]))[order]
    image = draw_map(axis, fractions, edges, names, vmin=0.0, vmax=1.0)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.5, 1], aspect=12, pad=0.01)
    bar.set_label("frozen", fontsize=9)
    axis.set_ylabel("stage, input at the top", fontsize=9)


def progress(run: Run) -> Any:
    """Accuracy and loss above a map of what was frozen, stage by step: the saw-tooth, and what made each tooth.

    Thin lines are the edges of the stages' windows. The frozen fraction is that of the schedule, which the masks track
    at every step. None if there is neither a plan nor a log.
    """
    panels = _curves(run)
    has_map = run.freezes or bool(run.series("stompp_frozen_fraction")[0])
    if not panels and not has_map:
        return None
    heights = [1.5] * len(panels) + [min(3.2, 0.9 + 0.24 * len(run.stage_windows()))] * has_map
    figure, axes = new_figure(len(heights), 1, sum(heights) + 0.7, sharex=True, height_ratios=heights)
    for axis, (title, pairs) in zip(axes[: len(panels), 0], panels, strict=True):
        styles = [THIN if key == "loss" else {} for key, _ in pairs]
        _panel(axis, title, [(label, *run.series(key)) for key, label in pairs], 0.17, styles)
    if has_map:
        _draw_frozen(run, axes[-1, 0], figure)
    axes[-1, 0].set_xlabel("step")
    _mark_stages(run, axes[:, 0])
    if 0 < run.step < run.max_steps:
        axes[0, 0].set_title(f"the run ended at step {run.step} of {run.max_steps}", loc="left")
    return figure


def compare(runs: Sequence[Run]) -> Any:
    """The runs' accuracies in one panel, their training losses in another. None if nothing of it was logged."""
    keys = [next(filter(None, (run.main_metric for run in runs)), ""), "loss"]
    keys = [key for key in keys if any(run.series(key)[0] for run in runs)]
    if not keys:
        return None
    figure, axes = new_figure(len(keys), 1, 2.6 * len(keys) + 0.4, sharex=True)
    for axis, key in zip(axes[:, 0], keys, strict=True):
        _panel(axis, titled(key), [(run.name, *run.series(key)) for run in runs], 0.09, [{}] * len(runs))
    axes[-1, 0].set_xlabel("step")
    return figure


def stage_metrics(run: Run) -> dict[str, list[str]]:
    """The metrics that were logged stage by stage, `stompp_<metric>/<stage>`: by metric, the stages, input first."""
    found: dict[str, list[str]] = {}
    for key in run.keys(OWN):
        metric, slash, stage = key.partition("/")
        if slash:
            found.setdefault(metric, []).append(stage)
    known = [run.stage_windows()[stage][0] for stage in run.execution_order()]
    place = {name: index for index, name in enumerate(known)}
    return {metric: sorted(stages, key=lambda name: place.get(name, len(place))) for metric, stages in found.items()}


def by_stage(run: Run, metric: str) -> Any:
    """A map of one metric that was logged stage by stage, over time; each stage's window is framed.

    Norms are shown as log10, and hatched where they are 0: no gradient arrived. None if it was not logged.
    """
    stages = stage_metrics(run).get(metric, [])
    logged = [run.series(f"{metric}/{stage}") for stage in stages]
    steps = sorted({step for found, _ in logged for step in found})
    if not stages or not steps:
        return None
    values = np.full((len(stages), len(steps)), np.nan)
    column = {step: index for index, step in enumerate(steps)}
    for row, (found, numbers) in enumerate(logged):
        for step, number in zip(found, numbers, strict=True):
            values[row, column[step]] = number
    norm = "norm" in metric
    if norm:
        values = np.log10(values, out=np.full_like(values, np.nan), where=values > 0)
    figure, axes = new_figure(1, 1, min(4.5, 1.4 + 0.28 * len(stages)))
    axis = axes[0, 0]
    edges = [2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1.0, *steps]  # a record tells of the time before
    options = {} if np.isfinite(values).any() else {"vmin": 0.0, "vmax": 1.0}
    image = draw_map(axis, values, edges, stages, **options)
    name = "gradient norm" if metric == GRADIENT_NORM.rstrip("/") else titled(metric)
    figure.colorbar(image, ax=axis, pad=0.01, aspect=14).set_label(f"log10 of the {name}" if norm else name, fontsize=9)
    for name, inside in run.stage_windows():
        if name in stages:
            begin, end = min(w.begin for w in inside), max(w.end for w in inside)
            row = stages.index(name)
            axis.plot([begin, end, end, begin, begin], [row, row, row + 1, row + 1, row], color="black", linewidth=1.2)
    axis.set(xlabel="step", xlim=(max(0.0, edges[0]), max(edges[-1], run.total_steps)))
    axis.set_ylabel("stage, input at the top", fontsize=9)
    axis.set_title("framed: the stage's window" + ("; hatched: no gradient" if norm else ""), loc="left", fontsize=9)
    return figure


def metrics(run: Run) -> Any:
    """The flip ratio, and every other number that was logged with the loss, a panel each. None if there are none."""
    hidden = {"stompp_stage", "stompp_stage_fraction", "stompp_frozen_fraction"} if run.freezes else {"stompp_stage"}
    keys = ["stompp_flip_ratio", *run.keys(OWN), "grad_norm"]
    keys = list(dict.fromkeys(key for key in keys if key not in hidden and "/" not in key and run.series(key)[0]))
    if not keys:
        return None
    columns = 1 if len(keys) <= 4 else 2
    rows = -(-len(keys) // columns)
    figure, axes = new_figure(rows, columns, 1.35 * rows + 0.5, sharex=True)
    for axis, key in itertools.zip_longest(axes.flat, keys):
        if key is None:
            axis.set_visible(False)
            continue
        steps, values = run.series(key)
        draw_line(axis, steps, values, marker="")
        title = titled(key) if columns == 1 else titled(key).partition(":")[0]
        axis.set_title(title, loc="left", fontsize=9)
        _scale(axis, values)
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=min(0.0, *values))
        _mark_stages(run, [axis])
    for axis in axes[-1]:
        axis.set_xlabel("step")
    return figure
