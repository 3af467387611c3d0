"""`ranker requests`: what a server sends for requests of a split, and the scores it should get."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from features.errors import UserError
from features.selection import resolve
from ranker.evaluate import restore
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.ranks import join_ranks
from ranker.requests_file import FORMAT, Example, models_of, save_requests, write_requests
from ranker.run import Run
from ranker.towers import esmm_probabilities


def test_requests_are_the_splits_first_with_the_trainers_scores(trained: Path, tmp_path: Path):
    assert write_requests(trained, "test", 9, tmp_path / "some" / "requests") == 9
    found = load_file(tmp_path / "some" / "requests")
    run = Run(trained)
    data = run.dataset()
    selection = selection_of(run.config, data, resolve(run.config.features, data.manifest))
    with join_ranks("cpu", 1) as ranks:
        model = restore(run, ranks).eval()
        batch = next(scoring_loader(run.config, data, "test", selection, ranks).batches())  # 32 requests together
        with torch.no_grad():
            scores = esmm_probabilities(model(batch).logits)
    assert batch.requests > 9
    for r in range(9):
        candidates = slice(*batch.offsets[r : r + 2].tolist())
        torch.testing.assert_close(found[f"{r}/expected"], scores[candidates], rtol=0, atol=1e-6)
        assert found[f"{r}/ranker/now"].tolist() == [batch.now[r]]
        times = batch.event_time[batch.start[r] : batch.end[r]]
        start, end = (int(found[f"{r}/ranker/{name}"]) for name in ("start", "end"))
        assert found[f"{r}/ranker/event_time"][start:end].equal(times)
    with safe_open(tmp_path / "some" / "requests", "pt") as file:
        assert file.metadata() == {"format": FORMAT, "requests": "9"}
    names = {name.split("/", 1)[1] for name in found}
    given = models_of(batch, selection.spec, run.config)
    assert set(given) == {"ranker", "user_encoder", "candidate_ranker"}
    without_entries = {"user_encoder/probes", "candidate_ranker/memory"}  # the mean is of the request, not of probes
    assert names == {"expected", *(f"{model}/{name}" for model in given for name in given[model])} - without_entries


def test_a_split_may_have_fewer(trained: Path, tmp_path: Path):
    test = Run(trained).dataset().manifest.splits["test"].requests
    assert write_requests(trained, "test", 10**6, tmp_path / "requests") == test


def test_nothing_is_overwritten(trained: Path, tmp_path: Path):
    (tmp_path / "requests").write_text("mine")
    with pytest.raises(UserError, match="requests: exists; choose another --out"):
        write_requests(trained, "test", 1, tmp_path / "requests")
    assert (tmp_path / "requests").read_text() == "mine"


def test_another_split_than_the_datasets_is_refused(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"--split later: not in .*; it has train, valid, test"):
        write_requests(trained, "later", 1, tmp_path / "requests")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_dictionaries_and_views(tmp_path: Path):
    numbers = torch.arange(10)
    inputs = {"now": numbers[3:4], "memory": {"0.values": numbers[:4], "1.values": numbers[:6].view(2, 3).T}}
    save_requests([Example({"candidate_ranker": inputs}, torch.ones(2, 1))], tmp_path / "requests")
    found = load_file(tmp_path / "requests")
    assert {name: x.tolist() for name, x in found.items()} == {
        "0/candidate_ranker/now": [3],
        "0/candidate_ranker/memory/0.values": [0, 1, 2, 3],
        "0/candidate_ranker/memory/1.values": [[0, 3], [1, 4], [2, 5]],
        "0/expected": [[1.0], [1.0]],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["requests"]
