"""The tables of a comparison, as text in cells, and their forms: Markdown and the terminal's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as RichTable

from ranker.compare.bootstrap import COMPARED, Difference
from ranker.compare.cost import MethodCost
from ranker.compare.protocol import Protocol
from ranker.compare.results import Estimate, Results, RowResult
from ranker.evaluation.metrics import Task
from ranker.evaluation.report import METRICS

NONE = "–"
TITLES = {
    "auc": "AUC", "uauc": "UAUC", "wuauc": "WUAUC", "logloss": "log loss", "ne": "NE", "calibration": "calibration",
}  # fmt: skip
LEGEND = (
    "±: sample standard deviation over seeds. Δ: difference from the baseline with its 95 % interval over users; "
    "(*) where that excludes 0, * where the seeds, too, tell it from 0 (Welch's t-test, 5 %; one seed tells nothing)."
)
BRIEFLY = ("dataset", "measured", "budget", "batch", "widths", "seeds", "not finished", "machine")
"""what a README tells of the protocol"""
_COSTS = "Cost alone: encode a request, read a candidate, memory a user"
_DECIDES = "Clicks (CTR), and cost: encode a request, read a candidate, memory a user, candidates trained"
_REFERENCES = {"item_rate": "item rate", "user_item_logit": "user + item"}


class Table(NamedTuple):
    """Cells as text; the first `labels` columns are words, the others numbers."""

    title: str
    header: list[str]
    labels: int
    rows: list[list[str]]


Column = tuple[str, Callable[[RowResult], str]]


def short_table(results: Results) -> Table:
    """What decides: quality of clicks, and cost."""
    return _table(_DECIDES, results, [*_quality(), *_cost()])


def terminal_tables(results: Results) -> list[Table]:
    """The same in two, which fit into 80 columns."""
    return [_table("Clicks (CTR)", results, _quality()), _table(_COSTS, results, _cost())]


def _quality() -> list[Column]:
    return [_metric("ctr", "auc"), _delta("ctr", "auc"), _metric("ctr", "uauc"), _metric("ctr", "logloss")]


def _cost() -> list[Column]:
    return [
        ("encode, ms", lambda r: encode_ms(r.cost)),
        ("read, µs", lambda r: read_us(r.cost)),
        ("memory, KiB", lambda r: memory_kib(r.cost)),
        ("training, 1/s", lambda r: count(r.training["candidates_per_s"])),
    ]


def task_tables(results: Results) -> list[Table]:
    """Every metric of every task, with what reads no sequence and the oracle."""
    tables: list[Table] = []
    for task in results.tasks:
        columns = [_metric(task, name) for name in METRICS] + [_delta(task, name) for name in COMPARED]
        table = _table(task.upper(), results, columns)
        blank = [NONE] * (table.labels - 1)
        for name, metrics in results.references.items():
            found: Mapping[str, float | None] = metrics.get(task) or {}
            values = [NONE if (value := found.get(metric)) is None else f"{value:.4f}" for metric in METRICS]
            table.rows.append([_REFERENCES.get(name, name), *blank, *values, *[NONE] * len(COMPARED)])
        tables.append(table)
    return tables


def training_table(results: Results) -> Table:
    """What training cost."""
    columns: list[Column] = [
        ("dense parameters", lambda r: count(r.training["dense_parameters"])),
        ("table parameters", lambda r: count(r.training["table_parameters"])),
        ("steps", lambda r: count(r.training["total_steps"])),
        ("candidates/s", lambda r: count(r.training["candidates_per_s"])),
        ("peak RSS, MiB", lambda r: count(r.training["peak_rss_bytes"], 2**20)),
    ]
    return _table("Training", results, columns)


def cost_table(results: Results) -> Table:
    """What methods cost as histories grow."""
    rows = [
        [name, f"{cost.length:,}", encode_ms(cost), read_us(cost), blocks_us(cost), memory_kib(cost)]
        for name, costs in results.costs.items()
        for cost in costs
    ]
    header = ["method", "events", "encode, ms", "read, µs", "of it blocks, µs", "memory, KiB"]
    return Table(f"{_COSTS}, as histories grow", header, 1, rows)


def all_tables(results: Results) -> list[Table]:
    """In the order of a report."""
    return [short_table(results), *task_tables(results), training_table(results), cost_table(results)]


def _metric(task: Task, name: str) -> Column:
    return TITLES[name], lambda r: estimate(r.tasks[task][name])


def _delta(task: Task, name: str) -> Column:
    return f"Δ {TITLES[name]}", lambda r: delta(r.differences.get((task, name)), len(r.runs))


def _table(title: str, results: Results, columns: Sequence[Column]) -> Table:
    """One line a row, with its method, length and swept values."""
    keys = list(dict.fromkeys(key for result in results.rows for key, _ in result.row.sweep))
    rows: list[list[str]] = []
    for result in results.rows:
        swept = dict(result.row.sweep)
        values = [_plain(swept[key]) if key in swept else NONE for key in keys]
        finished = len(result.runs)
        less = f" ({finished} of {results.seeds} seeds)" if finished < results.seeds else ""
        rows.append(
            [result.row.method + less, result.row.shown_length, *values, *(cell(result) for _, cell in columns)]
        )
    titles = [title for title, _ in columns]
    return Table(title, ["method", "L", *keys, *titles], 2 + len(keys), rows)


def _plain(value: str) -> str:
    decoded: Any = json.loads(value)
    return decoded if isinstance(decoded, str) else value


def estimate(found: Estimate) -> str:
    """mean ± deviation."""
    if found.mean is None:
        return NONE
    return f"{found.mean:.4f}" if found.sd is None else f"{found.mean:.4f} ± {found.sd:.4f}"


def delta(found: Difference | None, seeds: int) -> str:
    """value [low, high], with the marks of the legend; and of how many seeds it is, where the row itself has more."""
    if found is None:
        return NONE
    mark = " *" if found.real else " (*)" if found.excludes_zero else ""
    less = f" ({found.seeds} of {seeds} seeds)" if found.seeds < seeds else ""
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]{mark}{less}"


def count(found: Estimate, unit: int = 1) -> str:
    """A mean in whole units."""
    return NONE if found.mean is None else f"{found.mean / unit:,.0f}"


def encode_ms(cost: MethodCost | None) -> str:
    """Milliseconds, – where there is nothing to encode."""
    return NONE if cost is None or not cost.encode_us else _digits(cost.encode_us / 1000)


def read_us(cost: MethodCost | None) -> str:
    """Microseconds."""
    return NONE if cost is None else _digits(cost.read_us)


def blocks_us(cost: MethodCost) -> str:
    """The same without DIN; – where there is no block."""
    blocks = [part.read_us for part in cost.parts if part.part != "DIN"]
    return _digits(sum(blocks)) if blocks else NONE


def memory_kib(cost: MethodCost | None) -> str:
    """KiB."""
    return NONE if cost is None else _digits(cost.memory_bytes / 1024)


def _digits(value: float) -> str:
    """Three digits are more than a timing has."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(table: Table) -> str:
    """A Markdown table; numbers to the right."""
    marks = ["---" if i < table.labels else "---:" for i in range(len(table.header))]
    lines = [table.header, marks, *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown_brief(results: Results, protocol: Protocol) -> str:
    """For a README: the short table, and how it was made in a paragraph."""
    told = "; ".join(f"{key}: {protocol[key]}" for key in BRIEFLY if key in protocol)
    return f"{markdown(short_table(results))}\n\n{LEGEND} {told[0].upper()}{told[1:]}.\n"


def markdown_short(results: Results, protocol: Protocol) -> str:
    """The short table, and the protocol line by line."""
    return f"{markdown(short_table(results))}\n\n{LEGEND}\n\n{_lines(protocol)}"


def markdown_long(results: Results, protocol: Protocol) -> str:
    """Every table, and the protocol line by line."""
    tables = "\n\n".join(f"**{table.title}**\n\n{markdown(table)}" for table in all_tables(results))
    return f"{tables}\n\n{LEGEND}\n\n{_lines(protocol)}"


def _lines(protocol: Protocol) -> str:
    return "".join(f"- {key}: {value}\n" for key, value in protocol.items())


def rich_table(table: Table) -> RichTable:
    """For a terminal; a deviation or interval stands below its mean, long names take two lines, no number is cut."""
    shown = RichTable(title=table.title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, title in enumerate(table.header):
        number = i >= table.labels
        shown.add_column(title, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in table.rows:
        shown.add_row(*(cell.replace(" ± ", "\n± ").replace(" [", "\n[") for cell in row))
    return shown
