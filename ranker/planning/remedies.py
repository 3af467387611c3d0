"""Changes that make tables fit which do not: each found by planning again, so that it does what it says.

The nearest comes first: other sharding costs nothing, another memory time, smaller tables or more machines cost more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from features.errors import UserError
from ranker.config import TableShardingConfig
from ranker.planning.constraints import allowed_types, possible_types
from ranker.planning.misfit import DoesNotFit
from ranker.planning.question import Question
from ranker.planning.tables import Table, tables_of

T = TypeVar("T")

LOAD_FACTORS = (0.2, 0.1, 0.05, 0.02, 0.01)
MOST_HOSTS = 8
"""times the hosts that are there"""
MOST_MEMORY = 64
"""times a rank's memory"""
_LARGE = 0.01
"""share of all tables from which one counts, where none alone is too large"""


class Remedy(NamedTuple):
    """What to change, in words, and the arguments of ``ranker plan`` that do it, after those that were given."""

    what: str
    arguments: list[str]


@dataclass(frozen=True)
class _Change:
    """A question made another, and how one asks it."""

    question: Question
    what: str
    arguments: list[str]

    def fits(self) -> bool:
        try:
            self.question.answer(thorough=False)
        except UserError:
            return False
        return True

    def then(self, change: Callable[[Question], _Change]) -> _Change:
        """This change and another."""
        other = change(self.question)
        return _Change(other.question, f"{self.what}, and {other.what}", [*self.arguments, *other.arguments])


def remedies(question: Question, error: DoesNotFit) -> list[Remedy]:
    """What would make the tables fit, the nearest first; empty where nothing that is tried does."""
    tables = _targets(tables_of(question.ranker()), error)
    requests, dim = question.config.loader.requests, question.config.tables.dim
    hosts, memory = question.cluster.hosts, question.cluster.memory_bytes >> 30
    more_hosts, more_memory = range(hosts + 1, hosts * MOST_HOSTS + 1), range(memory + 1, (memory + 1) * MOST_MEMORY)
    by_rows = _by_rows(question, tables)
    cached = (lambda factor: _cached(question, tables, factor)) if question.cluster.device == "cuda" else None
    found: list[_Change | None] = [by_rows if by_rows and by_rows.fits() else None]
    if found[0]:
        by_rows = None  # nothing else is needed with it
    if cached:
        found.append(_nearest(LOAD_FACTORS, cached))
        if by_rows and found[-1] is None:
            found.append(_nearest(LOAD_FACTORS, lambda factor: by_rows.then(lambda q: _cached(q, tables, factor))))
    found.append(_nearest([requests >> n for n in range(1, requests.bit_length())], lambda n: _batch(question, n)))
    for values, change in ((more_hosts, _hosts), (more_memory, _memory)):
        found.append(_nearest(values, lambda value, change=change: change(question, value)))
        if by_rows and found[-1] is None:
            found.append(_nearest(values, lambda value, change=change: by_rows.then(lambda q: change(q, value))))
    found.append(_nearest(range(dim - 4, 0, -4), lambda width: _width(question, width)))
    return [Remedy(change.what, change.arguments) for change in found if change is not None]


def _nearest(values: Sequence[T], change: Callable[[T], _Change]) -> _Change | None:
    """The first of `values` whose change fits, where with one all later ones fit: found in steps that double, so that
    the farthest, which take longest to plan, are planned only where nearer ones do not fit."""
    low, reach = 0, 0
    while reach < len(values) and not change(values[reach]).fits():
        if reach == len(values) - 1:
            return None
        low, reach = reach + 1, min(2 * reach + 1, len(values) - 1)
    while low < reach:
        middle = (low + reach) // 2
        low, reach = (low, middle) if change(values[middle]).fits() else (middle + 1, reach)
    return change(values[reach]) if values else None


def _targets(tables: Sequence[Table], error: DoesNotFit) -> list[Table]:
    """The tables to do something about: those that do not fit, else the large ones."""
    if error.misfits:
        names = {misfit.table for misfit in error.misfits}
        return [table for table in tables if table.name in names]
    total = sum(table.rows * table.width for table in tables)
    return [table for table in tables if table.rows * table.width >= _LARGE * total]


def _by_rows(question: Question, tables: Sequence[Table]) -> _Change | None:
    """Row-wise sharding for the tables that may not be sharded so yet."""
    own, config = {}, question.config.tables
    for table in tables:
        types = allowed_types(table, config)[1]
        if "row_wise" in possible_types(table, question.cluster.device) and "row_wise" not in types:
            own[table.name] = {"types": [*types, "row_wise"]}
    return _resharded(question, own, f"allow row_wise for {', '.join(own)}") if own else None


def _cached(question: Question, tables: Sequence[Table], factor: float) -> _Change:
    """The tables in the hosts' memory, a share of their rows in HBM."""
    own = {table.name: {"kernels": ["fused_uvm_caching"], "cache_load_factor": factor} for table in tables}
    names = ", ".join(own)
    what = f"keep {names} in the hosts' memory, with a cache of {factor:.0%} of the rows in HBM"
    return _resharded(question, own, what)


def _resharded(question: Question, own: Mapping[str, Mapping[str, object]], what: str) -> _Change:
    arguments = [
        argument
        for table, keys in own.items()
        for key, value in keys.items()
        for argument in ("--set", f"tables.sharding.{table}.{key}={json.dumps(value)}")
    ]
    sharding = dict(question.config.tables.sharding)
    for table, keys in own.items():
        sharding[table] = sharding.get(table, TableShardingConfig()).model_copy(update=keys)
    return _Change(_with_tables(question, {"sharding": sharding}), what, arguments)


def _batch(question: Question, requests: int) -> _Change:
    loader = question.config.loader.model_copy(update={"requests": requests})
    config = question.config.model_copy(update={"loader": loader})
    return _Change(replace(question, config=config), f"batches of {requests} requests", ["--batch", str(requests)])


def _hosts(question: Question, hosts: int) -> _Change:
    cluster = replace(question.cluster, ranks=hosts * question.cluster.per_host)
    more = cluster.ranks - question.cluster.ranks
    what = f"{hosts} hosts, {more} {'GPUs' if cluster.device == 'cuda' else 'ranks'} more"
    return _Change(replace(question, cluster=cluster), what, ["--hosts", str(hosts)])


def _memory(question: Question, gib: int) -> _Change:
    cuda = question.cluster.device == "cuda"
    cluster = replace(question.cluster, **{"hbm_bytes" if cuda else "ddr_bytes": gib << 30})
    what = f"{gib} GiB of {cluster.memory} on each rank"
    return _Change(replace(question, cluster=cluster), what, ["--hbm" if cuda else "--ddr", f"{gib}GB"])


def _width(question: Question, dim: int) -> _Change:
    dims = {name: min(width, dim) for name, width in question.config.tables.dims.items()}
    arguments = ["--set", f"tables.dim={dim}"]
    if dims != question.config.tables.dims:
        arguments += ["--set", f"tables.dims={json.dumps(dims)}"]
    return _Change(_with_tables(question, {"dim": dim, "dims": dims}), f"tables {dim} wide", arguments)


def _with_tables(question: Question, keys: dict[str, object]) -> Question:
    tables = question.config.tables.model_copy(update=keys)
    return replace(question, config=question.config.model_copy(update={"tables": tables}))
