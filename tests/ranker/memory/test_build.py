"""What a build leaves in a store is what blocks encode; and what is asked of it finds what coverage says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from features.batch import RequestBatch, from_tensors
from features.dataset import Dataset
from features.errors import UserError
from features.loader import Loader
from features.selection import Selection, resolve
from features.users import UserBatches
from ranker.blocks import Block
from ranker.config import TrainConfig
from ranker.evaluate import restore
from ranker.export import unsharded
from ranker.longseq import Target
from ranker.memory.build import build
from ranker.memory.config import CodesConfig, MemoryConfig
from ranker.memory.decode import decode
from ranker.memory.keys import keys_of, user_keys
from ranker.memory.making import RecordMaker
from ranker.memory.raw_users import RawUsers
from ranker.memory.report import BuildReport
from ranker.memory.scope import as_of_now, selection_for, split_of
from ranker.memory.store import StoreError, open_store
from ranker.memory.versions import versions_of
from ranker.model import Dense, plain_of
from ranker.ops.jagged import segments_of
from ranker.ranks import join_ranks
from ranker.run import Run
from ranker.tables.embeddings import Tables
from tests.ranker.memory.built_memories import everything_in, run_with_blocks, same_numbers
from tests.redis_servers import SERVER, redis_server


@pytest.fixture(scope="module")
def blocks_run(once: Callable[..., Path], config_of: Callable[..., TrainConfig], coded: Path) -> Path:
    """A run with compressors of every kind of record."""
    return run_with_blocks(once, config_of, coded)


def small(**changes: object) -> MemoryConfig:
    """Small batches."""
    return MemoryConfig.model_validate({"users": 16, "events": 2_000, "dtype": "float32"} | changes)


def built(run: Path, url: str, name: str = "", switch: bool = True, **changes: object) -> BuildReport:
    """A build's report."""
    report = build(run, url, small(**changes), name, switch)
    assert report is not None
    return report


class Served:
    """A ranker's blocks on test requests: as they read histories, and as they read the store's records."""

    def __init__(self, run: Path, url: str, model: torch.nn.Module) -> None:
        self.run, self.store = Run(run), open_store(url)
        self.dataset = self.run.dataset()
        self.raw, self.versions = RawUsers(self.dataset), versions_of(self.run)
        modules = list(model.eval().modules())
        (self.tables,) = [m for m in modules if isinstance(m, Tables)]
        (self.dense,) = [m for m in modules if isinstance(m, Dense)]

    def first_requests(self) -> list[RequestBatch]:
        """Each user's first request of the test split, with frozen histories."""
        spec = resolve(self.run.config.features, self.dataset.manifest)
        selection = Selection(spec, ("click",), self.run.config.history_length, frozen=True)
        loader = self.run.config.loader.model_copy(update={"requests": 64, "group": 1})
        return list(Loader(self.dataset, ("test",), selection, loader).batches())

    @torch.no_grad()
    def compared(self, batch: RequestBatch, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """What candidates read of block `number`: of histories `[N, d]`, of records `[N, d]`; which found one `[N]`."""
        history, target = self.dense.sequences(
            self.tables(batch.request, batch.candidate, batch.sequence), plain_of(batch)
        )
        block = self.dense.long[number]
        assert isinstance(block, Block)
        expected = block(history, target).out
        users = self.raw.hashes(batch.user.numpy())
        request, probe = segments_of(batch.offsets), target.probe
        if block.probe_column >= 0:
            code = batch.candidate_codes[:, block.probe_column].numpy()
            keys, probe = keys_of(users, number, request.numpy(), code), torch.arange(code.size)
        else:
            keys = user_keys(users, number)
        name = self.store.current(self.versions)
        assert name is not None
        stored = decode(self.store.get(name, keys.key), keys.fingerprint, self.versions).stored
        found = block.read_stored(stored, batch.now, Target(target.x, target.offsets, probe, target.code))
        there = stored.lengths.sum(1) > 0
        return expected, found, there if block.probe_column >= 0 else there[request]


def test_records_made_before_the_first_requests_are_read_as_frozen_histories_are(blocks_run: Path, tmp_path: Path):
    """And candidates find as many of them as the report's coverage says of all requests of these users."""
    report = built(blocks_run, str(tmp_path / "store"), before="test")
    with join_ranks("cpu", 1) as ranks:
        served = Served(blocks_run, str(tmp_path / "store"), restore(Run(blocks_run), ranks))
        seen: set[int] = set()
        found_of_probes = 0
        for batch in served.first_requests():
            # of one user's requests the first one's time is that of her record
            first = torch.tensor([user not in seen and not seen.add(user) for user in batch.user.tolist()])
            of_candidate = first[segments_of(batch.offsets)]
            for number in (0, 1, 3, 4):
                expected, found, there = served.compared(batch, number)
                chosen = there & of_candidate
                assert chosen.any() or not of_candidate.any()
                torch.testing.assert_close(found[chosen], expected[chosen], rtol=1e-4, atol=1e-5)
                found_of_probes += int(there.sum()) if number == 0 else 0
                assert number == 0 or there.all()
    assert 0 < report.coverage["0.candidates"].found == found_of_probes < report.coverage["0.candidates"].asked
    assert report.coverage["users"] == (len(seen), len(seen))
    impressions = served.dataset.manifest.splits["test"].impressions
    assert report.coverage["0.candidates"].asked == impressions


def test_a_block_that_is_no_compressor_has_no_records(blocks_run: Path, tmp_path: Path):
    report = built(blocks_run, str(tmp_path / "store"))
    assert report.generation.blocks == {0: "probe", 1: "request", 3: "request", 4: "request"}


def test_every_user_has_her_records_and_the_report_counts_them(blocks_run: Path, tmp_path: Path):
    url = str(tmp_path / "store")
    report = built(blocks_run, url, codes={"most": 0})
    counts, dataset = report.counts, Run(blocks_run).dataset()
    assert counts["users"] == report.made == sum(p.histories for p in dataset.manifest.partitions)
    codes = dataset.items().column("item.sid_1").to_numpy()
    histories = [dataset.histories(p).column("item").to_pylist() for p in range(4)]
    seen = [{0, *codes[items].tolist()} for partition in histories for items in partition]
    assert counts["0.records"] == sum(map(len, seen))
    assert counts["1.records"] == counts["3.records"] == counts["4.records"] == counts["users"]
    records = everything_in(url)
    assert len(records) == counts["memories"] + counts["users"] == counts["records"]  # and a stamp each
    assert sum(map(len, records.values())) == counts["memory_bytes"] + counts["stamp_bytes"] == counts["bytes"]
    assert report.generation == open_store(url).generations()[0]


@pytest.mark.parametrize("changes", [{"users": 7}, {"events": 150}])
def test_how_users_fall_into_batches_changes_no_record(blocks_run: Path, tmp_path: Path, changes: dict[str, int]):
    whole, other = str(tmp_path / "whole"), str(tmp_path / "other")
    built(blocks_run, whole)
    built(blocks_run, other, **changes)
    same_numbers(everything_in(other), everything_in(whole))


def test_worker_processes_make_the_same_records(blocks_run: Path, tmp_path: Path):
    whole, other = str(tmp_path / "whole"), str(tmp_path / "other")
    built(blocks_run, whole)
    built(blocks_run, other, workers=1)
    assert everything_in(other) == everything_in(whole)


def test_unsharded_tables_make_the_same_records(blocks_run: Path):
    """Of users alone: there is no candidate but the probes."""
    run = Run(blocks_run)
    dataset = run.dataset()
    spec = resolve(run.config.features, dataset.manifest)
    selection = selection_for(spec, run)
    with join_ranks("cpu", 1) as ranks:
        sharded = restore(run, ranks)
        makers = [
            RecordMaker(model, spec, run.config, CodesConfig(), dataset)
            for model in (sharded, unsharded(sharded, spec, run))
        ]
        source = UserBatches(dataset, selection, as_of_now(small(), dataset, ranks), {0: None}, 40)
        one, other = (maker.make(from_tensors(spec, source[0])) for maker in makers)
    assert [made.block.number for made in one] == [0, 1, 3, 4]
    for made, wanted in zip(one, other, strict=True):
        for name, tensor in made.stored._asdict().items():
            torch.testing.assert_close(tensor, getattr(wanted.stored, name), msg=name)


def test_a_build_into_redis_writes_what_one_into_lmdb_does(blocks_run: Path, tmp_path: Path):
    if SERVER is None:
        pytest.skip("no redis-server on this machine")
    with redis_server(tmp_path / "redis") as server:
        url = f"{server.url}?namespace=built"
        report = built(blocks_run, url)
        assert report.generation.counts == built(blocks_run, str(tmp_path / "store")).generation.counts
        assert everything_in(url) == everything_in(str(tmp_path / "store"))


def test_the_same_command_again_finds_its_generation_finished(blocks_run: Path, tmp_path: Path):
    url = str(tmp_path / "store")
    first, again = built(blocks_run, url), built(blocks_run, url)
    assert first.made > 0
    assert again.made == 0
    assert again.generation == first.generation
    assert [one.name for one in open_store(url).generations()] == [first.generation.name]


def test_a_new_generation_is_switched_to_and_older_ones_go(blocks_run: Path, tmp_path: Path):
    url = str(tmp_path / "store")
    generations = [built(blocks_run, url, codes={"most": most}).generation for most in (1, 2, 3)]
    names, versions = [generation.name for generation in generations], generations[0].versions
    store = open_store(url)
    assert store.current(versions) == names[2]
    assert [one.name for one in store.generations()] == names[1:]
    other = built(blocks_run, url, switch=False, keep=0, dtype="int8").generation.name
    assert store.current(versions) == names[2]
    assert {one.name for one in store.generations()} == {names[2], other}


def test_a_generation_of_that_name_with_other_records_is_refused(blocks_run: Path, tmp_path: Path):
    url = str(tmp_path / "store")
    built(blocks_run, url, name="mine")
    with pytest.raises(StoreError, match=r"generation 'mine' has config .*give this build another --name"):
        built(blocks_run, url, name="mine", codes={"policy": "frequent"})


def test_histories_end_where_the_build_is_to_know_no_more(blocks_run: Path, tmp_path: Path):
    """An instant before all events: records of empty histories, which a lost one is too."""
    report = built(blocks_run, str(tmp_path / "store"), as_of="1990-01-01", codes={"without_code": False})
    assert report.counts.get("0.records", 0) == 0
    assert report.generation.as_of_ms == 631_152_000_000
    assert report.coverage["0.candidates"].found == 0


def test_nearest_codes_fill_what_the_history_leaves(blocks_run: Path, tmp_path: Path):
    """All four codes of the level, and none."""
    report = built(blocks_run, str(tmp_path / "store"), codes={"policy": "nearest", "most": 4})
    with_codes = Run(blocks_run).dataset().items().column("item.sid_1").to_numpy()
    assert set(with_codes[1:].tolist()) == {1, 2, 3, 4}
    assert report.counts["0.records"] == 5 * report.counts["users"]
    assert report.coverage["0.candidates"].found == report.coverage["0.candidates"].asked


def test_users_whose_ids_were_not_kept_are_refused(blocks_run: Path, tmp_path: Path):
    run = Run(blocks_run)
    shutil.copytree(run.config.dataset, tmp_path / "dataset")
    (tmp_path / "dataset" / "vocabularies" / "user.arrow").unlink()
    with pytest.raises(UserError, match=r"users are hashed .*prepare it without user_hash_buckets"):
        RawUsers(Dataset(tmp_path / "dataset"))


def test_a_run_without_compressors_is_refused(blocks_run: Path, tmp_path: Path):
    run = shutil.copytree(blocks_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["long"] = [block for block in config["model"]["long"] if block["type"] == "target_attention"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"no block has a memory .* has model.long\[0\] \(target_attention\)"):
        build(run, str(tmp_path / "store"), small())


def test_a_split_without_requests_is_refused_by_name(dataset: Path):
    data = Dataset(dataset)
    data.manifest = data.manifest.model_copy(update={"splits": {"train": data.manifest.splits["train"]}})
    with pytest.raises(UserError, match=r"before: .* has no requests in split test; it has train"):
        split_of(small(before="test"), data)
    assert split_of(small(), data) == "train"
