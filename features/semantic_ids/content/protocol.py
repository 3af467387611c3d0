"""What every part of a content vector offers: a fitted encoder that reads the items of any dataset of its kind.

The module of each part has ``fit(config, dataset, seed, log)`` and ``load(config, state)``, which make one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from features.dataset import Dataset
from features.semantic_ids.quantizers.protocol import Floats, Log, State
from features.views import Ints

__all__ = ["ContentPart", "Floats", "Log", "Read", "State"]

Read = Callable[[Ints], Floats]
"""Vectors `[n, dim]` of `n` dense item indices. A row of zeros: the item has nothing in this part."""


class ContentPart(Protocol):
    """A fitted encoder. What it has learned is in terms of raw ids and values, so that other datasets are read too."""

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        ...

    def open(self, dataset: Dataset) -> Read:
        """The dataset's items as vectors.

        Raises:
            SidsError: the dataset lacks what this part is made of, or holds what no vector can be made of.
        """
        ...

    def state(self) -> State:
        """What ``load`` needs, beside the config, to make the same encoder again."""
        ...
