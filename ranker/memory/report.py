"""What was built, in figures: printed, and kept in the generation's metadata."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from features.instants import iso
from features.schema import Split
from ranker.export.inputs import StoredBlock
from ranker.memory.coverage import Coverage, Share
from ranker.memory.store import Generation, MemoryStore

_FOUND, _ASKED = "coverage.found.", "coverage.asked."


@dataclass(frozen=True)
class BuildReport:
    """A build's or a refresh's outcome.

    made: users whose records were made now, within `seconds` in all. before: as of the config.
    """

    url: str
    generation: Generation
    blocks: list[StoredBlock]
    made: int
    seconds: float
    before: Split | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Of the whole generation."""
        return self.generation.counts

    @property
    def coverage(self) -> Coverage:
        """As the generation has it."""
        return coverage_of(self.generation)


def counted(generation: Generation, counts: Mapping[str, int], split: Split, coverage: Coverage) -> Generation:
    """A generation that is whole, with what was counted and measured."""
    shares = {f"{_FOUND}{name}": share.found for name, share in coverage.items()}
    shares |= {f"{_ASKED}{name}": share.asked for name, share in coverage.items()}
    return generation.model_copy(
        update={
            "counts": dict(counts) | shares,
            "notes": generation.notes | {"coverage": split},
            "finished_ms": generation.finished_ms or time.time_ns() // 1_000_000,
        }
    )


def totals_of(store: MemoryStore, name: str) -> Counter[str]:
    """What all units of a generation counted."""
    counts: Counter[str] = Counter()
    for of_unit in store.done(name).values():
        counts.update(of_unit)
    return counts


def coverage_of(generation: Generation) -> Coverage:
    """What :func:`counted` kept."""
    names = [key.removeprefix(_ASKED) for key in generation.counts if key.startswith(_ASKED)]
    return {name: Share(generation.counts[_FOUND + name], generation.counts[_ASKED + name]) for name in names}


def show(report: BuildReport) -> None:
    """Print it."""
    console, counts, generation = Console(), report.counts, report.generation
    users = max(counts.get("users", 0), 1)
    table = Table("block", "a record of", "records", "a user", "bytes a record", "bytes a user")
    for column in table.columns[2:]:
        column.justify = "right"
    for block in report.blocks:
        records, size = counts.get(f"{block.number}.records", 0), counts.get(f"{block.number}.bytes", 0)
        of = "a user" if block.probe is None else f"a user and {block.probe}"
        figures = f"{records:,}", f"{records / users:,.1f}", f"{size / max(records, 1):,.1f}", f"{size / users:,.1f}"
        table.add_row(f"model.long[{block.number}] ({block.type})".replace("[", r"\["), of, *figures)
    stamps = counts.get("stamp_bytes", 0)
    table.add_row("stamps", "a user", f"{users:,}", "1.0", f"{stamps / users:,.1f}", f"{stamps / users:,.1f}")
    console.print(table)

    def line(text: str) -> None:
        console.print(escape(text), soft_wrap=True, highlight=False)

    line(
        f"generation {generation.name} of {report.url}: {counts.get('users', 0):,} users, "
        f"{counts.get('memories', 0):,} records of {generation.dtype}, as of {iso(generation.as_of_ms)}"
    )
    rate = report.made / report.seconds if report.seconds > 0 else 0.0
    line(f"made now: {report.made:,} users in {report.seconds:,.1f} s, {rate:,.0f} users/s, start included")
    line(
        f"left out: {counts.get('cut', 0):,} groups beyond codes.most; cut: {counts.get('longer', 0):,} histories "
        f"to the events that blocks read, {counts.get('clamped', 0):,} numbers to the range of {generation.dtype}"
    )
    split = generation.notes.get("coverage", "")
    for name, share in report.coverage.items():
        line(f"coverage of {split}, {_words(name)}: {share} find a record")
    if report.before is None:
        line(f"(histories hold what came after requests of {split}, too; --set before={split} builds without)")


def _words(name: str) -> str:
    number, _, what = name.partition(".")
    return f"{what} of model.long[{number}]" if what else name
