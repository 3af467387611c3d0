"""Non-sequence references: what a ranker must beat before its histories are worth anything.

All three are counted on the training split and know neither history nor context:

- ``constant``         p = m, the mean label;
- ``item_rate``        p_i = (s_i + k m) / (n_i + k), the item's rate smoothed towards the mean (k = 20);
- ``user_item_logit``  p_ui = σ(logit p_u + logit p_i − logit m), with p_u the user's rate smoothed alike.

n counts trials and s successes. For CTR they are impressions and clicks; for CTCVR impressions and clicks that
converted; for CVR clicks and clicks that converted. So each task has its own rate on its own population, and CVR is
not the quotient of the two others, whose smoothing would enter twice. An item or user without trials gets m.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from features.dataset import Dataset, DatasetError
from features.schema import Split
from ranker.evaluation.metrics import Array, Predictions, Task

Reference = Literal["constant", "item_rate", "user_item_logit"]
REFERENCES: tuple[Reference, ...] = ("constant", "item_rate", "user_item_logit")
Floats: TypeAlias = npt.NDArray[np.float64]

# A mean of exactly 0 or 1 has no logit.
_MEAN_CLIP = 1e-7


@dataclass(frozen=True)
class Impressions:
    """A chunk of labelled impressions: `[N]` columns; `conversion` is ``None`` where there is no such label."""

    user: Array
    item: Array
    click: Array
    conversion: Array | None = None


@dataclass
class Tallies:
    """Impressions, clicks and converted clicks by dense id; grows with the largest id seen."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 0), np.int64))

    def add(self, ids: Array, click: Array, converted: Array) -> None:
        """Count one chunk: `ids`, and 0/1 labels, `[N]` each."""
        if len(ids) == 0:
            return
        if int(ids.min()) < 0:
            raise ValueError(f"id {int(ids.min())} is negative; dense ids start at 0")
        size = self.counts.shape[1]
        if (needed := int(ids.max()) + 1) > size:
            self.counts = np.pad(self.counts, ((0, 0), (0, max(needed, 2 * size) - size)))
        np.add.at(self.counts[0], ids, 1)
        np.add.at(self.counts[1], ids[click], 1)
        np.add.at(self.counts[2], ids[converted], 1)

    def of(self, task: Task, ids: Array) -> tuple[Floats, Floats]:
        """(successes, trials) `[N]` of `ids`; 0 for ids never seen."""
        success, trial = _ROWS[task]
        known = ids < self.counts.shape[1]
        both = np.zeros((2, len(ids)))
        both[:, known] = self.counts[[[success], [trial]], ids[known]]
        return both[0], both[1]


# task: (row of successes, row of trials) in Tallies.counts
_ROWS: dict[Task, tuple[int, int]] = {"ctr": (1, 0), "ctcvr": (2, 0), "cvr": (2, 1)}


@dataclass
class References:
    """Counts of the training split, and what the references predict from them."""

    smoothing: float = 20.0
    """k: how many impressions at the mean every item and user starts with"""
    has_conversion: bool = True
    users: Tallies = field(default_factory=Tallies)
    items: Tallies = field(default_factory=Tallies)

    def add(self, chunk: Impressions) -> None:
        """Count one chunk of training impressions."""
        click = chunk.click.astype(bool)
        if chunk.conversion is None:
            self.has_conversion, converted = False, np.zeros_like(click)
        else:
            converted = click & chunk.conversion.astype(bool)
        self.users.add(chunk.user, click, converted)
        self.items.add(chunk.item, click, converted)

    @property
    def impressions(self) -> int:
        """How many impressions were counted."""
        return int(self.items.counts[0].sum())

    def mean(self, task: Task) -> float:
        """m: the mean label of the task, kept off 0 and 1.

        Raises:
            ValueError: nothing was counted.
        """
        if self.impressions == 0:
            raise ValueError("nothing was counted: references need training impressions")
        totals = self.items.counts.sum(axis=1)
        success, trial = _ROWS[task]
        return float(np.clip(totals[success] / max(totals[trial], 1), _MEAN_CLIP, 1 - _MEAN_CLIP))

    def predict(self, name: Reference, task: Task, user: Array, item: Array) -> Floats:
        """Probabilities `[N]` of one reference for one task."""
        m = self.mean(task)
        if name == "constant":
            return np.full(len(item), m)
        p_i = self._smoothed(self.items.of(task, item), m)
        if name == "item_rate":
            return p_i
        p_u = self._smoothed(self.users.of(task, user), m)
        return _sigmoid(_logit(p_u) + _logit(p_i) - _logit(m))

    def _smoothed(self, counts: tuple[Floats, Floats], m: float) -> Floats:
        s, n = counts
        return (s + self.smoothing * m) / (n + self.smoothing)

    def score(self, name: Reference, predictions: Predictions) -> Predictions:
        """The same impressions with this reference's probabilities in place of the model's."""

        def p(task: Task) -> Floats:
            return self.predict(name, task, predictions.user, predictions.item)

        converts = self.has_conversion and predictions.conversion is not None
        return replace(
            predictions,
            p_ctr=p("ctr"),
            p_ctcvr=p("ctcvr") if converts else None,
            p_cvr=p("cvr") if converts else None,
        )


def count_references(chunks: Iterable[Impressions], smoothing: float = 20.0) -> References:
    """Count a stream of training impressions; memory is that of the counts and one chunk."""
    references = References(smoothing)
    for chunk in chunks:
        references.add(chunk)
    return references


def fit_references(
    dataset: Dataset,
    splits: Sequence[Split] = ("train",),
    smoothing: float = 20.0,
    labels: tuple[str, str | None] = ("click", "conversion"),
) -> References:
    """References from the impressions of a prepared dataset's `splits`; `labels` as in :func:`read_impressions`.

    Raises:
        DatasetError: those splits hold no impressions.
    """
    chunks = (chunk for split in splits for chunk in read_impressions(dataset, split, labels))
    references = count_references(chunks, smoothing)
    if references.impressions == 0:
        raise DatasetError(f"{dataset.root}: no impressions in {', '.join(splits)} to count references from")
    return references


def read_impressions(
    dataset: Dataset,
    split: Split,
    labels: tuple[str, str | None] = ("click", "conversion"),
    requests: int = 65_536,
) -> Iterator[Impressions]:
    """The impressions of one split, from so many `requests` at a time; an empty split gives none.

    `labels` are the dataset's names of click and conversion; one without the second label has no conversions.
    """
    clicks, conversions = labels
    converts = conversions in dataset.manifest.labels
    for number, partition in enumerate(dataset.manifest.partitions):
        start, stop = partition.requests.get(split, (0, 0))
        if start == stop:
            continue
        users = _values(dataset.histories(number)["user"])
        rows: Any = dataset.requests(number)
        for first in range(start, stop, requests):
            chunk = rows.slice(first, min(requests, stop - first))
            candidates = np.diff(_values(chunk["items"].offsets))
            yield Impressions(
                user=np.repeat(users[_values(chunk["row"])], candidates),
                item=_values(chunk["items"].flatten()),
                click=_values(chunk[f"label.{clicks}"].flatten()),
                conversion=_values(chunk[f"label.{conversions}"].flatten()) if converts else None,
            )


def _values(column: Any) -> Array:
    """A flat Arrow column as numpy, without a copy where it has no nulls."""
    return column.to_numpy(zero_copy_only=False)


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-p)


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))
