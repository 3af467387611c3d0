"""Rows of a checkpoint's tables into another model's, whatever the two models' sizes, sharding and numbers of ranks.

Each rank reads what its own shards need, and no collective is needed: a saved shard at a time, from which rows are
copied and which is forgotten before the next. Memory beyond the model's is one saved shard, twice for a moment (up to
twice that where the allocator keeps what is freed, as training asks glibc to), and a number for each row of one table's
shards here.

A table is `[rows, columns]`, cut into shards by rows or columns. Of its optimizer's state, a tensor of the table's
shape is cut like it; one with a number a row (row-wise Adagrad) has such numbers for each shard of columns, one shard's
after the other's. Where columns are cut at other places than before, a shard's number is the mean of those it overlaps,
weighted by width: sums of mean squared gradients of whole shards add up to exactly that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from features.table_rows import NEW

Ints = npt.NDArray[np.int64]
NewRows = Literal["unknown", "random", "mean"]


class Piece(NamedTuple):
    """What a shard holds of a table: rows ``row … row + rows - 1`` of the columns ``column … end - 1``."""

    row: int
    rows: int
    column: int
    end: int


class Saved:
    """The tensors of a checkpoint, and how they were cut."""

    def __init__(self, path: Path) -> None:
        self._reader = FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __contains__(self, name: str) -> bool:
        return name in self._metadata.state_dict_metadata

    def size(self, name: str) -> torch.Size:
        """A tensor's, whole."""
        return self._tensor(name).size

    def pieces(self, name: str, table: str) -> dict[MetadataIndex, Piece]:
        """The shards of a table, or of its optimizer's state `name`."""
        shards = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._tensor(name).chunks]
        of_table = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._tensor(table).chunks]
        pieces = _pieces(shards, of_table)
        return {MetadataIndex(name, shards[i][0], i): piece for i, piece in pieces.items()}

    def read(self, shards: Iterable[MetadataIndex], take: Callable[[MetadataIndex, Tensor], None]) -> None:
        """Hand each of some saved shards to `take`, one after the other."""
        items = [
            ReadItem(LoadItemType.TENSOR, shard, torch.Size([0] * len(size)), shard, torch.Size([0] * len(size)), size)
            for shard, size in ((shard, self._size(shard)) for shard in shards)
        ]
        types = {item.storage_index.fqn: self._tensor(item.storage_index.fqn).properties.dtype for item in items}
        planner = _EachShard(types, take)
        for item in items:  # one a call: the reader keeps what it has read until it has read the next
            self._reader.read_data(LoadPlan([item]), planner).wait()

    def _tensor(self, name: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata[name]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def _size(self, shard: MetadataIndex) -> torch.Size:
        assert shard.index is not None
        return self._tensor(shard.fqn).chunks[shard.index].sizes


class _EachShard(LoadPlanner):
    """Gives the reader room for one shard, and the shard to `take`."""

    def __init__(self, types: dict[str, torch.dtype], take: Callable[[MetadataIndex, Tensor], None]) -> None:
        self._types, self._take = types, take
        self._room = torch.empty(0, dtype=torch.uint8)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The plan is made already."""

    def create_local_plan(self) -> LoadPlan:
        """The plan is made already."""
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Every rank reads for itself."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """A shard is a tensor."""
        raise TypeError(f"{read_item.storage_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Room for the shard."""
        kind = self._types[read_item.storage_index.fqn]
        size = read_item.lengths.numel() * kind.itemsize
        if size > self._room.numel():
            self._room = torch.empty(size, dtype=torch.uint8)  # once for all shards: freed ones leave holes
        return self._room[:size].view(kind).view(read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The shard has been read."""
        self._take(read_item.storage_index, tensor)


class _Shard:
    """A shard of this rank with the older row of each of its rows, NEW or that of the unknown id where it has none."""

    def __init__(self, tensor: Tensor, piece: Piece, older: Ints, fresh: Ints) -> None:
        self.tensor, self.piece, self._older, self.fresh = tensor, piece, older, fresh

    def needs(self, saved: Piece) -> bool:
        """Whether some of its rows are in a saved shard."""
        return self._overlap(saved) > 0 and self._rows(saved).size > 0

    def take(self, saved: Piece, values: Tensor) -> None:
        """Copy its rows from a saved shard; a row-wise state's are added, by their share of the columns."""
        rows = self._rows(saved)
        here = torch.from_numpy(rows).to(self.tensor.device)
        from_saved = torch.from_numpy(self._older[rows] - saved.row)
        if self.tensor.dim() == 1:
            share = self._overlap(saved) / (self.piece.end - self.piece.column)
            self.tensor[here] += share * values[from_saved].to(self.tensor.device)
        else:
            columns, saved_columns = self.columns(saved)
            self.tensor[here, columns] = values[from_saved, saved_columns].to(self.tensor.device)

    def columns(self, saved: Piece) -> tuple[slice, slice]:
        """The columns it shares with a saved shard, as they are counted here, and there."""
        first, end = max(self.piece.column, saved.column), min(self.piece.end, saved.end)
        return slice(first - self.piece.column, end - self.piece.column), slice(
            first - saved.column, end - saved.column
        )

    def _overlap(self, saved: Piece) -> int:
        return min(self.piece.end, saved.end) - max(self.piece.column, saved.column)

    def _rows(self, saved: Piece) -> Ints:
        return ((self._older >= saved.row) & (self._older < saved.row + saved.rows)).nonzero()[0]


class Carried(NamedTuple):
    """Rows of a table on this rank, its row 0 apart, each counted once whatever the shards of columns."""

    kept: int
    new: int


def carry_rows(
    saved: Saved,
    table: str,
    weight: ShardedTensor,
    states: dict[str, ShardedTensor],
    older_rows: Callable[[int, int], Ints],
    new_rows: NewRows,
) -> Carried:
    """Fill this rank's shards of one table, and of its optimizer's states, with the rows of a checkpoint.

    Args:
        table: the table's name in the checkpoint.
        states: by name in the checkpoint.
        older_rows: the older row of each row from a first to before an end, NEW where it has none.
        new_rows: what rows that have none become: the row of the unknown id, what they are now (random), or the mean of
            the older rows. The states of new rows are 0.
    """
    maps: dict[tuple[int, int], Ints] = {}

    def map_of(piece: Piece) -> Ints:
        rows = (piece.row, piece.row + piece.rows)
        if rows not in maps:
            maps[rows] = older_rows(*rows)
        return maps[rows]

    of_weight = _local_pieces(weight, weight)
    unknown = 0 if new_rows == "unknown" or (new_rows == "mean" and saved.size(table)[0] == 1) else NEW
    shards: dict[str, list[_Shard]] = {table: []}
    for tensor, piece in of_weight:
        older = map_of(piece)
        fresh = (older == NEW).nonzero()[0]
        shards[table].append(_Shard(tensor, piece, np.where(older == NEW, unknown, older), fresh))
    for name, state in states.items():
        shards[name] = []
        for tensor, piece in _local_pieces(state, weight):
            tensor.zero_()
            shards[name].append(_Shard(tensor, piece, map_of(piece), np.zeros(0, np.int64)))
    mean = _Means([s for s in shards[table] if s.fresh.size and new_rows == "mean" and unknown == NEW])
    pieces = {index: piece for name in shards for index, piece in saved.pieces(name, table).items()}

    def take(index: MetadataIndex, values: Tensor) -> None:
        for shard in shards[index.fqn]:
            if shard.needs(pieces[index]):
                shard.take(pieces[index], values)
        if index.fqn == table:
            mean.take(pieces[index], values)

    def needed(index: MetadataIndex) -> bool:
        return any(s.needs(pieces[index]) for s in shards[index.fqn]) or (index.fqn == table and mean.shards != [])

    with torch.no_grad():
        saved.read([index for index in pieces if needed(index)], take)
        mean.fill(saved.size(table)[0] - 1)
    first = [map_of(piece)[int(piece.row == 0) :] for _, piece in of_weight if piece.column == 0]
    return Carried(sum(int((m != NEW).sum()) for m in first), sum(int((m == NEW).sum()) for m in first))


class _Means:
    """The mean of the older rows, that of the unknown id apart, for the new rows of some shards."""

    def __init__(self, shards: list[_Shard]) -> None:
        self.shards = shards
        self._sums = [torch.zeros(s.piece.end - s.piece.column, dtype=torch.float64) for s in shards]

    def take(self, saved: Piece, values: Tensor) -> None:
        """Add a saved shard's rows."""
        for shard, total in zip(self.shards, self._sums, strict=True):
            columns, saved_columns = shard.columns(saved)
            if columns.start < columns.stop:
                total[columns] += values[int(saved.row == 0) :, saved_columns].sum(0, dtype=torch.float64)

    def fill(self, rows: int) -> None:
        """Write the means of so many rows."""
        for shard, total in zip(self.shards, self._sums, strict=True):
            mean = (total / rows).to(shard.tensor)
            shard.tensor[torch.from_numpy(shard.fresh).to(shard.tensor.device)] = mean


def _local_pieces(tensor: ShardedTensor, table: ShardedTensor) -> list[tuple[Tensor, Piece]]:
    """This rank's shards of a table, or of its optimizer's state."""
    local = tensor.local_shards()
    shards = [(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)) for s in local]
    of_table = [(tuple(s.shard_offsets), tuple(s.shard_sizes)) for s in table.metadata().shards_metadata]
    return [(local[i].tensor, piece) for i, piece in _pieces(shards, of_table).items()]


_Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""offsets and sizes of a shard"""


def _pieces(shards: list[_Cut], of_table: list[_Cut]) -> dict[int, Piece]:
    """What shards hold, by their number; those that are empty, as where ranks are more than rows, left out."""
    rows = max(offset[0] + size[0] for offset, size in of_table)
    columns = sorted({(offset[1], offset[1] + size[1]) for offset, size in of_table})
    pieces: dict[int, Piece] = {}
    for i, (offset, size) in enumerate(shards):
        if 0 in size:
            continue
        if len(offset) == 2:
            pieces[i] = Piece(offset[0], size[0], offset[1], offset[1] + size[1])
        else:
            part, row = divmod(offset[0], rows)
            pieces[i] = Piece(row, size[0], *columns[part])
    return pieces
