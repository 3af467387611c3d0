"""``report.html``: a comparison on one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape

from ranker.compare import figures
from ranker.compare.protocol import Protocol
from ranker.compare.results import Results
from ranker.compare.running import Failure
from ranker.compare.tables import LEGEND, Table, all_tables
from ranker.evaluation.stored_predictions import read_predictions

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { padding: .25em .7em; text-align: right; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #888; } tr:hover td { background: #f2f4f8; }
.label { text-align: left; }
figure { margin: 1em 0; } figcaption { font-size: 13px; color: #555; } svg { max-width: 100%; height: auto; }
dt { font-weight: 600; margin-top: .4em; } dd { margin: 0 0 0 1.5em; }
.failed { border-left: 4px solid #c44e52; padding-left: 1em; } pre { overflow-x: auto; font-size: 12px; }
.pair { display: flex; flex-wrap: wrap; gap: 1em; } .pair figure { flex: 0 1 600px; }
"""


def page(name: str, results: Results, protocol: Protocol, failures: Sequence[Failure]) -> str:
    """The whole page."""
    tables = all_tables(results)
    first, rest = tables[0], tables[1:]
    parts = [
        f"<h1>{escape(name)}: which long-sequence method pays</h1>",
        _failed(failures),
        _section(first.title, _table(first), f"<p>{escape(LEGEND)}</p>"),
        *(_figures(results) if results.rows else []),
        *(_section(table.title, _table(table)) for table in rest),
        _section("How it was made", _protocol(protocol)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)}: comparison</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _figures(results: Results) -> list[str]:
    """One section a question."""
    more = figures.several_lengths(results)
    draw = figures.by_length if more else figures.by_method
    seeds = max(len(row.runs) for row in results.rows)
    told = "Bars: deviation over seeds." if seeds > 1 else "One seed: there is no deviation to tell differences from."
    return [
        _section(
            "Does reading more help?" if more else "Which is best?",
            '<div class="pair">',
            *(
                _figure(f"length-{task}", partial(draw, results, task), told)
                for task in results.tasks
            ),
            "</div>",
        ),
        _costs(results),
        _section(
            "For whom?",
            _figure(
                "history", partial(figures.by_history, results, "ctr"), "Each method at its longest, mean over seeds."
            ),
        ),
        _scores(results),
    ]  # fmt: skip


def _costs(results: Results) -> str:
    if not any(results.costs.values()):
        return _section("At what cost?", "<p>Costs are measured when all runs are done: none has been yet.</p>")
    return _section(
        "At what cost?",
        _figure(
            "cost-auc", partial(figures.by_cost, results, "ctr"),
            "Up and to the left is better. Large marks are on the Pareto front: nothing is cheaper and better.",
        ),
        _figure("cost-length", partial(figures.cost_by_length, results), "Of what reads histories, alone."),
    )  # fmt: skip


def _scores(results: Results) -> str:
    """What is drawn from the scores themselves."""
    rows, styles = figures.longest_rows(results), figures.looks(results)
    predictions = {
        figures.label(row): read_predictions(next(iter(row.runs.values())) / "predictions.parquet") for row in rows
    }
    named = {figures.label(row): styles[figures.cost_name(row.row)] for row in rows}
    told = "Clicks; each method at its longest, its first seed."
    return _section(
        "Scores",
        '<div class="pair">',
        _figure("calibration", partial(figures.calibration, predictions, named), told + " On the line: as predicted."),
        _figure("roc", partial(figures.roc, predictions, named), told),
        "</div>",
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def _figure(name: str, draw: partial[figures.Figure], caption: str) -> str:
    return f"<figure>{figures.svg(name, draw)}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    def line(tag: str, cells: list[str]) -> str:
        classes = [' class="label"' if i < table.labels else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{c}>{escape(x)}</{tag}>" for c, x in zip(classes, cells, strict=True)) + "</tr>"

    body = "\n".join(line("td", row) for row in table.rows)
    return f'<div class="wide"><table><thead>{line("th", table.header)}</thead>\n<tbody>{body}</tbody></table></div>'


def _protocol(protocol: Protocol) -> str:
    lines = (f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in protocol.items())
    return "<dl>" + "".join(lines) + "</dl>"


def _failed(failures: Sequence[Failure]) -> str:
    if not failures:
        return ""
    told = "".join(f"<p>{escape(f.cell)}: {escape(f.step)}</p><pre>{escape(f.log)}</pre>" for f in failures)
    return f'<section class="failed"><h2>{len(failures)} failed</h2>{told}</section>'
