"""A version names parameters and codes: the same wherever the run lies, another after any change of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ranker.memory.versions import MemoryVersions, codebook_version, versions_of
from ranker.run import Run, RunError
from ranker.training.checkpoint import SUMS


def test_a_copy_of_a_run_has_its_versions(trained: Path, tmp_path: Path):
    versions = versions_of(Run(trained))
    assert versions_of(Run(shutil.copytree(trained, tmp_path / "copy"))) == versions
    assert 0 < versions.model < 2**64
    assert versions.codebook == 0  # it reads no semantic IDs
    assert str(MemoryVersions(1, 2)) == "model 0000000000000001, codebook 0000000000000002"


def test_other_parameters_and_other_blocks_are_another_version(trained: Path, tmp_path: Path):
    run = Run(shutil.copytree(trained, tmp_path / "copy"))
    versions = versions_of(run)
    sums = run.best() / SUMS
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(reversed(lines)))
    assert versions_of(run) == versions  # the order says nothing
    sums.write_text("".join(["0" + lines[0][1:] if lines[0][0] != "0" else "1" + lines[0][1:], *lines[1:]]))
    assert versions_of(run).model != versions.model

    changed = Run(trained)
    model = changed.config.model
    changed.config = changed.config.model_copy(update={"model": model.model_copy(update={"short": None})})
    assert versions_of(changed).model != versions.model


def test_a_codebooks_content_makes_its_version_not_its_label():
    one = {"codebooks": {"sids": {"version": "monday", "content_hash": "aa"}}}
    renamed = {"codebooks": {"sids": {"version": "tuesday", "content_hash": "aa"}}}
    other = {"codebooks": {"sids": {"version": "monday", "content_hash": "ab"}}}
    assert codebook_version(one) == codebook_version(renamed) != codebook_version(other)
    assert codebook_version({"codebooks": {}}) == codebook_version({}) == 0


def test_without_a_checkpoint_there_is_no_version(trained: Path, tmp_path: Path):
    run = Run(shutil.copytree(trained, tmp_path / "copy"))
    shutil.rmtree(run.root / "checkpoints")
    with pytest.raises(RunError, match="no checkpoint yet"):
        versions_of(run)
