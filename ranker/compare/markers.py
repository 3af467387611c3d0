"""Put a table between two comments of a Markdown file, and leave the rest as it is.

    <!-- compare:begin -->        or  <!-- compare:begin ml1m -->  or  <!-- compare:begin ml1m long -->
    …
    <!-- compare:end -->

A block that names another comparison is not touched; `long` asks for every table and the protocol.
"""

from __future__ import annotations

import re
from pathlib import Path

from features.errors import UserError
from ranker.run import write_text

_MARKER = re.compile(r"^[ \t]*<!-- compare:(begin|end)((?: [A-Za-z0-9_.-]+)*) -->[ \t]*$", re.MULTILINE)


def fill(path: Path, name: str, short: str, long: str) -> None:
    """Replace what stands in the blocks of the comparison `name`; in one step.

    Raises:
        UserError: no such file, no block for this comparison, or markers that do not pair.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist; make it, with the two marker comments where the table belongs")
    text = path.read_text(encoding="utf-8")
    markers = list(_MARKER.finditer(text))
    pieces: list[str] = []
    kept, filled = 0, False
    for number, (begin, end) in enumerate(zip(markers[::2], [*markers[1::2], None], strict=False)):
        if end is None or (begin[1], end[1]) != ("begin", "end"):
            raise UserError(
                f"{path}: marker comment {2 * number + 1} has no partner; pair compare:begin and compare:end"
            )
        words = begin[2].split()
        length = "long" if words[-1:] == ["long"] else "short"
        if (words[:-1] if length == "long" else words) not in ([], [name]):
            continue
        pieces += [text[kept : begin.end()], "\n", (long if length == "long" else short).strip("\n"), "\n"]
        kept, filled = end.start(), True
    if not filled:
        raise UserError(
            f"{path}: no block for {name}; put the lines <!-- compare:begin {name} --> and <!-- compare:end --> where "
            "the table belongs"
        )
    write_text(path, "".join([*pieces, text[kept:]]))
