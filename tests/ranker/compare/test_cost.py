"""What a method costs alone: it follows the length where the method does, and memory is what a store would keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from features.config_file import load_config
from features.dataset import Dataset
from features.selection import resolve
from ranker.compare.cost import Job, Sizes, generated_request, main, measure_cost, stored_bytes, timed_part
from ranker.config import TrainConfig
from ranker.longseq.groups.grouped import GroupMemory

SIZES = Sizes(candidates=4, groups=2, repeats=1)
CODES = ("features.sequence=[item, item.sid_1]", "features.codes=[item.sid_1, item.sid_2]")


@pytest.fixture
def config_at(configs: Path):
    def config_at(name: str, *settings: str) -> TrainConfig:
        return load_config(configs / f"{name}.yaml", TrainConfig, settings)

    return config_at


def test_the_parts_and_their_memory(config_at, dataset: Path):
    """Width 8: two features of 4."""
    data = Dataset(dataset)
    both = measure_cost(config_at("both"), data, 100, SIZES)
    assert [part.part for part in both.parts] == ["DIN", "mean", "target_attention"]
    events, windows = 4 * 8, 2 * 8
    assert [part.memory_bytes for part in both.parts] == [
        3 * events,  # DIN reads its latest three
        events,  # a mean
        100 * (4 + 4) * 4 + windows + 100 * 4,  # keys and values of width 4, where they are, and each event's bias
    ]
    assert both.memory_bytes == sum(part.memory_bytes for part in both.parts[1:])  # the blocks' alone
    assert both.read_us == pytest.approx(sum(part.read_us for part in both.parts))
    assert all(part.read_us > 0 for part in both.parts)
    assert both.parts[0].encode_us == 0
    assert both.parts[2].encode_us > 0


def test_din_alone_reads_every_event(config_at, dataset: Path):
    cost = measure_cost(config_at("din"), Dataset(dataset), 100, SIZES)
    assert cost.memory_bytes == 100 * 4 * 8
    assert [part.part for part in cost.parts] == ["DIN"]


def test_a_method_without_history_costs_nothing(config_at, dataset: Path):
    assert measure_cost(config_at("blind"), Dataset(dataset), 100, SIZES)[1:] == (0, 0, 0, [])


def test_a_method_that_limits_its_length_reads_all_that_is_asked(config_at, dataset: Path):
    """SASRec refuses to be without a limit; what is kept of 30 events is twice that of 15."""
    config = config_at("din", "model.long=[{type: sasrec, width: 8, layers: 1, length: 5}]")
    short, long = (measure_cost(config, Dataset(dataset), length, SIZES).memory_bytes for length in (15, 30))
    assert 1.8 < long / short <= 2


def test_methods_with_codes(config_at, coded: Path):
    """UxSID keeps two rows of its width for each group asked about, whatever the length."""
    blocks = "model.long=[{type: uxsid, width: 4, anchors: 2}, {type: hisac, keep: [2, 2]}]"
    config = config_at("din", f"dataset={coded}", *CODES, blocks)
    for length in (1, 100):
        _, uxsid, hisac = measure_cost(config, Dataset(coded), length, SIZES).parts
        assert uxsid.memory_bytes == SIZES.groups * 2 * 4 * 4
        assert hisac.memory_bytes <= 4 * (2 * 2 * 16 * 4 + 4) + 16  # of at most 2 × 2 agents


def test_the_generated_request(config_at, coded: Path):
    spec = resolve(config_at("din", *CODES).features, Dataset(coded).manifest)
    history, target = generated_request(spec, 4, 30, SIZES)
    assert (history.x.shape, target.x.shape, target.code.shape) == ((30, 8), (4, 8), (4, 2))
    assert (history.time[1:] > history.time[:-1]).all()
    assert (history.now > history.time[-1]).all()
    assert target.code[:, 0].unique().numel() == SIZES.groups
    for code, feature in zip(history.code.T, spec.codes, strict=True):
        assert code.min() >= 1  # every event has one
        assert code.max() < feature.size
        assert torch.bincount(code).max() > 30 / feature.size  # skewed


def test_rows_that_differ_in_length_alone_are_timed_together(config_at):
    assert timed_part(config_at("both", "model.long[0].length=5")) == timed_part(config_at("both", "seed=3"))
    assert timed_part(config_at("both", "model.short.length=5")) != timed_part(config_at("both"))
    assert timed_part(config_at("din", "model.short.length=5")) == timed_part(config_at("din"))
    assert timed_part(config_at("din", "tables.dim=8")) != timed_part(config_at("din"))


def test_a_job(configs: Path, tmp_path: Path):
    job = Job(config=configs / "mean.yaml", lengths=[3], sizes=SIZES, out=tmp_path / "mean.json")
    (tmp_path / "job").write_text(job.model_dump_json())
    threads = torch.get_num_threads()
    main([str(tmp_path / "job")])
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "mean.json").read_text())
    assert [cost["length"] for cost in found["costs"]] == [3]
    assert "1 thread" in found["machine"]


def test_a_memory_within_a_memory_counts():
    """As the C-Former's, which holds the interests that a training loss reads and what candidates attend to."""
    inner = GroupMemory(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4))
    assert stored_bytes((torch.zeros(3, dtype=torch.int64), inner)) == 3 * 8 + 4 * (64 + 64 + 4)
