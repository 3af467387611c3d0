"""A request's scores depend on the request alone: not on the batch it is in, nor on whose history it shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from features.dataset import Dataset
from features.errors import UserError
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.evaluation.metrics import Predictions
from ranker.evaluation.predict import predict, refuse_not_finite, scoring_loader, selection_of
from ranker.model import Crossed, Ranker, Standardise
from ranker.ranks import Ranks

ConfigOf = Callable[..., TrainConfig]
ALONE = Ranks(0, 1, 1, torch.device("cpu"))
BLOCKS = "model.long=[{type: mean}, {type: target_attention, length: 30}]"
ITEMS_ONLY = "features={request: [user], candidate: [item], dense: [], sequence: [item], event: []}"


def scores(config: TrainConfig, root: Path, split: str = "test") -> Predictions:
    """An untrained, unsharded model's scores."""
    data = Dataset(root)
    spec = resolve(config.features, data.manifest)
    torch.manual_seed(0)
    model = Ranker(spec, config, {}, device=torch.device("cpu"))
    loader = scoring_loader(config, data, split, selection_of(config, data, spec), ALONE)  # type: ignore[arg-type]
    found = predict(model, loader, config, ALONE)
    assert found is not None
    return found


@pytest.mark.parametrize("features", ["name=small", ITEMS_ONLY])
def test_a_request_alone_scores_as_in_a_batch(config_of: ConfigOf, dataset: Path, gaps: Path, features: str):
    root = gaps if features == ITEMS_ONLY else dataset
    options = (f"dataset={root}", features, BLOCKS, "tables.init_scale=1")
    together = scores(config_of(*options, "loader.requests=64"), root)
    alone = scores(config_of(*options, "loader.requests=1"), root)
    assert np.array_equal(together.user, alone.user)
    assert np.array_equal(together.item, alone.item)
    assert together.p_ctr.std() > 1e-3  # far above what is compared
    np.testing.assert_allclose(together.p_ctr, alone.p_ctr, rtol=0, atol=1e-6)
    np.testing.assert_allclose(together.p_cvr, alone.p_cvr, rtol=0, atol=1e-6)
    assert len(np.unique(together.request)) == len(np.unique(alone.request))


def test_conversion_is_click_times_conversion_given_a_click(config_of: ConfigOf, dataset: Path):
    found = scores(config_of(), dataset)
    assert found.p_ctcvr is not None
    np.testing.assert_allclose(found.p_ctcvr, found.p_ctr * found.p_cvr, rtol=1e-12)


def test_history_length_is_that_of_the_longest_block(config_of: ConfigOf):
    def longest(*options: str) -> int:
        return config_of(*options).history_length

    assert longest("model.long=[]") == 20
    assert longest("model.long=[{type: mean, length: 70}]") == 70
    assert longest("model.long=[{type: mean, length: 70}, {type: mean}]") == 0
    assert longest("model.long=[]", "model.short=null") == 1


def test_dense_features_are_standardised_and_clipped():
    standardise = Standardise(["a", "unknown"], {"a": (2.0, 0.5)})
    x = torch.tensor([[2.0, 1.0], [3.0, -9.0], [99.0, 0.0]])
    assert standardise(x).tolist() == [[0, 1], [2, -5], [5, 0]]


def test_scores_that_are_not_numbers_are_refused():
    ones = np.ones(3, np.int64)
    broken = Predictions(
        user=ones, item=ones, history_length=ones, request=ones, click=ones, p_ctr=np.array([0.5, np.nan, 1.0])
    )
    with pytest.raises(UserError, match=r"1 of 3 scores are not finite: training diverged; lower optimizer.lr"):
        refuse_not_finite(broken)


def test_the_tower_sees_the_product_of_what_was_found_and_the_candidate():
    cross, found, candidate = Crossed(2, 3, on=True), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    torch.nn.init.ones_(cross.project.weight)  # type: ignore[union-attr]
    assert cross(found, candidate).tolist() == [[1, 2, 3, 12, 24, 36]]
    assert Crossed(2, 3, on=False)(found, candidate) is found
