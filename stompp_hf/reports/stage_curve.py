"""What a model is worth after each stage: one run freezes stage by stage, and each stage's end could ship."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..method.windows import stage_edges
from ..surgery.members import get_plan
from .drawing import draw_line, label_ends, new_figure
from .run_plots import titled
from .runs import STAGES, Run
from .summary import Row, summary

MB = 1e6


@dataclass
class StagePoint:
    """The model with its first `frozen` stages 1-bit, and the rest real.

    name: of the last one, empty for none; bytes: of its tensors after `pack_model`; share_1bit: of its
    multiply-accumulates, those of two 1-bit operands, from 0 to 1; None where they could not be counted.
    """

    frozen: int
    name: str
    bytes: int
    share_1bit: float | None


def stage_curve(model: nn.Module, example_inputs: Any = None) -> list[StagePoint]:
    """Size and 1-bit share of a binarized model after each of its stages, from none to the last that freezes.

    Args:
        model: a binarized model, at any step of its run.
        example_inputs: as for `summary`.

    Raises:
        NotBinarizedError: there is no plan.
    """
    plan, rows = get_plan(model), summary(model, example_inputs, depth="module").modules
    macs = sum((row.macs_1bit or 0) + (row.macs_real or 0) for row in rows)

    def frozen_by(row: Row, frozen: int) -> bool:
        return bool(row.stages) and row.stages[0] <= frozen

    points = []
    for frozen, name in enumerate(["", *plan.stage_names[: plan.freezing]]):
        done = [frozen_by(row, frozen) or not row.stages for row in rows]
        # What stays real is stored as it is trained, with its scales and thresholds.
        size = sum(r.packed if is_done else max(r.float32, r.stored) for r, is_done in zip(rows, done, strict=True))
        share = sum(row.macs_final or 0 for row in rows if frozen_by(row, frozen)) / macs if macs else None
        points.append(StagePoint(frozen, name, size, share))
    return points


def record_stages(folder: str | Path, model: nn.Module, example_inputs: Any = None) -> Path:
    """Write `stage_curve` into a run's folder, for `report`. Call it on the first process."""
    return write_stages(folder, stage_curve(model, example_inputs))


def write_stages(folder: str | Path, points: Iterable[StagePoint]) -> Path:
    """The same, of what `stage_curve` gave."""
    path = Path(folder) / STAGES
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"stages": [asdict(point) for point in points]}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def values_of(run: Run) -> list[tuple[StagePoint, float]]:
    """What the run's main metric was at the end of each stage, where it was evaluated there, and when all had ended."""
    if run.main_metric is None:
        return []
    values = dict(zip(*run.series(run.main_metric), strict=True))
    points = {point.frozen: point for stage in run.stages if (point := _point(stage)) is not None}
    edges = stage_edges(inside for _, inside in run.stage_windows())
    return [(points[frozen], values[step]) for step, frozen in edges.items() if frozen in points and step in values]


def _point(stage: dict[str, Any]) -> StagePoint | None:
    """One stage of a file; None where it is damaged."""
    point = StagePoint(*(stage.get(field.name) for field in fields(StagePoint)))  # type: ignore[arg-type]
    numbers = (point.frozen, point.bytes, 0.0 if point.share_1bit is None else point.share_1bit)
    return point if all(isinstance(number, (int, float)) for number in numbers) else None


def draw_curve(runs: Sequence[Run]) -> Any:
    """The metric at the end of each stage, above bytes and above the 1-bit share. None if nothing of it is known."""
    found = [(run, pairs) for run in runs if (pairs := values_of(run))]
    if not found:
        return None
    panels = [("packed size in MB, fewer stages to the right", lambda point: point.bytes / MB)]
    if all(point.share_1bit is not None for _, pairs in found for point, _ in pairs):
        panels.append(("share of the multiply-accumulates that are 1-bit", lambda point: point.share_1bit))
    figure, axes = new_figure(len(panels), 1, 2.6 * len(panels) + 0.4)
    for axis, (label, across) in zip(axes[:, 0], panels, strict=True):
        for index, (_, pairs) in enumerate(found):
            draw_line(axis, [across(point) for point, _ in pairs], [value for _, value in pairs], index, marker="o")
        axis.set(xlabel=label, ylabel=titled(found[0][0].main_metric or ""))
        axis.margins(y=0.1)
        label_ends(axis, [(run.name, pairs[-1][1]) for run, pairs in found], 0.09)
    return figure
