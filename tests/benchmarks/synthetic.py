"""Speed and memory of the log generator, against the same code with all users in one chunk.

    python -m tests.benchmarks.synthetic --events 10000000

The model is configs/synthetic/large.yaml with as many users as the events need. Each run is a process of its own, whose
peak resident memory is reported; files go to a temporary folder. One chunk needs memory in proportion to the events, so
it runs on `--whole-events` of them and the ratios are of two runs of that size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from features.prepare.synthetic import CHUNK_ROWS, generate
from features.schema import PrepareConfig, SyntheticSource
from tests.benchmarks.machine import machine

LARGE = Path(__file__).parents[2] / "configs" / "synthetic" / "large.yaml"


@dataclass(frozen=True)
class Measured:
    """Rows written, bytes on disk, seconds, and peak resident memory in MiB."""

    events: int
    impressions: int
    disk_bytes: int
    seconds: float
    peak_mib: float


def source_of(events: int) -> SyntheticSource:
    """The large model with users enough for about `events` events."""
    source = PrepareConfig.model_validate(yaml.safe_load(LARGE.read_text())).source
    assert isinstance(source, SyntheticSource)
    return source.model_copy(update={"users": max(1, events // source.events_per_user)})


def rows(folder: Path) -> int:
    """Rows of a folder of part files."""
    return sum(pq.read_metadata(path).num_rows for path in folder.iterdir())


def measure(events: int, chunk_rows: int) -> Measured:
    """Generate in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "logs"
        began = time.monotonic()
        command = ["--events", str(events), "--chunk-rows", str(chunk_rows), "--out", str(out)]
        process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.synthetic", *command])
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"{' '.join(command)}: failed with status {status}")
        seconds = time.monotonic() - began
        return Measured(
            events=rows(out / "events"),
            impressions=rows(out / "impressions"),
            disk_bytes=sum(path.stat().st_size for path in out.rglob("*.parquet")),
            seconds=seconds,
            peak_mib=usage.ru_maxrss / 1024,
        )


def show(name: str, run: Measured) -> None:
    """One line of the table."""
    print(
        f"{name:<10} {run.events:>12,} events {run.impressions:>10,} impressions {run.disk_bytes / 1e6:8,.0f} MB "
        f"{run.seconds:7.1f} s {run.events / run.seconds / 1e6:6.2f} M events/s {run.peak_mib:8,.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Print machine, sizes, speeds, peaks and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--whole-events", type=int, help="events of the one-chunk run; default: --events, at most 10^7")
    parser.add_argument("--chunk-rows", type=int, default=CHUNK_ROWS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        generate(source_of(options.events), options.out, options.chunk_rows)
        return

    whole_events = options.whole_events or min(options.events, 10_000_000)
    print(f"machine: {machine('numpy', 'pyarrow')}; chunks of {options.chunk_rows:,} rows")
    sizes = sorted({options.events // 10, whole_events, options.events})
    streamed = {events: measure(events, options.chunk_rows) for events in sizes}
    for run in streamed.values():
        show("streamed", run)
    whole = measure(whole_events, 10**15)
    show("one chunk", whole)

    small, large, same = streamed[options.events // 10], streamed[options.events], streamed[whole_events]
    more, slower, wider = (large.events / small.events, large.seconds / small.seconds, large.peak_mib / small.peak_mib)
    print(f"streamed: {more:.1f} × the events take {slower:.1f} × the time and {wider:.2f} × the memory")
    faster, leaner = same.seconds / whole.seconds, same.peak_mib / whole.peak_mib
    print(f"streamed / one chunk, about {whole_events:,} events: time {faster:.2f}, memory {leaner:.2f}")


if __name__ == "__main__":
    main()
