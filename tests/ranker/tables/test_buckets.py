"""Tables with fewer rows than ids: which row an id reads, wherever it is looked up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.fx import Tracer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch
from features.config_file import ConfigError
from features.dataset import Dataset
from features.errors import UserError
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.ranks import Ranks
from ranker.run import Run, RunError
from ranker.tables.buckets import bucketed
from ranker.tables.embeddings import Tables

ConfigOf = Callable[..., TrainConfig]
BUCKETS = "tables.buckets={item: 7, user: 11, event.action: 2}"
SMALLER = {"candidate_item": 8, "sequence_item": 8, "request_user": 12, "sequence_event_action": 3}


def tables_of(config: TrainConfig) -> Tables:
    torch.manual_seed(0)
    return Tables(resolve(config.features, Dataset(config.dataset).manifest), config.tables)


def batch_of(config: TrainConfig) -> RequestBatch:
    """The first requests of the test split."""
    data = Dataset(config.dataset)
    selection = selection_of(config, data, resolve(config.features, data.manifest))
    return next(scoring_loader(config, data, "test", selection, Ranks(0, 1, 1, torch.device("cpu"))).batches())


@st.composite
def keyed(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[int]]:
    """Ids by key and row of the batch, and each key's table rows."""
    keys, stride = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    ids = st.lists(st.integers(0, 2**31), max_size=4)
    values = [[draw(ids) for _ in range(stride)] for _ in range(keys)]
    return values, draw(st.lists(st.integers(1, 9), min_size=keys, max_size=keys))


def literal_rows(i: int, rows: int, hashes: int) -> list[int]:
    """The rows that id `i` reads, by Python's integers."""
    if i == 0:
        return [0] * hashes
    h = (i - 1) * 0x9E3779B1 % 2**32
    h = ((h ^ (h >> 15)) % 2**31) * 0x85EBCA6B % 2**32
    buckets = max(rows - 1, 1)
    return [1 + (i - 1) % buckets, 1 + (h ^ (h >> 13)) % buckets][:hashes]


@given(keyed(), st.lists(st.integers(1, 2), min_size=4, max_size=4))
def test_an_id_reads_its_rows_of_the_smaller_table(
    drawn: tuple[list[list[list[int]]], list[int]], hashes_of: list[int]
):
    ids, rows = drawn
    hashes = hashes_of[: len(rows)]
    kjt = KeyedJaggedTensor(
        keys=[f"f{k}" for k in range(len(ids))],
        values=torch.tensor([v for key in ids for row in key for v in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for key in ids for row in key]),
    )
    found = bucketed(kjt, rows, hashes)
    assert found.keys() == kjt.keys()
    for key, lists, size, n in zip(kjt.keys(), ids, rows, hashes, strict=True):
        expected = [[row for v in values for row in literal_rows(v, size, n)] for values in lists]
        assert [x.tolist() for x in found[key].to_dense()] == expected


@given(st.integers(2000, 4000), st.integers(2, 10))
def test_two_ids_that_share_their_first_row_seldom_share_both(ids: int, share: int):
    """Of n rows, ids / n share a first row; of them one in n shares the second too."""
    rows = 1 + ids // share
    read = Counter(tuple(literal_rows(i, rows, 2)) for i in range(1, ids + 1))
    alone = sum(1 for count in read.values() if count == 1)
    assert alone > 0.8 * ids
    assert max(Counter(second for _, second in read).values()) < 8 * share


@given(st.integers(2, 500), st.integers(1, 40))
def test_rows_have_equally_many_ids_and_the_most_frequent_ones_do_not_meet(ids: int, buckets: int):
    kjt = KeyedJaggedTensor(keys=["f"], values=torch.arange(ids), lengths=torch.tensor([ids]))
    rows = bucketed(kjt, [buckets + 1], [1]).values().tolist()
    assert [i for i, row in enumerate(rows) if row == 0] == [0]
    shared = Counter(rows[1:])
    assert max(shared.values()) - min(shared.values()) <= 1
    head = rows[1 : buckets + 1]  # a vocabulary's indices ascend as frequency falls
    assert len(set(head)) == len(head)
    if buckets >= ids - 1:
        assert rows == list(range(ids))


def test_tables_have_the_rows_asked_for_and_others_those_of_their_ids(config_of: ConfigOf):
    whole, smaller = tables_of(config_of()), tables_of(config_of(BUCKETS))

    def rows(tables: Tables) -> dict[str, int]:
        return {name.split(".")[-2]: weight.size(0) for name, weight in tables.named_parameters()}

    assert rows(smaller) == rows(whole) | SMALLER
    assert all(count < rows(whole)[name] for name, count in SMALLER.items())
    assert rows(tables_of(config_of("tables.buckets={item: 100000}"))) == rows(whole)


def test_history_and_candidates_read_the_same_row_of_an_item(config_of: ConfigOf):
    config = config_of(BUCKETS, "tables.init_scale=1")
    batch, tables = batch_of(config), tables_of(config)
    embedded = tables(batch.request, batch.candidate, batch.sequence)
    table = dict(tables.sequence.named_parameters())["embeddings.sequence_item.weight"]

    def expected(ids: Tensor) -> Tensor:
        return table[[0 if i == 0 else 1 + (i - 1) % 7 for i in ids.tolist()]]

    for side, found in (("history", embedded.event), ("candidate", embedded.target)):
        ids = batch.sequence[f"{side}:item"].values()
        assert ids.max() > 7
        if side == "candidate":  # events have the embedding of their action added
            assert torch.equal(found[:, : config.tables.dim], expected(ids))
        else:
            actions = dict(tables.events.named_parameters())["embeddings.sequence_event_action.weight"]  # type: ignore[union-attr]
            of_action = batch.sequence["history:event.action"].values()
            rows = [0 if i == 0 else 1 + (i - 1) % 2 for i in of_action.tolist()]
            torch.testing.assert_close(
                found[:, : config.tables.dim], expected(ids) + actions[rows][:, : config.tables.dim]
            )


def test_an_embedding_is_the_sum_of_both_rows(config_of: ConfigOf):
    config = config_of("tables.buckets={item: {rows: 7, hashes: 2}, user: {rows: 11, hashes: 2}}", "features.event=[]")
    batch, tables = batch_of(config), tables_of(config)
    embedded = tables(batch.request, batch.candidate, batch.sequence)
    weights = {name.split(".")[-2]: weight for name, weight in tables.named_parameters()}

    def expected(table: str, ids: Tensor) -> Tensor:
        weight = weights[table]
        return torch.stack([weight[literal_rows(i, weight.size(0), 2)].sum(0) for i in ids.tolist()])

    events, shown = (batch.sequence[f"{side}:item"].values() for side in ("history", "candidate"))
    for table, ids, found in (
        ("sequence_item", events, embedded.event),
        ("sequence_item", shown, embedded.target),
        ("candidate_item", batch.candidate["item"].values(), embedded.candidate),
        ("request_user", batch.request["user"].values(), embedded.request),
    ):
        torch.testing.assert_close(found[:, : config.tables.dim], expected(table, ids))


@pytest.mark.parametrize("options", [(), (BUCKETS,), (BUCKETS.replace("7", "{rows: 7, hashes: 2}"),)])
def test_tables_are_scripted_and_traced_to_the_same_numbers(config_of: ConfigOf, options: tuple[str, ...]):
    config = config_of(*options)
    batch, tables = batch_of(config), tables_of(config)
    ids = (batch.request, batch.candidate, batch.sequence)
    expected = tables(*ids)
    traced = torch.fx.GraphModule(tables, Tracer().trace(tables))
    for found in (torch.jit.script(tables)(*ids), traced(*ids), torch.jit.script(traced)(*ids)):
        for name, x in expected._asdict().items():
            assert torch.equal(x, getattr(found, name)), name


def test_a_feature_without_a_table_is_refused_by_name(config_of: ConfigOf):
    with pytest.raises(UserError, match=r"tables\.buckets\.itme: not a feature with a table; did you mean 'item'\?"):
        tables_of(config_of("tables.buckets={itme: 7}"))


def test_no_buckets_are_refused(config_of: ConfigOf):
    with pytest.raises(ConfigError, match=r"tables\.buckets: item: 0 rows; must be at least 1"):
        config_of("tables.buckets={item: 0}")


def test_another_number_of_buckets_is_another_model(config_of: ConfigOf, trained: Path):
    with pytest.raises(RunError, match=r"tables\.buckets.*, but .* was trained with"):
        Run(trained).go_on_with(config_of("training.epochs=4", "tables.buckets={item: 7}"))
