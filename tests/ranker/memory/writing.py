"""A process that writes a generation: `python -m tests.ranker.memory.writing URL NAME FIRST USERS UNITS`.

It says each unit that is done; with UNITS 0 it writes without end, to be killed.
"""

from __future__ import annotations

import sys
from itertools import count

from ranker.memory.store import open_store
from tests.ranker.memory.stored_memories import generation_of, put


def main(url: str, name: str, first: int, users: int, units: int) -> None:
    """Unit u has the users from first + u · users on."""
    writer = open_store(url).begin(generation_of(name))
    for unit in range(units) if units else count():
        start = first + unit * users
        put(writer, range(start, start + users))
        writer.done(f"{first}.{unit}", {"first": start})
        print(unit, flush=True)
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
