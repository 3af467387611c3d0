"""How long preparation takes and how much memory, at two sizes, against the same work done in memory.

    python -m tests.benchmarks.prepare [--events 10000000] [--impressions 10000000]

Random logs are written by DuckDB into a temporary folder. `prepare` and the alternative (PyArrow: read both logs, sort,
look up, group, write the same lists; no checks, vocabularies or statistics) each run in a process of their own, whose
peak resident memory is reported. Sizes are the ones asked for and a tenth.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.dataset import write_arrow
from features.prepare import prepare
from features.schema import PrepareConfig
from tests.benchmarks.machine import machine

ITEMS = 1_000_000
EVENTS_PER_USER = 100
DAY_MS = 86_400_000
START_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Measured:
    """Seconds, and peak resident memory in MiB."""

    seconds: float
    peak_mib: float


def write_logs(folder: Path, events: int, impressions: int) -> None:
    """Random logs: skewed items, users with about 100 events over 30 days, 10 candidates a request, in no order."""
    users = max(1, events // EVENTS_PER_USER)
    connection = duckdb.connect(config={"memory_limit": "1GB", "threads": 2, "temp_directory": str(folder / "spill")})
    connection.execute("SELECT setseed(0.5)")
    item = f"CAST(floor(power(random(), 3) * {ITEMS}) AS BIGINT)"
    moment = f"{START_MS} + CAST(floor(random() * {30 * DAY_MS}) AS BIGINT)"
    connection.execute(
        f"""COPY (SELECT CAST(floor(random() * {users}) AS BIGINT) AS user, {item} AS item, {moment} AS time,
        CAST(floor(random() * 5) AS INTEGER) AS action FROM range({events}))
        TO '{folder}/events.parquet' (FORMAT parquet)"""
    )
    connection.execute(
        f"""COPY (SELECT hash(n // 10) % {users} AS user, {item} AS item,
        CAST({START_MS} + hash(n // 10 + 1) % {30 * DAY_MS} AS BIGINT) AS time, n // 10 AS request,
        CAST(random() < 0.1 AS INTEGER) AS click, CAST(floor(random() * 4) AS INTEGER) AS device
        FROM range({impressions}) r(n)) TO '{folder}/impressions.parquet' (FORMAT parquet)"""
    )


def run_prepare(folder: Path, memory_limit_gb: float, counters: bool) -> None:
    """What is measured."""
    counter = {"name": "item_click", "key": ["item"], "of": "impressions", "value": "click"}
    config = PrepareConfig.model_validate(
        {
            "name": "benchmark",
            "source": {
                "type": "logs",
                "events": {"path": f"{folder}/events.parquet"},
                "impressions": {"path": f"{folder}/impressions.parquet"},
            },
            "columns": {"event": {"action": {}}, "request": {"device": {}}},
            "split": {"by": "time", "test_from": "2023-12-09"},
            "counters": [counter] if counters else [],
            "memory_limit_gb": memory_limit_gb,
        }
    )
    prepare(config, folder / f"dataset-{os.getpid()}")


def run_in_memory(folder: Path) -> None:
    """The named alternative: everything in memory with PyArrow and NumPy, one file each, without any of the checks."""
    events = pq.read_table(folder / "events.parquet").sort_by([("user", "ascending"), ("time", "ascending")])
    shown = pq.read_table(folder / "impressions.parquet")
    order = [("user", "ascending"), ("time", "ascending"), ("request", "ascending")]
    shown = shown.set_column(0, "user", shown["user"].cast(pa.int64())).sort_by(order)
    known = pa.chunked_array([*events["item"].chunks, *shown["item"].chunks]).unique()
    users, starts = np.unique(events["user"].to_numpy(), return_index=True)
    offsets = pa.array(np.append(starts, len(events)).astype(np.int32))
    columns = {
        name: pa.ListArray.from_arrays(offsets, _place(events[name], known))
        if name == "item"
        else pa.ListArray.from_arrays(offsets, events[name].combine_chunks())
        for name in ("item", "time", "action")
    }
    write_arrow(pa.table({"user": users, **columns}), folder / "memory" / "histories.arrow")
    _, first = np.unique(shown["request"].to_numpy(), return_index=True)
    first = np.sort(first)
    bounds = pa.array(np.append(first, len(shown)).astype(np.int32))
    instants = np.unique(events["time"].to_numpy())
    row = np.searchsorted(users, events["user"].to_numpy())
    key = row * (len(instants) + 1) + np.searchsorted(instants, events["time"].to_numpy())
    asked = np.searchsorted(users, shown["user"].to_numpy()[first])
    ends = np.searchsorted(
        key, asked * (len(instants) + 1) + np.searchsorted(instants, shown["time"].to_numpy()[first])
    )
    items = _place(shown["item"], known)
    requests = {
        "row": asked,
        "history_end": ends,
        "items": pa.ListArray.from_arrays(bounds, items),
        "click": pa.ListArray.from_arrays(bounds, shown["click"].combine_chunks()),
        "device": shown["device"].take(pa.array(first)),
    }
    write_arrow(pa.table(requests), folder / "memory" / "requests.arrow")


def _place(values: pa.ChunkedArray, known: pa.Array) -> pa.Array:
    return pc.call_function("index_in", [values.combine_chunks()], pc.SetLookupOptions(value_set=known))


def measure(*arguments: str) -> Measured:
    """Run this module in a process of its own."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.prepare", *arguments], stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)}: failed with status {status}")
    return Measured(time.monotonic() - began, usage.ru_maxrss / 1024)


def main() -> None:
    """Print machine, sizes, times, peaks and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--impressions", type=int, default=10_000_000)
    parser.add_argument("--memory-limit-gb", type=float, default=PrepareConfig.model_fields["memory_limit_gb"].default)
    parser.add_argument("--counters", action="store_true", help="also one statistic: the item's click rate so far")
    parser.add_argument("--only", choices=["prepare", "in-memory"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only == "prepare":
        run_prepare(options.folder, options.memory_limit_gb, options.counters)
    elif options.only == "in-memory":
        run_in_memory(options.folder)
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """Measure both ways at both sizes."""
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"machine: {machine('duckdb', 'pyarrow')}")
    print(f"engine limit {options.memory_limit_gb} GiB; imports alone {imports:.0f} MiB")
    flags = ["--memory-limit-gb", str(options.memory_limit_gb), *(["--counters"] if options.counters else [])]
    found: dict[str, list[Measured]] = {"prepare": [], "in-memory": []}
    for share in (10, 1):
        events, impressions = options.events // share, options.impressions // share
        with tempfile.TemporaryDirectory() as name:
            write_logs(Path(name), events, impressions)
            for way, measured in found.items():
                measured.append(measure("--only", way, "--folder", name, *flags))
                print(f"{events:>12,} events + {impressions:>12,} impressions  {way:<10} "
                      f"{measured[-1].seconds:7.1f} s  {measured[-1].peak_mib:7.0f} MiB", flush=True)  # fmt: skip
    for way, (small, large) in found.items():
        print(f"{way}: 10 × the rows take {large.seconds / small.seconds:.1f} × the time and "
              f"{large.peak_mib / small.peak_mib:.2f} × the memory")  # fmt: skip
    ours, theirs = found["prepare"][1], found["in-memory"][1]
    print(f"prepare / in-memory, at the larger size: time {ours.seconds / theirs.seconds:.2f}, "
          f"memory {ours.peak_mib / theirs.peak_mib:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
