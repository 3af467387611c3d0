"""A ranker reads semantic IDs like any other column, and is bound to the codebook it was trained with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from features.dataset import Dataset
from features.semantic_ids.apply import apply
from features.semantic_ids.codebook import Codebook
from features.semantic_ids.fit import fit
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.export import export
from ranker.run import Run, RunError
from ranker.training.trainer import train
from tests.ranker.conftest import sids_config

ConfigOf = Callable[..., TrainConfig]
FEATURES = ("features.candidate=[item, item.category, item.sid_path]", "features.sequence=[item, item.sid_1]")


@pytest.fixture
def coded(coded: Path, tmp_path: Path) -> Path:
    """A copy to change of the small dataset with codes, and of their codebook."""
    shutil.copytree(coded.with_name("codebook"), tmp_path / "codebook")
    return shutil.copytree(coded, tmp_path / "dataset")


def trained_on(coded: Path, config_of: ConfigOf, out: Path, *more: str) -> Path:
    train(config_of(f"dataset={coded}", *FEATURES, "training.max_steps=6", *more), out)
    return out


def test_trains_measures_and_exports_with_codes(coded: Path, config_of: ConfigOf, tmp_path: Path):
    run = trained_on(coded, config_of, tmp_path / "run")
    report = evaluate(run)
    assert report is not None
    assert export(run, tmp_path / "export", requests=300) <= 1e-5
    recorded = {"sid": {"version": "monday", "content_hash": Dataset(coded).manifest.codebooks["sid"].content_hash}}
    assert json.loads((run / "run.json").read_text())["codebooks"] == recorded
    assert json.loads((tmp_path / "export" / "manifest.json").read_text())["codebooks"] == recorded


def test_the_tables_have_a_row_for_each_code_and_prefix(
    coded: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint
):
    run = trained_on(coded, config_of, tmp_path / "run")
    shapes = {name: tuple(x.shape) for name, x in read_checkpoint(Run(run).best()).items() if torch.is_tensor(x)}
    rows = {
        name.split(".")[-2]: shape[0] for name, shape in shapes.items() if name.endswith(".weight") and "sid" in name
    }
    assert rows["candidate_item_sid_path"] == 1 + 4 + 16
    assert rows["sequence_item_sid_1"] == 1 + 4


def test_another_codebook_is_refused_by_name(coded: Path, config_of: ConfigOf, tmp_path: Path):
    run = trained_on(coded, config_of, tmp_path / "run")
    other, _ = fit(sids_config(seed=1, version="tuesday"), Dataset(coded), tmp_path / "other", lambda line: None)
    apply(other, Dataset(coded))
    with pytest.raises(
        RunError, match=r"semantic IDs 'sid': .* trained with version monday \(.*\), the dataset has version tuesday"
    ):
        evaluate(run)
    apply(Codebook.open(tmp_path / "codebook"), Dataset(coded))
    assert evaluate(run) is not None


def test_the_same_codebook_under_another_label_is_the_same(coded: Path, config_of: ConfigOf, tmp_path: Path):
    run = trained_on(coded, config_of, tmp_path / "run")
    relabelled, _ = fit(sids_config(version="tuesday"), Dataset(coded), tmp_path / "other", lambda line: None)
    apply(relabelled, Dataset(coded))
    assert Run(run).dataset().manifest.codebooks["sid"].version == "tuesday"


def test_a_run_that_reads_no_codes_does_not_mind(coded: Path, config_of: ConfigOf, tmp_path: Path):
    train(config_of(f"dataset={coded}", "training.max_steps=2"), tmp_path / "run")
    other, _ = fit(sids_config(seed=1), Dataset(coded), tmp_path / "other", lambda line: None)
    apply(other, Dataset(coded))
    Run(tmp_path / "run").dataset()


def test_a_dataset_without_codes_is_refused(dataset: Path, config_of: ConfigOf, tmp_path: Path):
    with pytest.raises(Exception, match=r"'item.sid_path' is not in the dataset"):
        trained_on(dataset, config_of, tmp_path / "run")


def command(*arguments: object) -> tuple[int, str]:
    """A run of the command line, and what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", "ranker.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    return result.returncode, result.stdout + result.stderr


def test_the_commands_fit_apply_and_show(dataset: Path, tmp_path: Path):
    copy = shutil.copytree(dataset, tmp_path / "dataset")
    path = tmp_path / "sids.yaml"
    path.write_text("content: [{type: behaviour, dim: 4, min_count: 1}]\nlevels: [4, 4]\nreport: {pictures: false}\n")
    code, said = command("sids", "fit", path, "--dataset", copy, "--out", tmp_path / "codebook", "--set", "version=mon")
    assert code == 0, said
    assert "version mon" in said
    assert "perplexity" in said
    code, said = command("sids", "apply", tmp_path / "codebook", "--dataset", copy)
    assert code == 0, said
    assert "40 of 40 items coded: item.sid_1, item.sid_2, item.sid_path, item.sid_vector" in said
    code, said = command("sids", "show", tmp_path / "codebook")
    assert code == 0, said
    assert "perplexity" in said


def test_what_the_user_can_put_right_is_one_message(dataset: Path, tmp_path: Path):
    path = tmp_path / "sids.yaml"
    path.write_text("content: [{type: vector, column: item.contents}]\nlevels: [4, 4]\n")
    code, said = command("sids", "fit", path, "--dataset", dataset, "--out", tmp_path / "codebook")
    assert code == 2
    assert "item.contents" in said
    assert "Traceback" not in said
    code, said = command("sids", "apply", tmp_path / "codebook", "--dataset", dataset)
    assert code == 2
    assert "not a codebook" in said
