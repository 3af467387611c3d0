"""Columns and ids without a vocabulary: rows by hash, the same on every day; what is counted of them and of others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from features.dataset import Dataset, read_arrow
from features.hashing import row_of
from features.loader import Loader, LoaderConfig
from features.prepare import prepare
from features.schema import PrepareConfig
from features.selection import FeaturesConfig, Selection, resolve
from features.semantic_ids.config import TextPart
from features.semantic_ids.content.text import Terms
from tests.features.prepare import logs

COUNT, USERS, ITEMS = 240, 23, 17
BUCKETS = {"user": 11, "item": 7, "device": 5, "brand": 6, "tags": 9, "action": 4, "query": 50, "slot": 3}


def tables(first_user: int = 0) -> dict[str, dict[str, list[Any]]]:
    """A day of logs: strings, integers, truth values, lists and nulls; ids of users differ from day to day."""

    def user(n: int) -> str:
        return f"u{first_user + n}"

    shown, seen = logs.impressions(COUNT, USERS, ITEMS), logs.events(COUNT, USERS, ITEMS)
    shown |= {"user": [user(n) for n in shown["user"]], "query": [f"q {n // 2 % 90}" for n in range(COUNT)]}
    shown |= {"slot": [None if n % 10 == 9 else n % 10 for n in range(COUNT)], "place": [n % 13 for n in range(COUNT)]}
    seen |= {"user": [user(n) for n in seen["user"]], "action": [n % 7 < 3 for n in range(COUNT)]}
    numbers = range(ITEMS)
    items = {
        "item": [100 + n for n in numbers],
        "brand": [None if n == 3 else f"b{n % 9}" for n in numbers],
        "tags": [None if n == 5 else [n, None, 2**40 + n][: n % 4] for n in numbers],
    }
    users = {"user": [user(n) for n in range(USERS)], "device": [f"d{n % 8}" for n in range(USERS)]}
    return {"impressions": shown, "events": seen, "items": items, "users": users}


def hashed(folder: Path, days: dict[str, dict[str, list[Any]]], **changes: Any) -> PrepareConfig:
    """All ids hashed, a few columns beside them not."""

    def column(name: str, **options: Any) -> dict[str, Any]:
        return {"hash_buckets": BUCKETS[name], **options}

    columns = {
        "user": {"device": column("device"), "name": {"source": '"user"'}},
        "item": {"brand": column("brand"), "tags": column("tags", kind="bag"), "first": {"source": "brand"}},
        "event": {"action": column("action"), "doing": {"source": "action"}},
        "request": {"query": column("query"), "words": {"source": "query", "min_count": 3}},
        "candidate": {"slot": column("slot"), "place": {"source": "slot"}},
    }
    of_ids = {"user_hash_buckets": BUCKETS["user"], "item_hash_buckets": BUCKETS["item"]}
    return logs.config(logs.write(folder, **days), columns=columns, **(of_ids | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("hashed")
    return logs.prepared(hashed(folder / "in", tables()), folder / "out")


def raw(dataset: Dataset, column: str) -> dict[int, Any]:
    """Value by index of a column that has a vocabulary."""
    rows = read_arrow(dataset.root / "vocabularies" / f"{column}.arrow").to_pylist()
    return {0: None} | {row["index"]: row["value"] for row in rows}


def users_of(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Rows of histories by the raw id of their user."""
    names = raw(dataset, "user.name")
    partitions = range(len(dataset.manifest.partitions))
    return {names[row["user.name"]]: row for p in partitions for row in dataset.histories(p).to_pylist()}


def test_every_id_has_the_row_of_its_hash(made: Dataset) -> None:
    given = tables()
    items = {row["id"]: row for row in made.items().to_pylist()}
    assert items[None]["bucket"] == items[None]["item.brand"] == 0
    for item, brand, tags in zip(*(given["items"][name] for name in ("item", "brand", "tags")), strict=True):
        assert items[item]["bucket"] == row_of(item, BUCKETS["item"])
        assert items[item]["item.brand"] == row_of(brand, BUCKETS["brand"])
        assert items[item]["item.tags"] == [row_of(tag, BUCKETS["tags"]) for tag in tags or []]
    users = users_of(made)
    for user, device in zip(given["users"]["user"], given["users"]["device"], strict=True):
        assert users[user]["bucket"] == row_of(user, BUCKETS["user"])
        assert users[user]["user.device"] == row_of(device, BUCKETS["device"])
    action, query, slot = Counter[int](), Counter[int](), Counter[int]()
    for number in range(len(made.manifest.partitions)):
        for row in made.histories(number).to_pylist():
            action.update(row["event.action"])
        for row in made.requests(number).to_pylist():
            query[row["request.query"]] += 1
            slot.update(row["candidate.slot"])
    assert action == Counter(row_of(v, BUCKETS["action"]) for v in given["events"]["action"])
    assert query == Counter(row_of(v, BUCKETS["query"]) for v in given["impressions"]["query"][::2])
    assert slot == Counter(row_of(v, BUCKETS["slot"]) for v in given["impressions"]["slot"])


def test_users_are_still_told_apart_by_their_dense_index(made: Dataset) -> None:
    users = users_of(made)
    assert len({row["user"] for row in users.values()}) == USERS == made.manifest.users - 1
    assert len({row["bucket"] for row in users.values()}) <= BUCKETS["user"] < USERS


def test_no_vocabulary_is_written_for_what_is_hashed(made: Dataset) -> None:
    written = {path.stem for path in (made.root / "vocabularies").iterdir()}
    assert written == {"item", "user.name", "item.first", "event.doing", "request.words", "candidate.place"}


def test_the_manifest_counts_ids_and_those_that_share_a_row(made: Dataset) -> None:
    given, manifest = tables(), made.manifest
    distinct: dict[str, set[Any]] = {
        "user": set(given["users"]["user"]),
        "item": set(given["items"]["item"]),
        "user.device": set(given["users"]["device"]),
        "item.brand": set(given["items"]["brand"]) - {None},
        "item.tags": {tag for tags in given["items"]["tags"] for tag in tags or []} - {None},
        "event.action": set(given["events"]["action"]),
        "request.query": set(given["impressions"]["query"]),
        "candidate.slot": set(given["impressions"]["slot"]) - {None},
    }
    for feature, ids in distinct.items():
        info, buckets = manifest.hashed(feature), BUCKETS[feature.split(".")[-1]]
        assert info is not None
        of_row = Counter(row_of(v, buckets) for v in ids)
        sharing = sum(count for count in of_row.values() if count > 1)
        assert (info.function, info.buckets, info.ids, info.sharing) == ("md5_64", buckets, len(ids), sharing), feature
    assert manifest.columns["request"]["query"].size == BUCKETS["query"] + 1
    assert (manifest.id_rows("user"), manifest.id_rows("item")) == (BUCKETS["user"] + 1, BUCKETS["item"] + 1)
    assert manifest.hashed("request.words") is None


def test_ids_that_a_vocabulary_lacks_are_counted_by_split(made: Dataset, tmp_path: Path) -> None:
    """Literally: of every request its user and words, of every impression its item and place."""
    plain = logs.prepared(
        hashed(tmp_path / "in", tables(), user_hash_buckets=None, item_hash_buckets=None), tmp_path / "out"
    )
    shown = tables()["impressions"]
    train = [n for n in range(COUNT) if shown["split"][n] == "train"]
    words = Counter(shown["query"][n] for n in train)  # one a candidate
    known: dict[str, set[Any]] = {
        "user": {shown["user"][n] for n in train},
        "user.name": {shown["user"][n] for n in train},
        "request.words": {word for word, count in words.items() if count >= 3},
        "candidate.place": {shown["slot"][n] for n in train},
    }
    values = {"user": "user", "user.name": "user", "request.words": "query", "candidate.place": "slot"}
    for split, info in plain.manifest.splits.items():
        of_split = [n for n in range(COUNT) if shown["split"][n] == split]
        assert info.unknown.keys() == {*known, "item"}
        for feature, vocabulary in known.items():
            step = 1 if feature == "candidate.place" else 2
            ids = [shown[values[feature]][n] for n in of_split[::step]]
            ids = [v for v in ids if v is not None]
            assert info.unknown[feature] == (sum(v not in vocabulary for v in ids), len(ids)), (split, feature)
        assert info.unknown["item"] == (info.unknown_items, len(of_split))
    assert plain.manifest.splits["test"].unknown["request.words"][0] > 0
    for split, info in made.manifest.splits.items():
        assert info.unknown == {
            name: counts
            for name, counts in plain.manifest.splits[split].unknown.items()
            if name not in ("user", "item")
        }


def test_rare_values_of_items_are_unknown_ids_of_their_impressions(tmp_path: Path) -> None:
    brands = ["a", "a", "rare", None, "a", "b", "b"]
    items = {"item": [100 + n for n in range(7)], "brand": brands}
    source = logs.write(tmp_path / "in", impressions=logs.impressions(28), items=items)
    columns = {"item": {"brand": {"min_count": 2}, "all": {"source": "brand"}}}
    dataset = logs.prepared(logs.config(source, columns=columns), tmp_path / "out")
    found = [info.unknown["item.brand"] for info in dataset.manifest.splits.values()]
    assert [sum(counts) for counts in zip(*found, strict=True)] == [4, 24]  # each item is shown four times
    assert "item.all" not in dataset.manifest.splits["train"].unknown  # it has every value


def test_an_id_keeps_its_row_on_another_day(made: Dataset, tmp_path: Path) -> None:
    """The second day has other users beside half of the first one's: no vocabulary is needed for either."""
    second = logs.prepared(hashed(tmp_path / "in", tables(first_user=USERS // 2)), tmp_path / "out")
    before, after = users_of(made), users_of(second)
    both = before.keys() & after.keys()
    assert both
    assert after.keys() - before.keys()
    assert all(before[user]["bucket"] == after[user]["bucket"] for user in both)
    assert any(before[user]["user"] != after[user]["user"] for user in both)  # dense indices are each day's own
    for user, row in after.items():
        assert row["bucket"] == row_of(user, BUCKETS["user"])
    assert second.manifest.id_rows("user") == made.manifest.id_rows("user")


def test_hashes_cover_the_number_of_buckets(made: Dataset, tmp_path: Path) -> None:
    again = logs.prepared(hashed(tmp_path / "in", tables(), threads=2), tmp_path / "same")
    assert again.manifest.content_hash == made.manifest.content_hash
    assert again.vocabulary_hash() == made.vocabulary_hash()
    other = logs.prepared(hashed(tmp_path / "in", tables(), user_hash_buckets=12), tmp_path / "other")
    assert other.manifest.content_hash != made.manifest.content_hash
    assert other.vocabulary_hash() != made.vocabulary_hash()


def batches(dataset: Dataset, training: bool, **loader: Any) -> list[Any]:
    """All batches of the training split, with every hashed feature."""
    features = FeaturesConfig(
        request=["user", "user.device", "request.query"],
        candidate=["item", "item.brand", "item.tags", "candidate.slot"],
        sequence=["item", "item.brand"],
        event=["event.action"],
    )
    selection = Selection(resolve(features, dataset.manifest), ("click",), 0)
    config = LoaderConfig.model_validate({"workers": 0, "drop_item": 0.0, "drop_user": 0.0} | loader)
    return list(Loader(dataset, ("train",), selection, config, training=training).batches())


def test_a_batch_holds_rows_where_tables_read_and_dense_indices_where_users_are_grouped(made: Dataset) -> None:
    bucket_of_user = {row["user"]: row["bucket"] for row in users_of(made).values()}
    bucket_of_item = made.items().column("bucket").to_pylist()
    for batch in batches(made, training=False):
        assert batch.request["user"].values().tolist() == [bucket_of_user[u] for u in batch.user.tolist()]
        shown = [bucket_of_item[i] for i in batch.item.tolist()]
        assert batch.candidate["item"].values().tolist() == batch.sequence["candidate:item"].values().tolist() == shown
    histories = Counter(v for b in batches(made, training=False) for v in b.sequence["history:item"].values().tolist())
    assert histories
    assert set(histories) <= set(bucket_of_item) - {0}


def test_dropped_ids_read_row_0(made: Dataset) -> None:
    dropped = batches(made, training=True, drop_user=0.5, drop_item=0.5)
    for field, keys in (("request", ["user"]), ("sequence", ["history:item", "candidate:item"])):
        for key in keys:
            values = [v for batch in dropped for v in getattr(batch, field)[key].values().tolist()]
            assert 0.3 < values.count(0) / len(values) < 0.7
    for batch in dropped:
        assert (batch.user > 0).all()


def test_semantic_ids_take_hashed_values_for_words(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item's terms are its rows; a table of a billion rows is not gone through for them."""
    info = made.manifest.columns["item"]["tags"].model_copy(update={"size": 2_000_000_000})
    monkeypatch.setitem(made.manifest.columns["item"], "tags", info)
    terms = Terms(TextPart(columns=["item.tags", "item.brand"], buckets=1 << 16), made)
    rows = made.items().to_pylist()
    (counts,) = terms.chunks(pa.array(range(len(rows))).to_numpy())
    for n, row in enumerate(rows):
        words = {f"item.tags={tag}" for tag in row["item.tags"] if tag} | {f"item.brand={row['item.brand']}"}
        words -= {"item.brand=0"}
        assert counts[n].nnz == len(words)
        assert counts[n].sum() == sum(1 for tag in row["item.tags"] if tag) + bool(row["item.brand"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item": {"price": {"kind": "dense", "hash_buckets": 5}}}, "only a categorical or bag column can be hashed"),
        ({"user": {"age": {"edges": [1.0], "hash_buckets": 5}}}, "a column with edges has few values"),
        ({"request": {"query": {"min_count": 2, "hash_buckets": 5}}}, r"remove min_count \(2\), or hash_buckets"),
        ({"request": {"query": {"hash_buckets": 0}}}, "greater than or equal to 1"),
        ({"request": {"query": {"hash_buckets": 2**31}}}, "less than or equal to 2147483646"),
    ],
)
def test_what_cannot_be_hashed_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        logs.config(logs.write(tmp_path, impressions=logs.impressions()), columns=columns)


def test_rare_items_have_no_row_to_share_where_items_are_hashed(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"remove item_min_count \(3\), or item_hash_buckets"):
        logs.small(tmp_path, item_hash_buckets=5, item_min_count=3)


def test_logs_without_a_user_table_can_hash_users(tmp_path: Path) -> None:
    manifest = prepare(logs.small(tmp_path / "in", user_hash_buckets=3), tmp_path / "out")
    assert (manifest.hashed_ids["user"].ids, "item" in manifest.hashed_ids) == (5, False)
