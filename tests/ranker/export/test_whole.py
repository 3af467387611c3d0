"""`ranker export`: the whole ranker in a file that scores as the trainer does, or nothing at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import UserError
from ranker.config import TrainConfig
from ranker.export import ExportError, export, known_ids
from ranker.export import command as exporting
from ranker.ranks import Ranks
from ranker.run import Run, RunError
from ranker.training.trainer import train
from tests.ranker.export.conftest import Exported

ConfigOf = Callable[..., TrainConfig]
Inputs = dict[str, Tensor]
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


@pytest.fixture
def exported(exported_of: Callable[[str], Exported]) -> Path:
    return exported_of("mean").folder


@pytest.fixture
def model(exported_of: Callable[[str], Exported]) -> torch.jit.ScriptModule:
    return exported_of("mean").loaded("ranker.pt")


def one_request(items: int, events: int) -> Inputs:
    """A request by hand, as a server would build it."""
    ids = torch.arange(1, items + 1)
    history = torch.arange(1, events + 1) % 30 + 1
    one = torch.ones(items, dtype=torch.int64)
    return {
        "request_values": torch.tensor([3, 1]),
        "request_lengths": torch.tensor([1, 1]),
        "candidate_values": torch.cat([ids, one, one]),
        "candidate_lengths": torch.ones(3 * items, dtype=torch.int64),
        "sequence_values": torch.cat([history, history % 3, history % 5, ids, one]),
        "sequence_lengths": torch.tensor([events] * 3 + [items] * 2),
        "request_dense": torch.zeros(1, 0),
        "candidate_dense": torch.zeros(items, 1),
        "event_dense": torch.zeros(events, 0),
        "event_codes": torch.zeros(events, 0, dtype=torch.int64),
        "candidate_codes": torch.zeros(items, 0, dtype=torch.int64),
        "event_time": torch.arange(events),
        "now": torch.tensor([10_000]),
        "start": torch.tensor([0]),
        "end": torch.tensor([events]),
        "offsets": torch.tensor([0, items]),
    }


@pytest.mark.parametrize(("items", "events"), [(1, 1), (1, 0), (7, 0), (20, 300)])
def test_sizes_are_free(model: torch.jit.ScriptModule, items: int, events: int):
    p = model(**one_request(items, events))
    assert p.shape == (items, 3)
    assert ((p > 0) & (p < 1)).all()
    torch.testing.assert_close(p[:, 1], p[:, 0] * p[:, 2])


def test_more_candidates_do_not_change_the_others(model: torch.jit.ScriptModule):
    torch.testing.assert_close(model(**one_request(9, 40))[:4], model(**one_request(4, 40)), rtol=0, atol=1e-6)


def test_ids_out_of_range_are_unknown(model: torch.jit.ScriptModule):
    strange, unknown = one_request(3, 5), one_request(3, 5)
    for inputs, item, user in ((strange, 10**9, -7), (unknown, 0, 0)):
        inputs["candidate_values"][0] = item
        inputs["sequence_values"][0] = item
        inputs["request_values"][0] = user
    assert torch.equal(model(**strange), model(**unknown))
    assert not torch.equal(model(**unknown), model(**one_request(3, 5)))


def test_known_ids_go_by_their_own_table():
    values, lengths = torch.tensor([1, 5, 5, 9, -1]), torch.tensor([2, 0, 1, 2])  # two features of two rows
    assert known_ids(values, lengths, [5, 9]).tolist() == [1, 0, 5, 0, 0]


def test_ctr_only_without_pooled_features(
    config_of: ConfigOf, gaps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    features = "features={request: [], candidate: [], dense: [], sequence: [item], event: []}"
    blocks = "model.long=[{type: target_attention, length: 4}, {type: mean}]"
    config = config_of(f"dataset={gaps}", features, blocks, "tasks.conversion=null", "model.tower.type=mmoe")
    train(config, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "export") <= 1e-5
    assert "no user encoder and no candidate ranker: model.long[0] (target_attention): reads" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert manifest["files"]["ranker.pt"]["outputs"] == ["p_ctr"]
    assert manifest["metrics"] is None


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_refused_where_scores_differ(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float):
    whole = exporting.unsharded

    def corrupt(*arguments: Any) -> Any:
        ranker = whole(*arguments)
        with torch.no_grad():
            next(ranker.dense.tower.parameters()).add_(wrong)
        return ranker

    monkeypatch.setattr(exporting, "unsharded", corrupt)
    with pytest.raises(ExportError, match=r"scores differ from the trainer's by .* \(allowed 1e-05\): not exported"):
        export(trained, tmp_path / "export", requests=100)
    assert list(tmp_path.iterdir()) == []


def test_no_requests_to_compare_are_refused(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--requests 0: must be at least 1: what is exported is compared"):
        export(trained, tmp_path / "export", requests=0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(trained: Path, exported: Path, tmp_path: Path):
    with pytest.raises(RunError, match="exists; choose another --out"):
        export(trained, exported)
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "empty", requests=100) <= 1e-5


def test_table_rows_are_those_of_the_checkpoint(
    model: torch.jit.ScriptModule, trained: Path, read_checkpoint: Callable[[Path], dict[str, Tensor]]
):
    saved = read_checkpoint(Run(trained).best())
    served = dict(model.named_parameters())
    names = [name for name in served if name.startswith("tables")]
    assert len(names) == 8
    assert not any(parameter.requires_grad for parameter in served.values())
    for name in names:
        assert np.array_equal(served[name].detach(), saved[f".model.{name}"]), name
