"""Every user once, at the end of her history or where it is cut, against a literal reading of the files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import RequestBatch, from_tensors
from features.dataset import Dataset
from features.schema import Split
from features.selection import Selection
from features.users import NEVER, AsOf, UserBatches, cut_of, first_not_before, newest_time
from features.views import Partition
from features.workers import built
from tests.features.datasets import KNOWN_ITEMS, Record, everything, write_dataset

Read = list[tuple[int, int, list[int], int]]
"""of each user in order: her index, when she is looked at, the times of the events read, events known"""


def literal(dataset: Dataset, selection: Selection, as_of: AsOf) -> dict[int, Read]:
    """What each partition's users must give."""
    found: dict[int, Read] = {}
    for p, info in enumerate(dataset.manifest.partitions):
        requests = dataset.requests(p).to_pylist()
        asked = requests[slice(*info.requests[as_of.before])] if as_of.before else []
        found[p] = []
        for row, history in enumerate(dataset.histories(p).to_pylist()):
            own = [request for request in asked if request["row"] == row]
            now = min([as_of.now, *(request["time"] for request in own)])
            end = min([len(history["time"]), *(request["history_end"] for request in own)])
            times = [time for time in history["time"][:end] if time < now]
            latest = times[-selection.history_length :] if selection.history_length else times
            found[p].append((history["user"], now, latest, len(times)))
    return found


def read(batches: list[RequestBatch]) -> Read:
    """The same of batches."""
    return [
        (user, now, batch.event_time[start:end].tolist(), length)
        for batch in batches
        for user, now, start, end, length in zip(
            *(x.tolist() for x in (batch.user, batch.now, batch.start, batch.end, batch.history_length)), strict=True
        )
    ]


def opened(dataset: Dataset, selection: Selection, source: UserBatches, workers: int = 0) -> list[RequestBatch]:
    """All batches of a source."""
    return [from_tensors(selection.spec, tensors) for tensors in built(source, range(len(source)), workers, 2)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four partitions."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), seed=5, partitions=4, users=20, requests=6)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    history_length=st.sampled_from([0, 1, 3, 100]),
    now=st.sampled_from([0, 2_000, 9_000, 500_000, 2_000_000]),
    before=st.sampled_from([None, "train", "test"]),
    users=st.sampled_from([1, 3, 64]),
    events=st.sampled_from([1, 10, 1_000]),
)
def test_batches_hold_every_user_once_with_the_history_that_is_known_then(
    seed: int, history_length: int, now: int, before: Split | None, users: int, events: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), seed, partitions=3)
        selection, as_of = everything(dataset, history_length), AsOf(now, before)
        wanted = literal(dataset, selection, as_of)
        order = [2, 0, 1]
        source = UserBatches(dataset, selection, as_of, dict.fromkeys(order), users, events)
        batches = opened(dataset, selection, source)
    assert read(batches) == [record for p in order for record in wanted[p]]
    for batch in batches:
        assert batch.requests <= users
        assert batch.requests == 1 or batch.event_time.numel() <= events
    assert [slot.partition for slot in source.slots] == sorted((s.partition for s in source.slots), key=order.index)


def test_events_are_read_as_a_request_reads_them(dataset: Dataset) -> None:
    """Ids, attributes, codes and dense features of the same events, unknown items as row 0."""
    selection = everything(dataset)
    source = UserBatches(dataset, selection, AsOf(2_000_000), {1: None})
    batch = opened(dataset, selection, source)[0]
    items: list[Record] = dataset.items().to_pylist()
    events: list[Record] = [
        {"item": item, "event.action": action, "event.dwell": dwell}
        for history in dataset.histories(1).to_pylist()
        for item, action, dwell in zip(history["item"], history["event.action"], history["event.dwell"], strict=True)
    ]
    known = [event["item"] if event["item"] < KNOWN_ITEMS else 0 for event in events]
    assert batch.sequence["history:item"].values().tolist() == known
    category = [items[event["item"]]["item.category"] for event in events]
    assert batch.sequence["history:item.category"].values().tolist() == category
    assert batch.event_codes.T.tolist() == [category, known]
    assert batch.sequence["history:event.action"].values().tolist() == [event["event.action"] for event in events]
    assert batch.event_dense.flatten().tolist() == [event["event.dwell"] for event in events]


def test_a_user_is_a_request_without_candidates_and_features(dataset: Dataset) -> None:
    selection = everything(dataset)
    source = UserBatches(dataset, selection, AsOf(2_000_000), {0: None, 1: None})
    for batch in opened(dataset, selection, source):
        assert batch.candidates == 0
        assert batch.offsets.tolist() == [0] * (batch.requests + 1)
        assert batch.request.values().numel() == 0
        assert batch.request.stride() == batch.sequence.stride() == batch.requests
        assert not batch.request_dense.any()


def test_chosen_rows_alone_are_read(dataset: Dataset) -> None:
    selection = everything(dataset)
    whole = read(opened(dataset, selection, UserBatches(dataset, selection, AsOf(2_000_000), {2: None})))
    rows = np.array([1, 4, 5])
    assert len(whole) > 5
    source = UserBatches(dataset, selection, AsOf(2_000_000), {0: rows[:0], 2: rows}, users=2)
    assert read(opened(dataset, selection, source)) == [whole[row] for row in rows]
    assert [source.rows(slot).tolist() for slot in source.slots] == [[1, 4], [5]]


def test_worker_processes_build_the_same_batches(dataset: Dataset) -> None:
    selection = everything(dataset, 3)
    source = UserBatches(dataset, selection, AsOf(5_000), dict.fromkeys(range(4)), users=4)
    assert read(opened(dataset, selection, source, workers=2)) == read(opened(dataset, selection, source))


def test_a_cut_tells_the_last_event_that_is_known(dataset: Dataset) -> None:
    for p in range(4):
        cut = cut_of(dataset, Partition(dataset, p), p, AsOf(5_000))
        for row, history in enumerate(dataset.histories(p).to_pylist()):
            known = [time for time in history["time"] if time < 5_000]
            assert (cut.length[row], cut.last[row], cut.now[row]) == (len(known), max(known, default=NEVER), 5_000)


def test_the_newest_time_is_that_of_the_last_event_or_request(dataset: Dataset) -> None:
    of_events = {p: [t for row in dataset.histories(p).to_pylist() for t in row["time"]] for p in range(4)}
    splits = {name: info.model_copy(update={"last_ms": 77}) for name, info in dataset.manifest.splits.items()}
    dataset = Dataset(dataset.root)
    dataset.manifest = dataset.manifest.model_copy(update={"splits": splits})
    assert newest_time(dataset, [0, 2]) == max(77, *of_events[0], *of_events[2])
    assert newest_time(dataset, []) == 77


@given(
    lists=st.lists(st.lists(st.integers(0, 9)), min_size=1),
    when=st.lists(st.integers(0, 10), min_size=1),
)
def test_first_not_before_is_bisection_in_each_window(lists: list[list[int]], when: list[int]) -> None:
    lists = [sorted(values) for values in lists]
    when = [when[i % len(when)] for i in range(len(lists))]
    offsets = np.cumsum([0, *map(len, lists)])
    times = np.array([time for values in lists for time in values], np.int64)
    found = first_not_before(times, offsets[:-1], offsets[1:], np.array(when))
    assert (found - offsets[:-1]).tolist() == [
        sum(value < then for value in values) for values, then in zip(lists, when, strict=True)
    ]
