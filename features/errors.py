"""The one base of every error that the user, not the programmer, can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong; the message alone tells what, where, and what would be right.

    The command line prints such an error as one message and exits with 2; any other exception is a defect
    of this program and keeps its traceback.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """What ends the sentence about an unknown `name`: the choice it is most likely a slip for, or a full stop.

    >>> did_you_mean("item.sid1", ["item.sid_1", "item"])
    "; did you mean 'item.sid_1'?"
    >>> did_you_mean("price", ["user"])
    '.'
    """
    near = difflib.get_close_matches(name, choices, 1)
    return f"; did you mean {near[0]!r}?" if near else "."
