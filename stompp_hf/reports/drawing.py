"""What every picture shares: matplotlib, asked for late; one hue from light to dark; labels at the lines themselves.

Pictures are 8 inches wide and 100 dots an inch, so that a README's 800 pixels show them as they were drawn. Nothing is
told by hue alone: lines differ in style, marker and darkness, and carry their names; maps run from light to dark.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExtraError

WIDTH, DPI = 8.0, 100
STYLE = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
DARK, MIDDLE, LIGHT = "#08306b", "#4a7fb5", "0.55"
LINES = (
    {"color": "black", "linestyle": "-", "marker": "o"}, {"color": MIDDLE, "linestyle": "--", "marker": "s"},
    {"color": "0.5", "linestyle": ":", "marker": "^"}, {"color": DARK, "linestyle": "-.", "marker": "D"},
    {"color": MIDDLE, "linestyle": "-", "marker": "v"}, {"color": "black", "linestyle": "--", "marker": "x"},
)  # fmt: skip
NO_VALUE = {"facecolor": "white", "edgecolor": "0.75", "hatch": "////"}
"""What stands where a map has nothing to show."""
NAMED_ROWS = 14
"""Rows of a map that are named at most: an even choice of them."""


def new_figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, apart from pyplot: no window, no backend, nothing to close.

    Raises:
        ExtraError: matplotlib is missing; the message names the extra.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtraError("Pictures need matplotlib: pip install 'stompp-hf[plots]'.") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def to_png(figure: Any) -> bytes:
    """The picture as the bytes of a PNG file, of 256 colours: a third of the size, and nothing is lost to the eye."""
    from PIL import Image  # comes with matplotlib

    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return file.getvalue()


def save(figure: Any, path: str | Path) -> Path:
    """Write the picture to a file, in the format of its ending (.png, .svg, .pdf), and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(to_png(figure))
    else:
        figure.savefig(path)
    return path


def draw_line(axis: Any, x: Sequence[float], y: Sequence[float], index: int = 0, **changes: Any) -> None:
    """A line in the style of its index; markers only where there are few points."""
    style = {**LINES[index % len(LINES)], "markersize": 4, "linewidth": 1.4, "clip_on": False, **changes}
    if len(x) > 40:
        style["markevery"] = max(1, len(x) // 12)
    axis.plot(x, y, **style)


def label_ends(axis: Any, ends: Sequence[tuple[str, float]], gap: float) -> None:
    """Write the lines' names at their right ends, at least `gap` of the axis's height apart."""
    axis.get_ylim()  # settles the limits, which the transformation takes as they are
    shares = [axis.transAxes.inverted().transform(axis.transData.transform((0, value)))[1] for _, value in ends]
    places = sorted((share, name) for share, (name, _) in zip(shares, ends, strict=True))
    heights = [place for place, _ in places]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    if heights and heights[-1] > 1.0:  # too high: push the others down from the top
        heights[-1] = 1.0
        for index in reversed(range(len(heights) - 1)):
            heights[index] = min(heights[index], heights[index + 1] - gap)
    for height, (_, name) in zip(heights, places, strict=True):
        axis.annotate(
            cut(name), (1.01, height), xycoords="axes fraction", va="center", fontsize=9, annotation_clip=False
        )


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted beginning and end that all share, if that leaves more than a number."""
    parts = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return list(names)
    least = min(map(len, parts)) - 1
    head = next((i for i in range(least) if len({p[i] for p in parts}) > 1), least)
    tail = next((i for i in range(least - head) if len({p[-1 - i] for p in parts}) > 1), least - head)
    if any(p[head].isdecimal() for p in parts):
        head = max(0, head - 1)
    return [".".join(p[head : len(p) - tail]) for p in parts]


def cut(name: str, most: int = 28) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def draw_map(axis: Any, values: Any, edges: Sequence[float], names: Sequence[str], **options: Any) -> Any:
    """A map of rows (named, top down) over columns between `edges`; masked cells are hatched."""
    axis.patch.set(**NO_VALUE)
    rows = np.arange(len(names) + 1)
    image = axis.pcolormesh(np.asarray(edges), rows, np.ma.masked_invalid(values), cmap="Blues", **options)
    axis.set_ylim(len(names), 0)
    chosen, short = range(0, len(names), -(-len(names) // NAMED_ROWS)), short_names(names)
    axis.set_yticks([row + 0.5 for row in chosen], [cut(short[row]) for row in chosen], fontsize=9)
    return image
