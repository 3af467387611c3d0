"""History ids a second that the loader turns into batches on one core, against other ways of slicing lists.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.loader [--length 1000] [--requests 64] [--seconds 2]

Generated users of 500–3,500 events each (mean 2,000), one request a user, shuffled over all partitions: each window
lies elsewhere in the memory map. An event counts once, however many of its columns are read. The ways:

- loader: `features.loader` in training, from the map to a RequestBatch; ids outside the vocabulary and 5 % of the
  others read as 0; candidates and labels too.
- row by row: the same batch by a Python loop over its requests, NumPy slices and a `np.concatenate` a column.
- slices alone: the history's columns by the same loop over the Arrow lists, without ids read as 0, candidates, labels.
- pyarrow take: the history's columns alone; whole lists taken, then cut by a mask (`list_slice` does not count from
  the end).

The loader writes an item id three times: out of the map (4 bytes), into the ids of which some read as 0 (4), into the
batch (8, with all other id columns); a time once (8). Ways alternate. CPU time is what the process itself used: the
figure to compare on a machine that is shared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from features.batch import RequestBatch, from_tensors
from features.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    ColumnInfo,
    Dataset,
    Manifest,
    PartitionInfo,
    SplitInfo,
    partition_dir,
    write_arrow,
)
from features.loader import Loader, LoaderConfig, Selection
from features.selection import FeaturesConfig, resolve
from features.views import Partition, item_file
from tests.benchmarks.machine import machine

ITEMS, KNOWN_ITEMS, CATEGORIES, ACTIONS, CANDIDATES = 100_000, 99_000, 1_000, 8, 10
READS = {
    "item, time": FeaturesConfig(),
    "item, time, 1 side column, 1 item attribute": FeaturesConfig(
        sequence=["item", "item.category"], event=["event.action"]
    ),
}
Way = Callable[[int], int]


def generate(root: Path, users: int, mean_events: int, partitions: int) -> Dataset:
    """A dataset folder; partitions are equal but for their random ids."""
    rng = np.random.default_rng(0)
    rows = users // partitions
    lengths = np.linspace(mean_events // 4, mean_events * 7 // 4, rows).astype(np.int64)
    rng.shuffle(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shown = np.arange(0, rows * CANDIDATES + 1, CANDIDATES)

    def lists(bounds: np.ndarray, values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pa.array(values))

    for p in range(partitions):
        events = int(offsets[-1])
        histories = {
            "user": pa.array(np.arange(1 + p * rows, 1 + (p + 1) * rows, dtype=np.int32)),
            "item": lists(offsets, rng.integers(1, ITEMS, events, dtype=np.int32)),
            "time": lists(offsets, np.arange(events, dtype=np.int64)),
            "event.action": lists(offsets, rng.integers(1, ACTIONS, events, dtype=np.int32)),
        }
        requests = {
            "row": pa.array(np.arange(rows, dtype=np.int32)),
            "history_end": pa.array(lengths.astype(np.int32)),
            "time": pa.array(offsets[1:]),
            "items": lists(shown, rng.integers(1, ITEMS, rows * CANDIDATES, dtype=np.int32)),
            "label.click": lists(shown, rng.integers(0, 2, rows * CANDIDATES).astype(np.float32)),
        }
        write_arrow(pa.table(histories), partition_dir(root, p) / "histories.arrow")
        write_arrow(pa.table(requests), partition_dir(root, p) / "requests.arrow")
    category = pa.array(rng.integers(1, CATEGORIES, ITEMS, dtype=np.int32))
    write_arrow(pa.table({"id": pa.array(np.arange(ITEMS)), "item.category": category}), root / "items.arrow")
    count = rows * partitions
    info = PartitionInfo(
        histories=rows,
        events=int(offsets[-1]),
        requests={"train": (0, rows)},
        impressions={"train": rows * CANDIDATES},
    )
    split = SplitInfo(requests=count, impressions=count * CANDIDATES, users=count, first_ms=0, last_ms=0, positives={})
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="loader benchmark",
        content_hash="",
        items=ITEMS,
        known_items=KNOWN_ITEMS,
        users=count + 1,
        known_users=count + 1,
        events=info.events * partitions,
        columns={
            "item": {"category": ColumnInfo(kind="categorical", size=CATEGORIES)},
            "event": {"action": ColumnInfo(kind="categorical", size=ACTIONS)},
        },
        labels=["click"],
        oracles=[],
        splits={"train": split},
        partitions=[info] * partitions,
        dropped={},
        config={},
        versions={},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return Dataset(root)


class RowByRow:
    """What a data set of rows and a collate function do: everything for one request, then for the next."""

    def __init__(self, dataset: Dataset, selection: Selection) -> None:
        self._selection, self._items = selection, item_file(dataset)
        self._partitions = [Partition(dataset, p) for p in range(len(dataset.manifest.partitions))]
        self._rng = np.random.default_rng(0)

    def batch(self, index: int, requests: list[int], drop: float) -> RequestBatch:
        """A batch of a partition's requests; here each has a history row of its own."""
        partition, spec = self._partitions[index], self._selection.spec
        offsets, shown = partition.histories.lists("item").offsets, partition.requests.lists("items").offsets
        columns: dict[str, list[np.ndarray]] = defaultdict(list)
        for r in requests:
            row = partition.requests.flat("row")[r]
            end = offsets[row] + partition.requests.flat("history_end")[r]
            start = max(offsets[row], end - self._selection.history_length)
            items = partition.event("item")[start:end]
            candidates = partition.candidate("items")[shown[r] : shown[r + 1]]
            for feature in spec.sequence:
                for place, raw in (("history", items), ("target", candidates)):
                    ids = self._known(raw, drop) if feature.name == "item" else self._items.flat(feature.name)[raw]
                    columns[f"{place}.{feature.name}"].append(ids)
            for feature in spec.event:
                columns[f"history.{feature.name}"].append(partition.event(feature.name)[start:end])
            columns["event_time"].append(partition.event("time")[start:end])
            columns["labels"].append(partition.candidate("label.click")[shown[r] : shown[r + 1]])
            columns["item"].append(candidates)
            for name, value in (
                ("length", end - start),
                ("candidates", candidates.size),
                ("now", partition.requests.flat("time")[r]),
                ("user", partition.histories.flat("user")[row]),
                ("history_length", end - offsets[row]),
            ):
                columns[name].append(np.array([value]))
        histories = [f"history.{f.name}" for f in (*spec.sequence, *spec.event)]
        targets = [f"target.{f.name}" for f in spec.sequence]

        def joined(*names: str) -> Tensor:
            return torch.from_numpy(np.concatenate([x for name in names for x in columns[name]], dtype=np.int64))

        length, candidates = joined("length"), joined("candidates")
        tensors = {name: joined(name) for name in ("event_time", "now", "item", "user", "history_length")}
        none = torch.empty(0, dtype=torch.int64)
        rows = tensors["item"].numel()
        return from_tensors(
            spec,
            tensors
            | {
                "request.values": none,
                "request.lengths": none,
                "candidate.values": joined("target.item"),
                "candidate.lengths": torch.ones(rows, dtype=torch.int64),
                "sequence.values": joined(*histories, *targets),
                "sequence.lengths": torch.cat([length] * len(histories) + [candidates] * len(targets)),
                "request_dense": torch.empty(len(requests), 0),
                "candidate_dense": torch.empty(rows, 0),
                "event_dense": torch.empty(tensors["event_time"].numel(), 0),
                "event_codes": torch.empty(tensors["event_time"].numel(), 0, dtype=torch.int64),
                "candidate_codes": torch.empty(rows, 0, dtype=torch.int64),
                "start": length.cumsum(0) - length,
                "end": length.cumsum(0),
                "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), candidates.cumsum(0)]),
                "labels": torch.from_numpy(np.concatenate(columns["labels"])[:, None]),
                "oracles": torch.empty(rows, 0),
            },
        )

    def _known(self, items: np.ndarray, drop: float) -> np.ndarray:
        ids = np.where(items < KNOWN_ITEMS, items, 0)
        if drop:
            ids[self._rng.random(ids.size, np.float32) < drop] = 0
        return ids


class Ways:
    """Each way builds batch `step`, or its history, and returns its number of events."""

    def __init__(self, dataset: Dataset, features: FeaturesConfig, length: int, requests: int) -> None:
        self._selection = Selection(resolve(features, dataset.manifest), ("click",), length)
        self._config = LoaderConfig(requests=requests, workers=0)
        self._dataset = dataset
        self._loader = self._loader_of(training=True)
        self.steps = self._loader.steps()
        self._batches = self._loader.batches(0)
        self._histories = [dataset.histories(p) for p in range(len(dataset.manifest.partitions))]
        self._columns = ["item", "time", *features.event]
        self._category = None
        if "item.category" in features.sequence:
            self._category = dataset.items().column("item.category").to_numpy()
        self._rows = RowByRow(dataset, self._selection)
        rng = np.random.default_rng(0)
        count = self._histories[0].num_rows
        self._picked = [np.sort(rng.choice(count, requests, replace=False)) for _ in range(self.steps)]

    def _loader_of(self, training: bool) -> Loader:
        return Loader(self._dataset, ("train",), self._selection, self._config, training=training)

    def loader(self, step: int) -> int:
        """Step 0 begins an epoch."""
        if step == 0:
            self._batches = self._loader.batches(0)
        return next(self._batches).event_time.numel()

    def row_by_row(self, step: int) -> int:
        """The same without the loader."""
        index = step % len(self._histories)
        return self._rows.batch(index, self._picked[step].tolist(), self._config.drop_item).event_time.numel()

    def slices_alone(self, step: int) -> int:
        """A slice of each list, one after the other."""
        return self._history(step, self._sliced)

    def pyarrow_take(self, step: int) -> int:
        """Whole lists taken, then cut to their latest events."""
        return self._history(step, self._taken)

    def check(self) -> None:
        """All ways read the same."""
        first = next(iter(self._loader_of(training=False).batches()))
        again = self._rows.batch(0, list(range(first.requests)), 0.0)
        for ours, theirs in zip(first, again, strict=True):
            if isinstance(ours, Tensor):
                assert torch.equal(ours, theirs)
            else:
                assert torch.equal(ours.values(), theirs.values())
                assert torch.equal(ours.lengths(), theirs.lengths())
        for name in self._columns:
            column = self._histories[0].column(name)
            assert np.array_equal(self._sliced(column, self._picked[0]), self._taken(column, self._picked[0]))

    def _history(self, step: int, read: Callable[[pa.Array, np.ndarray], np.ndarray]) -> int:
        """All columns but the time as int64, one after the other, as the loader has them."""
        histories = self._histories[step % len(self._histories)]
        columns = {name: read(histories.column(name), self._picked[step]) for name in self._columns}
        events = columns.pop("time").size
        if self._category is not None:
            columns["category"] = self._category[columns["item"]]
        np.concatenate(list(columns.values()), dtype=np.int64)
        return events

    def _sliced(self, column: pa.Array, rows: np.ndarray) -> np.ndarray:
        latest = self._selection.history_length
        return np.concatenate([column[row].values[-latest:].to_numpy() for row in rows.tolist()])

    def _taken(self, column: pa.Array, rows: np.ndarray) -> np.ndarray:
        lists = column.take(pa.array(rows))
        lengths = pc.list_value_length(lists).to_numpy()
        values, ends = lists.flatten().to_numpy(), np.cumsum(lengths)
        kept = np.minimum(lengths, self._selection.history_length)
        return values[np.repeat(ends - kept, lengths) <= np.arange(values.size)]


def rates(way: Way, steps: int, seconds: float) -> tuple[float, float]:
    """Million ids a second of CPU time, and of wall time."""
    ids, step = 0, 0
    cpu, wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        ids += way(step % steps)
        step += 1
    return ids / (time.process_time() - cpu) / 1e6, ids / (time.perf_counter() - wall) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--events", type=int, default=2_000, help="mean of a user")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--length", type=int, default=1_000)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)

    print(f"machine   {machine('numpy', 'pyarrow', 'torch', threads=1)}")
    with tempfile.TemporaryDirectory() as folder:
        dataset = generate(Path(folder), args.users, args.events, args.partitions)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
        print(
            f"sizes     {args.users:,} users × {args.events:,} events (¼ to 1¾ of it), {size / 1e6:,.0f} MB mapped; "
            f"L = {args.length:,}, batches of {args.requests} requests × {CANDIDATES} candidates, workers 0, seed 0"
        )
        for what, features in READS.items():
            ways = Ways(dataset, features, args.length, args.requests)
            ways.check()
            candidates = {
                "loader": ways.loader,
                "row by row": ways.row_by_row,
                "slices alone": ways.slices_alone,
                "pyarrow take": ways.pyarrow_take,
            }
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
            for way in candidates.values():  # the whole map once, so that no way pays for the first touch of its pages
                for step in range(ways.steps):
                    way(step)
            for _ in range(args.repeats):
                for name, way in candidates.items():
                    measured[name].append(rates(way, ways.steps, args.seconds))
            print(f"\n{what}: million history ids a second on one core (median of {args.repeats}, range)")
            ours = statistics.median(cpu for cpu, _ in measured["loader"])
            for name, found in measured.items():
                cpu, wall = zip(*found, strict=True)
                line = f"{name:13} CPU {statistics.median(cpu):6.1f} ({min(cpu):.1f}–{max(cpu):.1f})"
                line += f"   wall {statistics.median(wall):6.1f} ({min(wall):.1f}–{max(wall):.1f})"
                print(line + ("" if name == "loader" else f"   loader is {ours / statistics.median(cpu):.2f}× as fast"))


if __name__ == "__main__":
    main()
