"""A run says what its training cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from features.dataset import Dataset
from features.selection import resolve
from ranker.run import Run
from ranker.trainer import build, train
from ranker.training_cost import peak_rss_bytes


def test_candidates_and_parameters(trained: Path, dataset: Path):
    found, run, manifest = json.loads((trained / "training.json").read_text()), Run(trained), Dataset(dataset).manifest
    assert found["candidates"] == run.config.training.epochs * manifest.splits["train"].impressions
    assert found["candidates_per_s"] == found["candidates"] / found["seconds"]
    assert run.checkpoints()[-1].name == f"step-{found['steps']:08}"
    spec, dim = resolve(run.config.features, manifest), run.config.tables.dim
    read = sum(f.size for f in (*spec.request, *spec.candidate, *spec.sequence)) * dim
    added = sum(f.size for f in spec.event) * dim * len(spec.sequence)  # to the whole event
    assert found["table_parameters"] == read + added
    dense = build(spec, run.config, run.moments(), {}).dense
    assert found["dense_parameters"] == sum(p.numel() for p in dense.parameters())


def test_a_run_resumed_at_its_end_keeps_what_it_cost(trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / "training.json").read_text()
    train(Run(run).config, run, resume=True)
    assert (run / "training.json").read_text() == before
    (run / "training.json").unlink()  # killed before it was written
    train(Run(run).config, run, resume=True)
    after = json.loads((run / "training.json").read_text())
    assert (after["steps"], after["candidates_per_s"]) == (0, None)


def test_the_peak_does_not_fall():
    before = peak_rss_bytes()
    big = np.ones(2**25)  # 256 MiB
    during = peak_rss_bytes()
    assert during >= big.nbytes
    del big
    assert peak_rss_bytes() >= during >= before
