"""One self-contained HTML file about one or several runs: configuration, summary, pictures, metrics, what made them."""

import base64
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from ..checkpoints.inspection import Inspection, inspect
from ..config import StoMPPConfig
from ..errors import ExtraError, RunError, StoMPPError
from ..trainer.resuming import checkpoints
from . import run_plots as plots
from .drawing import save, to_png
from .runs import Run, read_run, versions
from .stage_curve import draw_curve
from .weight_plots import weights

logger = logging.getLogger(__name__)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; max-width: 1500px; margin: 0 auto; padding: 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #bbb; }
.scroll { overflow-x: auto; } .runs { display: grid; gap: 1.5em; grid-auto-flow: column;
  grid-auto-columns: minmax(min(100%, 480px), 1fr); overflow-x: auto; }
figure { margin: 0 0 1.2em; } figcaption { color: #444; font-size: .9em; max-width: 800px; }
img { width: 100%; max-width: 800px; height: auto; display: block; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25em .8em; border-bottom: 1px solid #ddd;
  vertical-align: top; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr.differs th::after { content: " \\2260"; } tr.differs { background: #eef3f9; }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; font-size: .85em; }
.note { border-left: 4px solid #08306b; background: #f0f4f9; padding: .4em .8em; margin: .4em 0; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself refuses to fetch anything for this page."""

CAPTIONS = {
    "progress": "Held-out metric and loss, over the share of every stage that is frozen. Thin lines: edges of the "
    "stages' windows.",
    "compare": "The runs in one picture.",
    "curve": "Where to stop: what the model is worth at the end of each stage, and what it would take if packed there.",
    "metrics": "Numbers logged with the loss.",
    "weights": "Latent weights before and after, by stage.",
    "stompp_grad_norm": "Gradient that reaches the binary weights of every stage.",
}


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """A table with a column a run; rows whose values differ are marked."""
    lines = [f"<tr><th></th>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    for name, values in rows:
        texts = [_text(value) for value in values]
        mark = ' class="differs"' if len(set(texts)) > 1 else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        lines.append(f"<tr{mark}><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>' if len(lines) > 1 else "<p>Nothing known.</p>"


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _merged(groups: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Rows of several dictionaries side by side."""
    names = list(dict.fromkeys(name for group in groups for name in group))
    return [(name, [group.get(name) for group in groups]) for name in names]


def _glance(run: Run, found: Inspection | None) -> dict[str, Any]:
    """The numbers that a run is judged by."""
    metric, plan = run.main_metric, run.plan
    rows: dict[str, Any] = {"steps": f"{run.step:,} of {run.max_steps:,}" if run.max_steps else None}
    if plan is not None:
        config = plan.config
        rows |= {
            "binarize": config.binarize,
            "order": config.order,
            "frozen gradient": config.frozen_gradient,
            "binary layers": len(plan.of_kind("layer")),
            "stages": plan.stage_count,
            "stages frozen": _frozen_stages(run),
        }
    if metric:
        steps, values = run.series(metric)
        first = min(run.edges, default=0)
        before = [value for step, value in zip(steps, values, strict=True) if step <= first]
        name = plots.titled(metric)
        rows[f"{name} before the first stage froze"] = before[-1] if before else None
        rows[f"{name} at the end"] = run.metrics.get(metric, values[-1] if values else None)
    losses = run.series("loss")[1]
    rows["training loss at the end"] = losses[-1] if losses else None
    if found is not None:
        rows["bytes on disk"] = found.total
        rows["bytes as plain float32"] = found.as_float32
        rows["format"] = "packed" if found.plan.packed else "training (latent weights)"
    return rows


def _frozen_stages(run: Run) -> str | None:
    stages = run.stage_windows()
    if not stages:
        return None
    return f"{sum(all(w.end <= run.step for w in inside) for _, inside in stages)} of {len(stages)}"


def _inspected(run: Run) -> Inspection | None:
    if run.home is None or run.plan is None:
        return None
    try:
        return inspect(run.home)
    except Exception as error:  # it builds a model of any class, from a file that may be damaged in any way
        run.notes.append(f"The model in {run.home} could not be inspected: {error}")
        return None


def _model(run: Run, found: Inspection | None) -> str:
    """What `inspect` says; where it cannot, the stages, and what stayed real and why."""
    if found is not None:
        return f"<pre>{escape(str(found))}</pre>"
    if run.plan is None:
        return "<p>Not known.</p>"
    lines = [f"stage {number} {name}" for number, name in enumerate(run.plan.stage_names, 1)]
    lines += [f"real: {name}: {reason}" for name, reason in run.plan.left.items()]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _weights(run: Run, before: Path | None) -> Any:
    """Histograms of the earliest checkpoint (or `before`) and the latest model; None where there are not two."""
    early = [path for path in checkpoints(run.folder) if path != run.home] if run.folder else []
    start = before or next(iter(early), None)
    if start is None or run.home is None or run.plan is None or run.plan.packed:
        return None
    return weights(start, run.home)


def _draw(run: Run, before: Path | None) -> dict[str, Any]:
    """The pictures of a run by name; one that cannot be drawn becomes a note.

    Raises:
        ExtraError: matplotlib is missing.
    """
    drawings: dict[str, Callable[[], Any]] = {"progress": lambda: plots.progress(run)}
    for metric in plots.stage_metrics(run):
        drawings[metric] = lambda metric=metric: plots.by_stage(run, metric)  # type: ignore[misc]
    drawings["curve"] = lambda: draw_curve([run])
    drawings |= {"metrics": lambda: plots.metrics(run), "weights": lambda: _weights(run, before)}
    found = {}
    for name, draw in drawings.items():
        try:
            found[name] = draw()
        except ExtraError:
            raise
        except StoMPPError as error:
            run.notes.append(f"No picture of {name}: {error}")
    if "stompp_grad_norm" not in found:
        run.notes.append("No gradient norms by stage were logged; add GradientNormCallback() to the callbacks.")
    if found.get("weights", True) is None:
        run.notes.append("No weight histograms: they need an earlier checkpoint (save_strategy), or --before FOLDER.")
    return {name: figure for name, figure in found.items() if figure is not None}


def _picture(figure: Any, name: str, run: str) -> str:
    data = base64.b64encode(to_png(figure)).decode()
    caption = escape(CAPTIONS.get(name, f"{plots.titled(name)}, by stage."))
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption} ({escape(run)})">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _columns(runs: Sequence[Run], cells: Sequence[str]) -> str:
    """One column a run, under its name."""
    parts = [f"<div><h3>{escape(run.name)}</h3>{cell}</div>" for run, cell in zip(runs, cells, strict=True)]
    return f'<div class="runs">{"".join(parts)}</div>'


def _origin(run: Run) -> dict[str, Any]:
    words = run.record.get("command")
    command = shlex.join(map(str, words)) if isinstance(words, list) else None
    return {"command": command, "started": run.record.get("started")}


def _group(run: Run, key: str) -> dict[str, Any]:
    found = run.record.get(key)
    return found if isinstance(found, dict) else {}


def _distinguish(runs: Sequence[Run]) -> None:
    """Folders of equal names are named with their parents."""
    count = 1
    while len({run.name for run in runs}) < len(runs) and count < 20:
        count += 1
        for run in runs:
            run.name = "/".join(run.folder.resolve().parts[-count:]) if run.folder else run.name


def render(runs: Sequence[Run], before: Path | None = None, pictures: Path | None = None) -> str:
    """The HTML text of a report; `pictures` also gets every picture as a PNG file. See `write_report`."""
    names = [run.name for run in runs]
    found = [_inspected(run) for run in runs]
    drawn: list[dict[str, Any]] = [{} for _ in runs]
    together: dict[str, Any] = {}
    missing = ""
    try:
        drawn = [_draw(run, before) for run in runs]
        if len(runs) > 1:
            every = {"compare": plots.compare(runs), "curve": draw_curve(runs)}
            together = {name: figure for name, figure in every.items() if figure is not None}
    except ExtraError as error:
        missing = f'<p class="note">{escape(str(error))}</p>'
        logger.warning("%s", error)
    if pictures is not None:
        for run, figures in zip(runs, drawn, strict=True):
            folder = pictures / run.name if len(runs) > 1 else pictures
            for name, figure in figures.items():
                save(figure, folder / f"{name.removeprefix(plots.OWN)}.png")
        for name, figure in together.items():
            save(figure, pictures / f"{name}.png")
    for run in runs:
        for note in dict.fromkeys(run.notes):
            logger.warning("%s: %s", run.name, note)
    notes = [
        "".join(f'<p class="note">{escape(note)}</p>' for note in dict.fromkeys(run.notes)) or "<p>None.</p>"
        for run in runs
    ]
    shared = "".join(_picture(figure, name, "all") for name, figure in together.items())
    images = [
        "".join(_picture(figure, name, run.name) for name, figure in figures.items()) or "<p>None.</p>"
        for run, figures in zip(runs, drawn, strict=True)
    ]
    configs = [run.plan.config.to_dict() if run.plan is not None else {} for run in runs]
    default = StoMPPConfig().to_dict()
    told = [{k: v for k, v in config.items() if any(c.get(k) != default.get(k) for c in configs)} for config in configs]
    models = [_model(run, one) for run, one in zip(runs, found, strict=True)]
    title = f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs side by side"
    sections = [
        ("At a glance", _table(names, _merged([_glance(*pair) for pair in zip(runs, found, strict=True)]))),
        ("Notes", _columns(runs, notes)),
        ("Pictures", missing + shared + _columns(runs, images)),
        ("Final metrics", _table(names, _merged([run.metrics for run in runs]))),
        (
            "Configuration",
            f"<p>Options of StoMPPConfig that are not at their default:</p>{_table(names, _merged(told))}"
            f"<details><summary>All options</summary>{_table(names, _merged(configs))}</details>",
        ),
        ("Model", _columns(runs, models)),
        (
            "What made it",
            _table(names, _merged([_origin(run) for run in runs]))
            + f"<h3>Versions</h3>{_table(names, _merged([_group(run, 'versions') for run in runs]))}"
            + f"<h3>Options of the run</h3>{_table(names, _merged([_group(run, 'options') for run in runs]))}",
        ),
    ]
    body = "".join(f"<h2>{heading}</h2>{content}" for heading, content in sections)
    made = f"{shlex.join(['python', *sys.argv])}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, " + ", ".join(
        f"{name} {version}" for name, version in versions().items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{body}<footer><p>Report: {escape(made)}</p></footer></body></html>\n"
    )


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, before: str | Path | None = None,
    pictures: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write one HTML file about runs, side by side; it needs no network and holds no script.

    Nothing in the folders is unpickled or executed. What is missing or damaged is said in the report and logged as a
    warning; without matplotlib the report has no pictures.

    Args:
        folders: Trainer output folders, or checkpoint folders.
        out: the file; by default report.html in the first folder.
        before: a checkpoint folder with the weights before training, for the histograms; by default each run's
            earliest checkpoint.
        pictures: a folder that gets the pictures as PNG files too.

    Returns:
        The path of the file.

    Raises:
        RunError: a folder holds no run, or the file cannot be written.
    """
    if not folders:
        raise RunError("write_report needs at least one folder: write_report([output_dir]).")
    runs = [read_run(folder) for folder in folders]
    _distinguish(runs)
    path = Path(out) if out is not None else Path(folders[0]) / "report.html"
    try:
        text = render(runs, Path(before) if before else None, Path(pictures) if pictures else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise RunError(f"the report cannot be written to {path}: {error}. Choose another file with --out.") from error
    return path
