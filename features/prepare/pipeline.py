"""Logs to a dataset folder, step by step.

DuckDB sorts, joins and groups, in a scratch database; in memory is at most its limit and one partition, whatever the
size of the logs. Tables on the way are described in :mod:`features.prepare.staging`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa

from features.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    ColumnInfo,
    HashInfo,
    Manifest,
    PartitionInfo,
    SplitInfo,
    hash_files,
    write_arrow,
)
from features.prepare import counters, vocabularies
from features.prepare import hashed as hashing
from features.prepare.encode import Vocabularies, described
from features.prepare.engine import Engine
from features.prepare.errors import PrepareError
from features.prepare.items import Items, write_items
from features.prepare.partitions import Layout, write_partition
from features.prepare.sources import open_source
from features.prepare.sources.tables import Logs, Table
from features.prepare.split import PAST, split_requests
from features.prepare.staging import derive_impressions, stage_attributes, stage_events, stage_ids, stage_impressions
from features.prepare.validate import validate
from features.progress import Steps
from features.publish import staging
from features.schema import SPLITS, PrepareConfig, Scope, Split

HashedIds = dict[Literal["user", "item"], HashInfo]
LEAST_PARTITIONS = 8
_STEPS = 9
_SUMMED = ("requests", "impressions", "users", "unknown_items")


def prepare(config: PrepareConfig, out: Path) -> Manifest:
    """Make the dataset folder `out` from logs.

    Raises:
        PrepareError: the logs or the config are at fault.
        PublishError: `out` exists, or the disk is full. Nothing is left behind.
    """
    with staging(out) as (dataset, work):
        engine = Engine(work / "engine", config.memory_limit_gb, config.threads)
        try:
            with Steps(config.name, _STEPS + len(config.counters)) as steps:
                return _Preparation(config, engine, steps, dataset, work).run()
        finally:
            engine.close()


class _Preparation:
    """State of one run: where things are, and what was counted on the way."""

    def __init__(self, config: PrepareConfig, engine: Engine, steps: Steps, dataset: Path, work: Path) -> None:
        self.config, self.engine, self.steps, self.dataset, self.work = config, engine, steps, dataset, work
        self.dropped: dict[str, int] = {}
        self.counted: dict[str, int] = {}

    def run(self) -> Manifest:
        config, engine, step = self.config, self.engine, self.steps.step
        with step("opening the source"):
            logs = open_source(engine, config.source, self.work)
        with step("checking values"):
            rows = validate(engine, logs, config.time_range)
        partitions = config.partitions or max(LEAST_PARTITIONS, -(-rows // config.rows_per_partition))
        self.steps.expect(partitions)
        with step("numbering users and items"):
            stage_ids(engine, logs, partitions)
        impressions, labels, oracles = self._stage(logs)
        with step("dividing requests"):
            periods = split_requests(engine, impressions, config.split)
            past = engine.row(f"SELECT count(*) FROM requests WHERE split >= {PAST}", "dividing requests")[0]
            self.dropped["requests before split.train_from"] = past
        for number, counter in enumerate(config.counters):
            with step(f"counting {counter.name}"):
                counters.count(engine, number, counter)
        with step("joining impressions"):
            _join(engine, len(config.counters))
        with step("building vocabularies"):
            index = vocabularies.index_ids(engine, periods, config.item_min_count)
            vocabulary = vocabularies.build(engine, config.columns, periods)
            items = self._write_static(vocabulary)
            hashed = hashing.count(engine, config)
        priors = [counters.prior(engine, c, periods.train_end) for c in config.counters]
        lookup = vocabularies.item_lookup(engine)
        layout = Layout(
            config,
            vocabulary,
            labels,
            oracles,
            priors,
            lookup,
            items.ids,
            index.known_items,
            index.known_users,
            periods,
        )
        written, splits = self._write_partitions(layout, partitions)
        with step("writing the manifest"):
            columns = self._columns(vocabulary, items.columns, hashed)
            hashed_ids: HashedIds = {kind: hashed[kind] for kind in ("user", "item") if kind in hashed}
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                name=config.name,
                content_hash=hash_files(
                    self.dataset,
                    {"columns": _plain(columns), "labels": labels, "oracles": oracles} | _hashed_ids(hashed_ids),
                ),
                items=index.items,
                known_items=index.known_items,
                users=index.users,
                known_users=index.known_users,
                events=sum(p.events for p in written),
                columns=columns,
                hashed_ids=hashed_ids,
                labels=labels,
                oracles=oracles,
                splits=splits,
                partitions=written,
                dropped={reason: n for reason, n in self.dropped.items() if n},
                counted={reason: n for reason, n in self.counted.items() if n},
                config=config.model_dump(mode="json"),
                versions={"duckdb": duckdb.__version__, "numpy": np.__version__, "pyarrow": pa.__version__},
            )
            (self.dataset / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
        return manifest

    def _stage(self, logs: Logs) -> tuple[Table, list[str], list[str]]:
        """All staged tables; returns the table of impressions, labels and oracles."""
        config, engine, step = self.config, self.engine, self.steps.step
        self.dropped |= logs.dropped
        if config.derive is not None and logs.impressions is not None:
            raise PrepareError(
                f"{logs.impressions.path}: the source has impressions; remove `derive`, which makes them from events"
            )
        with step("staging events"):
            self.dropped["duplicate events"] = stage_events(engine, logs, config)
        with step("staging impressions"):
            impressions = logs.impressions or derive_impressions(engine, logs, config)
            labels, oracles = stage_impressions(engine, impressions, config)
            for scope, table in (("item", logs.items), ("user", logs.users)):
                outside, missing = stage_attributes(engine, table, config, scope)
                self.dropped[f"rows of the {scope} table that occur in no log"] = outside
                self.counted[f"{scope}s of the logs without attributes"] = missing
        return impressions, labels, oracles

    def _write_static(self, vocabulary: Vocabularies) -> Items:
        """Vocabularies and the item table."""
        for name, table in vocabulary.items():
            write_arrow(table, self.dataset / "vocabularies" / f"{name}.arrow")
        for kind in ("item", "user") if self.config.user_hash_buckets is None else ("item",):
            write_arrow(vocabularies.ids(self.engine, kind), self.dataset / "vocabularies" / f"{kind}.arrow")
        return write_items(self.engine, self.dataset, self.config, vocabulary)

    def _write_partitions(self, layout: Layout, partitions: int) -> tuple[list[PartitionInfo], dict[Split, SplitInfo]]:
        infos: list[PartitionInfo] = []
        splits: list[dict[Split, SplitInfo]] = []
        counted: Counter[str] = Counter()
        for number in range(partitions):
            with self.steps.step(f"writing partition {number}"):
                written = write_partition(self.engine, layout, self.dataset, number)
            infos.append(written.info)
            splits.append(written.splits)
            counted.update(written.counted)
        self.counted |= counted
        return infos, _merge(splits)

    def _columns(
        self, vocabulary: Vocabularies, items: dict[str, ColumnInfo], hashed: Mapping[str, HashInfo]
    ) -> dict[str, dict[str, ColumnInfo]]:
        configured = self.config.columns
        scopes: tuple[Scope, ...] = ("user", "item", "event", "request", "candidate")
        columns = {
            scope: items
            if scope == "item"
            else {n: described(scope, n, c, vocabulary) for n, c in getattr(configured, scope).items()}
            for scope in scopes
        }
        columns = {
            scope: {n: i.model_copy(update={"hashed": hashed.get(f"{scope}.{n}")}) for n, i in infos.items()}
            for scope, infos in columns.items()
        }
        for counter in self.config.counters:
            columns["candidate"] |= {f"{counter.name}_{part}": ColumnInfo(kind="dense") for part in ("count", "rate")}
        return columns


def _join(engine: Engine, counter_count: int) -> None:
    """Give each impression its request's time and split and its counters, clustered by partition."""
    extra = "".join(f", c{k}.n AS n{k}, c{k}.total AS total{k}" for k in range(counter_count))
    joins = "".join(f" JOIN {counters.table_of(k)} c{k} ON m.ordinal = c{k}.ordinal" for k in range(counter_count))
    engine.run(
        f"""CREATE TABLE staged AS SELECT m.* EXCLUDE (part_of), r.began, r.split{extra} FROM impressions m
        JOIN requests r ON m.u = r.u AND m.part_of = r.part_of AND m.request = r.request{joins} ORDER BY m.part""",
        "joining impressions",
    )
    for table in ("impressions", *(counters.table_of(k) for k in range(counter_count))):
        engine.run(f"DROP TABLE {table}", "joining impressions")


def _merge(parts: list[dict[Split, SplitInfo]]) -> dict[Split, SplitInfo]:
    """Counts of whole splits from those of the partitions."""
    merged: dict[Split, SplitInfo] = {}
    for split in SPLITS:
        infos = [part[split] for part in parts]
        merged[split] = infos[0].model_copy(
            update={
                **{name: sum(getattr(info, name) for info in infos) for name in _SUMMED},
                "unknown": {name: _both(info.unknown[name] for info in infos) for name in infos[0].unknown},
                "positives": {label: sum(info.positives[label] for info in infos) for label in infos[0].positives},
            }
        )
    return merged


def _both(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    unknown, ids = zip(*counts, strict=True)
    return sum(unknown), sum(ids)


def _plain(columns: dict[str, dict[str, ColumnInfo]]) -> dict[str, dict[str, object]]:
    """What the content hash covers of columns. A column that is not hashed says nothing of hashing, so that datasets
    made before there was any keep their content hash."""
    return {
        scope: {name: info.model_dump(exclude=None if info.hashed else {"hashed"}) for name, info in named.items()}
        for scope, named in columns.items()
    }


def _hashed_ids(infos: HashedIds) -> dict[str, object]:
    """The same for users and items."""
    return {"hashed_ids": {kind: info.model_dump() for kind, info in infos.items()}} if infos else {}
