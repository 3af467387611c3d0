"""Replicas of the tables: which ranks are a group, and the plan of one; and tables too small for all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import UserError
from ranker.config import TrainConfig
from ranker.planning.cluster import Cluster
from ranker.planning.constraints import ShardingError, rows_for_all
from ranker.planning.tables import Table
from tests.ranker.planning.conftest import Plan, answer

ConfigOf = Callable[..., TrainConfig]


@pytest.mark.parametrize(("ranks", "per_host", "replicas", "group"), [
    (64, 8, 8, (8, 8)), (64, 8, 2, (32, 8)), (64, 8, 32, (2, 2)), (4, 2, 1, (4, 2)),
])  # fmt: skip
def test_a_group_is_a_part_of_a_machine_or_whole_machines(
    ranks: int, per_host: int, replicas: int, group: tuple[int, int]
):
    found = Cluster("cuda", ranks, per_host).group(replicas)
    assert (found.ranks, found.per_host) == group


@pytest.mark.parametrize(("ranks", "per_host", "replicas", "told"), [
    (8, 4, 3, "3 groups of 8 ranks are of unlike sizes; set 1, 2, 4, 8"),
    (12, 4, 2, "a group of 6 ranks begins in the midst of a machine of 4"),
])  # fmt: skip
def test_groups_of_unlike_ranks_are_refused(ranks: int, per_host: int, replicas: int, told: str):
    with pytest.raises(UserError, match=told):
        Cluster("cuda", ranks, per_host).group(replicas)


def test_the_plan_of_replicas_is_that_of_one_group(plan: Plan):
    arguments = ("--hosts", "2", "--gpus", "4", "--rows", "item=1e6")
    code, whole, _ = plan(*arguments)
    assert (code, whole["replicas"], len(whole["ranks"])) == (0, 1, 8)
    code, group, _ = plan(*arguments, "--set", "tables.replicas=2")
    assert (code, group["replicas"], len(group["ranks"])) == (0, 2, 4)
    # a group holds what all ranks held
    of_tables = [sum(rank["tables_bytes"] for rank in found["ranks"]) for found in (whole, group)]
    assert of_tables[0] == of_tables[1]
    assert (
        "2 replicas of the tables, of 4 ranks each"
        in plan(*arguments, "--set", "tables.replicas=2", as_json=False)[1]["text"]
    )


def test_on_cpus_a_table_with_fewer_rows_than_ranks_is_not_sharded_by_rows(config_of: ConfigOf):
    found = answer(config_of(), Cluster("cpu", 4, 4))
    sharding = {table.name: table.sharding for table in found.tables}
    assert sharding["sequence_item_category"] == sharding["sequence_event_action"] == "table_wise"
    told = "row_wise alone leaves some of 4 ranks without a row of table sequence_item_category, which has 2"
    with pytest.raises(ShardingError, match=told):
        answer(config_of("tables.sequence_sharding=[row_wise]"), Cluster("cpu", 4, 4))


@given(rows=st.integers(1, 200), ranks=st.integers(1, 50))
def test_whether_every_rank_has_a_row(rows: int, ranks: int):
    # TorchRec gives each rank as many, rounded up, as long as there are any
    of_rank, left, ranks_with_rows = -(-rows // ranks), rows, 0
    while left > 0:
        left -= of_rank
        ranks_with_rows += 1
    table = Table("t", "sequence", ("f",), rows, 8)
    assert rows_for_all(table, Cluster("cpu", ranks, ranks)) == (ranks_with_rows == ranks)
