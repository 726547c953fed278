"""A summary as text, as Markdown, and as a table of rich."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .summary import Summary

HEADER = (
    *("module", "kind", "shape", "W bits", "A bits", "parameters", "bytes"),
    *("1-bit MACs", "real MACs", "stage", "state", "frozen"),
)
_TEXTS = ("module", "kind", "state")
"""Columns that begin at the left; numbers end at the right."""


def _short(number: float | None) -> str:
    """A number with three digits and k, M, G or T; "-" for none, which was not counted."""
    if number is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f} times"


def cells(summary: "Summary") -> list[list[str]]:
    """The rows in words, in the order of HEADER."""
    found = []
    for row in summary.rows:
        shape = "" if row.shape is None else "x".join(map(str, row.shape))
        bits = ["/".join(map(str, bits)) for bits in (row.weight_bits, row.activation_bits)]
        numbers = [_short(n) for n in (row.parameters, row.stored, row.macs_1bit, row.macs_real)]
        stages = "" if not row.stages else "-".join(map(str, sorted({row.stages[0], row.stages[-1]})))
        frozen = "" if row.frozen is None else f"{row.frozen:.0%}"
        found.append([row.name, row.kind, shape, *bits, *numbers, stages, row.state, frozen])
    return found


def lines(summary: "Summary") -> list[str]:
    """What the rows add up to, and what stayed real and why."""
    totals, ratios = summary.totals, summary.totals.ratios
    share = totals.binary / max(1, totals.parameters)
    found = [
        f"{totals.parameters:,} parameters, {totals.binary:,} of them binary ({share:.1%})"
        + ("" if totals.frozen is None else f", {totals.frozen:.1%} of these frozen"),
        f"{totals.stored:,} bytes as stored; the plain model in float32: {totals.float32:,}, "
        f"{_times(ratios['compression'])} as many",
    ]
    if totals.packed != totals.stored:
        found.append(
            f"{totals.packed:,} bytes after pack_model; the plain model in float32: "
            f"{_times(ratios['packed_compression'])} as many"
        )
    if totals.macs is None:
        found.append("multiply-accumulates were not counted: pass example_inputs=... one small batch")
    else:
        final = "" if totals.macs_final == totals.macs_1bit else f", {_percent(ratios['share_final'])} once frozen"
        found.append(
            f"{totals.macs:,} multiply-accumulates ({summary.inputs}): {totals.macs_1bit:,} 1-bit "
            f"({_percent(ratios['share_1bit'])}{final}), {totals.macs_real:,} real"
        )
    for real in summary.real():
        what = ", ".join(real.names) if len(real.names) < 3 else f"{len(real.names)} {real.kind}"
        numbers = [(real.parameters, "parameters"), (real.macs, "MACs")]
        counted = "".join(f", {_short(number)} {of}" for number, of in numbers if number)
        found.append(f"real: {what}{counted}: {real.reason}")
    return found


def as_text(summary: "Summary") -> str:
    """Columns in line, then the totals."""
    table = [list(HEADER), *cells(summary)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    text = [
        "  ".join(
            cell.ljust(width) if title in _TEXTS else cell.rjust(width)
            for cell, width, title in zip(row, widths, HEADER, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join([summary.model, *text, "", *lines(summary)])


def as_markdown(summary: "Summary") -> str:
    """A table and a list."""
    rules = ["---" if title in _TEXTS else "---:" for title in HEADER]
    table = [f"| {' | '.join(row)} |" for row in (list(HEADER), rules, *cells(summary))]
    return "\n".join([f"**{summary.model}**", "", *table, "", *(f"- {line}" for line in lines(summary))])


def as_rich(summary: "Summary") -> Any:
    """A table of rich with the totals behind it; weak where a row is real, strong where it is 1-bit."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=summary.model)
    for title in HEADER:
        left = title in _TEXTS
        table.add_column(title, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    for row, words in zip(summary.rows, cells(summary), strict=True):
        style = {"real": "dim", "frozen": "bold", "packed": "bold"}.get(row.state)
        table.add_row(*map(Text, words), style=style)
    return Group(table, *map(Text, lines(summary)))
