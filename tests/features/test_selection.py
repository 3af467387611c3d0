"""Features are found by name, place and kind; what does not fit is refused with the nearest that does."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from features.dataset import Manifest
from features.selection import Feature, FeatureError, FeaturesConfig, resolve
from tests.features.datasets import EVERYTHING, KNOWN_ITEMS, write_dataset


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """With columns of every scope and kind."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), partitions=1).manifest


def test_by_default_a_model_reads_item_ids(manifest: Manifest) -> None:
    spec = resolve(FeaturesConfig(), manifest)
    item = Feature("item", "item", "categorical", KNOWN_ITEMS)
    assert spec.sequence == (item,)
    assert spec.candidate == (item,)
    assert spec.request == spec.request_dense == spec.candidate_dense == spec.event == spec.event_dense == ()


def test_features_keep_their_order_and_dense_ones_go_to_their_stride(manifest: Manifest) -> None:
    spec = resolve(EVERYTHING, manifest)
    assert [f.name for f in spec.request] == EVERYTHING.request
    assert [f.name for f in spec.candidate] == EVERYTHING.candidate
    assert [f.name for f in spec.sequence] == ["item.category", "item"]
    assert [f.name for f in spec.request_dense] == ["user.age", "request.load"]
    assert [f.name for f in spec.candidate_dense] == ["item.price", "candidate.score"]
    assert spec.request[0] == Feature("user", "user", "categorical", 30)
    assert spec.candidate[2] == Feature("item.tags", "item", "bag", 9)


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        (
            "request",
            "user.divice",
            r"features.request\[0\]: 'user.divice' is not in the dataset; did you mean 'user.dev",
        ),
        ("request", "item", r"'item' is categorical of scope item.* Allowed here: request.hour, .*user.interests"),
        ("candidate", "request.hour", r"features.candidate\[0\]: 'request.hour' is categorical of scope request"),
        ("candidate", "item.price", r"'item.price' is dense of scope item"),
        ("dense", "item.category", r"features.dense\[0\]: 'item.category' is categorical of scope item"),
        ("dense", "event.dwell", r"'event.dwell' is dense of scope event"),
        ("sequence", "item.tags", r"'item.tags' is bag of scope item"),
        ("sequence", "user", r"'user' is categorical of scope user"),
        ("event", "event.dwell", r"'event.dwell' is dense of scope event; did you mean|Allowed here: event.action"),
        ("event_dense", "event.action", r"'event.action' is categorical of scope event.*Allowed here: event.dwell"),
        ("event", "xyz", r"features.event\[0\]: 'xyz' is not in the dataset\. Allowed here: event.action"),
    ],
)
def test_a_feature_that_does_not_fit_is_refused(manifest: Manifest, place: str, name: str, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        resolve(FeaturesConfig.model_validate({place: [name]}), manifest)


def test_a_feature_named_twice_is_refused(manifest: Manifest) -> None:
    with pytest.raises(FeatureError, match=r"features.candidate\[2\]: 'item' is named twice"):
        resolve(FeaturesConfig(candidate=["item", "item.tags", "item"]), manifest)


def test_where_nothing_is_allowed_the_message_says_so(manifest: Manifest) -> None:
    bare = manifest.model_copy(update={"columns": {}})
    with pytest.raises(FeatureError, match="Allowed here: nothing in this dataset"):
        resolve(FeaturesConfig(event=["event.action"]), bare)


def test_a_sequence_needs_a_feature() -> None:
    with pytest.raises(ValidationError, match="sequence"):
        FeaturesConfig(sequence=[])
