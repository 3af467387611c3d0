"""Columns of a dataset's Arrow files as NumPy views of the memory map, and how parts of jagged ones are copied out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.dataset import Dataset, DatasetError, partition_dir

Ints = NDArray[np.int64]
Array = NDArray[Any]


def ranges(first: Ints, lengths: Ints) -> Ints:
    """The concatenation of ``arange(first[i], first[i] + lengths[i])``.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = first - np.cumsum(lengths) + lengths
    out = np.repeat(shift, lengths)
    out += np.arange(out.size)
    return out


_LONG = 200
"""Elements of a window from which copying it in one piece pays: a piece costs about 1 µs, an indexed element 4 ns."""


def copy_windows(values: Array, start: Ints, end: Ints) -> Array:
    """The concatenation of ``values[start[i]:end[i]]``.

    Short windows are read by an index of their elements, long ones by Arrow, which copies each in one piece.

    >>> copy_windows(np.arange(9), np.array([1, 6]), np.array([3, 8])).tolist()
    [1, 2, 6, 7]
    """
    lengths = end - start
    if lengths.sum() <= _LONG * lengths.size:
        return values[ranges(start, lengths)]
    flat = pa.LargeListViewArray.from_arrays(pa.array(start), pa.array(lengths), pa.array(values)).flatten()
    # not to_numpy(), which marks what Arrow has copied as read-only
    return np.frombuffer(flat.buffers()[1], values.dtype)[flat.offset : flat.offset + len(flat)]


class Lists(NamedTuple):
    """A list column: the elements of row i are ``values[offsets[i] : offsets[i + 1]]``."""

    values: Array
    offsets: Ints

    def rows(self, rows: Ints) -> tuple[Array, Ints]:
        """Values and lengths of some rows."""
        first = self.offsets[rows]
        lengths = self.offsets[rows + 1] - first
        return self.values[ranges(first, lengths)], lengths


class File:
    """One Arrow file of a dataset; each column is viewed once and kept.

    Raises (all methods):
        DatasetError: the file has no such column, or one of another shape than asked for, or one with nulls.
    """

    def __init__(self, batch: pa.RecordBatch, path: Path) -> None:
        self._batch, self._path = batch, path
        self._flat: dict[str, Array] = {}
        self._lists: dict[str, Lists] = {}

    def is_list(self, name: str) -> bool:
        """Whether the column holds a list a row."""
        kind = self._column(name).type
        return pa.types.is_list(kind) or pa.types.is_large_list(kind)

    def flat(self, name: str) -> Array:
        """A column of one value a row."""
        if name not in self._flat:
            if self.is_list(name):
                raise self._unusable(name, "holds lists where one value a row is expected")
            self._flat[name] = self._view(name, self._column(name))
        return self._flat[name]

    def vectors(self, name: str, dim: int) -> Array:
        """A column of one vector of `dim` floats a row: `[rows, dim]`."""
        column = self._column(name)
        if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != dim or column.null_count:
            raise self._unusable(name, f"is {column.type} where a vector of {dim} floats a row is expected")
        return self._view(name, column.flatten()).reshape(-1, dim)

    def lists(self, name: str) -> Lists:
        """A list column."""
        if name not in self._lists:
            column = self._column(name)
            if not self.is_list(name):
                raise self._unusable(name, f"is {column.type} where lists are expected")
            if column.null_count:
                raise self._unusable(name, f"has {column.null_count} nulls")
            offsets = column.offsets.to_numpy().astype(np.int64)
            self._lists[name] = Lists(self._view(name, column.flatten()), offsets - offsets[0])
        return self._lists[name]

    def elements(self, name: str, like: str) -> Array:
        """The elements of list column `name`, which has as many a row as `like` has."""
        values = self.lists(name).values
        if values.size != self.lists(like).values.size:
            raise self._unusable(name, f"has {values.size} elements, {like} has {self.lists(like).values.size}")
        return values

    def _column(self, name: str) -> pa.Array:
        if name not in self._batch.schema.names:
            raise self._unusable(name, f"is missing; columns: {', '.join(self._batch.schema.names)}")
        column = self._batch.column(name)
        try:
            column.validate()
        except pa.ArrowInvalid as error:
            raise self._unusable(name, f"is broken ({error})") from error
        return column

    def _view(self, name: str, values: pa.Array) -> Array:
        if values.null_count:
            raise self._unusable(name, f"has {values.null_count} nulls")
        if pa.types.is_boolean(values.type):  # bits in Arrow: the only type that is not viewed but copied
            return values.to_numpy(zero_copy_only=False).view(np.uint8)
        return values.to_numpy()

    def _unusable(self, name: str, why: str) -> DatasetError:
        return DatasetError(f"{self._path}: column {name!r} {why}; run `ranker prepare` again")


class Partition:
    """One partition's two files."""

    def __init__(self, dataset: Dataset, index: int) -> None:
        folder = partition_dir(dataset.root, index)
        self.histories = File(dataset.histories(index), folder / "histories.arrow")
        self.requests = File(dataset.requests(index), folder / "requests.arrow")

    def event(self, name: str) -> Array:
        """A history column, all rows' events one after another."""
        return self.histories.elements(name, like="item")

    def candidate(self, name: str) -> Array:
        """A column of the candidates, all requests' one after another."""
        return self.requests.elements(name, like="items")


def item_file(dataset: Dataset) -> File:
    """The item table."""
    return File(dataset.items(), dataset.root / "items.arrow")
