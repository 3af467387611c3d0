"""A plan holds every byte once and respects the config; what does not fit is named with what would make it fit."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset import Dataset
from ranker.config import TrainConfig
from ranker.planning.estimate import estimate
from ranker.planning.question import Question
from ranker.planning.report import needs
from tests.ranker.planning.conftest import GPUS, Plan, answer

ConfigOf = Callable[..., TrainConfig]

BY_ROWS = "tables.pooled_sharding=[table_wise,column_wise,row_wise]"


def test_a_billion_items_are_spread_by_rows_over_64_gpus(config_of: ConfigOf):
    config = config_of("tables.dim=64", BY_ROWS)
    question = Question(config, Dataset(config.dataset), replace(GPUS, ranks=64, per_host=8), {"item": 10**9})
    assert all(parameter.is_meta for parameter in question.ranker().tables.parameters())
    found = estimate(question.answer(), 64)
    large = [table for table in found.tables if table.rows == 10**9]
    assert [table.name for table in large] == ["candidate_item", "sequence_item"]
    for table in large:
        assert (table.width, table.sharding, table.kernel, table.ranks) == (64, "row_wise", "fused", list(range(64)))
        assert table.weights_bytes == 10**9 * 64 * 4
        assert table.optimizer_bytes == 10**9 * 4
    assert sum(rank.tables_bytes for rank in found.ranks) == sum(table.rows * table.width * 4 for table in found.tables)
    assert sum(rank.optimizer_bytes for rank in found.ranks) == sum(table.optimizer_bytes for table in found.tables)
    for rank in found.ranks:
        assert rank.memory_bytes - rank.reserve_bytes >= 2 * 10**9 * 65 * 4 / 64
        assert rank.memory_bytes <= 80 << 30


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(4, 10**7),
    width=st.integers(1, 32).map(lambda n: 4 * n),
    hosts=st.integers(1, 3),
    per_host=st.integers(1, 4),
    optimizer=st.sampled_from(["rowwise_adagrad", "adagrad", "sgd"]),
    types=st.lists(st.sampled_from(["table_wise", "column_wise", "row_wise"]), min_size=1, unique=True),
)
def test_every_byte_has_one_place(
    config_of: ConfigOf, rows: int, width: int, hosts: int, per_host: int, optimizer: str, types: list[str]
):
    """Σ over ranks = rows × width × 4 for weights, and what the optimiser keeps of them; no rank is over its memory."""
    allowed = f"[{', '.join(types)}]"
    config = config_of(
        f"tables.dim={width}",
        f"tables.optimizer={optimizer}",
        *(f"tables.sharding.{table}.types={allowed}" for table in ("candidate_item", "sequence_item")),
    )
    found = answer(config, replace(GPUS, ranks=hosts * per_host, per_host=per_host), item=rows)
    for table in found.tables:
        parts = len(table.ranks) if "column" in table.sharding else 1  # each column shard has a number for each row
        state = {"rowwise_adagrad": 4 * table.rows * parts, "adagrad": 4 * table.rows * table.width, "sgd": 0}[
            optimizer
        ]
        assert table.weights_bytes == 4 * table.rows * table.width
        assert state <= table.optimizer_bytes <= state + len(table.ranks)  # each shard's is rounded up
        if table.name in ("candidate_item", "sequence_item"):
            assert (table.rows, table.sharding in types) == (rows, True)
    assert sum(rank.tables_bytes for rank in found.ranks) == sum(table.weights_bytes for table in found.tables)
    assert sum(rank.optimizer_bytes for rank in found.ranks) == sum(table.optimizer_bytes for table in found.tables)
    assert all(rank.step_bytes >= 0 and rank.memory_bytes <= GPUS.hbm_bytes for rank in found.ranks)


TOO_LARGE = ("--hosts", "2", "--gpus", "2", "--hbm", "8GB", "--ddr", "64GB", "--set", "tables.dim=32", "--rows")


def test_a_table_that_does_not_fit_is_named_with_what_makes_it_fit(plan: Plan):
    """Pooled tables lie whole on a rank here; each remedy, applied, gives a plan."""
    given = (*TOO_LARGE, "item=1e8")
    code, content, said = plan(*given)
    assert (code, content["fits"]) == (2, False)
    assert said.startswith("error: the tables do not fit: candidate_item, table_wise: a shard takes at least 12.3 GiB")
    assert "A rank has 6.8 GiB of HBM for tables (of 8.0 GiB of HBM, 1.2 GiB are in reserve" in said
    assert content["reason"] in said
    assert [remedy["what"] for remedy in content["remedies"]] == [
        "allow row_wise for candidate_item",
        "keep candidate_item in the hosts' memory, with a cache of 20% of the rows in HBM",
        "15 GiB of HBM on each rank",
        "tables 16 wide",
    ]
    for remedy in content["remedies"]:
        code, changed, said = plan(*given, *remedy["arguments"])
        assert (code, changed["fits"], said) == (0, True, ""), remedy
    shown = plan(*given, as_json=False)[1]["text"]
    assert "each of these fits" in shown
    assert shlex.join(content["remedies"][0]["arguments"]) in shown


def test_the_nearest_change_is_named_not_a_larger_one(plan: Plan):
    """One GiB less than the memory told does not fit, and neither does a column more."""
    given = (*TOO_LARGE, "item=1e8")
    remedies = {remedy["arguments"][0]: remedy["arguments"] for remedy in plan(*given)[1]["remedies"]}
    assert remedies["--hbm"] == ["--hbm", "15GB"]
    assert plan(*given, "--hbm", "14GB")[0] == 2
    assert plan(*given, "--set", "tables.dim=20")[0] == 2


def test_tables_that_do_not_fit_together_need_more_hosts(plan: Plan):
    given = (*TOO_LARGE, "item=1e8", "--set", BY_ROWS, "--hosts", "1")
    code, content, said = plan(*given)
    assert code == 2
    assert "no place for all tables together: they take at least 24.6 GiB of HBM (sequence_item 12.3 GiB, " in said
    assert "Each of 2 ranks has 6.8 GiB" in said
    assert ["--hosts", "2"] in [remedy["arguments"] for remedy in content["remedies"]]


def test_each_table_keeps_to_its_own_constraints(config_of: ConfigOf):
    config = config_of(
        "tables.dim=16",
        "tables.sharding.sequence_item={types: [column_wise], min_partition: 4}",
        "tables.sharding.candidate_item={types: [row_wise], kernels: [fused_uvm_caching], cache_load_factor: 0.5}",
        "tables.sharding.request_user={types: [table_row_wise], kernels: [fused_uvm]}",
    )
    found = answer(config, item=10**6, user=10**6)
    tables = {table.name: table for table in found.tables}
    assert (tables["sequence_item"].sharding, len(tables["sequence_item"].ranks)) == ("column_wise", 4)
    cached, offloaded = tables["candidate_item"], tables["request_user"]
    assert (cached.sharding, cached.kernel, cached.ranks) == ("row_wise", "fused_uvm_caching", [0, 1, 2, 3])
    assert (offloaded.sharding, offloaded.kernel) == ("table_row_wise", "fused_uvm")
    assert offloaded.ranks in ([0, 1], [2, 3])  # the ranks of one host
    assert sum(rank.host_bytes for rank in found.ranks) == 2 * 10**6 * (16 + 1) * 4
    resident = sum(table.weights_bytes for table in found.tables) - offloaded.weights_bytes - cached.weights_bytes // 2
    assert sum(rank.tables_bytes for rank in found.ranks) == resident
    assert (tables["candidate_item_category"].sharding, tables["candidate_item_category"].kernel) == (
        "table_wise",
        "fused",
    )


def test_what_a_table_is_read_for_weighs_in_its_time(config_of: ConfigOf):
    few = "tables.sharding.sequence_item.types=[row_wise]"
    many = "tables.sharding.sequence_item={types: [row_wise], pooling_factors: [5000, 500]}"
    assert answer(config_of(many)).slowest.time.total_ms > 10 * answer(config_of(few)).slowest.time.total_ms


def test_the_terminal_shows_every_table_and_rank(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = plan("--hosts", "2", "--gpus", "2", "--rows", "item=1e6", "--set", BY_ROWS, as_json=False)[1]["text"]
    assert "4 ranks: 2 hosts × 2 GPUs, 32.0 GiB of HBM each; a batch: 32 requests, 16 histories" in shown
    for part in ("sequence_item", "1,000,000 × 8", "30.5 MiB", "row_wise", "0–3", "forward", "the fullest"):
        assert part in shown


def test_a_slower_network_takes_longer(plan: Plan):
    """Of the ids and vectors that leave a host, in the proportion of the bandwidths."""
    given = ("--hosts", "2", "--gpus", "2", "--set", "tables.sequence_sharding=[table_wise]")
    fast, slow = (plan(*given, "--inter-host", speed)[1]["ranks"] for speed in ("12.5", "1.25"))
    for before, after in zip((r["time"] for r in fast), (r["time"] for r in slow), strict=True):
        assert after["forward_communication_ms"] == pytest.approx(10 * before["forward_communication_ms"])
        assert after["forward_compute_ms"] == before["forward_compute_ms"]


def test_what_so_many_ranks_need_of_the_data_is_told(config_of: ConfigOf):
    """The small dataset has four partitions."""

    def told_of(ranks: int, *options: str) -> list[str]:
        config = config_of(*options)
        return needs(Question(config, Dataset(config.dataset), replace(GPUS, ranks=ranks, per_host=ranks), {}))

    assert told_of(4) == []
    told = told_of(8, "loader.shards=4")
    assert [line.split(" ")[0] for line in told] == ["loader.shards:", str(config_of().dataset)]
    assert told[1].endswith("has 4 partitions, too few for 8 shards of the data; prepare it with partitions: 8 or more")
