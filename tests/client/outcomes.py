"""What a call of the client comes to."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """As in failure.h."""

    USAGE = 2
    FILE = 3
    MODEL = 4
    INPUTS = 5
    SCORING = 6
    SCORES = 7


def assert_message(found: str, pattern: str) -> None:
    """The whole of stderr is one message."""
    assert re.fullmatch(pattern, found), found


def pair_in(folder: Path) -> tuple[str | Path, ...]:
    """Options that score by a folder's pair."""
    return "--pair", folder / "user_encoder.pt", folder / "candidate_ranker.pt"
