"""The small dataset and model of `tests.ranker`, and a Slurm cluster."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster, slurm_cluster
from tests.ranker.conftest import config_file, dataset, once, read_checkpoint

__all__ = ["config_file", "dataset", "once", "read_checkpoint"]


@pytest.fixture
def cluster(tmp_path: Path) -> Generator[SlurmCluster]:
    """A cluster of this test's own: others beside it do not matter to it."""
    with slurm_cluster(tmp_path) as started:
        yield started
