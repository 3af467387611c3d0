"""What ``ranker memory`` shows of a store, and does to it."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ranker.memory.decode import decode
from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.record import header_of
from ranker.memory.store import Generation, MemoryStore, StoreError, found_in, open_store
from ranker.memory.verify import verify

SHOWN = 32
"""numbers of a record that are printed"""


def show_stats(url: str) -> None:
    """Generations of a store: what they hold, of which versions and how old, and which of them each model's servers
    read."""
    store = open_store(url)
    generations, currents = store.generations(), store.currents()
    table = Table("", *(generation.name for generation in generations), title=escape(store.url))
    columns = [_figures(store, generation, generation.name in currents.values()) for generation in generations]
    for what in dict.fromkeys(name for column in columns for name in column):
        table.add_row(what, *(column.get(what, "") for column in columns))
    if generations:
        Console().print(table)
    else:
        Console().print("no generation yet (`ranker memory build RUN --store …` makes one)")
    there = {generation.name for generation in generations}
    for versions, name in currents.items():
        if name not in there:
            line = f"servers of {versions} are to read {name}, which is gone or cannot be read; switch to another"
            Console().print(line, highlight=False, markup=False, soft_wrap=True)
    store.close()


def _figures(store: MemoryStore, generation: Generation, current: bool) -> dict[str, str]:
    """Of one generation, by what they are."""
    size = store.size(generation.name)
    return {
        "state": "current of its model" if current else "finished" if generation.finished_ms else "unfinished",
        "records": f"{size.records:,}",
        "MiB": f"{size.bytes / 2**20:,.1f}",
        "bytes a record": f"{size.bytes / max(size.records, 1):,.0f}",
        "dtype": generation.dtype,
        "model": f"{generation.model:016x}",
        "codebook": f"{generation.codebook:016x}",
        "blocks": "\n".join(f"{block}, by {per}" for block, per in sorted(generation.blocks.items())),
        "as of": moment(generation.as_of_ms),
        "age": age(generation.as_of_ms),
        "units done": f"{len(store.done(generation.name)):,}",
        **{what: f"{count:,}" for what, count in generation.counts.items()},
        **{what: escape(note) for what, note in generation.notes.items()},
    }


def show_record(url: str, user: str, code: int, block: int, name: str | None) -> None:
    """One record, as a reader of its own versions would take it.

    Raises:
        StoreError: there is no such record.
    """
    store = open_store(url)
    generation = _chosen(store, name)
    keys = keys_of(hashes_of([user]), block, np.zeros(1, np.int64), np.array([code]))
    (value,) = store.get(generation.name, keys.key)
    store.close()
    what = f"user {user!r}, block {block}, code {code}"
    if value is None:
        raise StoreError(f"{store.url}: generation {generation.name!r} has no record of {what}")
    header = header_of(value)
    if header is None:
        raise StoreError(f"{store.url}: the record of {what} is corrupt ({len(value)} bytes); build it again")
    console = Console()

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    stored, outcomes, _ = decode([value], keys.fingerprint, generation.versions)
    verdict = next(what for what, count in zip(outcomes._fields, outcomes, strict=True) if count)
    line(f"generation {generation.name}, {what}: key {int(keys.key[0]):016x}, {len(value)} bytes, {verdict}")
    line(f"{header.versions}; {header.dtype}; as of {moment(header.as_of_ms)}; time {header.time} ms")
    for part, numbers in (("values", stored.values), ("exact", stored.exact)):
        rest = f" … {numbers.numel() - SHOWN} more" if numbers.numel() > SHOWN else ""
        line(f"{part} [{numbers.numel()}]: {' '.join(f'{x:.6g}' for x in numbers[:SHOWN].tolist())}{rest}")


def show_verified(url: str, name: str | None, sample: int | None) -> bool:
    """Judge a generation's records; whether all are as they should be."""
    store = open_store(url)
    generation = _chosen(store, name)
    found = verify(store, generation, sample)
    store.close()
    table = Table("found", "records", title=f"{escape(store.url)}, generation {generation.name}")
    table.columns[1].justify = "right"
    table.add_row("read", f"{found.records:,}" + ("" if found.whole else " (a sample)"))
    table.add_row("whole, of its versions", f"{found.outcomes.found:,}")
    table.add_row("of other versions", f"{found.outcomes.old_version:,}")
    table.add_row("corrupt", f"{found.outcomes.corrupt:,}")
    table.add_row(f"not {generation.dtype}", f"{found.other_dtype:,}")
    for size, count in found.sizes.items():
        table.add_row(f"of {size:,} bytes", f"{count:,}")
    if found.whole:
        table.add_row("put, and overwritten by another or by itself", f"{found.overwritten:,}")
    console = Console()
    console.print(table)
    if found.as_of_ms is not None:
        console.print(f"as of {moment(found.as_of_ms[0])} to {moment(found.as_of_ms[1])}", highlight=False)
    for key in found.examples:
        console.print(f"bad: key {key:016x}", highlight=False)
    return found.bad == 0 and found.other_dtype == 0


def switch(url: str, name: str) -> None:
    """Have readers of a generation's versions read it."""
    store = open_store(url)
    versions = found_in(store.generations(), name, store.url).versions
    old = store.current(versions)
    store.switch(name)
    store.close()
    Console().print(
        f"{store.url}: {old or 'nothing'} → {name}, for servers of {versions}; they notice within their check_every_s "
        "(default 1 s)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def drop(url: str, name: str, current: bool = False) -> None:
    """Remove a generation, one that is current if told to."""
    store = open_store(url)
    store.drop(name, current)
    store.close()
    Console().print(f"{store.url}: {name} dropped")


def _chosen(store: MemoryStore, name: str | None) -> Generation:
    """The generation of that name, or the current one, where but one model has one."""
    if name is None:
        currents = list(store.currents().values())
        if len(currents) != 1:
            which = (
                f"{len(currents)} generations are current ({', '.join(currents)})" if currents else "none is current"
            )
            raise StoreError(f"{store.url}: {which}; name one with --generation (`ranker memory stats {store.url}`)")
        name = currents[0]
    return found_in(store.generations(), name, store.url)


def moment(ms: int) -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def age(ms: int, now_ms: float | None = None) -> str:
    """Time since then, in its largest unit.

    >>> age(0, 59_000), age(0, 5_400_000), age(0, 200_000_000)
    ('59 s', '1.5 h', '2.3 d')
    """
    seconds = ((time.time() * 1000 if now_ms is None else now_ms) - ms) / 1000
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
