"""The references without sequences: their equations, literally, and reading them from a dataset folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from features.dataset import Dataset, DatasetError, partition_dir, write_arrow
from ranker.evaluation.metrics import Predictions, task_metrics
from ranker.evaluation.references import (
    REFERENCES,
    Impressions,
    References,
    count_references,
    fit_references,
    read_impressions,
)


def random_impressions(rows: int, seed: int = 0) -> Impressions:
    rng = np.random.default_rng(seed)
    return Impressions(
        user=rng.integers(0, 20, rows),
        item=rng.integers(0, 30, rows),
        click=(rng.random(rows) < 0.4).astype(np.float32),
        conversion=(rng.random(rows) < 0.5).astype(np.float32),
    )


def select(chunk: Impressions, rows: np.ndarray | slice) -> Impressions:
    return Impressions(chunk.user[rows], chunk.item[rows], chunk.click[rows], chunk.conversion[rows])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize("task", ["ctr", "ctcvr", "cvr"])
def test_equals_the_equations_written_out(task: str) -> None:
    chunk, k = random_impressions(400), 20
    label = {"ctr": chunk.click, "ctcvr": chunk.click * chunk.conversion, "cvr": chunk.conversion}[task]
    counted = chunk.click == 1 if task == "cvr" else np.ones(400, bool)
    user, item, label = chunk.user[counted], chunk.item[counted], label[counted].astype(np.float64)
    m = float(label.mean())
    references = count_references([chunk])
    for u, i in [(0, 0), (3, 7), (19, 29), (19, 1_000), (1_000, 29), (1_000, 1_000)]:
        p_i = (label[item == i].sum() + k * m) / ((item == i).sum() + k)
        p_u = (label[user == u].sum() + k * m) / ((user == u).sum() + k)
        expected = {
            "constant": m,
            "item_rate": p_i,
            "user_item_logit": 1 / (1 + math.exp(-(logit(p_u) + logit(p_i) - logit(m)))),
        }
        found = {name: references.predict(name, task, np.array([u]), np.array([i]))[0] for name in REFERENCES}
        assert found == pytest.approx(expected, rel=1e-12)


def test_chunks_count_like_the_whole() -> None:
    chunk = random_impressions(500)
    whole = count_references([chunk])
    parts = count_references([select(chunk, slice(a, b)) for a, b in [(0, 3), (3, 3), (3, 200), (200, 500)]])
    ids = np.arange(40)
    for name in REFERENCES:
        assert np.array_equal(whole.predict(name, "ctcvr", ids, ids), parts.predict(name, "ctcvr", ids, ids))


def test_conversions_without_a_click_do_not_count() -> None:
    chunk = Impressions(*(np.array(c) for c in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0])))
    references = count_references([chunk])
    assert {task: references.mean(task) for task in ("ctr", "ctcvr", "cvr")} == {"ctr": 0.5, "ctcvr": 0.25, "cvr": 0.5}


@pytest.mark.parametrize("label", [0, 1])
def test_a_training_split_of_one_class_predicts_finite_probabilities(label: int) -> None:
    zeros = np.zeros(100, int)
    references = count_references([Impressions(zeros, zeros, np.full(100, label), np.full(100, label))])
    for name in REFERENCES:
        p = references.predict(name, "cvr", np.array([0, 9]), np.array([0, 9]))
        assert ((p > 0) & (p < 1)).all()


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was counted"):
        References().predict("constant", "ctr", np.array([0]), np.array([0]))


def test_negative_ids_are_refused() -> None:
    one = np.array([1])
    with pytest.raises(ValueError, match="id -1 is negative"):
        count_references([Impressions(one, -one, one)])


def test_scores_take_the_models_place_and_the_user_term_leaves_ranking_within_users_alone() -> None:
    test = random_impressions(2_000, seed=1)
    predictions = Predictions(
        user=test.user,
        item=test.item,
        history_length=test.user,
        request=test.user,
        click=test.click,
        conversion=test.conversion,
        p_ctr=np.zeros(2_000),
    )
    references = count_references([random_impressions(500)])
    measured = {name: task_metrics(references.score(name, predictions)) for name in REFERENCES}
    assert measured["constant"]["ctr"].auc == 0.5
    for task in ("ctr", "ctcvr", "cvr"):
        assert measured["item_rate"][task].uauc == pytest.approx(measured["user_item_logit"][task].uauc, abs=1e-12)


def test_without_conversions_in_training_only_ctr_is_scored() -> None:
    chunk = random_impressions(50)
    references = count_references([Impressions(chunk.user, chunk.item, chunk.click)])
    scored = references.score(
        "item_rate",
        Predictions(
            user=chunk.user,
            item=chunk.item,
            history_length=chunk.user,
            request=chunk.user,
            click=chunk.click,
            conversion=chunk.conversion,
            p_ctr=chunk.click,
        ),
    )
    assert (scored.p_ctcvr, scored.p_cvr) == (None, None)


class FolderOfTwoPartitions(Dataset):
    """Partition p has users 10 p + (0, 1, 2), three train requests, then one of test; no manifest is read."""

    def __init__(self, root: Path, labels: list[str]) -> None:
        self.root = root
        self.manifest = SimpleNamespace(labels=labels, partitions=[])
        for p in range(2):
            users = pa.array([10 * p, 10 * p + 1, 10 * p + 2], pa.int32())
            write_arrow(pa.table({"user": users}), partition_dir(root, p) / "histories.arrow")
            lists = {
                "items": pa.array([[1, 2], [], [3], [4, 5]], pa.list_(pa.int32())),
                "label.click": pa.array([[1, 0], [], [p], [0, 0]], pa.list_(pa.float32())),
                "label.conversion": pa.array([[1, 1], [], [0], [0, 0]], pa.list_(pa.float32())),
            }
            table = pa.table({"row": pa.array([0, 1, 2, 2], pa.int32()), **lists})
            write_arrow(table, partition_dir(root, p) / "requests.arrow")
            self.manifest.partitions.append(SimpleNamespace(requests={"train": (0, 3), "test": (3, 4)}))


@pytest.mark.parametrize("requests", [1, 2, 100])
def test_reads_a_split_from_all_partitions_in_chunks(tmp_path: Path, requests: int) -> None:
    dataset = FolderOfTwoPartitions(tmp_path, ["click", "conversion"])
    chunks = list(read_impressions(dataset, "train", requests=requests))
    assert np.concatenate([c.user for c in chunks]).tolist() == [0, 0, 2, 10, 10, 12]
    assert np.concatenate([c.item for c in chunks]).tolist() == [1, 2, 3, 1, 2, 3]
    assert np.concatenate([c.click for c in chunks]).tolist() == [1, 0, 0, 1, 0, 1]
    assert np.concatenate([c.conversion for c in chunks]).tolist() == [1, 1, 0, 1, 1, 0]
    assert [c.item.tolist() for c in read_impressions(dataset, "test", requests=requests)] == [[4, 5], [4, 5]]
    assert list(read_impressions(dataset, "valid", requests=requests)) == []


def test_fits_the_training_split_only(tmp_path: Path) -> None:
    references = fit_references(FolderOfTwoPartitions(tmp_path, ["click"]))
    assert (references.impressions, references.mean("ctr"), references.has_conversion) == (6, 0.5, False)


def test_labels_go_by_the_names_they_are_given(tmp_path: Path) -> None:
    dataset = FolderOfTwoPartitions(tmp_path, ["click", "conversion"])
    assert fit_references(dataset, labels=("conversion", None)).mean("ctr") == pytest.approx(4 / 6)
    assert not fit_references(dataset, labels=("click", None)).has_conversion


def test_an_empty_split_cannot_be_fitted(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no impressions in valid"):
        fit_references(FolderOfTwoPartitions(tmp_path, ["click"]), ["valid"])


def assert_published(train: Impressions, test: Impressions, figures: dict[str, dict[str, float]]) -> None:
    """The figures of one reference after another, to the four digits in which they were published."""
    ids = {name: np.unique(np.r_[getattr(train, name), getattr(test, name)]) for name in ("user", "item")}
    dense = [
        {name: np.searchsorted(ids[name], getattr(part, name)) for name in ids} | {"click": part.click}
        for part in (train, test)
    ]
    zeros = np.zeros(len(test.click), int)
    predictions = Predictions(**dense[1], history_length=zeros, request=zeros, p_ctr=zeros)
    references = count_references([Impressions(**dense[0])])
    for name, expected in figures.items():
        metrics = task_metrics(references.score(name, predictions))["ctr"]
        assert {key: getattr(metrics, key) for key in expected} == pytest.approx(expected, abs=5e-5)


@pytest.mark.real_data
def test_reproduces_the_published_figures_of_movielens(ranker_data: Callable[[str], Path]) -> None:
    rows = duckdb.sql(f"""
        with events as (
            select *, row_number() over () as line
            from read_csv('{ranker_data("ml-1m")}/ml-1m.inter', delim = '\t', header = false, skip = 1, quote = '',
                          columns = {{user: 'varchar', item: 'varchar', rating: 'double', time: 'double'}})
        ), placed as (
            select *, row_number() over (partition by user order by time, line) - 1 as before,
                      row_number() over (partition by user order by time desc, line desc) as from_end
            from events
        )
        select user, item, rating >= 4 as click, from_end <= 10 as test
        from placed where before >= 20 and from_end <= 40
    """).fetchnumpy()
    columns = [rows[name].astype(str) for name in ("user", "item")] + [rows["click"]]
    test = rows["test"]
    assert (int((~test).sum()), int(test.sum())) == (135_597, 56_039)
    assert_published(
        Impressions(*(column[~test] for column in columns)),
        Impressions(*(column[test] for column in columns)),
        {
            "constant": {"logloss": 0.6797},
            "item_rate": {"auc": 0.7241, "uauc": 0.6636, "logloss": 0.6050},
            "user_item_logit": {"auc": 0.7639, "logloss": 0.5670},
        },
    )


@pytest.mark.real_data
def test_reproduces_the_published_figures_of_ebnerd(ranker_data: Callable[[str], Path]) -> None:
    def impressions(part: str, where: str) -> Impressions:
        rows = duckdb.sql(f"""
            select user, item, list_contains(clicked, item) as click from (
                select user_id as user, unnest(article_ids_inview) as item, article_ids_clicked as clicked
                from '{ranker_data("ebnerd_demo")}/behaviors_{part}.parquet' where {where}
            )
        """).fetchnumpy()
        return Impressions(rows["user"].astype(np.int64), rows["item"].astype(np.int64), rows["click"])

    train, test = impressions("train", "user_id % 10 < 6"), impressions("val", "true")
    assert (len(train.click), len(test.click)) == (167_847, 304_915)
    assert_published(
        train,
        test,
        {
            "constant": {"logloss": 0.2873},
            "item_rate": {"auc": 0.5470, "uauc": 0.5431, "logloss": 0.2836},
            "user_item_logit": {"auc": 0.5765, "uauc": 0.5431, "logloss": 0.2826},
        },
    )
