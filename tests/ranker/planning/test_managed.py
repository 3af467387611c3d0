"""Plans of managed tables: by rows, with the memory that knowing whose row is whose takes; never for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ranker.config import TrainConfig
from ranker.planning.cluster import Cluster
from ranker.planning.constraints import ShardingError
from tests.ranker.planning.conftest import Plan, answer

ConfigOf = Callable[..., TrainConfig]
TABLES = "tables.managed_collision={user: {rows: 150, eviction: lru, every: 4}, item: 30}"


def test_managed_tables_are_sharded_by_rows_and_others_as_before(config_of: ConfigOf, open_ids: Path):
    found = {table.name: table for table in answer(config_of(f"dataset={open_ids}", TABLES)).tables}
    for name, rows in (("request_user", 150), ("candidate_item", 30), ("sequence_item", 30)):
        assert (found[name].sharding, found[name].kernel, found[name].rows) == ("row_wise", "fused", rows)
    assert found["request_user_device"].sharding != "row_wise"


def test_ids_that_are_met_take_memory(config_of: ConfigOf, open_ids: Path):
    """8 bytes for an id, its row, what the policy counts, a row; and for each id met until ids are let in."""
    seldom = TABLES.replace(
        "user: {rows: 150, eviction: lru, every: 4}", "user: {rows: 150, eviction: lru, every: 4004}"
    )
    many = TABLES.replace("user: {rows: 150", "user: {rows: 4000150")
    taken = [answer(config_of(f"dataset={open_ids}", tables)).ranks[0].dense_bytes for tables in (TABLES, seldom, many)]
    # 32 requests, one id and when it was met of each, a quarter spare, an old and a new buffer
    assert taken[1] - taken[0] == pytest.approx(4000 * 32 * 2 * 8 * 1.25 * 2, abs=1)
    assert taken[2] - taken[0] == pytest.approx(4_000_000 / 4 * 3 * 8, abs=100)


def test_the_command_plans_for_gpus_and_refuses_cpus(open_ids: Path, plan: Plan, config_of: ConfigOf):
    code, found, _ = plan("--hosts", "2", "--gpus", "2", "--set", f"dataset={open_ids}", "--set", TABLES)
    assert code == 0
    assert {t["name"] for t in found["tables"] if t["sharding"] == "row_wise"} >= {"request_user", "sequence_item"}
    with pytest.raises(ShardingError, match=r"table \w+ is to be managed.*is for GPUs, and this is a CPU"):
        answer(config_of(f"dataset={open_ids}", TABLES), Cluster("cpu", 4, 4))
    with pytest.raises(ShardingError, match=r"candidate_item has 5 rows, 2 a rank, which leaves the last of 4 ranks"):
        answer(config_of(f"dataset={open_ids}", TABLES.replace("item: 30", "item: 5")))
