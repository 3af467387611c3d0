"""Random small datasets, written without `prepare`, and their literal reading: loops over lists, no arrays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.batch import RequestBatch
from features.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    ColumnInfo,
    Dataset,
    Manifest,
    PartitionInfo,
    SplitInfo,
    partition_dir,
    read_arrow,
    write_arrow,
)
from features.schema import SPLITS, Split
from features.selection import FeaturesConfig, Selection, resolve

ITEMS, KNOWN_ITEMS = 30, 20
EVERYTHING = FeaturesConfig(
    request=["user", "user.device", "user.interests", "request.hour", "request.topics"],
    candidate=["item", "item.category", "item.tags", "candidate.position"],
    dense=["user.age", "request.load", "item.price", "candidate.score"],
    sequence=["item.category", "item"],
    event=["event.action"],
    event_dense=["event.dwell"],
    codes=["item.category", "item"],
)
COLUMNS = {
    "user": {"device": "categorical", "interests": "bag", "age": "dense"},
    "item": {"category": "categorical", "tags": "bag", "price": "dense"},
    "event": {"action": "categorical", "dwell": "dense"},
    "request": {"hour": "categorical", "topics": "bag", "load": "dense"},
    "candidate": {"position": "categorical", "score": "dense"},
}
Record = dict[str, Any]


def write_dataset(
    root: Path,
    seed: int = 0,
    partitions: int = 3,
    users: int = 5,
    requests: int = 4,
    events: int = 12,
) -> Dataset:
    """A dataset of up to so many users a partition, requests a user and split, events a user; often fewer or none.

    Every request has a `time` of its own, by which it can be told from all others.
    """
    rng = random.Random(seed)
    random_id, number = (lambda: rng.randrange(9)), (lambda: rng.randrange(-80, 80) / 8)
    kinds = {"categorical": random_id, "dense": number, "bag": lambda: [random_id() for _ in range(rng.randrange(3))]}
    types = {"categorical": pa.int32(), "dense": pa.float32(), "bag": pa.list_(pa.int32())}
    times = iter(rng.sample(range(10_000, 1_000_000), 10_000))

    def attributes(scope: str, rows: int, lists: list[int] | None = None) -> dict[str, pa.Array]:
        """Columns of one scope; `lists` are the lengths of each row's list."""
        made: dict[str, pa.Array] = {}
        for name, kind in COLUMNS[scope].items():
            value, element = kinds[kind], types[kind]
            rows_of = [value() for _ in range(rows)] if lists is None else [[value() for _ in range(n)] for n in lists]
            made[f"{scope}.{name}"] = pa.array(rows_of, element if lists is None else pa.list_(element))
        return made

    infos: list[PartitionInfo] = []
    counts = dict.fromkeys(SPLITS, 0)
    for p in range(partitions):
        folder = partition_dir(root, p)
        rows = rng.randrange(users + 1)
        lengths = [rng.choice([0, 1, rng.randrange(events + 1)]) for _ in range(rows)]
        histories = {
            "user": pa.array([rng.randrange(1, 40) for _ in range(rows)], pa.int32()),
            "item": pa.array([[rng.randrange(1, ITEMS) for _ in range(n)] for n in lengths], pa.list_(pa.int32())),
            "time": pa.array([sorted(rng.randrange(10_000) for _ in range(n)) for n in lengths], pa.list_(pa.int64())),
        }
        histories |= attributes("event", rows, lengths) | attributes("user", rows)
        write_arrow(pa.table(histories), folder / "histories.arrow")

        row: list[int] = []
        end: list[int] = []
        ranges: dict[Split, tuple[int, int]] = {}
        for split in SPLITS:
            begin = len(row)
            for r, length in enumerate(lengths):
                own = rng.randrange(requests + 1)
                row += [r] * own
                end += sorted(rng.randrange(length + 1) for _ in range(own))
            ranges[split] = (begin, len(row))
            counts[split] += len(row) - begin
        shown = [rng.randrange(4) for _ in row]
        candidates = {
            name: pa.array([[float(rng.randrange(2)) for _ in range(n)] for n in shown], pa.list_(pa.float32()))
            for name in ("label.click", "label.conversion", "oracle.click")
        }
        table = {
            "row": pa.array(row, pa.int32()),
            "history_end": pa.array(end, pa.int32()),
            "time": pa.array([next(times) for _ in row], pa.int64()),
            "items": pa.array([[rng.randrange(1, ITEMS) for _ in range(n)] for n in shown], pa.list_(pa.int32())),
        }
        table |= attributes("request", len(row)) | attributes("candidate", len(row), shown) | candidates
        write_arrow(pa.table(table), folder / "requests.arrow")
        shows: dict[Split, int] = {s: sum(shown[slice(*r)]) for s, r in ranges.items()}
        infos.append(PartitionInfo(histories=rows, events=sum(lengths), requests=ranges, impressions=shows))
    write_arrow(pa.table({"id": pa.array(range(ITEMS))} | attributes("item", ITEMS)), root / "items.arrow")
    write_manifest(root, infos, counts)
    return Dataset(root)


def write_manifest(root: Path, partitions: list[PartitionInfo], requests: dict[Split, int]) -> None:
    """The manifest of a dataset with the columns above."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="small",
        content_hash="",
        items=ITEMS,
        known_items=KNOWN_ITEMS,
        users=40,
        known_users=30,
        events=sum(p.events for p in partitions),
        columns={
            scope: {name: ColumnInfo(kind=kind, size=0 if kind == "dense" else 9) for name, kind in columns.items()}
            for scope, columns in COLUMNS.items()
        },
        labels=["click", "conversion"],
        oracles=["click"],
        splits={
            split: SplitInfo(requests=count, impressions=0, users=0, first_ms=0, last_ms=0, positives={})
            for split, count in requests.items()
        },
        partitions=partitions,
        dropped={},
        config={},
        versions={},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())


def rewrite(path: Path, columns: dict[str, pa.Array]) -> None:
    """Replace columns of an Arrow file. The new file takes the old one's name only when whole: the old is mapped."""
    table = pa.Table.from_batches([read_arrow(path)])
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    write_arrow(table, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def everything(dataset: Dataset, history_length: int = 0) -> Selection:
    """All columns of the dataset."""
    return Selection(resolve(EVERYTHING, dataset.manifest), ("conversion", "click"), history_length, ("click",))


def literal(dataset: Dataset, selection: Selection, splits: tuple[Split, ...]) -> dict[int, Record]:
    """What each request of `splits` must give, by its time. `events` says which events of which history it reads."""
    items = dataset.items().to_pylist()
    found: dict[int, Record] = {}
    for p, info in enumerate(dataset.manifest.partitions):
        histories, requests = dataset.histories(p).to_pylist(), dataset.requests(p).to_pylist()
        for split in splits:
            for request in requests[slice(*info.requests[split])]:
                history = histories[request["row"]]
                end = request["history_end"]
                start = max(0, end - selection.history_length) if selection.history_length else 0
                found[request["time"]] = _record(selection, items, history, request, p, range(start, end))
    return found


def _record(
    selection: Selection, items: list[Record], history: Record, request: Record, partition: int, events: range
) -> Record:
    spec = selection.spec
    shown = range(len(request["items"]))

    def of_item(name: str, item: int) -> Any:
        if name == "item":
            return item if item < KNOWN_ITEMS else 0
        return items[item][name]

    def of_request(name: str) -> Any:
        if name == "user":
            return history["user"] if history["user"] < 30 else 0
        return (history | request)[name]

    def of_candidate(name: str, c: int) -> Any:
        if name.startswith("candidate."):
            return request[name][c]
        return of_item(name, request["items"][c])

    def listed(value: Any) -> list[int]:
        return value if isinstance(value, list) else [value]

    return {
        "history": {f.name: [of_item(f.name, history["item"][e]) for e in events] for f in spec.sequence},
        "event": {f.name: [history[f.name][e] for e in events] for f in spec.event},
        "event_dense": [[history[f.name][e] for f in spec.event_dense] for e in events],
        "event_codes": [[of_item(f.name, history["item"][e]) for f in spec.codes] for e in events],
        "candidate_codes": [[of_item(f.name, item) for f in spec.codes] for item in request["items"]],
        "event_time": [history["time"][e] for e in events],
        "history_length": request["history_end"],
        "user": history["user"],
        "request": {f.name: listed(of_request(f.name)) for f in spec.request},
        "request_dense": [of_request(f.name) for f in spec.request_dense],
        "item": request["items"],
        "target": {f.name: [of_item(f.name, item) for item in request["items"]] for f in spec.sequence},
        "candidate": {f.name: [listed(of_candidate(f.name, c)) for c in shown] for f in spec.candidate},
        "candidate_dense": [[of_candidate(f.name, c) for f in spec.candidate_dense] for c in shown],
        "labels": [[request[f"label.{name}"][c] for name in selection.labels] for c in shown],
        "oracles": [[request[f"oracle.{name}"][c] for name in selection.oracles] for c in shown],
        "events": {(partition, request["row"], e) for e in events},
    }


def records(batch: RequestBatch, selection: Selection) -> dict[int, Record]:
    """What a batch says of each of its requests, by its time."""
    spec = selection.spec
    request = {f.name: batch.request[f.name].to_dense() for f in spec.request}
    candidate = {f.name: batch.candidate[f.name].to_dense() for f in spec.candidate}
    target = {f.name: batch.sequence[f"candidate:{f.name}"].to_dense() for f in spec.sequence}
    history = {f.name: batch.sequence[f"history:{f.name}"].values() for f in (*spec.sequence, *spec.event)}
    found: dict[int, Record] = {}
    for r, now in enumerate(batch.now.tolist()):
        events = slice(int(batch.start[r]), int(batch.end[r]))
        shown = slice(int(batch.offsets[r]), int(batch.offsets[r + 1]))
        found[now] = {
            "history": {f.name: history[f.name][events].tolist() for f in spec.sequence},
            "event": {f.name: history[f.name][events].tolist() for f in spec.event},
            "event_dense": batch.event_dense[events].tolist(),
            "event_codes": batch.event_codes[events].tolist(),
            "candidate_codes": batch.candidate_codes[shown].tolist(),
            "event_time": batch.event_time[events].tolist(),
            "history_length": int(batch.history_length[r]),
            "user": int(batch.user[r]),
            "request": {f.name: request[f.name][r].tolist() for f in spec.request},
            "request_dense": batch.request_dense[r].tolist(),
            "item": batch.item[shown].tolist(),
            "target": {f.name: target[f.name][r].tolist() for f in spec.sequence},
            "candidate": {f.name: [x.tolist() for x in candidate[f.name][shown]] for f in spec.candidate},
            "candidate_dense": batch.candidate_dense[shown].tolist(),
            "labels": batch.labels[shown].tolist(),
            "oracles": batch.oracles[shown].tolist(),
        }
    return found
