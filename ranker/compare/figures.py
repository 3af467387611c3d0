"""The figures of a comparison. A method has one colour in all of them; a swept method has one for each value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import NDArray

from ranker.compare.pareto import pareto_front
from ranker.compare.results import Results, RowResult, cost_name
from ranker.evaluation.metrics import Array, Predictions, Task
from ranker.evaluation.report import interval
from ranker.pictures.canvas import DARK, GREY, new_figure, note

_COLOURS = (
    "#3b6fb5", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd", "#8c613c", "#da8bc3", "#333333", "#937860",
)  # fmt: skip
_STYLES = ("-", "--", ":", "-.")
_MARKS = "osD^vPX*"
_BINS = 15
"""points of a calibration curve, of equally many impressions"""
_POINTS = 400
"""points of a ROC curve: more than its pixels show"""

Look = dict[str, Any]


def looks(results: Results) -> dict[str, Look]:
    """Colour, line and mark of each method."""
    names = list(dict.fromkeys(cost_name(result.row) for result in results.rows))
    styled = zip(cycle(_COLOURS), names, strict=False)
    return {
        name: {"color": colour, "linestyle": _STYLES[i // len(_COLOURS) % 4], "marker": _MARKS[i % len(_MARKS)]}
        for i, (colour, name) in enumerate(styled)
    }


def longest_rows(results: Results) -> list[RowResult]:
    """Of each method, the row that reads most."""
    found: dict[str, RowResult] = {}
    for result in results.rows:
        name = cost_name(result.row)
        if name not in found or _reach(result) >= _reach(found[name]):
            found[name] = result
    return list(found.values())


def _reach(result: RowResult) -> float:
    length = result.row.length
    return float("inf") if length == 0 else length or 0


def label(result: RowResult) -> str:
    """A row's name beside its mark."""
    length = "" if result.row.length is None else f", L {result.row.shown_length}"
    return f"{cost_name(result.row)}{length}"


def by_length(results: Results, task: Task) -> Figure:
    """AUC against the length that is read; bars are the deviation over seeds."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    lengths = sorted({_reach(r) for r in results.rows if r.row.length is not None})
    styles = looks(results)
    for number, (name, look) in enumerate(styles.items()):
        rows = sorted((r for r in results.rows if cost_name(r.row) == name), key=_reach)
        values = [np.nan if (auc := r.mean(task, "auc")) is None else auc for r in rows]
        if len(rows) == 1:  # a level to hold the others against
            axes.axhline(values[0], color=look["color"], linewidth=0.8, zorder=0)
        if rows[0].row.length is None:
            axes.plot([], [], label=name, **look)
            continue
        beside = 0.3 * (number / max(len(styles) - 1, 1) - 0.5)  # or bars would hide one another
        x = [lengths.index(_reach(r)) + beside for r in rows]
        bars = [r.tasks[task]["auc"].sd or 0 for r in rows]
        axes.errorbar(x, values, bars, capsize=2, elinewidth=0.8, label=name, **look)
    axes.set_xticks(range(len(lengths)), ["all" if np.isinf(length) else f"{length:,.0f}" for length in lengths])
    axes.set_xlabel("latest events that are read")
    _finish(axes, f"{task.upper()} AUC")
    return figure


def several_lengths(results: Results) -> bool:
    """Whether there is anything to draw over lengths."""
    return len({r.row.length for r in results.rows if r.row.length is not None}) > 1


def by_method(results: Results, task: Task) -> Figure:
    """AUC of every row, the best on top; bars are the deviation over seeds."""
    known = [(auc, r) for r in results.rows if (auc := r.mean(task, "auc")) is not None]
    known.sort(key=lambda found: found[0])
    figure = new_figure(8, 1 + 0.22 * len(known))
    axes = figure.subplots()
    styles = looks(results)
    for place, (auc, r) in enumerate(known):
        look: Look = styles[cost_name(r.row)] | {"linestyle": "none"}
        axes.errorbar(auc, place, xerr=r.tasks[task]["auc"].sd or 0, capsize=2, elinewidth=0.8, **look)
    axes.set_yticks(range(len(known)), [label(r) for _, r in known], fontsize=8)
    axes.set_xlabel(f"{task.upper()} AUC")
    axes.grid(axis="x", color=GREY, linewidth=0.4)
    return figure


def by_cost(results: Results, task: Task) -> Figure:
    """AUC against the cost of a candidate; the line joins the rows that no other beats in both."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    known = [(r, r.cost.read_us, auc) for r in results.rows if r.cost and (auc := r.mean(task, "auc")) is not None]
    if not known:
        note(axes, "no cost was measured")
        return figure
    costs, values = [max(cost, 1e-3) for _, cost, _ in known], [value for _, _, value in known]
    front = pareto_front(costs, values)
    axes.step([costs[i] for i in front], [values[i] for i in front], where="post", color=GREY, zorder=0)
    styles = looks(results)
    for i, (result, _, _) in enumerate(known):
        name = cost_name(result.row)
        look: Look = styles[name] | {"linestyle": "none", "markersize": 8 if i in front else 5}
        shown = name if i == next(j for j, k in enumerate(known) if cost_name(k[0].row) == name) else None
        axes.plot(costs[i], values[i], label=shown, **look)
        length = result.row.shown_length
        axes.annotate(length, (costs[i], values[i]), xytext=(5, 4), textcoords="offset points", fontsize=7, color=DARK)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # or labels would run into one another
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("reading a candidate, µs; numbers: events that are read; grey: the Pareto front")
    _finish(axes, f"{task.upper()} AUC")
    return figure


def by_history(results: Results, task: Task) -> Figure:
    """AUC of impressions by their user's history length, each method at its longest."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    styles, rows = looks(results), longest_rows(results)
    filled = [i for i, bucket in enumerate(rows[0].history) if bucket.impressions] if rows else []
    for result in rows:
        values = [result.history[i].tasks[task]["auc"].mean for i in filled]
        shown = [np.nan if value is None else value for value in values]
        axes.plot(range(len(filled)), shown, label=label(result), **styles[cost_name(result.row)])
    if rows:
        buckets = [rows[0].history[i] for i in filled]
        axes.set_xticks(
            range(len(filled)), [f"{interval(b.min, b.max)}\n({b.impressions:,})" for b in buckets], fontsize=8
        )
    axes.set_xlabel("events before the request (impressions)")
    _finish(axes, f"{task.upper()} AUC")
    return figure


def cost_by_length(results: Results) -> Figure:
    """What methods cost as histories grow."""
    figure = new_figure(11, 3.6)
    panels: Sequence[Axes] = figure.subplots(1, 3)
    titles = ("encode a request, ms", "read a candidate, µs", "memory of a user, KiB")
    for axes, title, field, unit in zip(
        panels, titles, ("encode_us", "read_us", "memory_bytes"), (1000, 1, 1024), strict=True
    ):
        for name, look in looks(results).items():
            points = [(c.length, getattr(c, field) / unit) for c in results.costs.get(name, []) if getattr(c, field)]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, markersize=4, **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("events")
        axes.set_title(title, fontsize=9)
        axes.grid(color=GREY, linewidth=0.4)
    _legend(figure, panels[1])
    return figure


def calibration(predictions: Mapping[str, Predictions], styles: Mapping[str, Look]) -> Figure:
    """Clicks against predicted clicks, in bins of equally many impressions."""
    figure = new_figure(5.4, 4.8)
    axes = figure.subplots()
    for name, found in predictions.items():
        p, rate = calibration_curve(found.click, found.p_ctr)
        axes.plot(p, rate, label=name, markersize=4, **styles[name])
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color=GREY, zorder=0)
    axes.set_xlabel("mean predicted probability")
    _finish(axes, "share of clicks")
    return figure


def calibration_curve(label: Array, score: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean score and share of positives of each of at most 15 bins of scores, all but equally many in each."""
    parts = np.array_split(np.argsort(score, kind="stable"), min(_BINS, len(score)) or 1)
    filled = [part for part in parts if len(part)]
    return np.array([score[part].mean() for part in filled]), np.array([label[part].mean() for part in filled])


def roc(predictions: Mapping[str, Predictions], styles: Mapping[str, Look]) -> Figure:
    """True against false positives."""
    figure = new_figure(5.4, 4.8)
    axes = figure.subplots()
    for name, found in predictions.items():
        false, true = roc_curve(found.click, found.p_ctr)
        look: Look = styles[name] | {"marker": None}
        axes.plot(false, true, label=name, **look)
    axes.plot([0, 1], [0, 1], color=GREY, zorder=0)
    axes.set_xlabel("share of the unclicked above the threshold")
    _finish(axes, "share of the clicked")
    return figure


def roc_curve(label: Array, score: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of negatives and of positives at least as high as each threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of equal scores: all or none
    true, false = np.cumsum(label[order] > 0)[ends], np.cumsum(label[order] <= 0)[ends]
    picked = np.unique(np.linspace(0, len(ends) - 1, min(_POINTS, len(ends))).round().astype(int))
    start = np.zeros(1)
    return (
        np.concatenate([start, false[picked] / max(int(false[-1]), 1)]),
        np.concatenate([start, true[picked] / max(int(true[-1]), 1)]),
    )


def _finish(axes: Axes, title: str) -> None:
    axes.set_ylabel(title)
    axes.grid(color=GREY, linewidth=0.4)
    _legend(axes.get_figure(root=True), axes)


def _legend(figure: Figure | None, axes: Axes) -> None:
    """Beside the plot, which many methods' names would cover."""
    handles, labels = axes.get_legend_handles_labels()
    if handles and figure is not None:
        figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)


def svg(name: str, draw: Callable[[], Figure]) -> str:
    """A figure as an SVG element of a page, with ids of its own and nothing about its making."""
    file = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw().savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :]
