"""Rows go from a checkpoint's shards to another model's, however either is cut, with their optimizer's state."""

from __future__ import annotations

from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards

from features.table_rows import NEW
from ranker.ranks import join_ranks
from ranker.training.carried_rows import Carried, NewRows, Saved, carry_rows

TABLE, STATE, SUMS = "model.t.weight", "optimizer.t.pointwise", "optimizer.t.row_wise"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Generator[None]:
    with join_ranks("cpu", 1):
        yield


class Cut(NamedTuple):
    """Where a table is cut, by rows or by columns."""

    rows: int
    columns: int
    by_columns: bool
    places: list[int]

    def parts(self) -> list[tuple[slice, slice]]:
        end = self.columns if self.by_columns else self.rows
        edges = [0, *sorted({place % end for place in self.places} - {0}), end]
        bounds = [slice(a, b) for a, b in pairwise(edges)]
        whole = slice(0, self.rows), slice(0, self.columns)
        return [(whole[0], part) if self.by_columns else (part, whole[1]) for part in bounds]


def sharded(whole: Tensor, cut: Cut) -> ShardedTensor:
    """All shards of a tensor of the table's shape, on this rank."""
    shards = [
        Shard.from_tensor_and_offsets(whole[part].clone(), [part[0].start, part[1].start], 0) for part in cut.parts()
    ]
    return init_from_local_shards(shards, *whole.shape)


def row_wise(sums: Tensor, cut: Cut) -> ShardedTensor:
    """Of a number for each row and shard of columns `[parts, rows]`, one shard's after the other's."""
    if cut.by_columns:
        starts = [i * cut.rows for i in range(len(cut.parts()))]
        shards = [Shard.from_tensor_and_offsets(s.clone(), [start], 0) for s, start in zip(sums, starts, strict=True)]
    else:
        shards = [Shard.from_tensor_and_offsets(sums[0, rows].clone(), [rows.start], 0) for rows, _ in cut.parts()]
    return init_from_local_shards(shards, sums.numel())


def whole(tensor: ShardedTensor) -> Tensor:
    found = torch.full(tensor.size(), torch.nan)
    for shard in tensor.local_shards():
        places = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        found[tuple(slice(o, o + s) for o, s in places)] = shard.tensor
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Cut, Cut, list[int]]:
    """How the older and the newer table are cut, and the older row of each newer one."""
    columns = draw(st.integers(1, 9))
    older, newer = (draw(st.integers(1, 12)) for _ in range(2))
    cuts = [
        Cut(rows, columns, draw(st.booleans()), draw(st.lists(st.integers(0, 99), max_size=3)))
        for rows in (older, newer)
    ]
    known = draw(st.permutations(range(1, older)))[: newer - 1]
    others = [NEW] * (newer - 1 - len(known)) + [r if draw(st.booleans()) else NEW for r in known]
    return cuts[0], cuts[1], [0, *draw(st.permutations(others))]


@given(case=cases(), rule=st.sampled_from(["unknown", "random", "mean"]))
@settings(max_examples=60)
def test_every_row_and_its_state_arrive(
    case: tuple[Cut, Cut, list[int]], rule: NewRows, tmp_path_factory: pytest.TempPathFactory
):
    was, now, rows_of = case
    path: Path = tmp_path_factory.mktemp("saved")
    table, state = torch.randn(was.rows, was.columns), torch.rand(was.rows, was.columns)
    sums = torch.rand(len(was.parts()) if was.by_columns else 1, was.rows)
    dcp.save({TABLE: sharded(table, was), STATE: sharded(state, was), SUMS: row_wise(sums, was)}, checkpoint_id=path)
    start = torch.randn(now.rows, now.columns)
    parts = len(now.parts()) if now.by_columns else 1
    weight, pointwise = sharded(start, now), sharded(torch.randn(now.rows, now.columns), now)
    of_rows = row_wise(torch.randn(parts, now.rows), now)

    carried = carry_rows(
        Saved(path), TABLE, weight, {STATE: pointwise, SUMS: of_rows},
        lambda first, end: np.array(rows_of[first:end], np.int64), rule,
    )  # fmt: skip

    found, found_state, found_sums = whole(weight), whole(pointwise), whole(of_rows).view(parts, now.rows)
    mean = table[1:].double().mean(0).float() if was.rows > 1 else table[0]
    columns = [part for _, part in was.parts()] if was.by_columns else [slice(0, was.columns)]
    here = [part for _, part in now.parts()] if now.by_columns else [slice(0, now.columns)]
    for row, older in enumerate(rows_of):
        if older == NEW:
            expected = {"unknown": table[0], "random": start[row], "mean": mean}[rule]
            torch.testing.assert_close(found[row], expected)
            assert not found_state[row].any()
            assert not found_sums[:, row].any()
            continue
        assert torch.equal(found[row], table[older])
        assert torch.equal(found_state[row], state[older])
        for part, bounds in enumerate(here):
            of_column = [next(i for i, c in enumerate(columns) if c.start <= x < c.stop) for x in range(was.columns)]
            expected = torch.stack([sums[of_column[x], older] for x in range(bounds.start, bounds.stop)]).mean()
            torch.testing.assert_close(found_sums[part, row], expected)
            if columns == here:
                assert found_sums[part, row] == sums[part, older]
    assert carried == Carried(sum(r > 0 for r in rows_of), rows_of.count(NEW))


def test_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shard of the rows 0 … 3 that kept their numbers needs the saved shards that they are in, no others."""
    cut = Cut(12, 4, False, [3, 6, 9])
    dcp.save({TABLE: sharded(torch.randn(12, 4), cut)}, checkpoint_id=tmp_path)
    read: list[int] = []
    whole_read = Saved.read

    def counted(self: Saved, shards: list, take: object) -> None:
        read.extend(shard.offset[0] for shard in shards)
        whole_read(self, shards, take)  # type: ignore[arg-type]

    monkeypatch.setattr(Saved, "read", counted)
    weight = sharded(torch.zeros(4, 4), Cut(4, 4, False, []))
    carry_rows(Saved(tmp_path), TABLE, weight, {}, lambda first, end: np.arange(first, end), "unknown")
    assert read == [0, 3]
