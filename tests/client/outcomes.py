"""What a call of the client comes to."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import numpy as np


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


def printed(stdout: str) -> list[np.ndarray]:
    """Scores `[N, tasks]` float32 of each request; its candidates come in order."""
    rows = [line.split("\t") for line in stdout.splitlines()]
    found: list[list[list[str]]] = []
    for request, candidate, *scores in rows:
        if candidate == "0":
            found.append([])
        assert (int(request), int(candidate)) == (len(found) - 1, len(found[-1]))
        found[-1].append(scores)
    return [np.array(scores, np.float32) for scores in found]


def pair_in(folder: Path, ending: str = ".pt") -> tuple[str | Path, ...]:
    """Options that score by a folder's pair."""
    return "--pair", folder / f"user_encoder{ending}", folder / f"candidate_ranker{ending}"
