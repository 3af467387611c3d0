"""A process that reads a store until its stdin ends: `python -m tests.ranker.memory.reading URL USERS`.

Each line it says is the shift of what it read, or "mixed" for a read that is not wholly of one generation.
"""

from __future__ import annotations

import sys
import threading

from ranker.memory.reader import MemoryReader
from tests.ranker.memory.stored_memories import CODES, VERSIONS, probes_of


def main(url: str, users: int) -> None:
    """Until stdin ends."""
    reader = MemoryReader(url, {0: "probe"}, VERSIONS, check_every_s=0.02)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    last = ""
    while not stop.is_set():
        values = reader.read(list(range(users)), probes_of(users))["0.values"].view(-1, 4)
        shifts = values[:, 2].unique().tolist()
        said = str(shifts[0]) if len(shifts) == 1 and len(values) == users * CODES else "mixed"
        if said != last:
            print(said, flush=True)
            last = said


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
