"""The error of `prepare`: its message names the file, the column, the value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from features.errors import UserError


class PrepareError(UserError):
    """Logs or a config from which no dataset can be made."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """What to offer for a misspelt `name`.

    >>> nearest("user_idd", ["user_id", "item_id"])
    "did you mean 'user_id'? It has: item_id, user_id"
    """
    known = sorted(set(choices))
    listed = ", ".join(known[:40]) + (", …" if len(known) > 40 else "")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"It has: {listed or 'no columns'}"
