"""Ids dropped in training, so that the rows of unknown ones are trained, and what is dropped with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from features.dataset import Dataset
from features.errors import UserError
from features.loader import Loader
from features.reader import bernoulli
from tests.features.datasets import everything, literal, records, write_dataset
from tests.features.test_loader import config_of, same


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four partitions, some hundred requests."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), seed=5, partitions=4, users=20, requests=6)


def test_ids_are_dropped_in_training_near_their_rate_and_differently_in_each_epoch(dataset: Dataset) -> None:
    selection = everything(dataset)
    config = config_of(requests=1000, drop_item=0.3, drop_user=0.4)

    def ids(training: bool, epoch: int = 0) -> tuple[torch.Tensor, ...]:
        loader = Loader(dataset, ("train", "valid", "test"), selection, config, 0, training)
        key_order = {now: r for b in loader.batches(epoch) for now, r in records(b, selection).items()}
        ordered = [key_order[now] for now in sorted(key_order)]
        return (
            torch.tensor([i for r in ordered for i in r["history"]["item"]]),
            torch.tensor([i for r in ordered for i in r["target"]["item"]]),
            torch.tensor([i for r in ordered for i in r["request"]["user"]]),
        )

    kept, dropped, later = ids(False), ids(True), ids(True, 1)
    for all_ids, some, other, rate in zip(kept, dropped, later, (0.3, 0.3, 0.4), strict=True):
        known = all_ids > 0
        lost = (some == 0) & known
        assert torch.equal(some[~lost], all_ids[~lost])
        assert abs(lost[known].double().mean() - rate) < 0.12
        assert not torch.equal(some, other)


def test_a_request_and_its_pooled_candidate_agree_on_dropped_ids(dataset: Dataset) -> None:
    selection = everything(dataset)
    loader = Loader(dataset, ("train",), selection, config_of(drop_item=0.5), training=True)
    for batch in loader.batches():
        assert torch.equal(batch.candidate["item"].values(), batch.sequence["candidate:item"].values())


def test_what_a_new_item_lacks_is_dropped_with_the_item(dataset: Dataset) -> None:
    """Named columns are absent exactly where the item was dropped; all else is as without dropping."""
    selection = everything(dataset)
    names = ["item.category", "item.tags"]
    dropping = config_of(requests=32, drop_item=0.4, drop_with_item=names)
    loader = Loader(dataset, ("train",), selection, dropping, training=True)
    found = {now: r for batch in loader.batches() for now, r in records(batch, selection).items()}
    lost = kept = 0
    for now, expected in literal(dataset, selection, ("train",)).items():
        record = found[now]
        codes = [f.name for f in selection.spec.codes]
        for side, of_codes in (("history", "event_codes"), ("target", "candidate_codes")):
            whole, some = expected[side], record[side]
            for i, (item, read) in enumerate(zip(whole["item"], some["item"], strict=True)):
                dropped = item != read
                assert read in (item, 0)
                lost, kept = lost + dropped, kept + (not dropped)
                if item == 0:  # unknown: dropping it shows in its columns alone
                    continue
                assert some["item.category"][i] == (0 if dropped else whole["item.category"][i])
                for code, name in enumerate(codes):
                    absent = dropped and name in ("item", *names)
                    assert record[of_codes][i][code] == (0 if absent else expected[of_codes][i][code])
        tags, read_tags = expected["candidate"]["item.tags"], record["candidate"]["item.tags"]
        for c, (item, read) in enumerate(zip(expected["target"]["item"], record["target"]["item"], strict=True)):
            if item:
                assert read_tags[c] == ([] if item != read else tags[c])
        for name in ("event", "event_time", "item", "labels", "candidate_dense"):
            assert record[name] == expected[name]
    assert min(lost, kept) > 50


def test_evaluation_drops_no_columns(dataset: Dataset) -> None:
    selection = everything(dataset)
    config = config_of(requests=32, drop_item=0.4, drop_with_item=["item.category"])
    plain, dropping = (Loader(dataset, ("test",), selection, c) for c in (config_of(requests=32), config))
    assert all(same(a, b) for a, b in zip(plain.batches(), dropping.batches(), strict=True))


def test_a_column_to_drop_must_be_one_of_the_item_table(dataset: Dataset) -> None:
    config = config_of(drop_with_item=["item.categroy"])
    named = r"loader.drop_with_item\[0\]: .*'item.categroy'; did you mean 'item.category'\?"
    with pytest.raises(UserError, match=named):
        Loader(dataset, ("train",), everything(dataset), config, training=True)


@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.05, 0.5, 0.999])
def test_bernoulli_positions(rate: float) -> None:
    count = 200_000
    hit = np.zeros(count, np.bool_)
    positions = bernoulli(np.random.default_rng(0), rate, count)
    hit[positions] = True
    tolerance = 5 * np.sqrt(rate * (1 - rate) / count)
    assert abs(hit.mean() - rate) <= tolerance
    neighbours = (hit[1:] & hit[:-1]).mean()  # independent: both with the rate's square
    assert abs(neighbours - rate**2) <= 3 * tolerance
    assert bernoulli(np.random.default_rng(0), rate, 0).size == 0
