"""The report on a terminal or in a log."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from features.semantic_ids.report.figures import LeafReport, LevelReport, PrefixAgreement, SidsReport

_UNDEFINED = "–"


def render(report: SidsReport) -> list[Table | Text]:
    """The report as lines and tables for a console; in a log, which has no colours, they are plain text."""
    parts: list[Table | Text] = [
        _title(
            f"{report.name}: {report.items:,} items with content, {report.items_without_content:,} without; "
            f"{report.distinct_vectors:,} different vectors, {report.duplicates:,} items share theirs"
        ),
        _level_table(report.levels),
        Text(_leaf_line(report.leaves)),
    ]
    if (near := report.neighbours) is not None:
        among = "all items" if near.items == near.items_in_all else f"{near.items:,} of {near.items_in_all:,} items"
        parts.append(_title(f"{near.neighbours} nearest neighbours, sought among {among}: same prefix"))
        parts.append(_prefix_table(near.prefixes))
    for found in report.columns:
        sample = f"; AMI on {found.ami_items:,} of them" if found.ami_items < found.items else ""
        unknown = f", {found.unknown:,} unknown" if found.unknown else ""
        parts.append(_title(f"{found.column}: same value within a prefix; {found.items:,} items{unknown}{sample}"))
        parts.append(_prefix_table(found.prefixes, found.ami))
    if (near := report.cooccurrence) is not None:
        title = (
            f"events at most {near.window} apart: same prefix; {near.events:,} training events, {near.pairs:,} pairs"
        )
        if near.events_without_code:
            title += f", {near.events_without_code:,} events of {near.items_without_code:,} items without code left out"
        parts.append(_title(title))
        parts.append(_prefix_table(near.prefixes))
    parts += [Text(f"Warning: {text}", style="yellow") for text in report.warnings]
    return parts


def _title(text: str) -> Text:
    """Above a table, not its own title, which would be broken to the table's width."""
    return Text("\n" + text, style="bold")


def _level_table(levels: list[LevelReport]) -> Table:
    table = _table(["level", "codes", "used", "dead", "perplexity", "largest", "error"])
    for level in levels:
        table.add_row(
            str(level.level),
            f"{level.codes:,}",
            f"{level.used:,}",
            f"{level.dead:.1%}",
            f"{level.perplexity:,.1f}",
            f"{level.largest:.1%}",
            _cell(level.error),
        )
    return table


def _leaf_line(leaves: LeafReport) -> str:
    return (
        "largest: share of items with the commonest code; error: share of the variance left after this level\n"
        f"{leaves.leaves:,} leaves; items per leaf: median {leaves.median:g}, p99 {leaves.p99:,}, max {leaves.max:,}; "
        f"{leaves.unique:.1%} of the items are alone in theirs"
    )


def _prefix_table(prefixes: list[PrefixAgreement], ami: list[float] | None = None) -> Table:
    table = _table(["prefix", "share", "by chance", "lift", *(["AMI"] if ami is not None else [])])
    for row, prefix in enumerate(prefixes):
        lift = _UNDEFINED if prefix.lift is None else f"{prefix.lift:,.2f}"
        cells = [str(prefix.length), _cell(prefix.share), _cell(prefix.chance), lift]
        table.add_row(*cells, *([_cell(ami[row])] if ami is not None else []))
    return table


def _table(columns: list[str]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return _UNDEFINED
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
