"""Items are the company they keep in the training period, and nothing that happened after it."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.config_file import load_config
from features.dataset import Dataset
from features.prepare import prepare
from features.schema import PrepareConfig
from features.semantic_ids.config import BehaviourPart
from features.semantic_ids.content import behaviour, cooccurrence
from features.semantic_ids.errors import SidsError
from features.views import Lists, Partition
from tests.features.prepare.logs import START
from tests.features.semantic_ids.content_logs import (
    HOUR,
    Lines,
    Log,
    by_id,
    dataset,
    everything,
    histories,
    pair_counts,
    silent,
)

CONFIGS = Path(__file__).parents[3] / "configs"
Histories = Mapping[Any, Sequence[Any]]


def drawn(users: int = 30, length: int = 20, items: int = 12, seed: int = 0, first: int = 100) -> dict[int, list[int]]:
    """Histories in which items of near numbers are near one another."""
    rng = random.Random(seed)
    made: dict[int, list[int]] = {}
    for user in range(users):
        here = rng.randrange(items)
        made[user] = []
        for _ in range(rng.randrange(length + 1)):
            here = (here + rng.choice([-1, 0, 1, 1, 2])) % items
            made[user].append(first + here)
    return made


def literal_ppmi(of: Histories, config: BehaviourPart, contexts: Sequence[Any]) -> dict[Any, dict[Any, float]]:
    """PPMI by the equations, a loop each."""
    events = Counter(item for items in of.values() for item in items)
    rows = [item for item, n in events.items() if n >= config.min_count]
    pairs = pair_counts(of, config.window)
    company = {c: sum(pairs.get((i, c), 0) for i in rows) for c in contexts}
    total = sum(n**config.smoothing for n in company.values())
    found: dict[Any, dict[Any, float]] = {}
    for i in rows:
        own = sum(pairs.get((i, c), 0) for c in contexts)
        found[i] = {}
        for c in contexts:
            n = pairs.get((i, c), 0)
            pmi = math.log(n / own / (company[c] ** config.smoothing / total)) if n else -math.inf
            found[i][c] = max(pmi - math.log(config.shift), 0.0)
    return found


@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    window=st.integers(1, 9),
    most=st.integers(1, 30),
    data=st.data(),
)
def test_pairs_are_those_of_the_loops_however_few_are_held_at_a_time(
    lengths: list[int], window: int, most: int, data: st.DataObject
) -> None:
    made = {u: data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)) for u, n in enumerate(lengths)}
    values = np.array([item for items in made.values() for item in items], np.int32)
    lists = Lists(values, np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cooccurrence, "PAIRS", most)
        pieces = list(cooccurrence.near(lists, window))
    assert all(len(one) <= max(most, 2 * window) for one, _ in pieces)
    found = Counter(
        (a, b) for one, other in pieces for a, b in zip(one.tolist(), other.tolist(), strict=True) if a != b
    )
    assert found == pair_counts(made, window)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 1, "min_count": 1},
        {"window": 3, "shift": 2.0, "smoothing": 1.0},
        {"min_count": 25, "contexts": 4},
    ],
)
def test_vectors_are_the_ppmi_of_the_equations_reduced(tmp_path: Path, changes: dict[str, Any]) -> None:
    of = drawn()
    made = dataset(tmp_path, histories(of))
    config = BehaviourPart.model_validate({"window": 2, "dim": 12} | changes)
    part = behaviour.fit(config, made, 0, silent)
    contexts = part.contexts.tolist()
    events = Counter(item for items in of.values() for item in items)
    enough = sorted((n for n in events.values() if n >= config.min_count), reverse=True)
    assert [events[c] for c in contexts] == enough[: config.contexts]

    expected = literal_ppmi(of, config, contexts)
    matrix = np.array([[expected[i][c] for c in contexts] for i in expected])
    u, sigma, _ = np.linalg.svd(matrix, full_matrices=False)
    found = by_id(part.open(made), made)
    vectors = np.array([found[i] for i in expected], np.float64)
    # U Σ^(1/2) but for the signs of columns, which leave products of rows as they are
    np.testing.assert_allclose(vectors @ vectors.T, u @ np.diag(sigma) @ u.T, atol=2e-4)
    assert all(not found[i].any() for i in found if i not in expected)


def test_fewer_dimensions_are_the_first_of_more(tmp_path: Path) -> None:
    made = dataset(tmp_path, histories(drawn()))
    two, eight = (behaviour.fit(BehaviourPart(dim=dim), made, 0, silent) for dim in (2, 8))
    found, more = everything(two.open(made), made), everything(eight.open(made), made)
    np.testing.assert_allclose(found, more[:, :2], atol=1e-4)


def test_where_there_is_less_to_tell_the_vector_is_shorter_and_the_log_says_so(tmp_path: Path) -> None:
    made = dataset(tmp_path, histories({1: "abab", 2: "cdcd"}))
    lines = Lines()
    part = behaviour.fit(BehaviourPart(min_count=1), made, 0, lines)
    assert part.dim == 4
    assert "4 numbers instead of 64" in "\n".join(lines)


def test_the_same_seed_gives_the_same_vectors_and_another_the_same_signs(tmp_path: Path) -> None:
    made = dataset(tmp_path, histories(drawn(users=60)))
    first, again, other = (behaviour.fit(BehaviourPart(dim=4), made, seed, silent) for seed in (0, 0, 1))
    assert first.directions.tobytes() == again.directions.tobytes()
    np.testing.assert_allclose(other.directions, first.directions, atol=1e-3)


def test_reading_in_pieces_equals_reading_the_whole(tmp_path: Path) -> None:
    made = dataset(tmp_path, histories(drawn()))
    read = behaviour.fit(BehaviourPart(dim=4), made, 0, silent).open(made)
    pieces = [read(rows) for rows in np.array_split(np.arange(made.manifest.items), 5)]
    np.testing.assert_array_equal(np.concatenate(pieces), everything(read, made))
    assert read(np.array([], np.int64)).shape == (0, 4)


@pytest.mark.parametrize("text", [False, True])
def test_another_dataset_is_read_by_raw_ids(tmp_path: Path, text: bool) -> None:
    """The same events beside requests that turn the order of dense indices round, and a day with new items."""

    def named(of: Histories) -> dict[Any, list[Any]]:
        return {u: [f"item {i}" if text else i for i in items] for u, items in of.items()}

    of, later = named(drawn()), named(drawn(seed=1, items=16))
    config = BehaviourPart(dim=6, window=2)
    fitted = dataset(tmp_path / "first", histories(of))
    part = behaviour.fit(config, fitted, 0, silent)
    mine = by_id(part.open(fitted), fitted)

    names = [i for i in fitted.items()["id"].to_pylist() if i is not None]
    shown = [name for n, name in enumerate(names) for _ in range(400 * (n + 1))]
    requests = {
        "user": [0 for _ in shown],
        "item": shown,
        "time": [START + 1_000 * HOUR + n for n in range(len(shown))],
        "split": ["train" for _ in shown],
    }
    turned = dataset(tmp_path / "turned", histories(of), requests)
    assert turned.items()["id"].to_pylist()[1:] == names[::-1]
    for item, vector in by_id(part.open(turned), turned).items():
        np.testing.assert_allclose(vector, mine[item], atol=1e-5)

    day = dataset(tmp_path / "day", histories(later))
    found = by_id(part.open(day), day)
    pairs = pair_counts(later, config.window)
    events = Counter(item for items in later.values() for item in items)
    contexts = part.contexts.tolist()
    new = set(found) - set(mine)
    assert len(new) == 4
    for item in set(found) - {None}:
        own = sum(pairs.get((item, c), 0) for c in contexts)
        row = np.zeros(len(contexts))
        for k, c in enumerate(contexts):
            if events[item] >= config.min_count and (n := pairs.get((item, c), 0)):
                row[k] = max(math.log(n / own / part.smoothed[k]), 0)
        np.testing.assert_allclose(found[item], row @ part.directions.T.astype(np.float64), atol=1e-4)
    assert any(found[item].any() for item in new)


def test_a_dataset_of_another_catalogue_is_refused(tmp_path: Path) -> None:
    part = behaviour.fit(BehaviourPart(), dataset(tmp_path / "a", histories(drawn())), 0, silent)
    for name, other in (("b", drawn(first=500)), ("c", {u: [str(i) for i in x] for u, x in drawn().items()})):
        made = dataset(tmp_path / name, histories(other))
        with pytest.raises(SidsError, match=rf"{name}/out: none of the 12 items .* such as 1\d\d\)"):
            part.open(made)


def test_no_company_is_refused(tmp_path: Path) -> None:
    alone = dataset(tmp_path / "alone", histories({1: "aaa", 2: "bbb", 3: "c"}))
    with pytest.raises(SidsError, match=r"no two of the 3 items .* of the 7 training events.*window: 5.*min_count"):
        behaviour.fit(BehaviourPart(min_count=1), alone, 0, silent)
    with pytest.raises(SidsError, match=r"no two of the 0 items with min_count: 5"):
        behaviour.fit(BehaviourPart(), alone, 0, silent)
    evenly = dataset(tmp_path / "evenly", histories({1: "abc", 2: "bca", 3: "cab"}))
    with pytest.raises(SidsError, match=r"no two items occur together more often than shift: 9\.0 times chance"):
        behaviour.fit(BehaviourPart(min_count=1, shift=9.0), evenly, 0, silent)


SPLITS: dict[str, dict[str, Any]] = {
    "time": {"by": "time", "test_from": "2023-11-17T22:13:20"},  # START + 72 hours
    "last": {"by": "last", "test_last": 1},
    "column": {"by": "column"},
}


def with_planted(folder: Path, split: str, planted: str) -> Dataset:
    """Twelve users' training events, two training requests and one later request each, ten hours after the user before.

    Items 100 and 101, the most frequent, are never near one another in those events. `planted` puts them next to one
    another many times: after each user's last request, and where the split is by time after all training (late), or
    before the requests (early), or not at all (never).
    """
    training = {u: [100, *range(102, 107), 100] * 2 if u % 2 else [101, *range(107, 112), 101] * 2 for u in range(12)}
    events: Log = histories(training)
    requests: dict[str, list[Any]] = {"user": [], "item": [], "time": [], "split": []}
    for user in range(12):
        first = START + (30 + 10 * user) * HOUR
        for n, name in enumerate(("train", "train", "test")):
            values = (user, 100, first + n * HOUR, name)
            for column, value in zip(requests.values(), values, strict=True):
                column.append(value)
        late = max(first + 3 * HOUR, START + (200 * HOUR if split == "time" else 0))
        begin = {"late": late, "early": START + 10 * HOUR, "never": None}[planted]
        if begin is not None:
            events += [(user, 100 + n % 2, begin + n * 60_000) for n in range(20)]
    return dataset(folder, events, requests, split=SPLITS[split])


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_after_training_is_learnt(tmp_path: Path, split: str) -> None:
    config = BehaviourPart(dim=4, min_count=2)
    made = {when: with_planted(tmp_path / when, split, when) for when in ("never", "late", "early")}
    parts = {when: behaviour.fit(config, one, 0, silent) for when, one in made.items()}
    found = {when: everything(part.open(made[when]), made[when]) for when, part in parts.items()}
    assert made["late"].manifest.events == made["never"].manifest.events + 12 * 20
    assert made["late"].manifest.splits["test"].requests
    for name, value in parts["never"].state().items():
        assert parts["late"].state()[name].tobytes() == value.tobytes(), name
    assert found["late"].tobytes() == found["never"].tobytes()
    # the same events within training do change them
    assert not np.allclose(found["early"] @ found["early"].T, found["never"] @ found["never"].T, atol=0.1)


@settings(max_examples=25)
@given(st.integers(2, 400), st.integers(1, 12))
def test_rows_of_the_matrix_are_the_items_with_enough_events(items: int, min_count: int) -> None:
    counts = np.random.default_rng(items).integers(0, 15, items)
    rows = behaviour.matrix_rows(counts, min_count)
    enough = [i for i in range(1, items) if counts[i] >= min_count]
    assert rows[enough].tolist() == list(range(len(enough)))
    assert (np.delete(rows, enough) == -1).all()


@pytest.mark.real_data
def test_ebnerd_test_articles_without_behaviour(tmp_path: Path, ranker_data: Callable[[str], Path]) -> None:
    assert ranker_data("ebnerd_demo").parent == Path(os.environ["RANKER_DATA"])
    prepare(load_config(CONFIGS / "ebnerd" / "data.yaml", PrepareConfig, ["counters=[]"]), tmp_path / "out")
    made = Dataset(tmp_path / "out")
    read = behaviour.fit(BehaviourPart(), made, 0, silent).open(made)
    shown: list[Any] = []
    for number, info in enumerate(made.manifest.partitions):
        items = Partition(made, number).requests.lists("items")
        first, last = info.requests["test"]
        shown.append(items.values[items.offsets[first] : items.offsets[last]])
    candidates, impressions = np.unique(np.concatenate(shown), return_counts=True)
    without = ~read(candidates).any(axis=1)
    # news: most of what is shown was not there to be read while training lasted
    assert (int(without.sum()), len(candidates)) == (1_718, 2_738)
    assert (int(impressions[without].sum()), int(impressions.sum())) == (276_954, 304_915)
