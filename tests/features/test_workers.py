"""Workers of the loader when the process that they work for ends."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys

import torch

from features.workers import built

class Source:
    def __getitem__(self, step):
        if step == 1 and sys.argv[1] == "worker":
            raise ValueError(f"no batch {step}")
        return {"x": torch.zeros(1)}

for batch in built(Source(), range(100), workers=2, prefetch=1):
    if sys.argv[1] == "consumer":
        raise ValueError("no step 0")
"""


@pytest.mark.parametrize(("fails", "error"), [("worker", "no batch 1"), ("consumer", "no step 0")])
def test_a_process_ends_with_the_error_of_a_worker_and_its_own(fails: str, error: str):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, fails], capture_output=True, text=True, timeout=120, check=False
    )

    assert ended.returncode == 1
    assert f"ValueError: {error}" in ended.stderr
    assert "killed" not in ended.stderr
