"""Ways to score are compared with the trainer, or with one another, until there were enough requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.batch import RequestBatch
from ranker.export import ExportError
from ranker.export.compiled import Package
from ranker.export.inputs import File
from ranker.export.parity import Parity, Way, compare, refuse_differences
from ranker.export.ways import without_wrong_packages
from tests.ranker.export.conftest import Exported

FILES = (File("other.pt", "ranker"),)
Score = Callable[[RequestBatch], Tensor]


@pytest.fixture(scope="module")
def batch(exported_of: Callable[[str], Exported]) -> RequestBatch:
    """Requests with clicked candidates and others."""
    return exported_of("mean").batch(32)


def trainer(batch: RequestBatch) -> Tensor:
    """Scores by the candidates' items, no two alike."""
    return ((1 + batch.item) / (100 + batch.item) + torch.arange(batch.candidates) * 1e-4).clamp(max=1).unsqueeze(1)


def moved(by: float) -> Score:
    """The trainer's, one of them by so much."""
    return lambda batch: trainer(batch).index_add(0, torch.tensor([3]), torch.tensor([[by]]))


def of(batch: RequestBatch, *ways: Way, requests: int = 1) -> Parity:
    return compare(trainer, ways, [("test", [batch])], requests)


def test_the_greatest_difference_is_found(batch: RequestBatch, capsys: pytest.CaptureFixture[str]):
    parity = of(batch, Way("same", trainer, FILES), Way("near", moved(5e-6), FILES))
    assert parity.ways["same"].greatest_difference == 0
    assert parity.ways["same"].auc == parity.trainer_auc
    assert parity.ways["near"].greatest_difference == pytest.approx(5e-6, rel=0.1)
    assert (parity.requests, parity.candidates) == ({"test": batch.requests}, batch.candidates)
    refuse_differences(parity)
    assert "near: greatest score difference from the trainer 5.0" in capsys.readouterr().err


@pytest.mark.parametrize("by", [2e-5, -0.1, float("nan"), float("inf")])
def test_a_greater_difference_than_allowed_is_refused_by_name(batch: RequestBatch, by: float):
    parity = of(batch, Way("same", trainer, FILES), Way("far", moved(by), FILES))
    with pytest.raises(ExportError, match=r"^far: scores differ from the trainer's by .* \(allowed 1e-05\): not exp"):
        refuse_differences(parity)


def test_a_way_may_have_its_own_bound(batch: RequestBatch):
    refuse_differences(of(batch, Way("far", moved(1e-2), FILES, allowed=2e-2)))


def test_the_root_mean_square_is_bounded_apart_from_the_greatest_difference(batch: RequestBatch):
    """One score may move far where a few may; all by as much may not."""

    def all_moved(batch: RequestBatch) -> Tensor:
        return trainer(batch) + 0.1

    rms = 0.1 / batch.candidates**0.5
    one = Way("one", moved(0.1), FILES, allowed=1.0, allowed_rms=2 * rms)
    parity = of(batch, one)
    assert parity.ways["one"].rms_difference == pytest.approx(rms, rel=1e-4)
    refuse_differences(parity)
    for score in (all_moved, moved(float("nan"))):
        way = Way("all", score, FILES, allowed=1.0, allowed_rms=2 * rms)
        with pytest.raises(ExportError, match="all: scores differ from the trainer's by"):
            refuse_differences(of(batch, way))


def test_a_way_may_be_held_against_another(batch: RequestBatch):
    """As the pair against the whole: two that differ from the trainer alike do not differ from one another."""
    first = Way("first", moved(1e-2), FILES, allowed=2e-2)
    parity = of(batch, first, Way("second", moved(1e-2), FILES, against="first"))
    assert parity.ways["second"].greatest_difference == 0
    refuse_differences(parity)
    with pytest.raises(ExportError, match=r"third: scores differ from first's by"):
        refuse_differences(of(batch, first, Way("third", trainer, FILES, against="first")))


def test_the_auc_of_clicks_is_the_textbooks(batch: RequestBatch):
    """Pairs of a clicked and another candidate in the right order, and the change where scores are turned round."""

    def reversed_(batch: RequestBatch) -> Tensor:
        return 1 - trainer(batch)

    score, clicked = trainer(batch)[:, 0], batch.labels[:, 0] > 0
    right = (score[clicked].unsqueeze(1) > score[~clicked]).double().mean()
    parity = of(batch, Way("reversed", reversed_, FILES, allowed=1.0))
    assert parity.trainer_auc == pytest.approx(float(right), abs=1e-9)
    assert parity.ways["reversed"].auc_change == pytest.approx(1 - 2 * float(right), abs=1e-6)


def test_a_change_of_auc_beyond_the_bound_is_refused(batch: RequestBatch):
    way = Way("reversed", lambda batch: 1 - trainer(batch), FILES, allowed=1.0, allowed_auc=1e-3)
    with pytest.raises(ExportError, match=r"reversed: the AUC of clicks differs from the trainer's by .*±0.001\)"):
        refuse_differences(of(batch, way))


def test_other_splits_follow_until_there_are_enough(batch: RequestBatch):
    """And none is read that is not needed; where there are fewer requests than asked for, all are used."""
    read: list[str] = []

    def batches(split: str, count: int) -> Iterator[RequestBatch]:
        for _ in range(count):
            read.append(split)
            yield batch

    n = batch.requests

    def used(requests: int) -> dict[str, int]:
        read.clear()
        splits = [("test", batches("test", 2)), ("valid", batches("valid", 3)), ("train", batches("train", 9))]
        return dict(compare(trainer, [Way("same", trainer, FILES)], splits, requests).requests)  # type: ignore[arg-type]

    assert used(n + 1) == {"test": 2 * n}
    assert used(2 * n + 1) == {"test": 2 * n, "valid": n}
    assert read == ["test", "test", "valid"]
    assert used(10_000) == {"test": 2 * n, "valid": 3 * n, "train": 9 * n}


def test_the_trainer_scores_each_batch_once(batch: RequestBatch):
    calls: list[int] = []

    def counted(batch: RequestBatch) -> Tensor:
        calls.append(batch.requests)
        return trainer(batch)

    compare(counted, [Way(name, trainer, FILES) for name in "abc"], [("test", [batch, batch])], 10_000)
    assert calls == [batch.requests] * 2


def test_packages_that_score_otherwise_are_left_out(
    batch: RequestBatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = File("ranker.pt2", "ranker")
    pair = File("user_encoder.pt2", "user_encoder"), File("candidate_ranker.pt", "candidate_ranker")
    ways = [
        Way("ranker", trainer, FILES),
        Way("compiled ranker", moved(5e-6), (whole,)),
        Way("compiled pair", moved(1e-4), pair),
    ]
    packages = [Package("user_encoder.pt2", (), None, 20.0), Package("ranker.pt2", (), None, 20.0)]
    for name in ("candidate_ranker.pt", *(package.name for package in packages)):
        (tmp_path / name).touch()
    left, kept, parity = without_wrong_packages(ways, packages, of(batch, *ways), tmp_path)
    refuse_differences(parity)
    assert [way.name for way in left] == list(parity.ways) == ["ranker", "compiled ranker"]
    assert {path.name for path in tmp_path.iterdir()} == {"candidate_ranker.pt", "ranker.pt2"}
    assert kept[1] == packages[1]
    assert "scores differ by 1.0" in str(kept[0].as_json()["left_out_because"])
    assert "no user_encoder.pt2: scores differ by 1.0" in capsys.readouterr().err
