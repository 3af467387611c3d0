"""What all tests share: one thread each (they run beside one another), and access to the public logs where they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# a loaded machine is no failure: how long a test takes is the benchmarks' matter
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if "RANKER_DATA" in os.environ:  # tests change their working directory
    os.environ["RANKER_DATA"] = str(Path(os.environ["RANKER_DATA"]).resolve())


@pytest.fixture(scope="session")
def ranker_data() -> Callable[[str], Path]:
    """Folder of one public data set below RANKER_DATA; the test is skipped, with the reason, where it is not."""

    def folder(name: str) -> Path:
        root = os.environ.get("RANKER_DATA")
        if root is None:
            pytest.skip("RANKER_DATA is not set: no public logs to read")
        path = Path(root) / name
        if not path.is_dir():
            pytest.skip(f"{path} does not exist: these logs are not on this machine")
        return path

    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
