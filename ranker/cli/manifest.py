"""What `ranker prepare` shows of a dataset: its splits, what was dropped, and the ids it met."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from features.dataset import HashInfo, Manifest


def print_manifest(manifest: Manifest, out: Path) -> None:
    """Counts of what was made, and of what was left out."""
    console = Console()
    labels = manifest.labels
    table = Table(
        "split",
        "requests",
        "impressions",
        "users",
        *labels,
        "unknown items",
        title=f"{manifest.name} → {escape(str(out))}",
    )
    for split, info in manifest.splits.items():
        positives = [f"{info.positives.get(label, 0):,}" for label in labels]
        counts = (f"{n:,}" for n in (info.requests, info.impressions, info.users))
        table.add_row(split, *counts, *positives, f"{info.unknown_items:,}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(id_table(manifest))
    console.print(
        f"{manifest.events:,} history events of {manifest.users - 1:,} users; {manifest.known_items - 1:,} known and "
        f"{manifest.items - manifest.known_items:,} unknown items; {len(manifest.partitions)} partitions"
    )
    dropped = {reason: count for reason, count in manifest.dropped.items() if count}
    found = {what: count for what, count in manifest.counted.items() if count}
    if found:
        console.print("found: " + ", ".join(f"{what}: {count:,}" for what, count in found.items()))
    console.print("dropped: " + (", ".join(f"{reason}: {count:,}" for reason, count in dropped.items()) or "nothing"))


def id_table(manifest: Manifest) -> Table:
    """One line for each feature of ids: rows of a table, row 0 included; of hashed ids how many there are, and how many
    share their row; else the share of the ids of each split that the vocabulary lacks."""
    splits = manifest.filled_splits()
    table = Table("ids", "rows", "hashed", "share a row", *splits, title="ids, and how many of a split's are unknown")
    for feature, rows, hashed in _features(manifest):
        unknown = [manifest.splits[split].unknown.get(feature) for split in splits]
        counts = ("–", "–") if hashed is None else (f"{hashed.ids:,}", _share(hashed.sharing, hashed.ids))
        table.add_row(feature, f"{rows:,}", *counts, *("–" if n is None else _share(*n) for n in unknown))
    table.columns[0].no_wrap = True  # a feature's name is what configs say
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _features(manifest: Manifest) -> list[tuple[str, int, HashInfo | None]]:
    named = [(kind, manifest.id_rows(kind), manifest.hashed(kind)) for kind in ("user", "item")]
    for scope, columns in manifest.columns.items():
        ids = {name: info for name, info in columns.items() if info.kind in ("categorical", "bag")}
        named += [(f"{scope}.{name}", info.size, info.hashed) for name, info in ids.items()]
    return named


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"
