"""A run says what its training cost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from features.dataset import Dataset
from features.selection import resolve
from ranker.run import Run
from ranker.training.trainer import build, train


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


def test_the_peak_outlasts_what_made_it():
    told = "from ranker.training.cost import peak_rss_bytes as peak; a = peak(); bytes([1]) * 2**28; print(a, peak())"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 2**28 < after < before + 2**29
