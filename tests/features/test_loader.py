"""Batches against a literal reading of the files; every request once; orders that follow from seed and epoch alone."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import RequestBatch
from features.dataset import Dataset
from features.errors import UserError
from features.loader import Loader, LoaderConfig, RequestBatches, Selection
from features.schedule import Draw, generator, shuffled
from features.schema import Split
from features.selection import FeaturesConfig, resolve
from tests.features.datasets import Record, everything, literal, records, write_dataset


def config_of(**changes: object) -> LoaderConfig:
    """No worker processes and no id drop unless asked for."""
    return LoaderConfig.model_validate({"workers": 0, "drop_item": 0.0, "drop_user": 0.0} | changes)


def times(batches: list[RequestBatch]) -> list[int]:
    """The requests of some batches; the empty ones have time 0."""
    return [t for batch in batches for t in batch.now.tolist() if t]


def same(a: RequestBatch, b: RequestBatch) -> bool:
    """Whether two batches are equal, tensor by tensor."""
    return all(
        torch.equal(x, y)
        if isinstance(x, torch.Tensor)
        else (torch.equal(x.values(), y.values()) and torch.equal(x.lengths(), y.lengths()))
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four partitions, some hundred requests."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), seed=5, partitions=4, users=20, requests=6)


def check_batch(batch: RequestBatch, selection: Selection, expected: dict[int, Record]) -> None:
    """Each request reads what it must; all together read no event twice and none in vain."""
    needed: set[tuple[int, int, int]] = set()
    for now, record in records(batch, selection).items():
        needed |= expected[now]["events"]
        assert record == {name: value for name, value in expected[now].items() if name != "events"}
    assert batch.event_time.numel() == len(needed)
    rows = batch.sequence["history:item"].lengths()
    assert rows.sum() == len(needed)
    bounds = [0, *rows.cumsum(0).tolist()]
    for start, end in zip(batch.start.tolist(), batch.end.tolist(), strict=True):
        assert any(low <= start <= end <= high for low, high in itertools.pairwise(bounds))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    history_length=st.sampled_from([0, 1, 3, 100]),
    splits=st.sampled_from([("train",), ("valid",), ("train", "valid"), ("test", "train")]),
    config=st.builds(
        config_of,
        requests=st.sampled_from([1, 3, 64]),
        group=st.sampled_from([1, 2, 5]),
        shards=st.sampled_from([3, 4]),
    ),
    world=st.integers(1, 3),
    training=st.booleans(),
)
def test_batches_say_what_the_files_say_and_every_request_comes_once(
    seed: int,
    history_length: int,
    splits: tuple[Split, ...],
    config: LoaderConfig,
    world: int,
    training: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), seed, partitions=5)
        selection = everything(dataset, history_length)
        expected = literal(dataset, selection, splits)
        if not expected:
            with pytest.raises(UserError, match="no requests"):
                Loader(dataset, splits, selection, config)
            return
        ranks = [
            list(Loader(dataset, splits, selection, config, seed, training, rank, world).batches(1))
            for rank in range(world)
        ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [now for batches in ranks for now in times(batches)]
    assert sorted(seen) == sorted(expected)
    for batch in itertools.chain(*ranks):
        if batch.now.any():
            check_batch(batch, selection, expected)


def test_a_batch_holds_at_most_the_configured_requests_and_batches_are_even(dataset: Dataset) -> None:
    loader = Loader(dataset, ("train",), everything(dataset), config_of(requests=7))
    sizes = [batch.requests for batch in loader.batches()]
    assert max(sizes) <= 7
    assert loader.steps() == len(sizes)
    of_partition = [end - begin for begin, end in (p.requests["train"] for p in dataset.manifest.partitions)]
    assert len(sizes) == sum(-(-count // 7) for count in of_partition)


def test_frozen_histories_end_at_the_first_request_of_the_split(dataset: Dataset) -> None:
    """Each history row's, however its requests fall into batches; all else stays that of the request."""
    selection = everything(dataset)
    expected: dict[int, list[int]] = {}
    for p, info in enumerate(dataset.manifest.partitions):
        histories = dataset.histories(p).column("time").to_pylist()
        rows = dataset.requests(p).to_pylist()[slice(*info.requests["train"])]
        for request in rows:
            first = min(other["history_end"] for other in rows if other["row"] == request["row"])
            expected[request["time"]] = histories[request["row"]][:first]
    live, frozen = (
        Loader(dataset, ("train",), of, config_of(requests=3)).batches()
        for of in (selection, replace(selection, frozen=True))
    )
    shorter = 0
    for now, then in zip(live, frozen, strict=True):
        for request, start, end in zip(then.now.tolist(), then.start.tolist(), then.end.tolist(), strict=True):
            assert then.event_time[start:end].tolist() == expected.pop(request)
        shorter += int((then.end - then.start < now.end - now.start).sum())
        for name in ("now", "item", "labels", "history_length", "candidate_dense"):
            assert torch.equal(getattr(then, name), getattr(now, name)), name
    assert not expected
    assert shorter > 0


@pytest.mark.parametrize("training", [True, False])
def test_the_number_of_workers_changes_nothing(dataset: Dataset, training: bool) -> None:
    def read(workers: int) -> list[RequestBatch]:
        config = config_of(workers=workers, requests=16, drop_item=0.2, drop_user=0.2)
        return list(Loader(dataset, ("train",), everything(dataset, 5), config, 3, training).batches(2))

    alone = read(0)
    assert len(alone) > 3
    for workers in (1, 2):
        assert all(same(a, b) for a, b in zip(alone, read(workers), strict=True))


def test_workers_leave_the_global_random_state_alone(dataset: Dataset) -> None:
    before = torch.get_rng_state()
    loader = Loader(dataset, ("train",), everything(dataset), config_of(workers=1, drop_item=0.5), training=True)
    next(iter(loader.batches()))
    assert torch.equal(before, torch.get_rng_state())


def test_order_follows_from_seed_and_epoch_alone(dataset: Dataset) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(dataset, ("train",), everything(dataset), config_of(requests=8), seed, training=True)
        return times(list(loader.batches(epoch)))

    first = order(0, 0)
    assert order(0, 0) == first
    for other in (order(0, 1), order(1, 0), order(1, 1)):
        assert other != first
        assert sorted(other) == sorted(first)


def test_evaluation_reads_in_the_order_of_the_files(dataset: Dataset) -> None:
    loader = Loader(dataset, ("valid",), everything(dataset), config_of(requests=8, drop_item=0.9, drop_user=0.9))
    batches, again = list(loader.batches(0)), list(loader.batches(1))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    partitions = dataset.manifest.partitions
    of_partition = {
        time: p
        for p, info in enumerate(partitions)
        for time in dataset.requests(p).column("time").to_pylist()[slice(*info.requests["valid"])]
    }
    assert [of_partition[now] for now in times(batches)] == sorted(of_partition.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_resumes_exactly(dataset: Dataset, workers: int) -> None:
    config = config_of(requests=16, workers=workers, drop_item=0.3)
    loader = Loader(dataset, ("train",), everything(dataset, 4), config, 7, training=True)
    whole = list(loader.batches(3))
    for step in (1, len(whole) - 1, len(whole)):
        rest = list(loader.batches(3, step))
        assert len(rest) == len(whole) - step
        assert all(same(a, b) for a, b in zip(whole[step:], rest, strict=True))


def test_with_fixed_shards_global_batches_do_not_depend_on_the_ranks(dataset: Dataset) -> None:
    selection = everything(dataset, 6)
    config = config_of(shards=4, requests=8, drop_item=0.3, drop_user=0.3)

    def steps(world: int) -> list[dict[int, Record]]:
        ranks = [
            Loader(dataset, ("train",), selection, config, 1, True, rank, world).batches() for rank in range(world)
        ]
        return [
            {now: r for batch in batches for now, r in records(batch, selection).items() if now}
            for batches in zip(*ranks, strict=True)
        ]

    alone = steps(1)
    assert len(alone) > 3
    assert steps(2) == alone
    assert steps(4) == alone


def test_a_rank_without_batches_yields_empty_ones(dataset: Dataset) -> None:
    selection = everything(dataset)
    ranks = [
        list(Loader(dataset, ("train",), selection, config_of(requests=2), 0, True, rank, 4).batches())
        for rank in range(4)
    ]
    own = [sum(bool(batch.now.any()) for batch in batches) for batches in ranks]
    assert min(own) < max(own) == len(ranks[0])
    for batches, count in zip(ranks, own, strict=True):
        assert len(batches) == max(own)
        assert all(batch.now.any() for batch in batches[:count])
        for empty in batches[count:]:
            assert (empty.requests, empty.candidates, empty.event_time.numel()) == (1, 0, 0)
            assert empty.offsets.tolist() == [0, 0]
            full = batches[0]
            assert empty.request.keys() == full.request.keys()
            assert empty.sequence.keys() == full.sequence.keys()
            assert [x.dtype for x in empty if isinstance(x, torch.Tensor)] == [
                x.dtype for x in full if isinstance(x, torch.Tensor)
            ]
            assert empty.labels.shape == (0, 2)
            assert empty.event_dense.shape == (0, 1)


def test_a_dataset_of_more_partitions_than_requests(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, seed=3, partitions=9, users=1, requests=1)
    expected = literal(dataset, everything(dataset), ("train",))
    assert 0 < len(expected) < 9
    loader = Loader(dataset, ("train",), everything(dataset), config_of(shards=9), training=True)
    assert loader.steps() == 1
    assert sorted(times(list(loader.batches()))) == sorted(expected)


def test_shuffling_keeps_groups_of_neighbours_together() -> None:
    row = np.array([0, 0, 0, 0, 0, 3, 5, 5])
    requests = np.arange(100, 108)
    for seed in range(20):
        out = shuffled(requests, row, 2, np.random.default_rng(seed)).tolist()
        assert sorted(out) == requests.tolist()
        for a, b in ((100, 101), (102, 103), (106, 107)):
            assert out.index(b) == out.index(a) + 1
    firsts = Counter(shuffled(requests, row, 1, np.random.default_rng(seed))[0] for seed in range(800))
    assert set(firsts) == set(requests)
    assert min(firsts.values()) > 60


def test_groups_share_one_history_in_training(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, seed=1, partitions=1, users=30, requests=6, events=60)
    read = {
        group: sum(
            batch.event_time.numel()
            for batch in Loader(
                dataset, ("train",), everything(dataset), config_of(requests=8, group=group), training=True
            ).batches()
        )
        for group in (1, 6)
    }
    assert read[6] < read[1] / 2


def test_streams_of_different_purposes_differ() -> None:
    """Trailing zeros of a seed are no seed in NumPy: (s, e, 1) and (s, e, 1, 0) would be one stream."""
    draws = {
        tuple(generator(seed, epoch, draw, index, step).integers(0, 2**62, 2).tolist())
        for seed, epoch, draw, index, step in itertools.product(range(2), range(2), Draw, range(3), range(3))
    }
    assert len(draws) == 2 * 2 * len(Draw) * 3 * 3


def test_tensors_are_writable_and_own_their_memory(tmp_path: Path) -> None:
    """A batch of one request reads one window, which Arrow need not copy: nobody may write to the file's map."""
    dataset = write_dataset(tmp_path, seed=0, partitions=3, users=6, events=2000)
    selection = everything(dataset)
    loader = Loader(dataset, ("train",), selection, config_of(requests=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = loader.epoch(0)
        for step in range(source.steps):
            for tensor in source[step].values():
                tensor.zero_()
    expected = literal(dataset, selection, ("train",))
    assert max(len(record["events"]) for record in expected.values()) > 500
    for batch in loader.batches():
        check_batch(batch, selection, expected)


def test_steps_end_where_the_epoch_ends(dataset: Dataset) -> None:
    source: RequestBatches = Loader(dataset, ("train",), everything(dataset), config_of()).epoch(0)
    assert len(source) == source.steps
    with pytest.raises(IndexError, match=f"step {source.steps} of an epoch of {source.steps}"):
        source[source.steps]


def test_features_without_the_item_id(dataset: Dataset) -> None:
    features = FeaturesConfig(candidate=["item.tags"], sequence=["item.category"])
    selection = Selection(resolve(features, dataset.manifest), ("click",), 3)
    expected = literal(dataset, selection, ("train",))
    for batch in Loader(dataset, ("train",), selection, config_of()).batches():
        for now, record in records(batch, selection).items():
            assert record == {name: value for name, value in expected[now].items() if name != "events"}


class TestErrors:
    def test_too_few_partitions(self, dataset: Dataset) -> None:
        with pytest.raises(UserError, match=r"4 partitions are too few for 5 shards; .* partitions: 5"):
            Loader(dataset, ("train",), everything(dataset), config_of(shards=5))
        with pytest.raises(UserError, match="too few for 6 shards"):
            Loader(dataset, ("train",), everything(dataset), config_of(), world=6)

    def test_too_few_shards(self, dataset: Dataset) -> None:
        with pytest.raises(UserError, match=r"loader.shards: 2 shards are too few for 3 ranks"):
            Loader(dataset, ("train",), everything(dataset), config_of(shards=2), world=3)

    def test_empty_split(self, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path, partitions=2, users=0)
        with pytest.raises(UserError, match="no requests in split train or valid; it has none"):
            Loader(dataset, ("train", "valid"), everything(dataset), config_of())

    def test_unknown_label(self, dataset: Dataset) -> None:
        spec = everything(dataset).spec
        with pytest.raises(UserError, match=r"no label 'clicks'; did you mean 'click'\? It has click, conversion"):
            Loader(dataset, ("train",), Selection(spec, ("clicks",), 0), config_of())
        with pytest.raises(UserError, match=r"no oracle 'xyz'\. It has click"):
            Loader(dataset, ("train",), Selection(spec, ("click",), 0, ("xyz",)), config_of())
