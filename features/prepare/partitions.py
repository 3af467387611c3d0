"""The two files of one partition: DuckDB hands over flat sorted columns, NumPy finds where users and requests begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.dataset import PartitionInfo, SplitInfo, partition_dir, write_arrow
from features.prepare import counters
from features.prepare.columns import stored
from features.prepare.encode import Vocabularies, encode, hashed_rows
from features.prepare.engine import Engine, quote
from features.prepare.hashed import hash_sql
from features.prepare.split import PAST, Periods
from features.prepare.unknown import IdCounts, above, count, has_vocabulary
from features.schema import SPLITS, ColumnConfig, PrepareConfig, Scope, Split

Ints = npt.NDArray[np.int64]
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Layout:
    """What all partitions share: dense `item_index` by number i, the `priors`, mean of each counter's value, and
    `item_ids`, what vocabularies lack of each item's ids."""

    config: PrepareConfig
    vocabularies: Vocabularies
    labels: list[str]
    oracles: list[str]
    priors: list[float]
    item_index: npt.NDArray[np.int32]
    item_ids: Mapping[str, IdCounts]
    known_items: int
    known_users: int
    periods: Periods


@dataclass(frozen=True)
class Written:
    """One partition on disk: its place in the manifest, its share of each split, and findings by name."""

    info: PartitionInfo
    splits: dict[Split, SplitInfo]
    counted: dict[str, int]


@dataclass(frozen=True)
class _Log:
    """Histories of a partition, one after the other: events of history row r are ``offsets[r]:offsets[r + 1]``.

    ids: of users and events, by feature.
    """

    row: Ints
    time: Ints
    offsets: Ints
    ids: dict[str, IdCounts]


@dataclass(frozen=True)
class _Requests:
    """What is counted of a partition's requests [R] and their candidates [N] ``bounds[r]:bounds[r + 1]``.

    ids: `[R]` of users, requests, items and candidates, by feature.
    """

    split: Ints
    row: Ints
    bounds: Ints
    items: npt.NDArray[np.int32]
    labels: dict[str, npt.NDArray[np.float32]]
    ids: dict[str, IdCounts]


def write_partition(engine: Engine, layout: Layout, root: Path, number: int) -> Written:
    """Write histories.arrow and requests.arrow of one partition."""
    folder = partition_dir(root, number)
    log, unsorted = _write_histories(engine, layout, folder, number)
    columns = _write_requests(engine, layout, folder, number, log)
    splits = _split_infos(columns, layout)
    ends = np.cumsum([info.requests for info in splits.values()])
    info = PartitionInfo(
        histories=len(log.offsets) - 1,
        events=len(log.row),
        requests={
            name: (int(end) - part.requests, int(end)) for end, (name, part) in zip(ends, splits.items(), strict=True)
        },
        impressions={name: part.impressions for name, part in splits.items()},
    )
    counted = {
        "breaks in the time order of users' events": unsorted,
        "users without events": int(np.count_nonzero(np.diff(log.offsets) == 0)),
        "users without impressions": info.histories - len(np.unique(columns.row)),
    }
    for name, ids in log.ids.items():
        if name.startswith("event."):
            counted[f"ids of {name} outside its vocabulary"] = ids.total(slice(None))[0]
    return Written(info, splits, counted)


def history_ends(log_row: Ints, log_time: Ints, offsets: Ints, row: Ints, until: Ints) -> Ints:
    """Events of history `row` strictly before `until`, for many requests at once.

    Times are replaced by their rank among the log's times, so that (row, rank) fits one integer whatever the times.

    Args:
        log_row, log_time: [T] sorted by (row, time).
        offsets: [rows + 1].
        row, until: [R].
    """
    instants = np.unique(log_time)
    span = len(instants) + 1
    key = log_row * span + np.searchsorted(instants, log_time)
    return np.searchsorted(key, row * span + np.searchsorted(instants, until)) - offsets[row]


def _write_histories(engine: Engine, layout: Layout, folder: Path, number: int) -> tuple[_Log, int]:
    about = f"writing histories of partition {number}"
    configured = layout.config.columns
    hashed = "" if layout.config.user_hash_buckets is None else f", {hash_sql('n.user')} AS hash"
    users = engine.table(
        f"""SELECT n.index{hashed}, a.* FROM user_index n LEFT JOIN user_attributes a USING (u)
        WHERE n.part = {number} ORDER BY n.index""",
        about,
    )
    side = "".join(f", e.{quote(stored('event', name))}" for name in configured.event)
    events = engine.table(
        f"""SELECT n.row, e.i, e.time, e.ordinal{side}
        FROM events e JOIN user_index n ON e.u = n.u AND n.part = {number}
        WHERE e.part = {number} ORDER BY n.row, e.time, e.ordinal""",
        about,
    )
    row, time, ordinal = _ints(events, "row"), _ints(events, "time"), _ints(events, "ordinal")
    offsets = np.searchsorted(row, np.arange(users.num_rows + 1))
    columns: dict[str, pa.Array] = {
        "user": _array(users, "index").cast(pa.int32()),
        "item": _lists(offsets, pa.array(layout.item_index[_ints(events, "i")])),
        "time": _lists(offsets, _array(events, "time")),
    }
    if layout.config.user_hash_buckets is not None:
        columns["bucket"] = hashed_rows(_array(users, "hash"), layout.config.user_hash_buckets)
    of_events, of_users = (
        _encoded(events, "event", configured.event, layout),
        _encoded(users, "user", configured.user, layout),
    )
    columns |= {name: _lists(offsets, values) for name, values in of_events.items()} | of_users
    ids = _ids(events, "event", configured.event, of_events) | _ids(users, "user", configured.user, of_users)
    if layout.config.user_hash_buckets is None:
        ids["user"] = above(_ints(users, "index"), layout.known_users)
    write_arrow(pa.table(columns), folder / "histories.arrow")
    unsorted = int(np.count_nonzero((row[1:] == row[:-1]) & (ordinal[1:] < ordinal[:-1])))
    return _Log(row, time, offsets, ids), unsorted


def _write_requests(engine: Engine, layout: Layout, folder: Path, number: int, log: _Log) -> _Requests:
    configured = layout.config.columns
    shown = _shown(engine, layout, number)
    split, row, began = _ints(shown, "split"), _ints(shown, "row"), _ints(shown, "began")
    starts = _starts(split, row, began, _array(shown, "request"))  # [R], where each request's candidates begin
    bounds = np.append(starts, len(split))
    split, row, began = split[starts], row[starts], began[starts]
    until = began - round(layout.config.history.label_delay_s * 1000)
    if layout.config.history.freeze == "split":
        firsts = np.array([layout.periods.first.get(name, 0) for name in SPLITS], dtype=np.int64)
        until = np.minimum(until, firsts[split])
    elif layout.config.history.freeze == "day":
        until = np.minimum(until, began // DAY_MS * DAY_MS)
    items = layout.item_index[_ints(shown, "i")]
    columns: dict[str, pa.Array] = {
        "row": pa.array(row.astype(np.int32)),
        "history_end": pa.array(history_ends(log.row, log.time, log.offsets, row, until).astype(np.int32)),
        "time": pa.array(began),
        "items": _lists(bounds, pa.array(items)),
    }
    first = shown.select([stored("request", name) for name in configured.request]).take(pa.array(starts))
    of_requests = _encoded(first, "request", configured.request, layout)
    candidate = _encoded(shown, "candidate", configured.candidate, layout)
    ids = {name: of.of(row) for name, of in log.ids.items() if not name.startswith("event.")}
    ids |= _ids(first, "request", configured.request, of_requests)
    of_shown = _ids(shown, "candidate", configured.candidate, candidate)
    of_shown |= {name: of.of(items) for name, of in layout.item_ids.items()}
    if layout.config.item_hash_buckets is None:
        of_shown["item"] = above(items, layout.known_items)
    ids |= {name: of.summed(bounds) for name, of in of_shown.items()}
    columns |= of_requests
    candidate |= _statistics(shown, layout)
    for name in [f"label.{n}" for n in layout.labels] + [f"oracle.{n}" for n in layout.oracles]:
        candidate[name] = _array(shown, name).cast(pa.float32())
    columns |= {name: _lists(bounds, values) for name, values in candidate.items()}
    write_arrow(pa.table(columns), folder / "requests.arrow")
    labels = {n: candidate[f"label.{n}"].to_numpy(zero_copy_only=False) for n in layout.labels}
    return _Requests(split, row, bounds, items, labels, ids)


def _split_infos(requests: _Requests, layout: Layout) -> dict[Split, SplitInfo]:
    """This partition's share of each split; its users are in no other partition."""
    edges = np.searchsorted(requests.split, np.arange(len(SPLITS) + 1))
    infos: dict[Split, SplitInfo] = {}
    for number, name in enumerate(SPLITS):
        low, high = edges[number], edges[number + 1]
        first, last = requests.bounds[low], requests.bounds[high]
        infos[name] = SplitInfo(
            requests=int(high - low),
            impressions=int(last - first),
            users=len(np.unique(requests.row[low:high])),
            first_ms=layout.periods.first.get(name, 0),
            last_ms=layout.periods.last.get(name, 0),
            positives={n: int(np.count_nonzero(values[first:last])) for n, values in requests.labels.items()},
            unknown_items=int(np.count_nonzero(requests.items[first:last] >= layout.known_items)),
            unknown={n: of.total(slice(low, high)) for n, of in sorted(requests.ids.items())},
        )
    return infos


def _shown(engine: Engine, layout: Layout, number: int) -> pa.Table:
    """Candidates of a partition in the order of the file: split, history row, time, request, place in the logs."""
    return engine.table(
        f"""SELECT s.* EXCLUDE (u, part), n.row FROM staged s JOIN user_index n ON s.u = n.u AND n.part = {number}
        WHERE s.part = {number} AND s.split < {PAST} ORDER BY s.split, n.row, s.began, s.request, s.ordinal""",
        f"writing requests of partition {number}",
    )


def _starts(split: Ints, row: Ints, began: Ints, request: pa.Array) -> Ints:
    if len(split) == 0:
        return np.zeros(0, dtype=np.int64)
    new = (split[1:] != split[:-1]) | (row[1:] != row[:-1]) | (began[1:] != began[:-1])
    differs = pc.call_function("not_equal", [request.slice(1), request.slice(0, len(request) - 1)])
    new |= differs.to_numpy(zero_copy_only=False)
    return np.flatnonzero(np.concatenate([[True], new])).astype(np.int64)


def _statistics(shown: pa.Table, layout: Layout) -> dict[str, pa.Array]:
    """``NAME_count`` = log1p(n) and ``NAME_rate`` = (sum + k · prior) / (n + k), the prior where n + k is 0."""
    found: dict[str, pa.Array] = {}
    for number, (config, prior) in enumerate(zip(layout.config.counters, layout.priors, strict=True)):
        n = _ints(shown, f"n{number}").astype(np.float64)
        total = _ints(shown, f"total{number}") / counters.SCALE
        weight = n + config.smoothing
        rate = np.where(weight > 0, (total + config.smoothing * prior) / np.where(weight > 0, weight, 1), prior)
        found[stored("candidate", f"{config.name}_count")] = pa.array(np.log1p(n).astype(np.float32))
        found[stored("candidate", f"{config.name}_rate")] = pa.array(rate.astype(np.float32))
    return found


def _encoded(
    table: pa.Table, scope: Scope, configured: Mapping[str, ColumnConfig], layout: Layout
) -> dict[str, pa.Array]:
    names = {stored(scope, name): config for name, config in configured.items()}
    return {name: encode(_array(table, name), name, config, layout.vocabularies) for name, config in names.items()}


def _ids(
    table: pa.Table, scope: Scope, configured: Mapping[str, ColumnConfig], encoded: Mapping[str, pa.Array]
) -> dict[str, IdCounts]:
    """Of the columns with a vocabulary, what it lacks of each row's ids."""
    names = [stored(scope, name) for name, config in configured.items() if has_vocabulary(config)]
    return {name: count(_array(table, name), encoded[name]) for name in names}


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _ints(table: pa.Table, name: str) -> Ints:
    return _array(table, name).to_numpy(zero_copy_only=False).astype(np.int64)


def _lists(offsets: Ints, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
