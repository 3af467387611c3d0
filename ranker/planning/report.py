"""A plan as tables on the terminal, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ranker.planning.estimate import Estimate, RankEstimate, TableEstimate
from ranker.planning.misfit import size
from ranker.planning.placement import Placement
from ranker.planning.question import Question
from ranker.planning.reads import Step, step_of
from ranker.planning.remedies import Remedy

MOST_GROUPS = 12
"""of ranks with the same figures; a plan with more of them shows the fullest and the slowest"""


def content_of(question: Question, placement: Placement, found: Estimate) -> dict[str, object]:
    """Everything that is known of a plan, bytes and milliseconds; `slowest` and `fullest` are ranks."""
    return {
        "fits": True,
        "cluster": asdict(question.cluster),
        "replicas": question.config.tables.replicas,
        "step": _step(question)._asdict(),
        "memory": {"bytes": placement.room.memory_bytes, "for_tables_bytes": placement.room.left_bytes},
        "tables": [asdict(table) for table in found.tables],
        "ranks": [
            asdict(rank) | {"memory_bytes": rank.memory_bytes, "total_ms": rank.time.total_ms} for rank in found.ranks
        ],
        "needs": needs(question),
        "slowest": found.slowest.rank,
        "fullest": found.fullest.rank,
    }


def needs(question: Question) -> list[str]:
    """What the dataset and the config must become for so many ranks to share the data."""
    ranks, shards = question.cluster.ranks, question.config.loader.shards
    partitions = len(question.dataset.manifest.partitions)
    found: list[str] = []
    if shards is not None and shards < ranks:
        found.append(f"loader.shards: {shards} is too few for {ranks} ranks; raise it to {ranks} or more")
    if partitions < (wanted := max(ranks, shards or 0)):
        found.append(
            f"{question.dataset.root} has {partitions} partitions, too few for {wanted} shards of the data; prepare it "
            f"with partitions: {wanted} or more"
        )
    return found


def show(question: Question, placement: Placement, found: Estimate, console: Console) -> None:
    """Print tables, ranks, and the step of the rank that the others wait for."""
    cluster, step = question.cluster, _step(question)
    kind = "GPU" if cluster.device == "cuda" else "CPU"
    console.print(
        f"{cluster.ranks} ranks: {cluster.hosts} hosts × {cluster.per_host} {kind}s, {size(cluster.memory_bytes)} of "
        f"{cluster.memory} each; a batch: {step.requests:,} requests, {step.histories:,.0f} histories of "
        f"{step.events:,.0f} events, {step.candidates:,.1f} candidates a request",
        highlight=False,
        soft_wrap=True,
    )
    if (replicas := question.config.tables.replicas) > 1:
        console.print(f"{replicas} replicas of the tables, of {question.group.ranks} ranks each; this is the first")
    console.print(_tables(found.tables))
    console.print(_ranks(found))
    console.print(_time(found.slowest))
    console.print(
        f"rank {found.fullest.rank} is the fullest: {size(found.fullest.memory_bytes)} of "
        f"{size(placement.room.memory_bytes)}. Not known to the planner: activations (the reserve is for them) and how "
        "skewed ids are; times are reckoned from bandwidths, not measured.",
        highlight=False,
        soft_wrap=True,
    )


def show_remedies(ways: Sequence[Remedy], console: Console) -> None:
    """Print what would make a plan possible, with the options that do it."""
    if not ways:
        console.print("nothing that was tried makes the tables fit: sharding, caching, smaller batches, hosts, memory")
        return
    console.print("each of these fits, as planned again:")
    for way in ways:
        console.print(f"  {way.what}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"      {shlex.join(way.arguments)}", markup=False, highlight=False, soft_wrap=True)


def spans(ranks: Sequence[int]) -> str:
    """Ranks in short.

    >>> spans([0, 1, 2, 3, 8])
    '0–3, 8'
    """
    parts: list[str] = []
    for _, run in groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0]):
        of_run = [rank for _, rank in run]
        parts.append(str(of_run[0]) if len(of_run) == 1 else f"{of_run[0]}–{of_run[-1]}")
    return ", ".join(parts)


def _step(question: Question) -> Step:
    return step_of(question.config, question.dataset.manifest, question.cluster.ranks)


def _grid(title: str, words: Sequence[str], numbers: Sequence[str], least: int = 0) -> RichTable:
    """Words first, of which the first column folds where the terminal is narrow, down to `least`; numbers never do."""
    grid = RichTable(box=box.SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for i, word in enumerate(words):
        grid.add_column(word, overflow="fold", no_wrap=i > 0, min_width=least if i == 0 else None)
    for number in numbers:
        grid.add_column(number, justify="right", no_wrap=True)
    return grid


def _tables(tables: Sequence[TableEstimate]) -> RichTable:
    grid = _grid("tables", ("table", "sharding", "kernel", "ranks"), ("rows × width", "weights", "optimizer"), 14)
    for table in tables:
        sizes = (f"{table.rows:,} × {table.width}", size(table.weights_bytes), size(table.optimizer_bytes))
        grid.add_row(table.name, table.sharding, table.kernel, spans(table.ranks), *sizes)
    return grid


def _ranks(found: Estimate) -> RichTable:
    """Ranks with the same figures in one row."""
    columns: dict[str, Callable[[RankEstimate], str]] = {
        "tables": lambda rank: size(rank.tables_bytes),
        "optimizer": lambda rank: size(rank.optimizer_bytes),
        "in and out": lambda rank: size(rank.step_bytes + rank.ids_bytes),
        "dense": lambda rank: size(rank.dense_bytes),
        "reserve": lambda rank: size(rank.reserve_bytes),
        "in all": lambda rank: size(rank.memory_bytes),
        "on the host": lambda rank: size(rank.host_bytes),
        "ms": lambda rank: f"{rank.time.total_ms:.2f}",
    }
    if not any(rank.host_bytes for rank in found.ranks):
        del columns["on the host"]
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank in found.ranks:
        groups.setdefault(tuple(cell(rank) for cell in columns.values()), []).append(rank.rank)
    shown = sorted(groups.items(), key=lambda group: group[1])
    title = "ranks: memory, and a step's time in tables"
    if len(shown) > MOST_GROUPS:
        title += f" (the fullest and the slowest; all {len(found.ranks)}: --json)"
        shown = [group for group in shown if {found.fullest.rank, found.slowest.rank} & set(group[1])]
    grid = _grid(title, ("ranks",), tuple(columns), 10)
    for cells, ranks in shown:
        grid.add_row(spans(ranks), *cells)
    return grid


def _time(rank: RankEstimate) -> RichTable:
    time = rank.time
    grid = _grid(f"a step of rank {rank.rank}, the slowest, in ms", ("",), ("compute", "communication"), 8)
    grid.add_row("forward", f"{time.forward_compute_ms:.3f}", f"{time.forward_communication_ms:.3f}")
    grid.add_row("backward", f"{time.backward_compute_ms:.3f}", f"{time.backward_communication_ms:.3f}")
    grid.add_row("prefetch", f"{time.prefetch_ms:.3f}", "")
    grid.add_row("ids (not in the sum)", "", f"{time.ids_ms:.3f}")
    return grid
