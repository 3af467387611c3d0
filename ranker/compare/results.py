"""The rows of a comparison, put together from what its finished cells and cost measurements left on disk."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from features.progress import Progress
from ranker.compare.bootstrap import COMPARED, Difference, Measured, difference_of
from ranker.compare.config import CompareConfig
from ranker.compare.cost import MethodCost, PartCost
from ranker.compare.folder import CompareFolder
from ranker.compare.plan import Cell, Row, baseline_of
from ranker.compare.stored_draws import draws_of
from ranker.evaluation.metrics import TASKS, Task
from ranker.evaluation.report import METRICS

Json = dict[str, Any]


class Estimate(NamedTuple):
    """Of the seeds where it is defined; sd: the sample deviation, None for less than two."""

    mean: float | None
    sd: float | None
    seeds: int

    @staticmethod
    def of(values: Iterable[float | None]) -> Estimate:
        """None is left out."""
        known = [value for value in values if value is not None]
        sd = statistics.stdev(known) if len(known) > 1 else None
        return Estimate(statistics.fmean(known) if known else None, sd, len(known))


Tasks = dict[Task, dict[str, Estimate]]
"""by task and metric"""


class Bucket(NamedTuple):
    """Impressions of requests with `min` ≤ history length < `max`."""

    min: int
    max: int | None
    impressions: int
    tasks: Tasks


@dataclass
class RowResult:
    """A row of the table: a method at a length, over its seeds."""

    row: Row
    runs: dict[int, Path]
    """finished ones, by seed"""
    tasks: Tasks
    history: list[Bucket]
    training: dict[str, Estimate]
    """by key of ``training.json``"""
    cost: MethodCost | None = None
    baseline: Row | None = None
    differences: dict[tuple[Task, str], Difference] = field(default_factory=dict[tuple[Task, str], Difference])

    def mean(self, task: Task, metric: str) -> float | None:
        """Over the seeds."""
        return self.tasks[task][metric].mean


@dataclass
class Results:
    """Everything that was measured."""

    rows: list[RowResult]
    references: dict[str, Json]
    """metrics by task of what reads no sequence, and of the oracle where the probabilities are known"""
    tasks: list[Task]
    costs: dict[str, list[MethodCost]]
    """at every measured length, by method and swept values"""
    seeds: int
    """of each row, where all are finished"""


def gather(cells: Sequence[Cell], folder: CompareFolder, config: CompareConfig) -> Results:
    """All finished cells; rows without one are left out."""
    finished: dict[Row, dict[int, Path]] = {}
    for cell in cells:
        if folder.state(cell, config.split) == "finished":
            finished.setdefault(cell.row, {})[cell.seed] = folder.run(cell)
    metrics = {row: {seed: _read(run / "metrics.json") for seed, run in runs.items()} for row, runs in finished.items()}
    rows = [
        _row(row, runs, list(metrics[row].values())) for row in dict.fromkeys(c.row for c in cells)
        if (runs := finished.get(row))
    ]  # fmt: skip
    first: Json = next(iter(next(iter(metrics.values()), {}).values()), {})
    references = dict(first.get("references", {}))
    if "oracle" in first:
        references["oracle"] = first["oracle"]
    tasks: list[Task] = [task for task in TASKS if any(result.mean(task, "logloss") is not None for result in rows)]
    costs = {cost_name(row): read_costs(folder, row) for row in finished}
    for result in rows:
        result.cost = cost_at(costs[cost_name(result.row)], result.row.length)
    if config.bootstrap.draws:
        _compare(rows, metrics, list(dict.fromkeys(c.row for c in cells)), config)
    return Results(rows, references, tasks, costs, len(config.seeds))


def _read(path: Path) -> Json:
    return json.loads(path.read_text())


def _row(row: Row, runs: dict[int, Path], metrics: list[Json]) -> RowResult:
    training = [_training(run) for run in runs.values()]
    buckets = [
        Bucket(found[0]["min"], found[0]["max"], found[0]["impressions"], _tasks(found))
        for found in zip(*(m["by_history_length"] for m in metrics), strict=True)
    ]
    return RowResult(
        row, runs, _tasks(metrics), buckets, {key: Estimate.of(t.get(key) for t in training) for key in training[0]}
    )


def _training(run: Path) -> dict[str, float | None]:
    """The numbers of ``training.json``. Steps of a run that was resumed are its last process's, but for all of them."""
    found = _read(run / "training.json")
    numbers: dict[str, float | None] = {key: value for key, value in found.items() if not isinstance(value, str)}
    return {"total_steps": found["steps"]} | numbers  # older runs did not tell both


def _tasks(metrics: Sequence[Json]) -> Tasks:
    return {task: {name: Estimate.of(m[task][name] for m in metrics) for name in METRICS} for task in TASKS}


def cost_name(row: Row) -> str:
    """Rows that differ in length alone cost the same at the same length."""
    return Row(row.method, None, row.sweep).name


def read_costs(folder: CompareFolder, row: Row) -> list[MethodCost]:
    """What was measured of the row's method; nothing where nothing was."""
    path = folder.cost(cost_name(row))
    if not path.is_file():
        return []
    costs = _read(path)["costs"]
    return [MethodCost(**cost | {"parts": [PartCost(**part) for part in cost["parts"]]}) for cost in costs]


def cost_at(costs: Sequence[MethodCost], length: int | None) -> MethodCost | None:
    """At a row's length; of a row that reads all events, at the longest measured."""
    by_length = {cost.length: cost for cost in costs}
    return by_length.get(length or max(by_length, default=0))


def _compare(
    results: list[RowResult], metrics: Mapping[Row, Mapping[int, Json]], rows: list[Row], config: CompareConfig
) -> None:
    """Fill in the differences, each row's from its baseline."""
    measured = {result.row: result for result in results}
    for result in results:
        result.baseline = baseline_of(result.row, rows, config.baseline)
    compared = [r for r in results if r.baseline in measured]
    needed = list(dict.fromkeys(row for r in compared for row in (r.row, r.baseline) if row is not None))
    draws: dict[Row, dict[int, Measured]] = {}
    with Progress("bootstrap", sum(len(measured[row].runs) for row in needed), len(needed) > 0) as progress:
        for row in needed:
            draws[row] = {}
            for seed, run in measured[row].runs.items():
                draws[row][seed] = draws_of(run, config.bootstrap.draws, config.bootstrap.seed)
                progress.advance()
    for result in compared:
        assert result.baseline is not None
        for task in TASKS:
            for name in COMPARED:
                values = tuple(
                    {s: m[task][name] for s, m in metrics[row].items()} for row in (result.row, result.baseline)
                )
                found = difference_of(draws[result.row], draws[result.baseline], (values[0], values[1]), (task, name))
                if found is not None:
                    result.differences[task, name] = found


def json_of(results: Results) -> Json:
    """As in ``table.json``."""
    return {
        "rows": [_row_json(result) for result in results.rows],
        "references": results.references,
        "costs": {name: [_cost_json(cost) for cost in costs] for name, costs in results.costs.items()},
    }


def _row_json(result: RowResult) -> Json:
    row = result.row
    return {
        "row": row.name,
        "method": row.method,
        "length": row.length,
        "sweep": {key: json.loads(value) for key, value in row.sweep},
        "seeds": list(result.runs),
        **_tasks_json(result.tasks),
        "by_history_length": [
            {"min": b.min, "max": b.max, "impressions": b.impressions, **_tasks_json(b.tasks)} for b in result.history
        ],
        "training": {key: estimate._asdict() for key, estimate in result.training.items()},
        "cost": _cost_json(result.cost) if result.cost else None,
        "baseline": result.baseline.name if result.baseline else None,
        "differences": {
            f"{task}.{name}": found._asdict() | {"excludes_zero": found.excludes_zero, "real": found.real}
            for (task, name), found in result.differences.items()
        },
    }


def _tasks_json(tasks: Tasks) -> Json:
    return {task: {name: e._asdict() for name, e in metrics.items()} for task, metrics in tasks.items()}


def _cost_json(cost: MethodCost) -> Json:
    return cost._asdict() | {"parts": [part._asdict() for part in cost.parts]}
