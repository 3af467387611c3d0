"""What cannot be planned is told by its key or option, with what would be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from features.errors import UserError
from ranker.config import TrainConfig
from ranker.planning.cluster import Cluster
from ranker.planning.constraints import ShardingError
from ranker.planning.misfit import DoesNotFit
from ranker.planning.question import read_bytes
from tests.ranker.planning.conftest import GPUS, Plan, answer

ConfigOf = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "sequence_itm.types=[row_wise]",
            "tables.sharding.sequence_itm: the model has no table 'sequence_itm'; did you mean 'sequence_item'? Its "
            "tables: candidate_candidate_position, ",
        ),
        (
            "sequence_item.kernels=[fused_uvm_caching]",
            "tables.sharding.sequence_item.kernels: ['fused_uvm_caching'] need a GPU, and this is for a CPU; allow "
            "fused too, or train with training.device: cuda",
        ),
        (
            "candidate_item.types=[row_wise]",
            "tables.sharding.candidate_item.types: ['row_wise'] leaves no place for table candidate_item: on a CPU, "
            "TorchRec shards pooled tables table_wise, column_wise, table_column_wise; allow one of these",
        ),
        (
            "sequence_item.types=[row_wise,grid_shard]",
            "tables.sharding.sequence_item.types: grid_shard is nothing that TorchRec does with sequence tables such "
            "as sequence_item; it shards them table_wise, column_wise, row_wise",
        ),
        (
            "sequence_item.pooling_factors=[3]",
            "tables.sharding.sequence_item.pooling_factors: [3.0] has 1 numbers, but the table is read by 2 features "
            "(history:item, candidate:item); give one for each",
        ),
    ],
)
def test_a_constraint_that_cannot_be_met_is_refused_by_its_key(config_of: ConfigOf, option: str, message: str):
    with pytest.raises(ShardingError) as refused:
        answer(config_of(f"tables.sharding.{option}"), Cluster("cpu", 2, 2))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sharding.sequence_item.types=[data_parallel]", "'data_parallel' is not offered: TorchRec leaves out tables."),
        ("pooled_sharding=[data_parallel]", "'data_parallel' is not offered: TorchRec leaves out tables.optimizer"),
        ("sharding.sequence_item.kernels=[dense]", "'dense' is not offered"),
        ("sharding.sequence_item.cache_load_factor=0.2", "kernels are ['fused']; add it there"),
    ],
)
def test_what_is_never_possible_is_refused_when_the_config_is_read(config_of: ConfigOf, option: str, message: str):
    with pytest.raises(UserError) as refused:
        config_of(f"tables.{option}")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--gpus 8 --rows itm=9",
            "--rows itm=9: the model has no table of 'itm'; did you mean 'item'? It has ",
        ),
        ("--gpus 8 --rows item", "--rows item: must have the form FEATURE=ROWS"),
        ("--gpus 8 --rows item=1e10", "'1e10' is no number of rows; give a whole one from 1 to 2,147,483,647"),
        ("--gpus 8 --rows item=2.5", "'2.5' is no number of rows"),
        ("--gpus 8 --hbm 80", "--hbm 80: no amount of memory; give a number with its unit, such as 80GB"),
        ("", "give --gpus G or --cpus C"),
        ("--gpus 8 --cpus 8", "give --gpus G or --cpus C"),
        ("--gpus 8 --set dataset=nowhere", "nowhere: no manifest.json; not a dataset folder"),
    ],
)
def test_what_cannot_be_asked_is_told(plan: Plan, arguments: str, message: str):
    code, _, said = plan(*arguments.split())
    assert code == 2
    assert message in said


def test_without_memory_for_the_batch_nothing_is_left_for_tables(config_of: ConfigOf):
    with pytest.raises(DoesNotFit, match=r"nothing is left for tables: of 256.0 KiB of HBM, 38.4 KiB are in reserve"):
        answer(config_of(), replace(GPUS, hbm_bytes=256 << 10))


def test_memory_is_read_in_its_unit():
    assert [read_bytes("--hbm", text) for text in ("80GB", "1.5 TiB", "512mb")] == [80 << 30, 1536 << 30, 512 << 20]
