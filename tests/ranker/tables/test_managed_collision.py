"""Rows of ids without end: who has one, who loses it, and that evaluation and export read what training taught.

See :mod:`tests.ranker.tables.managed_tables` for how they train here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from features.batch import RequestBatch
from features.config_file import ConfigError
from features.dataset import Dataset
from features.errors import UserError
from features.progress import Progress
from features.selection import resolve
from ranker.config import ManagedCollisionConfig, TrainConfig
from ranker.evaluate import evaluate, restore
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export import export
from ranker.planning.constraints import ShardingError
from ranker.ranks import join_ranks
from ranker.run import Run
from ranker.tables.embeddings import pooled, with_an_empty_list
from ranker.tables.held_rows import NOBODY, HeldRows
from ranker.tables.managed_collision import ManagedRows, managed_of
from ranker.training.source import ReadWhenAsked
from ranker.training.trainer import Trainer, train
from tests.ranker.tables.managed_tables import TABLES, on_cpus

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]
Scalars = Callable[[Path], dict[str, dict[int, float]]]
OPTIONS = (TABLES, "training.max_steps=11", "training.validation_split=null", "training.log_every=1")
BESIDE = "tables.managed_collision={user: {rows: 50, every: 2}, item: {rows: 30, every: 3, eviction: lfu}}"
LONG = "model.long=[{type: mean}]"


@pytest.fixture(scope="module")
def managed(config_of: ConfigOf, open_ids: Path) -> ConfigOf:
    """The small model with managed tables at every place."""
    return lambda *options: config_of(f"dataset={open_ids}", *OPTIONS, *options)


@pytest.fixture(scope="module")
def run(once: Callable[..., Path], managed: ConfigOf) -> Path:
    """A run that ends between two times that ids are let in."""

    def make(out: Path) -> None:
        with on_cpus():
            train(managed(LONG), out)

    return once("managed", make)


@pytest.fixture
def trainer(managed: ConfigOf, open_ids: Path) -> Generator[Callable[..., Trainer]]:
    """A trainer that has trained some batches."""
    with join_ranks("cpu", 1) as ranks, on_cpus():

        def trained(batches: int, *options: str) -> Trainer:
            made = Trainer(managed(*options), Dataset(open_ids), {}, ranks)
            source = ReadWhenAsked(made.loader.batches(), ranks.device)
            for _ in range(batches):
                made.step(source, 1, Progress("train", 1, shown=False))
            return made

        yield trained


def shard_of(module: ManagedRows) -> tuple[Tensor, list[Tensor]]:
    """The rows of a table, and its optimizer's state."""
    sharded: Any = module.table
    kernel, index = sharded._table_to_tbe_and_index[module.name]
    states = kernel.split_optimizer_states()
    return kernel.split_embedding_weights()[int(index)], states[int(index)] if states else []


def owners_of(module: ManagedRows) -> dict[int, int]:
    """The row of each id that has one."""
    slots = module.slots
    both = zip(slots._mch_sorted_raw_ids.tolist(), slots._mch_remapped_ids_mapping.tolist(), strict=True)
    return {id: row for id, row in both if id != NOBODY}


def batches_of(config: TrainConfig, count: int) -> list[RequestBatch]:
    dataset = Dataset(config.dataset)
    selection = selection_of(config, dataset, resolve(config.features, dataset.manifest))
    with join_ranks("cpu", 1) as ranks:
        loader = scoring_loader(config, dataset, "train", selection, ranks)
        return [batch for batch, _ in zip(loader.batches(), range(count), strict=False)]


rows_of_ids = st.dictionaries(st.integers(0, 99), st.integers(0, 40), max_size=30)


@given(rows_of_ids, st.lists(st.integers(0, 99), max_size=40), st.integers(1, 5), st.integers(0, 3))
def test_held_rows_are_those_of_a_dictionary(owners: dict[int, int], asked: list[int], ranks: int, nobodys: int):
    """In whatever order ids come; who has none reads the last row of the rank whose range it is in."""
    table = EmbeddingConfig(41, 4, name="t", feature_names=["f"])
    held = HeldRows(table, 100, None)
    fallback = list(range(100, 100 + ranks))
    ids, rows = [*reversed(owners), *[NOBODY] * nobodys], [*reversed(owners.values()), *[7] * nobodys]
    held.hold(*(torch.tensor(x, dtype=torch.int64) for x in (ids, rows, fallback)))
    of_rank = -(-100 // ranks)
    expected = [owners.get(id, fallback[id // of_rank]) for id in asked]
    assert held.row_of(torch.tensor(asked, dtype=torch.int64)).tolist() == expected
    other = HeldRows(table, 100, None)
    other.take(held)
    assert torch.jit.script(other).row_of(torch.tensor(asked, dtype=torch.int64)).tolist() == expected


@given(st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=5))
def test_ids_are_pooled_list_by_list(lists: list[list[int]]):
    """Of no list, too."""
    ids = torch.tensor([id for row in lists for id in row], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in lists], dtype=torch.int32)
    more = with_an_empty_list(KeyedJaggedTensor(["f"], ids, lengths=lengths))
    assert more.stride() == len(lists) + 1
    rows = torch.stack([more.values(), 2 * more.values()], 1).float()
    for mean in (False, True):
        expected = [sum(row) / (max(len(row), 1) if mean else 1) for row in lists]
        found = pooled(JaggedTensor(rows, lengths=more.lengths()), mean)
        torch.testing.assert_close(found, torch.tensor([[x, 2 * x] for x in expected]).view(-1, 2))


def test_the_ids_met_most_often_have_rows_and_the_last_row_is_nobodys(trainer: Callable[..., Trainer]):
    """By hand, of a table with 30 rows that lets ids in after three batches: 29 of 40 items, by how often they came."""
    lfu = TABLES.replace("item: {rows: 30, every: 3}", "item: {rows: 30, every: 3, eviction: lfu}")
    made = trainer(0, lfu, "loader.drop_item=0")
    loader = made.loader.batches()
    seen: Counter[int] = Counter()
    for number in range(3):
        batch = next(loader)
        made.step(ReadWhenAsked(iter([batch]), made.ranks.device), 1, Progress("train", 1, shown=False))  # type: ignore[arg-type]
        ids = torch.cat([batch.sequence[f"{of}:item"].values() for of in ("history", "candidate")])
        seen.update(ids.tolist())
        (shared,) = (module for module in managed_of(made.model) if module.name == "sequence_item")
        assert len(owners_of(shared)) == (0 if number < 2 else 29)
    owners = owners_of(shared)
    assert set(owners.values()) == set(range(29))
    assert min(seen[id] for id in owners) >= max(n for id, n in seen.items() if id not in owners)
    assert len(seen) > 29


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_row_that_changes_hands_starts_anew(optimizer: str, trainer: Callable[..., Trainer]):
    """Its numbers are within what tables start from, its optimizer's state is that of one step at most; those of ids
    that stay go on."""
    lru = TABLES.replace("item: {rows: 30, every: 3}", "item: {rows: 30, every: 1, eviction: lru}")
    made = trainer(
        8, lru, f"tables.optimizer={optimizer}", "tables.lr=0.5", "tables.init_scale=0.001", "loader.requests=4"
    )
    module = next(module for module in managed_of(made.model) if module.name == "candidate_item")
    before, (weights, states) = owners_of(module), shard_of(module)
    rows_before, states_before = weights.clone(), [state.clone() for state in states]
    renewed: list[int] = []
    renew = module.slots.renew
    assert renew is not None

    def watched(rows: Tensor) -> None:
        renew(rows)
        renewed.extend(rows.tolist())
        assert weights[rows].abs().max() <= 0.001
        assert len(weights[rows].unique()) > 4
        assert all(int(state[rows].count_nonzero()) == 0 for state in states)
        kept = [row for row in range(30) if row not in rows.tolist()]
        torch.testing.assert_close(weights[kept], rows_before[kept], rtol=0, atol=0)
        for state, was in zip(states, states_before, strict=True):
            torch.testing.assert_close(state[kept], was[kept], rtol=0, atol=0)

    module.slots.renew = watched
    made.step(ReadWhenAsked(made.loader.batches(1), made.ranks.device), 1, Progress("train", 1, shown=False))
    now = owners_of(module)
    gone = set(before) - set(now)
    assert {now[id] for id in set(now) - set(before)} == set(renewed)
    assert {before[id] for id in gone} == set(renewed)
    assert gone  # a batch has 32 candidates: some of the 29 were met longer ago than some of the others
    assert any(rows_before[before[id]].abs().max() > 0.001 for id in before)
    assert len(states) == (0 if optimizer == "sgd" else 1)


def test_validation_lets_nobody_in_or_out(managed: ConfigOf, run: Path, tmp_path: Path, read_checkpoint: Read):
    with on_cpus():
        train(managed(LONG, "training.validation_split=valid", "training.validate_every=2"), tmp_path / "run")
    one, two = (read_checkpoint(path) for path in (Run(run).checkpoints()[-1], Run(tmp_path / "run").checkpoints()[-1]))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("options", [(), (BESIDE, "tables.buckets={item.category: {rows: 7, hashes: 2}}")])
def test_what_is_restored_scores_as_the_model_that_was_trained(
    options: tuple[str, ...], managed: ConfigOf, open_ids: Path, tmp_path: Path
):
    """To the last bit, by ids that have rows and ids that have none."""
    config = managed(LONG, "tables.dims={user: 12, item: 16}", *options)
    batches = batches_of(config, 6)
    with join_ranks("cpu", 1) as ranks, on_cpus():
        trainer = Trainer(config, Dataset(open_ids), {}, ranks)
        Run.create(tmp_path / "run", config, Dataset(open_ids), {}, 1)
        trainer.fit(tmp_path / "run")
        trainer.model.eval()
        expected = [trainer.model(batch).logits.detach() for batch in batches]
    with join_ranks("cpu", 1) as ranks:
        restored = restore(Run(tmp_path / "run"), ranks).eval()
        found = [restored(batch).logits.detach() for batch in batches]
        held = {module.name: module for module in restored.modules() if isinstance(module, HeldRows)}
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert {module.name: owners_of(module) for module in managed_of(trainer.model)} == {
        name: {id: row for id, row in zip(module.ids.tolist(), module.rows.tolist(), strict=True) if id != NOBODY}
        for name, module in held.items()
    }
    ids = torch.cat([batch.candidate["item"].values() for batch in batches])
    known = torch.isin(ids, held["candidate_item"].ids)
    assert 0 < known.float().mean() < 1
    assert set(held["candidate_item"].row_of(ids[~known]).tolist()) == {29}
    item = {
        id: tuple(held[name].row_of(torch.tensor([id])).tolist()) for id in ids.tolist() for name in ["sequence_item"]
    }
    for batch in batches:  # an id has one row in a table, in histories and as a candidate
        for key in ("history:item", "candidate:item"):
            for id in batch.sequence[key].values().tolist():
                assert item.setdefault(id, (29,)) == tuple(held["sequence_item"].row_of(torch.tensor([id])).tolist())


def test_a_run_is_evaluated_and_exported_where_it_could_not_be_trained(run: Path, tmp_path: Path):
    """The pair and tables of bytes among the exported files: they are refused unless they score alike."""
    assert evaluate(run) is not None
    assert export(run, tmp_path / "export", requests=200) <= 1e-6
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert {
        f"{what}{kind}.pt" for what in ("ranker", "user_encoder", "candidate_ranker") for kind in ("", ".int8")
    } <= files


def test_a_run_resumed_between_two_lettings_in_goes_on_to_the_same_numbers(
    managed: ConfigOf, run: Path, tmp_path: Path, read_checkpoint: Read
):
    behind = "training.asynchronous_checkpoints=true"
    with on_cpus():
        train(managed(LONG, "training.max_steps=4"), tmp_path / "run")
        train(managed(LONG, "training.max_steps=8", behind), tmp_path / "run", resume=True)
        train(managed(LONG), tmp_path / "run", resume=True)
    one, two = (read_checkpoint(path) for path in (Run(run).checkpoints()[-1], Run(tmp_path / "run").checkpoints()[-1]))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    history = next(
        x for name, x in one.items() if name.startswith(".histories.sequence_item/0") and name.endswith("ids")
    )
    assert history.numel() > 1000  # two batches' ids, met since ids were let in


def test_the_next_day_begins_with_the_rows_of_the_day_before(
    managed: ConfigOf, run: Path, tmp_path: Path, read_checkpoint: Read, capsys: pytest.CaptureFixture[str]
):
    with on_cpus():
        train(managed(LONG, f"warm_start.run={run}", "training.max_steps=0"), tmp_path / "next")
    one, two = (read_checkpoint(path) for path in (Run(run).best(), Run(tmp_path / "next").best()))
    kept = [name for name in one if "managed_" in name or name.startswith(".histories")]
    assert len(kept) > 20
    assert all(torch.equal(one[name], two[name]) for name in kept)
    assert "table sequence_item: 29 ids kept their rows, 0 rows are nobody's" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"tables\.managed_collision\.item\.rows: 31, but .* has 30"), on_cpus():
        train(managed(LONG, f"warm_start.run={run}", TABLES.replace("rows: 30", "rows: 31")), tmp_path / "other")


def test_what_became_of_ids_is_told(run: Path, scalars: Scalars):
    found = scalars(run)
    tables = {"sequence_item": 3, "candidate_item": 3, "candidate_candidate_position": 2, "request_user": 4}
    for table, first in tables.items():  # the step that lets ids in for the first time
        known, unknown, occupied = (found[f"managed/{table}/{what}"] for what in ("known", "unknown", "occupied"))
        for step in range(1, 12):
            assert (known[step] > 0) == (occupied[step] > 0) == (step >= first)
            assert unknown[step] == int(unknown[step]) >= (table != "request_user")
        assert occupied[11] == 1 or table == "request_user"
    # 4 of 8 positions, each of which every request has once
    assert found["managed/candidate_candidate_position/known"][11] == 0.5
    assert 0.5 < found["managed/candidate_item/known"][11] < 1
    assert 0 < found["tables/sequence_item/norm"][11] < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tables.managed_collision={user: 1}"], r"user: 1 rows; must be at least 2"),
        (["tables.buckets={item: 7}"], r"item in buckets too, where ids share rows"),
        (["tables.replicas=2"], r"replicas of a table would give its rows to ids of their own.*set replicas: 1"),
        (["training.read_ahead=true"], r"training\.read_ahead: the rows of tables\.managed_collision change hands"),
    ],
)
def test_what_cannot_go_together_is_refused(options: list[str], message: str, managed: ConfigOf):
    with pytest.raises(ConfigError, match=message):
        managed(*options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("tables.managed_collision={user.device: 2}", r"user\.device: ids .* have a vocabulary.*hash_buckets"),
        ("tables.managed_collision={itm: 2}", r"tables\.managed_collision\.itm: not a feature with a table"),
        ("tables.managed_collision={candidate.position: 1001}", r"1,001 rows for 1,001 hashes.*more hash_buckets"),
        (
            "tables.sharding={sequence_item: {types: [table_wise]}}",
            r"tables\.sharding\.sequence_item\.types: table_wise is nothing that TorchRec does with managed tables",
        ),
        (
            "tables.sharding={sequence_item: {kernels: [fused, fused_uvm_caching]}}",
            r"tables\.sharding\.sequence_item\.kernels.*leave fused alone",
        ),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_managed_are_refused(option: str, message: str, managed: ConfigOf, tmp_path: Path):
    with pytest.raises(UserError, match=message), on_cpus():
        train(managed(option), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_managed_tables_are_refused_on_cpus_with_what_to_do_instead(managed: ConfigOf, tmp_path: Path):
    with pytest.raises(
        ShardingError, match=r"tables\.managed_collision: table .* is for GPUs, and this is a CPU; train"
    ):
        train(managed(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_history_grows_with_its_batches_and_loses_no_id():
    """TorchRec's own holds as many as its first batch suggests."""
    table = EmbeddingConfig(8, 4, name="t", feature_names=["f"], init_fn=lambda x: x)
    slots = ManagedRows(table, 1000, ManagedCollisionConfig(rows=8, every=3, eviction="lru"), None).slots
    slots.renew = lambda rows: None

    def met(*ids: int) -> SimpleNamespace:
        jagged = JaggedTensor(torch.tensor(ids), lengths=torch.tensor([len(ids)]))
        rows = slots({"t": jagged})["t"].values().tolist()
        slots.evict()
        return SimpleNamespace(rows=rows, history=slots.history())

    assert met(5).history["ids"].tolist() == [5]
    later = met(*range(10, 30))
    assert later.history["ids"].tolist() == [5, *range(10, 30)]
    assert later.history["last_access_iter"].tolist() == [1, *[2] * 20]
    assert later.history["since"].tolist() == [2]
    assert set(later.rows) == {7}
    last = met(100, 101)
    assert last.history["ids"].numel() == 0
    assert len({*last.rows, 7}) == 3  # met last: both have rows of their own
    assert slots.taken() == (7.0, 7.0)
    assert slots.counted() == (23.0, 21.0)
    assert slots.counted() == (0.0, 0.0)
